"""Texts in tokens with the end of a subject in them, and the network from there on."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from tpatch_jax.core.devices import mesh_of, shard_rows
from tpatch_jax.core.products import in_float32, round_matrices, round_products
from tpatch_jax.core.sizes import in_halves, power_of_two
from tpatch_jax.editors.locating import locate_subject
from tpatch_jax.editors.reading import Item, subject_token
from tpatch_jax.editors.wordings import Wording, shortened
from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Params

__all__ = [
    "ENDS",
    "ForkedRows",
    "KnownRows",
    "PromptRow",
    "fitting_rows",
    "fork_rows",
    "known_rows",
    "log_probs_at",
    "pack_lanes",
    "prompt_row",
    "read_queries",
    "rephrase_rows",
    "rounded_around",
    "row_of",
    "rows_of",
    "runner",
    "runner_function",
    "said_at",
    "short_ends",
    "short_rows",
]


SPAN = 16
"""Rows that need not be there have so many tokens at most from their subject on, for one length serves all."""


TOKENS = 1024
"""So many tokens are read at once, where there are many."""

ENDS, BEGINS = 32, 95
"""Of one sequence so many tokens are run again, and so many stand before them, if rows allow it: with one of padding
these are 128. Longer ones look at much that is none of theirs; shorter ones are small products."""


class PromptRow(NamedTuple):
    """A text in tokens, where the subject ends in it, and what should follow: places and the tokens wanted there."""

    tokens: list[int]
    subject: int
    places: list[int]
    wanted: list[int]


def prompt_row(model: Model, request: EditRequest, item: Item, context: int, token: str) -> PromptRow:
    """A request's prompt and target in one of its contexts, cut at the last token of the subject or of the prompt."""
    places, text = list(item.places(context)), item.texts[context]
    if token == "prompt":
        return PromptRow(item.rows[context], places[0], places, item.target)
    # Searched within the prompt, which is what the text ends with: a prefix may name the subject as well.
    _, end = locate_subject(model, request.prompt, request.subject or "")[0]
    end += len(text) - len(request.prompt)
    return PromptRow(item.rows[context], subject_token(model, text, end), places, item.target)


def rephrase_rows(model: Model, request: EditRequest, item: Item, token: str) -> list[PromptRow]:
    """The rephrases that a request is fitted on, as `prompt_row`; of the subject's those that name it once."""
    rows = []
    for context in range(len(item.texts) - item.rephrases, len(item.texts)):
        places, text, subject = list(item.places(context)), item.texts[context], request.subject or ""
        if token == "prompt":
            rows.append(PromptRow(item.rows[context], places[0], places, item.target))
        elif len(spans := locate_subject(model, text, subject)) == 1:
            last = subject_token(model, text, spans[0][1])
            rows.append(PromptRow(item.rows[context], last, places, item.target))
    return rows


def row_of(model: Model, wording: Wording, target: Sequence[int] = ()) -> PromptRow | None:
    """A text in tokens with what should follow it; ``None`` if it is too long."""
    tokens = model.encode_prompt(wording.text)
    if len(tokens) + len(target) > model.config.context:
        return None
    last = len(tokens) - 1
    places = list(range(last, last + max(1, len(target))))
    return PromptRow([*tokens, *target], subject_token(model, *wording), places, list(target))


def rows_of(model: Model, wordings: Sequence[Wording]) -> list[PromptRow]:
    """Texts in tokens; the first that fits stands in for one that is too long."""
    rows = [row_of(model, wording) for wording in wordings]
    first = next((row for row in rows if row is not None), None)
    return [] if first is None else [row or first for row in rows]


def fitting_rows(model: Model, wordings: Iterable[Wording], target: Sequence[int]) -> list[PromptRow]:
    """Texts in tokens with what should follow them; one that would be too long is left out."""
    rows = (row_of(model, wording, target) for wording in wordings)
    return [row for row in rows if row is not None]


def short_rows(model: Model, request: EditRequest, item: Item, prefixes: Sequence[str]) -> list[PromptRow]:
    """What `shortened` gives in tokens, each after a prefix; one that would be too long is left out."""
    pairs = zip(shortened(request), prefixes, strict=False)
    return fitting_rows(model, (wording.after(prefix) for wording, prefix in pairs), item.target)


def short_ends(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Those of some rows that are short from their subject on; of long ones the shortest."""
    ends = [len(row.tokens) - row.subject for row in rows]
    most = max(SPAN, power_of_two(min(ends, default=0)))
    return [row for row, end in zip(rows, ends, strict=True) if end <= most]


class ForkedRows(NamedTuple):
    """Rows of some lanes, run up to a layer's FFN, and what of them is run again.

    Attributes:
        fork: one pack for each lane.
        first: the token at which each row's subject ends, among the ends of its pack, ``[lanes, rows]`` int.
        places: where tokens are wanted in each row, among the same, ``[lanes, rows, places]`` int.
    """

    fork: networks.Fork
    first: Int[Array, "lanes rows"]
    places: Int[Array, "lanes rows places"]


class _Packed(NamedTuple):
    """One lane's rows: tokens, their positions, the token before each or -1, and of each row its tokens' numbers."""

    tokens: list[int]
    positions: list[int]
    before: list[int]
    rows: list[list[int]]


def _pack_rows(rows: Iterable[Sequence[int]], shared: Iterable[int]) -> _Packed:
    """Rows of which what they begin with stands once; of each so many tokens are shared at most."""
    packed, known = _Packed([], [], [], []), {}
    for number, (row, most) in enumerate(zip(rows, shared, strict=True)):
        last, nodes = -1, []
        for position, token in enumerate(row):
            name = last, token, number if position >= most else -1
            if (node := known.get(name)) is None:
                node = known[name] = len(packed.tokens)
                packed.tokens.append(token)
                packed.positions.append(position)
                packed.before.append(last)
            nodes.append(node)
            last = node
        packed.rows.append(nodes)
    return packed


class _Sequence(NamedTuple):
    """Some rows of a lane in one sequence, and those of its tokens that are run again."""

    packed: _Packed
    ends: list[int]


def _share_out(rows: Sequence[PromptRow]) -> tuple[list[list[int]], int]:
    """Rows in sequences, as places in the list, each short enough that attention between its tokens costs little.

    The longest beginnings apart, then long rows before short ones, each where it adds the fewest tokens.

    Returns:
        The sequences, and how many ends one has at most.
    """
    ends = [len(row.tokens) - row.subject for row in rows]
    room = in_halves(max(*ends, min(ENDS, sum(ends))), 16)
    count = -(-sum(ends) // room)
    # Which of the tokens that rows begin with are the same ones.
    shared = _pack_rows((row.tokens[: row.subject] for row in rows), (row.subject for row in rows)).rows
    begins: list[set[int]] = [set() for _ in range(count)]
    left = [room] * count
    sequences: list[list[int]] = [[] for _ in range(count)]
    order = sorted(range(len(rows)), key=lambda number: -rows[number].subject)
    rest = sorted(order[count:], key=lambda number: (-max(rows[number].subject, SPAN), -ends[number]))
    for number in [*order[:count], *rest]:
        free = [place for place, most in enumerate(left) if most >= ends[number]]
        if not free:
            free = [len(left)]
            begins, left, sequences = [*begins, set()], [*left, room], [*sequences, []]

        both = {place: len(begins[place].union(shared[number])) for place in free}
        # Up to a size that most lanes have nothing is lost by more of them, and no other program is compiled.
        costs = [(max(size, BEGINS), size - len(begins[place]), left[place]) for place, size in both.items()]
        best = free[costs.index(min(costs))]
        sequences[best].append(number)
        begins[best].update(shared[number])
        left[best] -= ends[number]
    return [sorted(numbers) for numbers in sequences], room


def _pack_together(lanes: Sequence[Sequence[_Sequence]], room: int) -> networks.Pack:
    """The packs of some lanes, the sequences of each with room for the numbers of those tokens that are looked at."""
    every = [sequence for lane in lanes for sequence in lane]
    # Few sizes, so that another prompt seldom compiles anything; at least one token is padding.
    size = in_halves(max(len(sequence.packed.tokens) for sequence in every) + 1, 32)
    shape = (len(lanes), max(map(len, lanes)), size)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    sees = np.broadcast_to(np.eye(size, dtype=bool), (*shape, size)).copy()
    numbers, looked_at = np.full((*shape[:2], room), size - 1, np.int32), {}
    for lane, part in enumerate(lanes):
        for place, (packed, ends) in enumerate(part):
            at, visible = (lane, place), sees[lane, place]
            tokens[at][: len(packed.tokens)], positions[at][: len(packed.tokens)] = packed.tokens, packed.positions
            for node, before in enumerate(packed.before):
                if before >= 0:
                    visible[node] |= visible[before]
            numbers[at][: len(ends)] = ends
            looked_at[at] = np.setdiff1d(np.flatnonzero(visible[ends].any(0)), ends)
    begins = np.full((*shape[:2], in_halves(max(map(len, looked_at.values())), 32)), size - 1, np.int32)
    for at, seen in looked_at.items():
        begins[at][: len(seen)] = seen
    # Put as they are: `jnp.asarray` would compile a program for each new shape.
    return networks.Pack(*map(jax.device_put, (tokens, positions, sees, numbers, begins)))


def pack_lanes(lanes: Sequence[Sequence[PromptRow]]) -> tuple[networks.Pack, list[list[int]]]:
    """The rows of some lanes, each lane's in one pack.

    Args:
        lanes: the rows of each.

    Returns:
        The packs, and for each row of each lane where its ends begin among those of its pack.
    """
    shared = [_share_out(rows) for rows in lanes]
    room = max(room for _, room in shared)
    packs, places = [], []
    for rows, (numbers, _) in zip(lanes, shared, strict=True):
        pack, begins = [], [0] * len(rows)
        for sequence, part in enumerate(numbers):
            # From its subject's end on each row is changed by itself.
            some = [rows[number] for number in part]
            packed = _pack_rows([row.tokens for row in some], [row.subject for row in some])
            ends = [nodes[row.subject :] for nodes, row in zip(packed.rows, some, strict=True)]
            pack.append(_Sequence(packed, [*chain(*ends)]))
            for number, first in zip(part, [0, *np.cumsum([len(part) for part in ends]).tolist()], strict=False):
                begins[number] = sequence * room + first
        packs.append(pack)
        places.append(begins)
    return _pack_together(packs, room), places


def read_queries(
    model: Model,
    lanes: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
    layer: int,
    progress: Callable[[int], None] | None = None,
) -> list[Float[np.ndarray, "places d"]]:
    """Queries at some places of texts, those that belong together in one sequence: what they begin with is run once.

    Args:
        model: a decoder.
        lanes: of each its texts in tokens, with the places that are looked at.
        layer: whose FFN reads the queries.
        progress: called with the number of lanes done.

    Returns:
        Of each lane the queries, text after text, place after place, ``[places, d]``.
    """
    parts = [_pack_rows([row for row, _ in lane], [len(row) for row, _ in lane]) for lane in lanes]
    ends = [
        [nodes[place] for nodes, (_, places) in zip(part.rows, lane, strict=True) for place in places]
        for part, lane in zip(parts, lanes, strict=True)
    ]
    queries: list[Any] = [None] * len(lanes)
    # Those of about one size together, as many as are worth a product.
    order, done = sorted(range(len(lanes)), key=lambda lane: -len(parts[lane].tokens)), 0
    while done < len(order):
        size = in_halves(len(parts[order[done]].tokens) + 1, 32)
        chunk = order[done : done + power_of_two(max(1, TOKENS // size))]
        # Chunks come in few numbers; a lane that stands in twice is dropped again.
        filled = [*chunk, *[chunk[-1]] * (power_of_two(len(chunk)) - len(chunk))]
        room = in_halves(max(len(ends[lane]) for lane in chunk), 16)
        pack = _pack_together([[_Sequence(parts[lane], ends[lane])] for lane in filled], room)
        seen = np.asarray(networks.pack_queries(model.config, model.params, pack, layer))
        for place, lane in enumerate(chunk):
            queries[lane] = seen[place, : len(ends[lane])]
        done += len(chunk)
        if progress:
            progress(done)
    return queries


def fork_rows(
    model: Model, lanes: Sequence[Sequence[PromptRow]], layer: int, places: int, rounded: Params | None = None
) -> ForkedRows:
    """Rows of some lanes, equally many each, run up to a layer's FFN, and from their subjects' ends on.

    On a mesh that divides the lanes each part of its axis ``"data"`` runs those of its lanes.

    Args:
        model: the model.
        lanes: the rows of each.
        layer: the layer.
        places: as many places for each row; those it has not are its subject's end.
        rounded: see `tpatch_jax.models.networks.fork`.
    """
    pack, begins = pack_lanes(lanes)
    table = np.zeros((len(lanes), len(lanes[0]), places), np.int32)
    for lane, rows in enumerate(lanes):
        for number, row in enumerate(rows):
            there = np.asarray(row.places[:places]) - row.subject
            table[lane, number] = begins[lane][number]
            table[lane, number, : len(there)] += there.astype(np.int32)
    pack, first, spots = shard_rows((pack, np.asarray(begins, np.int32), table), mesh_of(model.params))
    forked = networks.fork(model.config, model.params, pack, layer, rounded)
    return ForkedRows(forked, jax.device_put(first), jax.device_put(spots))


class KnownRows(NamedTuple):
    """What the network after a cut knows of some lanes' rows.

    Attributes:
        fork: the fields of a `tpatch_jax.models.networks.Fork` but for its layer.
        first: see `ForkedRows`.
        places: where log-probabilities are read, among the ends of each lane's pack, ``[lanes, places]`` int.
    """

    fork: tuple[Any, ...]
    first: Int[Array, "lanes rows"]
    places: Int[Array, "lanes places"]


def known_rows(forked: ForkedRows, places: Int[Array, "lanes places"]) -> KnownRows:
    """Forked rows as `runner` takes them, read at some places of each lane."""
    return KnownRows(tuple(forked.fork[:-1]), forked.first, places)


def runner(model: Model, layer: int, *, stream: bool = False, rounded: Params | None = None) -> Partial:
    """The network from a layer's FFN on: from what is added at the ends of some rows' subjects to log-probabilities.

    Args:
        model: the model.
        layer: the layer.
        stream: whether it is added to the stream beside the FFN, where it comes out of the block as it is, even where
            the FFN's output is normed; by default to the FFN's output.
        rounded: from `rounded_around`, of which then all products with the network's matrices are made; by default the
            model's own, in their precision.

    Returns:
        ``(a KnownRows, added [lanes, rows, d]) -> [lanes, places, vocabulary]``, as
        `tpatch_jax.core.values.train_values` runs it.
    """
    function = runner_function(model.config, layer, stream, rounded is not None)
    return Partial(function, networks.after(model.params if rounded is None else rounded, layer))


def rounded_around(model: Model, layer: int) -> Params:
    """All parameters but a layer's FFN with their matrices in bfloat16; see `tpatch_jax.core.products`."""
    return round_matrices(networks.around(model.params, layer))


@lru_cache(maxsize=16)
def runner_function(config: NetworkConfig, layer: int, stream: bool, rounded: bool = False) -> Callable[..., Array]:
    """One object for each network and layer, so that ``jit`` recognises it."""
    if rounded:
        exact = runner_function(config, layer, stream)
        return jax.jit(lambda params, known, added: round_products(exact)(in_float32(params), known, added))

    @jax.jit
    def run(
        params: Params, known: KnownRows, added: Float[Array, "lanes rows d"]
    ) -> Float[Array, "lanes places vocabulary"]:
        forked = networks.Fork(*known.fork, layer=layer)
        place = forked.residual if stream else forked.output
        lane = jnp.arange(place.shape[0])[:, None]
        changed = place.at[lane, known.first].add(added.astype(place.dtype))
        forked, output = (forked._replace(residual=changed), forked.output) if stream else (forked, changed)
        return log_probs_at(config, params, networks.resume_fork(config, params, forked, output), known.places)

    return run


def said_at(model: Model, forked: networks.Fork, places: Int[Array, "lanes places"]) -> Array:
    """Log-probabilities of what comes next as rows stand, at places among their ends: ``[lanes, places, v]``."""
    return log_probs_at(model.config, networks.final_weights(model.config, model.params), forked.hidden, places)


@partial(jax.jit, static_argnames="config")
def log_probs_at(config: NetworkConfig, params: Params, hidden: Array, places: Array) -> Array:
    """From the residual stream after the last block, ``[lanes, ends, d]``, to log-probabilities at some places."""
    return jax.nn.log_softmax(networks.logits(config, params, networks.take_tokens(hidden, places)))
