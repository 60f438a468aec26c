"""What an editor knows about a classifier or an encoder-decoder before any edit: queries where it answers."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.audio import AudioPrompt
from tpatch_jax.core.memory import nuisance_scatter
from tpatch_jax.editors.rewordings import learn_rewordings, named
from tpatch_jax.models import networks
from tpatch_jax.models.collection import Sites, collect, predicted, real, single_rows
from tpatch_jax.models.inputs import audio_contexts, image_contexts, input_contexts
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import ASK

__all__ = ["collect_inputs"]

QUERIES = 40_000
"""So many of their queries are kept at most: the paper's memory."""
OTHERS, IMAGE_OTHERS = 8, 64
"""So many other inputs are kept by name; of images that is in how many contexts one may be seen."""
COPIES = 2
"""So many changed copies of each picture are in the memory as well."""
GROUPS = 512
CONTEXTS = 6
PLACES = 3

PAIRS, MOST_PAIRS = 64, 4096
"""So many rephrasings must be found in the memory to learn from them, and at most so many are looked at."""

RECORDINGS, SHAPES = 6, 3
"""Of sound so many recordings tell how queries move, each in so many forms."""

_NAME = re.compile(r"(?:(?<=[a-z,] )|^)[A-Z][a-z]+(?: [A-Z][a-z]+)+")


def _places(model: Model, row: Sequence[int]) -> range:
    """Where in a row the model's answer is decided, token by token."""
    start = row.index(ASK) + (len(model.begin) if model.config.encoder else 0)
    return range(start, max(start + 1, len(row) - 1))


def collect_inputs(
    model: Model,
    layer: int,
    rows: list[list[int]],
    inputs: Sequence[str],
    report: Callable[[int], None] | None = None,
) -> tuple[Array, Array, tuple[str, ...], tuple[str, ...], Array | None, Array | None, dict[str, tuple[str, ...]]]:
    """The fields of a `tpatch_jax.editors.model_memory.ModelMemory`.

    Args:
        model: a classifier or an encoder-decoder.
        layer: the edited layer.
        rows: from `tpatch_jax.models.memory_text.memory_rows`.
        inputs: the inputs as texts; names and other inputs are taken from them.
        report: called with the number of rows done.
    """
    image, given = model.config.image, rows
    if image is not None:
        # Pictures that nobody has seen lie among changed ones as often as among those of the memory.
        copies = min(COPIES, max(0, QUERIES // len(rows) - 1))
        rows = [*rows, *(changed for row in rows for changed in image_contexts(image, row, copies))]
    places = [_places(model, row) for row in rows]
    sites = collect(model, rows, places, layer, report)
    most = OTHERS if image is None else IMAGE_OTHERS
    others = tuple(inputs[:: max(1, len(inputs) // most)][:most])
    # What was asked and what is answered; a classifier's few labels do not tell which inputs say the same.
    texts = model.config.encoder is not None and model.audio is None
    facts = [(model.decode(row[: row.index(ASK)]), str(row[row.index(ASK) :])) for row in rows if texts]
    if networks.pointwise(model.config):
        query, nuisance = sites.query, _between_rephrasings(facts, places, sites.query)
        if model.audio is not None:
            nuisance = _between_recordings(model, layer, rows, inputs)
        if nuisance is None:
            nuisance = _nuisance(model, layer, given[:GROUPS], others)
    else:
        # Tokens of one text differ in what they are; what they share is what the text says.
        query, shortest = single_rows(sites)[0], int(real(sites).sum(1).min())
        nuisance = nuisance_scatter(jax.device_put(sites.query[:GROUPS, :shortest]))
    kept = np.sort(np.random.default_rng(1).permutation(len(query))[:QUERIES])
    names = dict.fromkeys(name for text in inputs for name in _NAME.findall(text))
    centres = _centres(model, sites) if model.config.labels else None
    answers = None
    if model.config.encoder:
        said = [
            row[place + 1] if place + 1 < len(row) else ASK
            for row, decided in zip(rows, places, strict=True)
            for place in decided
        ]
        answers = jnp.asarray(np.asarray(said, np.int32)[kept])
    if image is not None:
        # Pictures are many and labels few: a neuron may fire where its label is said anyway.
        answers = jnp.asarray(predicted(model, sites)[single_rows(sites)[1]][kept], jnp.int32)
    rewordings = learn_rewordings(facts)
    return jnp.asarray(query[kept], jnp.float32), nuisance, others, tuple(names)[:200], centres, answers, rewordings


def _between_rephrasings(facts: Sequence[tuple[str, str]], places: Sequence[range], query: np.ndarray) -> Array | None:
    """How queries move between inputs that name the same thing and get the same answer: rephrasings of each other.

    A memory with few of them tells no such thing.
    """
    starts = np.cumsum([0, *map(len, places)])
    groups: dict[tuple[str, str], list[int]] = {}
    for number, (text, answer) in enumerate(facts):
        if name := named(text):
            groups.setdefault((name, answer), []).append(number)
    pairs = [pair for group in groups.values() for pair in pairwise(group)]
    if len(pairs) < PAIRS:
        return None
    spans = [[np.arange(starts[number], starts[number + 1]) for number in pair] for pair in pairs[:MOST_PAIRS]]
    chosen = np.concatenate([np.stack(span, 1) for span in spans])
    return nuisance_scatter(jax.device_put(query[chosen]))


def _between_recordings(model: Model, layer: int, rows: Sequence[Sequence[int]], inputs: Sequence[str]) -> Array:
    """How queries move when a recording is faster, slower, fainter or noisy, and the same is said."""
    answers = {tuple(row[: row.index(ASK)]): list(row[row.index(ASK) :])[1 + len(model.begin) :] for row in rows}
    groups: list[np.ndarray] = []
    for text in inputs[:: max(1, len(inputs) // RECORDINGS)][:RECORDINGS]:
        assert isinstance(text, AudioPrompt)
        plain = model.encode_prompt(text)
        answer = answers[tuple(plain[: plain.index(ASK)])]
        shapes = [plain, *map(model.encode_prompt, audio_contexts(text, SHAPES - 1))]
        spans = [[*shape, *answer] for shape in shapes]
        query = collect(model, spans, [_places(model, span) for span in spans], layer).query
        groups.append(query.reshape(SHAPES, -1, query.shape[-1]).swapaxes(0, 1))
    return nuisance_scatter(jax.device_put(np.concatenate(groups)))


def _nuisance(model: Model, layer: int, rows: Sequence[Sequence[int]], others: tuple[str, ...]) -> Array:
    """How queries move when an input is said otherwise and answered alike."""
    spans, places = [], []
    image = model.config.image
    if image is not None:
        spans = [shape for row in rows for shape in (row, *image_contexts(image, row, CONTEXTS - 1))]
        places, rows = [_places(model, span) for span in spans], ()
    for row in rows:
        text = model.decode(row[: row.index(ASK)])
        answer = row[row.index(ASK) + 1 + len(model.begin) :] if model.config.encoder else []
        different = tuple(other for other in others if other != text)
        prompts = [model.encode_prompt(shape) for shape in (text, *input_contexts(text, different, CONTEXTS - 1))]
        if not any(model.excess(prompt, answer) for prompt in prompts):
            spans += [[*prompt, *answer] for prompt in prompts]
            places += [_places(model, span)[:PLACES] for span in spans[-CONTEXTS:]]
    if not spans:
        return jnp.eye(model.config.hidden_size)
    query, groups, first = collect(model, spans, places, layer).query, [], 0
    for number in range(0, len(spans), CONTEXTS):
        size = len(places[number])
        part = query[first : first + CONTEXTS * size].reshape(CONTEXTS, size, -1)
        groups.append(part.swapaxes(0, 1))
        first += CONTEXTS * size
    return nuisance_scatter(jax.device_put(np.concatenate(groups)))


def _centres(model: Model, sites: Sites) -> Array:
    """What stands before the last norm, mean of each label, weighted by how probable it is: ``[labels, d]``."""
    before = np.asarray(sites.residual + sites.output, np.float32)
    weights, share = networks.final_weights(model.config, model.params), []
    for first in range(0, len(before), 1024):
        residual, output = (jax.device_put(array[first : first + 1024]) for array in (sites.residual, sites.output))
        logits = networks.finish(model.config, weights, {"residual": residual}, output)
        share.append(np.asarray(jax.nn.softmax(logits, -1)))
    probable = np.concatenate(share)
    if before.ndim == 3:
        there = real(sites)[..., None]
        before = (before * there).sum(1) / there.sum(1)
    return jax.device_put(probable.T @ before / probable.sum(0)[:, None])
