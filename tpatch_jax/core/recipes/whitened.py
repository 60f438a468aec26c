"""A key in closed form, for sites whose queries say plainly what they are about, such as a subject's last token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpatch_jax.core.memory import Memory, counted
from tpatch_jax.core.recipes.staged import Recognised

__all__ = ["whitened_key"]

HARD = 16
"""A key turns away from so many of its hardest negatives at a time."""

ALIKE = 0.3
"""A negative is hard above this response, where 1 is that of the edit's own queries, and should respond no more."""

HIGHEST = 0.9
"""What a key turns away from raises its threshold to this much of what its own queries say at most."""

RIDGE = 0.06
"""How much of its response an own query may lack for a shorter key: this over its square length."""


class _Wanted(NamedTuple):
    """Whitened rows, what a key should say of each, and how little that matters; rows of zeros count for nothing."""

    rows: Float[Array, "rows d"]
    response: Float[Array, " rows"]
    slack: Float[Array, " rows"]


def _wanted(rows: Array, response: Array | float, slack: Array | float) -> _Wanted:
    return _Wanted(
        rows, *(jnp.broadcast_to(jnp.asarray(part, rows.dtype), rows.shape[:1]) for part in (response, slack))
    )


def _scaled(rows: Float[Array, "rows d"], weight: Array | float, total: Array) -> Float[Array, "rows d"]:
    """Rows whose second moment has the trace ``weight · d``."""
    return rows * jnp.sqrt(weight * rows.shape[1] / jnp.maximum(total, 1e-12))


def _direction(wanted: _Wanted, own: Float[Array, "contexts d"]) -> Float[Array, " d"]:
    """``argmin_k ‖k‖² + Σ (x·k - y)²/s`` of all rows, scaled so that the mean response of ``own`` is 1."""
    rows, response, slack = wanted
    key = rows.T @ jnp.linalg.solve(rows @ rows.T + jnp.diag(slack), response)
    return key / jnp.maximum(jnp.mean(own @ key), jnp.finfo(own.dtype).tiny)


def whitened_key(
    query: Float[Array, "contexts d"],
    group: Int[Array, ""],
    memory: Memory,
    floor: float | Float[Array, ""],
    split: float | Float[Array, ""],
    avoid: Float[Array, "rows d"] | None = None,
    avoidance: float | Float[Array, ""] = 0.0,
    rounds: int = 0,
    avoid_split: float | Float[Array, ""] = 0.0,
) -> Recognised:
    """The shortest key, measured where ``C`` is the identity, that says 1 of the edit's own queries.

    ``argmin_k ‖k‖² + Σ_i (k·q_i - 1)²/s`` in whitened coordinates about ``μ``; of one query that is ``C⁻¹(q − μ)``.
    Their mean would make a key that knows most of them well and the bare prompt too little, where its subject stands
    at the start of the text: queries look otherwise there than behind other words.

    In units in which ``z(μ) = 0`` and the mean of the edit's own queries is 1, the threshold is the larger of ``floor``
    and ``h + split·(ℓ − h)``, where ``h`` is the hardest negative and ``ℓ`` the lesser of the bare prompt and the mean
    of its contexts. The key is then scaled so that ``z = 0`` at the threshold and ``z = 1`` at ``ℓ``.

    With ``avoid``, ``C`` is joined by ``w·d·A/tr A`` of their second moment ``A`` about ``μ``, measured where ``C`` is
    the identity: such a key turns away from what they have in common with the edit's own queries. With ``avoid_split``
    the threshold is also at least ``a + avoid_split·(ℓ − a)``, where ``a`` is the most that one of them says, or
    ``0.9·ℓ`` if that is less. In each of ``rounds`` the negatives that are hardest then, and much like the edit's own
    queries, join those that the key is fitted on.

    Args:
        query: the edit's own queries, the bare prompt first, ``[contexts, d]``.
        group: memory rows with this answer are no negatives, a scalar int.
        memory: queries on which the key stays silent, their mean and whitener.
        floor: the lowest threshold, 0 to 1.
        split: where between hardest negative and own queries the threshold lies, 0 to 1.
        avoid: queries that are much like the edit's own and still none of them, ``[rows, d]``; a row of ``μ`` counts
            for nothing.
        avoidance: ``w`` of `avoid`.
        rounds: so often the hardest negatives are looked for.
        avoid_split: where between the loudest of `avoid` and own queries the threshold lies at least, 0 to 1; at 0 they
            say nothing about the threshold.

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
    slack = RIDGE * jnp.mean(jnp.sum(jnp.square(own_query), 1))
    parts = [_wanted(own_query, 1.0, slack)]
    rows = None if avoid is None else (avoid - mean) @ whitener
    if rows is not None:
        parts.append(_wanted(_scaled(rows, avoidance, jnp.sum(jnp.square(rows))), 0.0, 1.0))
    foreign = counted(memory, group)

    def responses(direction: Array) -> Array:
        return jnp.where(foreign, (memory.query - mean) @ (whitener @ direction), -jnp.inf)

    count = min(HARD, len(foreign))
    begin = sum(len(part.rows) for part in parts)
    parts.append(_wanted(jnp.zeros((count * rounds, own_query.shape[1]), own_query.dtype), 0.0, slack))

    def turn_away(number: Array, wanted: _Wanted) -> _Wanted:
        alike, index = jax.lax.top_k(responses(_direction(wanted, own_query)), count)
        hard, place = alike > ALIKE, begin + number * count
        rows = jnp.where(hard[:, None], (memory.query[index] - mean) @ whitener, 0.0)
        # One that is hard again stands there twice, and so counts for more.
        return wanted._replace(
            rows=jax.lax.dynamic_update_slice(wanted.rows, rows, (place, jnp.zeros_like(place))),
            response=jax.lax.dynamic_update_slice(
                wanted.response, jnp.where(hard, ALIKE, 0.0).astype(rows.dtype), (place,)
            ),
        )

    wanted = _Wanted(*(jnp.concatenate(part) for part in zip(*parts, strict=True)))
    wanted = jax.lax.fori_loop(0, rounds, turn_away, wanted) if rounds else wanted
    direction = _direction(wanted, own_query)
    key = whitener @ direction
    z = own_query @ direction
    hard = jnp.max(responses(direction), initial=0.0)
    least = jnp.minimum(z[0], jnp.mean(z))
    threshold = jnp.maximum(floor, hard + split * (least - hard))
    if rows is not None:
        loudest = jnp.max(rows @ direction)
        above = jnp.minimum(loudest + avoid_split * (least - loudest), HIGHEST * least)
        threshold = jnp.where(jnp.asarray(avoid_split) > 0, jnp.maximum(threshold, above), threshold)
    unit = least - threshold
    scale = 1 / jnp.where(unit > 0, unit, 1.0)
    key, bias = key * scale, -threshold * scale - (mean @ key) * scale
    activation = jnp.mean(jnp.exp(-(query @ key + bias)))
    margin = jnp.where(unit > 0, jnp.min(z) - hard, jnp.minimum(unit, least - hard))
    return Recognised(key, bias, margin, {"l_a": activation, "l_m1": jnp.zeros(()), "l_m2": jnp.zeros(())})
