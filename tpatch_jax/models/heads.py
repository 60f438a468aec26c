"""What follows the last block: the final norm and the unembedding, or the head of a classifier."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.int8 import is_int8, plain
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.blocks import softcap
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.stack import leave_block, normalise, without_ffn
from tpatch_jax.typing import Activation, Params

__all__ = [
    "argmax",
    "final_weights",
    "finish",
    "finisher",
    "leave_last",
    "logits",
    "pointwise",
    "unembedding",
    "unembedding_rows",
]


def _head_weights(config: NetworkConfig, params: Params) -> Params:
    """What `logits` reads, so that neither a merged nor an attached patch has it compiled again."""
    names = ("embed", "head", "norm") if config.tied and not config.labels else ("head", "norm", "classifier")
    return {name: params[name] for name in names if name in params}


def logits(
    config: NetworkConfig,
    params: Params,
    hidden: Float[Array, "... hidden"],
    valid: Bool[Array, "*batch tokens"] | None = None,
) -> Float[Array, "... vocabulary"]:
    """From the residual stream after the last block to logits: ``norm(hidden) · unembedding``, or the head's labels.

    A classification head reads the first token or the mean of all, ``output·act(dense·x)``; that of images has no
    ``dense``.

    Args:
        config: the network's description.
        params: the network's parameters; only the final norm and the head or (un)embedding are read.
        hidden: ``[..., d]``; gather the positions of interest first, since the vocabulary is wide. Of a classifier
            ``[..., tokens, d]``.
        valid: of a classifier that reads the mean: which tokens are no padding, ``[..., tokens]`` bool; all by default.

    Returns:
        ``[..., vocabulary]``, or of a classifier ``[..., labels]``; float32.
    """
    return _logits(config, _head_weights(config, params), hidden, valid)


_HEAD_ACTIVATIONS: Mapping[str, Activation] = {"tanh": jnp.tanh, **ACTIVATIONS}


def _pooled_labels(config: NetworkConfig, params: Params, x: Array) -> Array:
    """The logits of labels from what the head reads, ``[..., d]``."""
    output = params["output"]
    if config.head_activation:
        dense = params["dense"]
        x = x @ dense["kernel"] + dense["bias"] if config.head_dense_bias else x @ dense["kernel"]
        x = _HEAD_ACTIVATIONS[config.head_activation](x)
        x = normalise(config, params["norm"], x) if config.head_norm else x
    return (x @ output["kernel"] + output["bias"]).astype(jnp.float32)


def _normed(config: NetworkConfig, params: Params, hidden: Array) -> Array:
    """What the head reads: the residual stream behind the final norm, where there is one."""
    return hidden if config.post_norm else normalise(config, params["norm"], hidden)


def _labels(config: NetworkConfig, params: Params, hidden: Array, valid: Array | None) -> Array:
    x = hidden[..., 0, :]
    if config.pooling == "mean":
        weight = jnp.ones(hidden.shape[:-1], hidden.dtype) if valid is None else valid.astype(hidden.dtype)
        x = jnp.sum(hidden * weight[..., None], -2) / jnp.sum(weight, -1, keepdims=True)
    return _pooled_labels(config, params, x)


@partial(jax.jit, static_argnames="config")
def _logits(config: NetworkConfig, params: Params, hidden: Array, valid: Array | None = None) -> Array:
    x = _normed(config, params, hidden)
    if config.labels:
        return _labels(config, params["classifier"], x, valid)
    if config.head_scale != 1:
        x = x * jnp.asarray(config.head_scale, x.dtype)
    if config.tied:
        result = jnp.einsum("...d,vd->...v", x, plain(params["embed"]["embedding"]), preferred_element_type=jnp.float32)
    else:
        result = jnp.einsum("...d,dv->...v", x, plain(params["head"]["kernel"]), preferred_element_type=jnp.float32)
    if config.head_bias:
        result = result + params["head"]["bias"].astype(jnp.float32)
    return softcap(result, config.logit_cap)


def argmax(config: NetworkConfig, params: Params, hidden: Float[Array, "*batch hidden"]) -> Int[Array, "*batch"]:
    """The most probable token after each residual stream, ``[..., d]`` to ``[...]`` int."""
    return _argmax(config, _head_weights(config, params), hidden)


@partial(jax.jit, static_argnames="config")
def _argmax(config: NetworkConfig, params: Params, hidden: Array) -> Array:
    return jnp.argmax(_logits(config, params, hidden), -1)


def finish(
    config: NetworkConfig, weights: Params, context: Mapping[str, Array], output: Float[Array, "rows *tokens hidden"]
) -> Float[Array, "rows vocabulary"]:
    """`resume` for rows cut in the last layer, each a position of its own: ``[rows, d]`` to ``[rows, vocabulary]``.

    Where one position does not decide (see `pointwise`) a row is a whole text, ``[rows, tokens, d]``, in which a
    residual stream of zeros marks padding: after a norm there is none. Or rows are positions of several texts; then the
    context says for each which ``"text"`` it belongs to and whether it is ``"valid"``, and a row gets its text's
    logits.

    Args:
        config: the network's description.
        weights: what `final_weights` returned.
        context: ``{"residual": [rows, d]}``, and perhaps ``"text"`` and ``"valid"``, ``[rows]``.
        output: the FFN's output, ``[rows, d]``.
    """
    kind, residual = config.kind(config.layers - 1), context["residual"]
    if "text" in context:
        hidden, text = leave_block(config, kind, weights["layer"], residual, output), context["text"]
        hidden = _normed(config, weights, hidden)
        same = ((text[:, None] == text) & context["valid"]).astype(hidden.dtype)
        return _pooled_labels(config, weights["classifier"], same @ hidden / jnp.sum(same, -1, keepdims=True))
    if not pointwise(config):
        hidden = leave_block(config, kind, weights["layer"], residual, output)
        return logits(config, weights, hidden, jnp.any(residual != 0, -1))
    hidden = leave_block(config, kind, weights["layer"], residual[:, None], output[:, None])
    return logits(config, weights, hidden if config.labels else hidden[:, 0])


def leave_last(
    config: NetworkConfig,
    params: Params,
    residual: Float[Array, "*batch hidden"],
    output: Float[Array, "*batch hidden"],
) -> Float[Array, "*batch hidden"]:
    """The residual stream after the last block from its FFN's output, ``[..., d]``, each position on its own."""
    last = config.layers - 1
    return leave_block(config, config.kind(last), without_ffn(params["layers"][last]), residual, output)


def unembedding(config: NetworkConfig, params: Params) -> Float[Array, "vocabulary hidden"]:
    """The unembedding as the residual stream sees it, through the final norm's scale: ``[vocabulary, d]``."""
    return unembedding_rows(config, params, slice(None))


def unembedding_rows(
    config: NetworkConfig, params: Params, tokens: Int[Array, "*tokens"] | slice
) -> Float[Array, "*tokens hidden"]:
    """The rows of `unembedding` of some tokens, ``[…, d]``.

    Raises:
        TPatchError: the network is a classifier, which has none.
    """
    embed, head = params.get("embed"), params.get("head")
    if config.tied and embed:
        rows = embed["embedding"]
        # Of a table in INT8 none but these rows is turned back.
        table = rows.qvalue[tokens].astype(rows.scale.dtype) * rows.scale[tokens] if is_int8(rows) else rows[tokens]
    else:
        table = _columns(plain(head["kernel"]), tokens) if head else None
    if table is None:
        raise TPatchError(f"this {config.architecture} has no unembedding; it tells labels apart")
    if config.post_norm:
        return table
    return _folded(table, params["norm"]["scale"], config.norm_shift)


def _columns(kernel: Array, tokens: Array | slice) -> Array:
    """Some columns of a kernel, as rows; of a few the kernel is not turned over as a whole."""
    return kernel.T[tokens] if isinstance(tokens, slice) else jnp.moveaxis(kernel[:, tokens], 0, -1)


@jax.jit
def _folded(table: Array, scale: Array, shift: float) -> Array:
    """Unembedding rows with the scale of the last norm in them."""
    return table * (scale + jnp.asarray(shift, table.dtype))


def final_weights(config: NetworkConfig, params: Params) -> Params:
    """The few parameters that `finish` reads, so that a compiled fit does not carry the rest."""
    return {**_head_weights(config, params), "layer": without_ffn(params["layers"][config.layers - 1])}


@lru_cache(maxsize=16)
def finisher(config: NetworkConfig) -> Callable[[Params, Mapping[str, Array], Array], Array]:
    """`finish` for one configuration, the same object every time, so that ``jit`` recognises it."""
    return partial(finish, config)


def pointwise(config: NetworkConfig) -> bool:
    """Whether everything after the last FFN acts on each position alone, and one position decides what is said."""
    return config.pooling == "first"
