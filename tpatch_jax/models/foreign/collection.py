"""Running a foreign network over many rows of token ids, padded to one length, and keeping chosen positions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.collection import TOKENS_PER_BATCH
from tpatch_jax.models.foreign.network import Network
from tpatch_jax.models.rows import tokens_array

__all__ = ["TokenSites", "collect_queries", "collect_tokens", "said"]

FEW = 8


class TokenSites(NamedTuple):
    """What the cut gives at chosen positions; ``context`` is what `Network.finisher` reads besides the output."""

    query: Array
    output: Array
    context: Any


def _batches(rows: Sequence[list[int]], longest: int) -> list[tuple[int, int, Array]]:
    """Token tables of one shape: first row, last row, ``[lanes, longest]``."""
    # Two sizes, so that few programs are compiled.
    most = 1 << (max(1, TOKENS_PER_BATCH // longest).bit_length() - 1)
    lanes = most if len(rows) > FEW else min(FEW, most)
    result = []
    for first in range(0, len(rows), lanes):
        part = list(rows[first : first + lanes])
        table = tokens_array([*part, *([[]] * (lanes - len(part)))], longest)
        result.append((first, first + len(part), table))
    return result


def collect_tokens(
    network: Network, rows: list[list[int]], places: Sequence[Sequence[int]], longest: int
) -> TokenSites:
    """Trace many rows and keep some positions of each, row after row."""
    parts = []
    for first, last, table in _batches(rows, longest):
        traced = network.trace(table)
        lane = np.repeat(np.arange(last - first), [len(chosen) for chosen in places[first:last]])
        place = np.concatenate([np.asarray(chosen, np.int32) for chosen in places[first:last]])
        query, output = traced.query[lane, place], traced.output[lane, place]
        if network.pointwise:
            context = network.gather(traced, lane, place).context
        else:
            if any(entry.shape[:1] != table.shape[:1] for entry in traced.context.values()):
                raise TPatchError(
                    f"what follows {network.path!r} mixes the rows of a batch, so that none can be edited on its own; "
                    "cut at the last FFN"
                )
            whole = {**traced.context, "query": traced.query, "output": traced.output}
            context = {name: entry[lane] for name, entry in whole.items()} | {"position": jnp.asarray(place)}
        parts.append(jax.tree.map(np.asarray, TokenSites(query, output, context)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def said(network: Network, rows: list[list[int]], places: Sequence[Sequence[int]], longest: int) -> np.ndarray:
    """The most probable token at chosen positions, by the whole network as it stands."""
    result = []
    for first, last, table in _batches(rows, longest):
        best = np.asarray(jnp.argmax(network.apply(table), -1))
        result += [best[lane, list(places[first + lane])] for lane in range(last - first)]
    return np.concatenate(result)


def collect_queries(
    network: Network, rows: list[list[int]], places: Callable[[list[int]], Sequence[int]], longest: int
) -> Array:
    """The FFN's input at the places of every row, row after row: ``[queries, d]``."""
    queries = []
    for first, last, table in _batches(rows, longest):
        query = np.asarray(network.trace(table).query)
        queries += [query[lane, list(places(rows[first + lane]))] for lane in range(last - first)]
    return jax.device_put(np.concatenate(queries))
