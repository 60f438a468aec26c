"""The last layer as a site: what one pass over the prompts gives, and what each patch is fitted on.

The last FFN's input does not depend on a patch there, and it acts on each position alone; so everything that training
needs is collected once.
"""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tpatch_jax.core.checks import text_generator
from tpatch_jax.core.devices import host
from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.fit import FitProblem
from tpatch_jax.core.memory import (
    NO_ANSWER,
    Memory,
    blended,
    create_memory,
    extend,
    matmul_precision,
    nuisance_scatter,
)
from tpatch_jax.core.patch import Patch, contribution, sized
from tpatch_jax.core.positive import solve_positive
from tpatch_jax.core.sizes import FEW, in_blocks, round_up
from tpatch_jax.editors.locating import replace_subject
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.reading import Item, swapped_prompts
from tpatch_jax.editors.tpatcher.previous import PreviousEdits
from tpatch_jax.editors.tpatcher.rounds import TargetTokens
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
from tpatch_jax.models import networks
from tpatch_jax.models.collection import (
    LEAST_TEXT,
    NEURONS,
    Sites,
    batches,
    collect,
    pad_rows,
    predicted,
    real,
    single_rows,
)
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.derived import derive_once
from tpatch_jax.models.encoder_states import forget_states
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.memory_text import keep_folder, memory_folder
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.rows_on_disk import RowsOnDisk, chosen_rows
from tpatch_jax.typing import Progress

__all__ = [
    "collect_bare",
    "collect_inner",
    "collect_items",
    "create_problems",
    "find_subject_negatives",
    "forward_seconds",
    "head_of",
    "last_memory",
    "moment",
    "prepare_starts",
    "start_values",
]


LEAST_ROWS, BLOCK = 1024, 4096
"""Edits' queries take so many rows of a memory at least, few beside the others, so that fits of few edits are one
program; more than a block are taken in blocks."""

INNER_ROWS = 8192
"""So many queries inside prompts are negatives at most."""

CONTEXT_ROWS = 4096
"""So many queries of other edits behind their contexts are negatives at most; those of all bare prompts are."""

MOMENT = "moment.safetensors"

SCATTERED = 16
"""Groups of queries whose scatter is taken at a time, where they are few."""

LOUDEST = 8.0
"""A value's scale is at most so many times the unedited residual stream's length."""


def collect_items(model: Model, items: Sequence[Item], prefixes: Sequence[str], progress: Progress | None) -> Sites:
    """Every prompt in every context, once: the rows that `tpatch_jax.editors.tpatcher.rounds.TargetTokens` numbers.

    The prefixes are those behind which a decoder sees the prompts.
    """
    rows = [row for item in items for row in item.rows]
    places = [item.places(context) for item in items for context in range(len(item.rows))]
    report = (lambda done: progress("reading prompts", done, len(rows))) if progress else None
    begins = [model.encode_prompt(prefix) for prefix in prefixes] if model.config.architecture == "decoder" else []
    return collect(model, rows, places, model.layer(None), report, begins, on_disk=True)


def collect_inner(
    model: Model, items: Sequence[Item], progress: Progress | None, most: int = INNER_ROWS
) -> RowsOnDisk | np.ndarray:
    """Queries inside the bare prompts, each beginning once: where one of many neurons may fire on the way.

    Where another prompt, or its target so far, ends is no such place.

    Args:
        model: a decoder.
        items: the requests.
        progress: called with what is being done, how much is done, and how much there is.
        most: only so many of them, drawn at random.

    Returns:
        ``[rows, d]``.
    """
    ends = {tuple(item.rows[0][: place + 1]) for item in items for place in item.places(0)}
    first: dict[tuple[int, ...], tuple[int, int]] = {}
    for number, item in enumerate(items):
        prompt = item.rows[0][: item.starts[0]]
        for place in range(len(prompt) - 1):
            begin = tuple(prompt[: place + 1])
            if begin not in ends:
                first.setdefault(begin, (number, place))
    beginnings = list(first.values())
    kept = np.sort(np.random.default_rng(0).permutation(len(beginnings))[:most])
    places: list[list[int]] = [[] for _ in items]
    for index in kept:
        number, place = beginnings[index]
        places[number].append(place)
    targets = [number for number, chosen in enumerate(places) if chosen]
    rows = [items[number].rows[0][: places[number][-1] + 1] for number in targets]
    report = (lambda done: progress("reading inside prompts", done, len(rows))) if progress else None
    return collect(model, rows, [places[n] for n in targets], model.layer(None), report, on_disk=True).query


def collect_bare(model: Model, items: Sequence[Item], progress: Progress | None = None) -> Sites:
    """The bare prompts alone."""
    report = (lambda done: progress("reading requests", done, len(items))) if progress else None
    rows, places = [item.rows[0] for item in items], [item.places(0) for item in items]
    return collect(model, rows, places, model.layer(None), report)


def forward_seconds(model: Model, items: Sequence[Item], most: int = 64) -> float:
    """Seconds of one forward pass per request over its prompt and target, compiled and warm; 0 of no request.

    Measured once for a model and the shapes of what is run.
    """
    if not items:
        return 0.0
    chosen = items[:: max(1, len(items) // most)][:most]
    # As many as run together, so that none of the time is that of padding.
    chosen = [chosen[number % len(chosen)] for number in range(max(FEW, len(chosen)))] if len(chosen) > 1 else chosen
    rows = [item.rows[0] for item in chosen]
    places = [item.places(0)[-1:] for item in chosen]

    def run() -> None:
        forget_states()
        predicted(model, collect(model, rows, places, model.layer(None)))

    def measure() -> float:
        run()
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) / len(rows)

    shapes = [jax.tree.map(np.shape, batch) for _, batch in batches(model.config, rows)]
    return derive_once(model, "forward seconds", str(shapes), measure)


def start_values(model: Model, known: ModelMemory) -> Array:
    """What values are started with: `moment` of the unembedding, or the mean of each label of a classifier."""
    if known.centres is not None:
        return known.centres
    return derive_once(model, "start values", matmul_precision(), lambda: _kept_moment(model, known.cache))


def _kept_moment(model: Model, cache: Path | None) -> Array:
    """`moment` of a model's unembedding, from the cache if an earlier process has put it there."""
    folder = memory_folder(cache, f"moment of the unembedding {fingerprint(model)} {matmul_precision()}")
    if folder is not None and folder.exists():
        try:
            return jax.device_put(load_file(folder / MOMENT)["moment"])
        except (OSError, ValueError, KeyError, SafetensorError):
            shutil.rmtree(folder, ignore_errors=True)
    result = moment(networks.unembedding(model.config, model.params))
    if folder is not None:
        array = host(result)
        keep_folder(folder, lambda temporary: save_file({"moment": array}, temporary / MOMENT))
    return result


@jax.jit
def moment(table: Array) -> Array:
    """``M = UᵀU/V`` of the unembedding ``U [V, d]``, regularised: ``[d, d]``."""
    table = table.astype(jnp.float32)
    moment = table.T @ table / table.shape[0]
    return moment + 0.01 * jnp.trace(moment) / moment.shape[0] * jnp.eye(moment.shape[0])


def head_of(model: Model) -> Partial:
    """The rest of the network after the last FFN, with its weights kept out of compiled programs."""
    return Partial(networks.finisher(model.config), networks.final_weights(model.config, model.params))


@partial(jax.jit, static_argnames="config")
def prepare_starts(
    config: NetworkConfig, weights: Any, value_start: Array, patch: Patch, given: Mapping[str, Array]
) -> tuple[Array, Array, Array]:
    """What lanes begin with: the output with other neurons in it, the value's direction, and its scale."""
    beside = given["output"] + contribution(patch, given["query"], ACTIVATIONS[config.activation])
    targets = given["targets"]
    if config.labels:
        # The way from the mean of all labels to that of the target.
        direction = value_start[targets] - jnp.mean(value_start, 0)
    else:
        # M⁻¹·u_token raises a token's logit most against all others.
        rows = networks.unembedding_rows(config, weights, targets)
        direction = solve_positive(value_start, rows.astype(jnp.float32).T).T
    return beside.astype(jnp.float32), direction, _scale(config, weights, given["residual"], given["output"], beside)


def _scale(config: NetworkConfig, weights: Any, residual: Array, output: Array, beside: Array) -> Array:
    """What a value of medium strength measures: the residual stream's norm, mean over contexts, ``[lanes]``.

    Where another neuron fires it has to be outdone, so the stream with that neuron counts; but only up to a few times
    the unedited stream, or in a long sequence each value would outgrow the last without end.
    """

    def norm(output: Array) -> Array:
        # Where a norm follows, its output says nothing about how much it takes to move it.
        hidden = residual + output if config.post_norm else networks.leave_last(config, weights, residual, output)
        return jnp.mean(jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1), -1)

    return jnp.minimum(norm(beside), LOUDEST * norm(output))


def create_problems(
    model: Model,
    settings: TPatcherSettings,
    sites: Sites,
    targets: TargetTokens,
    negatives: Callable[[np.ndarray], np.ndarray],
    mean: np.ndarray,
    value_start: Array,
    rows: np.ndarray,
    patch: Patch,
) -> FitProblem:
    """What the neurons of some target tokens are fitted on.

    Args:
        model: the model.
        settings: the editor's options.
        sites: from `collect_items`.
        targets: the target tokens.
        negatives: from `find_subject_negatives`.
        mean: the mean memory query, ``[d]``, which stands for no negative.
        value_start: from `start_values`.
        rows: the bare rows that want a neuron, ``[lanes]``.
        patch: what is active already.
    """
    owner, token = targets.owner[rows], targets.token[rows]
    most = max(map(len, targets.table))
    most = most if settings.train_on_rephrases else min(most, settings.contexts)
    # A request that is seen less often repeats its last context.
    chosen = np.stack(
        [
            targets.table[number][np.minimum(np.arange(most), len(targets.table[number]) - 1), place]
            for number, place in zip(owner, token, strict=True)
        ]
    )
    query, output, residual = (field[chosen] for field in sites)
    context: dict[str, Any] = {"residual": residual}
    if query.ndim == 4:
        query, output, context = _by_position(query, output, residual)
    wanted = targets.wanted[rows]
    # Only the first token of an answer follows a prompt that another subject could stand in.
    begins = negatives(owner[token == 0])
    particular = np.broadcast_to(mean, (len(rows), *begins.shape[1:])).astype(np.float32)
    particular[token == 0] = begins
    given = {"query": query, "output": output, "residual": context["residual"], "targets": wanted}
    # Repeated, so that a new number of lanes compiles nothing.
    index = np.resize(np.arange(len(rows)), round_up(len(rows), settings.fit.lanes))
    weights = networks.final_weights(model.config, model.params)
    weights["layers"] = {model.layer(None): weights["layer"]}
    made = prepare_starts(
        model.config, weights, value_start, sized(patch, NEURONS), {name: x[index] for name, x in given.items()}
    )
    beside, direction, scale = (host(array)[: len(rows)] for array in made)
    # On the host, where a new number of lanes compiles nothing.
    query, particular = np.asarray(query, np.float32), np.asarray(particular, np.float32)
    on_host: Any = (query, beside, particular, context, np.asarray(wanted), direction, scale)
    return FitProblem(*on_host)


def _by_position(query: np.ndarray, output: np.ndarray, residual: np.ndarray) -> tuple[Any, Any, dict[str, Any]]:
    """Whole texts, ``[lanes, contexts, tokens, d]``, as positions ``[lanes, all tokens, d]``, with their context.

    Each text begins again until it is as long as the longest; what is said twice does not count in the mean.
    """
    length = np.any(residual != 0, -1).sum(-1)
    longest = round_up(int(length.max()), 8)
    place = np.arange(longest) % length[..., None]
    lanes, contexts = length.shape
    query, output, residual = (
        np.take_along_axis(array, place[..., None], 2).reshape(lanes, contexts * longest, -1)
        for array in (query, output, residual)
    )
    valid = (np.arange(longest) < length[..., None]).reshape(lanes, -1)
    text = np.broadcast_to(np.repeat(np.arange(contexts, dtype=np.int32), longest), valid.shape)
    return query, output, {"residual": residual, "valid": valid, "text": text}


@jax.jit
def _scatter(groups: Array, rows: Array) -> Array:
    return nuisance_scatter(groups) * (groups.shape[0] * groups.shape[1] / rows)


def _own_scatter(query: np.ndarray, table: Sequence[np.ndarray], contexts: int, part: int = 256) -> Array:
    """`nuisance_scatter` of the edits' own queries, ``[d, d]``, a part at a time; zeros add nothing."""
    groups = [span[:contexts].T for span in table]
    rows, total = np.float32(sum(group.size for group in groups)), jnp.zeros((query.shape[1],) * 2)
    for count in sorted({group.shape[1] for group in groups}):
        index = np.concatenate([group for group in groups if group.shape[1] == count])
        for first in range(0, len(index), part):
            chosen = np.asarray(query[index[first : first + part]], np.float32)
            total = total + _scatter(
                pad_rows(chosen, (SCATTERED if len(chosen) <= SCATTERED else part) - len(chosen)), rows
            )
    return total


def _few_contexts(targets: TargetTokens, most: int) -> np.ndarray:
    """The rows of all bare prompts, and so many of the others, drawn at random."""
    others = np.setdiff1d(np.arange(len(targets.answers)), targets.bare)
    drawn = np.random.default_rng(0).permutation(len(others))[:most]
    return np.sort(np.concatenate([targets.bare, others[drawn]]))


def last_memory(
    settings: TPatcherSettings,
    known: ModelMemory,
    previous: PreviousEdits,
    sites: Sites,
    targets: TargetTokens,
    inner: Any = None,
) -> Memory:
    """ModelMemory queries, earlier edits, the other edits of this batch, and what `collect_inner` gave."""
    nuisance = known.nuisance
    several = max(map(len, targets.table)) > 1 and settings.contexts > 1
    if settings.fit.recipe == "staged" and several and sites.query.ndim == 2:
        # The edits' own contexts tell more than the general ones, the more of them there are.
        scatter = _own_scatter(sites.query, targets.table, settings.contexts)
        share = min(0.9, len(targets.wanted) / 200)
        nuisance = blended(scatter, nuisance, share)
    memory = create_memory(known.query, nuisance, weight=settings.nuisance_weight, shrinkage=settings.shrinkage)
    if known.answers is not None:
        memory = memory._replace(answer=known.answers)
    query, owner = single_rows(previous.sites)
    queries, answers = [query], [previous.wanted[owner]]
    if settings.other_edits:
        rows, owner = single_rows(sites)
        if sites.query.ndim == 2 and len(owner) > len(targets.bare) + CONTEXT_ROWS:
            owner = _few_contexts(targets, CONTEXT_ROWS)
            rows = chosen_rows(rows, owner)
        queries.append(rows)
        answers.append(targets.answers[owner])
    if inner is not None:
        queries.append(inner)
        answers.append(np.full(len(inner), NO_ANSWER, np.int32))
    count = sum(map(len, queries))
    return extend(memory, queries, np.concatenate(answers), in_blocks(count, LEAST_ROWS, BLOCK)) if count else memory


def find_mates(items: Sequence[Item], requests: Mapping[int, EditRequest], count: int) -> dict[int, list[int]]:
    """For each item ``count`` others with the same prompt about another subject and another answer, if there are."""
    frames: dict[str, list[int]] = {}
    named = {at: requests[item.position].subject for at, item in enumerate(items)}
    frame = {at: replace_subject(requests[items[at].position].prompt, name, "{}") for at, name in named.items() if name}
    for at, text in frame.items():
        frames.setdefault(text, []).append(at)
    result = {}
    for at, text in frame.items():
        pool = sorted(frames[text], key=lambda n: (named[n] or "", items[n].target))
        # As in `swapped_prompts`: which they are does not depend on the request's place in the list.
        start = int(text_generator(requests[items[at].position].prompt).integers(len(pool)))
        turned = (pool[(start + step) % len(pool)] for step in range(len(pool)))
        others = (n for n in turned if named[n] != named[at] and items[n].target != items[at].target)
        chosen = list(itertools.islice(others, count))
        if count and len(chosen) == count:
            result[at] = chosen
    return result


def find_subject_negatives(
    model: Model,
    items: Sequence[Item],
    requests: Mapping[int, EditRequest],
    names: Sequence[str],
    count: int,
    mean: np.ndarray,
    sites: Sites,
    targets: TargetTokens,
    first: np.ndarray,
    progress: Progress | None,
) -> Callable[[np.ndarray], np.ndarray]:
    """Queries on which each item's first neuron must stay silent: those after its prompt about other subjects.

    Where other requests ask the same about other subjects, as they do where there are thousands, their queries are
    taken and the network is not run again. After the prompts that a request keeps it must stay silent, too.

    Args:
        model: the model.
        items: the requests in tokens.
        requests: all of them, by position.
        names: of other subjects.
        count: so many for each item.
        mean: the mean memory query, ``[d]``.
        sites: from `collect_items`.
        targets: the target tokens.
        first: numbers of items that are read at once, together; others only when they are asked for.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        Numbers of items to queries, ``[numbers, count + most kept, d]``, which are the mean where there is no other
        subject, or nothing more is kept.
    """
    whole = () if networks.pointwise(model.config) else (LEAST_TEXT,)
    mates = find_mates(items, requests, count) if not whole else {}
    # Only where each is found: all of them at once would be several times the edits' own queries.
    most = count + max((len(requests[item.position].keep) for item in items), default=0)
    taken = np.full((len(items), most), -1)
    for at, others in mates.items():
        taken[at, :count] = [targets.table[other][0, 0] for other in others]
    # Which reading of other subjects holds an item's, and where in it.
    readings, reading, places = [], np.full(len(items), -1), np.full((len(items), most), -1)
    reading[[at for at in mates if not requests[items[at].position].keep]] = len(items)

    def read(chosen: np.ndarray) -> None:
        wanted = {items[at].position: requests[items[at].position] for at in chosen if at not in mates}
        swapped = swapped_prompts(model, requests, names, count, wanted)
        texts: dict[tuple[int, int], str] = {}
        for at in chosen.tolist():
            position = items[at].position
            texts |= {(at, slot): text for slot, text in enumerate(swapped.get(position, ()))}
            texts |= {(at, count + slot): text for slot, text in enumerate(requests[position].keep)}
        slots, rows = list(texts), [model.encode_prompt(text) for text in texts.values()]
        reading[chosen] = len(readings)
        said: Any = np.zeros((0, *whole, mean.shape[0]), np.float32)
        if rows:
            tell = progress
            report = (lambda done: tell("reading other subjects", done, len(rows))) if tell else None
            seen = collect(model, rows, [[len(row) - 1] for row in rows], model.layer(None), report, on_disk=True)
            said = seen.query if not whole else np.where(real(seen)[..., None], seen.query, mean)[:, :LEAST_TEXT]
            places[tuple(np.asarray(slots).T)] = np.arange(len(slots))
        readings.append(said)

    def read_new(numbers: np.ndarray) -> None:
        if len(unread := np.unique(numbers[reading[numbers] < 0])):
            read(unread)

    read_new(first)

    def negatives(numbers: np.ndarray) -> np.ndarray:
        read_new(numbers)
        result = np.broadcast_to(mean, (len(numbers), most, *whole, mean.shape[0])).astype(np.float32)
        for which, said in enumerate(readings):
            table = np.where((reading[numbers] == which)[:, None], places[numbers], -1)
            result[table >= 0] = said[table[table >= 0]]
        table = taken[numbers]
        result[table >= 0] = sites.query[table[table >= 0]]
        return result.reshape(len(numbers), math.prod((most, *whole)), mean.shape[0])

    return negatives
