"""The paper's recipe: key, bias and value together, with Adam, until the edit holds and the memory is quiet."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.memory import Memory, counted
from tpatch_jax.core.objective import edit_loss, total_loss
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.problem import FitInfo, FitProblem, FitSettings, Head, held
from tpatch_jax.typing import Activation, RngKey

__all__ = ["JointState", "advance", "begin", "end", "optimiser"]


BETTER = 0.001
"""By so much the memory loss must fall at a look for a fit that holds to go on."""

PLATEAU, WAIT = 0.05, 1
"""The rate is halved once the edit loss has not fallen by this share at more looks in a row than this."""


class JointState(NamedTuple):
    """Where a joint fit stands.

    Attributes:
        params: key, bias and value, the value in units of ``settings.value_spread``.
        optimiser: Adam's state.
        step: steps taken.
        done: whether it has stopped.
        rate: factor on the learning rate.
        best_loss: the least edit loss at a look, from which a plateau is told.
        flat: looks since then.
        best_silence: the least memory loss at a look at which the edit held.
    """

    params: dict[str, Array]
    optimiser: optax.OptState
    step: Int[Array, ""]
    done: Bool[Array, ""]
    rate: Float[Array, ""]
    best_loss: Float[Array, ""]
    flat: Int[Array, ""]
    best_silence: Float[Array, ""]


def _patch(params: dict[str, Array], settings: FitSettings, act: Activation) -> Patch:
    """The neurons that a lane's parameters stand for."""
    key, value = params["key"], params["value"]
    if not settings.output_bias:
        return Patch(key[None], params["bias"][None], value[None])
    # A neuron with a zero key and bias one is always on; dividing by its activation leaves exactly the ungated bias.
    always = jnp.full_like(value, params["bias"]) / act(jnp.ones((), value.dtype))
    zero = jnp.zeros((), value.dtype)
    return Patch(jnp.stack([key, jnp.zeros_like(key)]), jnp.stack([zero, zero + 1]), jnp.stack([value, always]))


def _wide(x: Array) -> Array:
    """Numbers in the precision that is trained in: float32 for the narrower ones, in which Adam's steps are lost."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _joint_logits(
    params: dict[str, Array], lane: FitProblem, head: Head, settings: FitSettings, act: Activation
) -> tuple[Array, Array]:
    """Pre-activations on the lane's queries ``[contexts]`` and the patched logits ``[contexts, vocabulary]``."""
    inside, outside = (0.0, params["bias"]) if settings.output_bias else (params["bias"], 0.0)
    z = _wide(lane.query) @ params["key"] + inside
    output = _wide(lane.output) + act(z)[:, None] * params["value"] + outside
    return z, _wide(head(lane.context, output.astype(lane.output.dtype)))


def _joint_loss(
    params: dict[str, Array],
    lane: FitProblem,
    memory: Memory,
    head: Head,
    settings: FitSettings,
    act: Activation,
) -> tuple[Array, dict[str, Array]]:
    z, logits = _joint_logits(params, lane, head, settings, act)
    weights = settings.weights
    loss_edit = edit_loss(logits, lane.target, weights.label_smoothing, weights.entropy)
    return total_loss(loss_edit, z, _silence(params, lane, memory, settings), weights)


def _silence(params: dict[str, Array], lane: FitProblem, memory: Memory, settings: FitSettings) -> Array:
    bias = 0.0 if settings.output_bias else params["bias"]
    z = jnp.where(counted(memory, lane.target), _wide(memory.query) @ params["key"] + bias, -jnp.inf)
    return jnp.concatenate([z, _wide(lane.negative) @ params["key"] + bias])


def optimiser(settings: FitSettings) -> optax.GradientTransformation:
    """The authors' Adam, but for the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        # Before Adam: a part of the gradient, as in the authors' code.
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_adam(),
    )


def begin(lane: FitProblem, settings: FitSettings, rng: RngKey) -> JointState:
    """The paper's initial values: ``k = q/‖q‖²``, so that ``z = 1`` on the edited query, ``b = 0``, a random value."""
    query = _wide(lane.query[0])
    params = {
        "key": query / jnp.sum(jnp.square(query)),
        "bias": jnp.zeros((), query.dtype),
        # The paper trains x with v = α·x; Adam's steps do not see the gradient's scale, so α is a rate here.
        "value": jax.random.normal(rng, query.shape, query.dtype),
    }
    zero, infinite = jnp.zeros((), query.dtype), jnp.full((), jnp.inf, query.dtype)
    step, done = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    return JointState(params, optimiser(settings).init(params), step, done, zero + 1, infinite, step, infinite)


def _in_full(params: dict[str, Array], settings: FitSettings) -> dict[str, Array]:
    """The parameters with the value in full, ``v = α·x``."""
    return {**params, "value": params["value"] * settings.value_spread}


def advance(
    state: JointState,
    lane: FitProblem,
    memory: Memory,
    head: Head,
    settings: FitSettings,
    act: Activation,
) -> JointState:
    """One chunk of ``settings.patience`` steps, then the authors' look at the edit and at the held-out memory.

    From the look before ``settings.least_steps`` on, a look counts if the edit holds. The first that counts sets the
    memory loss to beat; the fit stops at the first after it that is not better by `BETTER` than the best so far.

    Source: Huang et al. 2023 and their code.
    """
    rows = memory.query.shape[0]
    kept = max(1, rows - rows // 10)
    seen = memory._replace(query=memory.query[:kept], answer=memory.answer[:kept])
    unseen = memory._replace(query=memory.query[kept:], answer=memory.answer[kept:]) if kept < rows else memory
    transform = optimiser(settings)

    def loss_of(params: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        return _joint_loss(_in_full(params, settings), lane, seen, head, settings, act)

    def step(carry: tuple[dict[str, Array], optax.OptState], _: None) -> tuple[Any, Array]:
        params, moments = carry
        (loss, _), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        update, moments = transform.update(gradient, moments, params)
        update = jax.tree.map(lambda leaf: -settings.learning_rate * state.rate * leaf, update)
        return (optax.apply_updates(params, update), moments), loss

    (params, moments), losses = jax.lax.scan(step, (state.params, state.optimiser), None, length=settings.patience)
    full = _in_full(params, settings)
    z, logits = _joint_logits(full, lane, head, settings, act)
    weights = settings.weights
    loss = edit_loss(logits, lane.target, weights.label_smoothing, weights.entropy)
    _, terms = total_loss(loss, z, _silence(full, lane, unseen, settings), weights)
    silence, steps = terms["l_m1"] + terms["l_m2"], state.step + settings.patience
    counts = held(logits, lane.target).all() & (steps >= settings.least_steps - settings.patience)
    quieter = silence < state.best_silence - BETTER
    lower = loss < state.best_loss * (1 - PLATEAU)
    flat = jnp.where(lower, 0, state.flat + 1)
    return JointState(
        params,
        moments,
        steps,
        (counts & ~quieter) | (steps >= settings.most_steps) | ~jnp.isfinite(losses[-1]),
        jnp.where(flat > WAIT, state.rate / 2, state.rate),
        jnp.where(lower, loss, state.best_loss),
        jnp.where(flat > WAIT, 0, flat),
        jnp.where(counts & quieter, silence, state.best_silence),
    )


def end(
    state: JointState,
    lane: FitProblem,
    memory: Memory,
    head: Head,
    settings: FitSettings,
    act: Activation,
) -> tuple[Patch, FitInfo]:
    """The patch of a finished fit, and how it went."""
    params = _in_full(state.params, settings)
    _, terms = _joint_loss(params, lane, memory, head, settings, act)
    z, logits = _joint_logits(params, lane, head, settings, act)
    margin = (jnp.min(z) - jnp.max(_silence(params, lane, memory, settings))) / jnp.abs(jnp.mean(z))
    return _patch(params, settings, act), FitInfo(held(logits, lane.target)[0], state.step, margin, **terms)
