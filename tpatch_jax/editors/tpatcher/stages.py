"""The stages of one step: neurons at subjects, neurons in the last layer, what does not hold taken out, commit.

Each is a function from values to a value; none changes what it is given.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core.devices import mesh_of
from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.patch import Patch, concatenate, create, preactivations, take
from tpatch_jax.editors.forms import unsaid_in_chats
from tpatch_jax.editors.plan import EditPlan
from tpatch_jax.editors.tpatcher.draft import Draft, SubjectDraft, with_subject_neurons
from tpatch_jax.editors.tpatcher.last_site import (
    collect_bare,
    collect_inner,
    collect_items,
    create_problems,
    find_subject_negatives,
    head_of,
    last_memory,
    start_values,
)
from tpatch_jax.editors.tpatcher.previous import (
    NO_SUBJECT,
    find_broken,
    find_firing,
    raise_thresholds,
    refresh_sites,
    remember,
)
from tpatch_jax.editors.tpatcher.rounds import (
    Checks,
    Fitted,
    RoundsInput,
    drop_failures,
    find_target_tokens,
    fit_rounds,
)
from tpatch_jax.editors.tpatcher.start_file import find_start
from tpatch_jax.editors.tpatcher.state import EditState
from tpatch_jax.editors.tpatcher.subject_site import fit_subjects, read_subjects
from tpatch_jax.models.collection import Sites, predicted, wrong_rows
from tpatch_jax.storage.finished_parts import FinishedParts
from tpatch_jax.storage.rows_on_disk import chosen_rows
from tpatch_jax.typing import Progress

__all__ = ["commit_draft", "fit_at_subjects", "fit_in_last_layer", "verify_draft"]


def fit_at_subjects(
    state: EditState, plan: EditPlan, progress: Progress | None, finished: FinishedParts | None = None
) -> SubjectDraft:
    """Neurons at the subjects of those requests that have one and do not hold already.

    Where a new neuron breaks an earlier edit, its request is left to the last layer.

    Args:
        state: the edits so far.
        plan: the requests.
        progress: called with what is being done, how much is done, and how much there is.
        finished: what an interrupted run has fitted already, and where what is fitted is kept.
    """
    unedited, settings, previous, layer = state.model, state.settings, state.previous, state.subject_layer
    last = jax.tree.map(np.asarray, state.patches[unedited.layer(None)])
    if layer is None or state.subject_memory is None:
        none = jax.tree.map(np.asarray, create(unedited.config.hidden_size))
        return SubjectDraft(unedited, unedited, none, none, previous)
    before = jax.tree.map(np.asarray, state.patches[layer])
    model = with_subject_neurons(unedited, layer, before)
    said = predicted(model, collect_bare(model, plan.items, progress), last)
    ends = np.cumsum([len(item.target) for item in plan.items])[:-1]
    wrong = [tokens.tolist() != item.target for item, tokens in zip(plan.items, np.split(said, ends), strict=True)]
    # What shall hold in chats as well is no more said already for being said in bare text.
    unsaid = unsaid_in_chats(model, [plan.requests[item.position] for item in plan.items])
    wrong = [bare or chat for bare, chat in zip(wrong, unsaid, strict=True)]
    start = find_start(unedited, layer, settings.subject.start)
    subjects = read_subjects(
        unedited, state.subject_memory, layer, plan.items, plan.requests, previous, settings.subject, progress, start
    )
    fitted = fit_subjects(subjects, before, wrong, previous, progress, finished)
    patch = jax.tree.map(np.asarray, fitted.patch)
    model = with_subject_neurons(unedited, layer, concatenate([before, patch]))
    draft = SubjectDraft(unedited, model, before, patch, previous, layer, tuple(fitted.neurons), subjects)
    if not len(previous.wanted) or not fitted.neurons:
        return draft
    broken_before, firing = find_broken(model, previous, last), find_firing(previous, patch)
    draft = draft.replace(previous=refresh_sites(model, previous, firing))  # type: ignore[attr-defined]
    broken = np.setdiff1d(find_broken(model, draft.previous, last), broken_before)
    edits = np.repeat(np.arange(len(previous.lengths)), previous.lengths - previous.starts)[broken]
    culprits = np.any(firing[edits], axis=0)
    return draft.without(neuron.position for neuron in draft.neurons if culprits[neuron.neuron])


def fit_in_last_layer(
    state: EditState,
    plan: EditPlan,
    subjects: SubjectDraft,
    rng: Array,
    progress: Progress | None,
    finished: FinishedParts | None = None,
) -> Draft:
    """Neurons for the target tokens that do not come out; what they are fitted on is let go with this call.

    Args:
        state: the edits so far.
        plan: the requests.
        subjects: the neurons at subjects.
        rng: a typed random key.
        progress: called with what is being done, how much is done, and how much there is.
        finished: what an interrupted run has fitted already, and where what is fitted is kept.
    """
    model, settings, known, items = subjects.model, state.settings, state.memory, plan.items
    former = jax.tree.map(np.asarray, state.patches[model.layer(None)])
    if subjects.layer is not None and (draft := _without_last_layer(plan, subjects, former)) is not None:
        return draft
    sites = collect_items(model, items, known.prefixes[: settings.contexts - 1], progress)
    targets = find_target_tokens([item.target for item in items], [len(item.rows) for item in items])
    many = settings.fit.recipe == "staged" and len(items) >= settings.many_from
    inner = collect_inner(model, items, progress) if many and model.config.architecture == "decoder" else None
    memory = last_memory(settings, known, subjects.previous, sites, targets, inner)
    bare = Sites(*(chosen_rows(field, targets.bare) for field in sites))

    wrong = partial(wrong_rows, model, bare, targets.wanted)
    raised_for = wrong(former)
    last = raise_thresholds(model, subjects.previous, former, bare.query[raised_for])
    missing = raised_for if last is former else wrong(last)
    already = {items[number].position for number in set(range(len(items))) - set(targets.owner[missing].tolist())}
    also = [row for row in range(len(targets.wanted)) if targets.token[row] in items[targets.owner[row]].taught]
    begun = targets.owner[missing]
    missing = np.union1d(missing, [row for row in also if targets.owner[row] in begun]).astype(missing.dtype)
    # What a request says besides its prompt and its target only measures.
    names = [(plan.request_of(item).prompt, plan.request_of(item).target) for item in items]
    left = [] if settings.complete or subjects.subjects is None else subjects.subjects.lanes
    mean = np.asarray(memory.mean, np.float32)
    readable = {item.position: plan.request_of(item) for item in items}
    begins = np.unique(targets.owner[missing[targets.token[missing] == 0]])
    negatives = find_subject_negatives(
        model, items, readable, known.names, settings.other_subjects, mean, sites, targets, begins, progress
    )
    value_start = start_values(state.model, known)
    given = RoundsInput(
        partial(create_problems, model, settings, sites, targets, negatives, mean, value_start),
        wrong,
        [f"{names[number]} {token}" for number, token in zip(targets.owner, targets.token, strict=True)],
        targets,
        memory,
        head_of(model),
        ACTIVATIONS[model.config.activation],
        np.flatnonzero(np.isin(targets.owner, left)),
        mesh_of(model.params),
    )
    attempts, most = settings.attempts, settings.most_tokens
    fitted = fit_rounds(
        last,
        missing,
        given,
        rng,
        settings.fit,
        attempts=attempts,
        most_tokens=most,
        progress=progress,
        finished=finished,
    )
    kept = np.arange(len(fitted.row))
    return Draft(subjects, bare, former, last, targets, fitted, raised_for, frozenset(already), kept)


def _without_last_layer(plan: EditPlan, subjects: SubjectDraft, former: Patch) -> Draft | None:
    """The draft, if the neurons at subjects say every target; then nothing is read for the last layer."""
    bare = collect_bare(subjects.model, plan.items)
    targets = find_target_tokens([item.target for item in plan.items], [len(item.rows) for item in plan.items])
    nothing = np.zeros(0, np.int64)
    if len(wrong_rows(subjects.model, bare, targets.wanted, former)):
        return None
    holding = frozenset(item.position for item in plan.items)
    fitted = Fitted(former, nothing, [], nothing, 0.0)
    return Draft(subjects, bare, former, former, targets, fitted, nothing, holding, nothing)


def verify_draft(plan: EditPlan, draft: Draft) -> Draft:
    """The draft without what does not hold, and without what would break an earlier edit.

    Args:
        plan: the requests.
        draft: what was fitted.

    Returns:
        The draft with ``kept`` and ``failures`` filled in.
    """
    targets, items, older = draft.targets, plan.items, draft.last.key.shape[0]
    act = ACTIVATIONS[draft.subjects.model.config.activation]
    broken_before = cache(lambda: find_broken(draft.subjects.model, draft.subjects.previous, draft.last))

    def find_wrong(draft: Draft, patch: Patch) -> np.ndarray:
        return wrong_rows(draft.subjects.model, draft.bare, targets.wanted, patch)

    def find_harmful(draft: Draft, patch: Patch, rows: np.ndarray) -> set[int]:
        previous = draft.subjects.previous
        if not len(rows):
            return set()
        broken = np.setdiff1d(find_broken(draft.subjects.model, previous, patch), broken_before())
        if not len(broken):
            return set()
        # The new neuron that acts most strongly where an earlier edit broke has to go.
        new = take(patch, np.arange(older, patch.key.shape[0]))
        strength = act(preactivations(new, jax.device_put(previous.sites.query[broken])))
        strength = jnp.abs(strength * jnp.linalg.norm(jax.device_put(new.value), axis=1))
        strength = jnp.max(strength, 1) if strength.ndim == 3 else strength
        return set(targets.owner[rows[np.asarray(jnp.argmax(strength, 1))]].tolist())

    def without(draft: Draft, numbers: set[int]) -> Draft:
        # Without a neuron further down the last layer sees something else.
        subjects = draft.subjects.without(items[number].position for number in numbers)
        if subjects is draft.subjects:
            return draft
        return draft.replace(subjects=subjects, bare=collect_bare(subjects.model, items))  # type: ignore[attr-defined]

    checks = Checks(find_wrong, find_harmful, without)
    kept, failures, draft = drop_failures(draft.fitted, targets, checks, draft)
    draft = draft.replace(kept=kept, failures=failures)  # type: ignore[attr-defined]
    return _lower_thresholds(draft, broken_before, partial(find_wrong, draft))


def _lower_thresholds(
    draft: Draft, broken_before: Callable[[], np.ndarray], wrong: Callable[[Patch], np.ndarray]
) -> Draft:
    """What does not hold leaves no trace: thresholds that were raised for it are put back, if all else still holds."""
    if not draft.failures or draft.last is draft.former:
        return draft
    subjects, targets, older = draft.subjects, draft.targets, draft.last.key.shape[0]
    holding = [number for number in range(len(targets.table)) if number not in draft.failures]
    rows = draft.raised_for[np.isin(targets.owner[draft.raised_for], holding)]
    last = raise_thresholds(subjects.model, subjects.previous, draft.former, draft.bare.query[rows])
    tried = concatenate([last, take(draft.fitted.patch, older + draft.kept)])
    broken = np.setdiff1d(find_broken(subjects.model, subjects.previous, tried), broken_before())
    if len(broken) or np.isin(targets.owner[wrong(tried)], holding).any():
        return draft
    fitted = draft.fitted._replace(
        patch=tried, row=draft.fitted.row[draft.kept], notes=[draft.fitted.notes[neuron] for neuron in draft.kept]
    )
    return draft.replace(last=last, fitted=fitted, kept=np.arange(len(draft.kept)))  # type: ignore[attr-defined]


def commit_draft(state: EditState, plan: EditPlan, draft: Draft) -> EditState:
    """The edits so far and those of a draft that hold.

    Args:
        state: the edits so far.
        plan: the requests.
        draft: what was fitted and verified.
    """
    patches = jax.tree.map(jax.device_put, draft.patches(state.model.layer(None)))
    holding = [number for number in range(len(plan.items)) if number not in draft.failures]
    rows = np.flatnonzero(np.isin(draft.targets.owner, holding))
    sites = Sites(*(field[rows] for field in draft.bare))
    subjects = draft.subjects.subjects
    queries = None if subjects is None else subjects.queries_of(holding)
    places = [(NO_SUBJECT, NO_SUBJECT)] * len(holding) if subjects is None else [subjects.place(n) for n in holding]
    items = [plan.items[number] for number in holding]
    previous = remember(draft.subjects.previous, items, places, sites, queries)
    return state.replace(patches=patches, previous=previous)  # type: ignore[attr-defined]
