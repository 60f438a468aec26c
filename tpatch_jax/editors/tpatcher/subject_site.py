"""Neurons at the subject: an earlier layer, the subject's last token, a value trained through the rest of the network.

A neuron there recognises what a prompt is about, whatever its wording; so it generalizes to rephrasings that end
differently, which one in the last layer does not.
"""

import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from tpatch_jax.core.devices import divided, host, mesh_of, parts, repeat
from tpatch_jax.core.int8 import float_type
from tpatch_jax.core.memory import Memory, blended, create_memory, extend, nuisance_scatter
from tpatch_jax.core.patch import Patch, concatenate, create, join, sharpen, sized
from tpatch_jax.core.products import is_bfloat16_faster, rounds_products
from tpatch_jax.core.recipes.staged import Recognised
from tpatch_jax.core.recipes.whitened import whitened_key
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.core.start import StartParams
from tpatch_jax.core.values import train_values
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.reading import Item
from tpatch_jax.editors.subject_rows import PromptRow, read_queries, rounded_around, runner
from tpatch_jax.editors.tpatcher.previous import NO_SUBJECT, PreviousEdits
from tpatch_jax.editors.tpatcher.subject_prompts import AVOIDED, read_subject_rows
from tpatch_jax.editors.tpatcher.subject_settings import SubjectSettings
from tpatch_jax.editors.tpatcher.subject_values import SHARPNESS, create_value_problem, level_patch, predict_start
from tpatch_jax.editors.wordings import question
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.finished_parts import FinishedParts
from tpatch_jax.typing import Params, Progress

__all__ = [
    "FittedSubjects",
    "SubjectNeuron",
    "Subjects",
    "fit_keys",
    "fit_subjects",
    "lanes_together",
    "read_subjects",
    "subject_layer",
]

ON_A_CPU, ELSEWHERE = 2, 8
"""So many values are trained together by default: one alone fills a CPU's products, an accelerator takes more."""

KEYS = 16
"""So many keys are fitted together at most."""

SILENT = -1.0
"""The bias of a key that is none."""


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


@partial(jax.jit, static_argnames="rounds")
def fit_keys(
    query: Array, groups: Array, floor: Array, split: Array, avoid: Array, strength: Array, aside: Array,
    memory: Memory, rounds: int
) -> Recognised:  # fmt: skip
    """Keys and biases of all lanes, in one compiled program."""

    def key(lane: tuple[Array, ...]) -> Recognised:
        positive, group, low, share, away, weight, above = lane
        return whitened_key(positive, group, memory, low, share, away, weight, rounds, above)

    # A few lanes at a time: the memory's responses to many keys at once would be the largest array of all.
    return jax.lax.map(key, (query, groups, floor, split, avoid, strength, aside), batch_size=min(KEYS, len(query)))


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
        keys: the lanes' keys, then those for other spellings of their subjects.
        spelt: of each of the latter its lane, as a place in ``lanes``.
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
    spelt: tuple[int, ...] = ()

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
    rows = read_subject_rows(model, known, items, requests, lanes, settings)
    positions = [item.position for item in items]

    spelt = [place for place, number in enumerate(lanes) for _ in rows.spellings[number]]
    # Of each item its bare prompt and target; then, up to the subject, contexts, what to avoid, and other spellings.
    texts = []
    for number, item in enumerate(items):
        parts = [rows.contexts, rows.avoid] if number in rows.contexts else []
        beside = [row for part in parts for row in part[number]]
        beside += [row for sights in rows.spellings.get(number, []) for row in sights]
        # Nothing after the subject reaches its query.
        upto = [(row.tokens[: row.subject + 1], [row.subject]) for row in beside]
        texts.append([(item.rows[0], range(len(item.rows[0]))), *upto])
    report = (lambda done: progress("reading subjects", done, len(texts))) if progress else None
    seen = read_queries(model, texts, layer, report)
    queries = [each[: len(item.rows[0])] for each, item in zip(seen, items, strict=True)]
    if not lanes:
        return Subjects(
            model, layer, settings, lanes, rows.prompts, rows.neutral, groups, queries, None, positions, start
        )

    hidden_size = model.config.hidden_size
    counts = [(len(rows.contexts[number]), len(rows.avoid[number])) for number in lanes]
    apart = [
        np.split(seen[number][len(items[number].rows[0]) :], np.cumsum(count))
        for number, count in zip(lanes, counts, strict=True)
    ]
    contexts = np.stack([context for context, _, _ in apart])
    bare = np.stack([queries[number][rows.prompts[number][0].subject] for number in lanes])
    positive = np.concatenate([bare[:, None], contexts], 1).astype(np.float32)
    # Of the prompts every token up to the subject is a negative of the others.
    ends = [
        rows.prompts[number][0].subject + 1 if number in rows.prompts else item.starts[0]
        for number, item in enumerate(items)
    ]
    part = np.concatenate([query[:end] for query, end in zip(queries, ends, strict=True)])
    before, owner = _previous_queries(previous)
    otherwise = np.concatenate([other for _, _, other in apart]).astype(np.float32)
    otherwise = otherwise.reshape(len(spelt), positive.shape[1], hidden_size)
    of = groups[lanes][spelt]
    negative = np.concatenate([before, part, *(rows.reshape(-1, hidden_size) for rows in (contexts, otherwise))])
    answer = np.concatenate(
        [owner, np.repeat(groups, ends), np.repeat(groups[lanes], contexts.shape[1]), np.repeat(of, positive.shape[1])]
    )
    avoid = np.full((len(lanes), AVOIDED, hidden_size), np.nan, np.float32)
    for lane, (_, away, _) in enumerate(apart):
        if len(away):
            avoid[lane] = away
    asks = np.asarray([question(requests[items[number].position]) is not None for number in lanes])
    positive, avoid = _shared(positive, avoid, groups[lanes], asks)
    # Another spelling is one more lane: its key stands beside the first and bears the same value.
    positive = np.concatenate([positive, otherwise])
    avoid = np.concatenate([avoid, avoid[spelt]])
    asks, of = np.concatenate([asks, asks[spelt]]), np.concatenate([groups[lanes], of])
    many = len(lanes) + int((previous.subjects >= 0).sum()) >= settings.key_raise_from
    keys = _recognised(
        known, positive, of, avoid, asks, negative, answer, settings, len(spelt), mesh_of(model.params), many
    )
    return Subjects(
        model, layer, settings, lanes, rows.prompts, rows.neutral, groups, queries, keys, positions, start,
        _unheard(keys, otherwise, spelt, settings.plateau),
    )  # fmt: skip


def _unheard(keys: Recognised, otherwise: np.ndarray, spelt: Sequence[int], plateau: float) -> tuple[int, ...]:
    """The lane of each other spelling, ``otherwise [spellings, rows, d]``; -1 where the first key knows it as well."""
    lanes = list(spelt)
    z = np.einsum("sd,sd->s", otherwise[:, 0], keys.key[lanes]) + keys.bias[lanes]
    return tuple(lane if weak else -1 for lane, weak in zip(lanes, (z <= plateau / 2).tolist(), strict=True))


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
    negative: np.ndarray, answer: np.ndarray, settings: SubjectSettings, spelt: int = 0, mesh: Mesh | None = None,
    many: bool = False,
) -> Recognised:  # fmt: skip
    """The keys of some subjects, silent on ``negative [rows, d]`` but for rows of their own group.

    ``avoid [lanes, rows, d]`` is not a number for lanes that avoid nothing; ``asks [lanes]`` says which ask a question.
    The last ``spelt`` are other spellings; ``many`` says whether they are of one edit among many.
    """
    lanes = len(positive)
    # The subjects' own contexts tell more than the general ones, the more of them there are; even those of one
    # subject tell how its token differs between the start of a text and the middle.
    nuisance = blended(nuisance_scatter(jax.device_put(positive)), known.nuisance, min(0.9, lanes / 30))
    memory = create_memory(known.query, nuisance, weight=settings.key_nuisance)
    floor = np.where(asks, settings.question_floor, settings.key_floor).astype(np.float32)
    floor[lanes - spelt :] = np.maximum(floor[lanes - spelt :], settings.spelling_floor)
    split = np.where(asks, settings.question_split, settings.key_split).astype(np.float32)
    if many:
        floor, split = (part + np.float32(settings.key_raise) * (1 - part) for part in (floor, split))
    strength = np.where(asks, settings.question_avoidance, settings.key_avoidance).astype(np.float32)
    # Of a statement's look-alikes the threshold knows nothing: they are drawn up, and none may ever be met.
    aside = np.where(asks, settings.question_aside, 0.0).astype(np.float32)
    avoid = np.where(np.isnan(avoid), np.asarray(memory.mean, np.float32), avoid)
    memory = extend(memory, negative, answer, power_of_two(len(negative), 64))
    # Lanes come in few numbers; one that stands in twice is dropped again.
    index = np.minimum(np.arange(power_of_two(lanes)), lanes - 1)
    # A few lanes after the other, each asking all parts of the memory's rows.
    lanewise = repeat([part[index] for part in (positive, groups, floor, split, avoid, strength, aside)], mesh)
    keys = fit_keys(*lanewise, divided(memory, mesh), rounds=settings.key_rounds)
    return jax.tree.map(lambda leaf: host(leaf)[:lanes], keys)


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
    rounds = rounds_products(
        settings.value_precision, model.config.hidden_size, float_type(model.params), is_bfloat16_faster()
    )
    # No other layer reads this one's FFN: with whatever neurons in it they are the same.
    rounded = rounded_around(model, read.layer) if rounds and going else None
    # On each part of a mesh, so that more of them train more at a time.
    lanes = settings.value_lanes or (ON_A_CPU if jax.default_backend() == "cpu" else ELSEWHERE)
    lanes *= parts(mesh_of(model.params))
    done = 0
    for round_ in range(max(turn.values(), default=-1) + 1):
        now = [number for number in going if turn[number] == round_]
        # Of similar lengths together, so that little is padding.
        now.sort(key=lambda number: (len(prompts[number][0].wanted), max(len(row.tokens) for row in prompts[number])))
        there = concatenate([before, fitted.patch]) if before.key.shape[0] else fitted.patch
        present = attach(model, {read.layer: sized(there)}) if there.key.shape[0] else model
        for first in range(0, len(now), lanes):
            chunk = now[first : first + lanes]
            kept = {
                number: [
                    *(prompts[n][0] for n in read.lanes if groups[n] == groups[number] and turn.get(n, -1) < round_),
                    *_previous_rows(previous, groups[number]),
                ]
                for number in chunk
            }
            new = _kept_chunk(finished, f"values-{round_}-{first}", read, chunk)
            if new is None:
                new = _fit_chunk(read, present, rounded, chunk, kept, slot)
                _keep_chunk(finished, f"values-{round_}-{first}", read, chunk, new)
            first_neuron = fitted.patch.key.shape[0]
            neurons = [neuron._replace(neuron=first_neuron + neuron.neuron) for neuron in new.neurons]
            fitted = FittedSubjects(concatenate([fitted.patch, new.patch]), [*fitted.neurons, *neurons])
            done += len(chunk)
            if progress:
                progress("training values", done, len(going))
    return fitted


def _fit_chunk(
    read: Subjects, present: Model, rounded: Params | None, chunk: Sequence[int],
    kept: Mapping[int, list[PromptRow]], slot: Mapping[int, int],
) -> FittedSubjects:  # fmt: skip
    """The neurons of a few requests, whose values are trained together, counted from 0."""
    keys, settings = read.keys, read.settings
    assert keys is not None
    # Lanes come in few numbers too; one that stands in twice is dropped again.
    mesh = mesh_of(read.model.params)
    lanes = [*chunk, *[chunk[-1]] * (lanes_together(len(chunk), parts(mesh)) - len(chunk))]
    silent, there = _keys_of(read, [slot[number] for number in lanes])
    problem = create_value_problem(
        present, read.model, read.layer, silent, [read.prompts[n] for n in lanes], [kept[n] for n in lanes],
        [read.neutral[n] for n in lanes], settings.plateau, read.start is not None, rounded,
    )  # fmt: skip
    start = jax.device_put(np.zeros(silent.key.shape[::2], np.float32))
    if read.start is not None:
        start = predict_start(read.start, problem, settings.value.longest)
    run, rows = runner(present, read.layer, rounded=rounded), (problem.known, problem.targets, problem.kept)
    value, info = train_values(*rows, run, problem.scale, settings.value, start, mesh)
    neurons, order = [], []
    every = sharpen(_level_neurons(silent, value, settings.plateau), SHARPNESS)
    each = every.key.shape[0] // there.size
    for number, lane in enumerate(chunk):
        key_losses = {name: float(loss[slot[lane]]) for name, loss in keys.losses.items()}
        losses = {"l_e": float(info.loss[number]), **key_losses}
        if read.start is not None:
            losses["said_at_start"] = float(info.at_start[number])
        steps, margin, position = int(info.steps[number]), float(keys.margin[slot[lane]]), read.positions[lane]
        for place in number * there.shape[1] + np.flatnonzero(there[number]):
            order += range(place * each, (place + 1) * each)
        neurons += [
            SubjectNeuron(position, neuron, steps, margin, losses) for neuron in range(len(neurons), len(order))
        ]
    new = jax.tree.map(lambda leaf: leaf[order], every)
    return FittedSubjects(new, neurons)


def lanes_together(count: int, over: int) -> int:
    """In how many lanes so many values are trained together: a power of two on each part of a mesh.

    Args:
        count: how many values.
        over: how many parts the mesh has.

    Example:
        >>> lanes_together(5, 1), lanes_together(5, 4), lanes_together(1, 6)
        (8, 8, 6)
    """
    return over * power_of_two(-(-count // over))


def _keys_of(read: Subjects, slots: Sequence[int]) -> tuple[Patch, np.ndarray]:
    """The keys of some lanes with no value yet, ``[lanes, keys, d]``, and which are there, ``[lanes, keys]``.

    The first key of each comes first, then those for other spellings of its subject.
    """
    keys = read.keys
    assert keys is not None
    also = {slot: [] for slot in slots}
    for number, lane in enumerate(read.spelt, len(read.lanes)):
        if lane in also and keys.margin[number] > 0:
            also[lane].append(number)
    most = 1 + max(map(len, also.values()))
    pick = np.asarray([[slot, *also[slot], *[-1] * (most - 1 - len(also[slot]))] for slot in slots])
    there = pick >= 0
    key = np.where(there[..., None], keys.key[pick], 0.0).astype(keys.key.dtype)
    bias = np.where(there, keys.bias[pick], SILENT).astype(keys.bias.dtype)
    return Patch(*map(jax.device_put, (key, bias, np.zeros_like(key)))), there


def _level_neurons(keys: Patch, value: Array, plateau: float) -> Patch:
    """The neurons of all lanes one after the other, on the host: each key of a lane bears its value."""
    every = keys._replace(value=np.broadcast_to(np.asarray(value)[:, None], keys.key.shape))
    return jax.tree.map(np.asarray, level_patch(join(jax.tree.map(np.asarray, every)), plateau))


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
