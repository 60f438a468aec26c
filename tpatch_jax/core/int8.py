"""Weights in INT8 beside a scale for each channel, as the qwix library has them (``qwix.QArray``).

A network's parameters may hold such arrays in the place of plain ones: wherever a weight is read, `plain` turns it back
into plain numbers, within the compiled program that uses it, so that memory holds the whole network in INT8 and a layer
or two in float.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpatch_jax.core.arguments import install_advice
from tpatch_jax.errors import TPatchError

__all__ = ["float_type", "has_int8", "is_int8", "plain", "plain_tree", "quantise", "take_rows"]


def is_int8(array: Any) -> bool:
    """Whether an array is in INT8 with scales beside it."""
    return hasattr(array, "qvalue")


def has_int8(tree: Any) -> bool:
    """Whether any array of a tree is."""
    return any(map(is_int8, jax.tree.leaves(tree, is_leaf=is_int8)))


def quantise(array: Float[Array, "rows columns"], channels: int) -> Any:
    """A matrix in INT8: ``q = round(w / s)``, with ``s = max|w| / 127.5`` of each channel, and none beyond ±127.

    Args:
        array: the matrix.
        channels: the axis along which each has a scale of its own.

    Returns:
        A ``qwix.QArray``, a pytree that has shape and type of the matrix.

    Raises:
        TPatchError: the qwix package is missing.
    """
    try:
        import qwix  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TPatchError(f"weights in INT8 need the qwix package: {install_advice('qwix>=0.1.8', 'int8')}") from error
    return qwix.quantize(array, jnp.int8, channelwise_axes=[channels])


def plain(array: Any) -> Array:
    """A weight as plain numbers: ``q·s`` of one in INT8, any other as it is.

    Example:
        >>> plain(jnp.ones(2)).shape
        (2,)
    """
    return array.qvalue.astype(array.scale.dtype) * array.scale if is_int8(array) else array


def plain_tree(tree: Any) -> Any:
    """All weights of a tree as plain numbers."""
    return jax.tree.map(plain, tree, is_leaf=is_int8)


def take_rows(table: Any, rows: Int[Array, "*shape"]) -> Float[Array, "*shape hidden"]:
    """Rows of a table, clipped to those that there are; of one in INT8 no other row is turned back.

    Args:
        table: ``[n, d]``.
        rows: ``[...]`` int.

    Returns:
        ``[..., d]``.
    """
    if not is_int8(table):
        return jnp.take(table, rows, axis=0, mode="clip")
    values, scale = (jnp.take(part, rows, axis=0, mode="clip") for part in (table.qvalue, table.scale))
    return values.astype(scale.dtype) * scale


def float_type(tree: Any) -> jnp.dtype:
    """The type in which a network computes: that of its first array, of one in INT8 that of its scale."""
    first = jax.tree.leaves(tree, is_leaf=is_int8)[0]
    return jnp.dtype(first.dtype)
