"""T-Patcher as an editor: from requests to neurons.

One neuron for each target token that the model gets wrong, in the last feed-forward layer; or a pair for each request,
at its subject in an earlier layer, completed in the last layer where that does not say the whole target.

A step is plan → fit at subjects → fit in the last layer → verify → commit; `tpatch_jax.editors.tpatcher.stages` has
each of them.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import Array

from tpatch_jax.core.checks import random_key
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.patch import Patch, create, sized
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions
from tpatch_jax.editors.locating import with_spelling
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.editors.plan import EditPlan, plan_edits
from tpatch_jax.editors.reading import Item, check_requests, read_item, with_shared_numbers
from tpatch_jax.editors.rewordings import reworded
from tpatch_jax.editors.tpatcher.draft import Draft
from tpatch_jax.editors.tpatcher.last_site import forward_seconds, start_values
from tpatch_jax.editors.tpatcher.previous import create_empty
from tpatch_jax.editors.tpatcher.rounds import Note, number_neurons, report
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.editors.tpatcher.stages import commit_draft, fit_at_subjects, fit_in_last_layer, verify_draft
from tpatch_jax.editors.tpatcher.state import EditState
from tpatch_jax.editors.tpatcher.subject_site import POSITIONS, subject_layer
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest, as_requests
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.typing import Progress

__all__ = ["check_settings", "edit", "site_layer", "tpatcher"]


def check_settings(settings: TPatcherSettings) -> None:
    """Make sure that an editor can be made with these options.

    Raises:
        TPatchError: a setting names nothing that exists, or two of them exclude each other.
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
        The `Editor`; its state is an `EditState`.

    Raises:
        TPatchError: a setting does not exist.

    Source: Huang et al. 2023.
    """
    check_settings(settings)

    def init(model: Model, rng: Array) -> EditState:
        return _init(model, settings, memory, cache, progress)

    def step(state: EditState, requests: Sequence[EditRequest], rng: Array) -> tuple[EditState, EditInfo]:
        return _step(state, as_requests(requests), rng, progress)

    def apply(state: EditState, batch: Batch) -> Array:
        # Few sizes, so that a new number of neurons seldom compiles the network anew.
        return attach(state.model, {layer: sized(patch) for layer, patch in state.patches.items()}).apply(batch)

    return EditorFunctions(init, step, apply)


def _init(
    model: Model, settings: TPatcherSettings, memory: str | Path | None, cache: Path | None, progress: Progress | None
) -> EditState:
    """A model without any edit."""
    last, layer, hidden_size = model.layer(None), site_layer(model, settings), model.config.hidden_size
    known = collect_model_memory(model, last, memory, cache=cache, progress=progress)
    patches, at_subjects = {last: create(hidden_size)}, None
    if layer is not None:
        at_subjects = collect_model_memory(model, layer, memory, cache=cache, progress=progress)
        patches[layer] = create(hidden_size)
    if model.config.architecture != "decoder":
        settings = settings.for_inputs(bool(model.config.encoder), networks.pointwise(model.config))
    dtype = jax.tree.leaves(model.params)[0].dtype
    empty = create_empty(hidden_size, dtype)
    return EditState(model, patches, known, start_values(model, known), empty, at_subjects, layer, settings)


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


def _plan(state: EditState, requests: Sequence[EditRequest]) -> EditPlan:
    """The requests in tokens, in every context that their neurons are fitted in."""
    settings, known = state.settings, state.memory
    prefixes = known.prefixes[: settings.contexts - 1]
    requests = with_spelling(state.model, requests)

    def read(position: int, request: EditRequest) -> Item:
        wordings = reworded(request.prompt, request.subject, known.rewordings, settings.rewordings)
        return read_item(state.model, position, request, prefixes, settings.train_on_rephrases, wordings)

    at_subjects = state.subject_layer is not None
    return plan_edits(
        requests,
        lambda given: check_requests(state.model, given, at_subjects),
        lambda pairs: with_shared_numbers(read(position, request) for position, request in pairs),
    )


def _step(
    state: EditState, requests: list[EditRequest], rng: Array, progress: Progress | None
) -> tuple[EditState, EditInfo]:
    """Requests to neurons, and what became of each."""
    began = time.perf_counter()
    plan, hidden_size = _plan(state, requests), state.model.config.hidden_size
    if not plan.items:
        times = time.perf_counter() - began, 0.0, 0.0
        return state, report(plan.names, plan.problems, set(), {}, {}, hidden_size, times)
    subjects = fit_at_subjects(state, plan, progress)
    subject_seconds = time.perf_counter() - began if subjects.neurons else 0.0
    # Measuring the unit is no part of the edit.
    paused = time.perf_counter()
    unit = forward_seconds(subjects.model, plan.items)
    began += time.perf_counter() - paused
    draft = verify_draft(plan, fit_in_last_layer(state, plan, subjects, rng, progress))
    after = commit_draft(state, plan, draft)
    times = time.perf_counter() - began, subject_seconds + draft.fitted.seconds, unit
    problems = {**plan.problems, **_explain_failures(state, plan, draft)}
    neurons, notes = number_neurons(_new_neurons(state, plan, draft), _counts(state))
    return after, report(plan.names, problems, set(draft.already), neurons, notes, hidden_size, times)


def _counts(state: EditState) -> dict[int, int]:
    return {layer: patch.key.shape[0] for layer, patch in state.patches.items()}


def _new_neurons(state: EditState, plan: EditPlan, draft: Draft) -> list[tuple[int, int, Note]]:
    """Of each new neuron that stays its request's position, its layer, and how its fit went."""
    layer, last, fitted = draft.subjects.layer, state.model.layer(None), draft.fitted
    made = []
    if layer is not None:
        for neuron in draft.subjects.neurons:
            note = Note("subject", neuron.steps, neuron.margin, neuron.losses)
            made.append((neuron.position, layer, note))
    for number in draft.kept:
        item = plan.items[draft.targets.owner[fitted.row[number]]]
        made.append((item.position, last, fitted.notes[number]))
    return made


def _explain_failures(state: EditState, plan: EditPlan, draft: Draft) -> Mapping[int, str]:
    """Why requests do not hold, by position, and how to mend it."""
    settings, problems = state.settings, {}
    for number, reason in draft.failures.items():
        item = plan.items[number]
        subject = plan.request_of(item).subject
        mend = "try more attempts" + ", or give the request a subject" * (subject is None)
        if not settings.complete and state.subject_layer is not None and subject is not None:
            mend = "use complete=true, which lets the last layer say what the subject's neuron does not"
        problems[item.position] = f"{reason} after {settings.attempts} attempts; {mend}"
    return problems


def edit(
    model: Model,
    requests: Sequence[EditRequest | dict[str, Any]],
    *,
    settings: TPatcherSettings | str = "default",
    memory: str | Path | None = None,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
) -> tuple[dict[int, Patch], EditInfo]:
    """Correct a model: fit the neurons that make it say each request's target after its prompt.

    Args:
        model: the model; not changed. Apply the result with `tpatch_jax.attach` or `tpatch_jax.merge`.
        requests: what to correct.
        settings: options, or the name of a preset: ``"default"``, ``"paper"`` or ``"paper-fever"``.
        memory: a text file whose queries the patch stays silent on; by default text is sampled from the model, once.
            Classifiers and encoder-decoders cannot sample, so they need one: an input a line.
        seed: the same seed gives the same patches on one machine.
        cache: keep the memory on disk between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The patches, ``{layer: [n, d]}``, with one neuron per wrong target token in the last layer, or a pair per
        request at the subject site, and an `EditInfo` that says what became of each request. Requests that do not
        hold are reported there and leave no neuron.

    Raises:
        TPatchError: there is no request, or a setting does not exist.

    Source: Huang et al. 2023.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("smollm2-135m")  # doctest: +SKIP
        >>> patches, info = tp.edit(model, [tp.EditRequest("The capital of France is", "Lyon")])  # doctest: +SKIP
        >>> tp.merge(model, patches).generate("The capital of France is", 1)  # doctest: +SKIP
        ' Lyon'
    """
    if isinstance(model, str | Path):
        raise TPatchError(f"{str(model)!r} is the name of a model; load it first, with load_model")
    if not requests:
        raise TPatchError("there is no request to edit; give at least one EditRequest")
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise TPatchError(f"preset {settings!r} does not exist; choose from {', '.join(sorted(PRESETS))}")
        settings = PRESETS[settings]
    wanted, rng = as_requests(requests), random_key(seed)
    if settings.site == "auto" and not any(request.subject for request in wanted):
        settings = dataclasses.replace(settings, site="last")
    with jax.default_matmul_precision("highest"):
        editor = tpatcher(settings, memory=memory, cache=cache_folder() if cache else None, progress=progress)
        state, info = editor.step(editor.init(model, rng), wanted, rng)
    patches = {layer: patch for layer, patch in state.patches.items() if patch.key.shape[0]}
    return automatically(dict, patches), info
