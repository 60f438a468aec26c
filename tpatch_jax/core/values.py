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
from jax import Array

from tpatch_jax.core.sizes import power_of_two

__all__ = ["TargetRows", "ThroughInfo", "ThroughSettings", "kept_close", "train_values"]

NEUTRAL_EVERY = 2
"""A neutral row is looked at in every second step, and then counts for both: it costs as much as a target's."""

Run = Callable[[Any, Array], Array]
"""From what is known of some rows, and what is added to the FFN's output at their first positions, ``[rows, d]``, to
log-probabilities at the asked places, ``[rows, places, vocabulary]``."""


class ThroughSettings(NamedTuple):
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
    activity: Array
    wanted: Array
    weight: Array


class ThroughInfo(NamedTuple):
    """How it went, for each lane.

    Attributes:
        steps: steps taken.
        loss: mean negative log-likelihood of the targets at the end, in nats.
        closeness: divergence from the unedited model on the neutral prompt last looked at, in nats.
    """

    steps: np.ndarray
    loss: np.ndarray
    closeness: np.ndarray


def kept_close(before: Array, now: Array) -> Array:
    """``KL(before ‖ now)`` of log-probabilities, ``[…, vocabulary]`` to ``[…]``, in nats.

    Example:
        >>> p = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> float(kept_close(p, p)[0])
        0.0
    """
    return jnp.sum(jnp.exp(before) * (before - now), -1)


def _per_lane(asked: TargetRows, values: Array, run: Run, divergence: Callable[[Array, Array], Array]) -> Array:
    """The weighted sum over its places of each lane's loss: ``[lanes]``."""
    added = (asked.activity[..., None] * values[:, None]).reshape(-1, values.shape[-1])
    found = run(asked.rows, added)
    found = found.reshape(*asked.weight.shape, found.shape[-1])
    losses = jnp.where(asked.weight > 0, divergence(asked.wanted, found), 0.0) * asked.weight
    return jnp.sum(losses, (1, 2))


def _unlikely(wanted: Array, found: Array) -> Array:
    return -jnp.take_along_axis(found, wanted[..., None], -1)[..., 0]


def _part(asked: TargetRows, lanes: np.ndarray, rows: np.ndarray) -> TargetRows:
    """Some lanes of several, with some of their rows."""
    index = (lanes[:, None] * asked.activity.shape[1] + rows).reshape(-1)
    fields = (field[np.ix_(lanes, rows)] for field in asked[1:])
    return TargetRows(jax.tree.map(lambda leaf: leaf[index], asked.rows), *fields)


def _turn(asked: TargetRows, number: int, always: int) -> TargetRows:
    """The rows of one step: the first ones always, of the others one at a time, which then counts for all of them."""
    lanes, rows = asked.activity.shape
    others = rows - always
    if others < 2:
        return asked
    pick = np.asarray([*range(always), always + number % others])
    factor = np.where(np.arange(always + 1) < always, 1, others).astype(np.float32)
    found = _part(asked, np.arange(lanes), pick)
    return found._replace(weight=found.weight * factor[:, None])


class _Moving(NamedTuple):
    """Lanes that still take steps: which they are, what they are trained on, and where they stand."""

    lane: np.ndarray
    targets: TargetRows
    neutral: TargetRows | None
    unit: Array
    moves: Array
    state: optax.OptState


def train_values(
    targets: TargetRows, neutral: TargetRows | None, run: Run, scale: Array, settings: ThroughSettings
) -> tuple[Array, ThroughInfo]:
    """The values of some lanes, each trained for its own targets.

    ``min_v  mean NLL(targets) + c·KL(unedited ‖ edited on neutral prompts) + w·‖v‖²/limit²``, by Adam with ``‖v‖``
    projected to its limit after each step. Each step sees a lane's first row and one of the others, every second
    step one neutral row as well, in turn. Lanes never couple; those that are done are dropped, by halves.

    Args:
        targets: where and what each lane's neuron should make the model say, the bare prompt first; the weights of a
            lane sum to one.
        neutral: where it should change little; ``None`` is nowhere.
        run: the network after the cut.
        scale: the length of the FFN's output at each lane's site, ``[lanes]``.
        settings: options.

    Returns:
        The values, ``[lanes, d]``, and a `ThroughInfo`.

    Source: Meng et al. 2022, section 3.1, for the objective; T-Patcher's value is trained the same way here.
    """
    total, hidden_size = scale.shape[0], jax.tree.leaves(targets.rows)[0].shape[-1]
    transform = optax.adam(settings.rate, b1=settings.momentum, b2=0.95)

    def loss(moves: Array, now: _Moving, number: int) -> tuple[Array, tuple[Array, Array]]:
        values = moves * now.unit
        said = _per_lane(_turn(now.targets, number, 1), values, run, _unlikely)
        close = jnp.zeros_like(said)
        if now.neutral is not None and number % NEUTRAL_EVERY == 0:
            close = _per_lane(_turn(now.neutral, number // NEUTRAL_EVERY, 0), values, run, kept_close)
        decay = settings.decay * jnp.mean(jnp.square(moves), -1)
        return jnp.sum(said + NEUTRAL_EVERY * settings.closeness * close + decay), (said, close)

    step = jax.value_and_grad(loss, has_aux=True)
    unit = (settings.longest * scale / hidden_size**0.5)[:, None]
    start = jnp.zeros((total, hidden_size), jnp.float32)
    now = _Moving(np.arange(total), targets, neutral, unit, start, transform.init(start))
    values, info = np.zeros((total, hidden_size), np.float32), ThroughInfo(*np.zeros((3, total)))
    # A lane is done when every one of its rows has had its turn without complaint.
    content, turns = np.zeros(total, int), max(1, targets.activity.shape[1] - 1)
    done = np.zeros(total, bool)
    for number in range(settings.steps + 1):
        (_, (said, close)), gradient = step(now.moves, now, number)
        said, close, reached = np.asarray(said), np.asarray(close), np.asarray(now.moves * now.unit)
        open_ = ~done[now.lane]
        lane = now.lane[open_]
        values[lane], info.steps[lane] = reached[open_], number
        info.loss[lane] = said[open_]
        if number % NEUTRAL_EVERY == 0:
            info.closeness[lane] = close[open_]
        content[lane] = np.where(said[open_] < settings.enough, content[lane] + 1, 0)
        done[lane] |= (content[lane] >= turns) | ~np.isfinite(said[open_])
        if number == settings.steps or done.all():
            break
        update, state = transform.update(gradient, now.state, now.moves)
        new = now.moves + jnp.asarray(update)
        length = jnp.sqrt(jnp.mean(jnp.square(new), -1, keepdims=True))
        now = now._replace(moves=new / jnp.maximum(length, 1.0), state=state)
        going = np.flatnonzero(~done[now.lane])
        size = power_of_two(going.size)
        if size < now.lane.size:
            now = _shrunk(now, np.resize(going, size))
    return jnp.asarray(values), info._replace(steps=info.steps.astype(int))


def _shrunk(now: _Moving, keep: np.ndarray) -> _Moving:
    """Only some of the lanes; one that stands in twice does the same both times."""
    state = jax.tree.map(lambda leaf: leaf[keep] if leaf.ndim else leaf, now.state)
    neutral = now.neutral and _part(now.neutral, keep, np.arange(now.neutral.activity.shape[1]))
    targets = _part(now.targets, keep, np.arange(now.targets.activity.shape[1]))
    return _Moving(now.lane[keep], targets, neutral, now.unit[keep], now.moves[keep], state)
