"""What every foreign network is checked for, whatever kind of module it comes from."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.foreign.network import Activation, Growth, Network, token_table

__all__ = ["create_network", "suggestion", "widened"]


def create_network(
    run: Callable[[Any, Array], Array],
    params: Any,
    path: str,
    activation: str | Activation,
    example: Any,
    growth: Growth | str,
) -> Network:
    """Check what makes a `Network`, and cut it once."""
    if isinstance(activation, str):
        if activation not in ffn.ACTIVATIONS:
            known = ", ".join(sorted(ffn.ACTIVATIONS))
            raise TPatchError(f"activation {activation!r} is not known; use one of {known}, or a function")
        activation = ffn.ACTIVATIONS[activation]
    given = example is not None
    tokens = token_table(example if given else np.zeros((2, 8), np.int32))
    if tokens.shape[1] < 2:
        raise TPatchError("the example has rows of one token; give rows of at least two")
    numbers = re.findall(r"\d+", path)
    # What is tried on the example is tried with these parameters, whatever is traced or trained later.
    network = Network(
        run,
        params,
        path,
        int(numbers[-1]) if numbers else 0,
        activation,
        tokens,
        growth=growth,
        _memo={"params": params},
    )
    if given:
        network.cut(tokens.shape)
        return network
    drawn = np.random.default_rng(0).integers(0, network.vocabulary, tokens.shape)
    return dataclasses.replace(network, example=jnp.asarray(drawn, tokens.dtype))


def widened(own: Mapping[str, Any], patch: Patch, path: str) -> dict[str, Any]:
    """`ffn.merge`, once it is sure that the matrices that the user named are an FFN of the patch's width."""
    up, down, width = own["up"]["kernel"], own["down"]["kernel"], patch.key.shape[1]
    if up.shape[0] != width or down.shape != up.shape[::-1]:
        raise TPatchError(
            f"up= and down= of {path!r} are {list(up.shape)} and {list(down.shape)}; on queries of width {width} they "
            f"must be [{width}, hidden] and [hidden, {width}]: name the first and the last layer of the FFN"
        )
    return ffn.merge(dict(own), patch)


def suggestion(call: Callable[[Array], Any], seen: list[tuple[str, bool]], example: Any) -> tuple[bool, str]:
    """Whether the network runs, and which paths an FFN may have, as a sentence.

    Args:
        call: runs the network on tokens and fills ``seen``.
        seen: path of every module that keeps its input's shape, and whether it is a standard layer.
        example: token ids, if the user gave any.
    """
    tokens = np.zeros((2, 8), np.int32) if example is None else example
    try:
        jax.eval_shape(call, token_table(tokens))
    except Exception as error:
        why = type(error).__name__
        return False, f"its modules cannot be listed, for it does not run ({why}); give call= or example="
    paths = [path for path, standard in seen if not standard] or [path for path, _ in seen]
    return True, f"modules that keep their input's shape: {', '.join(dict.fromkeys(paths)) or 'none'}"
