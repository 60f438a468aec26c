"""The decoder network: Flax NNX modules inside, pure functions over a nested dict of parameters outside.

The parameters are ``{"embed": …, "layers": {0: {"norm_1", "attention", "norm_2", "ffn"}, …}, "norm": …, "head"?: …}``.
The feed-forward network of every block is not a module but the plain function `tpatch_jax.ffn.apply` over its own
sub-dict, because that is the place which patches change.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tpatch_jax import ffn
from tpatch_jax.models.config import DecoderConfig

__all__ = [
    "Cache",
    "Trace",
    "apply",
    "argmax",
    "decode",
    "empty_cache",
    "final_weights",
    "finish",
    "finisher",
    "gather",
    "hidden",
    "leave_last",
    "logits",
    "merged_neurons",
    "resume",
    "shapes",
    "trace",
    "unembedding",
]

Params = dict[Any, Any]


class Cache(NamedTuple):
    """Keys and values of one block's attention, ``[batch, context, key_value_heads, head_width]`` each."""

    key: Array
    value: Array


class Trace(NamedTuple):
    """What `trace` found at the cut: the arrays that editing needs.

    Attributes:
        query: the FFN's input, ``[batch, tokens, d]``.
        output: the FFN's output, ``[batch, tokens, d]``.
        context: whatever `resume` needs besides: the residual stream beside the FFN, ``[batch, tokens, d]``, and the
            positions, ``[batch, tokens]``.
        layer: the cut.
    """

    query: Array
    output: Array
    context: dict[str, Array]
    layer: int


class Norm(nnx.Module):
    """Root-mean-square or layer normalisation, computed in float32 whatever the parameters' type."""

    def __init__(self, config: DecoderConfig, width: int):
        self.kind, self.epsilon = config.norm, config.norm_epsilon
        self.scale = nnx.Param(jnp.ones(width))
        if config.norm == "layer":
            self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        y = y * self.scale[...].astype(jnp.float32)
        if self.kind == "layer":
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def _rotate(x: Array, positions: Array, config: DecoderConfig) -> Array:
    """Rotary embedding of ``x [batch, tokens, heads, width]``, in the half-split layout."""
    frequencies = jnp.asarray(config.rope_frequencies, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = (jnp.cos(angles) * config.rope_scale)[:, :, None], (jnp.sin(angles) * config.rope_scale)[:, :, None]
    pairs = frequencies.shape[0]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), rest], -1)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries and an optional cache."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        inner, shared = config.heads * config.head_width, config.key_value_heads * config.head_width
        linear = partial(nnx.Linear, rngs=rngs)
        self.query = linear(config.width, inner, use_bias=config.query_bias)
        self.key = linear(config.width, shared, use_bias=config.query_bias)
        self.value = linear(config.width, shared, use_bias=config.query_bias)
        self.output = linear(inner, config.width, use_bias=config.output_bias)

    def __call__(self, x: Array, positions: Array, cache: Cache | None) -> tuple[Array, Cache | None]:
        config, (batch, tokens, _) = self.config, x.shape
        query = self.query(x).reshape(batch, tokens, config.heads, config.head_width)
        key = self.key(x).reshape(batch, tokens, config.key_value_heads, config.head_width)
        value = self.value(x).reshape(batch, tokens, config.key_value_heads, config.head_width)
        if config.rope_frequencies:
            query, key = _rotate(query, positions, config), _rotate(key, positions, config)
        if cache is not None:
            lane = jnp.arange(batch)[:, None]
            # Positions past the cache's end belong to padding; dropping them keeps real entries whole.
            key = cache.key.at[lane, positions].set(key, mode="drop")
            value = cache.value.at[lane, positions].set(value, mode="drop")
            cache = Cache(key, value)
        visible = jnp.arange(key.shape[1])[None, None, :] <= positions[:, :, None]
        query = query.reshape(batch, tokens, config.key_value_heads, -1, config.head_width)
        scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None, None], scores * config.head_width**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, -1).astype(value.dtype)
        mixed = jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(batch, tokens, -1)
        return self.output(mixed), cache


class Block(nnx.Module):
    """One pre-norm block without its FFN: `enter` gives the FFN's input, `leave` takes its output."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm_1 = Norm(config, config.width)
        self.attention = Attention(config, rngs=rngs)
        self.norm_2 = Norm(config, config.width)

    def enter(self, x: Array, positions: Array, cache: Cache | None) -> tuple[Array, Array, Cache | None]:
        mixed, cache = self.attention(self.norm_1(x), positions, cache)
        residual = x + mixed
        return residual, self.norm_2(residual), cache

    def leave(self, residual: Array, output: Array) -> Array:
        return residual + output


@lru_cache(maxsize=64)
def _graph(kind: type[nnx.Module], *arguments: Any) -> nnx.GraphDef:
    """The structure of a module without its weights, made once per configuration."""
    if kind is Block:
        module = nnx.eval_shape(lambda: Block(*arguments, rngs=nnx.Rngs(0)))
    else:
        module = nnx.eval_shape(lambda: kind(*arguments))
    return nnx.split(module)[0]


def _block(config: DecoderConfig, params: Params) -> Block:
    return nnx.merge(_graph(Block, config), {name: params[name] for name in params if name != "ffn"})


@partial(jax.jit, static_argnames="config")
def _enter(config: DecoderConfig, params: Params, x: Array, positions: Array, cache: Cache | None):
    residual, query, cache = _block(config, params).enter(x, positions, cache)
    return residual, query, ffn.apply(params["ffn"], query, config.activation), cache


@partial(jax.jit, static_argnames="config")
def _leave(config: DecoderConfig, params: Params, residual: Array, output: Array) -> Array:
    return _block(config, params).leave(residual, output)


@partial(jax.jit, static_argnames="config")
def _whole(config: DecoderConfig, params: Params, x: Array, positions: Array, cache: Cache | None):
    block = _block(config, params)
    residual, query, cache = block.enter(x, positions, cache)
    return block.leave(residual, ffn.apply(params["ffn"], query, config.activation)), cache


@partial(jax.jit, static_argnames="config")
def _embed(config: DecoderConfig, params: Params, tokens: Array) -> Array:
    return jnp.take(params["embed"]["embedding"], tokens, axis=0)


@partial(jax.jit, static_argnames="config")
def logits(config: DecoderConfig, params: Params, hidden: Array) -> Array:
    """From the residual stream after the last block to logits: ``norm(hidden) · unembedding``.

    Args:
        config: the decoder's description.
        params: the decoder's parameters; only the final norm and the (un)embedding are read.
        hidden: ``[..., d]``; gather the positions of interest first, since the vocabulary is wide.

    Returns:
        ``[..., vocabulary]``, float32.
    """
    x = nnx.merge(_graph(Norm, config, config.width), params["norm"])(hidden)
    if config.tied:
        return jnp.einsum("...d,vd->...v", x, params["embed"]["embedding"], preferred_element_type=jnp.float32)
    result = jnp.einsum("...d,dv->...v", x, params["head"]["kernel"], preferred_element_type=jnp.float32)
    return result + params["head"]["bias"].astype(jnp.float32) if "bias" in params["head"] else result


@partial(jax.jit, static_argnames="config")
def argmax(config: DecoderConfig, params: Params, hidden: Array) -> Array:
    """The most probable token after each residual stream, ``[..., d]`` to ``[...]`` int."""
    return jnp.argmax(logits(config, params, hidden), -1)


def _positions(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def trace(config: DecoderConfig, params: Params, tokens: Array, layer: int) -> Trace:
    """Run everything up to the FFN of one layer, and that FFN.

    Args:
        config: the decoder's description.
        params: the decoder's parameters.
        tokens: ``[batch, tokens]`` int, padded on the right (causal attention never looks at it).
        layer: where to cut, ``0 … config.layers - 1``.

    Returns:
        The `Trace` at the cut.
    """
    positions, x = _positions(tokens), _embed(config, params, tokens)
    for index in range(layer):
        x, _ = _whole(config, params["layers"][index], x, positions, None)
    residual, query, output, _ = _enter(config, params["layers"][layer], x, positions, None)
    return Trace(query, output, {"residual": residual, "positions": positions}, layer)


def hidden(config: DecoderConfig, params: Params, traced: Trace, output: Array) -> Array:
    """Run everything after the cut but the final norm and the vocabulary projection: ``[batch, tokens, d]``."""
    x = _leave(config, params["layers"][traced.layer], traced.context["residual"], output)
    for index in range(traced.layer + 1, config.layers):
        x, _ = _whole(config, params["layers"][index], x, traced.context["positions"], None)
    return x


def resume(config: DecoderConfig, params: Params, traced: Trace, output: Array) -> Array:
    """Run everything after the cut from a given FFN output: logits ``[batch, tokens, vocabulary]``, float32.

    Args:
        config: the decoder's description.
        params: the decoder's parameters.
        traced: what `trace` returned, possibly through `gather` when the cut is in the last layer.
        output: the FFN's output to go on from, ``[batch, tokens, d]``.
    """
    return logits(config, params, hidden(config, params, traced, output))


def gather(traced: Trace, lane: Array, position: Array) -> Trace:
    """Keep only some positions of a trace, as a batch of one-token rows: ``[rows, 1, d]``.

    Only a cut in the last layer may be resumed after it, for there the rest acts on each position alone.

    Args:
        traced: a trace of ``[batch, tokens]``.
        lane: which batch row, ``[rows]`` int.
        position: which token, ``[rows]`` int.
    """
    pick = lambda x: x[lane, position][:, None]  # noqa: E731
    return Trace(pick(traced.query), pick(traced.output), jax.tree.map(pick, traced.context), traced.layer)


def apply(config: DecoderConfig, params: Params, tokens: Array) -> Array:
    """The whole network: ``[batch, tokens]`` int to logits ``[batch, tokens, vocabulary]``, float32."""
    traced = trace(config, params, tokens, config.layers - 1)
    return resume(config, params, traced, traced.output)


def empty_cache(config: DecoderConfig, params: Params, batch: int, context: int) -> list[Cache]:
    """An empty key-value cache for every layer, for ``batch`` lanes of at most ``context`` tokens."""
    dtype = params["embed"]["embedding"].dtype
    shape = (batch, context, config.key_value_heads, config.head_width)
    return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]


def decode(
    config: DecoderConfig, params: Params, tokens: Array, positions: Array, cache: list[Cache]
) -> tuple[Array, list[Cache]]:
    """Run some more tokens on top of a cache.

    Args:
        config: the decoder's description.
        params: the decoder's parameters.
        tokens: ``[batch, tokens]`` int.
        positions: their positions, ``[batch, tokens]`` int; a position past the cache's end marks padding.
        cache: from `empty_cache` or an earlier call.

    Returns:
        The residual stream after the last block, ``[batch, tokens, d]`` (see `logits`), and the new cache.
    """
    x, grown = _embed(config, params, tokens), []
    for index in range(config.layers):
        x, entry = _whole(config, params["layers"][index], x, positions, cache[index])
        grown.append(entry)
    return x, grown


def shapes(config: DecoderConfig, merged: Mapping[int, int] | None = None) -> Params:
    """The shapes of all parameters, as `jax.ShapeDtypeStruct` leaves in the parameters' own nesting.

    Args:
        config: the decoder's description.
        merged: how many patch neurons are merged into which layers.
    """
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def of(module: nnx.Module) -> Params:
        return nnx.to_pure_dict(nnx.state(module))

    def linear(inputs: int, outputs: int, bias: bool) -> Params:
        entry = {"kernel": shape((inputs, outputs))}
        return {**entry, "bias": shape((outputs,))} if bias else entry

    def network(extra: int) -> Params:
        hidden, bias = config.ffn_width + extra, config.ffn_bias or extra > 0
        readers = ("gate", "up") if config.gated else ("up",)
        entries = {name: linear(config.width, hidden, bias) for name in readers}
        return {**entries, "down": linear(hidden, config.width, config.ffn_bias)}

    block = of(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
    result: Params = {
        "embed": {"embedding": shape((config.vocabulary, config.width))},
        "layers": {index: {**block, "ffn": network((merged or {}).get(index, 0))} for index in range(config.layers)},
        "norm": of(nnx.eval_shape(lambda: Norm(config, config.width))),
    }
    if not config.tied:
        result["head"] = linear(config.width, config.vocabulary, False)
    return result


def merged_neurons(config: DecoderConfig, params: Params) -> dict[int, int]:
    """How many patch neurons are merged into which layers; layers without any are left out."""
    extra = {index: ffn.width(layer["ffn"]) - config.ffn_width for index, layer in params["layers"].items()}
    return {index: count for index, count in extra.items() if count}


def finish(config: DecoderConfig, weights: Params, context: Params, output: Array) -> Array:
    """`resume` for rows cut in the last layer, each a position of its own: ``[rows, d]`` to ``[rows, vocabulary]``.

    Args:
        config: the decoder's description.
        weights: what `final_weights` returned.
        context: ``{"residual": [rows, d]}``.
        output: the FFN's output, ``[rows, d]``.
    """
    hidden = _leave(config, weights["layer"], context["residual"][:, None], output[:, None])[:, 0]
    return logits(config, weights, hidden)


@partial(jax.jit, static_argnames="config")
def leave_last(config: DecoderConfig, params: Params, residual: Array, output: Array) -> Array:
    """The residual stream after the last block from its FFN's output, ``[..., d]``, each position on its own."""
    layer = params["layers"][config.layers - 1]
    return _leave(config, {name: entry for name, entry in layer.items() if name != "ffn"}, residual, output)


def unembedding(config: DecoderConfig, params: Params) -> Array:
    """The unembedding as the residual stream sees it, through the final norm's scale: ``[vocabulary, d]``."""
    table = params["embed"]["embedding"] if config.tied else params["head"]["kernel"].T
    return table * params["norm"]["scale"]


def final_weights(config: DecoderConfig, params: Params) -> Params:
    """The few parameters that `finish` reads, so that a compiled fit does not carry the rest."""
    layer = {name: entry for name, entry in params["layers"][config.layers - 1].items() if name != "ffn"}
    rest = {name: params[name] for name in ("embed" if config.tied else "head", "norm")}
    return {**rest, "layer": layer}


@lru_cache(maxsize=16)
def finisher(config: DecoderConfig):
    """`finish` for one configuration, the same object every time, so that ``jit`` recognises it."""
    return partial(finish, config)
