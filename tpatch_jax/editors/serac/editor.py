"""SERAC as an editor: a memory of edits, a classifier of what is in their scope, a small model that answers there."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax import Array

from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions, RequestInfo, Routing
from tpatch_jax.editors.reading import check_requests, read_item
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.routed import apply_routed, routed_answers
from tpatch_jax.editors.serac.networks import (
    SeracNetworks,
    context_tokens,
    edit_text,
    embedding_flops,
    embeddings,
    read_networks,
)
from tpatch_jax.editors.stored import find_kept, name_request, restore_stored, save_stored
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Arrays, Progress

__all__ = [
    "SERAC_PRESETS",
    "SeracSettings",
    "SeracState",
    "forget",
    "restore_memory",
    "route",
    "routing",
    "save_memory",
    "says",
    "serac",
]


@dataclass(frozen=True)
class SeracSettings:
    """Options of SERAC.

    Attributes:
        serac: the folder of the two networks, which ``tpatch serac-train`` writes.
        scope_threshold: the least similarity, 0 to 1, at which an input is in an edit's scope; the authors' is 1/2.

    Raises:
        TPatchError: a value makes no sense.
    """

    serac: str = ""
    scope_threshold: float = 0.5

    def __post_init__(self) -> None:
        """Checks the values."""
        if not 0 < self.scope_threshold <= 1:
            raise TPatchError(f"scope_threshold is {self.scope_threshold}; give a number above 0 and up to 1")


SERAC_PRESETS: Mapping[str, SeracSettings] = {"default": SeracSettings()}
"""Named settings of SERAC: ``default``, its authors' threshold.

Source: Mitchell et al. 2022.
"""


class SeracState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the base model, which never changes.
        networks: the scope classifier and the counterfactual model.
        requests: the memory, in the order of the edits; prompt and target stay apart.
        embeddings: of the memory's edits, ``[edits, d]``.
        settings: the editor's options.
        seen: embeddings of test inputs by their text, kept so that none is computed twice.
    """

    model: Model
    networks: SeracNetworks
    requests: tuple[EditRequest, ...]
    embeddings: np.ndarray
    settings: SeracSettings
    seen: dict[str, np.ndarray]


def serac(settings: SeracSettings = SERAC_PRESETS["default"], *, progress: Progress | None = None) -> Editor:
    """The SERAC editor: no parameter changes, edits are put into a memory.

    ``sim = exp(−‖e_edit − e_input‖²)`` between each stored edit, prompt and target, and the test input. Where the most
    similar edit has 1/2 or more the counterfactual model reads that edit's prompt, its target and the test input and
    answers; everywhere else the base model does, bit for bit. A later edit of the same prompt goes before an earlier
    one. `forget` takes edits out again, exactly.

    ``apply`` knows no prompts, so the scope is decided on each row as a whole, padding (zeros at the end) left out; an
    evaluation and generation decide on the prompt.

    Args:
        settings: its options.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `SeracState`.

    Raises:
        TPatchError: on ``init``, where the model is no decoder, or the networks are missing or made for another
            tokenizer.

    Source: Mitchell et al. 2022, "Memory-Based Model Editing at Scale"; `tpatch_jax.editors.serac.training.train_serac`
    says where it differs.

    Example:
        >>> editor = serac(SeracSettings("models/serac"))
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
    """

    def init(model: Model, rng: Array) -> SeracState:
        if model.config.architecture != "decoder":
            raise TPatchError(
                f"SERAC needs a decoder, and {model.name!r} is an {model.config.architecture}; use method tpatcher"
            )
        networks = read_networks(settings.serac, model)
        return SeracState(
            model, networks, (), np.zeros((0, networks.scope.config.hidden_size), np.float32), settings, {}
        )

    def step(state: SeracState, requests: Sequence[EditRequest], rng: Array) -> tuple[SeracState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, given, progress))

    return EditorFunctions(init, step, _apply)


# --- which edit, if any ---


def route(state: SeracState, inputs: Sequence[str]) -> list[int | None]:
    """The stored edit in whose scope each test input is.

    Args:
        state: the memory.
        inputs: test inputs as texts.

    Returns:
        For each the position of the edit in the memory, or ``None``.
    """
    if not state.requests:
        return [None] * len(inputs)
    new = [text for text in dict.fromkeys(inputs) if text not in state.seen]
    state.seen.update(zip(new, embeddings(state.networks.scope, new), strict=True))
    # The last edit of each prompt answers for all of them.
    latest = {request.prompt: position for position, request in enumerate(state.requests)}
    result: list[int | None] = []
    for text in inputs:
        similar = np.exp(-np.sum((state.embeddings - state.seen[text]) ** 2, -1, dtype=np.float64))
        best = int(np.argmax(similar))
        inside = similar[best] >= state.settings.scope_threshold
        result.append(latest[state.requests[best].prompt] if inside else None)
    return result


def routing(state: SeracState) -> Routing:
    """How test inputs in tokens go to the counterfactual model.

    Args:
        state: the memory.
    """
    small = state.networks.counterfactual

    def contexts(prompts: Sequence[Sequence[int]]) -> list[list[int] | None]:
        chosen = route(state, [state.model.decode(prompt) for prompt in prompts])
        edits = {
            pick: context_tokens(small, *_stored(state.requests[pick])) for pick in set(chosen) if pick is not None
        }
        return [None if pick is None else edits[pick] for pick in chosen]

    def decision_flops(prompt: Sequence[int]) -> float:
        if not state.requests:
            return 0.0
        # Of each stored edit a difference, its square and a sum.
        return embedding_flops(state.networks.scope, state.model.decode(prompt)) + 3.0 * state.embeddings.size

    return Routing(small, contexts, decision_flops=decision_flops)


def forget(state: SeracState, names: Sequence[str]) -> SeracState:
    """The memory without some edits, as if they had never been made.

    Args:
        state: the memory.
        names: ids of requests.

    Raises:
        TPatchError: there is no edit of that name.

    Example:
        >>> forget(state, ["edit-3"])  # doctest: +SKIP
    """
    kept = find_kept(state.requests, names, "memory")
    return state._replace(
        requests=tuple(state.requests[position] for position in kept), embeddings=state.embeddings[kept]
    )


def _stored(request: EditRequest) -> tuple[str, str, str | None]:
    return request.prompt, request.target, request.join


# --- what is said ---


def says(state: SeracState, requests: Sequence[EditRequest], picks: Sequence[int | None]) -> list[bool]:
    """Whether each request's target comes out after its prompt, where it is known which edit answers.

    Args:
        state: the memory.
        requests: what is asked.
        picks: for each the position of an edit in the memory, or ``None`` where the base model answers.
    """
    small = state.networks.counterfactual
    contexts = [None if pick is None else context_tokens(small, *_stored(state.requests[pick])) for pick in picks]
    return routed_answers(state.model, routing(state), requests, contexts)


def _apply(state: SeracState, batch: Batch) -> Array:
    return apply_routed(state.model, routing(state), batch)


# --- one step ---


def _step(state: SeracState, requests: list[EditRequest], progress: Progress | None) -> tuple[SeracState, EditInfo]:
    began, small = time.perf_counter(), state.networks.counterfactual
    taken = {request.id for request in state.requests}
    names, problems = [request.name(number) for number, request in enumerate(requests)], {}
    for number, reason in check_requests(state.model, requests, False).items():
        problems[number] = reason
    for number, request in enumerate(requests):
        length = 2 * len(small.encode_prompt(request.prompt)) + 2 * len(small.encode(request.target)) + 8
        if number not in problems and length > small.config.context:
            problems[number] = f"prompt and target are read twice, {length} tokens, and the counterfactual model reads "
            problems[number] += f"{small.config.context}; shorten the prompt"
    good = [number for number in range(len(requests)) if number not in problems]
    if progress:
        progress("storing edits", 0, len(good))
    fitting = time.perf_counter()
    named = [name_request(requests[number], names[number], taken) for number in good]
    new = embeddings(state.networks.scope, [edit_text(*_stored(request)) for request in named])
    fit_seconds = time.perf_counter() - fitting
    first = len(state.requests)
    # The networks come in with the first edit that is stored.
    extra = 0 if first or not good else state.networks.parameter_count
    state = state._replace(requests=(*state.requests, *named), embeddings=np.concatenate([state.embeddings, new]))
    picks = route(state, [request.prompt for request in named])
    held = says(state, named, picks)
    if progress:
        progress("storing edits", len(good), len(good))
    results = {number: RequestInfo(names[number], False, "failed", why) for number, why in problems.items()}
    for slot, (number, right, pick) in enumerate(zip(good, held, picks, strict=True)):
        reason = ""
        if not right and pick is None:
            reason = "the prompt counts as out of its edit's scope; lower scope_threshold"
        elif not right and pick != first + slot:
            reason = f"the edit {state.requests[pick or 0].id!r} is nearer to the prompt; take it out"
        elif not right:
            reason = "the counterfactual model does not say the target; train it longer, or with more layers"
        status = "failed" if reason else "edited"
        results[number] = RequestInfo(names[number], right, status, reason and f"{reason} (the edit stays stored)")
    seconds = time.perf_counter() - began
    items = [read_item(state.model, number, requests[number], (), False) for number in good]
    unit = forward_seconds(state.model, items)
    scale = 1 / (len(requests) * unit) if unit else 0.0
    ordered = tuple(results[number] for number in range(len(requests)))
    return state, EditInfo(ordered, seconds, fit_seconds, seconds * scale, fit_seconds * scale, new.size + extra)


# --- resuming ---


def save_memory(state: SeracState) -> Arrays:
    """The memory as arrays: embeddings, and the requests as JSON in UTF-8.

    Args:
        state: after some steps.
    """
    return save_stored(state, "embeddings")


def restore_memory(state: SeracState, arrays: Arrays) -> SeracState:
    """The inverse of `save_memory`.

    Args:
        state: fresh, from ``init``.
        arrays: what was saved.
    """
    return restore_stored(state, arrays, "embeddings")


# --- among the methods ---


def _learnt(model: Model, settings: SeracSettings) -> str:
    networks = read_networks(settings.serac, model)
    return f"{fingerprint(networks.scope)} {fingerprint(networks.counterfactual)}"


register_editor(
    Method(
        name="serac",
        presets=SERAC_PRESETS,
        build=lambda settings, memory, cache, progress: serac(settings, progress=progress),
        model=lambda state: state.model,
        save=save_memory,
        restore=restore_memory,
        routing=routing,
        learnt=_learnt,
        undo="exact",
        stock_checkpoint=False,
    )
)
