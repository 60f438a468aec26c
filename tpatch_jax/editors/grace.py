"""GRACE: a codebook beside one feed-forward network, whose values stand in for its output near the edits' queries.

An entry is a key, a radius and a value. A query is what the network reads at a token; where the nearest key is within
its radius, the entry's value replaces what the network says, and everywhere else the model is the unedited one, bit for
bit. Where the authors' paper leaves a choice, or their code differs from it, this file reads them so:

- The key of an edit is the query at the prompt's last token, where the target's first token is said (of a classifier at
  the token that it reads). One value there has to bring about the whole target, whose later tokens see it through
  attention; so the layer is an earlier one, about three quarters of the way up, as the authors choose it.
- Every token has its query compared with the keys, not the prompt's last alone: what an adapter does at a token depends
  on that token, so prompts, batches and generated text need no bookkeeping. Their code compares the last token that is
  read, and can put the value at that token or at all before it; this is the first.
- Radii are given in units of the key's length, so that one number suits networks whose queries differ in size.
- A value starts as the unedited output (their code has this and a random start) and is trained by Adam on the mean
  negative log-likelihood of the target, until that is low and each token comes out, or the steps are over.

A new edit goes into the codebook by the paper's rules. With ``d`` the distance to the nearest key, ``ε`` its radius and
``ε₀`` that of a new entry:

==========================  ==============================================================================
``d > ε + ε₀``              a new entry of radius ``ε₀``
nearer, the same target     no new entry; the nearest key's radius becomes ``max(ε, d)``
nearer, another target      a new entry; its radius and the nearest key's become ``d/2``
the same query              the later edit takes the entry's place, with the radius that it has
==========================  ==============================================================================

The last one is ours, for two keys in one place cannot share radii; it is what an edit of the same prompt means.

Source: Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", NeurIPS 2023.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Bool, Float, Int

from tpatch_jax.core import ffn
from tpatch_jax.core.sizes import power_of_two, round_up
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions, RequestInfo
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.stored import find_kept, name_request, restore_stored, save_stored
from tpatch_jax.editors.tpatcher.last_site import collect_bare, forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.collection import batches, predicted
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch, Trace
from tpatch_jax.models.patching import attach_adapters
from tpatch_jax.models.rows import place_in
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Arrays, Params, Progress

__all__ = [
    "GRACE_PRESETS",
    "Codebook",
    "GraceSettings",
    "GraceState",
    "edited_model",
    "forget",
    "grace",
    "grace_layer",
    "restore_edits",
    "save_edits",
    "train_entries",
]

HEIGHT = 0.75
"""How far up ``layer=auto`` is; the authors take layer 35 of the 48 of GPT-2 XL."""

SAME = 1e-3
"""Queries nearer than this, in units of their length, are the same: radii of half of it would be lost in rounding."""

ENTRIES = 8
"""A codebook counts as so many entries at least, so that few sizes are compiled."""

TOGETHER = 16
"""So many values at most are trained at a time."""


@dataclasses.dataclass(frozen=True)
class GraceSettings:
    """Options of GRACE.

    Attributes:
        layer: ``"auto"``, see `grace_layer`, or a number.
        epsilon: ``ε₀``, the radius of a new entry, in units of its key's length.
        edit_steps: at most so many steps of Adam for a value.
        edit_rate: Adam's learning rate, in units of the root mean square of the unedited output there.
        nll_enough: a value is done once each token of its target comes out and their mean negative log-likelihood, in
            nats, is below this.
        keep_failed: keep an entry whose target does not come out, as the authors do.

    Raises:
        TPatchError: a value makes no sense.
    """

    layer: str = "auto"
    epsilon: float = 0.1
    edit_steps: int = 100
    edit_rate: float = 0.5
    nll_enough: float = 0.05
    keep_failed: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.layer != "auto" and not self.layer.isdigit():
            raise TPatchError(f"layer {self.layer!r} is not a layer; use layer=auto or a number")
        if self.edit_steps < 1:
            raise TPatchError(f"edit_steps is {self.edit_steps}; give 1 or more")
        for name in ("epsilon", "edit_rate", "nll_enough"):
            if not 0 < getattr(self, name) < math.inf:
                raise TPatchError(f"{name} is {getattr(self, name)}; give a positive number")


GRACE_PRESETS: Mapping[str, GraceSettings] = {"default": GraceSettings()}
"""Named settings of GRACE: ``default``; steps are the authors', rate and radius are in other units than theirs."""


# --- the adapter ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebook:
    """The entries, as they join a feed-forward network: a `tpatch_jax.core.adapters.Adapter`.

    Attributes:
        key: ``[entries, d]``.
        radius: ``[entries]``; an entry of negative radius is padding and never fires.
        value: ``[entries, d]``.

    Example:
        >>> book = Codebook(jnp.eye(2), jnp.ones(2), jnp.asarray([[5.0, 5.0], [7.0, 7.0]]))
        >>> book.contribute(jnp.asarray([[0.0, 1.5], [4.0, 4.0]]), jnp.zeros((2, 2))).tolist()
        [[7.0, 7.0], [0.0, 0.0]]
    """

    key: Float[Array, "entries hidden"]
    radius: Float[Array, "entries"]
    value: Float[Array, "entries hidden"]

    def nearest(self, query: Float[Array, "*batch hidden"]) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
        """The entry whose key is nearest to each query, and whether the query is within its radius."""
        query = query.astype(jnp.float32)
        half = 0.5 * jnp.sum(jnp.square(self.key), -1) + jnp.where(self.radius < 0, jnp.inf, 0.0)
        entry = jnp.argmin(half - jnp.matmul(query, self.key.T, precision="highest"), -1)
        # The product finds the nearest one; whether it is near enough is for its exact distance to say.
        distance = jnp.sqrt(jnp.sum(jnp.square(query - self.key[entry]), -1))
        return entry, distance <= self.radius[entry]

    def contribute(
        self, query: Float[Array, "*batch hidden"], output: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch hidden"]:
        """The nearest entry's value where the query is within its radius, else the output as it is."""
        entry, fires = self.nearest(query)
        return jnp.where(fires[..., None], self.value[entry].astype(output.dtype), output)


# --- the codebook's rules, on the host ---


class Entries(NamedTuple):
    """The codebook while it is written, in NumPy: as `Codebook`, and each entry's target."""

    key: np.ndarray
    radius: np.ndarray
    value: np.ndarray
    targets: tuple[str, ...]

    def codebook(self) -> Codebook:
        """As it joins a network, filled up to one of few sizes with entries that never fire."""
        missing = power_of_two(len(self.radius), ENTRIES) - len(self.radius)
        key, value = (np.pad(array, ((0, missing), (0, 0))) for array in (self.key, self.value))
        radius = np.pad(self.radius, (0, missing), constant_values=-1)
        return Codebook(*(jnp.asarray(array, jnp.float32) for array in (key, radius, value)))


def _empty(hidden_size: int) -> Entries:
    none = np.zeros((0, hidden_size), np.float32)
    return Entries(none, np.zeros(0, np.float32), none, ())


class Entered(NamedTuple):
    """The entries with one more edit, the entry that answers for it, and whether that one has its value from it."""

    entries: Entries
    entry: int
    fresh: bool


def _enter(entries: Entries, key: np.ndarray, value: np.ndarray, target: str, epsilon: float) -> Entered:
    """Put one more edit among the entries, by the rules above."""
    length = float(np.linalg.norm(key.astype(np.float64)))
    first, count = epsilon * length, len(entries.radius)
    distances = np.sqrt(np.sum(np.square(entries.key.astype(np.float64) - key), -1))
    nearest = int(np.argmin(distances)) if count else -1
    distance = float(distances[nearest]) if count else math.inf
    if distance <= SAME * length:
        keys, values = entries.key.copy(), entries.value.copy()
        keys[nearest], values[nearest] = key, value
        targets = (*entries.targets[:nearest], target, *entries.targets[nearest + 1 :])
        return Entered(Entries(keys, entries.radius, values, targets), nearest, True)
    radius = entries.radius.copy()
    if count and distance <= radius[nearest] + first:
        if entries.targets[nearest] == target:
            # A hair more than the distance, which rounding may make longer.
            radius[nearest] = max(radius[nearest], distance * (1 + SAME))
            return Entered(entries._replace(radius=radius), nearest, False)
        radius[nearest] = first = distance / 2
    grown = Entries(
        np.concatenate([entries.key, key[None]]),
        np.append(radius, np.float32(first)),
        np.concatenate([entries.value, value[None]]),
        (*entries.targets, target),
    )
    return Entered(grown, count, True)


# --- the editor ---


class GraceState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the unedited model.
        layer: where the codebook is.
        requests: the edits in their order, each under a name that no other has.
        keys: the query of each, ``[edits, d]`` float32.
        values: the value with which each went into the codebook, ``[edits, d]`` float32.
        entries: the codebook that these make.
        settings: the editor's options.
    """

    model: Model
    layer: int
    requests: tuple[EditRequest, ...]
    keys: np.ndarray
    values: np.ndarray
    entries: Entries
    settings: GraceSettings


def grace_layer(config: NetworkConfig, wanted: str = "auto") -> int:
    """The layer of the codebook: three quarters of the way up, below the last layer if there is one.

    Args:
        config: the network's description.
        wanted: ``"auto"`` or a number.

    Raises:
        TPatchError: the network has no such layer.
    """
    if wanted == "auto":
        return max(0, min(round(HEIGHT * (config.layers - 1)), config.layers - 2))
    if int(wanted) >= config.layers:
        raise TPatchError(f"layer {wanted!r} does not exist; use layer=auto or 0 to {config.layers - 1}")
    return int(wanted)


def check_grace(model: Model, settings: GraceSettings) -> int:
    """Make sure that a model can get a codebook with these options.

    Returns:
        The layer.

    Raises:
        TPatchError: it has no such layer, or something is attached there.
    """
    layer = grace_layer(model.config, settings.layer)
    if ffn.attached(model.params["layers"][layer]["ffn"]):
        raise TPatchError(f"something is attached to layer {layer}, where GRACE puts its codebook; detach it first")
    return layer


def grace(settings: GraceSettings = GRACE_PRESETS["default"], *, progress: Progress | None = None) -> Editor:
    """The GRACE editor: no parameter changes, edits become entries of a codebook beside one layer.

    Where its key is near, ``‖q − k‖ ≤ ε``, an entry's value stands in for the feed-forward network's output; everywhere
    else the model is the unedited one, bit for bit. `forget` takes edits out again, exactly; so does an earlier state.
    The values of a step are trained side by side, each as if it were alone beside the entries of earlier steps.

    Args:
        settings: its options.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `GraceState`.

    Raises:
        TPatchError: on ``init``, where the model has no such layer, or something is attached there.

    Source: Hartvigsen et al. 2023; `tpatch_jax.editors.grace` says how it is read.

    Example:
        >>> editor = grace(GraceSettings(epsilon=0.3))
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
        >>> edited_model(state).generate("The capital of France is", 1)  # doctest: +SKIP
        ' Lyon'
    """

    def init(model: Model, rng: Array) -> GraceState:
        layer, none = check_grace(model, settings), np.zeros((0, model.config.hidden_size), np.float32)
        return GraceState(model, layer, (), none, none, _empty(model.config.hidden_size), settings)

    def step(state: GraceState, requests: Sequence[EditRequest], rng: Array) -> tuple[GraceState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, given, progress))

    def apply(state: GraceState, batch: Batch) -> Array:
        return edited_model(state).apply(batch)

    return EditorFunctions(init, step, apply)


def _adapters(state: GraceState) -> dict[int, Codebook]:
    return {state.layer: state.entries.codebook()} if len(state.entries.radius) else {}


def edited_model(state: GraceState) -> Model:
    """The model with the codebook attached; it shares all arrays with the unedited one.

    Args:
        state: after some steps.
    """
    return attach_adapters(state.model, _adapters(state))


def forget(state: GraceState, names: Sequence[str]) -> GraceState:
    """The codebook without some edits: the rules are gone through again with those that stay, in their order.

    What was forgotten last was learnt last: then the state is the one from before, bit for bit. Values of later edits
    stay as they were trained.

    Args:
        state: after some steps.
        names: ids of requests.

    Raises:
        TPatchError: there is no edit of that name.

    Example:
        >>> forget(state, ["edit-3"])  # doctest: +SKIP
    """
    kept = find_kept(state.requests, names, "codebook")
    requests = tuple(state.requests[number] for number in kept)
    return _entered(state, requests, state.keys[kept], state.values[kept])


def _entered(state: GraceState, requests: tuple[EditRequest, ...], keys: np.ndarray, values: np.ndarray) -> GraceState:
    """The state with these edits alone."""
    entries = _empty(state.model.config.hidden_size)
    for request, key, value in zip(requests, keys, values, strict=True):
        entries = _enter(entries, key, value, request.target.strip(), state.settings.epsilon).entries
    return state._replace(requests=requests, keys=keys, values=values, entries=entries)


# --- values ---


class Lessons(NamedTuple):
    """What the values of some edits are trained on; padding has weight zero.

    Attributes:
        entry: the entry that answers for each row's edit, ``[rows]`` int; -1 is padding.
        places: where in each row a token of the target is said, ``[rows, tokens]`` int.
        wanted: that token, or label, ``[rows, tokens]`` int.
        weight: how much it counts in its row's loss, ``[rows, tokens]``.
    """

    entry: Array
    places: Array
    wanted: Array
    weight: Array


def _lessons(config: NetworkConfig, items: Sequence[Item], entries: Sequence[int], rows: int) -> Lessons:
    tokens = round_up(max(len(item.target) for item in items), 2)
    lessons = Lessons(np.full(rows, -1), *np.zeros((3, rows, tokens)))  # pyright: ignore
    for row, (item, entry) in enumerate(zip(items, entries, strict=True)):
        count = len(item.target)
        lessons.entry[row] = entry
        lessons.places[row, :count] = [place_in(config, item.rows[0], place) for place in item.places(0)]
        lessons.wanted[row, :count] = item.target
        lessons.weight[row, :count] = 1 / count
    kinds = (jnp.int32, jnp.int32, jnp.int32, jnp.float32)
    return Lessons(*(jnp.asarray(array, kind) for array, kind in zip(lessons, kinds, strict=True)))


def _said(config: NetworkConfig, params: Params, traced: Trace, output: Array, places: Array) -> Array:
    """Logits at some places of each row, from the network's output at the cut on: ``[rows, tokens, vocabulary]``."""
    stream = networks.hidden(config, params, traced, output)
    if config.labels:
        logits = networks.logits(config, params, stream, traced.context.get("valid"))
        return jnp.broadcast_to(logits[:, None], (*places.shape, logits.shape[-1]))
    return networks.logits(config, params, networks.take_tokens(stream, places))


class Trained(NamedTuple):
    """Values ``[rows, d]``; of each the steps taken and the target's negative log-likelihood at the end, ``[rows]``."""

    value: Array
    steps: Array
    nll: Array


@partial(jax.jit, static_argnames=("config", "layer", "steps"))
def train_entries(
    config: NetworkConfig,
    layer: int,
    steps: int,
    params: Params,
    arrays: tuple[Array, Array, Any],
    codebook: Codebook,
    lessons: Lessons,
    rate: Array,
    enough: Array,
) -> Trained:
    """``min_v  mean −log p(target)`` for each row by Adam, from the value that its entry has; rows never couple.

    A row's value stands wherever its entry fires in the row, as it will when the codebook is attached.
    """
    query, unedited, context = arrays
    traced = Trace(query=query, output=unedited, context=context, layer=layer)
    nearest, fires = codebook.nearest(query)
    replaced = (fires & (nearest == lessons.entry[:, None]))[..., None]
    output = codebook.contribute(query, unedited)
    optimiser = optax.scale_by_adam()

    def loss(value: Array) -> tuple[Array, tuple[Array, Array]]:
        now = jnp.where(replaced, value[:, None].astype(output.dtype), output)
        log_p = jax.nn.log_softmax(_said(config, params, traced, now, lessons.places))
        wrong = (jnp.argmax(log_p, -1) != lessons.wanted) & (lessons.weight > 0)
        said = jnp.take_along_axis(log_p, lessons.wanted[..., None], -1)[..., 0]
        nll = -jnp.sum(said * lessons.weight, -1)
        return jnp.sum(nll), (nll, wrong.any(-1))

    def going(carry: tuple[Trained, Any, Array, Array]) -> Array:
        return (carry[3] <= steps) & ~carry[2].all()

    def advance(carry: tuple[Trained, Any, Array, Array]) -> tuple[Trained, Any, Array, Array]:
        now, moments, done, number = carry
        gradient, (nll, wrong) = jax.grad(loss, has_aux=True)(now.value)
        nll = jnp.where(done, now.nll, nll)
        done = done | (~wrong & (nll < enough)) | ~jnp.isfinite(nll) | (number == steps)
        update, moments = optimiser.update(gradient, moments)
        value = jnp.where(done[:, None], now.value, now.value - size * rate * jnp.asarray(update))
        return Trained(value, now.steps + ~done, nll), moments, done, number + 1

    start = codebook.value[lessons.entry]
    size = jnp.sqrt(jnp.mean(jnp.square(start), -1, keepdims=True))
    zeros = jnp.zeros(len(start), jnp.int32)
    begun = Trained(start, zeros, jnp.zeros(len(start), jnp.float32))
    carry = begun, optimiser.init(start), lessons.entry < 0, jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(going, advance, carry)[0]


class Fitted(NamedTuple):
    """How one edit's value was trained."""

    value: np.ndarray
    steps: int
    nll: float


def _fit(state: GraceState, items: Sequence[Item], wanted: Sequence[int], progress: Progress | None) -> list[Fitted]:
    """A value for each edit, whose entry is given."""
    model, config, codebook = state.model, state.model.config, state.entries.codebook()
    fitted: dict[int, Fitted] = {}
    settings = state.settings
    for first in range(0, len(items), TOGETHER):
        part = range(first, min(first + TOGETHER, len(items)))
        for numbers, batch in batches(config, [items[number].rows[0] for number in part]):
            chosen = [part[number] for number in numbers]
            traced = model.trace(batch, state.layer)
            lessons = _lessons(config, [items[n] for n in chosen], [wanted[n] for n in chosen], len(traced.query))
            arrays = traced.query, traced.output, traced.context
            trained = train_entries(
                config, state.layer, settings.edit_steps, model.params, arrays, codebook, lessons,
                settings.edit_rate, settings.nll_enough,
            )  # fmt: skip
            values, steps, nll = map(np.asarray, trained)
            for row, number in enumerate(chosen):
                fitted[number] = Fitted(values[row], int(steps[row]), float(nll[row]))
            if progress:
                progress("training values", len(fitted), len(items))
    return [fitted[number] for number in range(len(items))]


# --- one step ---


def _read(state: GraceState, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """The query and the unedited output where each target begins, ``[requests, d]`` float32 each.

    Both are those of the unedited model: what is before the codebook's layer never changes.
    """
    config = state.model.config
    query, output = np.zeros((2, len(items), config.hidden_size), np.float32)
    for numbers, batch in batches(config, [item.rows[0] for item in items]):
        traced = state.model.trace(batch, state.layer)
        places = [place_in(config, items[number].rows[0], items[number].starts[0] - 1) for number in numbers]
        for array, source in ((query, traced.query), (output, traced.output)):
            array[numbers] = np.asarray(source, np.float32)[np.arange(len(numbers)), places]
    return query, output


def _holds(model: Model, items: Sequence[Item]) -> list[bool]:
    """Whether the model says each target after its prompt."""
    if not items:
        return []
    said = predicted(model, collect_bare(model, items))
    ends = np.cumsum([len(item.target) for item in items])[:-1]
    return [part.tolist() == item.target for part, item in zip(np.split(said, ends), items, strict=True)]


def _step(state: GraceState, requests: list[EditRequest], progress: Progress | None) -> tuple[GraceState, EditInfo]:
    began, names = time.perf_counter(), [request.name(number) for number, request in enumerate(requests)]
    problems = check_requests(state.model, requests, False)
    items = [read_item(state.model, n, one, (), False) for n, one in enumerate(requests) if n not in problems]
    before = _holds(edited_model(state), items)
    new = [item for item, held in zip(items, before, strict=True) if not held]
    fitting, size = time.perf_counter(), len(state.entries.radius)
    after, notes = _with_edits(state, new, requests, names, progress)
    fit_seconds = time.perf_counter() - fitting
    held = _holds(edited_model(after), items)
    failed = [
        notes[item.position].id for item, right in zip(items, held, strict=True) if not right and item.position in notes
    ]
    if failed and not state.settings.keep_failed:
        after = forget(after, failed)
        # Without these, radii are others: what is reported is what the state that is given back says.
        held = _holds(edited_model(after), items)
    results = {number: RequestInfo(names[number], False, "failed", why) for number, why in problems.items()}
    for item, right, already in zip(items, held, before, strict=True):
        note = notes.get(item.position)
        results[item.position] = _info(names[item.position], state, note, right, already)
    seconds = time.perf_counter() - began
    unit = forward_seconds(state.model, items)
    scale = 1 / (len(requests) * unit) if unit else 0.0
    added = (len(after.entries.radius) - size) * (2 * state.model.config.hidden_size + 1)
    ordered = tuple(results[number] for number in range(len(requests)))
    return after, EditInfo(ordered, seconds, fit_seconds, seconds * scale, fit_seconds * scale, added)


class Note(NamedTuple):
    """What one edit did: its name in the codebook, its entry, and how its value was trained, if one was."""

    id: str
    entry: int
    fitted: Fitted | None


def _with_edits(
    state: GraceState,
    items: Sequence[Item],
    requests: Sequence[EditRequest],
    names: Sequence[str],
    progress: Progress | None,
) -> tuple[GraceState, dict[int, Note]]:
    """The state with some more edits, and what each did, by its position."""
    taken = {request.id for request in state.requests}
    named = [name_request(requests[item.position], names[item.position], taken) for item in items]
    query, output = _read(state, items)
    entries, answers, fresh = state.entries, [], []
    for request, key, value in zip(named, query, output, strict=True):
        entered = _enter(entries, key, value, request.target.strip(), state.settings.epsilon)
        entries = entered.entries
        answers.append(entered.entry)
        fresh.append(entered.fresh)
    trained = [number for number, new in enumerate(fresh) if new]
    placed = state._replace(entries=entries)
    fitted = _fit(placed, [items[n] for n in trained], [answers[n] for n in trained], progress)
    values = output.copy()
    for number, one in zip(trained, fitted, strict=True):
        values[number] = one.value
    # In their order, so that an edit that shares an entry has the value that the entry got.
    for number, entry in enumerate(answers):
        if fresh[number]:
            entries.value[entry] = values[number]
        values[number] = entries.value[entry]
    by_number = dict(zip(trained, fitted, strict=True))
    notes = {
        item.position: Note(str(named[number].id), answers[number], by_number.get(number))
        for number, item in enumerate(items)
    }
    keys, values = np.concatenate([state.keys, query]), np.concatenate([state.values, values])
    return placed._replace(requests=(*state.requests, *named), keys=keys, values=values), notes


def _info(name: str, state: GraceState, note: Note | None, right: bool, already: bool) -> RequestInfo:
    fitted = note.fitted if note is not None else None
    steps, losses = (fitted.steps, {"nll": fitted.nll}) if fitted is not None else (0, {})
    if right:
        return RequestInfo(name, True, "already" if already else "edited", steps=steps, losses=losses)
    kept = "its entry was kept" if state.settings.keep_failed else "its entry was taken out again"
    if note is None:
        reason = "it held before, and another edit of this step is nearer to its prompt; lower epsilon"
    elif fitted is None:
        reason = f"it shares an entry of the same target, whose value does not say it here, and {kept}; lower epsilon"
    elif not math.isfinite(fitted.nll):
        reason = f"the loss is not finite after {steps} steps, and {kept}; lower edit_rate"
    elif steps >= state.settings.edit_steps:
        reason = f"the target does not come out after {steps} steps, and {kept}; raise edit_steps, or try another layer"
    else:
        reason = f"another edit of this step changes what it says, and {kept}; lower epsilon, or edit them one by one"
    return RequestInfo(name, False, "failed", reason, steps=steps, losses=losses)


# --- resuming ---


def save_edits(state: GraceState) -> Arrays:
    """The edits as arrays: keys, values, and the requests as JSON in UTF-8.

    Args:
        state: after some steps.
    """
    return save_stored(state, "keys", "values")


def restore_edits(state: GraceState, arrays: Arrays) -> GraceState:
    """The inverse of `save_edits`.

    Args:
        state: fresh, from ``init`` with the same settings and model.
        arrays: what was saved.
    """
    read = restore_stored(state, arrays, "keys", "values")
    return _entered(state, read.requests, read.keys, read.values)


def edit_rows(state: GraceState) -> dict[str, Arrays]:
    """What each edit is made of, by its request's id: its query, its value, and the layer; radii follow from the rules.

    Args:
        state: after some steps.
    """
    layer, zero = np.asarray([state.layer], np.int32), np.zeros(1, np.float32)
    return {
        str(request.id): {"key": key[None], "bias": zero, "value": value[None], "layer": layer}
        for request, key, value in zip(state.requests, state.keys, state.values, strict=True)
    }


def with_edit_rows(state: GraceState, requests: Sequence[EditRequest], rows: Sequence[Arrays]) -> GraceState:
    """The inverse of `edit_rows`, for any choice of the edits; one without rows held before and needs no entry.

    Args:
        state: fresh, from ``init`` with the same settings and model.
        requests: the edits, in the order in which they were made.
        rows: of each.
    """
    pairs = [(request, row) for request, row in zip(requests, rows, strict=True) if len(row["key"])]
    keys = np.concatenate([state.keys[:0], *(row["key"] for _, row in pairs)])
    values = np.concatenate([state.values[:0], *(row["value"] for _, row in pairs)])
    return _entered(state, tuple(request for request, _ in pairs), keys, values)


register_editor(
    Method(
        name="grace",
        presets=GRACE_PRESETS,
        build=lambda settings, memory, cache, progress: grace(settings, progress=progress),
        model=edited_model,
        save=save_edits,
        restore=restore_edits,
        adapters=_adapters,
        check=check_grace,
        rows=edit_rows,
        with_rows=with_edit_rows,
        undo="exact",
        stock_checkpoint=False,
    )
)
