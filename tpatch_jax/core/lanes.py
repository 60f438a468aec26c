"""Many small problems minimised side by side, each until its own end.

A lane is one of them: a vector that takes steps of its own. All lanes of a batch step together in one compiled loop,
which the host enters anew only where half of them have ended: those are dropped, into batches of powers of two, so that
few shapes are ever compiled.

On a mesh each part of its axis ``"data"`` has lanes of its own and a loop of its own. No lane ever moves to another
part, and no part asks another how far it is, so that nothing is exchanged along ``"data"`` until the end.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.devices import DATA_AXIS, host, parts, shard_rows
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.errors import TPatchError

__all__ = [
    "Descent",
    "LaneResult",
    "LaneRun",
    "LanesCarry",
    "advance_lanes",
    "descent_of",
    "minimise_lanes",
    "run_lanes",
    "take_lanes",
    "take_lanes_by_part",
]

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


class LaneRun(NamedTuple):
    """Where each lane stood when it ended.

    Attributes:
        state: of each lane, every leaf with the leading axis ``lanes``.
        steps: steps taken.
    """

    state: Any
    steps: Int[np.ndarray, " lanes"]


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


class LanesCarry(NamedTuple):
    """Of all lanes: where they stand, which have ended, and when."""

    state: Any
    ended: Bool[Array, " lanes"]
    steps: Int[Array, " lanes"]


def _loop(
    step: Partial, carry: LanesCarry, problem: Any, number: Int[Array, ""], steps: int
) -> tuple[LanesCarry, Int[Array, ""]]:
    """Steps until so many lanes have ended that a smaller batch holds the others."""
    size = power_of_two(carry.ended.shape[0])
    fewest = size // 2 if size > PAIR else 0

    def chosen(which: Array, new: Any, old: Any) -> Any:
        """Of each lane one of two; what all lanes share is new."""
        return jax.tree.map(
            lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b) if a.ndim else a, new, old
        )

    def take_step(at: tuple[LanesCarry, Array]) -> tuple[LanesCarry, Array]:
        (state, ended, taken), number = at
        seen, stopped, after = step(state, problem, number)
        stopped |= number == steps
        taken = jnp.where(~ended & stopped, number, taken)
        state = chosen(~ended, seen, state)
        ended |= stopped
        return LanesCarry(chosen(~ended, after, state), ended, taken), number + 1

    return jax.lax.while_loop(lambda at: jnp.sum(~at[0].ended) > fewest, take_step, (carry, number))


def _split(tree: Any) -> Any:
    """How lanes lie on a mesh: by their leading axis; scalars are repeated."""
    return jax.tree.map(lambda leaf: PartitionSpec(DATA_AXIS) if leaf.ndim else PartitionSpec(), tree)


@partial(jax.jit, static_argnames=("steps", "mesh"))
def advance_lanes(
    step: Partial, carry: LanesCarry, problem: Any, number: Int[Array, " parts"], steps: int, mesh: Mesh | None = None
) -> tuple[LanesCarry, Int[Array, " parts"]]:
    """The loop of `_loop`; on a mesh one for each part, which asks no other part. Each has a number of its own."""

    def alone(
        step: Partial, carry: LanesCarry, problem: Any, number: Int[Array, " 1"]
    ) -> tuple[LanesCarry, Int[Array, " 1"]]:
        carry, after = _loop(step, carry, problem, number[0], steps)
        return carry, after[None]

    if mesh is None:
        return alone(step, carry, problem, number)
    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    each = jax.shard_map(
        alone, mesh=mesh, in_specs=(whole, rows, _split(problem), rows), out_specs=(rows, rows),
        axis_names={DATA_AXIS}, check_vma=False,
    )  # fmt: skip
    return each(step, carry, problem, number)


def run_lanes(
    step: Callable[[State, Problem, Int[Array, ""]], tuple[State, Bool[Array, " lanes"], State]],
    state: State,
    problem: Problem,
    steps: int,
    mesh: Mesh | None = None,
) -> LaneRun:
    """Let lanes take steps, each until its own end, in one compiled loop.

    At each number ``0 … steps`` the step looks at where all lanes stand; those that go on stand where it says. The
    function is pure and is traced: what a lane works on stands in ``problem``, what all lanes share (a network's
    parameters) in a ``jax.tree_util.Partial``. The same function and shapes compile once; so give functions of a
    module, not such as are made anew for each call.

    Args:
        step: ``(state, problem, number)`` to the state after this look, which lanes have ended, and the state after the
            step that the others take; the number is a traced int. Lanes must not couple.
        state: where the lanes start: arrays with a leading axis of lanes; scalars are shared by all lanes.
        problem: arrays as `take_lanes` takes them.
        steps: at most so many steps.
        mesh: devices over whose axis ``"data"`` the lanes are split; each part of it takes steps until its lanes have
            ended. As many lanes as it has parts, or a multiple.

    Returns:
        A `LaneRun`: the state of each lane as the last look at it left it, on the host.

    Raises:
        TPatchError: the mesh does not divide the lanes, or they share a scalar of their state.

    Source: this library's.

    Example:
        >>> halve = lambda state, problem, number: (state, state < problem, state / 2)
        >>> run = run_lanes(halve, jnp.array([4.0, 1.0]), jnp.array([2.0, 0.3]), 9)
        >>> run.state.tolist(), run.steps.tolist()
        ([1.0, 0.25], [2, 2])
    """
    step = step if isinstance(step, Partial) else Partial(step)
    leaves = jax.tree.leaves(state)
    count, over = next(leaf.shape[0] for leaf in leaves if leaf.ndim), parts(mesh)
    if count % over or (mesh is not None and not all(leaf.ndim for leaf in leaves)):
        raise TPatchError(
            f"{count} lanes cannot be split into {over} parts; give a multiple, and a state for each lane"
        )
    lane = np.arange(count)
    counts = jax.device_put(np.zeros(count, bool)), jax.device_put(np.zeros(count, np.int32))
    carry = LanesCarry(jax.device_put(state), *counts)
    carry, problem, number = shard_rows((carry, problem, np.zeros(over, np.int32)), mesh)
    result = LaneRun(jax.tree.map(lambda leaf: np.array(host(leaf)), state), np.zeros(count, int))
    while True:
        carry, number = advance_lanes(step, carry, problem, number, steps, mesh)
        # Of a lane that goes on this is written again at its end.
        _write(result, lane, (carry.state, carry.steps))
        going = [np.flatnonzero(~part) for part in host(carry.ended).reshape(over, -1)]
        most = max(part.size for part in going)
        if not most:
            return result
        # One that stands in twice does the same both times; a part whose lanes have all ended keeps its first.
        keep = np.stack([np.resize(part if part.size else np.zeros(1, int), power_of_two(most)) for part in going])
        each = lane.size // over
        carry, problem = take_lanes_by_part((carry, problem), shard_rows(keep.reshape(-1), mesh), each, mesh)
        lane = lane[(keep + each * np.arange(over)[:, None]).reshape(-1)]


class Descent(NamedTuple):
    """Of all lanes: where they stand, and what the stop rule and the optimiser know of them."""

    moves: Float[Array, "lanes d"]
    state: Any
    moments: Any


@lru_cache(maxsize=16)
def descent_of(
    optimiser: optax.GradientTransformation,
) -> Callable[..., tuple[Descent, Bool[Array, " lanes"], Descent]]:
    """One object for each optimiser, so that ``jit`` recognises it."""

    def step(
        loss: Partial, project: Partial, stop: Partial, at: Descent, problem: Any, number: Int[Array, ""]
    ) -> tuple[Descent, Bool[Array, " lanes"], Descent]:
        (_, report), gradient = jax.value_and_grad(loss, has_aux=True)(at.moves, problem, at.state, number)
        state, stopped = stop(at.moves, problem, at.state, report, number)
        update, moments = optimiser.update(gradient, at.moments, at.moves)
        after = project(at.moves + jnp.asarray(update), problem)
        return at._replace(state=state), stopped, Descent(after, state, moments)

    return step


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
    start = Descent(jnp.asarray(moves), state, optimiser.init(moves))  # pyright: ignore[reportArgumentType]
    run = run_lanes(Partial(descent_of(optimiser), *functions), start, problem, steps)
    return LaneResult(run.state.moves, run.steps, run.state.state)


@partial(jax.jit, static_argnames=("count", "mesh"))
def take_lanes_by_part(tree: Tree, lanes: Int[Array, " taken"], count: int, mesh: Mesh | None = None) -> Tree:
    """Some lanes of a batch of ``count``; on a mesh of each part's batch, by their numbers in it."""
    if mesh is None:
        return take_lanes(tree, lanes, count)
    rows, specs = PartitionSpec(DATA_AXIS), _split(tree)
    take = partial(take_lanes, count=count)
    return jax.shard_map(
        take, mesh=mesh, in_specs=(specs, rows), out_specs=specs, axis_names={DATA_AXIS}, check_vma=False
    )(tree, lanes)


def _write(to: Any, lanes: Int[np.ndarray, " written"], tree: Any) -> None:
    """Put what stands in a batch into arrays on the host, at these lanes; what all lanes share stays out."""
    for array, leaf in zip(jax.tree.leaves(to), jax.tree.leaves(tree), strict=True):
        if array.ndim:
            array[lanes] = host(leaf)
