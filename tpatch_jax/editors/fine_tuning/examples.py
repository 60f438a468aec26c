"""What fine-tuning is shown: the requests in groups that share an update, and texts on which nothing shall change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.editors.fine_tuning.step import Calm, Cut, Lesson, Whole
from tpatch_jax.editors.reading import Item
from tpatch_jax.editors.tpatcher.last_site import collect_bare
from tpatch_jax.models.collection import Sites, collect, pad_rows
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.memory_text import memory_rows
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Pair
from tpatch_jax.models.rows import ASK, place_in, row_length, split_row, tokens_array
from tpatch_jax.typing import Progress

__all__ = ["Group", "Pool", "draw", "grouped", "read_pool"]

LEAST_ROWS = 8
LOGIT_ROWS = 256
GROUP_TOKENS = 1024
POOL_TOKENS = 4096
PLACES = 16


def _filled(numbers: np.ndarray, total: int) -> np.ndarray:
    # The last row again rather than zeros: the mean of an empty text is not a number.
    return np.concatenate([numbers, np.repeat(numbers[-1:], total - len(numbers))])


def _cut(sites: Sites, numbers: np.ndarray) -> Cut:
    """Some rows of collected sites, filled up to one of few sizes: ``[rows, d]``."""
    chosen = _filled(numbers, power_of_two(len(numbers), LEAST_ROWS))
    return Cut(jax.device_put(sites.query[chosen]), jax.device_put(sites.residual[chosen]))


def _whole(
    config: NetworkConfig,
    rows: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    like: Sequence[Sequence[int]],
) -> Whole:
    """Texts in one batch, padded to one of few sizes, and positions in them.

    Args:
        config: the network's description.
        rows: token ids of each text.
        places: which positions of each count.
        like: the batch is as long as if these texts were in it.
    """
    parts, lengths = ([split_row(config, row) for row in texts] for texts in (rows, like))
    sides: list[Array] = []
    for side, padding in ((0, ASK), (1, 0)):
        longest = max(len(part[side]) for part in lengths)
        # A lane of padding alone would have attention see nothing.
        lonely: Any = ([[0]] if side == 0 else [[]]) * (power_of_two(len(rows)) - len(rows))
        if longest:
            sides.append(tokens_array([*(part[side] for part in parts), *lonely], row_length(longest), padding))
    lane = np.concatenate([np.full(len(chosen), number) for number, chosen in enumerate(places)])
    place = np.asarray([place_in(config, row, at) for row, chosen in zip(rows, places, strict=True) for at in chosen])
    missing = power_of_two(len(lane), LEAST_ROWS) - len(lane)
    indices = (jax.device_put(pad_rows(array.astype(np.int32), missing)) for array in (lane, place))
    return Whole(Pair(*sides) if len(sides) == 2 else sides[0], *indices)


class Pool(NamedTuple):
    """Texts of the memory, and what the unedited last layer leaves at their positions."""

    rows: list[list[int]]
    places: list[range]
    starts: np.ndarray
    sites: Sites


# --- the memory ---


def read_pool(model: Model, memory: str | Path | None, cache: Path | None, progress: Progress | None) -> Pool:
    """A part of the memory's texts, always the same."""
    rows = memory_rows(model, memory, cache=cache, progress=progress)
    rows = [rows[number] for number in np.random.default_rng(0).permutation(len(rows))]
    ends = np.cumsum([len(row) for row in rows])
    rows = rows[: max(1, int(np.sum(ends <= POOL_TOKENS)))]
    places = [_said_at(model, row) for row in rows]
    report = (lambda done: progress("reading memory", done, len(rows))) if progress else None
    sites = collect(model, rows, places, model.layer(None), report)
    return Pool(rows, places, np.cumsum([0, *map(len, places)]), sites)


def _said_at(model: Model, row: Sequence[int]) -> range:
    """The positions of a text at which the model says something: the answer's, or of running text all but the first."""
    if model.config.architecture == "decoder":
        return range(1, len(row))
    start = row.index(ASK) + (len(model.begin) if model.config.encoder else 0)
    return range(start, max(start + 1, len(row) - 1))


def draw(model: Model, pool: Pool, tokens: int, generator: np.random.Generator, whole_network: bool) -> Calm:
    """Some positions of a few texts of the memory, always as many rows."""
    longest, widest = max(map(len, pool.rows)), min(PLACES, max(map(len, pool.places)))
    count = min(len(pool.rows), max(1, tokens // row_length(longest)))
    texts = generator.permutation(len(pool.rows))[:count]
    picks = [np.sort(generator.permutation(len(pool.places[text]))[:widest]) for text in texts]
    numbers = np.concatenate([pool.starts[text] + pick for text, pick in zip(texts, picks, strict=True)])
    total = power_of_two(count * widest, LEAST_ROWS)
    # Where texts are short, what is missing is filled up and does not count.
    filled = _filled(numbers, total)
    if whole_network:
        rows = [pool.rows[text] for text in texts]
        places = [[pool.places[text][at] for at in pick] for text, pick in zip(texts, picks, strict=True)]
        places[-1] += places[-1][-1:] * (total - len(numbers))
        seen = _whole(model.config, rows, places, pool.rows)
    else:
        seen = _cut(pool.sites, filled)
    weight = pad_rows(np.ones(len(numbers), np.float32), total - len(numbers))
    residual, output = (jax.device_put(array[filled]) for array in (pool.sites.residual, pool.sites.output))
    return Calm(seen, residual, output, jax.device_put(weight))


# --- the requests ---


class Group(NamedTuple):
    """Requests that share an update: which items, what they should say, and the item of each of the first rows."""

    lesson: Lesson
    owner: np.ndarray


def grouped(model: Model, items: Sequence[Item], most: int, whole_network: bool) -> list[Group]:
    """Requests of about one length together, neither with too many logits nor with too many tokens."""
    parts: list[list[int]] = []
    spoken = 0
    for number in sorted(range(len(items)), key=lambda number: len(items[number].rows[0])):
        length, target = row_length(len(items[number].rows[0])), len(items[number].target)
        room = len(parts[-1]) + 1 if parts else most + 1
        if room > most or spoken + target > LOGIT_ROWS or room * length > GROUP_TOKENS:
            parts.append([])
            spoken = 0
        parts[-1].append(number)
        spoken += target
    sites = None if whole_network else collect_bare(model, items)
    starts = np.cumsum([0, *(len(item.target) for item in items)])
    result = []
    for part in parts:
        chosen = [items[number] for number in part]
        owner = np.concatenate([np.full(len(items[number].target), number) for number in part])
        if sites is None:
            rows = [item.rows[0] for item in chosen]
            seen = _whole(model.config, rows, [item.places(0) for item in chosen], rows)
        else:
            seen = _cut(sites, np.concatenate([np.arange(starts[number], starts[number + 1]) for number in part]))
        wanted = np.concatenate([item.target for item in chosen]).astype(np.int32)
        weight = np.concatenate([np.full(len(item.target), 1 / len(item.target), np.float32) for item in chosen])
        missing = power_of_two(len(wanted), LEAST_ROWS) - len(wanted)
        padded = (jax.device_put(pad_rows(array, missing)) for array in (wanted, weight))
        result.append(Group(Lesson(seen, *padded), owner))
    return result
