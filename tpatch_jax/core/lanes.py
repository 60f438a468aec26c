"""Many small problems minimised side by side, each until its own end.

A lane is one of them: a vector that takes steps of its own. All lanes of a batch step together; those that have ended
are dropped by halves, into batches of powers of two, so that few shapes are ever compiled.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.sizes import power_of_two

__all__ = ["LaneResult", "minimise_lanes", "take_lanes"]

Problem = TypeVar("Problem")
State = TypeVar("State")
Report = TypeVar("Report")
Tree = TypeVar("Tree")


class LaneResult(NamedTuple):
    """Where each lane stood when it ended.

    Attributes:
        moves: what was minimised over, ``[lanes, d]``.
        steps: steps taken.
        state: what the stop rule knew of the lane, every leaf with the leading axis ``lanes``.
    """

    moves: Float[np.ndarray, "lanes d"]
    steps: Int[np.ndarray, " lanes"]
    state: Any


def take_lanes(tree: Tree, lanes: Int[np.ndarray, " taken"], count: int) -> Tree:
    """Some lanes of a batch.

    Args:
        tree: arrays with a leading axis of ``count``, or of a multiple of it, lane after lane; scalars are shared by
            all lanes and stay as they are.
        lanes: which lanes; one may be named twice.
        count: how many lanes there are.

    Example:
        >>> import numpy as np
        >>> take_lanes({"rows": jnp.arange(6), "scale": jnp.arange(3)}, np.array([2, 0]), 3)["rows"].tolist()
        [4, 5, 0, 1]
    """

    def take(leaf: Any) -> Any:
        if not leaf.ndim:
            return leaf
        each = leaf.shape[0] // count
        return leaf[(lanes[:, None] * each + np.arange(each)).reshape(-1)]

    return jax.tree.map(take, tree)


def minimise_lanes(
    loss: Callable[[Float[Array, "lanes d"], Problem, State, int], tuple[Float[Array, ""], Report]],
    project: Callable[[Float[Array, "lanes d"], Problem], Float[Array, "lanes d"]],
    stop: Callable[[State, Report, int], tuple[State, Bool[Array, " lanes"]]],
    moves: Float[Array, "lanes d"],
    problem: Problem,
    state: State,
    optimiser: optax.GradientTransformation,
    steps: int,
) -> LaneResult:
    """Minimise ``Σ_lanes loss`` by gradient steps, each lane until its own end.

    At each number ``0 … steps`` the loss and its gradient are taken, then the stop rule looks at what was reported,
    then the lanes that go on take a step and are projected. The three functions are pure: what a lane is trained on
    stands in ``problem``, what has to be remembered of it from step to step in ``state``.

    Args:
        loss: ``(moves, problem, state, number)`` to the sum of all lanes' losses and a report. Lanes must not couple.
        project: ``(moves, problem)`` to the nearest moves that are allowed.
        stop: ``(state, report, number)`` to the state after this look, and which lanes have ended.
        moves: where the lanes start, ``[lanes, d]``.
        problem: arrays as `take_lanes` takes them.
        state: the stop rule's state at the start, the same kind of tree.
        optimiser: from a sum's gradient to a step, entry by entry, such as ``optax.adam(0.1)``.
        steps: at most so many steps.

    Returns:
        A `LaneResult`: moves and state of each lane as the last look at it found them, on the host.

    Source: this library's.

    Example:
        >>> goal = jnp.array([[1.0], [4.0]])
        >>> def loss(moves, problem, state, number):
        ...     each = jnp.sum((moves - problem) ** 2, -1)
        ...     return jnp.sum(each), each
        >>> project = lambda moves, problem: jnp.clip(moves, -3, 3)
        >>> stop = lambda state, report, number: (report, report < 0.1)
        >>> result = minimise_lanes(loss, project, stop, jnp.zeros((2, 1)), goal, jnp.zeros(2), optax.adam(0.5), 40)
        >>> float(result.moves[1, 0]), int(result.steps[0]) < int(result.steps[1]) == 40
        (3.0, True)
    """
    step = jax.value_and_grad(loss, has_aux=True)
    moments = optimiser.init(moves)  # pyright: ignore[reportArgumentType]
    # Which lane stands where in the batch, and which lanes have ended.
    lane, ended = np.arange(moves.shape[0]), np.zeros(moves.shape[0], bool)
    result = LaneResult(np.array(moves), np.zeros(moves.shape[0], int), jax.tree.map(np.array, state))
    for number in range(steps + 1):
        (_, report), gradient = step(moves, problem, state, number)
        state, stopped = stop(state, report, number)
        places = np.flatnonzero((np.asarray(stopped) | (number == steps)) & ~ended[lane])
        if places.size:
            result.steps[lane[places]] = number
            _write((result.moves, result.state), lane[places], (moves, state), places)
            ended[lane[places]] = True
        if ended.all():
            break
        update, moments = optimiser.update(gradient, moments, moves)  # pyright: ignore[reportArgumentType]
        moves = project(moves + jnp.asarray(update), problem)
        going = np.flatnonzero(~ended[lane])
        size = power_of_two(going.size)
        if size < lane.size:
            # One that stands in twice does the same both times.
            keep = np.resize(going, size)
            moves, problem, state, moments = take_lanes((moves, problem, state, moments), keep, lane.size)
            lane = lane[keep]
    return result


def _write(to: Any, lanes: Int[np.ndarray, " ended"], tree: Any, places: Int[np.ndarray, " ended"]) -> None:
    """Put what stands at some places of a batch into arrays on the host, at these lanes."""
    for array, leaf in zip(jax.tree.leaves(to), jax.tree.leaves(tree), strict=True):
        array[lanes] = np.asarray(leaf)[places]
