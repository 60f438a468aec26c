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

from tpatch_jax.core.arguments import as_path, check_call, check_kind
from tpatch_jax.core.checks import as_key, random_key
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.int8 import float_type
from tpatch_jax.core.patch import Patch, create, sized
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions
from tpatch_jax.editors.locating import with_spelling
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.editors.plan import EditPlan, plan_edits
from tpatch_jax.editors.reading import Item, check_requests, read_item, with_shared_numbers
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.rewordings import reworded
from tpatch_jax.editors.tpatcher.draft import Draft
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.editors.tpatcher.previous import create_empty
from tpatch_jax.editors.tpatcher.rounds import Note, number_neurons, report
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings, as_settings, check_settings
from tpatch_jax.editors.tpatcher.stages import commit_draft, fit_at_subjects, fit_in_last_layer, verify_draft
from tpatch_jax.editors.tpatcher.start_file import AUTO, find_start
from tpatch_jax.editors.tpatcher.state import EditState
from tpatch_jax.editors.tpatcher.subject_site import subject_layer
from tpatch_jax.embeddings import EmbeddingPrompt
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.networks import Batch
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest, as_requests, check_ids
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.storage.finished_parts import FinishedParts
from tpatch_jax.typing import Progress

__all__ = ["check_settings", "edit", "site_layer", "tpatcher"]

TEXT_FILE = "a text file; give its path"


def tpatcher(
    settings: TPatcherSettings | Mapping[str, Any] | str = "default",
    *,
    memory: str | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    finished: FinishedParts | None = None,
) -> Editor:
    """The T-Patcher editor.

    Args:
        settings: its options, as `edit` takes them.
        memory: a text file for the query memory; by default text is sampled from the model.
        cache: folder where memories are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.
        finished: of an editor that takes a single step, what an interrupted run has fitted already, and where what is
            fitted is kept.

    Returns:
        The `Editor`; its state is an `EditState`.

    Raises:
        TPatchError: a setting does not exist.

    Source: Huang et al. 2023.
    """
    call = "tpatcher(settings, memory=…, progress=…)"
    settings = as_settings(settings)
    check_settings(settings)
    memory = None if memory is None else as_path(memory, call, TEXT_FILE)
    check_call(progress=progress)

    def init(model: Model, rng: Array) -> EditState:
        check_loaded(model, "editor.init(model, rng)")
        return _init(model, settings, memory, cache, progress)

    def step(state: EditState, requests: Sequence[EditRequest], rng: Array) -> tuple[EditState, EditInfo]:
        check_kind(state, EditState, "editor.step(state, requests, rng)", "a state; give what init or step returned")
        key = as_key(rng)
        return step_once(state.model, requests, lambda given: _step(state, given, key, progress, finished))

    def apply(state: EditState, batch: Batch) -> Array:
        check_kind(state, EditState, "editor.apply(state, batch)", "a state; give what init or step returned")
        # Few sizes, so that a new number of neurons seldom compiles the network anew.
        return attach(state.model, {layer: sized(patch) for layer, patch in state.patches.items()}).apply(batch)

    return EditorFunctions(init, step, apply)


def _init(
    model: Model, settings: TPatcherSettings, memory: str | Path | None, cache: Path | None, progress: Progress | None
) -> EditState:
    """A model without any edit."""
    last, layer, hidden_size = model.layer(None), site_layer(model, settings), model.config.hidden_size
    if layer is not None and settings.subject.start != AUTO:
        find_start(model, layer, settings.subject.start)  # before the work begins
    texts: list[list[int]] = []
    known = collect_model_memory(model, last, memory, cache=cache, progress=progress, texts=texts)
    patches, at_subjects = {last: create(hidden_size)}, None
    if layer is not None:
        at_subjects = collect_model_memory(model, layer, memory, cache=cache, progress=progress, texts=texts)
        patches[layer] = create(hidden_size)
    if model.config.architecture != "decoder":
        inputs = "image" if model.config.image is not None else "audio" if model.audio is not None else "text"
        settings = settings.for_inputs(bool(model.config.encoder), networks.pointwise(model.config), inputs)
    dtype = float_type(model.params)
    empty = create_empty(hidden_size, dtype)
    return EditState(model, patches, known, empty, at_subjects, layer, settings)


def site_layer(model: Model, settings: TPatcherSettings) -> int | None:
    """The layer of the subject site, if that is used; a model too low for it is edited in the last layer."""
    if settings.layer != "auto":
        model.layer(int(settings.layer))  # one that is not there is a mistake where it is not used, too
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
    raise TPatchError(
        f"layer {layer} is the last one of {model.name!r}, where nothing reads any more what a neuron adds at the "
        "subject; use site=last" + ", or a lower layer" * (model.config.layers > 1)
    )


def _plan(state: EditState, requests: Sequence[EditRequest]) -> EditPlan:
    """The requests in tokens, in every context that their neurons are fitted in."""
    settings, known = state.settings, state.memory
    prefixes = known.prefixes[: settings.contexts - 1]
    if state.model.audio is not None:
        prefixes = ("",) * (settings.contexts - 1)
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
    state: EditState,
    requests: list[EditRequest],
    rng: Array,
    progress: Progress | None,
    finished: FinishedParts | None,
) -> tuple[EditState, EditInfo]:
    """Requests to neurons, and what became of each."""
    began = time.perf_counter()
    plan, hidden_size = _plan(state, requests), state.model.config.hidden_size
    if not plan.items:
        times = time.perf_counter() - began, 0.0, 0.0
        return state, report(plan.names, plan.problems, set(), {}, {}, hidden_size, times)
    subjects = fit_at_subjects(state, plan, progress, finished)
    subject_seconds = time.perf_counter() - began if subjects.neurons else 0.0
    # Measuring the unit is no part of the edit.
    paused = time.perf_counter()
    unit = forward_seconds(state.model, plan.items)
    began += time.perf_counter() - paused
    draft = verify_draft(plan, fit_in_last_layer(state, plan, subjects, rng, progress, finished))
    after = commit_draft(state, plan, draft)
    times = time.perf_counter() - began, subject_seconds + draft.fitted.seconds, unit
    problems = {**plan.problems, **_explain_failures(state, plan, draft)}
    neurons, notes = number_neurons(_new_neurons(state, plan, draft), _counts(state))
    info = report(plan.names, problems, set(draft.already), neurons, notes, hidden_size, times)
    return after, _with_site_reasons(state, requests, info)


def _with_site_reasons(state: EditState, requests: Sequence[EditRequest], info: EditInfo) -> EditInfo:
    """The report, which says of each edit in the last layer why it is there, if something else was asked for."""
    settings, config, results = state.settings, state.model.config, []
    for request, result in zip(requests, info.requests, strict=True):
        reason = result.reason
        if result.status == "edited" and result.site == "last" and result.neurons and settings.site != "last":
            if request.subject is None:
                reason = "edited in the last layer: it has no subject" * (settings.site == "subject")
            elif state.subject_layer is None and config.architecture != "decoder":
                reason = f"edited in the last layer: an {config.architecture} has no other site"
            elif state.subject_layer is None:
                layers = f"the {config.layers} layers" if config.layers > 1 else "one layer"
                reason = f"edited in the last layer: with {layers} of {state.model.name!r} no lower one is chosen"
                reason += "; site=subject and layer=0 choose one" * (config.layers > 1)
            else:
                reason = "edited in the last layer: the neuron at its subject added nothing"
        results.append(result._replace(reason=reason))
    return info._replace(requests=tuple(results))


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


@automatically
def edit(
    model: Model,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    *,
    settings: TPatcherSettings | Mapping[str, Any] | str = "default",
    memory: str | Path | None = None,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
    finished: FinishedParts | None = None,
) -> tuple[dict[int, Patch], EditInfo]:
    """Correct a model: fit the neurons that make it say each request's target after its prompt.

    Args:
        model: the model; not changed. Apply the result with `tpatch_jax.attach` or `tpatch_jax.merge`.
        requests: what to correct.
        settings: options; the name of a preset, ``"default"``, ``"paper"`` or ``"paper-fever"``; or changes by name,
            such as ``{"site": "last", "fit.key_steps": 32}``, where ``"preset"`` says to which if not the default.
        memory: a text file whose queries the patch stays silent on; by default text is sampled from the model, once.
            Classifiers and encoder-decoders cannot sample, so they need one: an input a line.
        seed: the same seed gives the same patches on one machine.
        cache: keep the memory on disk between runs.
        progress: called with what is being done, how much is done, and how much there is.
        finished: what an interrupted run of the same arguments has fitted already, and where what is fitted is kept.

    Returns:
        The patches, ``{layer: [n, d]}``, with one neuron per wrong target token in the last layer, or a pair per
        request at the subject site, and an `EditInfo` that says what became of each request. Requests that do not
        hold are reported there and leave no neuron.

    Raises:
        TPatchError: there is no request, two have one id, a setting does not exist, or an argument is of another kind.

    Source: Huang et al. 2023.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("smollm2-135m")  # doctest: +SKIP
        >>> patches, info = tp.edit(model, [tp.EditRequest("The capital of France is", "Lyon")])  # doctest: +SKIP
        >>> tp.merge(model, patches).generate("The capital of France is", 1)  # doctest: +SKIP
        ' Lyon'
    """
    check_loaded(model, "edit(model, requests)")
    check_kind(cache, bool, "edit(…, cache=…)", "True or False")
    wanted, rng, settings = as_requests(requests), random_key(seed), as_settings(settings)
    if not wanted:
        raise TPatchError("there is no request to edit; give at least one EditRequest")
    check_ids(wanted)
    embedded = any(isinstance(request.prompt, EmbeddingPrompt) for request in wanted)
    if settings.site == "auto" and (embedded or not any(request.subject for request in wanted)):
        settings = dataclasses.replace(settings, site="last")
    with jax.default_matmul_precision("highest"):
        place = cache_folder() if cache else None
        editor = tpatcher(settings, memory=memory, cache=place, progress=progress, finished=finished)
        state, info = editor.step(editor.init(model, rng), wanted, rng)
    patches = {layer: patch for layer, patch in state.patches.items() if patch.key.shape[0]}
    return patches, info
