"""Pytrees with static facts: their arrays pass through ``jit``, ``vmap`` and ``grad``, their facts stay as they are."""

from typing import Any, TypeVar

import jax
import numpy as np

from tpatch_jax.core.devices import host

__all__ = ["same_arrays", "with_static_fields"]

Record = TypeVar("Record", bound=type)


def with_static_fields(*names: str) -> Any:
    """A decorator for a `NamedTuple`: some of its fields are static, so that ``jit`` compiles anew where they differ.

    Args:
        names: those fields; their values must compare and hash.

    Example:
        >>> from typing import NamedTuple
        >>> @with_static_fields("layer")
        ... class Cut(NamedTuple):
        ...     output: jax.Array
        ...     layer: int
        >>> jax.tree.leaves(Cut(1.0, 3))
        [1.0]
    """

    def register(kind: Record) -> Record:
        fields: tuple[str, ...] = kind._fields
        arrays = tuple(name for name in fields if name not in names)
        keys = tuple(jax.tree_util.GetAttrKey(name) for name in arrays)

        def flatten(record: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            return tuple(getattr(record, name) for name in arrays), tuple(getattr(record, name) for name in names)

        def flatten_with_keys(record: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            children, static = flatten(record)
            return tuple(zip(keys, children, strict=True)), static

        def unflatten(static: Any, children: Any) -> Any:
            return kind(**dict(zip(arrays, children, strict=True)), **dict(zip(names, static, strict=True)))

        jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
        return kind

    return register


def same_arrays(left: Any, right: Any) -> bool:
    """Whether two trees have one structure and in it the same arrays, bit for bit: types, shapes and every value."""
    if left is right:
        return True
    leaves, others = jax.tree.leaves(left), jax.tree.leaves(right)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(map(_same_array, leaves, others))


def _same_array(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if np.shape(left) != np.shape(right) or jax.dtypes.result_type(left) != jax.dtypes.result_type(right):
        return False
    # As bytes: a NaN is then the same as itself, and zero is not minus zero.
    return np.array_equal(_bytes(left), _bytes(right))


def _bytes(array: Any) -> np.ndarray:
    return np.ascontiguousarray(host(array)).reshape(-1).view(np.uint8)
