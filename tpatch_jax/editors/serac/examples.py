"""What SERAC's two networks learn from: edits beside inputs inside and outside their scope, and answers to copy.

Everything is drawn from a seed and the epoch's number, so that training that was interrupted goes on with the same.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.core.sizes import round_up
from tpatch_jax.editors.locating import names_subject, replace_subject
from tpatch_jax.editors.serac.networks import context_tokens, edit_text, encoder_row
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import ASK
from tpatch_jax.requests import EditRequest, join_target

__all__ = ["CounterfactualLesson", "ScopeLesson", "counterfactual_lessons", "scope_batches", "scope_lessons", "swapped"]

GROUP = 4
"""So many edits of one batch ask the same of different subjects."""

_ENCODER_TOKENS = 64
_ROW_TOKENS = 192


class ScopeLesson(NamedTuple):
    """Edits and inputs for the scope classifier.

    Attributes:
        tokens: of the edits, then of the inputs, ``[edits + inputs, tokens]`` int, padded with negative numbers.
        relation: whether an input is in an edit's scope (1), is not (-1), or is left out (0), ``[inputs, edits]``.
    """

    tokens: np.ndarray
    relation: np.ndarray


class CounterfactualLesson(NamedTuple):
    """Rows for the counterfactual model.

    Attributes:
        frozen: the parameters that are not trained.
        tokens: edit input, label, test input and answer, ``[rows, tokens]`` int.
        place: where each token of the answer is said, ``[rows, answer]`` int.
        answer: those tokens, ``[rows, answer]`` int, the one that ends a text included.
        weight: 1 where an answer counts and 0 at padding, ``[rows, answer]``.
    """

    frozen: Any
    tokens: np.ndarray
    place: np.ndarray
    answer: np.ndarray
    weight: np.ndarray


def _frame(request: EditRequest) -> str:
    """The prompt without its subject: what is asked."""
    subject = request.subject
    return replace_subject(request.prompt, subject, "{}") if subject else request.prompt


def swapped(requests: Sequence[EditRequest], number: int, rng: np.random.Generator) -> str:
    """Another question about a request's subject: the prompt of a request whose kind of answer is another.

    Args:
        requests: all of them.
        number: whose subject.
        rng: draws the other request.

    Returns:
        The question, or an empty text if there is none.

    Example:
        >>> requests = [EditRequest("Ada speaks", "Thai", "Ada"), EditRequest("Bob lives in", "Rome", "Bob")]
        >>> swapped(requests, 0, np.random.default_rng(0))
        'Ada lives in'
    """
    request = requests[number]
    if not request.subject:
        return ""
    for other in (requests[pick] for pick in rng.integers(len(requests), size=8)):
        frame = _frame(other)
        if other.subject and "{}" in frame and frame != _frame(request) and other.target != request.target:
            return frame.replace("{}", request.subject)
    return ""


def scope_batches(requests: Sequence[EditRequest], size: int, seed: Sequence[int]) -> list[np.ndarray]:
    """Which requests stand in which batch of an epoch: some of each batch ask the same of different subjects.

    Args:
        requests: all of them.
        size: how many are in a batch; the last one is filled up with the first.
        seed: of the order.
    """
    rng, by_frame = np.random.default_rng(list(seed)), defaultdict(list)
    for number in rng.permutation(len(requests)):
        by_frame[_frame(requests[number])].append(int(number))
    groups = [same[at : at + GROUP] for same in by_frame.values() for at in range(0, len(same), GROUP)]
    order = [number for group in rng.permutation(len(groups)) for number in groups[group]]
    count = -(-len(order) // size)
    return np.split(np.resize(np.asarray(order), count * size), count)


def scope_lessons(
    encoder: Model, requests: Sequence[EditRequest], size: int, seed: int, epoch: int, first: int = 0
) -> Iterator[ScopeLesson]:
    """Batches for the scope classifier.

    The inputs beside each edit are its prompt and a rephrasing, which are in its scope, one of its locality
    prompts, and another question about its subject, which are not. For every other edit of the batch all of them are
    out of scope, but for those about a subject that they name.

    Args:
        encoder: whose tokenizer counts.
        requests: with rephrases and locality prompts.
        size: edits in a batch.
        seed: of everything drawn.
        epoch: counted from 0.
        first: so many batches are passed over.
    """
    for number, chosen in enumerate(scope_batches(requests, size, [seed, epoch])):
        if number < first:
            continue
        rng = np.random.default_rng([seed, epoch, number])
        edits = [requests[pick] for pick in chosen]
        kinds = [
            [request.prompt for request in edits],
            [_one(request.rephrases or (request.prompt,), rng) for request in edits],
            [_one(request.locality, rng) for request in edits],
            [swapped(requests, int(pick), rng) for pick in chosen],
        ]
        relation = np.full((len(kinds) * size, size), -1, np.float32)
        for row, (text, of) in enumerate((text, of) for texts in kinds for of, text in enumerate(texts)):
            for column, edit in enumerate(edits):
                about = names_subject(text, edit.subject)
                if column != of and (about or edit.prompt == edits[of].prompt):
                    relation[row, column] = 0
            relation[row, of] = 1 if row < 2 * size else -1
            if not text:
                relation[row] = 0
        texts = [edit_text(edit.prompt, edit.target, edit.join) for edit in edits] + [
            text for kind in kinds for text in kind
        ]
        yield ScopeLesson(_padded([_short(encoder_row(encoder, text)) for text in texts]), relation)


def _one(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))] if texts else ""


def _short(row: list[int]) -> list[int]:
    return row if len(row) <= _ENCODER_TOKENS else [*row[:1], *row[1 - _ENCODER_TOKENS :]]


def _padded(rows: Sequence[Sequence[int]], padding: int = ASK, step: int = 16) -> np.ndarray:
    table = np.full((len(rows), round_up(max(map(len, rows)), step)), padding, np.int32)
    for slot, row in enumerate(rows):
        table[slot, : len(row)] = row
    return table


def counterfactual_lessons(
    model: Model,
    requests: Sequence[EditRequest],
    frozen: Any,
    size: int,
    seed: int,
    epoch: int,
    first: int = 0,
) -> Iterator[CounterfactualLesson]:
    """Batches for the counterfactual model: the answer is the label and the token that ends a text.

    A quarter of the labels are the requests' targets, a quarter those of others, and half are names of subjects,
    so that texts of any length are read off the edit and not learnt by heart.

    Args:
        model: the counterfactual model, whose tokenizer counts.
        requests: with rephrases.
        frozen: the parameters that are not trained.
        size: rows in a batch. Every epoch has as many as hold all requests; rows that are too long, of which an epoch
            with longer labels has more, are left out, and the first ones stand in twice.
        seed: of everything drawn.
        epoch: counted from 0.
        first: so many batches are passed over.

    Raises:
        TPatchError: all rows are too long.
    """
    rng = np.random.default_rng([seed, epoch])
    targets = [request.target for request in requests]
    names = [request.subject for request in requests if request.subject] or targets
    end, rows, longest = model.tokenizer.eos_token_id, [], min(_ROW_TOKENS, model.config.context)
    for number in rng.permutation(len(requests)):
        request = requests[number]
        texts = ([request.target], targets, names, names)[rng.integers(4)]
        label = texts[rng.integers(len(texts))]
        asked = _one((request.prompt, *request.rephrases), rng)
        before = [*context_tokens(model, request.prompt, label), *model.encode_prompt(asked)]
        answer = [*model.encode_target(asked, join_target(asked, label)), end]
        if len(before) + len(answer) <= longest:
            rows.append((before, answer))
    if not rows:
        raise TPatchError(
            f"an edit, a test input and an answer take more than {longest} tokens together, in every request; give "
            "requests with shorter prompts and targets"
        )
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    count = -(-len(requests) // size)
    batches = np.split(np.resize(np.arange(len(rows)), count * size), count)
    for batch in rng.permutation(count)[first:]:
        chosen = [rows[number] for number in batches[batch]]
        tokens = _padded([[*before, *answer] for before, answer in chosen], 0, 32)
        shape = (size, round_up(max(len(answer) for _, answer in chosen), 8))
        place, answers, weight = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for slot, (before, answer) in enumerate(chosen):
            place[slot, : len(answer)] = np.arange(len(answer)) + len(before) - 1
            answers[slot, : len(answer)], weight[slot, : len(answer)] = answer, 1
        yield CounterfactualLesson(frozen, tokens, place, answers, weight)
