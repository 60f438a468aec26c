"""Values trained through the rest of the network: what an earlier layer needs, where no closed form exists.

Only the end of each row is run again, from the token at which the patch fires (`tpatch_jax.models.networks.fork`); all
lanes of a chunk take their steps together, and one that says its target stops and is dropped.

The steps are of second order. What a value has to do is a handful of numbers, one for each row: by how much the odds of
its target fall short, and how far the model has moved on a prompt that should stay as it is. Each is nearly linear in
the value, so a damped Gauss-Newton step is the solution of a system as small as there are rows.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.devices import host
from tpatch_jax.core.lanes import run_lanes

__all__ = [
    "KeptRows",
    "TargetRows",
    "ValueProblem",
    "ValueState",
    "ValueTrainingInfo",
    "ValueTrainingSettings",
    "gauss_newton_step",
    "kept_close",
    "log_odds_against",
    "losses_of_rows",
    "run_rows",
    "train_values",
    "value_step",
]

Run = Callable[[Any, Float[Array, "lanes rows d"]], Float[Array, "lanes places vocabulary"]]
"""From what is known of some lanes, and what is added to the FFN's output at the first token of each of their rows,
``[lanes, rows, d]``, to log-probabilities at all places that are read: of each target row as many as
`TargetRows.wanted` has, of each kept row one, ``[lanes, targets · places + kept, vocabulary]``."""


class ValueTrainingSettings(NamedTuple):
    """Options of values trained through the network.

    Attributes:
        steps: at most so many steps.
        longest: the value's largest length, over the length of the FFN's output at its site.
        enough: a lane stops once the loss of its first target and the mean loss of all, in nats, are below this.
        aim: the log-odds that a step aims at for each target.
        closeness: weight of the divergence from the unedited model on neutral prompts.
        near: a lane goes on until the mean of that divergence, in nats, is below this, too.
        damping: of the steps; more makes them shorter.
        farthest: how far a step goes at most, over the value's largest length.
    """

    steps: int = 10
    longest: float = 4.0
    enough: float = 0.05
    aim: float = 5.0
    closeness: float = 1.5
    near: float = 0.2
    damping: float = 10.0
    farthest: float = 0.45


class TargetRows(NamedTuple):
    """Rows of some lanes that should say something, equally many each.

    Attributes:
        activity: how strongly the lane's neuron fires in each row, ``[lanes, rows]``.
        wanted: the token wanted at each place, ``[lanes, rows, places]`` int.
        weight: of each place in its lane's loss, ``[lanes, rows, places]``; 0 is padding.
    """

    activity: Float[Array, "lanes rows"]
    wanted: Int[Array, "lanes rows places"]
    weight: Float[Array, "lanes rows places"]


class KeptRows(NamedTuple):
    """Rows of some lanes that should stay as they are, equally many each, read at one place each.

    Attributes:
        activity: how strongly the lane's neuron fires in each row, ``[lanes, rows]``.
        before: log-probabilities to stay close to, ``[lanes, rows, vocabulary]``.
    """

    activity: Float[Array, "lanes rows"]
    before: Float[Array, "lanes rows vocabulary"]


class ValueTrainingInfo(NamedTuple):
    """How it went, for each lane.

    Attributes:
        steps: steps taken.
        loss: mean negative log-likelihood of the targets at the end, in nats.
        closeness: mean divergence from the unedited model on neutral prompts at the end, in nats.
        at_start: whether the first target was surely said before any step: each of its tokens likelier than not.
    """

    steps: Int[np.ndarray, " lanes"]
    loss: Float[np.ndarray, " lanes"]
    closeness: Float[np.ndarray, " lanes"]
    at_start: Bool[np.ndarray, " lanes"]


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


def losses_of_rows(
    targets: TargetRows, log_probs: Float[Array, "lanes rows places vocabulary"]
) -> Float[Array, "lanes rows"]:
    """Mean loss of each row over its places, in nats; 0 of padding.

    Args:
        targets: the rows and what is wanted in each.
        log_probs: at their places, ``[lanes, rows, places, vocabulary]``.

    Returns:
        ``[lanes, rows]``.

    Example:
        >>> rows = TargetRows(jnp.ones((1, 1)), jnp.array([[[1]]]), jnp.ones((1, 1, 1)))
        >>> round(float(losses_of_rows(rows, jnp.log(jnp.full((1, 1, 1, 2), 0.5)))[0, 0]), 3)
        0.693
    """
    weight = _row_weights(targets)
    losses = jnp.where(targets.weight > 0, _unlikely(targets.wanted, log_probs), 0.0) * targets.weight
    return jnp.sum(losses, 2) / jnp.where(weight > 0, weight, 1.0)


def run_rows(
    run: Run, known: Any, targets: TargetRows, kept: KeptRows | None, added: Float[Array, "lanes rows d"]
) -> tuple[Float[Array, "lanes targets places vocabulary"], Float[Array, "lanes kept vocabulary"]]:
    """What the rows say with something added to the FFN's output at the first token of each.

    Args:
        run: the network after the cut.
        known: what it knows of the lanes.
        targets: the rows that should say something, which come first.
        kept: the rows that should stay.
        added: to each row, ``[lanes, rows, d]``.

    Returns:
        Log-probabilities at the places of the targets, ``[lanes, targets, places, vocabulary]``, and of the others,
        ``[lanes, kept, vocabulary]``.

    Example:
        >>> run = lambda known, added: jax.nn.log_softmax(known[:, None] + added)
        >>> targets = TargetRows(jnp.ones((1, 1)), jnp.array([[[1]]]), jnp.ones((1, 1, 1)))
        >>> said, _ = run_rows(run, jnp.zeros((1, 2)), targets, None, jnp.array([[[0.0, 1.0]]]))
        >>> said.shape, int(said[0, 0, 0].argmax())
        ((1, 1, 1, 2), 1)
    """
    log_probs = run(known, added)
    lanes, rows, places = targets.wanted.shape
    said = log_probs[:, : rows * places].reshape(lanes, rows, places, -1)
    return said, log_probs[:, rows * places :]


def _activity(targets: TargetRows, kept: KeptRows | None) -> Float[Array, "lanes rows"]:
    """Of all rows, the targets first."""
    return targets.activity if kept is None else jnp.concatenate([targets.activity, kept.activity], 1)


class ValueProblem(NamedTuple):
    """What each lane is trained on.

    ``limit`` is the value's largest length, ``[lanes, 1]``, ``most`` so many steps are taken at most, a scalar int.
    """

    known: Any
    targets: TargetRows
    kept: KeptRows | None
    limit: Float[Array, "lanes 1"]
    most: Int[Array, ""]


class ValueState(NamedTuple):
    """Of each lane: where it stands, and what its rows said when last looked at.

    Attributes:
        move: the value over its limit, ``[lanes, d]``.
        losses: each target's loss, ``[lanes, targets]``.
        divergence: of each kept row, ``[lanes, kept]``.
        at_start: see `ValueTrainingInfo`.
    """

    move: Float[Array, "lanes d"]
    losses: Float[Array, "lanes targets"]
    divergence: Float[Array, "lanes kept"]
    at_start: Bool[Array, " lanes"]


def log_odds_against(
    targets: TargetRows, log_probs: Float[Array, "lanes rows places vocabulary"]
) -> Float[Array, "lanes rows"]:
    """``log((1 - p)/p)`` of each row's tokens, their soft maximum: nearly linear where ``log p`` is not.

    Args:
        targets: the rows and what is wanted in each.
        log_probs: at their places, ``[lanes, rows, places, vocabulary]``.

    Returns:
        ``[lanes, rows]``; 0 of padding.

    Example:
        >>> rows = TargetRows(jnp.ones((1, 1)), jnp.array([[[1]]]), jnp.ones((1, 1, 1)))
        >>> round(float(log_odds_against(rows, jnp.log(jnp.array([[[[0.75, 0.25]]]])))[0, 0]), 3)
        1.099
    """
    loss = jnp.clip(_unlikely(targets.wanted, log_probs), 1e-6, 60.0)
    odds = jnp.where(targets.weight > 0, loss + jnp.log(-jnp.expm1(-loss)), -jnp.inf)
    there = _row_weights(targets) > 0
    return jnp.where(there, jax.nn.logsumexp(jnp.where(there[..., None], odds, 0.0), -1), 0.0)


def gauss_newton_step(
    slope: Float[Array, "*lanes rows d"],
    residual: Float[Array, "*lanes rows"],
    weight: Float[Array, "*lanes rows"],
    damping: float,
) -> Float[Array, "*lanes d"]:
    """``argmin_δ ½ Σ_r w_r (residual_r + slope_r·δ)² + ½ damping ‖δ‖²``, by a system as large as there are rows.

    Args:
        slope: of each residual, ``[…, rows, d]``.
        residual: where it stands, ``[…, rows]``.
        weight: of its square, ``[…, rows]``.
        damping: above 0.

    Returns:
        The step ``δ``, ``[…, d]``.

    Source: Levenberg 1944; the dual form, since there are fewer rows than entries.

    Example:
        >>> gauss_newton_step(jnp.array([[2.0, 0.0]]), jnp.array([-4.0]), jnp.ones(1), 1e-6).round(3).tolist()
        [2.0, 0.0]
    """
    root = jnp.sqrt(weight)
    rows = slope * root[..., None]
    exactly = jax.lax.Precision.HIGHEST
    system = jnp.matmul(rows, jnp.swapaxes(rows, -1, -2), precision=exactly)
    system = system + damping * jnp.eye(rows.shape[-2], dtype=rows.dtype)
    dual = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), (residual * root)[..., None])
    return -jnp.matmul(jnp.swapaxes(rows, -1, -2), dual, precision=exactly)[..., 0]


def train_values(
    known: Any,
    targets: TargetRows,
    kept: KeptRows | None,
    run: Run,
    scale: Float[Array, " lanes"],
    settings: ValueTrainingSettings,
    start: Float[Array, "lanes d"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "lanes d"], ValueTrainingInfo]:
    """The values of some lanes, each trained for its own targets.

    ``min_v  ½ Σ_targets w (aim - log-odds)₊² + c · mean KL(unedited ‖ edited on kept rows)`` by damped Gauss-Newton
    steps from ``start``, with ``‖v‖`` kept to its limit. Each step looks at all rows. A lane has ended when its
    first target is said, and the others in the mean, and its kept rows are near enough; or when its loss is no number.
    Lanes never couple.

    Args:
        known: what ``run`` knows of the lanes, every leaf with a leading axis of lanes.
        targets: where and what each lane's neuron should make the model say, the bare prompt first; the weights of a
            lane sum to one.
        kept: where it should change little; ``None`` is nowhere.
        run: the network after the cut; a ``jax.tree_util.Partial`` of the same function is compiled once.
        scale: the length of the FFN's output at each lane's site, ``[lanes]``.
        settings: options.
        start: values to start from, ``[lanes, d]``.
        mesh: devices over whose axis ``"data"`` the lanes are split; see `tpatch_jax.core.lanes.run_lanes`.

    Returns:
        The values, ``[lanes, d]``, and a `ValueTrainingInfo`.

    Source: Meng et al. 2022, section 3.1, for what is asked of a value; Levenberg 1944 for the steps.

    Example:
        >>> run = lambda known, added: jax.nn.log_softmax(known[:, None] + added)
        >>> targets = TargetRows(jnp.ones((1, 1)), jnp.array([[[2]]]), jnp.ones((1, 1, 1)))
        >>> zero, settings = jnp.zeros((1, 4)), ValueTrainingSettings(longest=16.0)
        >>> values, info = train_values(zero, targets, None, run, jnp.ones(1), settings, zero)
        >>> int(values[0].argmax())
        2
    """
    limit, move = _begin(scale, settings.longest, start)
    problem = ValueProblem(known, targets, kept, limit, jax.device_put(np.int32(settings.steps)))
    (lanes, aims), others = targets.activity.shape, 0 if kept is None else kept.activity.shape[1]
    rest = np.zeros((lanes, aims), np.float32), np.zeros((lanes, others), np.float32), np.zeros(lanes, bool)
    state = ValueState(move, *map(jax.device_put, rest))
    run = run if isinstance(run, Partial) else Partial(run)
    result = run_lanes(Partial(value_step(settings._replace(steps=0)), run), state, problem, settings.steps, mesh)
    end, weight = result.state, host(targets.weight).sum(2)
    mean = np.where(weight > 0, end.losses * weight, 0.0).sum(1) / np.maximum(weight.sum(1), 1e-12)
    close = end.divergence.mean(1) if end.divergence.shape[1] else np.zeros(lanes, np.float32)
    values = jax.device_put(end.move * host(problem.limit))
    return values, ValueTrainingInfo(result.steps, mean, close, end.at_start)


@jax.jit
def _begin(scale: Array, longest: float, start: Array) -> tuple[Array, Array]:
    """The largest length of each lane's value, ``[lanes, 1]``, and where it starts, measured by that."""
    limit = (longest * scale)[:, None].astype(jnp.float32)
    return limit, _within_limit(start / limit)


def _within_limit(move: Float[Array, "lanes d"]) -> Float[Array, "lanes d"]:
    """Moves no longer than 1: values no longer than their limit."""
    return move / jnp.maximum(jnp.linalg.norm(move, axis=-1, keepdims=True), 1.0)


def _neutral_residual(moved: Array) -> Array:
    """Of a divergence in nats: its square is twice that; zero where nothing has changed, and so is its slope."""
    return jnp.where(moved > 1e-9, jnp.sqrt(2 * jnp.maximum(moved, 1e-9)), 0.0)


def _look(run: Partial, problem: ValueProblem, added: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """Each row's residual and its sum, the losses of the targets, and how far the others have moved."""
    said, beside = run_rows(run, problem.known, problem.targets, problem.kept, added)
    residual, losses = log_odds_against(problem.targets, said), losses_of_rows(problem.targets, said)
    moved = jnp.zeros((added.shape[0], 0), losses.dtype)
    if problem.kept is not None:
        moved = jnp.maximum(kept_close(problem.kept.before, beside), 0.0)
        residual = jnp.concatenate([residual, _neutral_residual(moved)], 1)
    return jnp.sum(residual), (residual, losses, moved)


def _look_with_slopes(
    run: Partial, problem: ValueProblem, move: Array
) -> tuple[tuple[Array, Array, Array], Callable[[], Array]]:
    """What `_look` says of all rows as the lanes stand, and what gives each residual's slope in its lane's move."""
    activity = _activity(problem.targets, problem.kept)
    added = activity[..., None] * (move * problem.limit)[:, None]
    total, pull, seen = jax.vjp(lambda added: _look(run, problem, added), added, has_aux=True)
    # No row reaches another, so the gradient of their sum is each row's.
    return seen, lambda: pull(jnp.ones_like(total))[0] * (activity * problem.limit)[..., None]


@lru_cache(maxsize=16)
def value_step(settings: ValueTrainingSettings) -> Callable[..., tuple[ValueState, Bool[Array, " lanes"], ValueState]]:
    """One object for the same settings, so that ``jit`` recognises it."""

    def step(
        run: Partial, state: ValueState, problem: ValueProblem, number: Int[Array, ""]
    ) -> tuple[ValueState, Bool[Array, " lanes"], ValueState]:
        (residual, losses, moved), slopes = _look_with_slopes(run, problem, state.move)
        state = ValueState(state.move, losses, moved, jnp.where(number == 0, residual[:, 0] < 0, state.at_start))
        weight, aims = _row_weights(problem.targets), losses.shape[1]
        counted = jnp.where(weight > 0, losses, 0.0)
        said = jnp.maximum(jnp.sum(counted * weight, 1), losses[:, 0]) < settings.enough
        close = jnp.mean(moved, 1) < settings.near if moved.shape[1] else True
        ended = (said & close) | ~jnp.all(jnp.isfinite(counted), 1)
        # Slopes cost as much again as the look; the last one needs none.
        last = jnp.all(ended) | (number == problem.most)
        shape = (*residual.shape, state.move.shape[1])
        slope = jax.lax.cond(last, lambda: jnp.zeros(shape, residual.dtype), slopes)
        short = jnp.maximum(residual[:, :aims] + settings.aim, 0.0)
        others = residual.shape[1] - aims
        beside = jnp.full((weight.shape[0], others), settings.closeness / max(1, others), weight.dtype)
        move = gauss_newton_step(
            slope,
            jnp.concatenate([short, residual[:, aims:]], 1),
            jnp.concatenate([weight * (short > 0), beside], 1),
            settings.damping,
        )
        length = jnp.linalg.norm(move, axis=-1, keepdims=True)
        move = move * jnp.minimum(1.0, settings.farthest / jnp.maximum(length, 1e-12))
        return state, ended, state._replace(move=_within_limit(state.move + move))

    return step
