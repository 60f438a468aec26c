"""The four terms of the T-Patcher objective and their sum, as formulas over arrays.

``L = l_e + a·l_a + m·(l_m1 + l_m2)`` (Huang et al., ICLR 2023, section 4.2). Every function is for one patch; ``vmap``
them for many. ``z = q·k + b`` is the activation before the non-linearity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["Weights", "activation_loss", "edit_loss", "memory_limit_loss", "memory_margin_loss", "total_loss"]


class Weights(NamedTuple):
    """Weights and margins of the objective.

    Attributes:
        activation: ``a``, the weight of `activation_loss`.
        memory: ``m``, the weight of the two memory losses.
        limit: ``β``, where memory pre-activations should stay below.
        margin: ``γ``, how far they should stay below the edited query's.
        least_active: over how many of the edit's queries `activation_loss` averages.
        hardest: ``k``, over how many of the memory's queries the memory losses average.
        label_smoothing: ``ε`` of the edit loss.
        entropy: how much of the prediction's entropy is subtracted from the edit loss.

    Source: Huang et al. 2023, section 4.2 and appendix.
    """

    activation: float = 1.0
    memory: float = 10.0
    limit: float = -3.0
    margin: float = 3.0
    least_active: int = 5
    hardest: int = 1000
    label_smoothing: float = 0.0
    entropy: float = 0.0


def edit_loss(
    logits: Float[Array, "queries vocabulary"],
    target: Int[Array, "*queries"],
    label_smoothing: float = 0.0,
    entropy: float = 0.0,
) -> Float[Array, ""]:
    """``l_e``, the cross-entropy of the patched output on the edit target.

    ``l_e = -(1-ε)·log p(target) - ε·mean_v log p(v) - λ·H(p)``, averaged over the queries.

    Args:
        logits: ``[queries, vocabulary]``.
        target: token or label id, a scalar or ``[queries]`` int.
        label_smoothing: ``ε``, 0.1 in the paper's zsRE setting.
        entropy: ``λ``, 0.1 in the paper's FEVER setting.

    Returns:
        A scalar in nats.

    Source: Huang et al. 2023, section 4.2, equation for ``l_e``.

    Example:
        >>> round(float(edit_loss(jnp.zeros((1, 4)), jnp.array(2))), 4)
        1.3863
    """
    log_p = jax.nn.log_softmax(logits, -1)
    target = jnp.broadcast_to(target, log_p.shape[:-1])
    hit = jnp.take_along_axis(log_p, target[..., None], -1)[..., 0]
    loss = -(1 - label_smoothing) * hit - label_smoothing * jnp.mean(log_p, -1)
    if entropy:
        loss = loss + entropy * jnp.sum(jnp.exp(log_p) * log_p, -1)
    return jnp.mean(loss)


def activation_loss(z_edit: Float[Array, " queries"], least_active: int = 5) -> Float[Array, ""]:
    """``l_a``, the mean over the least active edit queries of ``exp(-z_e)``: the patch must fire on its mistake.

    Args:
        z_edit: pre-activations on the edit's queries, ``[queries]``.
        least_active: over how many of them to average.

    Returns:
        A scalar.

    Source: Huang et al. 2023, section 4.2, equation for ``l_a``.

    Example:
        >>> float(activation_loss(jnp.zeros(3)))
        1.0
    """
    count = min(least_active, z_edit.shape[0])
    return jnp.mean(jnp.exp(jax.lax.top_k(-z_edit, count)[0]))


def memory_limit_loss(z_memory: Float[Array, " memory"], limit: float = -3.0, hardest: int = 1000) -> Float[Array, ""]:
    """``l_m1``, the mean over the hardest memory queries of ``exp(z_m - β)``: the patch stays silent elsewhere.

    Args:
        z_memory: pre-activations on memory queries, ``[memory]``; ``-inf`` marks rows that do not count.
        limit: ``β``.
        hardest: ``k``, over how many to average.

    Returns:
        A scalar.

    Source: Huang et al. 2023, section 4.2, equation for ``l_m1``.

    Example:
        >>> float(memory_limit_loss(jnp.full(8, -3.0)))
        1.0
    """
    return _mean_exp(_hardest(z_memory, hardest), -limit)


def memory_margin_loss(
    z_memory: Float[Array, " memory"], z_edit: Float[Array, ""], margin: float = 3.0, hardest: int = 1000
) -> Float[Array, ""]:
    """``l_m2``, the mean over the hardest memory queries of ``exp(z_m - z_e + γ)``: memory stays below the edit.

    Args:
        z_memory: pre-activations on memory queries, ``[memory]``; ``-inf`` marks rows that do not count.
        z_edit: pre-activation on the edited query, a scalar.
        margin: ``γ``.
        hardest: ``k``, over how many to average.

    Returns:
        A scalar.

    Source: Huang et al. 2023, section 4.2, equation for ``l_m2``.

    Example:
        >>> float(memory_margin_loss(jnp.full(8, -3.0), jnp.array(0.0)))
        1.0
    """
    return _mean_exp(_hardest(z_memory, hardest), margin - z_edit)


def _hardest(z: Array, count: int) -> Array:
    return z if count >= z.shape[0] else jax.lax.top_k(z, count)[0]


def _mean_exp(z: Array, shift: Array | float) -> Array:
    """The mean of ``exp(z + shift)`` over the rows that count."""
    return jnp.sum(jnp.exp(z + shift)) / jnp.maximum(jnp.sum(z > -jnp.inf, dtype=z.dtype), 1)


def total_loss(
    loss_edit: Float[Array, ""], z_edit: Float[Array, " queries"], z_memory: Float[Array, " memory"], weights: Weights
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """``L = l_e + a·l_a + m·(l_m1 + l_m2)``.

    Args:
        loss_edit: ``l_e``, a scalar from `edit_loss`.
        z_edit: pre-activations on the edit's queries, ``[queries]``; their mean is the ``z_e`` of ``l_m2``.
        z_memory: pre-activations on memory queries, ``[memory]``.
        weights: weights and margins.

    Returns:
        The sum, and its four terms under ``l_e, l_a, l_m1, l_m2``.

    Source: Huang et al. 2023, section 4.2.

    Example:
        >>> loss, terms = total_loss(jnp.array(0.5), jnp.zeros(1), jnp.full(4, -3.0), Weights())
        >>> round(float(loss), 2)
        21.5
    """
    terms = {
        "l_e": loss_edit,
        "l_a": activation_loss(z_edit, weights.least_active),
        "l_m1": memory_limit_loss(z_memory, weights.limit, weights.hardest),
        "l_m2": memory_margin_loss(z_memory, jnp.mean(z_edit), weights.margin, weights.hardest),
    }
    return terms["l_e"] + weights.activation * terms["l_a"] + weights.memory * (terms["l_m1"] + terms["l_m2"]), terms
