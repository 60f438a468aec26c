"""Texts in tokens with the end of a subject in them, and the network from there on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpatch_jax.core.sizes import round_up
from tpatch_jax.editors.locating import locate_subject
from tpatch_jax.editors.reading import Item, subject_token
from tpatch_jax.editors.wordings import Wording, shortened
from tpatch_jax.models import networks
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import row_length, tokens_array
from tpatch_jax.requests import EditRequest

__all__ = ["PromptRow", "forked_rows", "prompt_row", "rephrase_rows", "row_of", "rows_of", "runner", "short_rows"]


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


def short_rows(model: Model, request: EditRequest, item: Item, prefixes: Sequence[str]) -> list[PromptRow]:
    """What `shortened` gives in tokens, each after a prefix; one that would be too long is left out."""
    pairs = zip(shortened(request), prefixes, strict=False)
    rows = (row_of(model, wording.after(prefix), item.target) for wording, prefix in pairs)
    return [row for row in rows if row is not None]


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
    span = round_up(max(len(row.tokens) - row.subject for row in rows), 4)
    order: list[int] = []
    parts: list[networks.Fork] = []
    # Rows of like length together: a few with a long context would else lengthen all.
    lengths = np.asarray([row_length(len(row.tokens)) for row in rows])
    for length in np.unique(lengths):
        part = np.flatnonzero(lengths == length).tolist()
        there = [*part, *[part[-1]] * (round_up(len(part), 8) - len(part))]
        tokens = tokens_array([rows[row].tokens for row in there], int(length))
        first = jnp.asarray([rows[row].subject for row in there], jnp.int32)
        forked = networks.fork(model.config, model.params, tokens, layer, first, span)
        pad = [(0, 0), (0, int(lengths.max() - length)), (0, 0), (0, 0)]
        parts.append(forked._replace(caches=jax.tree.map(partial(jnp.pad, pad_width=pad), forked.caches)))
        order += there
    back = np.zeros(len(rows), int)
    back[order[::-1]] = np.arange(len(order))[::-1]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[back], *(part[:-1] for part in parts))
    table = np.zeros((len(rows), places), np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row.places)] = np.asarray(row.places) - row.subject
    return networks.Fork(*joined, layer=layer), jnp.asarray(table)


def runner(model: Model, layer: int) -> Callable[[tuple[tuple, Array], Array], Array]:
    """The network from a layer's FFN on, as `tpatch_jax.core.values.train_values` runs it on `forked_rows`."""
    config, params = model.config, model.params

    def run(rows: tuple[tuple, Array], added: Float[Array, "rows d"]) -> Float[Array, "rows places vocabulary"]:
        forked, places = networks.Fork(*rows[0], layer=layer), rows[1]
        output = forked.output.at[:, 0].add(added.astype(forked.output.dtype))
        end = networks.resume_fork(config, params, forked, output)
        end = jnp.take_along_axis(end, places[..., None], 1)
        return jax.nn.log_softmax(networks.logits(config, params, end))

    return run
