"""Values trained through the rest of the network: what an earlier layer needs, where no closed form exists.

Only the end of each row is run again, from the token at which the patch fires (`tpatch_jax.models.networks.fork`); all
lanes of a chunk take their steps together, and one that says its target stops and is dropped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.lanes import minimise_lanes

__all__ = ["TargetRows", "ValueTrainingInfo", "ValueTrainingSettings", "kept_close", "train_values"]

NEUTRAL_EVERY = 2
"""A neutral row is looked at in every second step, and then counts for both: it costs as much as a target's."""

Run = Callable[[Any, Float[Array, "rows d"]], Float[Array, "rows places vocabulary"]]
"""From what is known of some rows, and what is added to the FFN's output at their first positions, ``[rows, d]``, to
log-probabilities at the places that are read, ``[rows, places, vocabulary]``."""


class ValueTrainingSettings(NamedTuple):
    """Options of values trained through the network.

    Attributes:
        steps: at most so many steps of Adam.
        rate: Adam's learning rate, in units of ``longest · ‖output‖ / √d`` per entry.
        momentum: Adam's ``b1``.
        longest: the value's largest length, over the length of the FFN's output at its site.
        enough: a lane stops once the mean loss of its targets, in nats, is below this.
        closeness: weight of the divergence from the unedited model on neutral prompts.
        decay: weight of the value's squared length over its limit.
    """

    steps: int = 25
    rate: float = 0.16
    momentum: float = 0.8
    longest: float = 4.0
    enough: float = 0.01
    closeness: float = 0.0625
    decay: float = 0.02


class TargetRows(NamedTuple):
    """Rows of some lanes, equally many each, and the places in them at which log-probabilities are read.

    Attributes:
        rows: what ``run`` knows of the rows, every leaf with leading axis ``lanes · rows``, lane after lane.
        activity: how strongly the lane's neuron fires in each row, ``[lanes, rows]``.
        wanted: the token wanted at each place, ``[lanes, rows, places]`` int, or log-probabilities to stay close to,
            ``[lanes, rows, places, vocabulary]``.
        weight: of each place in its lane's loss, ``[lanes, rows, places]``; 0 is padding.
    """

    rows: Any
    activity: Float[Array, "lanes rows"]
    wanted: Int[Array, "lanes rows places"] | Float[Array, "lanes rows places vocabulary"]
    weight: Float[Array, "lanes rows places"]


class ValueTrainingInfo(NamedTuple):
    """How it went, for each lane.

    Attributes:
        steps: steps taken.
        loss: mean negative log-likelihood of the targets at the end, in nats.
        closeness: divergence from the unedited model on the neutral prompt last looked at, in nats.
    """

    steps: Int[np.ndarray, " lanes"]
    loss: Float[np.ndarray, " lanes"]
    closeness: Float[np.ndarray, " lanes"]


def kept_close(
    before: Float[Array, "*rows vocabulary"], now: Float[Array, "*rows vocabulary"]
) -> Float[Array, "*rows"]:
    """``KL(before ‖ now)`` of log-probabilities, ``[…, vocabulary]`` to ``[…]``, in nats.

    Example:
        >>> p = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> float(kept_close(p, p)[0])
        0.0
    """
    return jnp.sum(jnp.exp(before) * (before - now), -1)


def _unlikely(wanted: Array, log_probs: Array) -> Array:
    return -jnp.take_along_axis(log_probs, wanted[..., None], -1)[..., 0]


def _per_lane(
    targets: TargetRows, values: Float[Array, "lanes d"], run: Run, divergence: Callable[[Array, Array], Array]
) -> Float[Array, " lanes"]:
    """The weighted sum over its places of each lane's loss."""
    added = (targets.activity[..., None] * values[:, None]).reshape(-1, values.shape[-1])
    log_probs = run(targets.rows, added)
    log_probs = log_probs.reshape(*targets.weight.shape, log_probs.shape[-1])
    losses = jnp.where(targets.weight > 0, divergence(targets.wanted, log_probs), 0.0) * targets.weight
    return jnp.sum(losses, (1, 2))


def _rows_of_step(targets: TargetRows, number: int, always: int) -> TargetRows:
    """The rows of one step: the first ones always, of the others one at a time, which then counts for all of them."""
    lanes, rows = targets.activity.shape
    others = rows - always
    if others < 2:
        return targets
    pick = np.asarray([*range(always), always + number % others])
    factor = np.where(np.arange(always + 1) < always, 1, others).astype(np.float32)
    index, grid = (np.arange(lanes)[:, None] * rows + pick).reshape(-1), np.ix_(np.arange(lanes), pick)
    activity, wanted, weight = (field[grid] for field in targets[1:])
    part = jax.tree.map(lambda leaf: leaf[index], targets.rows)
    return TargetRows(part, activity, wanted, weight * factor[:, None])


class _Problem(NamedTuple):
    """What each lane is trained on; ``unit`` is the value's limit per entry, ``[lanes, 1]``."""

    targets: TargetRows
    neutral: TargetRows | None
    unit: Float[Array, "lanes 1"]


class _State(NamedTuple):
    """Of each lane: its losses when last looked at, and how many looks in a row found its target said."""

    loss: Float[Array, " lanes"]
    closeness: Float[Array, " lanes"]
    satisfied: Int[Array, " lanes"]


def _within_limit(moves: Float[Array, "lanes d"], problem: _Problem) -> Float[Array, "lanes d"]:
    """Moves whose root mean square is 1 at most: values no longer than their limit."""
    length = jnp.sqrt(jnp.mean(jnp.square(moves), -1, keepdims=True))
    return moves / jnp.maximum(length, 1.0)


def train_values(
    targets: TargetRows,
    neutral: TargetRows | None,
    run: Run,
    scale: Float[Array, " lanes"],
    settings: ValueTrainingSettings,
) -> tuple[Float[Array, "lanes d"], ValueTrainingInfo]:
    """The values of some lanes, each trained for its own targets.

    ``min_v  mean NLL(targets) + c·KL(unedited ‖ edited on neutral prompts) + w·‖v‖²/limit²``, by Adam with ``‖v‖``
    projected to its limit after each step. Each step sees a lane's first row and one of the others, every second
    step one neutral row as well, in turn. A lane has ended when every one of its rows has had its turn with a loss
    that is low enough, or when its loss is no number. Lanes never couple.

    Args:
        targets: where and what each lane's neuron should make the model say, the bare prompt first; the weights of a
            lane sum to one.
        neutral: where it should change little; ``None`` is nowhere.
        run: the network after the cut.
        scale: the length of the FFN's output at each lane's site, ``[lanes]``.
        settings: options.

    Returns:
        The values, ``[lanes, d]``, and a `ValueTrainingInfo`.

    Source: Meng et al. 2022, section 3.1, for the objective; T-Patcher's value is trained the same way here.

    Example:
        >>> run = lambda rows, added: jax.nn.log_softmax(rows + added)[:, None]
        >>> targets = TargetRows(jnp.zeros((1, 4)), jnp.ones((1, 1)), jnp.array([[[2]]]), jnp.ones((1, 1, 1)))
        >>> values, info = train_values(targets, None, run, jnp.ones(1), ValueTrainingSettings())
        >>> int(values[0].argmax())
        2
    """
    lanes, hidden_size = scale.shape[0], jax.tree.leaves(targets.rows)[0].shape[-1]
    turns = max(1, targets.activity.shape[1] - 1)

    def loss(
        moves: Float[Array, "lanes d"], problem: _Problem, state: _State, number: int
    ) -> tuple[Float[Array, ""], tuple[Float[Array, " lanes"], Float[Array, " lanes"]]]:
        values = moves * problem.unit
        nll = _per_lane(_rows_of_step(problem.targets, number, 1), values, run, _unlikely)
        close = jnp.zeros_like(nll)
        if problem.neutral is not None and number % NEUTRAL_EVERY == 0:
            close = _per_lane(_rows_of_step(problem.neutral, number // NEUTRAL_EVERY, 0), values, run, kept_close)
        decay = settings.decay * jnp.mean(jnp.square(moves), -1)
        return jnp.sum(nll + NEUTRAL_EVERY * settings.closeness * close + decay), (nll, close)

    def stop(state: _State, report: tuple[Array, Array], number: int) -> tuple[_State, Bool[Array, " lanes"]]:
        nll, close = report
        close = close if number % NEUTRAL_EVERY == 0 else state.closeness
        satisfied = jnp.where(nll < settings.enough, state.satisfied + 1, 0)
        return _State(nll, close, satisfied), (satisfied >= turns) | ~jnp.isfinite(nll)

    problem = _Problem(targets, neutral, (settings.longest * scale / hidden_size**0.5)[:, None])
    state = _State(jnp.zeros(lanes), jnp.zeros(lanes), jnp.zeros(lanes, jnp.int32))
    moves = jnp.zeros((lanes, hidden_size), jnp.float32)
    adam = optax.adam(settings.rate, b1=settings.momentum, b2=0.95)
    result = minimise_lanes(loss, _within_limit, stop, moves, problem, state, adam, settings.steps)
    info = ValueTrainingInfo(result.steps, result.state.loss, result.state.closeness)
    return jnp.asarray(result.moves) * problem.unit, info
