"""Patches that share one scale with the weights of a network: quantised per tensor, the largest weight sets it.

A sharp neuron's key is tens of times as large as any weight of the network. Where a matrix has a single INT8 scale, all
others are rounded away. Such a neuron needs no more than a part of its sharpness to stay silent on other text.
Activations that are rounded with one scale have outliers as well, and those are the network's own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpatch_jax.core import ffn
from tpatch_jax.core.patch import Patch
from tpatch_jax.typing import Params

__all__ = [
    "CLIP",
    "INT8",
    "FittedPatch",
    "choose_copies",
    "choose_scales",
    "fit_to_network",
    "merge_per_tensor",
    "split_neurons",
    "weight_excess",
]

CLIP = 0.5
"""A key's entries are cut at this share of its largest, where it is known what the neuron fires at. Few are that large,
so that half of the largest costs a key little of its margin, and leaves it twice as sharp within the same bounds.
"""


LEVELS = 127
"""Torch rounds activations to so many steps from the smallest to the largest of a tensor; onnxruntime to twice as many.
"""


SCALINGS = 500
"""So often a dimension is scaled at most; of a thousand few are far larger than all others."""

TINY = float(np.finfo(np.float32).tiny)

INT8 = 127
"""Weights are rounded to so many steps on either side of zero."""


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
    factors = np.maximum(1, np.abs(key).max(1, initial=0) / max(widest, TINY))
    key, bias, value = key / factors[:, None], bias / factors, value * factors[:, None]
    # A power of two, by which dividing costs no bit; smaller ones would leave firing neurons among the rounding.
    excess = np.maximum(1, np.abs(value).max(1, initial=0) / max(heaviest, TINY))
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


def choose_scales(
    kernels: Sequence[Float[np.ndarray, "inner outer"]],
    largest: Float[np.ndarray, "inner"],
    square: Float[np.ndarray, "inner"],
) -> Float[np.ndarray, "inner"]:
    """By what to divide what matrices read, and multiply their rows, so that rounding both with one scale costs least.

    ``x·W = (x/s)·(s∘W)``. Activations are rounded in steps of ``Δ = 2·max_j(a_j/s_j)/L`` and each matrix in steps of
    ``δ = max|s∘W|/127``, which changes the outputs by ``Σ_j s_j²‖w_j‖²·Δ²/12 + Σ_W m·δ²/12·Σ_j E x_j²/s_j²`` in the
    square, with ``m`` outputs each. Again and again the dimension that is largest in one of the two is halved there and
    doubled in the other, and of all that was tried the best is kept.

    Args:
        kernels: the matrices that read the same.
        largest: the largest absolute value of each dimension on text, ``a``.
        square: the mean square of each, ``E x²``.

    Returns:
        ``s``, powers of two, which change no bit of what is computed.

    Example:
        >>> choose_scales([np.ones((4, 8))], np.array([64.0, 1, 1, 1]), np.array([9.0, 1, 1, 1])).tolist()
        [8.0, 1.0, 1.0, 1.0]

    Source: the transformation is that of Xiao et al., "SmoothQuant", ICML 2023, equation 3; ``s`` is chosen otherwise.
    """
    norms = np.sum([np.square(kernel).sum(1) for kernel in kernels], 0)
    # Of each matrix the largest entry of a row, one row for each matrix.
    widest = np.stack([np.abs(kernel).max(1) for kernel in kernels])
    outputs = np.array([kernel.shape[1] for kernel in kernels])

    def error(scales: Float[np.ndarray, "inner"]) -> float:
        step = 2 * (largest / scales).max() / LEVELS
        steps = (widest * scales).max(1) / INT8
        return float(step**2 * (scales**2 @ norms) + (outputs @ steps**2) * np.sum(square / scales**2)) / 12

    scales = np.ones(len(largest))
    best, least = scales, error(scales)
    for _ in range(SCALINGS):
        wide = (widest * scales / np.maximum((widest * scales).max(1, keepdims=True), TINY)).max(0)
        tried = [scales.copy(), scales.copy()]
        tried[0][(largest / scales).argmax()] *= 2
        tried[1][wide.argmax()] /= 2
        errors = [error(each) for each in tried]
        scales = tried[int(np.argmin(errors))]
        if min(errors) < least:
            best, least = scales, min(errors)
        elif min(errors) > 4 * least:
            break
    return best


def choose_copies(
    params: Params, largest: Float[np.ndarray, "width"], square: Float[np.ndarray, "width"], room: int
) -> Int[np.ndarray, "width"]:
    """How many neurons share the hidden value of each, so that rounding all of them with one scale costs least.

    With ``k_j`` in the place of neuron ``j`` and a step of ``Δ = max_j(a_j/k_j)/L``, rounding changes what ``down``
    returns by ``Σ_j ‖w_j‖²·min(k_j²Δ²/12, E h_j²)`` in the square, for what is smaller than a step is lost. The neuron
    with the largest share gets one more again and again, and of all that was tried the best is kept.

    Args:
        params: the network's parameters.
        largest: the largest absolute hidden value of each neuron on text, ``a``.
        square: the mean square of each, ``E h²``.
        room: so many neurons can be added at most.

    Returns:
        How many each becomes, ``k``.

    Example:
        >>> params = {"down": {"kernel": jnp.ones((4, 2))}}
        >>> choose_copies(params, np.array([900.0, 1, 1, 1]), np.array([9.0, 1, 1, 1]), 64).tolist()
        [65, 1, 1, 1]
    """
    weight = np.sum(np.square(np.asarray(params["down"]["kernel"], np.float64)), 1)
    copies = np.ones(len(weight), np.int64)
    best, least = copies.copy(), np.inf
    for added in range(room + 1):
        step = (largest / copies).max(initial=0) / LEVELS
        error = float(weight @ np.minimum(np.square(copies * step) / 12, square))
        if error < least:
            best, least = copies.copy(), error
        if added < room and step:
            copies[(largest / copies).argmax()] += 1
    return best


def split_neurons(params: Params, copies: Int[np.ndarray, "width"]) -> Params:
    """A gated feed-forward network in which several neurons share the hidden value of one; its output stays.

    ``act(q·g)·(q·u)·w = Σ_i act(q·g)·(q·u_i)·w`` with ``Σ_i u_i = u``. A ``k``-th of ``u`` would itself be rounded
    away, so each ``u_i`` has whole steps of the scale that the matrix has in INT8, nearly equal numbers of them in each
    dimension, and the first has what is left.

    Args:
        params: the network's parameters; not changed.
        copies: how many neurons each becomes, ``k``; the first stands where it stood, the others behind all.

    Returns:
        New parameters of a network that is ``Σ(k - 1)`` neurons wider.

    Example:
        >>> entries = {name: {"kernel": jnp.ones((4, 2))} for name in ("gate", "up")}
        >>> wider = split_neurons({**entries, "down": {"kernel": jnp.ones((2, 4))}}, np.array([1, 4]))
        >>> wider["up"]["kernel"].shape, float(wider["up"]["kernel"][0, 1:].sum())
        ((4, 5), 1.0)

    Source: after Zhao et al., "Improving Neural Network Quantization without Retraining using Outlier Channel
    Splitting", ICML 2019, section 3, where copies are equal and stand for a channel that is read.
    """
    several = np.flatnonzero(copies > 1)
    if not len(several):
        return params
    up = np.asarray(params["up"]["kernel"], np.float64)
    sizes = np.abs(up).max(0, initial=0)
    step = (sizes / copies).max(initial=0) / INT8
    parts = {neuron: _in_steps(up[:, neuron], int(copies[neuron]), step) for neuron in several.tolist()}
    firsts, others = up.copy(), [parts[neuron][1:].T for neuron in several.tolist()]
    for neuron, part in parts.items():
        firsts[:, neuron] = part[0]
    places = np.concatenate([np.arange(len(copies)), np.repeat(np.arange(len(copies)), copies - 1)])
    gate, reader = ({part: array[..., places] for part, array in params[name].items()} for name in ("gate", "up"))
    reader["kernel"] = jnp.asarray(np.concatenate([firsts, *others], 1), params["up"]["kernel"].dtype)
    if "bias" in reader:
        reader["bias"] = reader["bias"] / jnp.asarray(copies[places], reader["bias"].dtype)
    down = {**params["down"], "kernel": params["down"]["kernel"][places]}
    return {**params, "gate": gate, "up": reader, "down": down}


def _in_steps(row: Float[np.ndarray, " d"], parts: int, step: float) -> Float[np.ndarray, "parts d"]:
    """A row as a sum of rows in whole steps, the first of which has what is smaller than a step besides."""
    whole = np.trunc(row / step)
    each, left = np.divmod(np.abs(whole).astype(np.int64), parts)
    # What does not come out even goes on with the part at which the dimension before stopped, so that none has more.
    begins = np.cumsum(left) - left
    more = (np.arange(parts)[:, None] - begins) % parts < left
    result = np.sign(whole) * (each + more) * step
    result[0] += row - whole * step
    return result


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
            own = max(float(weights[:keep].max(initial=0)), TINY)
            ratios.append(float(weights[keep:].max(initial=0)) / own)
    return max(ratios)
