"""Texts in tokens with the end of a subject in them, and the network from there on."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from tpatch_jax.core.sizes import power_of_two, round_up
from tpatch_jax.editors.locating import locate_subject
from tpatch_jax.editors.reading import Item, subject_token
from tpatch_jax.editors.wordings import Wording, shortened
from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Params

__all__ = [
    "PromptRow",
    "fitting_rows",
    "forked_rows",
    "prompt_row",
    "rephrase_rows",
    "row_of",
    "rows_of",
    "runner",
    "said_at",
    "short_ends",
    "short_rows",
]


SPAN = 16
"""Rows that need not be there have so many tokens at most from their subject on, for one length serves all."""


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


@partial(jax.jit, static_argnames="longest")
def _concatenate(leaves: Sequence[Array], order: Int[Array, " rows"], longest: int | None = None) -> Array:
    """Rows of several parts in another order, padded to ``longest``. Most leaves are alike, so few are compiled."""
    if longest is not None:
        width = [[(0, 0), (0, longest - leaf.shape[1]), (0, 0), (0, 0)] for leaf in leaves]
        leaves = list(map(jnp.pad, leaves, width))
    return jnp.concatenate(list(leaves))[order]


def _join(parts: Sequence[networks.Fork], order: Int[Array, " rows"], layer: int) -> networks.Fork:
    """Rows of several lengths together, in another order; caches are padded to the longest."""
    longest = max(leaf.shape[1] for part in parts for leaf in jax.tree.leaves(part.caches))

    def join(*leaves: Array) -> Array:
        return _concatenate(leaves, order)

    fields = {name: join(*(getattr(part, name) for part in parts)) for name in networks.Fork._fields[:4]}
    caches = jax.tree.map(lambda *leaves: _concatenate(leaves, order, longest), *(part.caches for part in parts))
    return networks.Fork(**fields, caches=caches, hidden=join(*(part.hidden for part in parts)), layer=layer)


def forked_rows(
    model: Model, rows: Sequence[PromptRow], layer: int, places: int
) -> tuple[networks.Fork, Int[Array, "rows places"]]:
    """Rows run up to a layer's FFN, from their subject on, and where in that part tokens are wanted.

    Args:
        model: the model.
        rows: the rows.
        layer: the layer.
        places: as many places for each row; those it has not are place 0.

    Returns:
        A `tpatch_jax.models.networks.Fork` and the places, ``[rows, places]``, counted from the subject.
    """
    # Few sizes, so that another prompt seldom compiles anything.
    span = power_of_two(max(len(row.tokens) - row.subject for row in rows), 8)
    order: list[int] = []
    parts: list[networks.Fork] = []
    # Rows of like length together: a few with a long context would else lengthen all.
    lengths = np.asarray([power_of_two(len(row.tokens), 16) for row in rows])
    for length in np.unique(lengths):
        part = np.flatnonzero(lengths == length).tolist()
        there = [*part, *[part[-1]] * (round_up(len(part), 8) - len(part))]
        tokens = tokens_array([rows[row].tokens for row in there], int(length))
        first = jnp.asarray([rows[row].subject for row in there], jnp.int32)
        parts.append(networks.fork(model.config, model.params, tokens, layer, first, span))
        order += there
    back = np.zeros(len(rows), int)
    back[order[::-1]] = np.arange(len(order))[::-1]
    joined = _join(parts, jnp.asarray(back), layer)
    table = np.zeros((len(rows), places), np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row.places)] = np.asarray(row.places) - row.subject
    return joined, jnp.asarray(table)


def runner(model: Model, layer: int, *, stream: bool = False) -> Partial:
    """The network from a layer's FFN on: from `forked_rows` and what is added at their subjects to log-probabilities.

    Args:
        model: the model.
        layer: the layer.
        stream: whether it is added to the stream beside the FFN, where it comes out of the block as it is, even where
            the FFN's output is normed; by default to the FFN's output.

    Returns:
        ``((fork's fields, places), added [rows, d]) -> [rows, places, vocabulary]``, as
        `tpatch_jax.core.values.train_values` runs it.
    """
    return Partial(_runner(model.config, layer, stream), networks.after(model.params, layer))


@lru_cache(maxsize=16)
def _runner(config: NetworkConfig, layer: int, stream: bool) -> Callable[..., Array]:
    """One object for each network and layer, so that ``jit`` recognises it."""

    @jax.jit
    def run(
        params: Params, rows: tuple[tuple, Array], added: Float[Array, "rows d"]
    ) -> Float[Array, "rows places vocabulary"]:
        forked, places = networks.Fork(*rows[0], layer=layer), rows[1]
        changed = (forked.residual if stream else forked.output).at[:, 0].add(added.astype(forked.output.dtype))
        forked, output = (forked._replace(residual=changed), forked.output) if stream else (forked, changed)
        return _log_probs(config, params, networks.resume_fork(config, params, forked, output), places)

    return run


def said_at(model: Model, forked: networks.Fork, places: Int[Array, "rows places"]) -> Array:
    """Log-probabilities of what comes next as rows stand, at places counted from the subject: ``[rows, places, v]``."""
    return _log_probs(model.config, networks.final_weights(model.config, model.params), forked.hidden, places)


@partial(jax.jit, static_argnames="config")
def _log_probs(config: NetworkConfig, params: Params, hidden: Array, places: Array) -> Array:
    """From the residual stream after the last block, ``[rows, span, d]``, to log-probabilities at some places."""
    end = jnp.take_along_axis(hidden, places[..., None], 1)
    return jax.nn.log_softmax(networks.logits(config, params, end))
