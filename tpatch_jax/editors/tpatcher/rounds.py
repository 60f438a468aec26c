"""Fitting what does not come out yet, round after round, and taking out what does not hold in the end.

Arrays and callables only, so that networks of this library and foreign ones are edited by the same loop.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from tpatch_jax.core.devices import divided, parts
from tpatch_jax.core.fit import FitInfo, FitProblem, FitSettings, fit_many
from tpatch_jax.core.memory import Memory
from tpatch_jax.core.patch import Patch, concatenate, join, take
from tpatch_jax.core.problem import Head
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.storage.finished_parts import FinishedParts
from tpatch_jax.typing import Activation, Progress

__all__ = [
    "Checks",
    "Fitted",
    "Note",
    "RoundsInput",
    "TargetTokens",
    "drop_failures",
    "find_target_tokens",
    "fit_rounds",
    "number_neurons",
    "report",
]

D = TypeVar("D")


class TargetTokens(NamedTuple):
    """The target tokens of several requests, and where in the collected rows each is found.

    Rows are collected request after request, context after context, token after token.

    Attributes:
        table: for each request its rows, ``[contexts, tokens]``.
        answers: the token that each row should be followed by, ``[rows]``.
        bare: the rows of the bare prompts, the first context of each request: ``[tokens]``.
        wanted: the answers of those, ``[tokens]``.
        owner: which request each of those belongs to, ``[tokens]``.
        token: which of its target's tokens each is, ``[tokens]``.
    """

    table: list[np.ndarray]
    answers: np.ndarray
    bare: np.ndarray
    wanted: np.ndarray
    owner: np.ndarray
    token: np.ndarray


class Note(NamedTuple):
    """How the fit of one neuron went: see `tpatch_jax.editors.base.RequestInfo`."""

    site: str
    steps: int
    margin: float
    losses: Mapping[str, float]


class Fitted(NamedTuple):
    """Where the rounds ended.

    Attributes:
        patch: the neurons that were there before, then the new ones, ``[n, d]``, on the host.
        row: for each new neuron the bare row that it was fitted for.
        notes: for each new neuron how its fit went.
        missing: the bare rows whose token still does not come out.
        seconds: the time that the fits took.
    """

    patch: Patch
    row: np.ndarray
    notes: list[Note]
    missing: np.ndarray
    seconds: float


def find_target_tokens(targets: Sequence[Sequence[int]], contexts: Sequence[int]) -> TargetTokens:
    """Where the target tokens of several requests are found among the collected rows.

    Args:
        targets: each request's target in tokens.
        contexts: in how many contexts each request is seen.

    Example:
        >>> find_target_tokens([[7, 8], [9]], [2, 1]).bare.tolist()
        [0, 1, 4]
    """
    table, offset = [], 0
    for target, count in zip(targets, contexts, strict=True):
        span = np.arange(count * len(target)).reshape(count, -1) + offset
        table.append(span)
        offset += span.size
    answers = np.concatenate([np.tile(target, count) for target, count in zip(targets, contexts, strict=True)])
    bare = np.concatenate([span[0] for span in table])
    owner = np.concatenate([np.full(len(target), number) for number, target in enumerate(targets)])
    token = np.concatenate([np.arange(len(target)) for target in targets])
    return TargetTokens(table, answers.astype(np.int32), bare, answers[bare].astype(np.int32), owner, token)


@jax.jit
def _fold(rng: Array, folds: Array) -> Array:
    return jax.vmap(lambda fold: jax.random.fold_in(rng, fold))(folds)


def _fold_names(rng: Array, names: Sequence[str], size: int) -> Array:
    """A random key for each name, and some more: a result depends on what is targets for, not on its neighbours."""
    folds = np.zeros(size, np.uint32)
    folds[: len(names)] = [zlib.crc32(name.encode()) for name in names]
    return _fold(rng, folds)


def _note(info: FitInfo, lane: int) -> Note:
    losses = {term: float(getattr(info, term)[lane]) for term in ("l_e", "l_a", "l_m1", "l_m2")}
    return Note("last", int(info.steps[lane]), float(info.margin[lane]), losses)


class RoundsInput(NamedTuple):
    """What all rounds work on.

    Attributes:
        create_problems: ``(bare rows, patch)`` to what to fit on.
        wrong: the bare rows whose token does not come out with a patch.
        names: of each bare row, for its random numbers.
        targets: the target tokens.
        memory: shared by all problems.
        head: as for `fit_many`.
        activation: the feed-forward network's.
        left: bare rows that get no neuron, whatever comes out.
        mesh: devices that share the work; see `fit_many`.
    """

    create_problems: Callable[[np.ndarray, Patch], FitProblem]
    wrong: Callable[[Patch], np.ndarray]
    names: Sequence[str]
    targets: TargetTokens
    memory: Memory
    head: Head
    activation: Activation
    left: np.ndarray
    mesh: Mesh | None = None


def _kept_part(finished: FinishedParts | None, name: str, rows: np.ndarray) -> tuple[Patch, FitInfo] | None:
    """What an interrupted run fitted for some tokens."""
    arrays: Any = None if finished is None else finished.load(name, {"rows": rows.tolist()})
    if arrays is None:
        return None
    return Patch(*(arrays[part] for part in Patch._fields)), FitInfo(*(arrays[part] for part in FitInfo._fields))


def _keep_part(finished: FinishedParts | None, name: str, rows: np.ndarray, patch: Patch, info: FitInfo) -> None:
    if finished is not None:
        finished.save(name, {**patch._asdict(), **info._asdict()}, {"rows": rows.tolist()})


def fit_rounds(
    patch: Patch,
    missing: np.ndarray,
    given: RoundsInput,
    rng: Array,
    settings: FitSettings,
    *,
    attempts: int,
    most_tokens: int,
    progress: Progress | None = None,
    finished: FinishedParts | None = None,
) -> Fitted:
    """One neuron for each token that does not come out; a retry is fitted in the presence of what is there by then.

    Args:
        patch: neurons that are there already, ``[n, d]``.
        missing: the bare rows whose token does not come out with these.
        given: what to work on.
        rng: a typed random key.
        settings: options of a fit.
        attempts: how many rounds at most.
        most_tokens: only so many tokens of a request get a neuron.
        progress: called with what is being done, how much is done, and how much there is.
        finished: what an interrupted run has fitted already, and where what is fitted is kept.
    """
    targets = given.targets
    # Once, not again with each part.
    at_once, memory = settings.lanes * parts(given.mesh), divided(given.memory, given.mesh)
    patch = jax.tree.map(np.asarray, patch)
    rows, notes, seconds = np.zeros(0, np.int64), [], 0.0
    size = len(missing)
    for attempt in range(attempts):
        now = missing[(targets.token[missing] < most_tokens) & ~np.isin(missing, given.left)]
        if not len(now):
            break
        began = time.perf_counter()
        said = f"fitting, attempt {attempt + 1}" if attempt else "fitting"
        if progress:
            progress(said, 0, len(now))
        pieces, kept = [], []
        for first in range(0, len(now), at_once):
            # Part by part, so that not all that is fitted on is in memory at once.
            part = now[first : first + at_once]
            name = f"fit-{attempt}-{first}"
            done = _kept_part(finished, name, part)
            if done is None:
                rngs = _fold_names(rng, [f"{given.names[row]} {attempt}" for row in part], at_once)
                problems = given.create_problems(part, patch)
                arguments = problems, memory, given.head, rngs, settings, given.activation
                fitted = fit_many(*arguments, mesh=given.mesh, size=size, retry=attempt > 0)
                done = jax.tree.map(np.asarray, fitted)
                _keep_part(finished, name, part, *done)
            new, info = done
            keep = np.flatnonzero(np.isfinite(new.value).all((1, 2)) & np.isfinite(new.key).all((1, 2)))
            pieces.append(join(take(new, keep)))
            kept.append(np.repeat(part[keep], new.key.shape[1]))
            notes += [_note(info, int(lane)) for lane in keep for _ in range(new.key.shape[1])]
            if progress:
                progress(said, min(first + at_once, len(now)), len(now))
        seconds += time.perf_counter() - began
        patch, rows = concatenate([patch, *pieces]), np.concatenate([rows, *kept])
        # Another copy of all neurons, which would be there while the network runs.
        del pieces
        missing = given.wrong(patch)
    return Fitted(patch, rows, notes, missing, seconds)


class Checks(NamedTuple):
    """How a draft is looked at while neurons are taken out; ``D`` is whatever stands around them, a value.

    Attributes:
        wrong: ``(D, patch)`` to the bare rows whose token does not come out.
        harmful: ``(D, patch, rows of its new neurons)`` to the requests whose neurons break something else.
        without: ``(D, requests)`` to the same without what belongs to some requests.
    """

    wrong: Callable[[Any, Patch], np.ndarray]
    harmful: Callable[[Any, Patch, np.ndarray], set[int]] = lambda draft, patch, rows: set()
    without: Callable[[Any, set[int]], Any] = lambda draft, requests: draft


def drop_failures(
    fitted: Fitted, targets: TargetTokens, checks: Checks, draft: D
) -> tuple[np.ndarray, dict[int, str], D]:
    """What does not hold is taken out; that may free or trip others, so look until it is stable.

    Args:
        fitted: where the rounds ended.
        targets: the target tokens.
        checks: how to look.
        draft: what stands around the neurons.

    Returns:
        Which of the new neurons stay, for each request that is taken out the reason, and what stands around them then.
    """
    first = fitted.patch.key.shape[0] - len(fitted.row)
    older = take(fitted.patch, np.arange(first))
    dropped: set[int] = set(targets.owner[fitted.missing].tolist())
    reasons: dict[int, str] = {}
    for number in dropped:
        token = min(int(targets.token[row]) for row in fitted.missing if targets.owner[row] == number)
        reasons[number] = f"target token {token + 1} of {targets.table[number].shape[1]} still comes out wrong"
    draft = checks.without(draft, dropped)
    # Where nothing is taken out the rounds have looked already, and all comes out.
    looked = not dropped
    while True:
        kept = np.asarray([n for n, row in enumerate(fitted.row) if targets.owner[row] not in dropped], np.int64)
        final = fitted.patch if len(kept) == len(fitted.row) else concatenate([older, take(fitted.patch, first + kept)])
        wrong = np.zeros(0, np.int64) if looked else checks.wrong(draft, final)
        looked = False
        broken = dict.fromkeys(targets.owner[wrong].tolist(), "another edit breaks it")
        broken |= dict.fromkeys(checks.harmful(draft, final, fitted.row[kept]), "it would break an earlier edit")
        broken = {number: reason for number, reason in broken.items() if number not in dropped}
        if not broken:
            return kept, reasons, draft
        dropped |= set(broken)
        reasons |= broken
        draft = checks.without(draft, set(broken))


def number_neurons(
    made: Sequence[tuple[int, int, Note]], first: Mapping[int, int]
) -> tuple[dict[int, dict[int, list[int]]], dict[int, list[Note]]]:
    """The neurons of each request, by layer, and how their fits went: what `report` is told.

    Args:
        made: of each new neuron the request's position, its layer and how its fit went, in the order of its patch.
        first: how many neurons each layer had before.

    Example:
        >>> note = Note("last", 3, 0.5, {})
        >>> number_neurons([(0, 5, note), (1, 5, note)], {5: 2})[0]
        {0: {5: [2]}, 1: {5: [3]}}
    """
    counts = dict(first)
    neurons: dict[int, dict[int, list[int]]] = {}
    notes: dict[int, list[Note]] = {}
    for position, layer, note in made:
        neurons.setdefault(position, {}).setdefault(layer, []).append(counts.get(layer, 0))
        counts[layer] = counts.get(layer, 0) + 1
        notes.setdefault(position, []).append(note)
    return neurons, notes


def _mean_losses(fits: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each term's mean over the neurons that have it: those at a subject have one more where a start was used."""
    terms = dict.fromkeys(term for losses in fits for term in losses)
    return {term: float(np.mean([losses[term] for losses in fits if term in losses])) for term in terms}


def report(
    names: Sequence[str],
    problems: Mapping[int, str],
    already: set[int],
    neurons: Mapping[int, Mapping[int, Sequence[int]]],
    notes: Mapping[int, list[Note]],
    hidden_size: int,
    times: tuple[float, float, float],
) -> EditInfo:
    """What became of each request, and what all of them cost.

    Args:
        names: of the requests.
        problems: the reason of each that failed, by position.
        already: those that held before.
        neurons: of each request that was edited, by position, its neurons by layer.
        notes: how their fits went.
        hidden_size: ``d``.
        times: seconds of the whole edit, of the fitting, and of one forward pass over one request.
    """
    results = []
    for position, name in enumerate(names):
        if position in problems:
            results.append(RequestInfo(name, False, "failed", problems[position]))
        elif position in already and position not in neurons:
            # One that held, was disturbed by another edit and got a neuron for it counts as edited.
            results.append(RequestInfo(name, True, "already"))
        elif position not in notes:
            # Another request's neuron says what it asks for.
            results.append(RequestInfo(name, True, "edited"))
        else:
            fits = notes[position]
            result = RequestInfo(
                name,
                True,
                "edited",
                neurons={layer: tuple(chosen) for layer, chosen in neurons[position].items()},
                steps=max(fit.steps for fit in fits),
                losses=_mean_losses([fit.losses for fit in fits]),
                margin=min(fit.margin for fit in fits),
                site="subject" if any(fit.site == "subject" for fit in fits) else "last",
            )
            results.append(result)
    seconds, fit_seconds, unit = times
    scale = 1 / (max(1, len(names)) * unit) if unit else 0.0
    added = sum(len(chosen) for layers in neurons.values() for chosen in layers.values()) * (2 * hidden_size + 1)
    return EditInfo(tuple(results), seconds, fit_seconds, seconds * scale, fit_seconds * scale, added)
