"""Work that is split over several devices: rows over the axis ``"data"`` of a mesh."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

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
]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DATA_AXIS = "data"
"""The mesh axis over which lanes, texts and memory rows are split."""


def automatic(mesh: Mesh) -> Mesh:
    """The same devices with the compiler choosing how intermediate results lie, whatever the caller's axes are."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def automatically(run: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that runs with automatic axes, whatever types the caller's mesh and arrays have.

    Arrays on a mesh with explicit axes are put on the same devices with automatic ones; arrays that come out are put on
    the caller's mesh again, models and states stay as they are. Inside somebody's ``jit``, ``vmap`` or ``grad`` types
    cannot be changed any more, and it runs as it is.

    Args:
        run: any function of arrays, and of what holds arrays.

    Example:
        >>> automatically(lambda x: x + 1)(jax.numpy.zeros(1)).tolist()
        [1.0]
    """

    @wraps(run)
    def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        context = jax.sharding.get_abstract_mesh()
        leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, Array)]
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return run(*args, **kwargs)
        meshes = [leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
        if not any(mesh.explicit_axes for mesh in (*meshes, context)):
            return run(*args, **kwargs)
        types = dict.fromkeys(context.axis_names, AxisType.Auto)
        with jax.sharding.use_abstract_mesh(context.update_axis_types(types)):
            given, named = jax.tree.map(partial(_put, kind=automatic), (args, kwargs))
            result = run(*given, **named)  # pyright: ignore[reportCallIssue]
        explicit = next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.explicit_axes), None)
        return jax.tree.map(partial(_put, kind=lambda mesh: _explicit(mesh, explicit)), result)

    return inside


def _explicit(mesh: Mesh, wanted: Mesh | None) -> Mesh:
    """The caller's mesh for results that lie on its devices."""
    if wanted is None:
        context = jax.sharding.get_mesh()
        wanted = context if isinstance(context, Mesh) and not context.empty else mesh
    return wanted if wanted.devices.tolist() == mesh.devices.tolist() else mesh


def _put(leaf: Any, kind: Callable[[Mesh], Mesh]) -> Any:
    """An array on another kind of its mesh; anything else as it is."""
    sharding = leaf.sharding if isinstance(leaf, Array) and not isinstance(leaf, Tracer) else None
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return leaf
    # On one device JAX names axes of scalars as well, and refuses them afterwards.
    spec = PartitionSpec(*sharding.spec[: leaf.ndim])
    return jax.device_put(leaf, NamedSharding(kind(sharding.mesh), spec))


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
        tree: arrays, the same in every process; one that is split so already stays as it is, also along other axes.
        mesh: the devices; ``None`` leaves everything as it is.
    """
    if mesh is None:
        return tree

    def put(leaf: Any) -> Array:
        if isinstance(leaf, Array) and _rows_are_split(leaf, mesh):
            return leaf
        split = leaf.ndim > 0 and leaf.shape[0] % parts(mesh) == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(DATA_AXIS) if split else PartitionSpec()))

    return jax.tree.map(put, tree)


def _rows_are_split(array: Array, mesh: Mesh) -> bool:
    sharding = None if isinstance(array, Tracer) else array.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh != mesh or not sharding.spec:
        return False
    return sharding.spec[0] in (DATA_AXIS, (DATA_AXIS,))


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
