"""Where a model's parameters live when there are several devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpatch_jax.core.devices import automatic
from tpatch_jax.core.patch import Patch

__all__ = ["MODEL_AXIS", "neuron_spec", "place", "spec", "split_neurons"]

MODEL_AXIS = "model"
"""The mesh axis over which base weights are split; over every other axis they are repeated."""

ALIGNMENT = 64
"""Of an array that begins at a multiple of so many bytes JAX makes no copy for the CPU."""

_BY_OUTPUT = ("query", "key", "value", "gate", "up", "head")
_BY_INPUT = ("output", "down")


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one parameter is split: readers by their outputs, writers by their inputs, embeddings by the vocabulary.

    Args:
        path: the parameter's dotted path, such as ``"layers.0.ffn.up.kernel"``.
        shape: its shape; an axis that the mesh axis does not divide is not split.
        mesh: with an axis ``"model"``, or nothing is split.

    Example:
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> spec("layers.0.ffn.up.kernel", (16, 32), mesh) == jax.sharding.PartitionSpec(None, "model")
        True
    """
    parent, _, leaf = path.rpartition(".")
    owner = parent.rpartition(".")[2]
    if owner in _BY_OUTPUT:
        axis = len(shape) - 1
    elif (owner in _BY_INPUT and leaf == "kernel") or path == "embed.embedding":
        # Kernels of experts have an axis of experts before the others.
        axis = len(shape) - 2
    else:
        return PartitionSpec()
    if MODEL_AXIS not in mesh.axis_names or not shape[axis] or shape[axis] % mesh.shape[MODEL_AXIS]:
        return PartitionSpec()
    names: list[Any] = [None] * len(shape)
    names[axis] = MODEL_AXIS
    return PartitionSpec(*names)


def place(path: str, array: np.ndarray, dtype: str | None, mesh: Mesh | None) -> Array:
    """One parameter on its device or devices, each of which gets its own part only.

    Args:
        path: the parameter's dotted path.
        array: the whole parameter on the host.
        dtype: what it becomes on the way; ``None`` keeps its type.
        mesh: the devices; ``None`` is the default device.
    """
    wanted = jnp.dtype(dtype) if dtype else array.dtype
    if mesh is None:
        return jax.device_put(_aligned(array, wanted))
    sharding = NamedSharding(automatic(mesh), spec(path, array.shape, mesh))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: _aligned(array[index], wanted))


def neuron_spec(neurons: int, mesh: Mesh) -> PartitionSpec:
    """How the neurons of a patch are split: like those of the network, where the mesh axis divides them.

    Args:
        neurons: how many.
        mesh: with an axis ``"model"``, or nothing is split.

    Example:
        >>> neuron_spec(512, jax.make_mesh((1,), ("model",))) == jax.sharding.PartitionSpec("model")
        True
    """
    divided = MODEL_AXIS in mesh.axis_names and neurons % mesh.shape[MODEL_AXIS] == 0
    return PartitionSpec(MODEL_AXIS) if divided else PartitionSpec()


def split_neurons(patch: Patch, mesh: Mesh) -> Patch:
    """A patch of which each device along ``"model"`` has a part: ten thousand neurons are as large as a layer.

    Args:
        patch: neurons, ``[n, d]``, the same in every process.
        mesh: the devices.
    """
    sharding = NamedSharding(automatic(mesh), neuron_spec(patch.key.shape[0], mesh))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), patch)


def _aligned(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in one piece that begins where the CPU's buffers do, so that JAX takes it as it is and copies no more."""
    memory = np.empty(array.size * dtype.itemsize + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    copy = memory[first : first + array.size * dtype.itemsize].view(dtype).reshape(array.shape)
    np.copyto(copy, array, casting="unsafe")
    return copy
