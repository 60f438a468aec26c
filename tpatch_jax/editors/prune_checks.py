"""What pruned patches are checked on: everything that an edit says, and what it must leave alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tpatch_jax.editors.forms import respelled
from tpatch_jax.editors.frames import other_frames, same_frames
from tpatch_jax.editors.holding import AskedRow, asked_row
from tpatch_jax.editors.locating import split_at_subject
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.wordings import Wording, kept_wordings, neutral_wordings, question, shortened
from tpatch_jax.models.chat import form_of, in_chat
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest

__all__ = ["CheckRows", "read_check_rows"]

PREFIXES, SHORTER, SAME, OTHERS = 2, 3, 4, 6
"""In so many contexts, shorter wordings and other wordings an edit is checked, and so many other things are asked about
its subject.
"""


class CheckRows(NamedTuple):
    """The prompts of some edits, in tokens.

    Attributes:
        said: after which their targets should be said.
        said_group: of each the group of edits that it belongs to, ``[rows]`` int.
        kept: after which what is said should stay.
        kept_group: the same of these.
    """

    said: list[AskedRow]
    said_group: np.ndarray
    kept: list[AskedRow]
    kept_group: np.ndarray


def _said(model: Model, request: EditRequest, known: ModelMemory | None) -> list[AskedRow]:
    """An edit as it was asked for, then in contexts, other spellings and other wordings; each once."""
    first = asked_row(model, request)
    rows, continuation = [first], request.continuation
    if model.config.architecture != "decoder":
        return rows
    spelt = respelled(model, request, True) if request.subject else []
    if form_of(model, request) == "both":
        twin = in_chat(model, replace(request, rephrases=()))
        rows.append(AskedRow.of(model, twin.prompt, twin.continuation))
    if form_of(model, request) != "chat":
        texts = [other.prompt for other in spelt]
        if known is not None:
            before = [*known.prefixes[:PREFIXES], *([known.passage] if known.passage else [])]
            texts += [f"{prefix} {request.prompt}" for prefix in before]
        if request.subject:
            form = "statement" if question(request) is None else "question"
            wordings = [*shortened(request)[:SHORTER], *same_frames(request, SAME, form=form)]
            texts += [text for text, _ in wordings]
        rows += [AskedRow.of(model, text, continuation) for text in texts]
    else:
        rows += [asked_row(model, other) for other in spelt]
    unique = {tuple(row.tokens): row for row in rows if row.places}
    return list(unique.values())


def _kept(model: Model, request: EditRequest) -> list[AskedRow]:
    """What must stay: what a request says so of, and other things about its subject."""
    if model.config.architecture != "decoder":
        return []
    texts = [*request.keep, *request.locality]
    if request.subject and split_at_subject(request)[1]:
        form = "statement" if question(request) is None else "question"
        others: list[Wording] = [*kept_wordings(request), *other_frames(request, OTHERS, form=form)]
        others += neutral_wordings(request, OTHERS, form == "question")
        texts += [text for text, _ in others[:OTHERS]]
    rows = [model.encode_prompt(text) for text in dict.fromkeys(texts)]
    return [AskedRow(row, range(len(row) - 1, len(row)), []) for row in rows if 0 < len(row) <= model.config.context]


def read_check_rows(model: Model, groups: Sequence[Sequence[EditRequest]], known: ModelMemory | None) -> CheckRows:
    """All prompts that groups of edits are checked on; the first of each edit is as it was asked for.

    Args:
        model: whose tokenizer and template count.
        groups: edits that share their neurons are a group.
        known: what is known about the model; ``None`` is nothing.
    """
    said, kept = [], []
    for number, requests in enumerate(groups):
        for request in requests:
            said += [(row, number) for row in _said(model, request, known)]
            kept += [(row, number) for row in _kept(model, request)]
    return CheckRows(
        [row for row, _ in said], np.asarray([number for _, number in said], int),
        [row for row, _ in kept], np.asarray([number for _, number in kept], int),
    )  # fmt: skip
