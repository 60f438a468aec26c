"""Activations that dwarf all others: where they are, and the same network without them.

In most decoders a few neurons fire hundreds of times as strongly as all others, at the first token of any text, and a
few dimensions of what norms return are tens of times as large. Where activations are rounded with one scale for a whole
text, as dynamic quantisation does, little is left of all others.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core import ffn
from tpatch_jax.core.per_tensor import choose_copies, choose_scales, split_neurons
from tpatch_jax.models.blocks import Around
from tpatch_jax.models.collection import batches
from tpatch_jax.models.config import LayerKind, NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.stack import embed_batch, enter_block, leave_block, normalise
from tpatch_jax.typing import Params

__all__ = ["Sizes", "activation_sizes", "has_plain_blocks", "spread_outliers"]

HIDDEN = "hidden"
READERS: dict[str, str] = {"norm_1": "attention", "norm_2": "ffn"}
"""What reads the output of a layer's norms."""

MATRICES: dict[str, tuple[str, ...]] = {"attention": ("query", "key", "value"), "ffn": ("gate", "up")}


class Sizes(NamedTuple):
    """How large activations are on text.

    Attributes:
        largest: the largest absolute value of each dimension.
        square: the mean square of each, ``Σ_t τ_t·h_t² / Σ_t τ_t`` with ``τ_t = 1/‖h_t‖²``: what is lost of a token
            counts beside what it has, or the few that are hundreds of times as large as others would stand for all.
    """

    largest: Float[np.ndarray, "width"]
    square: Float[np.ndarray, "width"]


def activation_sizes(model: Model, rows: Sequence[Sequence[int]]) -> list[dict[str, Sizes]]:
    """How large activations of every layer are, at all tokens of some texts.

    Args:
        model: a decoder.
        rows: the texts in tokens.

    Returns:
        Of each layer the `Sizes` of what its norms return, by name, and of its neurons, as ``"hidden"``.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("smollm2-135m")  # doctest: +SKIP
        >>> sizes = activation_sizes(model, [model.encode("Robert Boulter is an actor.")])  # doctest: +SKIP
        >>> round(sizes[11]["hidden"].largest.max())  # doctest: +SKIP
        3194
    """
    config, layers = model.config, model.params["layers"]
    totals: list[dict[str, list[np.ndarray]]] = [{} for _ in layers]
    for numbers, batch in batches(config, rows):
        _, x, positions, around = embed_batch(config, model.params, batch)
        lengths = np.zeros(x.shape[0], int)
        lengths[: len(numbers)] = [len(rows[number]) for number in numbers]
        valid = jnp.asarray(np.arange(x.shape[1]) < lengths[:, None])
        for index, sums in enumerate(totals):
            x, measured = _measured_block(config, config.kind(index), layers[index], x, positions, around, valid)
            for name, values in measured.items():
                largest, squares, weight = (np.asarray(value, np.float64) for value in values)
                before = sums.get(name, [np.zeros_like(value) for value in (largest, squares, weight)])
                sums[name] = [np.maximum(before[0], largest), before[1] + squares, before[2] + weight]
    return [
        {name: Sizes(largest, squares / weight) for name, (largest, squares, weight) in sums.items()} for sums in totals
    ]


@partial(jax.jit, static_argnames=("config", "kind"))
def _measured_block(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
    around: Around,
    valid: Bool[Array, "batch tokens"],
) -> tuple[Float[Array, "batch tokens hidden"], dict[str, tuple[Array, Array, Array]]]:
    """The residual stream after a block, and of what is inside the largest, the weighted squares, and the weights."""
    residual, query, output = enter_block(config, kind, params, x, positions, None, around)
    values = {"norm_2": query, HIDDEN: ffn.hidden(ffn.detach(params["ffn"]), query, config.activation)}
    if "norm_1" in params:
        values["norm_1"] = normalise(config, params["norm_1"], x)

    def sizes(value: Float[Array, "batch tokens width"]) -> tuple[Array, Array, Array]:
        value = jnp.where(valid[..., None], jnp.abs(value), 0)
        norm = jnp.sum(jnp.square(value), -1)
        weight = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
        return jnp.max(value, (0, 1)), jnp.einsum("bt,btw->w", weight, jnp.square(value)), jnp.sum(weight)

    return leave_block(config, kind, params, residual, output), {name: sizes(value) for name, value in values.items()}


def spread_outliers(model: Model, rows: Sequence[Sequence[int]], width: int) -> tuple[Model, int]:
    """The same decoder without activations that set the scale of all others.

    What a norm returns is divided, dimension by dimension, by powers of two, and the rows of the matrices that read it
    are multiplied by them (`choose_scales`). In a gated feed-forward network several neurons share the hidden value of
    one (`split_neurons`).

    Args:
        model: patches may be merged into it. One that is no decoder, or has experts or latent attention,
            stays as it is.
        rows: texts in tokens on which to look for such activations.
        width: no feed-forward network becomes wider than that.

    Returns:
        The model, whose output is what it was but for the order of sums, and how many neurons were added.

    Example:
        >>> spread_outliers(model, rows, 1792)[1]  # doctest: +SKIP
        7507
    """
    config, layers, added = model.config, dict(model.params["layers"]), 0
    if not has_plain_blocks(config):
        return model, 0
    for index, sizes in enumerate(activation_sizes(model, rows)):
        layer = layers[index]
        if config.pre_norm and not config.post_norm and not config.norm_shift and config.block != "shared":
            for norm in filter(layer.__contains__, READERS):
                layer = _scaled(layer, norm, sizes[norm])
        if config.gated:
            network = layer["ffn"]
            copies = choose_copies(network, *sizes[HIDDEN], width - ffn.width(network))
            layer = {**layer, "ffn": split_neurons(network, copies)}
            added += int(copies.sum()) - len(copies)
        layers[index] = layer
    return model.with_params({**model.params, "layers": layers}), added


def has_plain_blocks(config: NetworkConfig) -> bool:
    """Whether a network is a decoder alone, with one feed-forward network a layer and keys of its own."""
    return config.architecture == "decoder" and not (config.encoder or config.mixture or config.latent)


def _scaled(layer: Params, norm: str, sizes: Sizes) -> Params:
    """A layer whose norm returns smaller outliers, to matrices that make up for it."""
    result, part = dict(layer), READERS[norm]
    names = [name for name in MATRICES[part] if name in layer[part]]
    scales = choose_scales([np.asarray(layer[part][name]["kernel"], np.float64) for name in names], *sizes)
    result[norm] = {name: array / jnp.asarray(scales, array.dtype) for name, array in layer[norm].items()}
    times = {
        name: {**layer[part][name], "kernel": layer[part][name]["kernel"] * jnp.asarray(scales, jnp.float32)[:, None]}
        for name in names
    }
    result[part] = {**layer[part], **times}
    return result
