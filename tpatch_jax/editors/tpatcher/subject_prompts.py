"""The texts that keys and values at subjects are fitted on, in tokens."""

from collections.abc import Sequence
from itertools import chain, cycle, islice
from typing import NamedTuple

from tpatch_jax.editors.forms import ask_in_chats, chat_rows, holds_in_chats, other_chats, respelled
from tpatch_jax.editors.frames import Form, other_frames, same_frames
from tpatch_jax.editors.locating import split_at_subject
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.reading import Item, target_tokens
from tpatch_jax.editors.subject_rows import (
    PromptRow,
    fitting_rows,
    prompt_row,
    rephrase_rows,
    rows_of,
    short_ends,
    short_rows,
)
from tpatch_jax.editors.tpatcher.subject_settings import SubjectSettings
from tpatch_jax.editors.wordings import Wording, kept_wordings, look_alikes, neutral_wordings, question
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest

__all__ = ["AVOIDED", "SubjectRows", "read_subject_rows", "read_value_rows"]

AVOIDED = 16
"""From so many texts a key learns what to turn away from."""

ASIDES = 8
"""So many of them are different, where a question's key turns away from its subject in statements."""


def _key_wordings(
    request: EditRequest, prefixes: Sequence[str], names: Sequence[str], settings: SubjectSettings
) -> tuple[list[Wording], list[Wording]]:
    """Where else a key should see its subject, and where it should not know it.

    A key for a statement knows its subject anywhere, at the very start of a text, too, and does not mistake another
    that ends in the same word for it. One for a question knows it in
    questions only: what asks for the same is a question as well, and what is said of the subject stays as it was.
    """
    subject, count = request.subject or "", settings.key_contexts // 2
    if settings.token != "subject":
        return [], []
    if question(request) is None:
        alone = Wording(subject, len(subject))
        others = look_alikes(request, names, AVOIDED) if settings.key_avoidance else []
        return [alone, *(alone.after(prefix) for prefix in prefixes)][:count], others
    # Other questions count as its own, or it would know its subject in few rephrasings.
    before, subject, _ = split_at_subject(request)
    end = len(before) + len(subject)
    wordings = [Wording(request.prompt[:end], end), *neutral_wordings(request, count - 1, asked=True)]
    wordings = [wording.after(prefix) for wording, prefix in zip(wordings, prefixes, strict=False)] + wordings
    return wordings[:count], neutral_wordings(request, ASIDES) if settings.question_avoidance else []


class SubjectRows(NamedTuple):
    """What is read of each lane, in tokens.

    Attributes:
        prompts: through which its value is trained, the bare one first; shorter wordings come last.
        contexts: where else its key sees the subject.
        avoid: where its key should not know it; none, or as many for each lane.
        neutral: after which little should change.
        spellings: of each other spelling of its subject, where a key for that sees it, the bare prompt first.
    """

    prompts: dict[int, list[PromptRow]]
    contexts: dict[int, list[PromptRow]]
    avoid: dict[int, list[PromptRow]]
    neutral: dict[int, list[PromptRow]]
    spellings: dict[int, list[list[PromptRow]]]


def _value_prompts(
    model: Model, items: Sequence[Item], requests: Sequence[EditRequest], lanes: Sequence[int],
    settings: SubjectSettings
) -> dict[int, list[PromptRow]]:  # fmt: skip
    """Each lane's prompt in a few contexts, and its rephrasings if they are trained on; equally many for each."""
    prompts = {
        number: [
            prompt_row(model, requests[items[number].position], items[number], context, settings.token)
            for context in range(min(settings.value_contexts, len(items[number].texts) - items[number].rephrases))
        ]
        for number in lanes
    }
    rephrased = {n: rephrase_rows(model, requests[items[n].position], items[n], settings.token) for n in lanes}
    # Where a lane has fewer, they come again.
    most = max(map(len, rephrased.values()), default=0)
    return {number: [*rows, *islice(cycle(rephrased[number] or rows[:1]), most)] for number, rows in prompts.items()}


def _shorter_prompts(
    model: Model, item: Item, request: EditRequest, last: list[PromptRow], known: ModelMemory, settings: SubjectSettings
) -> list[PromptRow]:
    """A prompt in fewer words; where there are fewer ways to say it, the prompt in its last context stands in."""
    if settings.token != "subject":
        return []
    shorter = short_rows(model, request, item, known.prefixes[-settings.shorter :])
    return [*islice(chain(shorter, cycle(last)), settings.shorter)]


def _same_prompts(
    model: Model, item: Item, request: EditRequest, last: list[PromptRow], form: Form, settings: SubjectSettings
) -> list[PromptRow]:
    """Other wordings of the request's relation; where the library of frames knows fewer, the same stands in."""
    wordings = same_frames(request, settings.same, form=form) if settings.token == "subject" else []
    return [*islice(chain(fitting_rows(model, wordings, item.target), cycle(last)), settings.same)]


def _other_wordings(request: EditRequest, count: int, form: Form) -> list[Wording]:
    """Other things about the subject, said or asked as the request does; frames of the library first."""
    others = other_frames(request, count, form=form)
    return [*others, *neutral_wordings(request, count - len(others), form == "question")][:count]


def _chat_prompts(
    model: Model, request: EditRequest, last: list[PromptRow], settings: SubjectSettings
) -> list[PromptRow]:
    """The prompt asked in a few conversations; where it need not hold in chats, or none is short, the prompt again."""
    rows = chat_rows(model, ask_in_chats(model, request, settings.chat)) if holds_in_chats(model, request) else []
    return [*islice(cycle(short_ends(rows) or last), settings.chat)]


def _long_prompts(
    model: Model, known: ModelMemory, request: EditRequest, item: Item, last: list[PromptRow], chats: bool
) -> list[PromptRow]:
    """The prompt behind a longer text, in a chat as well; where it is too long, the prompt in its last context."""
    prompt = Wording.of(*split_at_subject(request)).after(known.passage)
    rows = fitting_rows(model, [prompt], item.target)
    if chats and holds_in_chats(model, request):
        rows += chat_rows(model, ask_in_chats(model, request, 1, behind=known.passage))
    return [*islice(cycle(short_ends(rows) or last), 2 if chats else 1)]


def _spelt_prompts(model: Model, others: Sequence[EditRequest], last: list[PromptRow], count: int) -> list[PromptRow]:
    """The prompt with its subject spelt otherwise, bare and in a chat; where there is no such spelling, the same."""
    rows: list[PromptRow] = []
    for other in others:
        rows += fitting_rows(model, [Wording.of(*split_at_subject(other))], target_tokens(model, other))
        if holds_in_chats(model, other):
            rows += chat_rows(model, ask_in_chats(model, other, 1))
    return [*islice(cycle(short_ends(rows) or last), count)]


def _asked_elsewhere(model: Model, request: EditRequest, settings: SubjectSettings) -> list[PromptRow]:
    """Other things about the subject, asked in chats."""
    count = min(settings.chat_neutral, settings.neutral)
    if not count or not holds_in_chats(model, request):
        return []
    return short_ends(chat_rows(model, other_chats(model, request, count), wanted=False))


def _spelt_contexts(
    model: Model, known: ModelMemory, others: Sequence[EditRequest], count: int, settings: SubjectSettings
) -> list[list[PromptRow]]:
    """Of each other spelling of a subject so many texts up to it, the bare prompt first."""
    sights = []
    for other in others:
        prompt = Wording.of(*split_at_subject(other))
        prefixes = known.prefixes[: settings.value_contexts - 1]
        same, _ = _key_wordings(other, known.prefixes[settings.value_contexts :], [], settings)
        rows = rows_of(model, [prompt, *(prompt.after(prefix) for prefix in prefixes), *same])
        if rows:
            sights.append([*islice(cycle(rows), count)])
    return sights


def read_subject_rows(
    model: Model, known: ModelMemory, items: Sequence[Item], requests: Sequence[EditRequest], lanes: Sequence[int],
    settings: SubjectSettings
) -> SubjectRows:  # fmt: skip
    """Everything that keys and values of some requests are fitted on, in tokens.

    Args:
        model: the unedited model.
        known: what is known about it at the layer.
        items: the requests in tokens.
        requests: all requests, by ``Item.position``.
        lanes: which items.
        settings: options.
    """
    prompts = _value_prompts(model, items, requests, lanes, settings)
    contexts, avoid, neutral, further, keeps = {}, {}, {}, {}, 0
    subjects = [requests[item.position].subject for item in items]
    names = list(dict.fromkeys([*known.names, *(subject for subject in subjects if subject)]))
    at_subject = settings.token == "subject"
    # As many rows for each lane; those that have less to say repeat what they have.
    given = {number: requests[items[number].position] for number in lanes}
    asked: dict[int, list[PromptRow]] = {}
    chats = at_subject and settings.chat and any(holds_in_chats(model, request) for request in given.values())
    others = {n: respelled(model, one, settings.lower_case) if at_subject else [] for n, one in given.items()}
    spelt = (2 if chats else 1) * max(map(len, others.values()), default=0)
    for number, request in given.items():
        count = min(settings.value_contexts, len(items[number].texts) - items[number].rephrases)
        last = prompts[number][count - 1 : count]
        form: Form = "statement" if question(request) is None else "question"
        further[number] = [
            *_shorter_prompts(model, items[number], request, last, known, settings),
            *_same_prompts(model, items[number], request, last, form, settings),
            *(_chat_prompts(model, request, last, settings) if chats else []),
            *(
                _long_prompts(model, known, request, items[number], last, bool(chats))
                if at_subject and known.passage
                else []
            ),
            *_spelt_prompts(model, others[number], last, spelt),
        ]
        same, avoided = _key_wordings(request, known.prefixes[settings.value_contexts :], names, settings)
        if at_subject and known.passage:
            same = [*same, Wording.of(*split_at_subject(request)).after(known.passage)]
        contexts[number] = [*prompts[number][1:], *rows_of(model, same)]
        rows = rows_of(model, avoided)
        avoid[number] = [*islice(cycle(rows), AVOIDED)] if rows else []
        asked[number] = _asked_elsewhere(model, request, settings) if at_subject else []
        bare = settings.neutral - len(asked[number])
        rows = rows_of(model, [*kept_wordings(request), *_other_wordings(request, bare, form)])
        # Where all are too long the prompt stands in, read at one place like them.
        rows = rows or [row._replace(places=row.places[:1], wanted=[]) for row in prompts[number][:1]]
        neutral[number], keeps = rows, max(keeps, len(kept_wordings(request)))
    # As many for each lane: what the settings say, and room for all that is kept.
    neutral = {
        number: [*islice(cycle(rows), settings.neutral + keeps - len(asked[number])), *asked[number]]
        for number, rows in neutral.items()
    }
    most = max(map(len, contexts.values()), default=0)
    contexts = {number: [*islice(cycle(rows or prompts[number][:1]), most)] for number, rows in contexts.items()}
    prompts = {number: rows + further[number] for number, rows in prompts.items()}
    spellings = {n: _spelt_contexts(model, known, spelled, 1 + most, settings) for n, spelled in others.items()}
    return SubjectRows(prompts, contexts, avoid, neutral, spellings)


def read_value_rows(
    model: Model, known: ModelMemory, items: Sequence[Item], requests: Sequence[EditRequest], lanes: Sequence[int],
    settings: SubjectSettings
) -> tuple[dict[int, list[PromptRow]], dict[int, list[PromptRow]]]:  # fmt: skip
    """Of each lane the rows that should say its target, the bare prompt first, and those that should stay.

    Args:
        model: the unedited model.
        known: what is known about it at the layer.
        items: the requests in tokens.
        requests: all requests, by ``Item.position``.
        lanes: which items.
        settings: options.
    """
    rows = read_subject_rows(model, known, items, requests, lanes, settings)
    return rows.prompts, rows.neutral
