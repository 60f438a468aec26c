"""Running a model over many texts of different lengths: sorted, bucketed, and cut at one layer."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.ffn import ACTIVATIONS
from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model, tokens_array
from tpatch_jax.patch import Patch, contribution, create, sized
from tpatch_jax.sizes import power_of_two, round_up

__all__ = ["Sites", "batches", "collect", "predicted", "row_length"]

TOKENS_PER_BATCH = 1024
Rows = Any
"""``[rows, d]`` in NumPy, which JAX takes as it is."""


class Sites(NamedTuple):
    """What the cut gives at chosen positions: rows in the order in which they were asked for.

    They stay on the host: so many of them can be kept, and picking some compiles nothing.

    Attributes:
        query: the FFN's input, ``[rows, d]``.
        output: the FFN's output, ``[rows, d]``.
        residual: the residual stream beside the FFN, ``[rows, d]``.
    """

    query: Rows
    output: Rows
    residual: Rows


def row_length(tokens: int) -> int:
    """The length that a row is padded to: a multiple of 8 up to 64, then a power of two.

    Example:
        >>> row_length(5), row_length(17), row_length(70)
        (8, 24, 128)
    """
    return round_up(tokens, 8) if tokens <= 64 else power_of_two(tokens)


def batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Array]]:
    """Token rows grouped by length: which rows, and their table padded on the right.

    Args:
        rows: token ids of each text.

    Yields:
        Row numbers, and ``[lanes, length]`` int; lanes beyond the row numbers are padding.
    """
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(row_length(len(row)), []).append(number)
    for length in sorted(by_length):
        numbers = by_length[length]
        lanes = max(1, TOKENS_PER_BATCH // length)
        lanes = 1 << (lanes.bit_length() - 1)
        for first in range(0, len(numbers), lanes):
            chosen = numbers[first : first + lanes]
            size = power_of_two(len(chosen), most=lanes)
            padding: list[list[int]] = [[] for _ in range(size - len(chosen))]
            yield chosen, tokens_array([*(list(rows[number]) for number in chosen), *padding], length)


def collect(
    model: Model,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layer: int,
    progress: Callable[[int], None] | None = None,
) -> Sites:
    """Trace many texts and keep some positions of each.

    Args:
        model: the model.
        rows: token ids of each text.
        positions: which positions of each text to keep.
        layer: where to cut.
        progress: called with the number of texts done after each batch.

    Returns:
        The `Sites`, text after text, position after position.
    """
    offsets = np.cumsum([0, *(len(chosen) for chosen in positions)])
    width = model.config.width
    dtype = jax.tree.leaves(model.params)[0].dtype
    found = [np.zeros((int(offsets[-1]), width), dtype) for _ in Sites._fields]
    done = 0
    for numbers, table in batches(rows):
        traced = model.trace(table, layer)
        lane = np.concatenate([np.full(len(positions[number]), slot) for slot, number in enumerate(numbers)]).astype(
            int
        )
        place = np.concatenate([np.asarray(positions[number], int) for number in numbers])
        target = np.concatenate([np.arange(offsets[number], offsets[number + 1]) for number in numbers]).astype(int)
        for array, source in zip(found, (traced.query, traced.output, traced.context["residual"]), strict=True):
            array[target] = np.asarray(source)[lane, place]
        done += len(numbers)
        if progress:
            progress(done)
    return Sites(*found)


@partial(jax.jit, static_argnames="config")
def _predicted(config: NetworkConfig, weights: Any, patch: Patch, sites: Sites) -> Array:
    output = sites.output + contribution(patch, sites.query, ACTIVATIONS[config.activation])
    return jnp.argmax(networks.finish(config, weights, {"residual": sites.residual}, output), -1)


def predicted(model: Model, sites: Sites, patch: Patch | None = None, rows: int = 1024) -> np.ndarray:
    """The most probable token after each row of the last layer, in chunks so that logits never pile up.

    Args:
        model: the model.
        sites: from `collect` at the model's last layer.
        patch: neurons that are active in that layer, ``[n, d]``, with the feed-forward network's own activation.
        rows: how many at a time.

    Returns:
        ``[rows]`` int.
    """
    total = sites.query.shape[0]
    result = np.zeros(total, np.int32)
    weights = networks.final_weights(model.config, model.params)
    patch = sized((create(model.config.width) if patch is None else patch)._replace(layer=None), 64)
    for first in range(0, total, rows):
        count = min(rows, total - first)
        missing = power_of_two(count, min(64, rows), rows) - count
        part = Sites(*(np.pad(array[first : first + count], ((0, missing), (0, 0))) for array in sites))
        result[first : first + count] = np.asarray(_predicted(model.config, weights, patch, part))[:count]
    return result
