"""What patches say to many prompts when some neurons change: run are only the rows that hear it, from the cut on.

All neurons of the lowest layer read the same queries whatever they say, so rows of a decoder are run up to that layer
once. What follows is run again for the rows whose feed-forward output there moves, and of rows that begin alike the
beginnings are run once for all.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpatch_jax.core.devices import host, mesh_of, shard_rows
from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.patch import Patch, contribution
from tpatch_jax.core.sizes import few_or_most, pieces, power_of_two
from tpatch_jax.editors.holding import ROWS, AskedRow, read_margins
from tpatch_jax.models import networks
from tpatch_jax.models.collection import Sites, batches, collect, pad_rows, predicted
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.embedded import EmbeddedToken
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Cache, Trace
from tpatch_jax.models.patching import attach
from tpatch_jax.models.rows import row_length, tokens_array

__all__ = ["UNMOVED", "CutRows", "Outcome", "ask_rows", "can_be_cut", "shared_beginnings"]

BEGINS_ALIKE, LEAST_ALIKE = 8, 4
"""Rows whose first so many tokens are the same begin alike, if there are so many of them."""

UNMOVED = 1e-5
"""Where a feed-forward network's output moves by no more than this share of its norm, what is said stays."""


class Outcome(NamedTuple):
    """What is said to each row.

    Attributes:
        margin: of its target; see `tpatch_jax.editors.holding.read_margins`; infinite without one.
        token: the most probable one at its first place; of rows with a target `ask_rows` leaves it out.
    """

    margin: Float[np.ndarray, " rows"]
    token: Int[np.ndarray, " rows"]


def shared_beginnings(rows: Sequence[AskedRow]) -> tuple[list[list[int]], Int[np.ndarray, " rows"]]:
    """Token ids with which several rows begin, before anything is asked of them, and the one of each row or -1.

    Args:
        rows: what is asked.

    Example:
        >>> rows = [AskedRow([*range(9), 50 + n], range(9, 10), []) for n in range(4)]
        >>> shared_beginnings(rows)
        ([[0, 1, 2, 3, 4, 5, 6, 7, 8]], array([0, 0, 0, 0]))
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        if row.places.start >= BEGINS_ALIKE:
            alike.setdefault(tuple(row.tokens[:BEGINS_ALIKE]), []).append(number)
    begins, which = [], np.full(len(rows), -1)
    for numbers in alike.values():
        if len(numbers) < LEAST_ALIKE:
            continue
        some = [rows[number] for number in numbers]
        most = min(row.places.start for row in some)
        differs = (at for at in range(most) if len({row.tokens[at] for row in some}) > 1)
        which[numbers] = len(begins)
        begins.append(list(some[0].tokens[: next(differs, most)]))
    return begins, which


def _equal(one: Mapping[int, Patch], other: Mapping[int, Patch]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(*leaves) for layer in one for leaves in zip(one[layer], other[layer], strict=True)
    )


@partial(jax.jit, static_argnames="activation")
def _added(patch: Patch, query: Array, output: Array, activation: str) -> Array:
    return output + contribution(patch, query, ACTIVATIONS[activation])


@partial(jax.jit, static_argnames="config")
def _said(
    config: NetworkConfig, weights: Any, hidden: Float[Array, "rows hidden"], wanted: Int[Array, " rows"]
) -> tuple[Float[Array, " rows"], Int[Array, " rows"]]:
    logits = networks.logits(config, weights, hidden).astype(jnp.float32)
    target = jnp.take_along_axis(logits, wanted[:, None], 1)[:, 0]
    others = jnp.where(jax.nn.one_hot(wanted, logits.shape[1], dtype=jnp.bool_), -jnp.inf, logits)
    return target - jnp.max(others, 1), jnp.argmax(logits, -1)


def ask_rows(model: Model, rows: Sequence[AskedRow]) -> Outcome:
    """What a model of any architecture says to some rows, which are run as a whole.

    Args:
        model: edited or not.
        rows: what is asked.
    """
    margin, token = read_margins(model, rows), np.zeros(len(rows), np.int32)
    without = [number for number, row in enumerate(rows) if not row.wanted]
    if without:
        tokens, places = ([getattr(rows[number], name) for number in without] for name in ("tokens", "places"))
        token[without] = predicted(model, collect(model, tokens, places, model.layer(None)))
    return Outcome(margin, token)


def can_be_cut(model: Model, rows: Sequence[AskedRow]) -> bool:
    """Whether `CutRows` runs them: those of a decoder, without embeddings in the place of tokens."""
    config = model.config
    plain = config.architecture == "decoder" and networks.pointwise(config) and not config.relative_buckets
    return plain and not any(isinstance(token, EmbeddedToken) for row in rows for token in row.tokens)


class CutRows:
    """Rows of a decoder cut at one layer.

    Args:
        model: nothing is attached to it.
        rows: what is asked.
        layer: the cut.
    """

    model: Model
    layer: int
    rows: list[AskedRow]
    begins: list[list[int]]
    which: Int[np.ndarray, " rows"]
    first: Int[np.ndarray, " rows"]
    rest: list[list[int]]
    sites: Sites
    ends: list[int]
    begin_sites: Sites
    begin_ends: list[int]

    def __init__(self, model: Model, rows: Sequence[AskedRow], layer: int) -> None:
        self.model, self.layer, self.rows = model, layer, list(rows)
        self.begins, self.which = shared_beginnings(rows)
        self.first = np.asarray([len(self.begins[begin]) if begin >= 0 else 0 for begin in self.which.tolist()], int)
        # What follows the last place is never asked.
        tokens = [row.tokens[: row.places.stop] for row in rows]
        self.rest = [row[first:] for row, first in zip(tokens, self.first.tolist(), strict=True)]
        places = [range(first, len(row)) for row, first in zip(tokens, self.first.tolist(), strict=True)]
        self.sites = collect(model, tokens, places, layer, begins=self.begins, on_disk=True)
        self.ends = [0, *accumulate(map(len, self.rest))]
        beginnings = [range(len(begin)) for begin in self.begins]
        self.begin_sites = collect(model, self.begins, beginnings, layer)
        self.begin_ends = [0, *accumulate(map(len, self.begins))]
        self._kept_begun: tuple[Mapping[int, Patch], np.ndarray, list[Cache]] | None = None

    def queries(self, row: int) -> Float[np.ndarray, "tokens hidden"]:
        """What the cut's feed-forward network reads of a row, but for a beginning that others share."""
        return np.asarray(self.sites.query[self.ends[row] : self.ends[row + 1]], np.float32)

    def movement(
        self, rows: Int[np.ndarray, " rows"], change: Callable[[Float[np.ndarray, "n hidden"]], Float[np.ndarray, " n"]]
    ) -> Float[np.ndarray, " rows"]:
        """By which share of its norm the cut's output moves at the token of each row where that is largest.

        Args:
            rows: which.
            change: from queries to by how much each is moved.
        """
        tokens = [np.arange(self.ends[row], self.ends[row + 1]) for row in rows.tolist()]
        if not tokens:
            return np.zeros(0)
        moved = self._moved(self.sites, np.concatenate(tokens), change)
        result = np.maximum.reduceat(moved, np.cumsum([0, *map(len, tokens)])[:-1])
        if self.begins:
            begun = self._moved(self.begin_sites, np.arange(self.begin_ends[-1]), change)
            each = np.asarray([*np.maximum.reduceat(begun, self.begin_ends[:-1]), 0.0])
            result = np.maximum(result, each[self.which[rows]])
        return result

    def _moved(self, sites: Sites, tokens: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        parts = []
        for piece in pieces(len(tokens)):
            query, output = (np.asarray(array[tokens[piece]], np.float32) for array in (sites.query, sites.output))
            parts.append(change(query) / np.maximum(np.linalg.norm(output, axis=-1), np.finfo(np.float32).tiny))
        return np.concatenate(parts)

    def ask(self, patches: Mapping[int, Patch], rows: Int[np.ndarray, " rows"]) -> Outcome:
        """What is said to some rows with patches in the cut's layer, and perhaps in others above it.

        Args:
            patches: by layer, none of them below the cut.
            rows: which.
        """
        model, config = self.model, self.model.config
        above = {layer: patch for layer, patch in patches.items() if layer != self.layer}
        corrected = attach(model, above) if above else model
        hidden = np.zeros((sum(len(self.rows[row].places) for row in rows), config.hidden_size), np.float32)
        ends = np.cumsum([0, *(len(self.rows[row].places) for row in rows)])
        patch = patches.get(self.layer)
        for shared in (False, True):
            at = np.flatnonzero((self.which[rows] >= 0) == shared)
            if len(at):
                self._run(corrected, patch, rows, at, hidden, ends, self._begun(patches) if shared else None)
        wanted = np.zeros(len(hidden), np.int32)
        for number, row in enumerate(rows.tolist()):
            target = self.rows[row].wanted
            wanted[ends[number] : ends[number] + len(target)] = target
        margin, token = self._read(hidden, wanted)
        least = [
            min(margin[ends[number] : ends[number + 1]], default=np.inf) if self.rows[row].wanted else np.inf
            for number, row in enumerate(rows.tolist())
        ]
        return Outcome(np.asarray(least, float), token[ends[:-1]])

    def _begun(self, patches: Mapping[int, Patch]) -> list[Cache]:
        """Keys and values of the shared beginnings in every layer, run again where a patch is heard in them."""
        above = {layer: patch for layer, patch in patches.items() if layer != self.layer}
        output = np.asarray(self.begin_sites.output, np.float32)
        if patch := patches.get(self.layer):
            query = pad_rows(self.begin_sites.query, row_length(len(output)) - len(output))
            added = _added(patch, query, jnp.zeros_like(query), self.model.config.activation)
            output = output + np.asarray(host(added), np.float32)[: len(output)]
        if self._kept_begun is not None:
            others, before, begun = self._kept_begun
            distance = np.linalg.norm(output - before, axis=-1)
            if _equal(others, above) and np.all(distance <= UNMOVED * np.linalg.norm(before, axis=-1)):
                return begun
        model = attach(self.model, dict(patches)) if patches else self.model
        padded = [*self.begins, *[[0]] * (power_of_two(len(self.begins)) - len(self.begins))]
        longest = row_length(max(map(len, self.begins)))
        begun = networks.begin(model.config, model.params, tokens_array(padded, longest))
        self._kept_begun = above, output, begun
        return begun

    def _run(
        self,
        model: Model,
        patch: Patch | None,
        rows: np.ndarray,
        at: np.ndarray,
        hidden: np.ndarray,
        ends: np.ndarray,
        begun: list[Cache] | None,
    ) -> None:
        """Run some rows from the cut on, and put the residual stream at their places where it belongs."""
        config, mesh = model.config, mesh_of(model.params)
        for numbers, batch in batches(config, [self.rest[row] for row in rows[at]]):
            chosen = at[numbers]
            lanes, length = batch.shape  # pyright: ignore[reportAttributeAccessIssue]
            of = rows[chosen].tolist()
            tokens = np.concatenate([np.arange(self.ends[row], self.ends[row + 1]) for row in of])
            lane = np.repeat(np.arange(len(of)), [len(self.rest[row]) for row in of])
            place = np.concatenate([np.arange(len(self.rest[row])) for row in of])
            arrays = []
            for source in self.sites:
                array = np.zeros((lanes, length, source.shape[-1]), source.dtype)
                array[lane, place] = source[tokens]
                arrays.append(array)
            first, begins_with = np.zeros((lanes, 1), np.int32), np.zeros(lanes, np.int32)
            first[: len(of), 0] = self.first[of]
            begins_with[: len(of)] = np.maximum(self.which[of], 0)
            positions = first + np.arange(length, dtype=np.int32)
            query, output, residual, positions, begins_with = shard_rows((*arrays, positions, begins_with), mesh)
            if patch is not None:
                output = _added(patch, query, output, config.activation)
            traced = Trace(query, output, {"residual": residual, "positions": positions}, self.layer)
            after = (
                networks.hidden(config, model.params, traced, output)
                if begun is None
                else networks.hidden_after(config, model.params, traced, output, begun, begins_with)
            )
            after = host(after)
            for number, row, slot in zip(range(len(of)), of, chosen.tolist(), strict=True):
                start = self.rows[row].places.start - int(self.first[row])
                count = len(self.rows[row].places)
                hidden[ends[slot] : ends[slot] + count] = after[number, start : start + count]

    def _read(self, hidden: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        config, mesh = self.model.config, mesh_of(self.model.params)
        weights = networks.final_weights(config, self.model.params)
        hidden = hidden.astype(self.sites.output.dtype)
        margins, tokens = [np.zeros(0)], [np.zeros(0, np.int32)]
        for first in range(0, len(wanted), ROWS):
            count = min(ROWS, len(wanted) - first)
            missing = few_or_most(count, ROWS) - count
            part = pad_rows(hidden[first : first + count], missing), np.pad(wanted[first : first + count], (0, missing))
            margin, token = _said(config, weights, *shard_rows(part, mesh))
            margins.append(host(margin)[:count])
            tokens.append(host(token)[:count])
        return np.concatenate(margins), np.concatenate(tokens)
