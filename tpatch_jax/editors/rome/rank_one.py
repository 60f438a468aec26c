"""Changing what a feed-forward network says to some keys, and as little as possible of what it says to all others.

The algebra of ROME and MEMIT over bare parameter dicts: the keys are inputs of the down projection, and ``C``, their
uncentred second moment over general text, says which inputs are common and so have to stay as they are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpatch_jax.core.ffn import width
from tpatch_jax.core.positive import solve_positive
from tpatch_jax.errors import TPatchError
from tpatch_jax.typing import Params

__all__ = ["damped", "distribute_update", "rank_one"]


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
    return _with_kernel(params, _rank_one(params["down"], key, value, moment, key if at is None else at))


@jax.jit
def _rank_one(down: Params, key: Array, value: Array, moment: Array, at: Array) -> Array:
    key, value, at = (array.astype(jnp.float32) for array in (key, value, at))
    with jax.default_matmul_precision("highest"):
        direction = _solve(moment.astype(jnp.float32), key[:, None])[:, 0]
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
) -> Params:
    """A feed-forward network whose output for many keys moves by as many residuals: MEMIT's update of one layer.

    ``W + (λC + KᵀK)⁻¹·KᵀR`` for rows ``K`` and ``R``: the least squares solution that a larger ``λ`` keeps closer to
    what the network says to general text.

    Args:
        params: the network's parameters, kernels ``[in, out]``; not changed.
        keys: ``K``, ``[n, h]``.
        residuals: ``R``, ``[n, d]``.
        moment: ``C``, ``[h, h]``, positive definite; see `damped`.
        weight: ``λ``.

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
    if keys.ndim != 2 or residuals.shape[:-1] != keys.shape[:-1]:
        raise TPatchError(f"keys are {keys.shape} and residuals {residuals.shape}; give one row of each for an edit")
    return _with_kernel(params, _distributed(keys, residuals, moment, weight))


@jax.jit
def _distributed(keys: Array, residuals: Array, moment: Array, weight: float | Array) -> Array:
    keys, residuals = keys.astype(jnp.float32), residuals.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        return _solve(weight * moment.astype(jnp.float32) + keys.T @ keys, keys.T) @ residuals
