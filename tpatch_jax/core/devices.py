"""Work that is split over several devices: rows over the axis ``"data"`` of a mesh."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tpatch_jax.core.memory import PADDING, Memory

__all__ = [
    "DATA_AXIS",
    "automatic",
    "automatically",
    "divided",
    "host",
    "mesh_of",
    "parts",
    "repeat",
    "shard_rows",
    "with_automatic_axes",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

DATA_AXIS = "data"
"""The mesh axis over which lanes, texts and memory rows are split."""


def automatic(mesh: Mesh) -> Mesh:
    """The same devices with the compiler choosing how intermediate results lie, whatever the caller's axes are."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def automatically(run: Callable[..., Result], *trees: Any) -> Result:
    """Run something on a network's arrays, whatever the caller's axis types: inside they are automatic.

    Args:
        run: from the trees to a tree.
        trees: trees of arrays, perhaps on a mesh with explicit axes.

    Returns:
        What ``run`` gives. Where the caller's axes are explicit, those of the result are as well, so that the caller's
        next operation on it is no error.
    """
    inside = _with_automatic_axes(trees)
    if inside is None:
        return run(*trees)
    with inside.context:
        result = run(*inside.trees)

    def back(leaf: Any) -> Any:
        sharding = leaf.sharding if isinstance(leaf, Array) and not isinstance(leaf, Tracer) else None
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            return leaf
        return jax.device_put(leaf, NamedSharding(inside.outside(sharding.mesh), _spec(leaf)))

    return jax.tree.map(back, result)


def _spec(leaf: Array) -> PartitionSpec:
    """How an array is split; on one device JAX names axes of scalars as well, and refuses them afterwards."""
    assert isinstance(leaf.sharding, NamedSharding)
    return PartitionSpec(*leaf.sharding.spec[: leaf.ndim])


class _Inside(NamedTuple):
    """How something is run whose caller has explicit axes: where, on what, and what its results become."""

    context: AbstractContextManager[Any]
    trees: tuple[Any, ...]
    outside: Callable[[Mesh], Mesh]


def _with_automatic_axes(trees: tuple[Any, ...]) -> _Inside | None:
    """Trees on meshes with automatic axes; ``None`` where they are, or nothing can be changed."""
    leaves = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, Array)]
    # Inside somebody's `jit`, `vmap` or `grad` types cannot be changed any more, and what is traced has no sharding.
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return None
    meshes = [leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    context = jax.sharding.get_abstract_mesh()
    explicit = [mesh for mesh in meshes if mesh.explicit_axes and isinstance(mesh, Mesh)]
    if not explicit and not context.explicit_axes:
        return None

    def put(leaf: Any) -> Any:
        sharding = leaf.sharding if isinstance(leaf, Array) else None
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            return leaf
        return jax.device_put(leaf, NamedSharding(automatic(sharding.mesh), _spec(leaf)))

    def outside(mesh: Mesh) -> Mesh:
        if explicit:
            return explicit[0]
        same = context.explicit_axes and mesh.axis_names == context.axis_names
        return Mesh(mesh.devices, mesh.axis_names, axis_types=context.axis_types) if same else mesh

    types = dict.fromkeys(context.axis_names, AxisType.Auto)
    inside = jax.sharding.use_abstract_mesh(context.update_axis_types(types))
    return _Inside(inside, jax.tree.map(put, trees), outside)


def with_automatic_axes(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A decorator: a function that runs networks does so whatever the axis types of the caller's mesh are.

    What it returns stays on automatic axes, which every other function of this library takes; `automatically` is for
    arrays that the caller works on.
    """

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        inside = _with_automatic_axes((args, kwargs))
        if inside is None:
            return function(*args, **kwargs)
        with inside.context:
            return function(*inside.trees[0], **inside.trees[1])  # pyright: ignore[reportCallIssue]

    return run


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters lie on, if it has an axis ``"data"`` of several devices.

    Args:
        params: any tree of arrays.

    Example:
        >>> print(mesh_of({"kernel": jax.numpy.ones(2)}))
        None
    """
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            mesh = sharding.mesh
            return automatic(mesh) if mesh.shape.get(DATA_AXIS, 1) > 1 else None
    return None


def parts(mesh: Mesh | None) -> int:
    """Over how many devices rows are split."""
    return 1 if mesh is None else mesh.shape[DATA_AXIS]


def shard_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with their leading axis split over ``"data"``; one that is not divided by it is repeated.

    Args:
        tree: arrays, the same in every process.
        mesh: the devices; ``None`` leaves everything as it is.
    """
    if mesh is None:
        return tree

    def put(leaf: Any) -> Array:
        split = leaf.ndim > 0 and leaf.shape[0] % parts(mesh) == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(DATA_AXIS) if split else PartitionSpec()))

    return jax.tree.map(put, tree)


def repeat(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that every device has whole."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def host(array: Any) -> np.ndarray:
    """An array as a whole in NumPy, in every process."""
    if isinstance(array, Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def divided(memory: Memory, mesh: Mesh | None) -> Memory:
    """A memory with a part of its rows on each device; what is divided already stays as it is.

    Args:
        memory: all of it; rows that do not count are put behind it until it can be divided.
        mesh: the devices; ``None`` changes nothing.
    """
    if mesh is None:
        return memory
    missing = -memory.query.shape[0] % parts(mesh)
    # Behind the others, where they change no row's block in `hardest`.
    query = np.pad(host(memory.query), ((0, missing), (0, 0))) if missing else memory.query
    answer = np.pad(host(memory.answer), (0, missing), constant_values=PADDING) if missing else memory.answer
    query, answer = shard_rows((query, answer), mesh)
    return Memory(query, answer, repeat(memory.mean, mesh), repeat(memory.whitener, mesh))
