"""Fitting patches on cached arrays: one fit as a pure function, many at once under ``vmap``.

A lane is one patch being fitted. It sees its own queries, its own target and the shared memory, never another lane, so
that many fitted together equal each fitted alone. Two recipes share the objective (see `FitSettings`):

* ``joint``: all parameters at once with Adam, as in the paper;
* ``staged``: a whitened key in closed form, a few steps on the activation and memory losses against the hardest
  negatives, a threshold between the hardest negative and the edit's own queries, then the value, scaled along a
  closed-form direction until the edit loss is satisfied, with Adam for those lanes that still miss their target.
"""

import itertools
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
        negative: queries on which this patch in particular must stay silent, such as the same prompt about another
            subject: ``[own_negatives, d]``, possibly none.
        context: what ``resume`` needs beside the output, with leading axis ``contexts``.
        target: the token or label to say, a scalar int.
        direction: where the value starts, ``[d]``; its length does not matter.
        scale: the length that a value of medium strength has, a scalar; the residual stream's norm is a good one.
    """

    query: Array
    output: Array
    negative: Array
    context: Any
    target: Array
    direction: Array
    scale: Array


class FitInfo(NamedTuple):
    """How a fit went; a batch has a leading axis.

    Attributes:
        held: whether the bare prompt, the first context, gives the target.
        steps: optimiser steps taken.
        margin: the least pre-activation on the edit's own queries minus the largest on memory rows, in units of the
            mean pre-activation on its own queries; negative when they could not be parted.
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
        split: where the threshold lies between the hardest negative (0) and the edit's own queries (1).
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
    key_steps: int = 64
    value_steps: int = 24
    rounds: int = 4
    negatives: int = 128
    split: float = 0.92
    overshoot: float = 2.25
    sharpness: float = 256.0
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
    bias = 0.0 if settings.output_bias else params["bias"]
    z = jnp.where(memory.answer == lane.target, -jnp.inf, memory.query @ params["key"] + bias)
    return jnp.concatenate([z, lane.negative @ params["key"] + bias])


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


class _Staged(NamedTuple):
    """Where a staged fit stands once the key is settled: what the value is fitted with."""

    key: Array
    bias: Array
    value: Array
    held: Array
    steps: Array
    margin: Array
    losses: dict[str, Array]


def _sharp(activation: Callable[[Array], Array], settings: FitSettings) -> Callable[[Array], Array]:
    return lambda z: activation(z * settings.sharpness) / settings.sharpness


def _settle(
    lane: Lane, memory: Memory, resume: Resume, settings: FitSettings, activation: Callable[[Array], Array]
) -> _Staged:
    """The key, the threshold, and the shortest value along the lane's direction that holds."""
    whitener, mean = memory.whitener, memory.mean
    own = (lane.query - mean) @ whitener
    rows = memory._replace(query=(memory.query - mean) @ whitener)
    particular, always = (lane.negative - mean) @ whitener, jnp.ones(lane.negative.shape[0], bool)
    centre, tiny = jnp.mean(own, 0), jnp.finfo(own.dtype).eps
    # Starting at z = 3.2 on the edit's own queries and -4.8 on the mean memory query.
    params = {
        "key": centre * (8.0 / jnp.maximum(jnp.sum(jnp.square(centre)), tiny)),
        "bias": jnp.full((), -4.8, centre.dtype),
    }
    transform = optax.adam(settings.learning_rate)

    def key_loss(params: dict[str, Array], negative: Array, counts: Array) -> tuple[Array, dict[str, Array]]:
        z = own @ params["key"] + params["bias"]
        z_memory = jnp.where(counts, negative @ params["key"] + params["bias"], -jnp.inf)
        return total_loss(jnp.zeros(()), z, z_memory, settings.weights)

    def mine(params: dict[str, Array]) -> tuple[Array, Array]:
        index, counts = hardest(params["key"], lane.target, rows, settings.negatives)
        return jnp.concatenate([rows.query[index], particular]), jnp.concatenate([counts, always])

    optimiser = transform.init(params)
    bounds = [settings.key_steps * round_ // settings.rounds for round_ in range(settings.rounds + 1)]
    for first, last in itertools.pairwise(bounds):
        negative, counts = mine(params)

        def step(carry: Any, _: None, negative: Array = negative, counts: Array = counts) -> tuple[Any, None]:
            params, optimiser = carry
            gradient, _ = jax.grad(key_loss, has_aux=True)(params, negative, counts)
            update, optimiser = transform.update(gradient, optimiser, params)
            return (optax.apply_updates(params, update), optimiser), None

        (params, optimiser), _ = jax.lax.scan(step, (params, optimiser), None, length=last - first)

    # The threshold goes between the hardest negative and the least active own query; an own query then has z = 1.
    negative, counts = mine(params)
    _, losses = key_loss(params, negative, counts)
    z = own @ params["key"]
    hard = jnp.max(jnp.where(counts, negative @ params["key"], -jnp.inf), initial=-jnp.inf)
    # With no negative at all, the mean query (zero in whitened coordinates) stands in.
    hard = jnp.where(jnp.isfinite(hard), hard, 0.0)
    # The bare prompt must fire in any case; its contexts pull the threshold down as far as their mean does.
    least = jnp.minimum(z[0], jnp.mean(z))
    between = hard + settings.split * (least - hard)
    threshold = jnp.where(least > hard, between, z[0] - 0.02 * jnp.abs(jnp.mean(z)))
    unit = jnp.maximum(least - threshold, tiny)
    key = whitener @ params["key"] / unit
    bias = -threshold / unit - mean @ key
    margin = (jnp.min(z) - hard) / jnp.maximum(jnp.mean(z), tiny)

    a = _sharp(activation, settings)(lane.query @ key + bias)
    direction = lane.direction / jnp.maximum(jnp.linalg.norm(lane.direction), jnp.finfo(own.dtype).tiny)
    lengths = lane.scale * 2.0 ** jnp.arange(-4.0, 3.0)

    def held(length: Array, activity: Array | float) -> Array:
        return _held(resume(lane.context, lane.output + activity * length * direction), lane.target)

    # The shortest that holds in the most contexts at full activation; the overshoot serves weaker activations.
    chosen = lengths[jnp.argmax(jax.lax.map(lambda length: jnp.sum(held(length, 1.0)), lengths))]
    length = jnp.minimum(settings.overshoot * chosen, settings.value_limit * lane.scale)
    steps = jnp.asarray(settings.key_steps, jnp.int32)
    return _Staged(key, bias, length * direction, held(length, a[:, None])[0], steps, margin, losses)


def _improve(
    staged: _Staged, lane: Lane, resume: Resume, settings: FitSettings, activation: Callable[[Array], Array]
) -> _Staged:
    """Adam on the edit loss alone, for a value that misses its target in some context."""
    a = _sharp(activation, settings)(lane.query @ staged.key + staged.bias)
    transform = optax.adam(settings.value_learning_rate or 0.05)

    def logits(value: Array) -> Array:
        return resume(lane.context, lane.output + a[:, None] * value * lane.scale)

    def loss(value: Array) -> Array:
        return edit_loss(logits(value), lane.target, settings.weights.label_smoothing, settings.weights.entropy)

    def missing(carry: tuple[Array, optax.OptState, Array]) -> Array:
        value, _, count = carry
        return (count < settings.value_steps) & ~_held(logits(value), lane.target)[0]

    def step(carry: tuple[Array, optax.OptState, Array]) -> tuple[Array, optax.OptState, Array]:
        value, optimiser, count = carry
        update, optimiser = transform.update(jax.grad(loss)(value), optimiser, value)
        value = value + jnp.asarray(update)
        value = value * jnp.minimum(1.0, settings.value_limit / jnp.linalg.norm(value))
        return value, optimiser, count + 1

    start = staged.value / lane.scale
    value, _, count = jax.lax.while_loop(missing, step, (start, transform.init(start), jnp.zeros((), jnp.int32)))
    return staged._replace(value=value * lane.scale, steps=staged.steps + count)


def _end_staged(
    staged: _Staged, lane: Lane, resume: Resume, settings: FitSettings, activation: Callable[[Array], Array]
) -> tuple[Patch, FitInfo]:
    a = _sharp(activation, settings)(lane.query @ staged.key + staged.bias)
    logits = resume(lane.context, lane.output + a[:, None] * staged.value)
    weights = settings.weights
    losses = {**staged.losses, "l_e": edit_loss(logits, lane.target, weights.label_smoothing, weights.entropy)}
    patch = Patch(staged.key[None], staged.bias[None], staged.value[None])
    info = FitInfo(_held(logits, lane.target)[0], staged.steps, staged.margin, **losses)
    return sharpen(patch, settings.sharpness), info


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
        resume: the network after the cut, ``(context, output [contexts, d])`` to logits ``[contexts, vocabulary]``.
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
        >>> query, nothing = jnp.ones((1, 4)), jnp.zeros((0, 4))
        >>> lane = Lane(query, 0 * query, nothing, None, jnp.array(3), unembedding[:, 3], jnp.array(1.0))
        >>> resume = lambda context, output: output @ unembedding
        >>> run = jax.jit(lambda lane, memory, key: fit(lane, memory, resume, key, FitSettings(), jax.nn.relu))
        >>> patch, info = run(lane, create_memory(rows), jax.random.key(2))
        >>> bool(info.held)
        True
    """
    if settings.recipe == "staged":
        staged = _settle(lane, memory, resume, settings, activation)
        staged = _improve(staged, lane, resume, settings, activation)
        return _end_staged(staged, lane, resume, settings, activation)
    state = _begin_joint(lane, settings, key)
    state = jax.lax.while_loop(
        lambda state: ~state.done,
        lambda state: _advance_joint(state, lane, memory, resume, settings, activation),
        state,
    )
    return _end_joint(state, lane, memory, resume, settings, activation)


@partial(jax.jit, static_argnames=("settings", "activation"))
def _many_settle(lanes, memory, resume, settings, activation):
    return jax.vmap(lambda lane: _settle(lane, memory, resume, settings, activation))(lanes)


@partial(jax.jit, static_argnames=("settings", "activation"))
def _many_improve(staged, lanes, resume, settings, activation):
    return jax.vmap(lambda state, lane: _improve(state, lane, resume, settings, activation))(staged, lanes)


@partial(jax.jit, static_argnames=("settings", "activation"))
def _many_end_staged(staged, lanes, resume, settings, activation):
    return jax.vmap(lambda state, lane: _end_staged(state, lane, resume, settings, activation))(staged, lanes)


def _staged_bucket(
    lanes: Lane,
    memory: Memory,
    resume: Resume,
    count: int,
    settings: FitSettings,
    activation: Callable[[Array], Array],
) -> tuple[Patch, FitInfo]:
    """The staged recipe for one bucket; only lanes that miss their target go through the steps on the value."""
    staged = _many_settle(lanes, memory, resume, settings, activation)
    missing = np.flatnonzero(~np.asarray(staged.held)[:count])
    if missing.size:
        size = _bucket(missing.size, settings.lanes)
        part = _padded(jax.tree.map(lambda leaf: leaf[missing], (staged, lanes)), size)
        improved = _many_improve(*part, resume, settings, activation)
        staged = jax.tree.map(lambda old, new: old.at[missing].set(new[: missing.size]), staged, improved)
    return _many_end_staged(staged, lanes, resume, settings, activation)


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
        >>> query, nothing = jnp.ones((1, 4)), jnp.zeros((0, 4))
        >>> lane = Lane(query, 0 * query, nothing, None, jnp.array(3), head[:, 3], jnp.array(1.0))
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
            patch, info = _staged_bucket(part, memory, resume, count, settings, activation)
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
    going = [(lane, lane) for lane in range(count)]  # where in the bucket, which lane
    part = lanes
    while going:
        states = _many_advance(states, part, memory, resume, settings, activation)
        done = np.asarray(states.done)
        for slot, lane in going:
            if done[slot]:
                finished[lane] = jax.tree.map(lambda leaf, slot=slot: leaf[slot], states)
        going = [(slot, lane) for slot, lane in going if not done[slot]]
        if going and _bucket(len(going), settings.lanes) < part.target.shape[0]:
            (slots, rest), size = np.asarray(going).T, _bucket(len(going), settings.lanes)
            states = _padded(jax.tree.map(lambda leaf, slots=slots: leaf[slots], states), size)
            part = _padded(jax.tree.map(lambda leaf, rest=rest: leaf[rest], lanes), size)
            going = list(enumerate(rest.tolist()))
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(finished[lane] for lane in range(count)))
    size = lanes.target.shape[0]
    return _many_end(_padded(states, size), lanes, memory, resume, settings, activation)
