"""Changing what a feed-forward network says to some keys, and as little as possible of what it says to all others.

The algebra of ROME and MEMIT over bare parameter dicts: the keys are inputs of the down projection, and ``C``, their
uncentred second moment over general text, says which inputs are common and so have to stay as they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpatch_jax.core.ffn import width
from tpatch_jax.core.positive import solve_positive
from tpatch_jax.errors import TPatchError
from tpatch_jax.typing import Params

__all__ = [
    "damped",
    "distribute_update",
    "null_projection",
    "project_update",
    "rank_one",
    "solve_distributed",
    "solve_projected",
    "solve_rank_one",
]


@jax.jit
def damped(
    moment: Float[Array, "hidden_neurons hidden_neurons"], ridge: float | Float[Array, ""]
) -> Float[Array, "hidden_neurons hidden_neurons"]:
    """``C + r·mean(diag C)·I``: a second moment of few texts that can be inverted.

    Args:
        moment: ``C``, ``[h, h]``.
        ridge: ``r``; 0 leaves it as it is.

    Returns:
        ``[h, h]``, float32.

    Example:
        >>> damped(jnp.diag(jnp.array([1.0, 3.0])), 0.5).tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    moment = moment.astype(jnp.float32)
    return moment + ridge * jnp.mean(jnp.diag(moment)) * jnp.eye(moment.shape[0], dtype=jnp.float32)


def null_projection(
    moment: Float[Array, "hidden_neurons hidden_neurons"], threshold: float
) -> Float[Array, "hidden_neurons hidden_neurons"]:
    """``P``, the projection on the directions that keys of general text hardly have: AlphaEdit's null space.

    ``P = UUᵀ`` of the eigenvectors ``U`` of ``C`` whose eigenvalues, the mean squares of a key along them, are below a
    threshold. An update ``Δ = PΔ`` changes nothing that is said to keys without a part there.

    Args:
        moment: ``C``, ``[h, h]``, not damped.
        threshold: in the units of ``C``.

    Returns:
        ``[h, h]``, float32; zero where no eigenvalue is below the threshold.

    Source: Fang et al. 2025, section 3, and the authors' published code for the threshold.

    Example:
        >>> null_projection(jnp.diag(jnp.array([1.0, 1e-3])), 0.02).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    # In float64, for what is cut off may be a millionth of what is kept.
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    small = vectors[:, values < threshold]
    return jnp.asarray(small @ small.T, jnp.float32)


def _solve(matrix: Array, columns: Array) -> Array:
    """A symmetric positive system, its unknowns scaled alike first: neurons differ much in how loud they are."""
    scale = jax.lax.rsqrt(jnp.maximum(jnp.diag(matrix), jnp.finfo(jnp.float32).tiny))
    return scale[:, None] * solve_positive(matrix * scale[:, None] * scale, scale[:, None] * columns)


def _check(params: Params, keys: Array, values: Array, moment: Array) -> None:
    inner, outer = width(params), params["down"]["kernel"].shape[1]
    if keys.shape[-1] != inner or moment.shape != (inner, inner):
        raise TPatchError(
            f"the network has {inner} hidden neurons, the key {keys.shape[-1]}, the second moment {moment.shape}: "
            "collect both at the layer that is edited"
        )
    if values.shape[-1] != outer:
        raise TPatchError(f"the network's output is {outer} wide and the value {values.shape[-1]}: not of this layer")


def _with_kernel(params: Params, added: Array) -> Params:
    kernel = params["down"]["kernel"]
    changed = (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
    return {**params, "down": {**params["down"], "kernel": changed}}


def rank_one(
    params: Params,
    key: Float[Array, " hidden_neurons"],
    value: Float[Array, " d"],
    moment: Float[Array, "hidden_neurons hidden_neurons"],
    *,
    at: Float[Array, " hidden_neurons"] | None = None,
    projection: Float[Array, "hidden_neurons hidden_neurons"] | None = None,
) -> Params:
    """A feed-forward network that says a value to a key: ROME's update.

    ``W + u·rᵀ`` with ``u = C⁻¹k* / ‖C⁻¹k*‖`` and ``r = (v* - W(k)) / (k·u)``, where ``W(k)`` is the down projection of
    ``k``, its bias included. Afterwards ``W(k) = v*``; an input ``x`` changes by ``(x·u)·r``, so that one with
    ``xᵀC⁻¹k* = 0`` does not change at all. ``k = k*`` is R-ROME; ROME itself takes for ``k`` the key of the bare
    prompt, which ``k*``, a mean over contexts, is not.

    Args:
        params: the network's parameters, kernels ``[in, out]``; not changed.
        key: ``k*``, ``[h]``.
        value: ``v*``, ``[d]``.
        moment: ``C``, ``[h, h]``, positive definite; see `damped`.
        at: ``k``, ``[h]``; ``k*`` by default.
        projection: ``P``, from `null_projection` of the same ``C``: then ``u`` is along ``P·C⁻¹k*``, which is ROME's
            least squares solution among the updates that change nothing outside of the null space.

    Returns:
        New parameters that share all arrays but the kernel of ``down``.

    Raises:
        TPatchError: shapes that do not belong to one network.

    Source: Meng et al. 2022, equation 2 and appendix; Gupta et al. 2024 for ``k = k*``.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((2, 3))}, "down": {"kernel": jnp.ones((3, 2))}}
        >>> after = rank_one(params, jnp.array([1.0, 0.0, 0.0]), jnp.array([5.0, 7.0]), jnp.eye(3))
        >>> after["down"]["kernel"].tolist()
        [[5.0, 7.0], [1.0, 1.0], [1.0, 1.0]]
    """
    _check(params, key, value, moment)
    at = key if at is None else at
    return _with_kernel(params, solve_rank_one(params["down"], key, value, moment, at, projection))


@jax.jit
def solve_rank_one(down: Params, key: Array, value: Array, moment: Array, at: Array, projection: Array | None) -> Array:
    """The down projection after `rank_one`, in one compiled program."""
    key, value, at = (array.astype(jnp.float32) for array in (key, value, at))
    with jax.default_matmul_precision("highest"):
        direction = _solve(moment.astype(jnp.float32), key[:, None])[:, 0]
        direction = direction if projection is None else projection @ direction
        direction = direction / jnp.linalg.norm(direction)
        said = at @ down["kernel"].astype(jnp.float32)
        said = said + down["bias"].astype(jnp.float32) if "bias" in down else said
        return jnp.outer(direction, (value - said) / (at @ direction))


def distribute_update(
    params: Params,
    keys: Float[Array, "edits hidden_neurons"],
    residuals: Float[Array, "edits d"],
    moment: Float[Array, "hidden_neurons hidden_neurons"],
    weight: float | Float[Array, ""],
    earlier: Float[Array, "hidden_neurons hidden_neurons"] | None = None,
) -> Params:
    """A feed-forward network whose output for many keys moves by as many residuals: MEMIT's update of one layer.

    ``W + (λC + KᵀK)⁻¹·KᵀR`` for rows ``K`` and ``R``: the least squares solution that a larger ``λ`` keeps closer to
    what the network says to general text. With the keys ``E = K₁ᵀK₁`` of earlier updates ``W + (λC + E + KᵀK)⁻¹·KᵀR``:
    the difference of two solutions made at one time, that of all edits so far and that of the earlier ones alone.

    Args:
        params: the network's parameters, kernels ``[in, out]``; not changed.
        keys: ``K``, ``[n, h]``.
        residuals: ``R``, ``[n, d]``.
        moment: ``C``, ``[h, h]``, positive definite; see `damped`.
        weight: ``λ``.
        earlier: ``E``, ``[h, h]``; none by default.

    Returns:
        New parameters that share all arrays but the kernel of ``down``.

    Raises:
        TPatchError: shapes that do not belong to one network, or not as many residuals as keys.

    Source: Meng et al. 2023, equation 14.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((2, 3))}, "down": {"kernel": jnp.zeros((3, 2))}}
        >>> after = distribute_update(params, jnp.eye(3)[:1], jnp.array([[2.0, 4.0]]), jnp.eye(3), 1.0)
        >>> after["down"]["kernel"].round(3).tolist()
        [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    """
    _check(params, keys, residuals, moment)
    _check_rows(keys, residuals)
    return _with_kernel(params, solve_distributed(keys, residuals, moment, weight, earlier))


def _check_rows(keys: Array, residuals: Array) -> None:
    if keys.ndim != 2 or residuals.shape[:-1] != keys.shape[:-1]:
        raise TPatchError(f"keys are {keys.shape} and residuals {residuals.shape}; give one row of each for an edit")


@jax.jit
def solve_distributed(
    keys: Array, residuals: Array, moment: Array, weight: float | Array, earlier: Array | None
) -> Array:
    """What `distribute_update` adds to a down projection, in one compiled program."""
    keys, residuals = keys.astype(jnp.float32), residuals.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        matrix = weight * moment.astype(jnp.float32) + keys.T @ keys
        return _solve(matrix if earlier is None else matrix + earlier, keys.T) @ residuals


def project_update(
    params: Params,
    keys: Float[Array, "edits hidden_neurons"],
    residuals: Float[Array, "edits d"],
    projection: Float[Array, "hidden_neurons hidden_neurons"],
    weight: float | Float[Array, ""],
    earlier: Float[Array, "hidden_neurons hidden_neurons"] | None = None,
) -> Params:
    """A feed-forward network whose output for many keys moves, while preserved keys stay: AlphaEdit's update.

    ``W + (P(KᵀK + E) + λI)⁻¹·PKᵀR``, whose rows lie in the null space that ``P`` projects on, so that what is said to a
    key ``x`` with ``Px = 0`` does not change. With ``P = I`` it is MEMIT's with ``C = I``; see `distribute_update`.

    Args:
        params: the network's parameters, kernels ``[in, out]``; not changed.
        keys: ``K``, ``[n, h]``.
        residuals: ``R``, ``[n, d]``.
        projection: ``P``, ``[h, h]``; see `null_projection`.
        weight: ``λ``, by which the update is kept small.
        earlier: ``E = K₁ᵀK₁`` of the keys that earlier updates wrote, ``[h, h]``; none by default.

    Returns:
        New parameters that share all arrays but the kernel of ``down``.

    Raises:
        TPatchError: shapes that do not belong to one network, or not as many residuals as keys.

    Source: Fang et al. 2025, section 3, and the authors' published code for ``λ``.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((2, 3))}, "down": {"kernel": jnp.zeros((3, 2))}}
        >>> key, free = jnp.array([[1.0, 1.0, 0.0]]), jnp.diag(jnp.array([1.0, 0.0, 0.0]))
        >>> after = project_update(params, key, jnp.array([[2.0, 4.0]]), free, 1.0)
        >>> after["down"]["kernel"].round(3).tolist()
        [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    """
    _check(params, keys, residuals, projection)
    _check_rows(keys, residuals)
    return _with_kernel(params, solve_projected(keys, residuals, projection, weight, earlier))


@jax.jit
def solve_projected(
    keys: Array, residuals: Array, projection: Array, weight: float | Array, earlier: Array | None
) -> Array:
    """What `project_update` adds to a down projection, in one compiled program."""
    keys, residuals = keys.astype(jnp.float32), residuals.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        inside = keys @ projection
        matrix = inside.T @ inside + weight * jnp.eye(keys.shape[1], dtype=jnp.float32)
        # An update PX solves the same system with P on both sides, where it is symmetric and positive.
        matrix = matrix if earlier is None else matrix + projection @ earlier @ projection
        # Projected once more, for rounding leaves the null space.
        return projection @ (_solve(matrix, inside.T) @ residuals)
