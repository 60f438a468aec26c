"""Values trained through the rest of the network: what an earlier layer needs, where no closed form exists.

Only the end of each row is run again, from the token at which the patch fires (`tpatch_jax.models.networks.fork`); all
lanes of a chunk take their steps together, and one that says its target stops and is dropped.

The steps are of second order. What a value has to do is a handful of numbers, one for each row: by how much the odds of
its target fall short, and how far the model has moved on a prompt that should stay as it is. Each is nearly linear in
the value, so a damped Gauss-Newton step is the solution of a system as small as there are rows; and of a row that was
not looked at in a step, the last look's linear prediction stands in.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.lanes import run_lanes

__all__ = [
    "TargetRows",
    "ValueTrainingInfo",
    "ValueTrainingSettings",
    "gauss_newton_step",
    "kept_close",
    "losses_of_rows",
    "run_rows",
    "train_values",
]

OTHERS, BESIDE = 2, 2
"""So many of a lane's targets besides the first, and of its neutral rows, are looked at in each step."""

TOGETHER = 8
"""So many rows of all lanes are looked at together before the first step."""

Run = Callable[[Any, Float[Array, "rows d"]], Float[Array, "rows places vocabulary"]]
"""From what is known of some rows, and what is added to the FFN's output at their first positions, ``[rows, d]``, to
log-probabilities at the places that are read, ``[rows, places, vocabulary]``."""


class ValueTrainingSettings(NamedTuple):
    """Options of values trained through the network.

    Attributes:
        steps: at most so many steps.
        longest: the value's largest length, over the length of the FFN's output at its site.
        enough: a lane stops once the mean loss of each of its targets, in nats, is below this.
        aim: the log-odds that a step aims at for each target.
        closeness: weight of the divergence from the unedited model on neutral prompts.
        near: a lane goes on until the mean of that divergence, in nats, is below this, too.
        damping: of the steps; more makes them shorter.
        farthest: how far a step goes at most, over the value's largest length.
    """

    steps: int = 20
    longest: float = 4.0
    enough: float = 0.05
    aim: float = 5.0
    closeness: float = 1.0
    near: float = 0.2
    damping: float = 10.0
    farthest: float = 0.45


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
        closeness: mean divergence from the unedited model on neutral prompts when last looked at, in nats.
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


def losses_of_rows(targets: TargetRows, log_probs: Array) -> Float[Array, "lanes rows"]:
    """Mean loss of each row over its places, in nats; 0 of padding.

    Args:
        targets: the rows and what is wanted in each.
        log_probs: at their places, ``[lanes, rows, places, vocabulary]``.

    Returns:
        ``[lanes, rows]``.

    Example:
        >>> rows = TargetRows(None, jnp.ones((1, 1)), jnp.array([[[1]]]), jnp.ones((1, 1, 1)))
        >>> round(float(losses_of_rows(rows, jnp.log(jnp.full((1, 1, 1, 2), 0.5)))[0, 0]), 3)
        0.693
    """
    weight = _row_weights(targets)
    losses = jnp.where(targets.weight > 0, _unlikely(targets.wanted, log_probs), 0.0) * targets.weight
    return jnp.sum(losses, 2) / jnp.where(weight > 0, weight, 1.0)


def run_rows(
    run: Run, rows: TargetRows, values: Float[Array, "lanes d"]
) -> Float[Array, "lanes rows places vocabulary"]:
    """What each row says with its lane's value added, as strongly as the lane's neuron fires there.

    Args:
        run: the network after the cut.
        rows: the rows.
        values: of each lane, ``[lanes, d]``.

    Returns:
        Log-probabilities at the rows' places, ``[lanes, rows, places, vocabulary]``.

    Example:
        >>> run = lambda rows, added: jax.nn.log_softmax(rows + added)[:, None]
        >>> rows = TargetRows(jnp.zeros((1, 2)), jnp.ones((1, 1)), jnp.array([[[1]]]), jnp.ones((1, 1, 1)))
        >>> int(run_rows(run, rows, jnp.array([[0.0, 1.0]]))[0, 0, 0].argmax())
        1
    """
    added = rows.activity[..., None] * values[:, None]
    log_probs = run(rows.rows, added.reshape(-1, added.shape[-1]))
    return log_probs.reshape(*rows.activity.shape, *log_probs.shape[1:])


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
    """What each lane is trained on; ``limit`` is the value's largest length, ``[lanes, 1]``."""

    targets: TargetRows
    neutral: TargetRows | None
    limit: Float[Array, "lanes 1"]


class _State(NamedTuple):
    """Of each lane: where it stands, and what is known of its rows, the targets first, then the neutral ones.

    Attributes:
        move: the value over its limit, ``[lanes, d]``.
        slope: how each row's residual depends on the move, ``[lanes, rows, d]``.
        offset: the residual at a move of zero, by that slope, ``[lanes, rows]``.
        losses: each target's loss when last looked at, infinite if it never was, ``[lanes, targets]``.
        divergence: of each neutral row when last looked at, ``[lanes, neutral]``.
        age: the step in which each row was last looked at, ``[lanes, rows]``.
    """

    move: Float[Array, "lanes d"]
    slope: Float[Array, "lanes rows d"]
    offset: Float[Array, "lanes rows"]
    losses: Float[Array, "lanes targets"]
    divergence: Float[Array, "lanes neutral"]
    age: Int[Array, "lanes rows"]


def _log_odds_against(targets: TargetRows, log_probs: Array) -> Float[Array, "lanes rows"]:
    """``log((1 - p)/p)`` of each row's tokens, their soft maximum: nearly linear where ``log p`` is not."""
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
    targets: TargetRows,
    neutral: TargetRows | None,
    run: Run,
    scale: Float[Array, " lanes"],
    settings: ValueTrainingSettings,
    start: Float[Array, "lanes d"] | None = None,
) -> tuple[Float[Array, "lanes d"], ValueTrainingInfo]:
    """The values of some lanes, each trained for its own targets.

    ``min_v  ½ Σ_targets w (aim - log-odds)₊² + c · mean KL(unedited ‖ edited on neutral prompts)`` by damped
    Gauss-Newton steps from ``start``, with ``‖v‖`` kept to its limit. Each step looks at a lane's first row, at two
    others (what by all that is known is farthest from its target, or was not looked at for longest), and at two neutral
    rows in turn; what is known
    of all others goes on as linear. A lane has ended when all its targets are said, as far as is known, and its neutral
    rows are near enough; or when its loss is no number. Lanes never couple.

    Args:
        targets: where and what each lane's neuron should make the model say, the bare prompt first; the weights of a
            lane sum to one.
        neutral: where it should change little; ``None`` is nowhere.
        run: the network after the cut; a ``jax.tree_util.Partial`` of the same function is compiled once.
        scale: the length of the FFN's output at each lane's site, ``[lanes]``.
        settings: options.
        start: values to start from; zero by default.

    Returns:
        The values, ``[lanes, d]``, and a `ValueTrainingInfo`.

    Source: Meng et al. 2022, section 3.1, for what is asked of a value; Levenberg 1944 for the steps.

    Example:
        >>> run = lambda rows, added: jax.nn.log_softmax(rows + added)[:, None]
        >>> targets = TargetRows(jnp.zeros((1, 4)), jnp.ones((1, 1)), jnp.array([[[2]]]), jnp.ones((1, 1, 1)))
        >>> values, info = train_values(targets, None, run, jnp.ones(1), ValueTrainingSettings())
        >>> int(values[0].argmax())
        2
    """
    lanes, hidden_size = scale.shape[0], jax.tree.leaves(targets.rows)[0].shape[-1]
    problem = _Problem(targets, neutral, (settings.longest * scale)[:, None].astype(jnp.float32))
    aims = targets.activity.shape[1]
    count = aims + (0 if neutral is None else neutral.activity.shape[1])
    weight = _row_weights(targets)
    move = jnp.zeros((lanes, hidden_size), jnp.float32) if start is None else start / problem.limit
    state = _State(
        _within_limit(move),
        jnp.zeros((lanes, count, hidden_size), jnp.float32),
        jnp.zeros((lanes, count), jnp.float32),
        # Rows of no weight are low enough from the start.
        jnp.where(weight > 0, jnp.inf, -1.0).astype(jnp.float32),
        jnp.zeros((lanes, count - aims), jnp.float32),
        jnp.full((lanes, count), -1, jnp.int32),
    )
    run = run if isinstance(run, Partial) else Partial(run)
    at_start = np.zeros(lanes, bool)
    if start is not None:
        state = _look_everywhere(run, problem, state)
        at_start = np.asarray(_log_odds_of_first(state) < 0)
    result = run_lanes(Partial(_step(settings._replace(steps=0)), run), state, problem, settings.steps)
    # Rows that were never looked at tell nothing.
    losses = result.state.losses
    seen = np.where(np.isinf(losses), 0.0, np.asarray(weight))
    mean = np.where(seen > 0, losses * seen, 0.0).sum(1) / np.maximum(seen.sum(1), 1e-12)
    divergence = result.state.divergence
    close = divergence.mean(1) if divergence.shape[1] else np.zeros(lanes, np.float32)
    return jnp.asarray(result.state.move) * problem.limit, ValueTrainingInfo(result.steps, mean, close, at_start)


@jax.jit
def _log_odds_of_first(state: _State) -> Float[Array, " lanes"]:
    """The log-odds against each lane's first target, where it stands."""
    return state.offset[:, 0] + jnp.einsum("nd,nd->n", state.slope[:, 0], state.move)


def _within_limit(move: Float[Array, "lanes d"]) -> Float[Array, "lanes d"]:
    """Moves no longer than 1: values no longer than their limit."""
    return move / jnp.maximum(jnp.linalg.norm(move, axis=-1, keepdims=True), 1.0)


def _rows_of_step(
    problem: _Problem, state: _State, number: Int[Array, ""]
) -> tuple[Int[Array, "lanes picked"], Int[Array, "lanes beside"] | None]:
    """The targets that a step looks at, the first among them, and the neutral rows.

    Those that were never looked at come first, then the hardest by what is known of them; every other time the one that
    was not looked at for longest, so that none is forgotten.
    """
    lanes, aims = state.losses.shape
    first = jnp.zeros((lanes, 1), jnp.int32)
    counts = _row_weights(problem.targets)[:, 1:] > 0
    known = state.offset[:, 1:aims] + jnp.einsum("nrd,nd->nr", state.slope[:, 1:aims], state.move)
    age = state.age[:, 1:aims].astype(known.dtype)
    old = jnp.where(age < 0, jnp.inf, number.astype(age.dtype) - age)
    hard = jnp.where(age < 0, jnp.inf, known)
    picks = [first]
    for turn in range(min(OTHERS, aims - 1)):
        urgent = jnp.where(number % 2 == turn % 2, hard, old) if turn else hard
        pick = jnp.argmax(jnp.where(counts, urgent, -jnp.inf), 1)
        counts &= jnp.arange(aims - 1) != pick[:, None]
        picks.append(1 + pick[:, None].astype(jnp.int32))
    neutral = problem.neutral
    if neutral is None:
        return jnp.concatenate(picks, 1), None
    there = neutral.activity.shape[1]
    turn = (number * BESIDE + jnp.arange(min(BESIDE, there))) % there
    return jnp.concatenate(picks, 1), jnp.broadcast_to(turn.astype(jnp.int32), (lanes, min(BESIDE, there)))


def _target_residuals(rows: TargetRows, log_probs: Array) -> tuple[Array, Array]:
    """Of rows that should say their target: what a step brings down, and the loss in nats, both ``[lanes, rows]``."""
    return _log_odds_against(rows, log_probs), losses_of_rows(rows, log_probs)


def _neutral_residuals(rows: TargetRows, log_probs: Array) -> tuple[Array, Array]:
    """Of rows that should stay: what a step brings down, and the divergence in nats, both ``[lanes, rows]``."""
    moved = jnp.maximum(kept_close(rows.wanted[:, :, 0], log_probs[:, :, 0]), 0.0)
    # Its square is twice the divergence, which is zero where nothing has changed, and so is its slope.
    return jnp.where(moved > 1e-9, jnp.sqrt(2 * jnp.maximum(moved, 1e-9)), 0.0), moved


@jax.jit
def _look_everywhere(run: Partial, problem: _Problem, state: _State) -> _State:
    """What every row says where the lanes start, and how that depends on the value: steps then know all from the first.

    A step that knows the slopes of a few rows alone would undo in the others what the start has learnt of them.
    """
    lanes = state.move.shape[0]
    values = state.move * problem.limit
    # A few rows of each lane at a time: the log-probabilities of all would be the largest array of all.
    size = max(1, TOGETHER // lanes)

    def looked(rows: TargetRows, tell: Callable[[TargetRows, Array], tuple[Array, Array]]) -> tuple[Array, ...]:
        count = rows.activity.shape[1]
        blocks = -(-count // size)
        index = jnp.minimum(jnp.arange(blocks * size), count - 1).reshape(blocks, size)

        def look(pick: Array) -> tuple[Array, ...]:
            part = _take_rows(rows, jnp.broadcast_to(pick, (lanes, size)))

            def told(added: Array) -> tuple[Array, tuple[Array, Array]]:
                log_probs = run(part.rows, added.reshape(-1, added.shape[-1]))
                each, known = tell(part, log_probs.reshape(*part.activity.shape, *log_probs.shape[1:]))
                return jnp.sum(each), (each, known)

            added = part.activity[..., None] * values[:, None]
            # No row reaches another, so the gradient of their sum is each row's.
            (_, (each, known)), gradient = jax.value_and_grad(told, has_aux=True)(added)
            return each, known, gradient * (part.activity * problem.limit)[..., None]

        told = jax.lax.map(look, index)
        return tuple(jnp.swapaxes(one, 0, 1).reshape(lanes, -1, *one.shape[3:])[:, :count] for one in told)

    each, losses, slope = looked(problem.targets, _target_residuals)
    divergence = state.divergence
    if problem.neutral is not None:
        beside, divergence, also = looked(problem.neutral, _neutral_residuals)
        each, slope = jnp.concatenate([each, beside], 1), jnp.concatenate([slope, also], 1)
    counts = _row_weights(problem.targets) > 0
    return state._replace(
        slope=slope,
        offset=each - jnp.einsum("nrd,nd->nr", slope, state.move),
        losses=jnp.where(counts, losses, state.losses),
        divergence=divergence,
        age=jnp.zeros_like(state.age),
    )


@lru_cache(maxsize=16)
def _step(settings: ValueTrainingSettings) -> Callable[..., tuple[_State, Bool[Array, " lanes"], _State]]:
    """One object for the same settings, so that ``jit`` recognises it."""

    def look(
        run: Partial, problem: _Problem, state: _State, number: Int[Array, ""]
    ) -> tuple[_State, Float[Array, "lanes picked"]]:
        """What the picked rows say as the lanes stand, how that depends on the value, and the losses of the targets."""
        lanes, aims = state.losses.shape
        pick, turn = _rows_of_step(problem, state, number)
        seen = pick.shape[1]
        targets = _take_rows(problem.targets, pick)
        rows, activity, beside = targets.rows, targets.activity, None
        if problem.neutral is not None and turn is not None:
            beside = _take_rows(problem.neutral, turn)
            rows = _joined(rows, beside.rows, lanes)
            activity = jnp.concatenate([activity, beside.activity], 1)
        values = state.move * problem.limit

        def residuals(added: Float[Array, "lanes picked d"]) -> tuple[Array, tuple[Array, Array, Array]]:
            log_probs = run(rows, added.reshape(-1, added.shape[-1]))
            log_probs = log_probs.reshape(*activity.shape, *log_probs.shape[1:])
            each, losses = _target_residuals(targets, log_probs[:, :seen])
            moved = jnp.zeros((lanes, 0), each.dtype)
            if beside is not None:
                further, moved = _neutral_residuals(beside, log_probs[:, seen:])
                each = jnp.concatenate([each, further], 1)
            return jnp.sum(each), (each, moved, losses)

        added = activity[..., None] * values[:, None]
        (_, (each, moved, losses)), gradient = jax.value_and_grad(residuals, has_aux=True)(added)
        # No row reaches another, so the gradient of their sum is each row's.
        slope = gradient * (activity * problem.limit)[..., None]
        offset = each - jnp.einsum("nrd,nd->nr", slope, state.move)
        lane = jnp.arange(lanes)[:, None]
        every = pick if turn is None else jnp.concatenate([pick, aims + turn], 1)
        counts = _row_weights(problem.targets)[lane, pick] > 0
        state = state._replace(
            slope=state.slope.at[lane, every].set(slope),
            offset=state.offset.at[lane, every].set(offset),
            losses=state.losses.at[lane, pick].set(jnp.where(counts, losses, state.losses[lane, pick])),
            divergence=state.divergence if turn is None else state.divergence.at[lane, turn].set(moved),
            age=state.age.at[lane, every].set(number),
        )
        return state, jnp.where(counts, losses, 0.0)

    def step(
        run: Partial, state: _State, problem: _Problem, number: Int[Array, ""]
    ) -> tuple[_State, Bool[Array, " lanes"], _State]:
        state, losses = look(run, problem, state, number)
        aims = state.losses.shape[1]
        residual = state.offset + jnp.einsum("nrd,nd->nr", state.slope, state.move)
        counts = _row_weights(problem.targets) > 0
        # What was not looked at in this step says its target as far as is known.
        known = jnp.where(counts & (state.age[:, :aims] >= 0), jax.nn.softplus(residual[:, :aims]), state.losses)
        said = jnp.all(known < settings.enough, 1)
        close = jnp.mean(state.divergence, 1) < settings.near if state.divergence.shape[1] else True
        unseen = jnp.any(state.age[:, aims:] < 0, 1)
        ended = (said & close & ~unseen) | ~jnp.all(jnp.isfinite(losses), 1)
        short = jnp.maximum(residual[:, :aims] + settings.aim, 0.0)
        weight = _row_weights(problem.targets) * (short > 0) * (state.age[:, :aims] >= 0)
        parts = [short, residual[:, aims:]]
        others = residual.shape[1] - aims
        weights = [weight, jnp.full((known.shape[0], others), settings.closeness / max(1, others), weight.dtype)]
        move = gauss_newton_step(state.slope, jnp.concatenate(parts, 1), jnp.concatenate(weights, 1), settings.damping)
        length = jnp.linalg.norm(move, axis=-1, keepdims=True)
        move = move * jnp.minimum(1.0, settings.farthest / jnp.maximum(length, 1e-12))
        return state, ended, state._replace(move=_within_limit(state.move + move))

    return step
