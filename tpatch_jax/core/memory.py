"""The query memory: queries on which patches must stay silent, their statistics, and the hardest of them.

Arrays only; `tpatch_jax.editors.tpatcher.editor` collects the queries from a model.
"""

import weakref
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.positive import cholesky, solve_lower
from tpatch_jax.core.sizes import pieces
from tpatch_jax.errors import TPatchError

__all__ = [
    "Memory",
    "blended",
    "counted",
    "create_memory",
    "extend",
    "hardest",
    "matmul_precision",
    "nuisance_scatter",
    "second_moments",
    "whitening",
    "whitening_matrix",
]

NO_ANSWER, PADDING = -1, -2
"""In place of a row's answer: that it has none, and that it is no row."""

ALIGNMENT = 16


class Memory(NamedTuple):
    """Queries of inputs that are not being edited.

    Attributes:
        query: ``[rows, d]``.
        answer: ``[rows]`` int, the token that should follow a row which belongs to another edit, else -1.
            A patch need not stay silent where its own target is wanted anyway. -2 marks a row that does not count.
        mean: ``[d]``, of unrelated queries.
        whitener: ``[d, d]``, ``A`` with ``A·Aᵀ = C⁻¹`` for the regularised covariance ``C``; `whitening` makes it.
    """

    query: Float[Array, "rows d"]
    answer: Int[Array, " rows"]
    mean: Float[Array, " d"]
    whitener: Float[Array, "d d"]


@jax.jit
def second_moments(query: Float[Array, "rows d"]) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and covariance of queries.

    Args:
        query: ``[rows, d]``.

    Returns:
        ``[d]`` and ``[d, d]``, float32.

    Example:
        >>> mean, covariance = second_moments(jnp.eye(4))
        >>> mean.shape, covariance.shape
        ((4,), (4, 4))
    """
    query = query.astype(jnp.float32)
    mean = jnp.mean(query, 0)
    centred = query - mean
    return mean, centred.T @ centred / query.shape[0]


def matmul_precision() -> Any:
    """How precisely matrices are multiplied here and now; what is kept for later depends on it."""
    config: Any = jax.config
    return config.jax_default_matmul_precision


_MOMENTS: dict[int, tuple[weakref.ref[Array], Any, tuple[Array, Array]]] = {}
"""Of arrays that are still there, by their places in memory."""


def _kept_moments(query: Array) -> tuple[Array, Array]:
    """`second_moments`, taken once for an array of JAX, which never changes."""
    if not isinstance(query, Array) or isinstance(query, Tracer):
        return second_moments(query)
    place, precision = id(query), matmul_precision()
    kept = _MOMENTS.get(place)
    if kept is None or kept[0]() is not query or kept[1] != precision:
        reference = weakref.ref(query, lambda _: _MOMENTS.pop(place, None))
        kept = _MOMENTS[place] = reference, precision, second_moments(query)
    return kept[2]


@jax.jit
def nuisance_scatter(groups: Float[Array, "groups contexts d"]) -> Float[Array, "d d"]:
    """How one and the same query varies with what stands before it: the mean covariance within groups.

    Directions along which a query moves when only its context changes say nothing about the mistake, so a key should
    not look along them. This is the within-class scatter of linear discriminant analysis.

    Args:
        groups: the same position under several contexts, ``[groups, contexts, d]``.

    Returns:
        ``[d, d]``.

    Example:
        >>> nuisance_scatter(jnp.zeros((3, 2, 4))).shape
        (4, 4)
    """
    groups = groups.astype(jnp.float32)
    centred = (groups - jnp.mean(groups, 1, keepdims=True)).reshape(-1, groups.shape[-1])
    return centred.T @ centred / centred.shape[0]


@jax.jit
def blended(special: Float[Array, "d d"], general: Float[Array, "d d"], share: float) -> Float[Array, "d d"]:
    """A mixture of two scatters, each taken at a trace of one: ``s·A/tr A + (1-s)·B/tr B``; zeros stay so.

    Args:
        special: ``A``, ``[d, d]``.
        general: ``B``, ``[d, d]``.
        share: ``s``, 0 to 1.

    Example:
        >>> float(blended(4 * jnp.eye(2), jnp.eye(2), 0.5)[0, 0])
        0.5
    """
    least = jnp.finfo(special.dtype).tiny
    special, general = (scatter / jnp.maximum(jnp.trace(scatter), least) for scatter in (special, general))
    return share * special + (1 - share) * general


def whitening(
    covariance: Float[Array, "d d"],
    nuisance: Float[Array, "d d"] | None = None,
    *,
    weight: float = 0.8,
    shrinkage: float = 0.1,
) -> Float[Array, "d d"]:
    """``A`` with ``A·Aᵀ = C⁻¹``, so that ``(q - μ)·A`` has no preferred direction.

    ``C = (1-w)·Σ/tr Σ + w·N/tr N``, shrunk by a share of its mean eigenvalue and scaled to a mean eigenvalue of one.

    Args:
        covariance: ``Σ`` of memory queries, ``[d, d]``.
        nuisance: ``N`` from `nuisance_scatter`, ``[d, d]``; without it ``C`` is the covariance alone.
        weight: ``w``, 0 to 1.
        shrinkage: this share of the mean eigenvalue is added to the diagonal.

    Returns:
        ``[d, d]``, lower triangular.

    Example:
        >>> whitening(jnp.eye(4)).shape
        (4, 4)
    """
    return whitening_matrix(covariance, nuisance, weight, shrinkage)


@jax.jit
def whitening_matrix(covariance: Array, nuisance: Array | None, weight: float, shrinkage: float) -> Array:
    """What `whitening` returns, in one compiled program."""
    hidden_size = covariance.shape[0]

    def normalised(matrix: Array) -> Array:
        return matrix / jnp.maximum(jnp.trace(matrix) / hidden_size, jnp.finfo(matrix.dtype).tiny)

    mixed = normalised(covariance)
    if nuisance is not None:
        mixed = (1 - weight) * mixed + weight * normalised(nuisance)
    eye = jnp.eye(hidden_size, dtype=mixed.dtype)
    mixed = normalised(mixed + shrinkage * eye)
    # With rows and columns in reverse the Cholesky factor of C is the upper U with U·Uᵀ = C, so U⁻ᵀ is the lower
    # factor of C⁻¹, which is never formed.
    upper = cholesky(mixed[::-1, ::-1])[::-1, ::-1]
    return solve_lower(upper.T, eye)


def create_memory(
    query: Float[Array, "rows d"],
    nuisance: Float[Array, "d d"] | None = None,
    *,
    weight: float = 0.8,
    shrinkage: float = 0.1,
) -> Memory:
    """A memory of unrelated queries with its statistics.

    Args:
        query: ``[rows, d]``.
        nuisance: from `nuisance_scatter`, ``[d, d]``, if known.
        weight: see `whitening`.
        shrinkage: see `whitening`.

    Returns:
        The `Memory`, float32.

    Raises:
        TPatchError: the queries are no such array, or a share is none.

    Example:
        >>> create_memory(jnp.eye(4)).answer.tolist()
        [-1, -1, -1, -1]
    """
    if getattr(query, "ndim", 0) != 2 or not len(query):
        has = f"an array {list(query.shape)}" if hasattr(query, "shape") else describe(query)
        raise TPatchError(f"the queries of a memory are {has}; give an array [rows, d] of one row or more")
    for name, value in (("weight", weight), ("shrinkage", shrinkage)):
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
            raise TPatchError(f"{name} is {describe(value)}; give a number from 0 to 1")
    mean, covariance = _kept_moments(query)
    whitener = whitening(covariance, nuisance, weight=weight, shrinkage=shrinkage)
    # From the host, where no program is compiled for a new number of rows.
    answer = jax.device_put(np.full(query.shape[0], NO_ANSWER, np.int32))
    return Memory(query.astype(jnp.float32), answer, mean, whitener)


def extend(
    memory: Memory, query: Any, answer: Int[Array | np.ndarray, " rows"] | None = None, size: int | None = None
) -> Memory:
    """The memory with more rows; mean and whitener stay those of unrelated text.

    Args:
        memory: the memory; not changed.
        query: ``[rows, d]``, an array or `tpatch_jax.storage.rows_on_disk.RowsOnDisk`; or several of these.
        answer: ``[rows]`` int, the token that each row is meant to be followed by, if it belongs to another edit.
        size: as if there were so many rows; those that are missing do not count. So a new number of rows need not
            compile anything anew.

    Example:
        >>> extend(create_memory(jnp.eye(4)), jnp.ones((2, 4))).query.shape
        (6, 4)
    """
    parts = query if isinstance(query, list | tuple) else [query]
    count, rows = sum(part.shape[0] for part in parts), memory.query.shape[0]
    missing = max(0, (size or 0) - count)
    # In front of the others: what is held out of a memory is taken from its end. On the host: it compiles nothing.
    extended = _aligned((missing + count + rows, memory.query.shape[1]))
    filled = missing
    for part in parts:
        for piece in pieces(part.shape[0]):
            extended[filled:][piece] = part[piece]
        filled += part.shape[0]
    extended[filled:] = memory.query
    answers = np.full(len(extended), NO_ANSWER, np.int32)
    answers[:missing], answers[missing + count :] = PADDING, memory.answer
    if answer is not None:
        answers[missing : missing + count] = answer
    return memory._replace(query=jax.device_put(extended), answer=jax.device_put(answers))


def _aligned(shape: tuple[int, int]) -> np.ndarray:
    """Zeros in float32 which lie where JAX takes them as they are, without a copy, on a CPU."""
    raw = np.zeros(shape[0] * shape[1] + ALIGNMENT, np.float32)
    skipped = -raw.ctypes.data % (4 * ALIGNMENT) // 4
    return raw[skipped : skipped + shape[0] * shape[1]].reshape(shape)


def counted(memory: Memory, target: Int[Array, ""]) -> Bool[Array, " rows"]:
    """Which rows a patch has to stay silent on, ``[rows]`` bool: all but padding and rows that want its own target.

    Args:
        memory: the memory.
        target: the patch's target token, a scalar int.

    Example:
        >>> counted(extend(create_memory(jnp.eye(2)), jnp.eye(2), jnp.array([5, 7])), jnp.array(5)).tolist()
        [False, True, True, True]
    """
    return (memory.answer != target) & (memory.answer != PADDING)


def hardest(
    key: Float[Array, " d"], target: Int[Array, ""], memory: Memory, count: int
) -> tuple[Int[Array, " count"], Bool[Array, " count"]]:
    """Memory rows on which a key responds strongly: the hardest row of each of ``count`` interleaved blocks.

    The hardest row of all is always among them. One reduction finds them, where an exact top-k would sort the memory.

    Args:
        key: ``[d]``.
        target: the lane's own target token, a scalar int; rows that want that very token do not count.
        memory: the memory.
        count: how many rows; all of them if there are no more.

    Returns:
        Row numbers ``[count]``, and whether each counts ``[count]``.

    Example:
        >>> rows, counts = hardest(jnp.ones(4), jnp.array(0), create_memory(jnp.eye(4)), 2)
        >>> rows.shape
        (2,)
    """
    score = jnp.where(counted(memory, target), memory.query @ key, -jnp.inf)
    total = score.shape[0]
    count = min(count, total)
    depth = -(-total // count)
    blocks = jnp.pad(score, (0, depth * count - total), constant_values=-jnp.inf).reshape(depth, count)
    best = jnp.argmax(blocks, 0)
    return best * count + jnp.arange(count), jnp.isfinite(jnp.max(blocks, 0))
