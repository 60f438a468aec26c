"""Neurons at the subject: an earlier layer, the subject's last token, a value trained through the rest of the network.

A neuron there recognises what a prompt is about, whatever its wording; so it generalizes to rephrasings that end
differently, which one in the last layer does not.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax import ffn
from tpatch_jax.editors.background import Background
from tpatch_jax.editors.reading import Item, subject_token
from tpatch_jax.memory import Memory, create_memory, extend, nuisance_scatter
from tpatch_jax.models import decoder
from tpatch_jax.models.collection import collect
from tpatch_jax.models.model import Model, attach, tokens_array
from tpatch_jax.patch import Patch, concatenate, create, sharpen, take
from tpatch_jax.recipes.staged import Recognised
from tpatch_jax.recipes.through import Asked, ThroughInfo, ThroughSettings, train_values
from tpatch_jax.recipes.whitened import whitened_key
from tpatch_jax.requests import EditRequest
from tpatch_jax.sizes import power_of_two

__all__ = ["SubjectNeuron", "SubjectSettings", "fit_subjects", "subject_layer"]

NEUTRAL = ("{} is a", "{} is known for", "The history of {} began", "People who like {} also like", "{} and")
"""Prompts that ask nothing in particular about a subject: what is said after them should change little."""

SHARPNESS = 256.0
"""``s`` of ``act(s·z)/s``, folded into the patch."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SubjectSettings:
    """Options of the subject site.

    No name stands for another setting of the editor as well, so that each can be given alone on the command line.

    Attributes:
        value: how values are trained.
        key_contexts: in how many contexts a key sees its subject at most; half of them without the rest of the prompt.
        value_contexts: through how many contexts a value is trained, the bare prompt included.
        neutral: on how many neutral prompts about the subject the edited model is kept close to the unedited one.
        key_floor: the lowest threshold of a key, where 0 is the mean query and 1 the subject's own.
        key_split: where the threshold lies between the hardest negative (0) and the edit's own queries (1).
        key_nuisance: how strongly a key avoids directions in which only the context shows.
        value_lanes: how many values are trained together at most.
    """

    value: ThroughSettings = field(default_factory=ThroughSettings)
    key_contexts: int = 6
    value_contexts: int = 4
    neutral: int = 1
    key_floor: float = 0.6
    key_split: float = 0.5
    key_nuisance: float = 0.5
    value_lanes: int = 16


class SubjectNeuron(NamedTuple):
    """What became of one request at this site.

    Attributes:
        position: the request's place in the list.
        neuron: its neuron in the patch that `fit_subjects` returns.
        steps: steps on its value.
        margin: see `tpatch_jax.recipes.lane.FitInfo`.
        losses: the terms of the objective at the end.
    """

    position: int
    neuron: int
    steps: int
    margin: float
    losses: Mapping[str, float]


class _Row(NamedTuple):
    """A text in tokens, where the subject ends in it, and what is asked: places and the tokens wanted there."""

    tokens: list[int]
    subject: int
    places: list[int]
    wanted: list[int]


def subject_layer(layers: int, wanted: str = "auto") -> int:
    """The layer of the subject site: a third of the way up unless one is named.

    Args:
        layers: how many layers the model has.
        wanted: ``"auto"`` or a number.

    Example:
        >>> subject_layer(30), subject_layer(30, "4")
        (10, 4)
    """
    return round(layers / 3) if wanted == "auto" else int(wanted)


def group_of(subject: str) -> int:
    """A number for a subject: queries of one subject are no negatives of each other."""
    return zlib.crc32(subject.encode()) & 0x7FFFFFFF


def _prompt_row(model: Model, request: EditRequest, item: Item, context: int) -> _Row:
    subject, text = request.subject or "", item.texts[context]
    # Searched within the prompt, which is what the text ends with: a prefix may name the subject as well.
    end = len(text) - len(request.prompt) + request.prompt.index(subject) + len(subject)
    start = item.starts[context]
    return _Row(
        item.rows[context],
        subject_token(model, text, end),
        list(range(start - 1, start - 1 + len(item.target))),
        item.target,
    )


def _subject_rows(model: Model, subject: str, texts: Sequence[str]) -> list[_Row]:
    rows = []
    for text in texts:
        whole = text.format(subject)
        tokens = model.encode_prompt(whole)
        rows.append(_Row(tokens, subject_token(model, whole, text.index("{}") + len(subject)), [len(tokens) - 1], []))
    return rows


def _memory(
    model: Model, known: Background, layer: int, rows: Sequence[Sequence[_Row]], groups: np.ndarray,
    earlier: tuple[Array, Array], settings: SubjectSettings, report: Callable[[int], None] | None
) -> tuple[Array, Memory]:  # fmt: skip
    """Every subject's own queries, ``[lanes, contexts, d]``, and what its key must stay silent on."""
    # Nothing after the subject reaches its query. Of the bare prompt every token up to it is a negative of the others.
    cut = [row.tokens[: row.subject + 1] for own in rows for row in own]
    contexts = len(rows[0])
    places = [range(len(row)) if number % contexts == 0 else [len(row) - 1] for number, row in enumerate(cut)]
    sites = collect(model, cut, places, layer, report).query
    ends = np.cumsum([len(place) for place in places]) - 1
    own = sites[ends].reshape(len(rows), contexts, -1).astype(jnp.float32)
    lane = np.repeat(
        np.arange(len(rows)), [sum(map(len, places[n * contexts : (n + 1) * contexts])) for n in range(len(rows))]
    )
    nuisance = nuisance_scatter(own) if len(rows) > 1 else known.nuisance
    share = min(0.9, len(rows) / 30)
    nuisance = share * nuisance / jnp.trace(nuisance) + (1 - share) * known.nuisance / jnp.trace(known.nuisance)
    memory = create_memory(known.query, nuisance, weight=settings.key_nuisance)
    query = jnp.concatenate([earlier[0].astype(jnp.float32), sites.astype(jnp.float32)])
    answer = jnp.concatenate([earlier[1], jnp.asarray(groups[lane])])
    return own, extend(memory, query, answer, power_of_two(query.shape[0], 64))


@jax.jit
def _keys(query: Array, groups: Array, memory: Memory, floor: float, split: float) -> Recognised:
    # One lane at a time: the memory's responses to many keys at once would be the largest array of all.
    return jax.lax.map(lambda lane: whitened_key(lane[0], lane[1], memory, floor, split), (query, groups))


def _forked(model: Model, rows: Sequence[_Row], layer: int, places: int) -> tuple[decoder.Fork, Array]:
    length = -(-max(len(row.tokens) for row in rows) // 8) * 8
    span = power_of_two(max(len(row.tokens) - row.subject for row in rows), 4)
    first = jnp.asarray([row.subject for row in rows], jnp.int32)
    forked = decoder.fork(
        model.config, model.params, tokens_array([row.tokens for row in rows], length), layer, first, span
    )
    table = np.zeros((len(rows), places), np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row.places)] = np.asarray(row.places) - row.subject
    return forked, jnp.asarray(table)


def _runner(model: Model, layer: int) -> Callable[[tuple[tuple, Array], Array], Array]:
    config, params = model.config, model.params

    def run(rows: tuple[tuple, Array], added: Array) -> Array:
        forked, places = decoder.Fork(*rows[0], layer=layer), rows[1]
        output = forked.output.at[:, 0].add(added.astype(forked.output.dtype))
        end = decoder.resume_fork(config, params, forked, output)
        end = jnp.take_along_axis(end, places[..., None], 1)
        return jax.nn.log_softmax(decoder.logits(config, params, end))

    return run


def _activity(model: Model, patch: Patch, forked: decoder.Fork, sharpness: float) -> Array:
    """How strongly each lane's neuron fires at the subject in each of its rows, ``[lanes, rows]``."""
    query = forked.query[:, 0].reshape(patch.key.shape[0], -1, patch.key.shape[1]).astype(jnp.float32)
    z = jnp.einsum("nrd,nd->nr", query, patch.key) + patch.bias[:, None]
    return ffn.ACTIVATIONS[model.config.activation](z * sharpness) / sharpness


def _values(
    model: Model, unedited: Model, layer: int, patch: Patch, prompts: Sequence[list[_Row]], kept: Sequence[list[_Row]],
    neutral: Sequence[list[_Row]], settings: SubjectSettings
) -> tuple[Array, ThroughInfo]:  # fmt: skip
    """The values of one chunk of lanes. ``kept`` are prompts of earlier edits of the same subject, which must go on."""
    lanes, most = len(prompts), max((len(rows) for rows in kept), default=0)
    # A lane without that many repeats its own bare prompt, which then counts for nothing.
    rows = [[*own, *also, *[own[0]] * (most - len(also))] for own, also in zip(prompts, kept, strict=True)]
    each, count = len(rows[0]), power_of_two(max(len(row.wanted) for own in rows for row in own))
    wanted, weight = np.zeros((lanes, each, count), np.int32), np.zeros((lanes, each, count), np.float32)
    for lane, own in enumerate(rows):
        for number, row in enumerate(own[: len(prompts[lane]) + len(kept[lane])]):
            wanted[lane, number, : len(row.wanted)] = row.wanted
            group = len(prompts[lane]) if number < len(prompts[lane]) else 1
            weight[lane, number, : len(row.wanted)] = 1 / (group * len(row.wanted))
    forked, places = _forked(model, [row for own in rows for row in own], layer, count)
    run = _runner(model, layer)
    targets = Asked(
        (tuple(forked[:-1]), places),
        _activity(model, patch, forked, SHARPNESS),
        jnp.asarray(wanted),
        jnp.asarray(weight),
    )
    scale = jnp.linalg.norm(forked.output[:, 0].astype(jnp.float32), axis=-1).reshape(lanes, each)[:, 0]
    close = None
    if settings.neutral:
        flat = [row for own in neutral for row in own]
        beside, places = _forked(model, flat, layer, 1)
        before = beside if model is unedited else _forked(unedited, flat, layer, 1)[0]
        silent = jnp.zeros((len(flat), patch.key.shape[1]), jnp.float32)
        reference = _runner(unedited, layer)((tuple(before[:-1]), places), silent).reshape(
            lanes, settings.neutral, 1, -1
        )
        share = jnp.full((lanes, settings.neutral, 1), 1 / settings.neutral)
        close = Asked((tuple(beside[:-1]), places), _activity(model, patch, beside, SHARPNESS), reference, share)
    return train_values(targets, close, run, scale, settings.value)


def fit_subjects(
    model: Model, deep: Patch, layer: int, known: Background, items: Sequence[Item], requests: Sequence[EditRequest],
    earlier: tuple[Array, Array], settings: SubjectSettings, progress: Progress | None = None
) -> tuple[Patch, list[SubjectNeuron]]:  # fmt: skip
    """One neuron for each request, at its subject.

    Several requests about one subject are fitted one after the other, each in the presence of those before it and held
    to their answers; requests about different subjects do not see each other's values.

    Args:
        model: the model without any patch.
        deep: the neurons that earlier steps put into this layer.
        layer: the layer.
        known: what is known about the unedited model at this layer.
        items: the requests in tokens.
        requests: all requests, by ``Item.position``; those of ``items`` have a subject.
        earlier: queries of earlier edits at this layer, ``[rows, d]``, and the groups of their subjects, ``[rows]``.
        settings: options.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The new neurons, ``[n, d]``, which name their layer, and what became of each request. A request whose queries
        cannot be parted from others' gets none.
    """
    subjects = [requests[item.position].subject or "" for item in items]
    groups = np.asarray([group_of(subject) for subject in subjects], np.int32)
    prompts = [
        [_prompt_row(model, requests[i.position], i, c) for c in range(min(settings.value_contexts, len(i.texts)))]
        for i in items
    ]
    # At the very start of a text, too, where a subject looks different from anywhere else.
    alone = ["{}", *(f"{prefix} {{}}" for prefix in known.prefixes[settings.value_contexts :])][
        : settings.key_contexts // 2
    ]
    seen = [own + _subject_rows(model, subject, alone) for own, subject in zip(prompts, subjects, strict=True)]
    report = (lambda done: progress("reading subjects", done, len(seen) * len(seen[0]))) if progress else None
    own, memory = _memory(model, known, layer, seen, groups, earlier, settings, report)
    size = power_of_two(len(items))
    padded = (jnp.pad(own, ((0, size - len(items)), (0, 0), (0, 0)), mode="edge"), jnp.asarray(np.resize(groups, size)))
    found = jax.tree.map(
        lambda leaf: leaf[: len(items)], _keys(*padded, memory, settings.key_floor, settings.key_split)
    )
    parted = np.flatnonzero(np.asarray(found.margin) > 0).tolist()
    neutral = [_subject_rows(model, subject, NEUTRAL[: settings.neutral]) for subject in subjects]

    result, neurons, done = create(model.config.width, 0), [], 0
    result = result._replace(layer=jnp.zeros(0, jnp.int32))
    turn = [int(np.sum(groups[:number] == group)) for number, group in enumerate(groups)]
    for round_ in range(max(turn, default=-1) + 1):
        now = [lane for lane in parted if turn[lane] == round_]
        # Of similar lengths together, so that little is padding.
        now.sort(key=lambda lane: (len(items[lane].target), max(len(row.tokens) for row in prompts[lane])))
        there = concatenate([deep, result]) if deep.key.shape[0] else result
        present = attach(model, there) if there.key.shape[0] else model
        fresh: list[Patch] = []
        for first in range(0, len(now), settings.value_lanes):
            chunk = now[first : first + settings.value_lanes]
            # Lanes come in few numbers too; one that stands in twice is dropped again.
            lanes = [*chunk, *[chunk[-1]] * (power_of_two(len(chunk)) - len(chunk))]
            pick = np.asarray(lanes)
            silent = Patch(found.key[pick], found.bias[pick], jnp.zeros_like(found.key[pick]))
            kept = [[prompts[n][0] for n in range(lane) if groups[n] == groups[lane] and n in parted] for lane in lanes]
            value, info = _values(
                present, model, layer, silent, [prompts[n] for n in lanes],
                kept, [neutral[n] for n in lanes], settings,
            )  # fmt: skip
            for number, lane in enumerate(chunk):
                losses = {
                    "l_e": float(info.loss[number]),
                    **{name: float(loss[lane]) for name, loss in found.losses.items()},
                }
                neuron = result.key.shape[0] + sum(part.key.shape[0] for part in fresh) + number
                steps, margin = int(info.steps[number]), float(found.margin[lane])
                neurons.append(SubjectNeuron(items[lane].position, neuron, steps, margin, losses))
            fitted = sharpen(silent._replace(value=value), SHARPNESS)
            where = jnp.full(len(chunk), layer, jnp.int32)
            fresh.append(take(fitted, np.arange(len(chunk)))._replace(layer=where))
            done += len(chunk)
            if progress:
                progress("training values", done, len(parted))
        result = concatenate([result, *fresh])
    return result, neurons
