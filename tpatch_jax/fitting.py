"""Fitting patches on cached arrays: one fit as a pure function, many at once under ``vmap``.

A lane is one patch being fitted. It sees its own queries, its own target and the shared memory, never another lane, so that
many fitted together equal each fitted alone. Two recipes share the objective (see `FitSettings`):

* ``joint``: all parameters at once with Adam, as in the paper;
* ``staged``: a whitened key in closed form, a few steps on the activation and memory losses against the hardest negatives,
  a threshold between the hardest negative and the edit's own queries, then the value, scaled along a closed-form direction
  until the edit loss is satisfied, with Adam for those lanes that still miss their target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from tpatch_jax.memory import Memory, hardest
from tpatch_jax.objective import Weights, edit_loss, total_loss
from tpatch_jax.patch import Patch, sharpen

__all__ = ["FitInfo", "FitSettings", "Lane", "fit", "fit_many"]

Resume = Callable[[Any, Array], Array]


class Lane(NamedTuple):
    """What one patch is fitted on; a batch of lanes has a leading axis.

    Attributes:
        query: the edit's queries, the bare prompt first, then its prefixed contexts: ``[contexts, d]``.
        output: the FFN's output at those queries, other active patches included: ``[contexts, d]``.
        context: what ``resume`` needs beside the output, with leading axis ``contexts``.
        target: the token or label to say, a scalar int.
        direction: where the value starts, ``[d]``; its length does not matter.
        scale: the length that a value of medium strength has, a scalar; the residual stream's norm is a good one.
    """

    query: Array
    output: Array
    context: Any
    target: Array
    direction: Array
    scale: Array


class FitInfo(NamedTuple):
    """How a fit went; a batch has a leading axis.

    Attributes:
        held: whether every context of the edit gives the target.
        steps: optimiser steps taken.
        margin: the least pre-activation on the edit's own queries minus the largest on memory rows, in units of the mean
            pre-activation on its own queries; negative when they could not be parted.
        l_e: edit loss at the end, in nats.
        l_a: activation loss.
        l_m1: first memory loss.
        l_m2: second memory loss.
    """

    held: Array
    steps: Array
    margin: Array
    l_e: Array
    l_a: Array
    l_m1: Array
    l_m2: Array


@dataclass(frozen=True)
class FitSettings:
    """Options of a fit, hashable so that they are static under ``jit``.

    Attributes:
        recipe: ``"staged"`` or ``"joint"``.
        weights: weights and margins of the objective.
        learning_rate: Adam's, for the key and its bias (in whitened coordinates when staged).
        value_learning_rate: Adam's for the value; ``0`` uses ``learning_rate``.
        weight_decay: decoupled, on all parameters.
        clip: the gradient's largest norm.
        key_steps: steps on the activation and memory losses (staged).
        value_steps: most steps on the edit loss for a lane that misses its target (staged).
        rounds: how often hard negatives are mined during the key steps.
        negatives: how many memory rows each lane trains against.
        split: where the threshold lies between the hardest negative (0) and the least active own query (1).
        overshoot: the value's length over the shortest that holds, so that a weaker activation still says the target.
        sharpness: ``s`` of ``act(s·z)/s``, a power of two; it is folded into the patch.
        value_limit: the value's largest length, in units of the lane's scale.
        least_steps: no early stop before (joint).
        most_steps: stop here at the latest (joint).
        patience: steps between looks at the held-out memory loss (joint).
        value_spread: standard deviation of the initial value (joint).
        output_bias: the other reading of the patch, ``a·v + b`` with an ungated scalar ``b`` in place of the key bias
            (joint). It is stored as a second neuron that is always on.
        lanes: how many lanes are fitted at a time at most; a power of two.
    """

    recipe: str = "staged"
    weights: Weights = field(default_factory=Weights)
    learning_rate: float = 0.005
    value_learning_rate: float = 0.0
    weight_decay: float = 0.0
    clip: float = 5.0
    key_steps: int = 48
    value_steps: int = 40
    rounds: int = 3
    negatives: int = 128
    split: float = 0.8
    overshoot: float = 4.0
    sharpness: float = 32.0
    value_limit: float = 16.0
    least_steps: int = 150
    most_steps: int = 2000
    patience: int = 25
    value_spread: float = 10.0
    output_bias: bool = False
    lanes: int = 64


class _State(NamedTuple):
    """Where a joint fit stands."""

    params: dict[str, Array]
    optimiser: optax.OptState
    step: Array
    done: Array
    rate: Array
    best_loss: Array
    best_silence: Array


def _patch(params: dict[str, Array], settings: FitSettings, act: Callable[[Array], Array]) -> Patch:
    """The neurons that a lane's parameters stand for."""
    key, value = params["key"], params["value"]
    if not settings.output_bias:
        return Patch(key[None], params["bias"][None], value[None])
    # A neuron with a zero key and bias one is always on; dividing by its activation leaves exactly the ungated bias.
    always = jnp.full_like(value, params["bias"]) / act(jnp.ones((), value.dtype))
    zero = jnp.zeros((), value.dtype)
    return Patch(jnp.stack([key, jnp.zeros_like(key)]), jnp.stack([zero, zero + 1]), jnp.stack([value, always]))


def _joint_logits(
    params: dict[str, Array], lane: Lane, resume: Resume, settings: FitSettings, act: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Pre-activations on the lane's queries ``[contexts]`` and the patched logits ``[contexts, vocabulary]``."""
    inside, outside = (0.0, params["bias"]) if settings.output_bias else (params["bias"], 0.0)
    z = lane.query @ params["key"] + inside
    return z, resume(lane.context, lane.output + act(z)[:, None] * params["value"] + outside)


def _joint_loss(
    params: dict[str, Array],
    lane: Lane,
    memory: Memory,
    resume: Resume,
    settings: FitSettings,
    act: Callable[[Array], Array],
) -> tuple[Array, dict[str, Array]]:
    z, logits = _joint_logits(params, lane, resume, settings, act)
    weights = settings.weights
    loss_edit = edit_loss(logits, lane.target, weights.label_smoothing, weights.entropy)
    return total_loss(loss_edit, z, _silence(params, lane, memory, settings), weights)


def _silence(params: dict[str, Array], lane: Lane, memory: Memory, settings: FitSettings) -> Array:
    z = memory.query @ params["key"] + (0.0 if settings.output_bias else params["bias"])
    return jnp.where(memory.answer == lane.target, -jnp.inf, z)


def _held(logits: Array, target: Array) -> Array:
    return jnp.argmax(logits, -1) == target


def _optimiser(settings: FitSettings) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(),
        optax.add_decayed_weights(settings.weight_decay),
    )


def _begin_joint(lane: Lane, settings: FitSettings, key: Array) -> _State:
    """The paper's initial values: ``k = q/‖q‖²``, so that ``z = 1`` on the edited query, ``b = 0``, a random value."""
    query = lane.query[0]
    params = {
        "key": query / jnp.sum(jnp.square(query)),
        "bias": jnp.zeros((), query.dtype),
        # The paper trains x with v = α·x; Adam's steps do not see the gradient's scale, so α is a rate here.
        "value": jax.random.normal(key, query.shape, query.dtype),
    }
    zero, infinite = jnp.zeros((), query.dtype), jnp.full((), jnp.inf, query.dtype)
    step, done = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    return _State(params, _optimiser(settings).init(params), step, done, zero + 1, infinite, infinite)


def _spread(params: dict[str, Array], settings: FitSettings) -> dict[str, Array]:
    return {**params, "value": params["value"] * settings.value_spread}


def _advance_joint(
    state: _State,
    lane: Lane,
    memory: Memory,
    resume: Resume,
    settings: FitSettings,
    act: Callable[[Array], Array],
) -> _State:
    """One chunk of ``settings.patience`` steps, then the paper's look at the held-out memory."""
    rows = memory.query.shape[0]
    kept = max(1, rows - rows // 10)
    seen = memory._replace(query=memory.query[:kept], answer=memory.answer[:kept])
    unseen = memory._replace(query=memory.query[kept:], answer=memory.answer[kept:]) if kept < rows else memory
    transform = _optimiser(settings)

    def loss_of(params: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        return _joint_loss(_spread(params, settings), lane, seen, resume, settings, act)

    def step(carry: tuple[dict[str, Array], optax.OptState], _: None) -> tuple[Any, Array]:
        params, optimiser = carry
        (loss, _), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        update, optimiser = transform.update(gradient, optimiser, params)
        update = jax.tree.map(lambda leaf: -settings.learning_rate * state.rate * leaf, update)
        return (optax.apply_updates(params, update), optimiser), loss

    (params, optimiser), losses = jax.lax.scan(step, (state.params, state.optimiser), None, length=settings.patience)
    spread = _spread(params, settings)
    z, logits = _joint_logits(spread, lane, resume, settings, act)
    _, terms = total_loss(losses[-1], z, _silence(spread, lane, unseen, settings), settings.weights)
    silence, loss = terms["l_m1"] + terms["l_m2"], jnp.mean(losses)
    steps = state.step + settings.patience
    content = _held(logits, lane.target).all() & (silence >= state.best_silence) & (steps >= settings.least_steps)
    return _State(
        params,
        optimiser,
        steps,
        content | (steps >= settings.most_steps) | ~jnp.isfinite(loss),
        jnp.where(loss < state.best_loss, state.rate, state.rate / 2),
        jnp.minimum(loss, state.best_loss),
        jnp.minimum(silence, state.best_silence),
    )


def _end_joint(
    state: _State,
    lane: Lane,
    memory: Memory,
    resume: Resume,
    settings: FitSettings,
    act: Callable[[Array], Array],
) -> tuple[Patch, FitInfo]:
    params = _spread(state.params, settings)
    _, terms = _joint_loss(params, lane, memory, resume, settings, act)
    z, logits = _joint_logits(params, lane, resume, settings, act)
    margin = (jnp.min(z) - jnp.max(_silence(params, lane, memory, settings))) / jnp.abs(jnp.mean(z))
    return _patch(params, settings, act), FitInfo(_held(logits, lane.target)[0], state.step, margin, **terms)


def _fit_staged(
    lane: Lane, memory: Memory, resume: Resume, settings: FitSettings, activation: Callable[[Array], Array]
) -> tuple[Patch, FitInfo]:
    weights, sharpness = settings.weights, settings.sharpness

    def act(z: Array) -> Array:
        return activation(z * sharpness) / sharpness

    # Whitened coordinates: every direction of ordinary variation has the same length there.
    whitener, mean = memory.whitener, memory.mean
    own = (lane.query - mean) @ whitener
    rows = memory._replace(query=(memory.query - mean) @ whitener)
    centre = jnp.mean(own, 0)
    # Starting at z = 3.2 on the edit's own queries and -4.8 on the mean memory query.
    params = {"key": centre * (8.0 / jnp.sum(jnp.square(centre))), "bias": jnp.full((), -4.8, centre.dtype)}
    transform = optax.adam(settings.learning_rate)

    def key_loss(params: dict[str, Array], negative: Array, counts: Array) -> tuple[Array, dict[str, Array]]:
        z = own @ params["key"] + params["bias"]
        z_memory = jnp.where(counts, negative @ params["key"] + params["bias"], -jnp.inf)
        return total_loss(jnp.zeros(()), z, z_memory, weights)

    def mine(params: dict[str, Array]) -> tuple[Array, Array]:
        index, counts = hardest(params["key"], lane.target, rows, settings.negatives)
        return rows.query[index], counts

    optimiser = transform.init(params)
    taken = 0
    for round_ in range(settings.rounds):
        negative, counts = mine(params)
        length = settings.key_steps * (round_ + 1) // settings.rounds - settings.key_steps * round_ // settings.rounds
        taken += length

        def step(carry: Any, _: None, negative: Array = negative, counts: Array = counts) -> tuple[Any, None]:
            params, optimiser = carry
            gradient, _ = jax.grad(key_loss, has_aux=True)(params, negative, counts)
            update, optimiser = transform.update(gradient, optimiser, params)
            return (optax.apply_updates(params, update), optimiser), None

        (params, optimiser), _ = jax.lax.scan(step, (params, optimiser), None, length=length)

    # The threshold goes between the hardest negative and the least active own query; own queries then average one.
    negative, counts = mine(params)
    _, terms = key_loss(params, negative, counts)
    z = own @ params["key"]
    hard = jnp.max(jnp.where(counts, negative @ params["key"], -jnp.inf))
    threshold = hard + settings.split * (jnp.min(z) - hard)
    parted = jnp.min(z) > hard
    threshold = jnp.where(parted, threshold, jnp.min(z) - 0.1 * jnp.abs(jnp.mean(z)))
    unit = jnp.maximum(jnp.mean(z) - threshold, jnp.finfo(z.dtype).eps)
    key = whitener @ params["key"] / unit
    bias = -threshold / unit - mean @ key
    margin = (jnp.min(z) - hard) / jnp.maximum(jnp.mean(z), jnp.finfo(z.dtype).eps)
    a = act(lane.query @ key + bias)

    def logits_of(value: Array) -> Array:
        return resume(lane.context, lane.output + a[:, None] * value)

    direction = lane.direction / jnp.maximum(jnp.linalg.norm(lane.direction), jnp.finfo(z.dtype).tiny)
    lengths = lane.scale * 2.0 ** jnp.arange(-4.0, 3.0)
    # The shortest value that holds in the most contexts.
    held = jax.lax.map(lambda length: jnp.sum(_held(logits_of(length * direction), lane.target)), lengths)
    chosen = lengths[jnp.argmax(held)]
    limit = settings.value_limit * lane.scale
    value = jnp.minimum(settings.overshoot * chosen, limit) * direction

    rate = settings.value_learning_rate or 0.05
    value_transform = optax.adam(rate)

    def missing(carry: tuple[Array, optax.OptState, Array]) -> Array:
        value, _, count = carry
        return (count < settings.value_steps) & ~_held(logits_of(value * lane.scale), lane.target).all()

    def improve(carry: tuple[Array, optax.OptState, Array]) -> tuple[Array, optax.OptState, Array]:
        value, optimiser, count = carry
        gradient = jax.grad(lambda v: edit_loss(logits_of(v * lane.scale), lane.target, weights.label_smoothing))(value)
        update, optimiser = value_transform.update(gradient, optimiser, value)
        value = optax.apply_updates(value, update)
        value = value * jnp.minimum(1.0, settings.value_limit / jnp.linalg.norm(value))
        return value, optimiser, count + 1

    start = value / lane.scale
    value, _, extra = jax.lax.while_loop(
        missing, improve, (start, value_transform.init(start), jnp.zeros((), jnp.int32))
    )
    value = value * lane.scale
    logits = logits_of(value)
    info = FitInfo(
        _held(logits, lane.target)[0],
        taken + extra,
        margin,
        edit_loss(logits, lane.target, weights.label_smoothing, weights.entropy),
        terms["l_a"],
        terms["l_m1"],
        terms["l_m2"],
    )
    return sharpen(Patch(key[None], bias[None], value[None]), sharpness), info


def fit(
    lane: Lane,
    memory: Memory,
    resume: Resume,
    key: Array,
    settings: FitSettings,
    activation: Callable[[Array], Array],
) -> tuple[Patch, FitInfo]:
    """Fit one patch: a pure function, to be jitted and vmapped by its caller.

    Minimises ``l_e + a·l_a + m·(l_m1 + l_m2)`` over key, bias and value.

    Args:
        lane: what to fit on.
        memory: what to stay silent on.
        resume: from ``(context, output [contexts, d])`` to logits ``[contexts, vocabulary]``: the network after the cut.
        key: a typed random key, for the initial value of the joint recipe.
        settings: static options.
        activation: the feed-forward network's activation.

    Returns:
        The patch, ``[1, d]`` (``[2, d]`` with an output bias), and how the fit went.

    Source: Huang et al. 2023, sections 4.1 and 4.2.

    Example:
        >>> from tpatch_jax.memory import create_memory
        >>> rows = jax.random.normal(jax.random.key(0), (64, 4))
        >>> unembedding = jax.random.normal(jax.random.key(1), (4, 10))
        >>> lane = Lane(jnp.ones((1, 4)), jnp.zeros((1, 4)), None, jnp.array(3), unembedding[:, 3], jnp.array(1.0))
        >>> resume = lambda context, output: output @ unembedding
        >>> patch, info = fit(lane, create_memory(rows), resume, jax.random.key(2), FitSettings(), jax.nn.relu)
        >>> bool(info.held)
        True
    """
    if settings.recipe == "staged":
        return _fit_staged(lane, memory, resume, settings, activation)
    state = _begin_joint(lane, settings, key)
    state = jax.lax.while_loop(
        lambda state: ~state.done,
        lambda state: _advance_joint(state, lane, memory, resume, settings, activation),
        state,
    )
    return _end_joint(state, lane, memory, resume, settings, activation)


@partial(jax.jit, static_argnames=("settings", "activation"))
def _many_staged(lanes, memory, resume, settings, activation):
    return jax.vmap(lambda lane: _fit_staged(lane, memory, resume, settings, activation))(lanes)


@partial(jax.jit, static_argnames="settings")
def _many_begin(lanes, keys, settings):
    return jax.vmap(lambda lane, key: _begin_joint(lane, settings, key))(lanes, keys)


@partial(jax.jit, static_argnames=("settings", "activation"))
def _many_advance(states, lanes, memory, resume, settings, activation):
    return jax.vmap(lambda state, lane: _advance_joint(state, lane, memory, resume, settings, activation))(
        states, lanes
    )


@partial(jax.jit, static_argnames=("settings", "activation"))
def _many_end(states, lanes, memory, resume, settings, activation):
    return jax.vmap(lambda state, lane: _end_joint(state, lane, memory, resume, settings, activation))(states, lanes)


def _bucket(size: int, largest: int) -> int:
    return min(1 << (size - 1).bit_length(), largest)


def _padded(tree: Any, size: int) -> Any:
    """A batch with its first lane repeated up to ``size``; repeated lanes are dropped afterwards."""

    def widen(leaf: Array) -> Array:
        missing = size - leaf.shape[0]
        return jnp.concatenate([leaf, jnp.broadcast_to(leaf[:1], (missing, *leaf.shape[1:]))]) if missing else leaf

    return jax.tree.map(widen, tree)


def fit_many(
    lanes: Lane,
    memory: Memory,
    resume: Resume,
    keys: Array,
    settings: FitSettings,
    activation: Callable[[Array], Array],
    progress: Callable[[int], None] | None = None,
) -> tuple[Patch, FitInfo]:
    """Fit many patches: `fit` under ``vmap``, in buckets of lanes whose sizes are powers of two.

    Lanes never couple: the result equals fitting each alone, in any order and any bucket. Under the joint recipe lanes
    stop one by one, and finished ones are dropped into a smaller bucket.

    Args:
        lanes: a batch of lanes, every leaf with a leading axis of ``n``.
        memory: shared by all lanes.
        resume: as for `fit`; a `jax.tree_util.Partial` over the weights keeps them out of the compiled program.
        keys: typed random keys, ``[n]``.
        settings: static options.
        activation: the feed-forward network's activation.
        progress: called with the number of lanes finished so far.

    Returns:
        Patches with a leading axis, ``[n, 1, d]``, and their `FitInfo`, ``[n]``.

    Source: Huang et al. 2023, section 4; the batching is this library's.

    Example:
        >>> import numpy as np
        >>> from jax.tree_util import Partial
        >>> from tpatch_jax.memory import create_memory
        >>> rows, head = jax.random.normal(jax.random.key(0), (64, 4)), jax.random.normal(jax.random.key(1), (4, 10))
        >>> lane = Lane(jnp.ones((1, 4)), jnp.zeros((1, 4)), None, jnp.array(3), head[:, 3], jnp.array(1.0))
        >>> lanes = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), lane)
        >>> resume = Partial(lambda head, context, output: output @ head, head)
        >>> keys = jax.random.split(jax.random.key(2), 3)
        >>> patches, info = fit_many(lanes, create_memory(rows), resume, keys, FitSettings(), jax.nn.relu)
        >>> patches.key.shape
        (3, 1, 4)
    """
    total = lanes.target.shape[0]
    patches: list[Patch] = []
    infos: list[FitInfo] = []
    for first in range(0, total, settings.lanes):
        part = jax.tree.map(lambda leaf, first=first: leaf[first : first + settings.lanes], lanes)
        count = part.target.shape[0]
        part = _padded(part, _bucket(count, settings.lanes))
        if settings.recipe == "staged":
            patch, info = _many_staged(part, memory, resume, settings, activation)
        else:
            part_keys = _padded(keys[first : first + count], part.target.shape[0])
            patch, info = _joint_bucket(part, memory, resume, part_keys, count, settings, activation)
        patches.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf[:count]), patch))
        infos.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf[:count]), info))
        if progress:
            progress(first + count)
    join = lambda *leaves: jnp.concatenate(leaves)  # noqa: E731
    return jax.tree.map(join, *patches), jax.tree.map(join, *infos)


def _joint_bucket(
    lanes: Lane,
    memory: Memory,
    resume: Resume,
    keys: Array,
    count: int,
    settings: FitSettings,
    activation: Callable[[Array], Array],
) -> tuple[Patch, FitInfo]:
    """The joint recipe for one bucket, which shrinks as lanes finish."""
    states = _many_begin(lanes, keys, settings)
    finished: dict[int, _State] = {}
    going = list(range(count))
    part = lanes
    while going:
        states = _many_advance(states, part, memory, resume, settings, activation)
        done = np.asarray(states.done)
        for slot, lane in enumerate(going):
            if done[slot]:
                finished[lane] = jax.tree.map(lambda leaf, slot=slot: leaf[slot], states)
        slots = [slot for slot, lane in enumerate(going) if not done[slot]]
        going = [going[slot] for slot in slots]
        if going and _bucket(len(going), settings.lanes) < part.target.shape[0]:
            chosen, size = np.asarray(slots), _bucket(len(going), settings.lanes)
            states = _padded(jax.tree.map(lambda leaf: leaf[chosen], states), size)
            part = _padded(jax.tree.map(lambda leaf: leaf[np.asarray(going)], lanes), size)
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(finished[lane] for lane in range(count)))
    size = lanes.target.shape[0]
    return _many_end(_padded(states, size), lanes, memory, resume, settings, activation)
