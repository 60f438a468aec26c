"""A key in closed form, for sites whose queries say plainly what they are about, such as a subject's last token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpatch_jax.core.memory import Memory, counted
from tpatch_jax.core.recipes.staged import Recognised

__all__ = ["whitened_key"]

HARD = 8
"""A key turns away from so many of its hardest negatives at most."""

ALIKE = 0.35
"""A negative is hard above this response, where 1 is that of the edit's own queries."""


def _scaled(rows: Float[Array, "rows d"], weight: Array | float, total: Array) -> Float[Array, "rows d"]:
    """Rows whose second moment has the trace ``weight · d``."""
    return rows * jnp.sqrt(weight * rows.shape[1] / jnp.maximum(total, 1e-12))


def _direction(centre: Float[Array, " d"], away: Float[Array, "rows d"]) -> Float[Array, " d"]:
    """``(I + AᵀA)⁻¹ c``, of which ``c`` says 1."""
    direction = centre - away.T @ jnp.linalg.solve(jnp.eye(len(away), dtype=away.dtype) + away @ away.T, away @ centre)
    return direction / jnp.maximum(direction @ centre, jnp.finfo(centre.dtype).tiny)


def whitened_key(
    query: Float[Array, "contexts d"],
    group: Int[Array, ""],
    memory: Memory,
    floor: float | Float[Array, ""],
    split: float | Float[Array, ""],
    avoid: Float[Array, "rows d"] | None = None,
    avoidance: float | Float[Array, ""] = 0.0,
    contrast: float = 0.0,
) -> Recognised:
    """The key ``C⁻¹(q̄ − μ)`` with a threshold between the hardest negative and the edit's own queries.

    In units in which ``z(μ) = 0`` and ``z(q̄) = 1``, the threshold is the larger of ``floor`` and
    ``h + split·(ℓ − h)``, where ``h`` is the hardest negative and ``ℓ`` the lesser of the bare prompt and the mean of
    its contexts. The key is then scaled so that ``z = 0`` at the threshold and ``z = 1`` at ``ℓ``.

    With ``avoid``, ``C`` is joined by ``w·d·A/tr A`` of their second moment ``A`` about ``μ``, measured where ``C`` is
    the identity: such a key turns away from what they have in common with the edit's own queries. With ``contrast``,
    it is then joined in the same way by the hardest negatives, if any are much like the edit's own queries.

    Args:
        query: the edit's own queries, the bare prompt first, ``[contexts, d]``.
        group: memory rows with this answer are no negatives, a scalar int.
        memory: queries on which the key stays silent, their mean and whitener.
        floor: the lowest threshold, 0 to 1.
        split: where between hardest negative and own queries the threshold lies, 0 to 1.
        avoid: queries that are much like the edit's own and still none of them, ``[rows, d]``; a row of ``μ`` counts
            for nothing.
        avoidance: ``w`` of `avoid`.
        contrast: ``w`` of the hardest negatives.

    Returns:
        A `Recognised`; with a negative margin where the two cannot be parted, and then of no use.

    Example:
        >>> from tpatch_jax.core.memory import create_memory
        >>> memory = create_memory(jax.random.normal(jax.random.key(0), (64, 8)))
        >>> recognised = whitened_key(5 * jnp.ones((1, 8)), jnp.array(0), memory, 0.6, 0.5)
        >>> bool(recognised.margin > 0)
        True

    Source: Meng et al. 2022, section 3.1, for the whitened key; the threshold and what it turns away from are this
    library's.
    """
    whitener, mean = memory.whitener, memory.mean
    own_query = (query - mean) @ whitener
    centre = jnp.mean(own_query, 0)
    away = jnp.zeros((0, own_query.shape[1]), own_query.dtype)
    if avoid is not None:
        rows = (avoid - mean) @ whitener
        away = _scaled(rows, avoidance, jnp.sum(jnp.square(rows)))
    direction = _direction(centre, away)
    foreign = counted(memory, group)
    responses = jnp.where(foreign, (memory.query - mean) @ (whitener @ direction), -jnp.inf)
    if contrast:
        alike, index = jax.lax.top_k(responses, min(HARD, len(responses)))
        rows = jnp.where(alike[:, None] > ALIKE, (memory.query[index] - mean) @ whitener, 0.0)
        away = jnp.concatenate([away, _scaled(rows, contrast, jnp.sum(jnp.square(rows)))])
        direction = _direction(centre, away)
        responses = jnp.where(foreign, (memory.query - mean) @ (whitener @ direction), -jnp.inf)
    key = whitener @ direction
    z = own_query @ direction
    hard = jnp.max(responses, initial=0.0)
    least = jnp.minimum(z[0], jnp.mean(z))
    threshold = jnp.maximum(floor, hard + split * (least - hard))
    unit = least - threshold
    scale = 1 / jnp.where(unit > 0, unit, 1.0)
    key, bias = key * scale, -threshold * scale - (mean @ key) * scale
    activation = jnp.mean(jnp.exp(-(query @ key + bias)))
    margin = jnp.where(unit > 0, jnp.min(z) - hard, jnp.minimum(unit, least - hard))
    return Recognised(key, bias, margin, {"l_a": activation, "l_m1": jnp.zeros(()), "l_m2": jnp.zeros(())})
