"""What the patches of a foreign network are fitted on, and where their values start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from tpatch_jax.core.fit import FitProblem
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.positive import solve_positive
from tpatch_jax.models.foreign.collection import TokenSites
from tpatch_jax.models.foreign.network import Network, added

__all__ = ["create_problems", "output_moment"]


def create_problems(
    network: Network,
    sites: TokenSites,
    chosen: np.ndarray,
    targets: Array,
    patch: Patch,
    finish: Partial,
    moment: Array,
) -> FitProblem:
    """What each patch is fitted on: rows ``chosen [lanes, contexts]`` of the sites, with the patch so far active."""
    act = network.activation
    query, context = sites.query[chosen], jax.tree.map(lambda leaf: leaf[chosen], sites.context)
    output = added(patch, query, sites.output[chosen], act)
    if not network.pointwise:
        context["output"] = added(patch, context.pop("query"), context["output"], act)
    # Beside the FFN's output stands the residual stream; their lengths say what a strong value is.
    strength = jnp.linalg.norm(output.astype(jnp.float32), axis=-1)
    for name in network.halves.context:
        beside = context[name]
        if beside.shape[-1] == network.hidden_size and beside.ndim == 4:
            at = jnp.zeros(chosen.shape, int) if network.pointwise else context["position"]
            beside = jnp.take_along_axis(beside, at[..., None, None], 2)[:, :, 0]
            strength = strength + jnp.linalg.norm(beside.astype(jnp.float32), axis=-1)
    first = jax.tree.map(lambda leaf: leaf[:, 0], (context, output))
    return FitProblem(
        query.astype(jnp.float32),
        output.astype(jnp.float32),
        jnp.zeros((len(chosen), 0, network.hidden_size)),
        context,
        targets,
        _directions(finish, moment, *first, targets),
        jnp.mean(strength, -1),
    )


def _logits(finish: Partial, output: Array, context: Any) -> Array:
    """The rest of the network for one position: ``[d]`` to ``[vocabulary]``, float32."""
    return finish(jax.tree.map(lambda leaf: leaf[None], context), output[None])[0].astype(jnp.float32)


@jax.jit
def output_moment(finish: Partial, sites: TokenSites) -> Array:
    """``M``, the mean of ``JᵀJ/V`` over a few positions, with ``J = ∂logits/∂output``: ``[d, d]``, regularised."""

    def one(place: tuple[Array, Any]) -> Array:
        jacobian = jax.jacfwd(lambda output: _logits(finish, output, place[1]))(place[0])
        return jacobian.T @ jacobian / jacobian.shape[0]

    mean = jnp.mean(jax.lax.map(one, (sites.output.astype(jnp.float32), sites.context)), 0)
    return mean + 0.01 * jnp.trace(mean) / mean.shape[0] * jnp.eye(mean.shape[0])


@jax.jit
def _directions(finish: Partial, moment: Array, context: Any, output: Array, targets: Array) -> Array:
    """Where each target's value starts: the direction that raises its logit most against all others, ``[lanes, d]``.

    It is ``M⁻¹·∂logit/∂output``, which for a linear rest of the network is ``M⁻¹·u``, with ``u`` the unembedding row.
    """
    gradient = jax.vmap(jax.grad(lambda output, context, target: _logits(finish, output, context)[target]))
    return solve_positive(moment, gradient(output.astype(jnp.float32), context, targets).T).T
