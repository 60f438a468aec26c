"""Symmetric positive systems as large as a network is wide.

On a CPU or GPU a library factors them. XLA's compiler for TPUs writes such a factoring out block by block, so that a
program for thousands of unknowns takes minutes or hours to compile; there the blocks are taken in a loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

__all__ = ["BLOCK", "cholesky", "cholesky_in_blocks", "solve_lower", "solve_lower_in_blocks", "solve_positive"]

BLOCK = 128
"""So many rows at a time: what a TPU's matrix unit takes."""

LARGE = 4 * BLOCK
"""Fewer unknowns compile quickly as they are."""

_EXACTLY = jax.lax.Precision.HIGHEST


def _chosen(large: Callable[..., Array], library: Callable[..., Array], *arrays: Array) -> Array:
    """The one or the other, by the device that the program is compiled for."""
    if arrays[0].shape[-1] <= LARGE:
        return library(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=large, default=library)


def cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The lower ``L`` with ``L·Lᵀ = A``; not a number where ``A`` is not positive definite.

    Args:
        matrix: ``A``, ``[n, n]``, symmetric.

    Example:
        >>> cholesky(jnp.diag(jnp.array([4.0, 9.0]))).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    return _chosen(cholesky_in_blocks, jnp.linalg.cholesky, matrix)


def solve_lower(
    factor: Float[Array, "n n"], columns: Float[Array, "n columns"], *, transposed: bool = False
) -> Float[Array, "n columns"]:
    """``L⁻¹·B``, or ``L⁻ᵀ·B``.

    Args:
        factor: ``L``, ``[n, n]``; what stands above its diagonal is not read.
        columns: ``B``, ``[n, columns]``.
        transposed: solve with ``Lᵀ``.

    Example:
        >>> solve_lower(jnp.array([[2.0, 0.0], [1.0, 1.0]]), jnp.array([[2.0], [3.0]])).tolist()
        [[1.0], [2.0]]
    """

    def in_blocks(factor: Array, columns: Array) -> Array:
        return solve_lower_in_blocks(factor, columns, transposed=transposed)

    def library(factor: Array, columns: Array) -> Array:
        return solve_triangular(factor, columns, trans="T" if transposed else 0, lower=True)

    return _chosen(in_blocks, library, factor, columns)


def solve_positive(matrix: Float[Array, "n n"], columns: Float[Array, "n columns"]) -> Float[Array, "n columns"]:
    """``A⁻¹·B`` of a symmetric positive definite ``A``.

    Args:
        matrix: ``A``, ``[n, n]``.
        columns: ``B``, ``[n, columns]``.

    Example:
        >>> solve_positive(4 * jnp.eye(2), jnp.ones((2, 1))).tolist()
        [[0.25], [0.25]]
    """
    factor = cholesky(matrix)
    return solve_lower(factor, solve_lower(factor, columns), transposed=True)


def _padded(factor: Array, columns: Array | None = None) -> tuple[Array, Array]:
    """With unknowns that are one and stand alone behind the others, up to whole blocks."""
    count = factor.shape[0]
    missing = -count % BLOCK
    beside = jnp.concatenate([jnp.zeros(count, factor.dtype), jnp.ones(missing, factor.dtype)])
    whole = jnp.pad(factor, ((0, missing), (0, missing))) + jnp.diag(beside)
    return whole, whole if columns is None else jnp.pad(columns, ((0, missing), (0, 0)))


def cholesky_in_blocks(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`cholesky` in a loop over blocks of columns: each is what is left of it after those before it.

    ``L_j = (A_j - L·L[j]ᵀ)·D⁻ᵀ`` with ``D`` the factor of the block on the diagonal; two thirds of the products are
    with zeros, for in a loop all blocks have one shape.

    Args:
        matrix: ``A``, ``[n, n]``.

    Example:
        >>> cholesky_in_blocks(jnp.diag(jnp.array([4.0, 9.0]))).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    count = matrix.shape[0]
    whole, _ = _padded(matrix)
    rows = jnp.arange(whole.shape[0])[:, None]

    def column(number: Array, factor: Array) -> Array:
        first = number * BLOCK
        before = jax.lax.dynamic_slice_in_dim(factor, first, BLOCK, 0)
        left = jax.lax.dynamic_slice_in_dim(whole, first, BLOCK, 1)
        left = left - jnp.matmul(factor, before.T, precision=_EXACTLY)
        corner = jnp.linalg.cholesky(jax.lax.dynamic_slice_in_dim(left, first, BLOCK, 0))
        inverse = solve_triangular(corner, jnp.eye(BLOCK, dtype=matrix.dtype), lower=True)
        below = jnp.matmul(left, inverse.T, precision=_EXACTLY)
        done = jnp.where(rows >= first + BLOCK, below, 0)
        done = jax.lax.dynamic_update_slice_in_dim(done, corner, first, 0)
        return jax.lax.dynamic_update_slice_in_dim(factor, done, first, 1)

    factor = jax.lax.fori_loop(0, whole.shape[0] // BLOCK, column, jnp.zeros_like(whole))
    return factor[:count, :count]


def solve_lower_in_blocks(
    factor: Float[Array, "n n"], columns: Float[Array, "n columns"], *, transposed: bool = False
) -> Float[Array, "n columns"]:
    """`solve_lower` in a loop over blocks of unknowns, from the first on, or of ``Lᵀ`` from the last.

    Args:
        factor: ``L``, ``[n, n]``.
        columns: ``B``, ``[n, columns]``.
        transposed: solve with ``Lᵀ``.

    Example:
        >>> solve_lower_in_blocks(jnp.array([[2.0, 0.0], [1.0, 1.0]]), jnp.array([[2.0], [3.0]])).tolist()
        [[1.0], [2.0]]
    """
    count = columns.shape[0]
    whole, wanted = _padded(jnp.tril(factor), columns)
    blocks = whole.shape[0] // BLOCK

    def unknowns(number: Array, solved: Array) -> Array:
        first = (blocks - 1 - number if transposed else number) * BLOCK
        # What is not solved yet is zero, and so is the block itself.
        lines = jax.lax.dynamic_slice_in_dim(whole, first, BLOCK, 1 if transposed else 0)
        corner = jax.lax.dynamic_slice_in_dim(lines, first, BLOCK, 0 if transposed else 1)
        known = jnp.matmul(lines.T if transposed else lines, solved, precision=_EXACTLY)
        left = jax.lax.dynamic_slice_in_dim(wanted, first, BLOCK, 0) - known
        part = solve_triangular(corner, left, trans="T" if transposed else 0, lower=True)
        return jax.lax.dynamic_update_slice_in_dim(solved, part, first, 0)

    return jax.lax.fori_loop(0, blocks, unknowns, jnp.zeros_like(wanted))[:count]
