"""How a patch joins a feed-forward network: beside it (`attach`) or inside its parameters (`merge`), and out again.

A feed-forward network is a plain nested dict. Its kind is read off its entries:

=============  ==============================================================
two matrices   ``{"up": {"kernel", "bias"?}, "down": {"kernel", "bias"?}}``
gated          the same with ``"gate": {"kernel", "bias"?}``
=============  ==============================================================

Kernels are ``[in, out]``. A patch that is attached stands beside them as ``"patch"`` (the network's own activation) or
``"relu_patch"`` (ReLU, whose silent neurons contribute exactly nothing). Anything else that joins the network stands
there as its ``"adapter"`` (`tpatch_jax.core.adapters`), which has the last word on the output.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from tpatch_jax.core.adapters import Adapter
from tpatch_jax.core.int8 import is_int8, plain
from tpatch_jax.core.patch import Patch, concatenate, contribution, product
from tpatch_jax.errors import TPatchError
from tpatch_jax.typing import Activation, Params

__all__ = [
    "ACTIVATIONS",
    "any_attached",
    "apply",
    "attach",
    "attach_adapter",
    "attached",
    "detach",
    "hidden",
    "merge",
    "merge_in_place",
    "merge_without_bias",
    "neuron_shares",
    "unmerge",
    "width",
]

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""The activations that feed-forward networks use, by name."""

SHARES = {16.0: 0.25, 4.0: 0.5}
"""By how much a neuron's largest weight in ``gate`` has to exceed that of its value for its share to be smaller than
one; see `neuron_shares`. A sixteenth would suit INT8 activations still better, and makes values the largest weights of
``down``, whose scales of four or eight bits they then set.
"""

_BESIDE = ("patch", "relu_patch")
_ADAPTER = "adapter"


def width(params: Params) -> int:
    """How many hidden neurons a feed-forward network has, merged patches included.

    Args:
        params: the network's parameters.

    Example:
        >>> width({"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}})
        16
    """
    return params["down"]["kernel"].shape[0]


def _linear(params: Params, x: Float[Array, "*rows inner"]) -> Float[Array, "*rows outer"]:
    y = product(x, plain(params["kernel"]).astype(x.dtype))
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def hidden(params: Params, query: Float[Array, "*rows hidden"], activation: str) -> Float[Array, "*rows width"]:
    """The hidden neurons of a feed-forward network: what ``down`` reads.

    ``act(q·K + b_k)`` with two matrices, ``act(q·G + b_g) ∘ (q·U + b_u)`` when gated.

    Args:
        params: the network's parameters.
        query: its input, ``[..., d]``.
        activation: name in `ACTIVATIONS`.

    Returns:
        ``[..., width]``; attached patches are not among them.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> hidden(params, jnp.ones((2, 4)), "relu").shape
        (2, 16)
    """
    act = ACTIVATIONS[activation]
    if "gate" in params:
        return act(_linear(params["gate"], query)) * _linear(params["up"], query)
    return act(_linear(params["up"], query))


def apply(
    params: Params,
    query: Float[Array, "*rows hidden"],
    activation: str,
    beside: Float[Array, "*rows hidden"] | None = None,
) -> Float[Array, "*rows hidden"]:
    """Run a feed-forward network, with whatever patch or adapter is attached to it.

    ``act(q·K + b_k)·V + b_v`` with two matrices, ``(act(q·G + b_g) ∘ (q·U + b_u))·V + b_v`` when gated; an attached
    patch adds ``Σ act(q·k + b)·v``, and what an attached adapter makes of this goes on.

    Args:
        params: the network's parameters.
        query: its input, ``[..., d]``.
        activation: name in `ACTIVATIONS`.
        beside: what else makes up the output, such as experts', ``[..., d]``.

    Returns:
        Its output, ``[..., d]``.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> apply(params, jnp.ones((2, 4)), "relu").shape
        (2, 4)
    """
    output = _linear(params["down"], hidden(params, query, activation))
    output = output if beside is None else output + beside
    if "patch" in params:
        output = output + contribution(params["patch"], query, ACTIVATIONS[activation])
    if "relu_patch" in params:
        output = output + contribution(params["relu_patch"], query, jax.nn.relu)
    return params[_ADAPTER].contribute(query, output) if _ADAPTER in params else output


def attach(params: Params, patch: Patch, *, relu: bool = False) -> Params:
    """Put a patch beside a feed-forward network; a patch that is already there is joined.

    Args:
        params: the network's parameters; not changed.
        patch: ``n`` neurons for this network.
        relu: activate the patch with ReLU instead of the network's own activation, so that silent neurons contribute
            exactly nothing.

    Returns:
        New parameters, sharing every array with the given ones.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> sorted(attach(params, create(4, 1)))
        ['down', 'patch', 'up']
    """
    _check(params, patch)
    name = _BESIDE[relu]
    return {**params, name: concatenate([params[name], patch]) if name in params else patch}


def attach_adapter(params: Params, adapter: Adapter) -> Params:
    """Put an adapter beside a feed-forward network, in the place of one that is already there.

    Args:
        params: the network's parameters; not changed.
        adapter: a pytree with ``contribute``.

    Returns:
        New parameters, sharing every array with the given ones.

    Raises:
        TPatchError: it is no adapter.
    """
    if not isinstance(adapter, Adapter):
        raise TPatchError(f"a {type(adapter).__name__} is no adapter; give an object with contribute(query, output)")
    return {**params, _ADAPTER: adapter}


def any_attached(params: Params) -> bool:
    """Whether anything joins a feed-forward network of a model's parameters without being merged into it."""
    return any(attached(layer["ffn"]) for layer in params["layers"].values())


def attached(params: Params) -> dict[str, Any]:
    """What stands beside a feed-forward network, by its name: ``"patch"``, ``"relu_patch"``, ``"adapter"``."""
    return {name: params[name] for name in (*_BESIDE, _ADAPTER) if name in params}


def detach(params: Params) -> Params:
    """The network without anything attached to it, the very arrays it had before.

    Args:
        params: the network's parameters; not changed.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> sorted(detach(attach(params, create(4, 1))))
        ['down', 'up']
    """
    return {name: entry for name, entry in params.items() if name not in (*_BESIDE, _ADAPTER)}


def _check(params: Params, patch: Patch) -> None:
    if not isinstance(patch, Patch):
        raise TPatchError(
            f"a {type(patch).__name__} is no patch of neurons and cannot become parameters of the network; keep it "
            "attached, or take it off with detach first"
        )
    if patch.key.ndim != 2:
        raise TPatchError(f"a patch of shape {patch.key.shape} is a batch of patches; use patch.join first")
    model_width = params["down"]["kernel"].shape[1]
    if patch.key.shape[1] != model_width:
        raise TPatchError(
            f"the patch is {patch.key.shape[1]} wide and the network {model_width}: it was made for another model"
        )


def _check_plain(params: Params) -> None:
    """Make sure that neurons can stand among a network's weights."""
    if any(is_int8(params[name]["kernel"]) for name in ("gate", "up", "down") if name in params):
        raise TPatchError(
            "the network's weights are in INT8, whose scales new neurons would change; keep the patch attached beside "
            "it (tp.attach), or merge it into plain weights (tp.dequantize_base)"
        )


def _longer(down: Params, value: Float[Array, "neurons hidden"]) -> Params:
    return {**down, "kernel": jnp.concatenate([down["kernel"], value.astype(down["kernel"].dtype)])}


@jax.jit
def neuron_shares(patch: Patch) -> Float[Array, "neurons"]:
    """How a merged neuron's strength is divided between ``up`` and ``down`` of a gated network: ``c`` of each neuron.

    ``act(z)·v = (act(z)·c)·(v/c)``. A sharp neuron has a large key and a small value, so that a firing one's hidden
    value would be hundreds of times that of the network's, which sets the scale where activations are rounded to
    INT8, and its value is what pruning by magnitude takes first. With ``c`` below one both come nearer to the others.

    Args:
        patch: ``n`` neurons.

    Returns:
        1, 1/2 or 1/4 of each, a power of two, which costs no bit; 1 where it would.

    Example:
        >>> from tpatch_jax.core.patch import sharpen
        >>> sharp = sharpen(Patch(jnp.ones((1, 4)), jnp.ones(1), jnp.ones((1, 4))), 256.0)
        >>> float(neuron_shares(sharp)[0])
        0.25
    """
    key, value = (jnp.max(jnp.abs(leaf), 1, initial=0).astype(jnp.float32) for leaf in (patch.key, patch.value))
    shares = jnp.ones_like(value)
    for ratio, share in sorted(SHARES.items()):
        shares = jnp.where((key >= ratio * value) & (value > 0), jnp.float32(share), shares)
    shares = shares.astype(patch.value.dtype)
    # Numbers next to zero lose bits on some devices, whatever they are multiplied by.
    kind = {2: jnp.uint16, 8: jnp.uint64}.get(patch.value.dtype.itemsize, jnp.uint32)
    there_and_back = patch.value / shares[:, None] * shares[:, None]
    back, before = (jax.lax.bitcast_convert_type(each, kind) for each in (there_and_back, patch.value))
    return jnp.where(jnp.all(back == before, 1), shares, jnp.ones_like(shares))


@jax.jit
def _times(value: Float[Array, "neurons hidden"], factor: Float[Array, "neurons"]) -> Float[Array, "neurons hidden"]:
    """Each value times a factor; those whose factor is one stay, for numbers next to zero could change."""
    return jnp.where(factor[:, None] == 1, value, value * factor[:, None].astype(value.dtype))


def merge(params: Params, patch: Patch, shares: Float[Array, "neurons"] | None = None) -> Params:
    """Put a patch inside the parameters of a feed-forward network, which keeps its kind and activation.

    A neuron becomes one more column of ``up`` (of ``gate`` when gated, where its ``up`` column is zero with its share
    ``c`` as bias) and one more row of ``down``, its value, when gated divided by that share (`neuron_shares`), which
    changes no bit of what it adds. Bias vectors that the network lacks are added, zero for the neurons it had.

    Args:
        params: the network's parameters; not changed.
        patch: ``n`` neurons for this network.
        shares: ``c`` of each neuron of a gated network, in the place of those by default.

    Returns:
        New parameters of a network that is ``n`` neurons wider.

    Raises:
        TPatchError: the patch has another width than the network, or the network's weights are in INT8.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> width(merge(params, create(4, 3)))
        19
    """
    _check(params, patch)
    _check_plain(params)
    neurons = patch.key.shape[0]

    def widen(entry: Params, columns: Float[Array, "hidden neurons"], bias: Float[Array, "neurons"]) -> Params:
        dtype = entry["kernel"].dtype
        before = entry.get("bias", jnp.zeros(entry["kernel"].shape[1], dtype))
        kernel = jnp.concatenate([entry["kernel"], columns.astype(dtype)], 1)
        return {"kernel": kernel, "bias": jnp.concatenate([before, bias.astype(before.dtype)])}

    gated = "gate" in params
    reader = "gate" if gated else "up"
    merged = {**params, reader: widen(params[reader], patch.key.T, patch.bias)}
    value = patch.value.astype(params["down"]["kernel"].dtype)
    if gated:
        zeros = jnp.zeros((patch.key.shape[1], neurons), patch.key.dtype)
        shares = neuron_shares(patch._replace(value=value)) if shares is None else shares
        merged["up"] = widen(params["up"], zeros, shares)
        value = _times(value, 1 / shares)
    merged["down"] = _longer(params["down"], value)
    return merged


def merge_without_bias(params: Params, patch: Patch, constant: Float[Array, "hidden"]) -> Params:
    """Put a patch inside a feed-forward network that has no biases and shall get none: nearly what `merge` does.

    With a direction ``u`` on which queries have ``q·u ≈ 1``, ``q·k + b ≈ q·(k + b·u)``; a gated network's ``up``
    column, which `merge` makes the constant ``c`` (`neuron_shares`), is ``c·u``.

    Args:
        params: the network's parameters; not changed.
        patch: ``n`` neurons for this network.
        constant: ``u``, ``[d]``.

    Returns:
        New parameters of a network that is ``n`` neurons wider.

    Raises:
        TPatchError: the patch has another width than the network.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> sorted(merge_without_bias(params, create(4, 3), jnp.ones(4) / 4)["up"])
        ['kernel']
    """
    _check(params, patch)
    _check_plain(params)
    columns = {"gate" if "gate" in params else "up": (patch.key + patch.bias[:, None] * constant).T}
    value = patch.value
    if "gate" in params:
        shares = neuron_shares(patch)
        columns["up"] = constant[:, None] * shares.astype(constant.dtype)
        value = _times(value, 1 / shares)
    merged = dict(params)
    for name, added in columns.items():
        kernel = params[name]["kernel"]
        merged[name] = {**params[name], "kernel": jnp.concatenate([kernel, added.astype(kernel.dtype)], 1)}
    merged["down"] = _longer(params["down"], value)
    return merged


def merge_in_place(
    params: Params, patch: Patch, neurons: Int[Array, "neurons"], constant: Float[Array, "hidden"] | None = None
) -> Params:
    """Put a patch where neurons of a feed-forward network are: it stays as wide as it was.

    Args:
        params: the network's parameters; not changed.
        patch: ``n`` neurons for this network.
        neurons: the numbers of the ``n`` neurons that go, all different.
        constant: for a network without biases, the direction that stands for them, as in `merge_without_bias`.

    Returns:
        New parameters of the same shapes.

    Raises:
        TPatchError: the patch has another width than the network, or the network has no biases and no direction is
            given.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> width(merge_in_place(params, create(4, 2), jnp.array([3, 5]), jnp.ones(4) / 4))
        16
    """
    if constant is None and "bias" not in params["up"]:
        raise TPatchError("the network has no biases, which patches need; give the direction that stands for them")
    wider = merge(params, patch) if constant is None else merge_without_bias(params, patch, constant)
    keep, result = width(params), dict(params)
    for name in ("gate", "up"):
        if name in params:
            result[name] = {
                part: array[..., :keep].at[..., neurons].set(array[..., keep:]) for part, array in wider[name].items()
            }
    kernel = wider["down"]["kernel"]
    result["down"] = {**params["down"], "kernel": kernel[:keep].at[neurons].set(kernel[keep:])}
    return result


def unmerge(params: Params, neurons: int, *, added_bias: bool | None = None) -> tuple[Params, Patch]:
    """Take the last merged neurons out again: the inverse of `merge`, bit for bit.

    Args:
        params: parameters that `merge` returned; not changed.
        neurons: how many neurons to take out.
        added_bias: whether the network had no bias vectors before the merge, so that they go too. ``None`` looks at
            the arrays (they go if ``down`` has none and those that remain are all zero), which is impossible under
            ``jit``.

    Returns:
        The parameters before the merge, and the patch.

    Raises:
        TPatchError: the network does not have that many neurons, or no bias, so that nothing was merged.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> before, patch = unmerge(merge(params, create(4, 3)), 3)
        >>> sorted(before["up"]), patch.key.shape
        (['kernel'], (3, 4))
    """
    reader = "gate" if "gate" in params else "up"
    keep = width(params) - neurons
    if not 0 <= keep <= width(params) or "bias" not in params[reader]:
        raise TPatchError(f"{neurons} neurons cannot be taken out of a network of {width(params)}: not merged there")
    value = params["down"]["kernel"][keep:]
    if reader == "gate":
        value = _times(value, params["up"]["bias"][keep:])
    patch = Patch(params[reader]["kernel"][:, keep:].T, params[reader]["bias"][keep:], value)
    readers = [reader, "up"] if reader == "gate" else [reader]
    if added_bias is None:
        added_bias = "bias" not in params["down"] and not any(params[name]["bias"][:keep].any() for name in readers)
    result = {**params, "down": {**params["down"], "kernel": params["down"]["kernel"][:keep]}}
    for name in readers:
        result[name] = {"kernel": params[name]["kernel"][:, :keep]}
        if not added_bias:
            result[name]["bias"] = params[name]["bias"][:keep]
    return result, patch
