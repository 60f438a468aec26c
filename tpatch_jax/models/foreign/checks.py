"""What every foreign network is checked for, whatever kind of module it comes from."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import describe
from tpatch_jax.core.patch import Patch, product
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.foreign.cut import is_tokens
from tpatch_jax.models.foreign.network import Activation, Growth, Network, token_table, tolerance

__all__ = [
    "Matrices",
    "Path",
    "arranged",
    "check_path",
    "create_network",
    "example_inputs",
    "layers_of",
    "suggestion",
    "widened",
]

Matrices = Mapping[str, Mapping[str, Array]]
"""An FFN's linear layers by role, ``"up"``, ``"down"`` and perhaps ``"gate"``: kernel and perhaps bias of each."""


Path = str | tuple[str, ...]
"""Where an FFN is: of its module, or of its linear layers, ``(up, down)`` or ``(gate, up, down)``."""


def check_path(path: Any, call: str) -> None:
    """Make sure that a path is a text, or two or three texts."""
    several = isinstance(path, tuple | list) and len(path) in (2, 3) and all(isinstance(part, str) for part in path)
    if not isinstance(path, str) and not several:
        raise TPatchError(
            f"{call}: {describe(path)} is no path of a module; give a text such as 'layers.3.mlp', or those of its "
            "first and its last linear layer, ('layers.3.fc1', 'layers.3.fc2')"
        )


def layers_of(path: Path, call: str, named: Sequence[str | None]) -> dict[str, str]:
    """The linear layers that a path of several names, by role; empty of one path.

    Args:
        path: checked already.
        call: for messages.
        named: what the user named besides.
    """
    if isinstance(path, str):
        return {}
    if any(named):
        raise TPatchError(f"{call}: a path of {len(path)} layers names them already; leave up=, down= and gate= out")
    return dict(zip(("up", "down") if len(path) == 2 else ("gate", "up", "down"), path, strict=True))


def _layer_number(path: Path) -> int:
    """The last number in a path, or in what the paths of several layers have in common; 0 without one."""
    if not isinstance(path, str):
        parts = zip(*(each.replace("/", ".").split(".") for each in path), strict=False)
        path = ".".join(same[0] for same in takewhile(lambda same: len(set(same)) == 1, parts))
    numbers = re.findall(r"\d+", path)
    return int(numbers[-1]) if numbers else 0


def create_network(
    run: Callable[[Any, Array], Array],
    params: Any,
    path: Path,
    activation: str | Activation,
    example: Any,
    growth: Growth | str,
    candidates: Sequence[Matrices] = (),
) -> Network:
    """Check what makes a `Network`, cut it once, and see whether what is cut out is a feed-forward network.

    Args:
        run: see `Network`.
        params: see `Network`.
        path: see `Network`.
        activation: a name or a function.
        example: token ids, any other pytree, or ``None``.
        growth: see `Network`.
        candidates: what the FFN's matrices may be, by role; of one that merges, those that it grows.

    Raises:
        TPatchError: something is not as it should be, or the module is no FFN, or one with another activation.
    """
    if isinstance(activation, str):
        if activation not in ffn.ACTIVATIONS:
            known = ", ".join(sorted(ffn.ACTIVATIONS))
            raise TPatchError(f"activation {activation!r} is not known; use one of {known}, or a function")
        activation = ffn.ACTIVATIONS[activation]
    if not callable(activation):
        raise TPatchError(f"activation is {describe(activation)}; give a name such as 'gelu_tanh', or a function")
    given = example is not None
    inputs = example_inputs(example)
    if is_tokens(inputs) and inputs.shape[1] < 2:
        raise TPatchError("the example has rows of one token; give rows of at least two")
    # What is tried on the example is tried with these parameters, whatever is traced or trained later.
    network = Network(
        run,
        params,
        path if isinstance(path, str) else " to ".join(path),
        _layer_number(path),
        activation,
        inputs,
        growth=growth,
        _memo={"params": params},
    )
    halves = network.halves
    if not given:
        drawn = np.random.default_rng(0).integers(0, halves.logits.shape[-1], inputs.shape)
        network = dataclasses.replace(network, example=jnp.asarray(drawn, inputs.dtype))
    # Shapes alone, or what is being traced, cannot be tried.
    if all(
        isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)
    ):
        with jax.default_matmul_precision("highest"):
            _check_network(network, candidates)
    return network


def example_inputs(example: Any) -> Any:
    """What a network reads, from what the user gave as an example: token ids by default."""
    if example is None:
        return token_table(np.zeros((2, 8), np.int32))
    try:
        arrays = jax.tree.map(jnp.asarray, example)
    except (TypeError, ValueError):
        arrays = None
    several = isinstance(example, Mapping | tuple) or not isinstance(example, list)
    if arrays is not None and several and jax.tree.leaves(arrays) and not _is_row(arrays):
        return arrays
    return token_table(example)


def _is_row(arrays: Any) -> bool:
    """Whether it is one row of tokens, of which a table was meant."""
    return isinstance(arrays, Array) and (arrays.ndim < 2 or is_tokens(arrays))


def _check_network(network: Network, candidates: Sequence[Matrices]) -> None:
    """See whether the FFN is one, with the activation that was named, on the example."""
    # What is named the wrong way round is refused where it is merged.
    candidates = [matrices for matrices in candidates if matrices["up"]["kernel"].shape[0] == network.hidden_size]
    traced = network.trace(network.example)
    kinds = [array.dtype for matrices in candidates for entry in matrices.values() for array in entry.values()]
    near, size = tolerance(traced.query, traced.output, *kinds) / 10, float(jnp.linalg.norm(traced.output))

    def difference(matrices: Matrices, activation: Activation) -> float:
        computed = _output(matrices, traced.query, activation).astype(jnp.float32)
        return float(jnp.linalg.norm(computed - traced.output.astype(jnp.float32))) / max(size, 1e-30)

    merges = isinstance(network.growth, Growth)
    apart = [difference(matrices, network.activation) for matrices in candidates]
    # One that is not merged works as well with an activation that is nearly its own.
    if any(distance <= (near if merges else _NEARLY) for distance in apart):
        return
    for matrices in candidates:
        for name, activation in _KNOWN.items():
            if difference(matrices, activation) <= near:
                shown = repr(name) if name in ffn.ACTIVATIONS else name
                raise TPatchError(
                    f"{network.path!r} activates with {shown}, and activation= says otherwise: on the example its "
                    f"output is {min(apart):.1g} off (relative difference); give activation={shown}"
                )
    reason = _no_network(network, traced.query)
    if merges and reason:
        with suppress(TPatchError):
            # What adds its input may be merged into all the same, if nothing else is in it.
            network.try_merging()
            return
    if reason:
        raise TPatchError(
            f"{network.path!r} is no feed-forward network but a block around one: {reason}. An FFN must be a module of "
            "its own, whose input and output alone can be told; where it is written inline in a block, name its first "
            "and its last linear layer as a pair, ('blocks.3.fc1', 'blocks.3.fc2')"
        )


_KNOWN: Mapping[str, Activation] = {
    **ffn.ACTIVATIONS,
    **{
        f"jax.nn.{name}": getattr(jax.nn, name)
        for name in ("tanh", "sigmoid", "softplus", "elu", "selu", "celu", "relu6", "leaky_relu", "mish", "hard_silu")
        if hasattr(jax.nn, name)
    },
    "lambda x: jax.nn.relu(x) ** 2": lambda x: jnp.square(jax.nn.relu(x)),
    "lambda x: x * jax.nn.sigmoid(1.702 * x)": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""What an FFN may activate with, by what is written for it."""

_NEARLY = 0.02
"""Outputs that are so far apart, relatively, are nearly the same: GELU and its approximation are nearer."""


def _output(matrices: Matrices, query: Array, activation: Activation) -> Array:
    """What an FFN of these matrices makes of a query."""

    def linear(role: str, x: Array) -> Array:
        entry = matrices[role]
        y = product(x, jnp.asarray(entry["kernel"]).astype(x.dtype))
        return y + entry["bias"].astype(x.dtype) if "bias" in entry else y

    hidden = activation(linear("gate" if "gate" in matrices else "up", query))
    return linear("down", hidden * linear("up", query) if "gate" in matrices else hidden)


def _no_network(network: Network, query: Array) -> str:
    """Why a module cannot be a feed-forward network alone; empty if it may be one."""
    cut, example = network.halves, network.example
    if cut.adds_input:
        return "it adds its own input to what it computes (a residual connection)"
    noise = jax.random.normal(jax.random.key(0), query[:, 0].shape, query.dtype) * jnp.std(query)
    before = cut.jit_network(network.params, example, query)
    after = cut.jit_network(network.params, example, query.at[:, 0].add(noise))
    moved = jnp.abs((after - before)[:, 1:]).max()
    if float(moved) > 16 * float(jnp.finfo(before.dtype).eps) * float(jnp.abs(before).max()):
        return "what it says at one position depends on others (attention)"
    return ""


def arranged(layers: Sequence[Mapping[str, Array]], hidden_size: int) -> list[Matrices]:
    """What the linear layers of a module may be in an FFN: two of them, or three where one is a gate.

    Args:
        layers: of each its kernel ``[in, out]`` and perhaps its bias.
        hidden_size: ``d``.
    """
    readers = [layer for layer in layers if layer["kernel"].shape[0] == hidden_size != layer["kernel"].shape[1]]
    writers = [layer for layer in layers if layer["kernel"].shape[1] == hidden_size != layer["kernel"].shape[0]]
    if len(writers) != 1 or len(readers) not in (1, 2) or len(layers) != len(readers) + 1:
        return []
    (down,) = writers
    if any(layer["kernel"].shape[1] != down["kernel"].shape[0] for layer in readers):
        return []
    if len(readers) == 1:
        return [{"up": readers[0], "down": down}]
    return [{"gate": gate, "up": up, "down": down} for gate, up in (readers, readers[::-1])]


def widened(network: Mapping[str, Any], patch: Patch, path: str) -> dict[str, Any]:
    """`ffn.merge`, once it is sure that the matrices that the user named are an FFN of the patch's width."""
    up, down, width = network["up"]["kernel"], network["down"]["kernel"], patch.key.shape[1]
    if up.shape[0] != width or down.shape != up.shape[::-1]:
        raise TPatchError(
            f"up= and down= of {path!r} are {list(up.shape)} and {list(down.shape)}; on queries of width {width} they "
            f"must be [{width}, hidden] and [hidden, {width}]: name the first and the last layer of the FFN"
        )
    return ffn.merge(dict(network), patch)


def suggestion(call: Callable[[Array], Any], seen: list[tuple[str, bool]], example: Any) -> tuple[bool, str]:
    """Whether the network runs, and which paths an FFN may have, as a sentence.

    Args:
        call: runs the network on inputs and fills ``seen``.
        seen: path of every module that keeps its input's shape, and whether it is a standard layer.
        example: what the network reads, if the user gave any.
    """
    try:
        jax.eval_shape(call, example_inputs(example))
    except Exception as error:
        why = type(error).__name__
        return False, f"its modules cannot be listed, for it does not run ({why}); give call= or example="
    paths = [path for path, standard in seen if not standard] or [path for path, _ in seen]
    return True, f"modules that keep their input's shape: {', '.join(dict.fromkeys(paths)) or 'none'}"
