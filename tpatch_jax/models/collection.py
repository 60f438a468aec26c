"""Running a model over many texts of different lengths: sorted, bucketed, and cut at one layer."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core.devices import host, mesh_of, shard_rows
from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.int8 import float_type
from tpatch_jax.core.patch import Patch, contribution, create, sized
from tpatch_jax.core.sizes import few_or_most, in_steps, power_of_two
from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.embedded import Embedded, EmbeddedToken, table_of, tokens_of
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch, Pair, Trace
from tpatch_jax.models.rows import ASK, place_in, row_length, split_row, tokens_array
from tpatch_jax.models.sharding import split_neurons
from tpatch_jax.storage.rows_on_disk import RowsOnDisk

__all__ = [
    "NEURONS",
    "Sites",
    "batches",
    "collect",
    "collect_once",
    "joined",
    "pad_rows",
    "predict_sites",
    "predicted",
    "real",
    "single_rows",
    "wrong_rows",
]

TOKENS_PER_BATCH = 1024
Rows = Any
"""``[rows, d]`` in NumPy, which JAX takes as it is; or `RowsOnDisk`, where there are many."""

LARGE = 2**24
"""Arrays of more bytes are kept on disk, if they may be."""


WORTH_SHARING = 2
"""A text with which others begin is run on its own if on average so many begin with each."""

NEURONS = 512
"""A patch counts as so many neurons at least: beside a vocabulary they cost nothing, and fewer compile nothing new."""

LEAST_TEXT = 64
"""Where whole texts are kept they are padded to so many tokens at least, so that those of several passes fit."""


class Sites(NamedTuple):
    """What the cut gives at chosen positions: rows in the order in which they were asked for.

    They stay on the host, or on disk: so many of them can be kept, and picking some compiles nothing. Of a classifier
    that reads the mean of all tokens a row is a whole text, ``[tokens, d]``, with zeros for padding.

    Attributes:
        query: the FFN's input, ``[rows, d]``.
        output: the FFN's output, ``[rows, d]``.
        residual: the residual stream beside the FFN, ``[rows, d]``.
    """

    query: Rows
    output: Rows
    residual: Rows


def batches(config: NetworkConfig, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Batch]]:
    """Token rows grouped by length: which rows, and the batch to run the network on.

    Args:
        config: the network's description.
        rows: token ids of each text.

    Yields:
        Row numbers, and the batch, padded on the right; lanes beyond the row numbers are padding.
    """
    parts = [split_row(config, row) for row in rows]
    by_length: dict[tuple[int, int], list[int]] = {}
    for number, (read, written) in enumerate(parts):
        lengths = row_length(len(read)) if read else 0, row_length(len(written)) if written else 0
        lengths = lengths if config.image is None else (config.image.pixels, 0)
        if config.encoder and config.encoder.audio:
            # However long it is, it becomes as many positions.
            lengths = config.encoder.audio.numbers, lengths[1]
        by_length.setdefault(lengths, []).append(number)
    for lengths in sorted(by_length, reverse=True):
        numbers = by_length[lengths]
        lanes = max(1, TOKENS_PER_BATCH // (sum(lengths) if config.image is None else config.image.positions))
        lanes = 1 << (lanes.bit_length() - 1)
        for size in in_steps(len(numbers), lanes) if len(rows) > 1 else [1]:
            chosen = [numbers.pop() for _ in range(min(size, len(numbers)))]
            # A shorter row takes the place of padding.
            for others in (waiting for key, waiting in by_length.items() if _fits(key, lengths)):
                chosen += [others.pop() for _ in range(min(size - len(chosen), len(others)))]
            # A lane of padding alone would have attention see nothing.
            lonely: Any = ([[0]] if lengths[0] else [[]]) * (size - len(chosen))
            sides = [[*(parts[number][side] for number in chosen), *lonely] for side in (0, 1)]
            read, written = (
                table_of(side, length, padding) if length else None
                for side, length, padding in zip(sides, lengths, (ASK, 0), strict=True)
            )
            if read is not None and written is not None:
                yield chosen, Pair(read, tokens_of(written))
                continue
            batch = written if read is None else read
            if batch is not None:
                yield chosen, batch


def _fits(lengths: tuple[int, int], into: tuple[int, int]) -> bool:
    """Whether rows of some lengths can stand among longer ones."""
    return all(0 < short <= long or short == long for short, long in zip(lengths, into, strict=True))


def collect(
    model: Model,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layer: int,
    progress: Callable[[int], None] | None = None,
    begins: Sequence[Sequence[int]] = (),
    on_disk: bool = False,
) -> Sites:
    """Trace many texts and keep some positions of each.

    Args:
        model: the model.
        rows: token ids of each text.
        positions: which positions of each text to keep.
        layer: where to cut.
        progress: called with the number of texts done after each batch.
        begins: token ids with which many texts of a decoder begin; these are run once for all of them.
        on_disk: whether many rows may be kept in temporary files, where they are no part of memory.

    Returns:
        The `Sites`, text after text, position after position.
    """
    config = model.config
    offsets = np.cumsum([0, *(len(chosen) for chosen in positions)])
    dtype = float_type(model.params)
    shape = (int(offsets[-1]), config.hidden_size)
    if not networks.pointwise(config):
        longest = max((row_length(len(row)) for row in rows), default=0)
        longest = longest if config.image is None else config.image.positions
        shape = (shape[0], max(LEAST_TEXT, longest), config.hidden_size)
    large = on_disk and networks.pointwise(config) and math.prod(shape) * np.dtype(dtype).itemsize > LARGE
    arrays = [RowsOnDisk(shape[0], shape[-1], dtype) if large else np.zeros(shape, dtype) for _ in Sites._fields]
    done = 0
    for numbers, traced, first in _traced(model, rows, positions, layer, begins):
        lane = np.concatenate([np.full(len(positions[number]), slot) for slot, number in enumerate(numbers)]).astype(
            int
        )
        place = np.asarray(
            [
                place_in(config, rows[n], at) - skipped
                for n, skipped in zip(numbers, first, strict=True)
                for at in positions[n]
            ],
            int,
        )
        target = np.concatenate([np.arange(offsets[number], offsets[number + 1]) for number in numbers]).astype(int)
        for array, source in zip(arrays, (traced.query, traced.output, traced.context["residual"]), strict=True):
            if networks.pointwise(config):
                array[target] = host(source)[lane, place]
            else:
                whole = np.where(host(traced.context["valid"])[..., None], host(source), 0)
                array[target, : whole.shape[1]] = whole[lane]
        done += len(numbers)
        if progress:
            progress(done)
    return Sites(*arrays)


def collect_once(
    model: Model,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layer: int,
    progress: Callable[[int], None] | None = None,
) -> Sites:
    """The same where many texts are alike: a text with which another one begins is read in that one.

    A decoder's tokens see none after them. So nothing behind the last position is read either, and the prompt of
    several answers is read once.

    Args:
        model: the model.
        rows: token ids of each text.
        positions: which positions of each text to keep, in their order.
        layer: where to cut.
        progress: called with the number of texts done.

    Returns:
        The `Sites`, as `collect` returns them.
    """
    config = model.config
    whole = any(isinstance(token, EmbeddedToken) for row in rows for token in row)
    if config.architecture != "decoder" or not networks.pointwise(config) or whole:
        return collect(model, rows, positions, layer, progress)
    needed = [tuple(row[: places[-1] + 1]) if len(places) else () for row, places in zip(rows, positions, strict=True)]
    order = sorted(range(len(rows)), key=needed.__getitem__)
    reader = list(range(len(rows)))
    # In this order a text stands right before those that begin with it.
    for number, following in reversed([*pairwise(order)]):
        if needed[following][: len(needed[number])] == needed[number]:
            reader[number] = reader[following]
    read = [number for number in sorted(set(reader)) if needed[number]]
    wanted: dict[int, set[int]] = {number: set() for number in read}
    for number, places in enumerate(positions):
        if len(places):
            wanted[reader[number]].update(places)
    kept = [sorted(wanted[number]) for number in read]
    report = progress and (lambda done: progress(done * len(rows) // len(read)))
    sites = collect(model, [needed[number] for number in read], kept, layer, report)
    starts = np.cumsum([0, *map(len, kept)])
    at = {(number, place): starts[n] + m for n, number in enumerate(read) for m, place in enumerate(kept[n])}
    picked = np.asarray([at[reader[n], place] for n, places in enumerate(positions) for place in places], int)
    return Sites(*(array[picked] for array in sites))


def _traced(
    model: Model,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layer: int,
    begins: Sequence[Sequence[int]],
) -> Iterator[tuple[list[int], Trace, np.ndarray]]:
    """Which rows, their trace, and how many tokens of each it leaves out."""
    config, mesh = model.config, mesh_of(model.params)
    which = np.full(len(rows), -1)
    for number, begin in enumerate(begins):
        for at, row in enumerate(rows):
            if len(positions[at]) and positions[at][0] >= len(begin) and list(row[: len(begin)]) == list(begin):
                which[at] = number
    for at in np.flatnonzero(which >= 0).tolist():
        if any(isinstance(token, EmbeddedToken) for token in rows[at]):
            which[at] = -1
    if config.architecture != "decoder" or np.sum(which >= 0) < WORTH_SHARING * len(begins):
        which[:] = -1
    plain, shared = np.flatnonzero(which < 0), np.flatnonzero(which >= 0)
    for chosen, batch in batches(config, [rows[number] for number in plain.tolist()]):
        yield plain[chosen].tolist(), model.trace(shard_rows(batch, mesh), layer), np.zeros(len(chosen), int)
    if not len(shared):
        return
    lengths = np.asarray([len(begin) for begin in begins])
    padded = [*begins, *[[0]] * (power_of_two(len(begins)) - len(begins))]
    begun = networks.begin(config, model.params, tokens_array(padded, row_length(int(lengths.max()))))
    for chosen, batch in batches(config, [rows[number][int(lengths[which[number]]) :] for number in shared.tolist()]):
        assert not isinstance(batch, Pair | Embedded)
        begins_with = np.zeros(batch.shape[0], np.int32)
        begins_with[: len(chosen)] = which[shared[chosen]]
        first = lengths[begins_with].astype(np.int32)
        batch, *of = shard_rows((batch, begins_with, first), mesh)
        traced = networks.trace_after(config, model.params, batch, layer, begun, *of)
        yield shared[chosen].tolist(), traced, first[: len(chosen)]


def real(sites: Sites) -> np.ndarray:
    """Which positions of whole texts are no padding, ``[rows, tokens]`` bool."""
    return np.any(sites.residual != 0, -1)


def single_rows(sites: Sites) -> tuple[Rows, np.ndarray]:
    """All queries one by one, ``[queries, d]``, and the row that each belongs to, ``[queries]``."""
    if sites.query.ndim == 2:
        return sites.query, np.arange(len(sites.query))
    there = real(sites)
    return sites.query[there], np.nonzero(there)[0]


def joined(first: Sites, second: Sites) -> Sites:
    """The rows of both, whole texts padded to the longer ones."""
    if not len(first.query):
        return second
    if second.query.ndim == 3:
        longest = max(first.query.shape[1] if first.query.ndim == 3 else 0, second.query.shape[1])

        def longer(array: Rows) -> Rows:
            array = array if array.ndim == 3 else array[:, None]
            return np.pad(array, ((0, 0), (0, longest - array.shape[1]), (0, 0)))

        first, second = (Sites(*map(longer, sites)) for sites in (first, second))
    return Sites(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))


@partial(jax.jit, static_argnames="config")
def predict_sites(config: NetworkConfig, weights: Any, patch: Patch, sites: Sites) -> Array:
    """What is said at some sites with the neurons of a patch."""
    output = sites.output + contribution(patch, sites.query, ACTIVATIONS[config.activation])
    return jnp.argmax(networks.finish(config, weights, {"residual": sites.residual}, output), -1)


def pad_rows(array: Rows, missing: int) -> Rows:
    """Rows with so many rows of zeros behind them."""
    return np.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1))


def predicted(model: Model, sites: Sites, patch: Patch | None = None, rows: int = 64) -> np.ndarray:
    """The most probable token (or label) after each row of the last layer, in chunks so that logits never pile up.

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
    mesh = mesh_of(model.params)
    # On the host, where padding compiles nothing.
    none = jax.tree.map(host, create(model.config.hidden_size)) if patch is None else patch
    patch = sized(none, NEURONS)
    # Once, not again with each part.
    patch = jax.device_put(patch) if mesh is None else split_neurons(patch, mesh)
    for first in range(0, total, rows):
        count = min(rows, total - first)
        missing = few_or_most(count, rows) - count
        part = Sites(*(pad_rows(array[first : first + count], missing) for array in sites))
        result[first : first + count] = host(predict_sites(model.config, weights, patch, shard_rows(part, mesh)))[
            :count
        ]
    return result


def wrong_rows(model: Model, sites: Sites, wanted: np.ndarray, patch: Patch) -> np.ndarray:
    """The rows of the last layer after which something else comes out than is wanted, by number.

    Args:
        model: the model.
        sites: as for `predicted`.
        wanted: the tokens that should follow, ``[rows]`` int.
        patch: as for `predicted`.
    """
    return np.flatnonzero(predicted(model, sites, patch) != wanted)
