"""Patches that share one scale with the weights of a network: quantised per tensor, the largest weight sets it.

A sharp neuron's key is tens of times as large as any weight of the network. Where a matrix has a single INT8 scale, all
others are rounded away. Such a neuron needs no more than a part of its sharpness to stay silent on other text.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpatch_jax.core import ffn
from tpatch_jax.core.patch import Patch
from tpatch_jax.typing import Params

__all__ = ["CLIP", "FittedPatch", "fit_to_network", "merge_per_tensor", "weight_excess"]

CLIP = 0.5
"""A key's entries are cut at this share of its largest, where it is known what the neuron fires at. Few are that large,
so that half of the largest costs a key little of its margin, and leaves it twice as sharp within the same bounds.
"""


class FittedPatch(NamedTuple):
    """Neurons none of whose weights is larger than the largest of a network's matrix that it joins.

    Attributes:
        patch: the neurons, ``act(q·k/f + b/f)·(v·f)``; of a network without a gate several may stand for one.
        shares: the constant in ``up`` of each, ``c``, in a gated network; the row in ``down`` is ``v·f/c``.
        factors: by what the sharpness of each was divided, ``f``.
    """

    patch: Patch
    shares: Float[Array, "neurons"]
    factors: Float[np.ndarray, "neurons"]


def fit_to_network(params: Params, patch: Patch, firing: Float[np.ndarray, "neurons hidden"] | None) -> FittedPatch:
    """Divide the sharpness of neurons so that none of their weights is larger than the network's largest.

    ``act(q·k + b)·v ≈ act((q·k + b)/f)·(v·f)``, where ``f`` is so large that no entry of ``k/f`` exceeds the largest of
    the network's keys. Before that the largest entries of a key are cut at half of the largest (`CLIP`), with a bias
    such that the neuron fires as strongly as before. What is ``f`` times as large in ``down`` is divided by the
    constant in ``up``, a bias, which is not quantised; without a gate several equal neurons take a part each.

    Args:
        params: the network's parameters.
        patch: ``n`` neurons.
        firing: an input at which each neuron fires, ``[n, d]``; NaN for a neuron of which none is known, whose key is
            not cut. ``None`` if none is known.

    Returns:
        The `FittedPatch`.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> fitted = fit_to_network(params, Patch(jnp.full((1, 4), 8.0), jnp.ones(1), jnp.ones((1, 4))), None)
        >>> float(fitted.patch.key.max()), fitted.factors.tolist(), fitted.patch.value.shape
        (1.0, [8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0], (8, 4))
    """
    reader = "gate" if "gate" in params else "up"
    widest, heaviest = (float(jnp.max(jnp.abs(params[name]["kernel"]))) for name in (reader, "down"))
    key, bias, value = (np.asarray(leaf, np.float64) for leaf in patch)
    if firing is not None:
        known = np.isfinite(firing).all(1, keepdims=True)
        bound = np.where(known, CLIP * np.abs(key).max(1, keepdims=True, initial=0), np.inf)
        cut = np.clip(key, -bound, bound)
        bias = bias + np.sum((key - cut) * np.where(known, firing, 0), 1)
        key = cut
    factors = np.maximum(1, np.abs(key).max(1, initial=0) / max(widest, np.finfo(np.float32).tiny))
    key, bias, value = key / factors[:, None], bias / factors, value * factors[:, None]
    # A power of two, by which dividing costs no bit; smaller ones would leave firing neurons among the rounding.
    excess = np.maximum(1, np.abs(value).max(1, initial=0) / max(heaviest, np.finfo(np.float32).tiny))
    shares = np.exp2(np.ceil(np.log2(excess)))
    if reader == "up":
        copies = np.ceil(excess).astype(int)
        key, bias, value = (np.repeat(each, copies, 0) for each in (key, bias, value / np.expand_dims(copies, 1)))
        factors, shares = np.repeat(factors, copies), np.ones(copies.sum())
    dtypes = [leaf.dtype for leaf in patch]
    fitted = Patch(*(jnp.asarray(leaf, dtype) for leaf, dtype in zip((key, bias, value), dtypes, strict=True)))
    return FittedPatch(fitted, jnp.asarray(shares, patch.value.dtype), factors)


def merge_per_tensor(params: Params, patch: Patch, firing: Float[np.ndarray, "neurons hidden"] | None) -> Params:
    """Put a patch inside a feed-forward network such that one scale for each matrix suits both.

    Args:
        params: the network's parameters; not changed.
        patch: ``n`` neurons.
        firing: as for `fit_to_network`.

    Returns:
        New parameters of a network that is wider; `tpatch_jax.core.ffn.unmerge` gives other neurons than these back.
    """
    fitted = fit_to_network(params, patch, firing)
    return ffn.merge(params, fitted.patch, fitted.shares if "gate" in params else None)


def weight_excess(params: Params, neurons: int) -> float:
    """How many times as large as a network's own largest weight the largest of its merged neurons is.

    Args:
        params: the parameters of a network.
        neurons: how many were merged.

    Returns:
        The largest ratio of its matrices; 1 or less is safe where a matrix has one scale.

    Example:
        >>> up, down = jnp.ones((4, 16)).at[:, 15].set(40.0), jnp.ones((16, 4))
        >>> weight_excess({"up": {"kernel": up}, "down": {"kernel": down}}, 1)
        40.0
    """
    keep = ffn.width(params) - neurons
    ratios = [0.0]
    for name in ("gate", "up", "down"):
        if name in params and neurons:
            weights = np.abs(np.asarray(params[name]["kernel"], np.float32))
            weights = weights if name == "down" else weights.T
            own = max(float(weights[:keep].max(initial=0)), float(np.finfo(np.float32).tiny))
            ratios.append(float(weights[keep:].max(initial=0)) / own)
    return max(ratios)
