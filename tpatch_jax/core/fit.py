"""Fitting patches on cached arrays: one fit as a pure function, many at once under ``vmap``.

A lane is one patch being fitted. It sees its own queries, its own target and the shared memory, never another lane, so
that many fitted together equal each fitted alone. Two recipes share the objective (see `FitSettings`):

* ``joint``: all parameters at once with Adam, as in the paper;
* ``staged``: a whitened key in closed form, a few steps on the activation and memory losses against the hardest
  negatives, a threshold between the hardest negative and the edit's own queries, then the value, scaled along a
  closed-form direction until the edit loss is satisfied, with Adam for those lanes that still miss their target.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, Key

from tpatch_jax.core.arguments import check_kind, describe
from tpatch_jax.core.checks import as_key
from tpatch_jax.core.devices import DATA_AXIS, automatic, automatically, divided, host, parts, shard_rows
from tpatch_jax.core.memory import Memory
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.problem import FitInfo, FitProblem, FitSettings, Head
from tpatch_jax.core.recipes import joint, staged
from tpatch_jax.core.sizes import few_or_most, power_of_two, round_up
from tpatch_jax.errors import TPatchError
from tpatch_jax.typing import Activation, CountProgress, RngKey

__all__ = [
    "FitInfo",
    "FitProblem",
    "FitSettings",
    "advance_many",
    "begin_many",
    "end_many",
    "end_staged_many",
    "fit",
    "fit_many",
    "improve_many",
    "settle_many",
]


@automatically
def fit(
    lane: FitProblem,
    memory: Memory,
    head: Head,
    rng: RngKey,
    settings: FitSettings,
    activation: Activation,
) -> tuple[Patch, FitInfo]:
    """Fit one patch: a pure function, to be jitted and vmapped by its caller.

    Minimises ``l_e + a·l_a + m·(l_m1 + l_m2)`` over key, bias and value.

    Args:
        lane: what to fit on.
        memory: what to stay silent on.
        head: the network after the cut, ``(context, output [contexts, d])`` to logits ``[contexts, vocabulary]``.
        rng: a typed random key, for the initial value of the joint recipe.
        settings: static options.
        activation: the feed-forward network's activation.

    Returns:
        The patch, ``[1, d]`` (``[2, d]`` with an output bias), and how the fit went.

    Raises:
        TPatchError: an argument is of another kind, or widths differ.

    Source: Huang et al. 2023, sections 4.1 and 4.2.

    Example:
        >>> from tpatch_jax.core.memory import create_memory
        >>> rows = jax.random.normal(jax.random.key(0), (64, 4))
        >>> unembedding = jax.random.normal(jax.random.key(1), (4, 10))
        >>> query, nothing = jnp.ones((1, 4)), jnp.zeros((0, 4))
        >>> lane = FitProblem(query, 0 * query, nothing, None, jnp.array(3), unembedding[:, 3], jnp.array(1.0))
        >>> head = lambda context, output: output @ unembedding
        >>> run = jax.jit(lambda lane, memory, rng: fit(lane, memory, head, rng, FitSettings(), jax.nn.relu))
        >>> patch, info = run(lane, create_memory(rows), jax.random.key(2))
        >>> bool(info.held)
        True
    """
    _check(lane, memory, head, rng, settings, activation)
    if settings.recipe == "staged":
        settled = staged.settle(lane, memory, head, settings, activation)
        settled = staged.improve(settled, lane, head, settings, activation)
        return staged.end(settled, lane, head, settings, activation)
    state = joint.begin(lane, settings, rng)
    state = jax.lax.while_loop(
        lambda state: ~state.done,
        lambda state: joint.advance(state, lane, memory, head, settings, activation),
        state,
    )
    return joint.end(state, lane, memory, head, settings, activation)


def _check(lane: Any, memory: Any, head: Any, rng: Any, settings: Any, activation: Any) -> None:
    """Make sure that each argument of a fit is what it should be; their order is easily mistaken."""
    call = "fit(lane, memory, head, rng, settings, activation)"
    check_kind(lane, FitProblem, call, "a FitProblem; give what to fit on")
    check_kind(memory, Memory, call, "a Memory; give what create_memory returned")
    check_kind(settings, FitSettings, call, "FitSettings; give FitSettings(key_steps=32), for example")
    for name, function in (("head", head), ("activation", activation)):
        if not callable(function):
            raise TPatchError(f"{call}: {name} is {describe(function)}; give a function")
    as_key(rng)
    width = getattr(lane.direction, "shape", (0,))[-1:]
    widths = [getattr(array, "shape", ())[-1:] for array in (lane.query, lane.output, lane.negative, memory.query)]
    if any(other != width for other in widths):
        shown = ", ".join(str(*other) or "none" for other in (*widths, width))
        raise TPatchError(
            f"{call}: query, output, negative, the memory's query and direction are {shown} wide; give arrays of one "
            "width"
        )


@partial(jax.jit, static_argnames=("settings", "activation"))
def settle_many(lanes, memory, head, settings, activation, harder):
    """Of many lanes keys, thresholds and first values: the staged recipe up to its steps on values."""
    return jax.vmap(lambda lane: staged.settle(lane, memory, head, settings, activation, harder))(lanes)


@partial(jax.jit, static_argnames=("settings", "activation", "mesh"))
def improve_many(settled, lanes, head, settings, activation, mesh=None):
    """Steps on the values of lanes that miss their target; on a mesh each part of it until its own lanes have ended."""

    def alone(settled, lanes, head):
        return jax.vmap(lambda state, lane: staged.improve(state, lane, head, settings, activation))(settled, lanes)

    if mesh is None:
        return alone(settled, lanes, head)
    rows, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
    # One loop for all lanes would ask at each step whether any of them goes on.
    each = jax.shard_map(
        alone, mesh=mesh, in_specs=(rows, rows, whole), out_specs=rows, axis_names={DATA_AXIS}, check_vma=False
    )
    return each(settled, lanes, head)


@partial(jax.jit, static_argnames=("settings", "activation"))
def end_staged_many(settled, lanes, head, settings, activation):
    """Patches of many lanes, and how each was fitted, by the staged recipe."""
    return jax.vmap(lambda state, lane: staged.end(state, lane, head, settings, activation))(settled, lanes)


def _replaced(old: Array, rows: Int[np.ndarray, " some"], new: Array) -> np.ndarray:
    """Some rows of an array replaced by the first ones of another, on the host."""
    result = np.array(host(old))
    result[rows] = host(new)[: rows.size]
    return result


def _staged_bucket(
    lanes: FitProblem,
    memory: Memory,
    head: Head,
    count: int,
    settings: FitSettings,
    activation: Activation,
    mesh: Mesh | None,
    retry: bool,
) -> tuple[Patch, FitInfo]:
    """The staged recipe for one bucket; only lanes that miss their target go through the steps on the value."""
    lanes = shard_rows(lanes, mesh)
    settled = settle_many(lanes, memory, head, settings, activation, np.int32(retry))
    missing = np.flatnonzero(~host(settled.held)[:count])
    over = automatic(mesh) if mesh is not None and parts(mesh) > 1 else None
    # A few at a time: how many miss differs from call to call, and must not compile anything.
    size = round_up(few_or_most(1, settings.lanes), parts(mesh))
    for first in range(0, missing.size, size):
        few = missing[first : first + size]
        part = jax.tree.map(lambda leaf, few=few: host(leaf)[np.resize(few, size)], (settled, lanes))
        improved = improve_many(*shard_rows(part, mesh), head, settings, activation, over)
        both = jax.tree.map(lambda old, new, few=few: _replaced(old, few, new), settled, improved)
        settled = shard_rows(both, mesh)
    return end_staged_many(settled, lanes, head, settings, activation)


@partial(jax.jit, static_argnames="settings")
def begin_many(lanes, rngs, settings):
    """Where the joint recipe starts, for many lanes."""
    return jax.vmap(lambda lane, rng: joint.begin(lane, settings, rng))(lanes, rngs)


@partial(jax.jit, static_argnames=("settings", "activation"))
def advance_many(states, lanes, memory, head, settings, activation):
    """So many steps of the joint recipe as it has patience, on many lanes."""
    return jax.vmap(lambda state, lane: joint.advance(state, lane, memory, head, settings, activation))(states, lanes)


@partial(jax.jit, static_argnames=("settings", "activation"))
def end_many(states, lanes, memory, head, settings, activation):
    """Patches of many lanes, and how each was fitted, by the joint recipe."""
    return jax.vmap(lambda state, lane: joint.end(state, lane, memory, head, settings, activation))(states, lanes)


def _padded(tree: Any, size: int) -> Any:
    """A batch with its first lane repeated up to ``size``; repeated lanes are dropped afterwards."""

    def widen(leaf: Any) -> Any:
        count = leaf.shape[0]
        if count == size:
            return leaf
        index = np.r_[:count, np.zeros(size - count, int)]
        # On the host, where a new number of lanes compiles nothing; random keys stay what they are.
        is_rng = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf[index] if is_rng else np.asarray(leaf)[index]

    return jax.tree.map(widen, tree)


def _over_devices(settings: FitSettings, memory: Memory, mesh: Mesh | None) -> tuple[FitSettings, Memory]:
    """What `fit_many` works with on several devices: ``settings.lanes`` on each, and a part of the memory's rows.

    Args:
        settings: options for one device.
        memory: all of it.
        mesh: the devices; ``None`` changes nothing.

    Raises:
        TPatchError: the recipe is joint, which holds out the memory's last rows.
    """
    if mesh is None:
        return settings, memory
    if settings.recipe == "joint":
        raise TPatchError("the joint recipe is not split over devices; use recipe=staged, or a mesh without 'data'")
    return dataclasses.replace(settings, lanes=settings.lanes * parts(mesh)), divided(memory, mesh)


@automatically
def fit_many(
    lanes: FitProblem,
    memory: Memory,
    head: Head,
    rngs: Key[Array, " rngs"],
    settings: FitSettings,
    activation: Activation,
    progress: CountProgress | None = None,
    mesh: Mesh | None = None,
    *,
    size: int | None = None,
    retry: bool = False,
) -> tuple[Patch, FitInfo]:
    """Fit many patches: `fit` under ``vmap``, in buckets of lanes of few sizes.

    Lanes never couple: the result equals fitting each alone, in any order and any bucket. Under the joint recipe lanes
    stop one by one, and finished ones are dropped into a smaller bucket.

    Args:
        lanes: a batch of lanes, every leaf with a leading axis of ``n``.
        memory: shared by all lanes.
        head: as for `fit`; a `jax.tree_util.Partial` over the weights keeps them out of the compiled program.
        rngs: typed random keys, ``[n]`` or more.
        settings: static options.
        activation: the feed-forward network's activation.
        progress: called with the number of lanes finished so far.
        mesh: devices over whose axis ``"data"`` lanes and memory rows are split (staged); each fits
            ``settings.lanes`` lanes at a time. What ``head`` holds has to lie on it.
        size: as if there were so many lanes (staged): so a last part of many compiles nothing of its own.
        retry: fitted before without success: the key takes twice the steps and the patch fires more readily on its own
            queries (staged).

    Returns:
        Patches with a leading axis, ``[n, 1, d]``, and their `FitInfo`, ``[n]``.

    Raises:
        TPatchError: the joint recipe is to be split over several devices, or as `fit`.

    Source: Huang et al. 2023, section 4; the batching is this library's.

    Example:
        >>> import numpy as np
        >>> from jax.tree_util import Partial
        >>> from tpatch_jax.core.memory import create_memory
        >>> rows = jax.random.normal(jax.random.key(0), (64, 4))
        >>> unembedding = jax.random.normal(jax.random.key(1), (4, 10))
        >>> query, nothing = jnp.ones((1, 4)), jnp.zeros((0, 4))
        >>> lane = FitProblem(query, 0 * query, nothing, None, jnp.array(3), unembedding[:, 3], jnp.array(1.0))
        >>> lanes = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), lane)
        >>> head = Partial(lambda unembedding, context, output: output @ unembedding, unembedding)
        >>> rngs = jax.random.split(jax.random.key(2), 3)
        >>> patches, info = fit_many(lanes, create_memory(rows), head, rngs, FitSettings(), jax.nn.relu)
        >>> patches.key.shape
        (3, 1, 4)
    """
    _check(lanes, memory, head, rngs, settings, activation)
    settings, memory = _over_devices(settings, memory, mesh)
    total = lanes.target.shape[0]
    patches: list[Patch] = []
    infos: list[FitInfo] = []
    for first in range(0, total, settings.lanes):
        part = jax.tree.map(lambda leaf, first=first: leaf[first : first + settings.lanes], lanes)
        count = part.target.shape[0]
        if settings.recipe == "staged":
            part = _padded(part, round_up(few_or_most(max(count, size or total), settings.lanes), parts(mesh)))
            patch, info = _staged_bucket(part, memory, head, count, settings, activation, mesh, retry)
        else:
            part = _padded(part, power_of_two(count, most=settings.lanes))
            part_rngs = _padded(rngs[first : first + count], part.target.shape[0])
            patch, info = _joint_bucket(part, memory, head, part_rngs, count, settings, activation)
        patches.append(jax.tree.map(lambda leaf, count=count: host(leaf)[:count], patch))
        infos.append(jax.tree.map(lambda leaf, count=count: host(leaf)[:count], info))
        if progress:
            progress(first + count)
    # `jnp.asarray` would compile a program for each new number of lanes.
    join = lambda *leaves: jax.device_put(np.concatenate(leaves))  # noqa: E731
    return jax.tree.map(join, *patches), jax.tree.map(join, *infos)


def _joint_bucket(
    lanes: FitProblem,
    memory: Memory,
    head: Head,
    rngs: Key[Array, " lanes"],
    count: int,
    settings: FitSettings,
    activation: Activation,
) -> tuple[Patch, FitInfo]:
    """The joint recipe for one bucket, which shrinks as lanes finish."""
    states = begin_many(lanes, rngs, settings)
    finished: dict[int, joint.JointState] = {}
    going = [(lane, lane) for lane in range(count)]  # where in the bucket, which lane
    part = lanes
    while going:
        states = advance_many(states, part, memory, head, settings, activation)
        done = np.asarray(states.done)
        for slot, lane in going:
            if done[slot]:
                finished[lane] = jax.tree.map(lambda leaf, slot=slot: leaf[slot], states)
        going = [(slot, lane) for slot, lane in going if not done[slot]]
        if going and power_of_two(len(going), most=settings.lanes) < part.target.shape[0]:
            (slots, rest), size = np.asarray(going).T, power_of_two(len(going), most=settings.lanes)
            states = _padded(jax.tree.map(lambda leaf, slots=slots: leaf[slots], states), size)
            part = _padded(jax.tree.map(lambda leaf, rest=rest: leaf[rest], lanes), size)
            going = list(enumerate(rest.tolist()))
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(finished[lane] for lane in range(count)))
    size = lanes.target.shape[0]
    return end_many(_padded(states, size), lanes, memory, head, settings, activation)
