"""The patch: neurons as a pure pytree, and their algebra.

A patch neuron has a key ``k``, a bias ``b`` and a value ``v``. On a query ``q`` (the input of the edited feed-forward
network) it adds ``act(q·k + b)·v`` to that network's output (Huang et al., ICLR 2023, section 4.1).

What is put together or picked from patches of NumPy arrays stays on the host, where a new number of neurons compiles
nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.sizes import in_blocks
from tpatch_jax.errors import TPatchError
from tpatch_jax.typing import Activation

__all__ = [
    "Patch",
    "activations",
    "concatenate",
    "contribution",
    "create",
    "join",
    "pad",
    "preactivations",
    "product",
    "sharpen",
    "sized",
    "take",
]

SILENT_BIAS = -1.0


class Patch(NamedTuple):
    """Neurons that correct a model: a pure pytree, ready for ``jit``, ``vmap`` and ``grad``.

    A batch of patches has the same fields with a leading axis. Patches of several layers are a plain dict from a
    layer's number to its patch; see `tpatch_jax.core.layers`.

    Attributes:
        key: ``[n, d]``, what each neuron recognises.
        bias: ``[n]``, its threshold, added to ``query · key``.
        value: ``[n, d]``, what it adds to the FFN's output, per unit of activation.

    Example:
        >>> import jax.numpy as jnp
        >>> patch = Patch(key=jnp.ones((1, 4)), bias=jnp.zeros(1), value=jnp.ones((1, 4)))
        >>> patch.key.shape
        (1, 4)

    Source: Huang et al., "Transformer-Patcher: One Mistake Worth One Neuron", ICLR 2023, section 4.1.
    """

    key: Float[Array, "*batch neurons hidden"]
    bias: Float[Array, "*batch neurons"]
    value: Float[Array, "*batch neurons hidden"]


def create(hidden_size: int, neurons: int = 0, dtype: jnp.dtype | type = jnp.float32) -> Patch:
    """Neurons that do nothing: zero key and value, a bias that keeps them silent under ReLU.

    Args:
        hidden_size: ``d``, the width of queries.
        neurons: ``n``, how many.
        dtype: of all three arrays.

    Returns:
        A `Patch` of ``n`` neurons.

    Example:
        >>> create(4, neurons=2).value.shape
        (2, 4)
    """
    # From the host, where no program is compiled for a new number of neurons.
    zeros, silent = np.zeros((neurons, hidden_size), dtype), np.full(neurons, SILENT_BIAS, dtype)
    zeros, silent = jax.device_put((zeros, silent))
    return Patch(zeros, silent, zeros)


def _on_host(*patches: Patch) -> bool:
    return all(isinstance(leaf, np.ndarray) for patch in patches for leaf in patch)


def concatenate(patches: Sequence[Patch]) -> Patch:
    """All neurons of several patches, in order, as one patch.

    Args:
        patches: at least one patch, each ``[n_i, d]``, of one layer.

    Returns:
        One patch of ``Σ n_i`` neurons.

    Raises:
        TPatchError: nothing was given, or the widths differ.

    Example:
        >>> concatenate([create(4, 1), create(4, 2)]).key.shape
        (3, 4)
    """
    if isinstance(patches, Patch | str) or not isinstance(patches, Sequence):
        raise TPatchError(f"concatenate takes a list of patches of one layer, not {describe(patches)}; put it into one")
    if not patches:
        raise TPatchError("concatenate was given no patch; use create(hidden_size) for an empty one")
    if not all(isinstance(patch, Patch) for patch in patches):
        raise TPatchError("concatenate takes patches of one layer; use concatenate_layers for {layer: patch}")
    widths = {patch.key.shape[-1] for patch in patches}
    if len(widths) > 1:
        raise TPatchError(f"patches of different widths {sorted(widths)} belong to different models; keep them apart")
    together: Any = np.concatenate if _on_host(*patches) else jnp.concatenate
    return Patch(
        together([patch.key for patch in patches]),
        together([patch.bias for patch in patches]),
        together([patch.value for patch in patches]),
    )


def take(patch: Patch, index: Array | np.ndarray | slice | Sequence[int]) -> Patch:
    """Some neurons of a patch, by position, mask or slice.

    Args:
        patch: ``n`` neurons.
        index: what to index the first axis with.

    Returns:
        A patch of the chosen neurons, in the order of ``index``.

    Example:
        >>> take(create(4, 3), slice(0, 2)).bias.shape
        (2,)
    """
    chosen: Any = index
    if not isinstance(index, slice):
        chosen = np.asarray(index) if _on_host(patch) else jnp.asarray(index)
        # An empty list has no integer type of its own.
        chosen = chosen if chosen.size else chosen.astype(np.int32)
    return Patch(patch.key[chosen], patch.bias[chosen], patch.value[chosen])


def pad(patch: Patch, neurons: int) -> Patch:
    """The patch with silent neurons added until it has ``neurons`` of them.

    Padding changes no output: a padded neuron's value is zero, and its bias keeps it from firing.

    Args:
        patch: ``n`` neurons, ``n <= neurons``.
        neurons: how many there shall be.

    Returns:
        A patch of ``neurons`` neurons, the given ones first.

    Raises:
        TPatchError: the patch already has more.

    Example:
        >>> pad(create(4, 3), 8).key.shape
        (8, 4)
    """
    missing = neurons - patch.key.shape[0]
    if missing < 0:
        raise TPatchError(f"a patch of {patch.key.shape[0]} neurons does not fit into {neurons}; ask for a larger size")
    if not missing:
        return patch
    at: Any = np if _on_host(patch) else jnp
    zeros = at.zeros((missing, patch.key.shape[1]), patch.key.dtype)
    return concatenate([patch, Patch(zeros, at.full(missing, SILENT_BIAS, patch.bias.dtype), zeros)])


def sized(patch: Patch, least: int = 8) -> Patch:
    """The patch padded to a power of two neurons, from 1,024 on to a multiple of that, so that a new number of them
    seldom compiles anything anew.

    Args:
        patch: ``n`` neurons.
        least: the smallest size.

    Returns:
        A patch of at least ``n`` neurons, the given ones first.

    Example:
        >>> sized(create(4, 9)).key.shape
        (16, 4)
    """
    return pad(patch, in_blocks(patch.key.shape[0], least, 1024))


def join(patch: Patch) -> Patch:
    """A batch of patches, with leading axes, as one patch: ``[..., n, d]`` to ``[N, d]``.

    Args:
        patch: fields with any number of leading axes.

    Returns:
        One patch with every neuron of the batch, in order.

    Example:
        >>> batch = Patch(jnp.ones((5, 2, 4)), jnp.ones((5, 2)), jnp.ones((5, 2, 4)))
        >>> join(batch).key.shape
        (10, 4)
    """
    hidden_size = patch.key.shape[-1]
    return Patch(patch.key.reshape(-1, hidden_size), patch.bias.reshape(-1), patch.value.reshape(-1, hidden_size))


def sharpen(patch: Patch, sharpness: float) -> Patch:
    """Neurons that activate as ``act(s·z)/s`` instead of ``act(z)``, with ``s`` folded into the parameters.

    ``k' = s·k, b' = s·b, v' = v/s``. A larger ``s`` brings GELU and SiLU nearer to ReLU and removes what they leak
    below the threshold. With a power of two the folding loses no bit.

    Args:
        patch: ``n`` neurons.
        sharpness: ``s > 0``; 1 changes nothing.

    Returns:
        The same neurons, sharper.

    Example:
        >>> float(sharpen(Patch(jnp.ones((1, 4)), jnp.ones(1), jnp.ones((1, 4))), 4.0).bias[0])
        4.0
    """
    return patch._replace(key=patch.key * sharpness, bias=patch.bias * sharpness, value=patch.value / sharpness)


def preactivations(patch: Patch, query: Float[Array, "*rows hidden"]) -> Float[Array, "*rows neurons"]:
    """``z = q·k + b`` of every neuron on every query.

    Args:
        patch: ``n`` neurons.
        query: ``[..., d]``.

    Returns:
        ``[..., n]``.

    Source: Huang et al. 2023, section 4.1.

    Example:
        >>> preactivations(create(4, 2), jnp.ones((3, 4))).shape
        (3, 2)
    """
    # Said so, since a transposed key would be copied for every token that is generated.
    return jnp.einsum("...d,nd->...n", query, patch.key.astype(query.dtype)) + patch.bias.astype(query.dtype)


def activations(
    patch: Patch, query: Float[Array, "*rows hidden"], activation: Activation
) -> Float[Array, "*rows neurons"]:
    """``a = act(q·k + b)`` of every neuron on every query.

    Args:
        patch: ``n`` neurons.
        query: ``[..., d]``.
        activation: the feed-forward network's own, or ReLU.

    Returns:
        ``[..., n]``.

    Source: Huang et al. 2023, section 4.1.

    Example:
        >>> float(activations(create(4, 1), jnp.ones(4), jax.nn.relu)[0])
        0.0
    """
    return activation(preactivations(patch, query))


def product(x: Float[Array, "*rows inner"], kernel: Float[Array, "inner outer"]) -> Float[Array, "*rows outer"]:
    """``x·K``. Where axis types are explicit and both are split along what is summed over, the sum is not.

    Args:
        x: ``[..., n]``.
        kernel: ``[n, d]``.

    Returns:
        ``[..., d]``, split as ``x`` and ``kernel`` are along those axes.

    Example:
        >>> product(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
        (2, 4)
    """
    outer, inner = jax.typeof(x).sharding.spec, jax.typeof(kernel).sharding.spec
    # Only explicit axes are part of a type.
    if inner[0] is None:
        return x @ kernel
    return jnp.matmul(x, kernel, out_sharding=PartitionSpec(*outer[:-1], inner[1]))


def contribution(
    patch: Patch, query: Float[Array, "*rows hidden"], activation: Activation
) -> Float[Array, "*rows hidden"]:
    """What the patch adds to the FFN's output: ``Σ act(q·k + b)·v``.

    Args:
        patch: ``n`` neurons.
        query: ``[..., d]``.
        activation: the feed-forward network's own, or ReLU.

    Returns:
        ``[..., d]``.

    Source: Huang et al. 2023, section 4.1.

    Example:
        >>> contribution(create(4, 2), jnp.ones((3, 4)), jax.nn.relu).shape
        (3, 4)
    """
    return product(activations(patch, query, activation), patch.value.astype(query.dtype))
