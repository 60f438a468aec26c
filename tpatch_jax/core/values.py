"""Values trained through the rest of the network: what an earlier layer needs, where no closed form exists.

Only the end of each row is run again, from the token at which the patch fires (`tpatch_jax.models.networks.fork`); all
lanes of a chunk take their steps together, and one that says its target stops and is dropped.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.lanes import minimise_lanes

__all__ = ["TargetRows", "ValueTrainingInfo", "ValueTrainingSettings", "kept_close", "train_values"]

LOOK_EVERY = 3
"""Every so many steps all rows of a lane that is ready for it are looked at."""

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


def _row_weights(targets: TargetRows) -> Float[Array, "lanes rows"]:
    """Each row's weight in its lane's loss; 0 is padding."""
    return jnp.sum(targets.weight, 2)


def _row_losses(targets: TargetRows, log_probs: Array) -> Float[Array, "lanes rows"]:
    """Mean loss of each row over its places, in nats; 0 of padding."""
    weight = _row_weights(targets)
    losses = jnp.where(targets.weight > 0, _unlikely(targets.wanted, log_probs), 0.0) * targets.weight
    return jnp.sum(losses, 2) / jnp.where(weight > 0, weight, 1.0)


def _run_rows(rows: Any, activity: Float[Array, "lanes rows"], values: Float[Array, "lanes d"], run: Run) -> Array:
    """Log-probabilities in each row with its lane's value active, ``[lanes, rows, places, vocabulary]``."""
    added = (activity[..., None] * values[:, None]).reshape(-1, values.shape[-1])
    log_probs = run(rows, added)
    return log_probs.reshape(*activity.shape, *log_probs.shape[1:])


def _take_rows(targets: TargetRows, pick: Int[Array, "lanes picked"]) -> TargetRows:
    """Some rows of each lane."""
    lanes, rows = targets.activity.shape
    lane = jnp.arange(lanes)[:, None]
    index = (lane * rows + pick).reshape(-1)
    part = jax.tree.map(lambda leaf: leaf[index], targets.rows)
    return TargetRows(part, *(field[lane, pick] for field in targets[1:]))


def _joined(left: Any, right: Any, lanes: int) -> Any:
    """Rows of two kinds as rows of one batch, lane after lane."""

    def join(a: Array, b: Array) -> Array:
        parts = [leaf.reshape(lanes, -1, *leaf.shape[1:]) for leaf in (a, b)]
        return jnp.concatenate(parts, 1).reshape(-1, *a.shape[1:])

    return jax.tree.map(join, left, right)


class _Problem(NamedTuple):
    """What each lane is trained on; ``unit`` is the value's limit per entry, ``[lanes, 1]``."""

    targets: TargetRows
    neutral: TargetRows | None
    unit: Float[Array, "lanes 1"]


class _State(NamedTuple):
    """Of each lane: each row's loss when last looked at, the closeness, and whether all rows were low enough together.

    A row that was never looked at has an infinite loss.
    """

    losses: Float[Array, "lanes rows"]
    closeness: Float[Array, " lanes"]
    done: Bool[Array, " lanes"]


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
    projected to its limit after each step. Each step sees a lane's first row, one of the others (by turns the one that
    was farthest from its target when last looked at, and the next), and one neutral row. In every third step all rows
    of a lane are looked at where those that it saw say their targets; the lane has ended when all do, or when its loss
    is no number. Lanes never couple.

    Args:
        targets: where and what each lane's neuron should make the model say, the bare prompt first; the weights of a
            lane sum to one.
        neutral: where it should change little; ``None`` is nowhere.
        run: the network after the cut; a ``jax.tree_util.Partial`` of the same function is compiled once.
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
    program = _program(settings._replace(steps=0))
    problem = _Problem(targets, neutral, (settings.longest * scale / hidden_size**0.5)[:, None])
    # Rows of no weight are low enough from the start.
    weight = _row_weights(targets)
    losses = jnp.where(weight > 0, jnp.inf, -1.0)
    state = _State(losses, jnp.zeros(lanes), jnp.zeros(lanes, bool))
    moves = jnp.zeros((lanes, hidden_size), jnp.float32)
    run = run if isinstance(run, Partial) else Partial(run)
    loss, stop = Partial(program.loss, run), Partial(program.stop, run)
    result = minimise_lanes(loss, _within_limit, stop, moves, problem, state, program.optimiser, settings.steps)
    # Rows that were never looked at tell nothing.
    seen = np.where(np.isinf(result.state.losses), 0.0, np.asarray(weight))
    mean = np.where(seen > 0, result.state.losses * seen, 0.0).sum(1) / np.maximum(seen.sum(1), 1e-12)
    info = ValueTrainingInfo(result.steps, mean, result.state.closeness)
    return jnp.asarray(result.moves) * problem.unit, info


class _Program(NamedTuple):
    """The functions of one loop, the same objects for the same settings, so that ``jit`` recognises them."""

    loss: Callable[..., tuple[Array, tuple[Array, Array, Array]]]
    stop: Callable[..., tuple[_State, Array]]
    optimiser: optax.GradientTransformation


def _rows_of_step(problem: _Problem, state: _State, number: Int[Array, ""]) -> Int[Array, "lanes picked"]:
    """The first row of each lane and one of the others: the hardest when last looked at, or every second time the next.

    A row that cannot be reached would else keep all others from their turn.
    """
    lanes, rows = state.losses.shape
    first = jnp.zeros((lanes, 1), jnp.int32)
    if rows < 2:
        return first
    weight = _row_weights(problem.targets)[:, 1:]
    weighted = jnp.where(weight > 0, state.losses[:, 1:] * weight, -1.0)
    hardest = jnp.argmax(weighted, 1, keepdims=True).astype(jnp.int32)
    other = jnp.where(number % 2 == 0, hardest, number // 2 % (rows - 1))
    return jnp.concatenate([first, 1 + other], 1)


@lru_cache(maxsize=16)
def _program(settings: ValueTrainingSettings) -> _Program:
    def loss(
        run: Partial, moves: Float[Array, "lanes d"], problem: _Problem, state: _State, number: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Array, Array, Array]]:
        values, lanes = moves * problem.unit, moves.shape[0]
        pick = _rows_of_step(problem, state, number)
        targets = _take_rows(problem.targets, pick)
        rows, activity, beside = targets.rows, targets.activity, None
        if problem.neutral is not None:
            turn = jnp.full((lanes, 1), number % problem.neutral.activity.shape[1])
            beside = _take_rows(problem.neutral, turn)
            rows = _joined(rows, beside.rows, lanes)
            activity = jnp.concatenate([activity, beside.activity], 1)
        log_probs = _run_rows(rows, activity, values, run)
        aimed = log_probs[:, : pick.shape[1]]
        each = _row_losses(targets, aimed)
        share = _row_weights(targets)
        # The one that is seen stands for all others, with its own weight.
        others = jnp.sum(_row_weights(problem.targets)[:, 1:] > 0, 1).astype(share.dtype)
        nll = each[:, 0] * share[:, 0] + jnp.sum(each[:, 1:] * share[:, 1:], 1) * others
        close = jnp.zeros_like(nll) if beside is None else kept_close(beside.wanted[:, 0, 0], log_probs[:, -1, 0])
        decay = settings.decay * jnp.mean(jnp.square(moves), -1)
        return jnp.sum(nll + settings.closeness * close + decay), (pick, each, close)

    def stop(
        run: Partial, moves: Array, problem: _Problem, state: _State, report: tuple[Array, Array, Array],
        number: Int[Array, ""],
    ) -> tuple[_State, Bool[Array, " lanes"]]:  # fmt: skip
        pick, each, close = report
        lane = jnp.arange(moves.shape[0])[:, None]
        counts = _row_weights(problem.targets)[lane, pick] > 0
        losses = state.losses.at[lane, pick].set(jnp.where(counts, each, state.losses[lane, pick]))
        ready = jnp.all(jnp.where(counts, each, 0.0) < settings.enough, 1) & ~state.done
        # All rows of all lanes are looked at together, which is dear; never because of another lane alone, so that
        # lanes do not couple.
        due = (number % LOOK_EVERY == LOOK_EVERY - 1) & jnp.any(ready)

        def look(losses: Array) -> Array:
            log_probs = _run_rows(problem.targets.rows, problem.targets.activity, moves * problem.unit, run)
            seen = jnp.where(losses < 0, losses, _row_losses(problem.targets, log_probs))
            return jnp.where(ready[:, None], seen, losses)

        losses = jax.lax.cond(due, look, lambda losses: losses, losses)
        done = state.done | (ready & jnp.all(losses < settings.enough, 1))
        return _State(losses, close, done), done | ~jnp.all(jnp.isfinite(each), 1)

    return _Program(loss, stop, optax.adam(settings.rate, b1=settings.momentum, b2=0.95))
