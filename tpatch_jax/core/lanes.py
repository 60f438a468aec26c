"""Many small problems minimised side by side, each until its own end.

A lane is one of them: a vector that takes steps of its own. All lanes of a batch step together in one compiled loop,
which the host enters anew only where half of them have ended: those are dropped, into batches of powers of two, so that
few shapes are ever compiled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.sizes import power_of_two

__all__ = ["LaneResult", "minimise_lanes", "take_lanes"]

PAIR = 2
"""A batch of so few lanes is kept whole: another program would take longer to compile than the lane that is saved."""

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


def take_lanes(tree: Tree, lanes: Int[np.ndarray | Array, " taken"], count: int) -> Tree:
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


class _Carry(NamedTuple):
    """Of all lanes: where they stand, what the optimiser and the stop rule know of them, which have ended, and when."""

    moves: Float[Array, "lanes d"]
    moments: Any
    state: Any
    ended: Bool[Array, " lanes"]
    steps: Int[Array, " lanes"]


@partial(jax.jit, static_argnames=("optimiser", "steps"))
def _advance(
    loss: Partial, project: Partial, stop: Partial, carry: _Carry, problem: Any, number: Int[Array, ""],
    optimiser: optax.GradientTransformation, steps: int,
) -> tuple[_Carry, Int[Array, ""]]:  # fmt: skip
    """Steps until so many lanes have ended that a smaller batch holds the others."""
    size = power_of_two(carry.ended.shape[0])
    fewest = size // 2 if size > PAIR else 0
    look = jax.value_and_grad(loss, has_aux=True)

    def chosen(which: Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)

    def step(at: tuple[_Carry, Array]) -> tuple[_Carry, Array]:
        (moves, moments, state, ended, taken), number = at
        (_, report), gradient = look(moves, problem, state, number)
        seen, stopped = stop(moves, problem, state, report, number)
        state, stopped = chosen(~ended, seen, state), stopped | (number == steps)
        taken = jnp.where(~ended & stopped, number, taken)
        ended = ended | stopped
        update, moments = optimiser.update(gradient, moments, moves)
        moves = chosen(~ended, project(moves + jnp.asarray(update), problem), moves)
        return _Carry(moves, moments, state, ended, taken), number + 1

    return jax.lax.while_loop(lambda at: jnp.sum(~at[0].ended) > fewest, step, (carry, number))


def minimise_lanes(
    loss: Callable[[Float[Array, "lanes d"], Problem, State, Int[Array, ""]], tuple[Float[Array, ""], Report]],
    project: Callable[[Float[Array, "lanes d"], Problem], Float[Array, "lanes d"]],
    stop: Callable[
        [Float[Array, "lanes d"], Problem, State, Report, Int[Array, ""]], tuple[State, Bool[Array, " lanes"]]
    ],
    moves: Float[Array, "lanes d"],
    problem: Problem,
    state: State,
    optimiser: optax.GradientTransformation,
    steps: int,
) -> LaneResult:
    """Minimise ``Σ_lanes loss`` by gradient steps, each lane until its own end.

    At each number ``0 … steps`` the loss and its gradient are taken, then the stop rule looks at what was reported,
    then the lanes that go on take a step and are projected. The three functions are pure and are traced: what a lane is
    trained on stands in ``problem``, what all lanes share (a network's parameters) in a ``jax.tree_util.Partial``, and
    what has to be remembered of a lane from step to step in ``state``. The same functions and shapes compile once; so
    give functions of a module, not such as are made anew for each call.

    Args:
        loss: ``(moves, problem, state, number)`` to the sum of all lanes' losses and a report; the number is a traced
            int. Lanes must not couple.
        project: ``(moves, problem)`` to the nearest moves that are allowed.
        stop: ``(moves, problem, state, report, number)`` to the state after this look, and which lanes have ended.
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
        >>> stop = lambda moves, problem, state, report, number: (report, report < 0.1)
        >>> result = minimise_lanes(loss, project, stop, jnp.zeros((2, 1)), goal, jnp.zeros(2), optax.adam(0.5), 40)
        >>> float(result.moves[1, 0]), int(result.steps[0]) < int(result.steps[1]) == 40
        (3.0, True)
    """
    functions = [function if isinstance(function, Partial) else Partial(function) for function in (loss, project, stop)]
    count = moves.shape[0]
    lane = np.arange(count)
    carry = _Carry(
        jnp.asarray(moves),
        optimiser.init(moves),  # pyright: ignore[reportArgumentType]
        jax.tree.map(jnp.asarray, state),
        jnp.zeros(count, bool),
        jnp.zeros(count, jnp.int32),
    )
    result, number = LaneResult(np.array(moves), np.zeros(count, int), jax.tree.map(np.array, state)), jnp.int32(0)
    while True:
        carry, number = _advance(*functions, carry, problem, number, optimiser, steps)
        # Of a lane that goes on this is written again at its end.
        _write(result, lane, (carry.moves, carry.steps, carry.state))
        going = np.flatnonzero(~np.asarray(carry.ended))
        if not going.size:
            return result
        # One that stands in twice does the same both times.
        keep = np.resize(going, power_of_two(going.size))
        carry, problem = _take((carry, problem), jnp.asarray(keep), lane.size)
        lane = lane[keep]


@partial(jax.jit, static_argnames="count")
def _take(tree: Tree, lanes: Int[Array, " taken"], count: int) -> Tree:
    return take_lanes(tree, lanes, count)


def _write(to: Any, lanes: Int[np.ndarray, " written"], tree: Any) -> None:
    """Put what stands in a batch into arrays on the host, at these lanes."""
    for array, leaf in zip(jax.tree.leaves(to), jax.tree.leaves(tree), strict=True):
        array[lanes] = np.asarray(leaf)
