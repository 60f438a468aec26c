"""This library's recipe: the key first, then the threshold, then the value, each by the cheapest means that works."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.memory import Memory, hardest
from tpatch_jax.core.objective import edit_loss, total_loss
from tpatch_jax.core.patch import Patch, sharpen
from tpatch_jax.core.problem import FitInfo, FitProblem, FitSettings, Head, held
from tpatch_jax.typing import Activation

__all__ = ["Recognised", "Staged", "end", "improve", "recognise", "settle"]


EASIER = 0.1
"""By how much of itself the split is less in a retry."""

MOMENTUM = 0.8
"""Of the key's steps."""

START, BELOW = 8.0, 0.6
"""A key starts with ``z = START·(1 - BELOW)`` on the edit's own queries, ``-START·BELOW`` on the mean memory query."""


class Staged(NamedTuple):
    """Where a staged fit stands once the key is settled: what the value is fitted with."""

    key: Float[Array, " d"]
    bias: Float[Array, ""]
    value: Float[Array, " d"]
    held: Bool[Array, ""]
    steps: Int[Array, ""]
    margin: Float[Array, ""]
    losses: dict[str, Float[Array, ""]]


def _sharp(activation: Activation, settings: FitSettings) -> Activation:
    return lambda z: activation(z * settings.sharpness) / settings.sharpness


class Recognised(NamedTuple):
    """A key with its threshold.

    Attributes:
        key: ``[d]``.
        bias: scalar.
        margin: as in `FitInfo`.
        losses: ``l_a, l_m1, l_m2`` of the key.
    """

    key: Float[Array, " d"]
    bias: Float[Array, ""]
    margin: Float[Array, ""]
    losses: dict[str, Float[Array, ""]]


def recognise(
    query: Float[Array, "contexts d"],
    target: Int[Array, ""],
    particular: Float[Array, "own_negatives d"],
    memory: Memory,
    settings: FitSettings,
    harder: Int[Array, ""] | int = 0,
) -> Recognised:
    """The key, and the threshold between the hardest negative and the edit's own queries.

    Its steps go straight down the gradient, with momentum, and only their length is set. Those of Adam would go as far
    along directions in which neither the edit nor its negatives lie, where odd inputs then make the patch fire.

    Args:
        query: the edit's own queries, the bare prompt first, ``[contexts, d]``.
        target: memory rows with this answer are no negatives, a scalar int.
        particular: queries on which this key in particular must stay silent, ``[own_negatives, d]``.
        memory: shared by all keys.
        settings: options; those of the key count.
        harder: 1 in a retry, which takes twice the steps and fires more readily, else 0; never part of the program.

    Returns:
        A key with ``z = 0`` at the threshold and ``z = 1`` at the lesser of the bare prompt and its contexts' mean.
    """
    whitener, mean = memory.whitener, memory.mean
    own_query = (query - mean) @ whitener
    always = jnp.ones(particular.shape[0], bool)
    centre, tiny = jnp.mean(own_query, 0), jnp.finfo(own_query.dtype).eps
    # In units in which the key's length is 1, so that a step in it weighs about as much as one in the bias.
    scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(centre)), tiny))
    params = {"key": centre * scale, "bias": jnp.full((), -BELOW, centre.dtype)}
    transform = optax.chain(optax.trace(MOMENTUM), optax.normalize_by_update_norm(-settings.key_rate))
    times = 1 + harder

    def key_loss(params: dict[str, Array], negative: Array, counts: Array) -> tuple[Array, dict[str, Array]]:
        key, bias = params["key"] * (START * scale), params["bias"] * START
        z = own_query @ key + bias
        z_memory = jnp.where(counts, negative @ (whitener @ key) + bias, -jnp.inf)
        return total_loss(jnp.zeros(()), z, z_memory, settings.weights)

    def mine(params: dict[str, Array]) -> tuple[Array, Array]:
        # Turning the key costs less than whitening every row: q·A·k = q·(A·k).
        index, counts = hardest(whitener @ params["key"], target, memory, settings.negatives)
        rows = jnp.concatenate([memory.query[index], particular]) - mean
        return rows, jnp.concatenate([counts, always])

    def round_(number: Array, carry: Any) -> Any:
        negative, counts = mine(carry[0])

        def step(number: Array, carry: Any) -> Any:
            params, optimiser = carry
            gradient, _ = jax.grad(key_loss, has_aux=True)(params, negative, counts)
            update, optimiser = transform.update(gradient, optimiser, params)
            slower = 0.5 * (1.0 + jnp.cos(jnp.pi * number / (settings.key_steps * times)))
            return optax.apply_updates(params, jax.tree.map(lambda leaf: slower * leaf, update)), optimiser

        first, last = (settings.key_steps * edge // settings.rounds * times for edge in (number, number + 1))
        return jax.lax.fori_loop(first, last, step, carry)

    # A loop of loops, so that a step is traced once and not again for each round.
    params, _ = jax.lax.fori_loop(0, settings.rounds, round_, (params, transform.init(params)))

    # The threshold goes between the hardest negative and the edit's own queries, of which one then has z = 1.
    negative, counts = mine(params)
    _, losses = key_loss(params, negative, counts)
    z = own_query @ params["key"]
    hard = jnp.max(jnp.where(counts, negative @ (whitener @ params["key"]), -jnp.inf), initial=-jnp.inf)
    # With no negative at all, the mean query (zero in whitened coordinates) stands in.
    hard = jnp.where(jnp.isfinite(hard), hard, 0.0)
    # The bare prompt must fire in any case; its contexts pull the threshold down as far as their mean does.
    least = jnp.minimum(z[0], jnp.mean(z))
    between = hard + settings.split * (1.0 - EASIER * harder) * (least - hard)
    # Where they cannot be parted the threshold lies just below the bare prompt, which then has z = 1.
    # A hair between them is none: a key that tells them apart by it is nothing but rounding errors.
    size = jnp.abs(jnp.mean(z))
    parted, least_room = least - hard > 1e-3 * size, 0.02 * size
    threshold = jnp.where(parted, between, (least if settings.eager else z[0]) - least_room)
    unit = jnp.maximum(jnp.where(parted, least - threshold, least_room), tiny)
    key = whitener @ params["key"] / unit
    bias = -threshold / unit - mean @ key
    margin = (jnp.min(z) - hard) / jnp.maximum(jnp.mean(z), tiny)
    return Recognised(key, bias, margin, losses)


def settle(
    lane: FitProblem,
    memory: Memory,
    head: Head,
    settings: FitSettings,
    activation: Activation,
    harder: Int[Array, ""] | int = 0,
) -> Staged:
    """The key, the threshold, and the shortest value along the lane's direction that holds."""
    key, bias, margin, losses = recognise(lane.query, lane.target, lane.negative, memory, settings, harder)
    a = _sharp(activation, settings)(lane.query @ key + bias)
    direction = lane.direction / jnp.maximum(jnp.linalg.norm(lane.direction), jnp.finfo(lane.direction.dtype).tiny)
    lengths = lane.scale * 2.0 ** jnp.arange(-4.0, 3.0)

    def says(length: Array, activity: Array | float) -> Array:
        return held(head(lane.context, lane.output + activity * length * direction), lane.target)

    # The shortest that holds in the most contexts at full activation; the overshoot serves weaker activations.
    chosen = lengths[jnp.argmax(jax.lax.map(lambda length: jnp.sum(says(length, 1.0)), lengths))]
    length = jnp.minimum(settings.overshoot * chosen, settings.value_limit * lane.scale)
    steps = settings.key_steps * (1 + jnp.asarray(harder, jnp.int32))
    return Staged(key, bias, length * direction, says(length, a[:, None])[0], steps, margin, losses)


def improve(staged: Staged, lane: FitProblem, head: Head, settings: FitSettings, activation: Activation) -> Staged:
    """Adam on the edit loss alone, for a value that misses its target in some context."""
    a = _sharp(activation, settings)(lane.query @ staged.key + staged.bias)
    transform = optax.adam(settings.value_learning_rate or 0.05)

    def logits(value: Array) -> Array:
        return head(lane.context, lane.output + a[:, None] * value * lane.scale)

    def loss(value: Array) -> Array:
        return edit_loss(logits(value), lane.target, settings.weights.label_smoothing, settings.weights.entropy)

    def missing(carry: tuple[Array, optax.OptState, Array]) -> Array:
        value, _, count = carry
        return (count < settings.value_steps) & ~held(logits(value), lane.target)[0]

    def step(carry: tuple[Array, optax.OptState, Array]) -> tuple[Array, optax.OptState, Array]:
        value, optimiser, count = carry
        update, optimiser = transform.update(jax.grad(loss)(value), optimiser, value)
        value = value + jnp.asarray(update)
        value = value * jnp.minimum(1.0, settings.value_limit / jnp.linalg.norm(value))
        return value, optimiser, count + 1

    start = staged.value / lane.scale
    value, _, count = jax.lax.while_loop(missing, step, (start, transform.init(start), jnp.zeros((), jnp.int32)))
    return staged._replace(value=value * lane.scale, steps=staged.steps + count)


def end(
    staged: Staged, lane: FitProblem, head: Head, settings: FitSettings, activation: Activation
) -> tuple[Patch, FitInfo]:
    """The patch of a finished fit, and how it went."""
    a = _sharp(activation, settings)(lane.query @ staged.key + staged.bias)
    logits = head(lane.context, lane.output + a[:, None] * staged.value)
    weights = settings.weights
    losses = {**staged.losses, "l_e": edit_loss(logits, lane.target, weights.label_smoothing, weights.entropy)}
    patch = Patch(staged.key[None], staged.bias[None], staged.value[None])
    info = FitInfo(held(logits, lane.target)[0], staged.steps, staged.margin, **losses)
    return sharpen(patch, settings.sharpness), info
