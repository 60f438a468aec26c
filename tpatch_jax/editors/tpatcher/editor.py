"""T-Patcher as an editor: from requests to neurons.

One neuron for each target token that the model gets wrong, in the last feed-forward layer; or a pair for each request,
at its subject in an earlier layer, completed in the last layer where that does not say the whole target.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core.checks import random_key
from tpatch_jax.core.devices import mesh_of
from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.patch import Patch, concatenate, create, preactivations, sized, take
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions
from tpatch_jax.editors.model_memory import ModelMemory, collect_model_memory
from tpatch_jax.editors.reading import Item, check_requests, read_item, with_shared_numbers
from tpatch_jax.editors.rewordings import reworded
from tpatch_jax.editors.tpatcher.last_site import (
    collect_bare,
    collect_inner,
    collect_items,
    create_lanes,
    forward_seconds,
    last_memory,
    resume,
    starting,
    swaps,
)
from tpatch_jax.editors.tpatcher.previous import (
    PreviousEdits,
    broken,
    fires,
    nothing,
    raise_thresholds,
    refreshed,
    remember,
)
from tpatch_jax.editors.tpatcher.rounds import (
    Fitted,
    Note,
    TargetTokens,
    find_target_tokens,
    finished,
    fit_rounds,
    numbered,
    report,
)
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.editors.tpatcher.subject_site import (
    POSITIONS,
    SubjectNeuron,
    Subjects,
    fit_subjects,
    read_subjects,
    subject_layer,
)
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.collection import Sites, predicted, wrong_rows
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest, as_requests
from tpatch_jax.storage.rows_on_disk import chosen_rows

__all__ = ["TPatcherState", "edit", "site_layer", "tpatcher"]

Progress = Callable[[str, int, int], None]


class TPatcherState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the model without the patch.
        patch: the neurons so far, ``[n, d]``.
        background: what is known about the unedited model at its last layer.
        deep: the same at the layer of the subject site, if that is used.
        spread: what values are started with; see `tpatch_jax.editors.tpatcher.last_site.starting`.
        earlier: the edits of earlier steps, on which later patches stay silent and which they must not break.
        settings: the editor's options.
    """

    model: Model
    patch: Patch
    background: ModelMemory
    deep: ModelMemory | None
    spread: Array
    earlier: PreviousEdits
    settings: TPatcherSettings


def tpatcher(
    settings: TPatcherSettings = PRESETS["default"],
    *,
    memory: str | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """The T-Patcher editor.

    Args:
        settings: its options.
        memory: a text file for the query memory; by default text is sampled from the model.
        cache: folder where memories are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `TPatcherState`.

    Raises:
        TPatchError: a setting does not exist.

    Source: Huang et al. 2023.
    """
    if settings.site not in ("auto", "last", "subject"):
        raise TPatchError(f"site {settings.site!r} does not exist; use site=auto, site=last or site=subject")
    if settings.subject.token not in POSITIONS:
        raise TPatchError(f"token {settings.subject.token!r} does not exist; use token=subject or token=prompt")
    if settings.layer != "auto" and not settings.layer.isdigit():
        raise TPatchError(f"layer {settings.layer!r} is not a layer; use layer=auto or a number")
    if settings.fit.recipe not in ("staged", "joint"):
        raise TPatchError(f"recipe {settings.fit.recipe!r} does not exist; use 'staged' or 'joint'")
    if settings.fit.output_bias and settings.fit.recipe == "staged":
        raise TPatchError("output_bias trains without a threshold, which the staged recipe needs; use recipe=joint")

    def init(model: Model, key: Array) -> TPatcherState:
        known = collect_model_memory(model, model.layer(None), memory, cache=cache, progress=progress)
        hidden_size = model.config.hidden_size
        patch, deep = create(hidden_size), None
        layer = site_layer(model, settings)
        if layer is not None:
            deep = collect_model_memory(model, layer, memory, cache=cache, progress=progress)
            patch = patch._replace(layer=jnp.zeros(0, jnp.int32))
        spread = starting(model, known)
        dtype = jax.tree.leaves(model.params)[0].dtype
        own = settings
        if model.config.architecture != "decoder":
            own = settings.for_inputs(bool(model.config.encoder), networks.pointwise(model.config))
        return TPatcherState(model, patch, known, deep, spread, nothing(hidden_size, dtype), own)

    def step(state: TPatcherState, requests: Sequence[EditRequest], key: Array) -> tuple[TPatcherState, EditInfo]:
        return _step(state, as_requests(requests), key, progress)

    def apply(state: TPatcherState, batch: Batch) -> Array:
        # Few sizes, so that a new number of neurons seldom compiles the network anew.
        return attach(state.model, sized(state.patch)).apply(batch)

    return EditorFunctions(init, step, apply)


def site_layer(model: Model, settings: TPatcherSettings) -> int | None:
    """The layer of the subject site, if that is used; a model too low for it is edited in the last layer."""
    if settings.site == "last":
        return None
    if model.config.architecture != "decoder":
        if settings.site == "auto":
            return None
        raise TPatchError(
            f"site={settings.site} needs a decoder, and {model.name!r} is an {model.config.architecture}; use site=last"
        )
    layer = model.layer(subject_layer(model.config.layers, settings.layer))
    if layer != model.layer(None):
        return layer
    if settings.site == "auto" and settings.layer == "auto":
        return None
    raise TPatchError(f"layer {layer} is the last one, where a subject can no longer be heard; use site=last")


class _Deep(NamedTuple):
    """The neurons at subjects in one step.

    Attributes:
        model: the unedited model with all neurons at subjects, of earlier steps and of this one.
        before: those of earlier steps.
        patch: those of this step.
        neurons: what each of them is.
        read: the subjects of this step's requests.
        earlier: the earlier edits as the last layer sees them with these neurons.
    """

    model: Model
    before: Patch
    patch: Patch
    neurons: list[SubjectNeuron]
    read: Subjects | None
    earlier: PreviousEdits

    def without(self, unedited: Model, positions: set[int]) -> "_Deep":
        """The same with some requests' neurons taken out."""
        keep = [neuron for neuron in self.neurons if neuron.position not in positions]
        if len(keep) == len(self.neurons):
            return self
        left = take(self.patch, [neuron.neuron for neuron in keep])
        lost = take(self.patch, [neuron.neuron for neuron in self.neurons if neuron.position in positions])
        model = _with_deep(unedited, concatenate([self.before, left]))
        earlier = refreshed(model, self.earlier, fires(self.earlier, lost))
        keep = [neuron._replace(neuron=number) for number, neuron in enumerate(keep)]
        return self._replace(model=model, patch=left, neurons=keep, earlier=earlier)


def _with_deep(model: Model, deep: Patch) -> Model:
    return attach(model, sized(deep)) if deep.key.shape[0] else model


def _split(state: TPatcherState) -> tuple[Patch, Patch]:
    """The neurons so far at the subject site and in the last layer, on the host."""
    patch = jax.tree.map(np.asarray, state.patch)
    if patch.layer is None:
        return take(patch, []), patch
    here = np.asarray(patch.layer) == state.model.layer(None)
    return take(patch, np.flatnonzero(~here)), take(patch, np.flatnonzero(here))._replace(layer=None)


def _fit_deep(
    state: TPatcherState, items: Sequence[Item], requests: Sequence[EditRequest], before: Patch, last: Patch,
    progress: Progress | None
) -> _Deep:  # fmt: skip
    """Neurons at the subjects of those requests that have one and do not hold already."""
    unedited, settings, earlier = state.model, state.settings, state.earlier
    model = _with_deep(unedited, before)
    none = take(before, [])
    if state.deep is None:
        return _Deep(model, before, none, [], None, earlier)
    layer = unedited.layer(subject_layer(unedited.config.layers, settings.layer))
    said = predicted(model, collect_bare(model, items), last)
    ends = np.cumsum([len(item.target) for item in items])[:-1]
    wrong = [found.tolist() != item.target for item, found in zip(items, np.split(said, ends), strict=True)]
    read = read_subjects(unedited, state.deep, layer, items, requests, earlier, settings.subject, progress)
    fitted = fit_subjects(read, before, wrong, earlier, progress)
    patch = jax.tree.map(np.asarray, fitted.patch)
    deep = _Deep(_with_deep(unedited, concatenate([before, patch])), before, patch, fitted.neurons, read, earlier)
    if not len(earlier.wanted) or not fitted.neurons:
        return deep
    # Where a new neuron breaks an earlier edit its request is left to the last layer.
    lost_before, touched = broken(model, earlier, last), fires(earlier, patch)
    deep = deep._replace(earlier=refreshed(deep.model, earlier, touched))
    lost = np.setdiff1d(broken(deep.model, deep.earlier, last), lost_before)
    edits = np.repeat(np.arange(len(earlier.lengths)), earlier.lengths - earlier.starts)[lost]
    culprits = np.any(touched[edits], axis=0)
    return deep.without(unedited, {neuron.position for neuron in deep.neurons if culprits[neuron.neuron]})


class _Last(NamedTuple):
    """Where fitting in the last layer ended.

    Attributes:
        fitted: the neurons of earlier steps and the new ones.
        targets: the target tokens.
        bare: what the cut gives at them after the bare prompts.
        last: the neurons of earlier steps, some of which gave way.
        asking: the bare rows for which they did.
        already: positions of requests that held without a new neuron here.
    """

    fitted: Fitted
    targets: TargetTokens
    bare: Sites
    last: Patch
    asking: np.ndarray
    already: set[int]


def _fit_last(
    state: TPatcherState, deep: _Deep, items: Sequence[Item], good: Mapping[int, EditRequest], prefixes: Sequence[str],
    last: Patch, key: Array, progress: Progress | None,
) -> _Last:  # fmt: skip
    """Neurons for the target tokens that do not come out; what they are fitted on is let go with this call."""
    model, settings, known = deep.model, state.settings, state.background
    sites = collect_items(model, items, prefixes, progress)
    targets = find_target_tokens([item.target for item in items], [len(item.rows) for item in items])
    many = settings.fit.recipe == "staged" and len(items) >= settings.many_from
    many = many and model.config.architecture == "decoder"
    inner = collect_inner(model, items, progress) if many else None
    memory = last_memory(settings, known, deep.earlier, sites, targets, inner)
    negatives = swaps(
        model, items, good, known.names, settings.swaps, np.asarray(memory.mean), sites, targets, progress
    )
    bare = Sites(*(chosen_rows(field, targets.bare) for field in sites))

    wrong = partial(wrong_rows, model, bare, targets.wanted)
    asking = wrong(last)
    former, last = last, raise_thresholds(model, deep.earlier, last, bare.query[asking])
    missing = asking if last is former else wrong(last)
    already = {items[number].position for number in set(range(len(items))) - set(targets.owner[missing].tolist())}
    lanes = partial(
        create_lanes, model, settings, sites, targets, negatives, np.asarray(memory.mean, np.float32), state.spread
    )
    # What a request says besides its prompt and its target only measures.
    names = [(good[item.position].prompt, good[item.position].target) for item in items]
    left = [] if settings.complete or deep.read is None else deep.read.lanes
    fitted = fit_rounds(
        last,
        lanes,
        wrong,
        [f"{names[own]} {token}" for own, token in zip(targets.owner, targets.token, strict=True)],
        targets,
        memory,
        resume(model),
        key,
        settings.fit,
        attempts=settings.attempts,
        missing=missing,
        left=np.flatnonzero(np.isin(targets.owner, left)),
        most_tokens=settings.most_tokens,
        activation=ACTIVATIONS[model.config.activation],
        progress=progress,
        mesh=mesh_of(model.params),
    )
    return _Last(fitted, targets, bare, last, asking, already)


def _step(
    state: TPatcherState, requests: list[EditRequest], key: Array, progress: Progress | None
) -> tuple[TPatcherState, EditInfo]:
    began = time.perf_counter()
    settings, known = state.settings, state.background
    names = [request.name(position) for position, request in enumerate(requests)]
    hidden_size = state.model.config.hidden_size
    problems = check_requests(state.model, requests, state.deep is not None)
    prefixes = known.prefixes[: settings.contexts - 1]
    good = {position: request for position, request in enumerate(requests) if position not in problems}
    items = with_shared_numbers(
        read_item(
            state.model,
            position,
            request,
            prefixes,
            settings.train_on_rephrases,
            reworded(request.prompt, request.subject, known.rewordings, settings.rewordings),
        )
        for position, request in good.items()
    )
    if not items:
        return state, report(names, problems, set(), {}, {}, hidden_size, (time.perf_counter() - began, 0.0, 0.0))

    before, former = _split(state)
    deep = _fit_deep(state, items, requests, before, former, progress)
    deep_seconds = time.perf_counter() - began if deep.neurons else 0.0
    # Measuring the unit is no part of the edit.
    paused = time.perf_counter()
    unit = forward_seconds(deep.model, items)
    began += time.perf_counter() - paused
    found = _fit_last(state, deep, items, good, prefixes, former, key, progress)
    fitted, targets, bare, last, already = found.fitted, found.targets, found.bare, found.last, found.already
    act = ACTIVATIONS[state.model.config.activation]

    def wrong(patch: Patch) -> np.ndarray:
        return wrong_rows(deep.model, bare, targets.wanted, patch)

    lost_before, older = broken(deep.model, deep.earlier, last), last.key.shape[0]

    def harmed(patch: Patch, rows: np.ndarray) -> set[int]:
        lost = np.setdiff1d(broken(deep.model, deep.earlier, patch), lost_before)
        if not len(lost) or not len(rows):
            return set()
        # The new neuron that acts most strongly where an earlier edit broke has to go.
        new = take(patch, np.arange(older, patch.key.shape[0]))
        strength = act(preactivations(new, jnp.asarray(deep.earlier.sites.query[lost])))
        strength = jnp.abs(strength * jnp.linalg.norm(jnp.asarray(new.value), axis=1))
        strength = jnp.max(strength, 1) if strength.ndim == 3 else strength
        return set(targets.owner[rows[np.asarray(jnp.argmax(strength, 1))]].tolist())

    def gone(numbers: set[int]) -> None:
        # Without a neuron further down the last layer sees something else.
        nonlocal deep, bare
        left = deep.without(state.model, {items[number].position for number in numbers})
        if left is not deep:
            deep, bare = left, collect_bare(left.model, items)

    alive, reasons = finished(fitted, targets, wrong, harmed, gone)
    for number, reason in reasons.items():
        position = items[number].position
        mend = "try more attempts" + ", or give the request a subject" * (requests[position].subject is None)
        if not settings.complete and state.deep is not None and requests[position].subject is not None:
            mend = "use complete=true, which lets the last layer say what the subject's neuron does not"
        problems[position] = f"{reason} after {settings.attempts} attempts; {mend}"
    made = [(neuron.position, Note("subject", neuron.steps, neuron.margin, neuron.losses)) for neuron in deep.neurons]
    made += [(items[targets.owner[fitted.row[lane]]].position, fitted.notes[lane]) for lane in alive]
    neurons, notes = numbered(made, state.patch.key.shape[0])
    holds = [number for number in range(len(items)) if number not in reasons]
    final = fitted.patch
    if reasons and last is not former:
        # What does not hold leaves no trace: earlier neurons that gave way to it take their place again.
        asking = found.asking[np.isin(targets.owner[found.asking], holds)]
        calmer = raise_thresholds(deep.model, deep.earlier, former, bare.query[asking])
        tried = concatenate([calmer, take(final, older + alive)])
        lost = np.setdiff1d(broken(deep.model, deep.earlier, tried), lost_before)
        if not len(lost) and not np.isin(targets.owner[wrong(tried)], holds).any():
            final, alive = tried, np.arange(len(alive))
    patch = _together(state, deep.patch, final, older, alive)
    rows = np.flatnonzero(np.isin(targets.owner, holds))
    kept = Sites(*(field[rows] for field in bare))
    heard = None if deep.read is None else deep.read.heard(holds)
    subjects = [(-1, -1)] * len(holds) if deep.read is None else [deep.read.place(number) for number in holds]
    earlier = remember(deep.earlier, [items[number] for number in holds], subjects, kept, heard)
    times = time.perf_counter() - began, deep_seconds + fitted.seconds, unit
    return state._replace(patch=patch, earlier=earlier), report(
        names, problems, already, neurons, notes, hidden_size, times
    )


def _together(state: TPatcherState, deep: Patch, last: Patch, older: int, alive: np.ndarray) -> Patch:
    """The neurons so far, each in its place, then those at subjects, then those in the last layer that stay."""
    old, new = jax.tree.map(np.asarray, state.patch), take(last, older + alive)
    if old.layer is None:
        return jax.tree.map(jax.device_put, concatenate([take(last, np.arange(older)), new]))
    layer = state.model.layer(None)
    here = np.asarray(old.layer) == layer
    old = jax.tree.map(np.array, old)
    for field, now in zip(old[:3], last[:3], strict=True):
        field[here] = now[:older]
    new = new._replace(layer=jnp.full(len(alive), layer, jnp.int32))
    return jax.tree.map(jax.device_put, concatenate([old, deep, new]))


def edit(
    model: Model,
    requests: Sequence[EditRequest | dict[str, Any]],
    *,
    settings: TPatcherSettings | str = "default",
    memory: str | Path | None = None,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
) -> tuple[Patch, EditInfo]:
    """Correct a model: fit the neurons that make it say each request's target after its prompt.

    Args:
        model: the model; not changed. Apply the result with `tpatch_jax.attach` or `tpatch_jax.merge`.
        requests: what to correct.
        settings: options, or the name of a preset: ``"default"``, ``"paper"`` or ``"paper-fever"``.
        memory: a text file whose queries the patch stays silent on; by default text is sampled from the model, once.
            Classifiers and encoder-decoders cannot sample, so they need one: an input a line.
        seed: the same seed gives the same patch on one machine.
        cache: keep the memory on disk between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The patch, ``[n, d]``, with one neuron per wrong target token, or a pair per request at the subject site, and an
        `EditInfo` that says what became of each request. Requests that do not hold are reported there and leave no
        neuron.

    Raises:
        TPatchError: there is no request, or a setting does not exist.

    Source: Huang et al. 2023.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("smollm2-135m")  # doctest: +SKIP
        >>> patch, info = tp.edit(model, [tp.EditRequest("The capital of France is", "Lyon")])  # doctest: +SKIP
        >>> tp.merge(model, patch).generate("The capital of France is", 1)  # doctest: +SKIP
        ' Lyon'
    """
    from tpatch_jax.storage.cache import cache_folder

    if isinstance(model, str | Path):
        raise TPatchError(f"{str(model)!r} is the name of a model; load it first, with load_model")
    if not requests:
        raise TPatchError("there is no request to edit; give at least one EditRequest")
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise TPatchError(f"preset {settings!r} does not exist; choose from {', '.join(sorted(PRESETS))}")
        settings = PRESETS[settings]
    wanted, key = as_requests(requests), random_key(seed)
    if settings.site == "auto" and not any(request.subject for request in wanted):
        settings = dataclasses.replace(settings, site="last")
    with jax.default_matmul_precision("highest"):
        editor = tpatcher(settings, memory=memory, cache=cache_folder() if cache else None, progress=progress)
        state, info = editor.step(editor.init(model, key), wanted, key)
    return state.patch, info
