"""Neurons at the subject: an earlier layer, the subject's last token, a value trained through the rest of the network.

A neuron there recognises what a prompt is about, whatever its wording; so it generalizes to rephrasings that end
differently, which one in the last layer does not.
"""

import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core.checks import check_positive, check_range, check_types
from tpatch_jax.core.memory import Memory, blended, create_memory, extend, nuisance_scatter
from tpatch_jax.core.patch import Patch, concatenate, create, sharpen, sized, take
from tpatch_jax.core.recipes.staged import Recognised
from tpatch_jax.core.recipes.whitened import whitened_key
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.core.start import StartParams
from tpatch_jax.core.values import ValueTrainingSettings, train_values
from tpatch_jax.editors.frames import Form, other_frames, same_frames
from tpatch_jax.editors.locating import split_at_subject
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.reading import Item
from tpatch_jax.editors.subject_rows import (
    PromptRow,
    fitting_rows,
    prompt_row,
    rephrase_rows,
    rows_of,
    runner,
    short_rows,
)
from tpatch_jax.editors.tpatcher.previous import NO_SUBJECT, PreviousEdits
from tpatch_jax.editors.tpatcher.subject_values import SHARPNESS, create_value_problem, level_patch, predict_start
from tpatch_jax.editors.wordings import Wording, kept_wordings, look_alikes, neutral_wordings, question
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.collection import collect
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.finished_parts import FinishedParts
from tpatch_jax.typing import Progress

__all__ = [
    "POSITIONS",
    "FittedSubjects",
    "SubjectNeuron",
    "SubjectSettings",
    "Subjects",
    "fit_subjects",
    "read_subjects",
    "read_value_rows",
    "subject_layer",
]

POSITIONS = ("subject", "prompt")

AVOIDED = 16
"""From so many texts a key learns what to turn away from."""

ASIDES = 8
"""So many of them are different, where a question's key turns away from its subject in statements."""


@dataclass(frozen=True)
class SubjectSettings:
    """Options of the subject site.

    No name stands for another setting of the editor as well, so that each can be given alone on the command line.

    Attributes:
        token: at whose last token: ``"subject"``, or ``"prompt"``, of use for comparison only.
        value: how values are trained.
        key_contexts: in how many contexts a key sees its subject at most; half of them without the rest of the prompt.
        value_contexts: through how many contexts a value is trained, the bare prompt included.
        shorter: through how many shorter wordings of the prompt as well, 0 to 3.
        same: through how many other wordings of the prompt's relation, where the library of frames knows it.
        neutral: on how many neutral prompts about the subject the edited model is kept close to the unedited one.
        key_floor: the lowest threshold of a key, where 0 is the mean query and 1 the subject's own.
        key_split: where the threshold lies between the hardest negative (0) and the edit's own queries (1).
        key_avoidance: how strongly the key of a statement turns away from subjects that end in the same word.
        key_contrast: how strongly a key turns away from other subjects that look much the same.
        question_avoidance: how strongly the key of a question turns away from its subject where nothing is asked.
        question_floor: the same as `key_floor` for keys that turn away.
        question_split: the same as `key_split` for keys that turn away.
        key_nuisance: how strongly a key avoids directions in which only the context shows.
        value_lanes: how many values are trained together at most.
        plateau: the response stops growing here, where 1 is that of the edit's own queries; it takes a second neuron.
            0 lets it grow.
        start: what predicts the values that training starts from: ``"auto"``, what comes with the library for this
            model, if anything; ``"none"``, which starts from zero; or a file that ``tpatch learn`` made.

    Raises:
        TPatchError: a value makes no sense.
    """

    token: str = "subject"
    value: ValueTrainingSettings = field(default_factory=ValueTrainingSettings)
    key_contexts: int = 6
    value_contexts: int = 4
    shorter: int = 3
    same: int = 4
    neutral: int = 16
    key_floor: float = 0.7
    key_split: float = 0.4
    key_nuisance: float = 0.5
    key_avoidance: float = 0.05
    key_contrast: float = 0.01
    question_avoidance: float = 0.02
    question_floor: float = 0.5
    question_split: float = 0.4
    value_lanes: int = 8
    plateau: float = 0.3
    start: str = "auto"

    def __post_init__(self) -> None:
        """Checks the values."""
        check_types(self)
        check_range(self, ("key_contexts", "value_contexts", "value_lanes"), 1)
        check_range(self, ("neutral", "same"), 0)
        check_range(self, ("shorter",), 0, 3)
        check_range(self, ("key_floor", "key_split", "question_floor", "question_split", "key_nuisance"), 0.0, 1.0)
        check_range(self, ("key_avoidance", "key_contrast", "question_avoidance", "plateau"), 0.0)
        check_range(self.value, ("steps",), 0)
        check_positive(self.value, ("aim", "damping", "farthest", "near"))
        check_positive(self.value, ("longest",), bounded=False)
        check_range(self.value, ("enough", "closeness"), 0.0)


class SubjectNeuron(NamedTuple):
    """What became of one request at this site.

    Attributes:
        position: the request's place in the list.
        neuron: its place among the neurons that `fit_subjects` returns.
        steps: steps on its value.
        margin: see `tpatch_jax.core.problem.FitInfo`.
        losses: the terms of the objective at the end.
    """

    position: int
    neuron: int
    steps: int
    margin: float
    losses: Mapping[str, float]


def subject_layer(layers: int, wanted: str = "auto") -> int:
    """The layer of the subject site: a third of the way up unless one is named.

    Args:
        layers: how many layers the model has.
        wanted: ``"auto"`` or a number.

    Raises:
        TPatchError: it is something else.

    Example:
        >>> subject_layer(30), subject_layer(30, "4")
        (10, 4)
    """
    if wanted != "auto" and not wanted.isdecimal():
        raise TPatchError(f"layer {wanted!r} is not a layer; use auto or a number, 0 being the lowest")
    return round(layers / 3) if wanted == "auto" else int(wanted)


def group_of(subject: str) -> int:
    """A number for a subject: queries of one subject are no negatives of each other."""
    return zlib.crc32(unicodedata.normalize("NFC", subject).encode()) & 0x7FFFFFFF


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


@partial(jax.jit, static_argnames="contrast")
def _keys(
    query: Array, groups: Array, floor: Array, split: Array, avoid: Array, strength: Array, memory: Memory,
    contrast: float
) -> Recognised:  # fmt: skip
    def key(lane: tuple[Array, ...]) -> Recognised:
        positive, group, low, share, away, weight = lane
        return whitened_key(positive, group, memory, low, share, away, weight, contrast)

    # One lane at a time: the memory's responses to many keys at once would be the largest array of all.
    return jax.lax.map(key, (query, groups, floor, split, avoid, strength))


class Subjects(NamedTuple):
    """The subjects of some requests, as the layer of this site sees them, with the key that recognises each.

    Attributes:
        model: the unedited model.
        layer: the layer.
        settings: options.
        lanes: the requests that have a subject, as places in the list of items.
        prompts: of each lane the prompts through which its value is trained, the bare one first.
        neutral: of each lane prompts after which little should change.
        groups: a number for each item's subject, -1 without one.
        queries: of each item the query at every token of its bare prompt and target, ``[tokens, d]``.
        keys: the lanes' keys.
        positions: of each item the request's place in the list of requests.
        start: what predicts values to start from; ``None`` starts from zero.
    """

    model: Model
    layer: int
    settings: SubjectSettings
    lanes: list[int]
    prompts: dict[int, list[PromptRow]]
    neutral: dict[int, list[PromptRow]]
    groups: np.ndarray
    queries: list[np.ndarray]
    keys: Recognised | None
    positions: list[int]
    start: StartParams | None = None

    def place(self, number: int) -> tuple[int, int]:
        """Where an item's subject ends in its bare prompt, and its group; -1 without a subject."""
        return (self.prompts[number][0].subject if number in self.prompts else -1), int(self.groups[number])

    def queries_of(self, numbers: Sequence[int]) -> np.ndarray:
        """The queries of some items, one after the other, ``[tokens, d]``."""
        return np.concatenate([self.queries[number] for number in numbers]) if len(numbers) else self.queries[0][:0]


class FittedSubjects(NamedTuple):
    """Neurons at subjects, ``[n, d]``, and what became of the requests they belong to."""

    patch: Patch
    neurons: list[SubjectNeuron]


class _Rows(NamedTuple):
    """What is read of each lane, in tokens.

    Attributes:
        prompts: through which its value is trained, the bare one first; shorter wordings come last.
        contexts: where else its key sees the subject.
        avoid: where its key should not know it; none, or as many for each lane.
        neutral: after which little should change.
    """

    prompts: dict[int, list[PromptRow]]
    contexts: dict[int, list[PromptRow]]
    avoid: dict[int, list[PromptRow]]
    neutral: dict[int, list[PromptRow]]


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


def _read_rows(
    model: Model, known: ModelMemory, items: Sequence[Item], requests: Sequence[EditRequest], lanes: Sequence[int],
    settings: SubjectSettings
) -> _Rows:  # fmt: skip
    """Everything that keys and values of some requests are fitted on, in tokens."""
    prompts = _value_prompts(model, items, requests, lanes, settings)
    contexts, avoid, neutral, shorter, keeps = {}, {}, {}, {}, 0
    subjects = [requests[item.position].subject for item in items]
    names = list(dict.fromkeys([*known.names, *(subject for subject in subjects if subject)]))
    in_context = {n: items[n].texts for n in lanes}
    for number in lanes:
        request = requests[items[number].position]
        count = min(settings.value_contexts, len(in_context[number]) - items[number].rephrases)
        last = prompts[number][count - 1 : count]
        form: Form = "statement" if question(request) is None else "question"
        shorter[number] = [
            *_shorter_prompts(model, items[number], request, last, known, settings),
            *_same_prompts(model, items[number], request, last, form, settings),
        ]
        same, others = _key_wordings(request, known.prefixes[settings.value_contexts :], names, settings)
        contexts[number] = [*prompts[number][1:], *rows_of(model, same)]
        rows = rows_of(model, others)
        avoid[number] = [*islice(cycle(rows), AVOIDED)] if rows else []
        kept = kept_wordings(request)
        rows = rows_of(model, [*kept, *_other_wordings(request, settings.neutral, form)])
        # Where all are too long the prompt stands in, read at one place like them.
        rows = rows or [row._replace(places=row.places[:1], wanted=[]) for row in prompts[number][:1]]
        neutral[number], keeps = rows, max(keeps, len(kept))
    # As many for each lane: what the settings say, and room for all that is kept.
    neutral = {number: [*islice(cycle(rows), settings.neutral + keeps)] for number, rows in neutral.items()}
    most = max(map(len, contexts.values()), default=0)
    contexts = {number: [*islice(cycle(rows or prompts[number][:1]), most)] for number, rows in contexts.items()}
    prompts = {number: rows + shorter[number] for number, rows in prompts.items()}
    return _Rows(prompts, contexts, avoid, neutral)


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
    rows = _read_rows(model, known, items, requests, lanes, settings)
    return rows.prompts, rows.neutral


def read_subjects(
    model: Model, known: ModelMemory, layer: int, items: Sequence[Item], requests: Sequence[EditRequest],
    previous: PreviousEdits, settings: SubjectSettings, progress: Progress | None = None,
    start: StartParams | None = None,
) -> Subjects:  # fmt: skip
    """What the layer sees of each subject in a few contexts, and a key that recognises it.

    Args:
        model: the model without any patch.
        known: what is known about it at this layer.
        layer: the layer.
        items: the requests in tokens.
        requests: all requests, by ``Item.position``.
        previous: the edits of earlier steps, on which the keys stay silent unless they are of the same subject.
        settings: options.
        progress: called with what is being done, how much is done, and how much there is.
        start: what predicts values to start from.
    """
    subjects = [requests[item.position].subject for item in items]
    # What a key stands for: queries of the same are no negatives of each other.
    named = [s if s is None or settings.token == "subject" else items[n].texts[0] for n, s in enumerate(subjects)]
    groups = np.asarray([NO_SUBJECT if name is None else group_of(name) for name in named], np.int32)
    lanes = [number for number, subject in enumerate(subjects) if subject is not None]
    rows = _read_rows(model, known, items, requests, lanes, settings)
    positions = [item.position for item in items]

    # Nothing after the subject reaches its query.
    whole = [item.rows[0] for item in items]
    cut, beside = (
        [row.tokens[: row.subject + 1] for number in lanes for row in part[number]]
        for part in (rows.contexts, rows.avoid)
    )
    tokens = [*whole, *cut, *beside]
    places = [*(range(len(row)) for row in whole), *([len(row) - 1] for row in [*cut, *beside])]
    report = (lambda done: progress("reading subjects", done, len(tokens))) if progress else None
    seen = collect(model, tokens, places, layer, report).query
    upto = np.cumsum([sum(map(len, whole)), len(cut), len(beside)])
    queries = np.split(seen[: upto[0]], np.cumsum([len(row) for row in whole])[:-1])
    if not lanes:
        return Subjects(
            model, layer, settings, lanes, rows.prompts, rows.neutral, groups, queries, None, positions, start
        )

    contexts = seen[upto[0] : upto[1]].reshape(len(lanes), -1, seen.shape[1])
    bare = np.stack([queries[number][rows.prompts[number][0].subject] for number in lanes])
    positive = np.concatenate([bare[:, None], contexts], 1).astype(np.float32)
    # Of the prompts every token up to the subject is a negative of the others.
    ends = [
        rows.prompts[number][0].subject + 1 if number in rows.prompts else item.starts[0]
        for number, item in enumerate(items)
    ]
    part = np.concatenate([query[:end] for query, end in zip(queries, ends, strict=True)])
    before, owner = _previous_queries(previous)
    negative = np.concatenate([before, part, contexts.reshape(-1, seen.shape[1])])
    answer = np.concatenate([owner, np.repeat(groups, ends), np.repeat(groups[lanes], contexts.shape[1])])
    avoid = np.full((len(lanes), AVOIDED, seen.shape[1]), np.nan, np.float32)
    avoiding = np.flatnonzero([bool(rows.avoid[number]) for number in lanes])
    avoid[avoiding] = seen[upto[1] :].reshape(len(avoiding), AVOIDED, seen.shape[1])
    asks = np.asarray([question(requests[items[number].position]) is not None for number in lanes])
    positive, avoid = _shared(positive, avoid, groups[lanes], asks)
    keys = _recognised(known, positive, groups[lanes], avoid, asks, negative, answer, settings)
    return Subjects(model, layer, settings, lanes, rows.prompts, rows.neutral, groups, queries, keys, positions, start)


def _shared(
    positive: np.ndarray, avoid: np.ndarray, groups: np.ndarray, asks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Facts about one subject with one recognition: what their keys see, ``[lanes, rows, d]``, in turn of all of them.

    Their values are trained in each other's presence; a wording that only some of their keys knew would say neither.
    """
    positive, avoid = positive.copy(), avoid.copy()
    same: dict[tuple[int, bool], list[int]] = {}
    for lane, (group, asked) in enumerate(zip(groups.tolist(), asks.tolist(), strict=True)):
        same.setdefault((group, asked), []).append(lane)
    for lanes in same.values():
        if len(lanes) > 1:
            # The bare prompts first, then the contexts of each in turn.
            in_turn = positive[lanes].swapaxes(0, 1).reshape(-1, positive.shape[2])
            positive[lanes] = in_turn[: positive.shape[1]]
            avoid[lanes] = avoid[lanes[0]]
    return positive, avoid


def _previous_queries(previous: PreviousEdits) -> tuple[np.ndarray, np.ndarray]:
    """Queries of earlier edits up to the end of their subjects, and the groups they belong to."""
    ends = np.where(previous.subjects >= 0, previous.subjects + 1, previous.starts)
    firsts = np.cumsum(previous.lengths) - previous.lengths
    index = [np.arange(first, first + end) for first, end in zip(firsts, ends, strict=True)]
    return previous.subject_query[np.concatenate([np.zeros(0, int), *index])], np.repeat(previous.groups, ends)


def _recognised(
    known: ModelMemory, positive: np.ndarray, groups: np.ndarray, avoid: np.ndarray, asks: np.ndarray,
    negative: np.ndarray, answer: np.ndarray, settings: SubjectSettings
) -> Recognised:  # fmt: skip
    """The keys of some subjects, silent on ``negative [rows, d]`` but for rows of their own group.

    ``avoid [lanes, rows, d]`` is not a number for lanes that avoid nothing; ``asks [lanes]`` says which ask a question.
    """
    lanes = len(positive)
    # The subjects' own contexts tell more than the general ones, the more of them there are; even those of one
    # subject tell how its token differs between the start of a text and the middle.
    nuisance = blended(nuisance_scatter(jnp.asarray(positive)), known.nuisance, min(0.9, lanes / 30))
    memory = create_memory(known.query, nuisance, weight=settings.key_nuisance)
    floor = np.where(asks, settings.question_floor, settings.key_floor).astype(np.float32)
    split = np.where(asks, settings.question_split, settings.key_split).astype(np.float32)
    strength = np.where(asks, settings.question_avoidance, settings.key_avoidance).astype(np.float32)
    avoid = np.where(np.isnan(avoid), np.asarray(memory.mean, np.float32), avoid)
    memory = extend(memory, negative, answer, power_of_two(len(negative), 64))
    # Lanes come in few numbers; one that stands in twice is dropped again.
    index = np.minimum(np.arange(power_of_two(lanes)), lanes - 1)
    lanewise = (part[index] for part in (positive, groups, floor, split, avoid, strength))
    keys = _keys(*lanewise, memory, contrast=settings.key_contrast)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:lanes], keys)


def fit_subjects(
    read: Subjects,
    before: Patch,
    wrong: Sequence[bool],
    previous: PreviousEdits,
    progress: Progress | None = None,
    finished: FinishedParts | None = None,
) -> FittedSubjects:
    """A pair of neurons for each request, at its subject; a single one without a plateau.

    Several requests about one subject are fitted one after the other, each in the presence of those before it and held
    to their answers; requests about different subjects do not see each other's values.

    Args:
        read: the subjects.
        before: the neurons that earlier steps put into this layer, ``[n, d]``.
        wrong: which items want a neuron.
        previous: the edits of earlier steps; those of the same subject must go on.
        progress: called with what is being done, how much is done, and how much there is.
        finished: what an interrupted run has fitted already, and where what is fitted is kept.

    Returns:
        The new neurons. A request whose queries cannot be parted from others' gets none.
    """
    model, settings, prompts, groups = read.model, read.settings, read.prompts, read.groups
    fitted = FittedSubjects(jax.tree.map(np.asarray, create(model.config.hidden_size)), [])
    if read.keys is None:
        return fitted
    slot = {number: slot for slot, number in enumerate(read.lanes)}
    going = [number for number in read.lanes if wrong[number] and read.keys.margin[slot[number]] > 0]
    turn = {number: sum(groups[other] == groups[number] for other in going if other < number) for number in going}
    if progress and going:
        progress("training values", 0, len(going))
    for round_ in range(max(turn.values(), default=-1) + 1):
        now = [number for number in going if turn[number] == round_]
        # Of similar lengths together, so that little is padding.
        now.sort(key=lambda number: (len(prompts[number][0].wanted), max(len(row.tokens) for row in prompts[number])))
        there = concatenate([before, fitted.patch]) if before.key.shape[0] else fitted.patch
        present = attach(model, {read.layer: sized(there)}) if there.key.shape[0] else model
        for first in range(0, len(now), settings.value_lanes):
            chunk = now[first : first + settings.value_lanes]
            kept = {
                number: [
                    *(prompts[n][0] for n in read.lanes if groups[n] == groups[number] and turn.get(n, -1) < round_),
                    *_previous_rows(previous, groups[number]),
                ]
                for number in chunk
            }
            new = _kept_chunk(finished, f"values-{round_}-{first}", read, chunk)
            if new is None:
                new = _fit_chunk(read, present, chunk, kept, slot)
                _keep_chunk(finished, f"values-{round_}-{first}", read, chunk, new)
            first_neuron = fitted.patch.key.shape[0]
            neurons = [neuron._replace(neuron=first_neuron + neuron.neuron) for neuron in new.neurons]
            fitted = FittedSubjects(concatenate([fitted.patch, new.patch]), [*fitted.neurons, *neurons])
            if progress:
                progress("training values", len(fitted.neurons) // (2 if settings.plateau else 1), len(going))
    return fitted


def _fit_chunk(
    read: Subjects, present: Model, chunk: Sequence[int], kept: Mapping[int, list[PromptRow]], slot: Mapping[int, int]
) -> FittedSubjects:
    """The neurons of a few requests, whose values are trained together, counted from 0."""
    keys, settings = read.keys, read.settings
    assert keys is not None
    # Lanes come in few numbers too; one that stands in twice is dropped again.
    lanes = [*chunk, *[chunk[-1]] * (power_of_two(len(chunk)) - len(chunk))]
    pick = [slot[number] for number in lanes]
    silent = Patch(keys.key[pick], keys.bias[pick], jnp.zeros_like(keys.key[pick]))
    problem = create_value_problem(
        present, read.model, read.layer, silent, [read.prompts[n] for n in lanes], [kept[n] for n in lanes],
        [read.neutral[n] for n in lanes], settings.plateau, read.start is not None,
    )  # fmt: skip
    start = None if read.start is None else predict_start(read.start, problem, settings.value.longest)
    run = runner(present, read.layer)
    value, info = train_values(problem.targets, problem.neutral, run, problem.scale, settings.value, start)
    each = 2 if settings.plateau else 1
    neurons = []
    for number, lane in enumerate(chunk):
        key_losses = {name: float(loss[slot[lane]]) for name, loss in keys.losses.items()}
        losses = {"l_e": float(info.loss[number]), **key_losses}
        if start is not None:
            losses["said_at_start"] = float(info.at_start[number])
        steps, margin, position = int(info.steps[number]), float(keys.margin[slot[lane]]), read.positions[lane]
        neurons += [SubjectNeuron(position, number * each + n, steps, margin, losses) for n in range(each)]
    new = sharpen(level_patch(silent._replace(value=value), settings.plateau), SHARPNESS)
    return FittedSubjects(take(jax.tree.map(np.asarray, new), np.arange(len(chunk) * each)), neurons)


def _positions(read: Subjects, chunk: Sequence[int]) -> dict[str, Any]:
    return {"requests": [read.positions[number] for number in chunk]}


def _kept_chunk(
    finished: FinishedParts | None, name: str, read: Subjects, chunk: Sequence[int]
) -> FittedSubjects | None:
    """What an interrupted run fitted for some requests."""
    arrays: Any = None if finished is None else finished.load(name, _positions(read, chunk))
    if arrays is None:
        return None
    columns: Any = zip(*(arrays[column].tolist() for column in ("position", "neuron", "steps", "margin")), strict=True)
    losses = {name[5:]: array.tolist() for name, array in arrays.items() if name.startswith("loss_")}
    neurons = [
        SubjectNeuron(position, neuron, steps, margin, {loss: values[number] for loss, values in losses.items()})
        for number, (position, neuron, steps, margin) in enumerate(columns)
    ]
    return FittedSubjects(Patch(*(arrays[part] for part in Patch._fields)), neurons)


def _keep_chunk(
    finished: FinishedParts | None, name: str, read: Subjects, chunk: Sequence[int], new: FittedSubjects
) -> None:
    if finished is None or not new.neurons:
        return
    arrays = {part: np.asarray(array) for part, array in new.patch._asdict().items()}
    for column in ("position", "neuron", "steps", "margin"):
        arrays[column] = np.asarray([getattr(neuron, column) for neuron in new.neurons])
    for loss in new.neurons[0].losses:
        arrays[f"loss_{loss}"] = np.asarray([neuron.losses[loss] for neuron in new.neurons], np.float64)
    finished.save(name, arrays, _positions(read, chunk))


def _previous_rows(previous: PreviousEdits, group: int) -> list[PromptRow]:
    """The bare prompts of earlier edits of one subject."""
    rows = previous.rows
    return [
        PromptRow(
            rows[n],
            int(previous.subjects[n]),
            list(range(previous.starts[n] - 1, previous.lengths[n] - 1)),
            rows[n][previous.starts[n] :],
        )
        for n in np.flatnonzero(previous.groups == group)
    ]
