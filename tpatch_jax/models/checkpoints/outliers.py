"""Hidden values of one token that dwarf all others: where they are, and neurons that share them.

In most decoders a few neurons fire hundreds of times as strongly as all others, at the first token of any text. Where
what ``down`` reads is rounded with one scale, as dynamic quantisation does, nothing is left of the other tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tpatch_jax.core import ffn
from tpatch_jax.core.per_tensor import choose_copies, split_neurons
from tpatch_jax.models.collection import batches
from tpatch_jax.models.model import Model
from tpatch_jax.models.stack import embed_batch, enter_block, leave_block, without_ffn
from tpatch_jax.typing import Params

__all__ = ["HiddenSizes", "hidden_sizes", "split_outliers"]


class HiddenSizes(NamedTuple):
    """How large the hidden values of a feed-forward network are on text.

    Attributes:
        largest: the largest absolute value of each neuron.
        square: the mean square of each.
    """

    largest: Float[np.ndarray, "width"]
    square: Float[np.ndarray, "width"]


def hidden_sizes(model: Model, rows: Sequence[Sequence[int]]) -> list[HiddenSizes]:
    """How large hidden values of every layer's feed-forward network are, at all tokens of some texts.

    Args:
        model: a decoder.
        rows: the texts in tokens.

    Returns:
        The `HiddenSizes` of each layer.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("smollm2-135m")  # doctest: +SKIP
        >>> hidden_sizes(model, [model.encode("Paris is large.")])[11].largest.max()  # doctest: +SKIP
        3194.0
    """
    config, layers = model.config, model.params["layers"]
    largest = [np.zeros(ffn.width(layers[index]["ffn"])) for index in range(config.layers)]
    total = [np.zeros_like(each) for each in largest]
    for numbers, batch in batches(config, rows):
        _, x, positions, around = embed_batch(config, model.params, batch)
        lengths = np.zeros(x.shape[0], int)
        lengths[: len(numbers)] = [len(rows[number]) for number in numbers]
        valid = jnp.asarray(np.arange(x.shape[1]) < lengths[:, None])
        for index in range(config.layers):
            kind, weights = config.kind(index), layers[index]
            residual, query, output = enter_block(config, kind, weights, x, positions, None, around)
            most, squares = _sizes(config.activation, ffn.detach(weights["ffn"]), query, valid)
            largest[index] = np.maximum(largest[index], most)
            total[index] += np.asarray(squares)
            x = leave_block(config, kind, without_ffn(weights), residual, output)
    count = max(1, sum(map(len, rows)))
    return [HiddenSizes(most, squares / count) for most, squares in zip(largest, total, strict=True)]


@partial(jax.jit, static_argnames="activation")
def _sizes(
    activation: str, network: Params, query: Float[Array, "batch tokens hidden"], valid: Bool[Array, "batch tokens"]
) -> tuple[Float[Array, "width"], Float[Array, "width"]]:
    values = jnp.where(valid[..., None], jnp.abs(ffn.hidden(network, query, activation)), 0)
    return jnp.max(values, (0, 1)), jnp.sum(jnp.square(values), (0, 1))


def split_outliers(model: Model, rows: Sequence[Sequence[int]], width: int) -> tuple[Model, int]:
    """A decoder in which several neurons share the hidden value of each that sets the scale of all others.

    Args:
        model: patches may be merged into it; without gates it stays as it is.
        rows: texts in tokens on which to look for such neurons.
        width: no feed-forward network becomes wider than that.

    Returns:
        The model, whose output is what it was but for the order of sums, and how many neurons were added.

    Example:
        >>> split_outliers(model, rows, 1792)[1]  # doctest: +SKIP
        2543
    """
    layers, added = dict(model.params["layers"]), 0
    if model.config.architecture != "decoder" or not all("gate" in layer["ffn"] for layer in layers.values()):
        return model, 0
    for index, sizes in enumerate(hidden_sizes(model, rows)):
        network = layers[index]["ffn"]
        copies = choose_copies(network, *sizes, width - ffn.width(network))
        layers[index] = {**layers[index], "ffn": split_neurons(network, copies)}
        added += int(copies.sum()) - len(copies)
    return model.with_params({**model.params, "layers": layers}), added
