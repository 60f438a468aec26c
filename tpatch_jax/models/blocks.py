"""The parts of a decoder as Flax NNX modules: norms, attention, and a block without its feed-forward network."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tpatch_jax.models.config import LayerKind, NetworkConfig

__all__ = ["Attention", "Block", "Cache", "Norm", "softcap"]


class Cache(NamedTuple):
    """Keys and values of one block's attention, ``[batch, context, key_value_heads, head_width]`` each."""

    key: Array
    value: Array


class Norm(nnx.Module):
    """Root-mean-square or layer normalisation, computed in float32 whatever the parameters' type."""

    def __init__(self, kind: str, epsilon: float, shift: float, width: int):
        self.kind, self.epsilon, self.shift = kind, epsilon, shift
        self.scale = nnx.Param(jnp.ones(width))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros(width))

    @classmethod
    def of(cls, config: NetworkConfig, width: int | None = None) -> "Norm":
        """The kind of norm that a decoder uses."""
        return cls(config.norm, config.norm_epsilon, config.norm_shift, width or config.width)

    def __call__(self, x: Array) -> Array:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        y = y * (self.scale[...].astype(jnp.float32) + self.shift)
        if self.kind == "layer":
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def softcap(x: Array, cap: float) -> Array:
    """``cap · tanh(x / cap)``, or ``x`` itself where there is no cap."""
    return cap * jnp.tanh(x / cap) if cap else x


def _rotate(x: Array, positions: Array, config: NetworkConfig, rope_frequencies: tuple[float, ...]) -> Array:
    """Rotary embedding of ``x [batch, tokens, heads, width]``."""
    frequencies = jnp.asarray(rope_frequencies, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = (jnp.cos(angles) * config.rope_scale)[:, :, None], (jnp.sin(angles) * config.rope_scale)[:, :, None]
    pairs = len(rope_frequencies)
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    split = (pairs, 2) if config.rope_adjacent else (2, pairs)
    axis = -1 if config.rope_adjacent else -2
    first, second = jnp.moveaxis(turned.reshape(*x.shape[:-1], *split), axis, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * pairs).astype(x.dtype), rest], -1)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries and an optional cache."""

    def __init__(self, config: NetworkConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.config, self.kind = config, kind
        inner, shared = config.heads * config.head_width, config.key_value_heads * config.head_width
        linear = partial(nnx.Linear, rngs=rngs)
        self.query = linear(config.width, inner, use_bias=config.query_bias)
        self.key = linear(config.width, shared, use_bias=config.query_bias)
        self.value = linear(config.width, shared, use_bias=config.query_bias)
        self.output = linear(inner, config.width, use_bias=config.output_bias)
        if config.query_norm:
            self.query_norm, self.key_norm = Norm.of(config, config.head_width), Norm.of(config, config.head_width)

    def __call__(self, x: Array, positions: Array, cache: Cache | None) -> tuple[Array, Cache | None]:
        """Mix ``x [batch, tokens, d]`` at the given positions; a cache is read and grown."""
        config, (batch, tokens, _) = self.config, x.shape
        query = self.query(x).reshape(batch, tokens, config.heads, config.head_width)
        key = self.key(x).reshape(batch, tokens, config.key_value_heads, config.head_width)
        value = self.value(x).reshape(batch, tokens, config.key_value_heads, config.head_width)
        if config.query_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if frequencies := self.kind.rope_frequencies:
            query, key = (_rotate(part, positions, config, frequencies) for part in (query, key))
        if cache is not None:
            lane = jnp.arange(batch)[:, None]
            # Positions past the cache's end belong to padding; dropping them keeps real entries whole.
            key = cache.key.at[lane, positions].set(key, mode="drop")
            value = cache.value.at[lane, positions].set(value, mode="drop")
            cache = Cache(key, value)
        back = positions[:, :, None] - jnp.arange(key.shape[1])[None, None, :]
        visible = (back >= 0) & (back < self.kind.window) if self.kind.window else back >= 0
        query = query.reshape(batch, tokens, config.key_value_heads, -1, config.head_width)
        scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
        scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
        scores = softcap(scores * scale, config.attention_cap)
        # Not minus infinity: a padded position past the cache's end may see nothing at all under a window.
        scores = jnp.where(visible[:, None, None], scores, -1e30)
        weights = jax.nn.softmax(scores, -1).astype(value.dtype)
        mixed = jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(batch, tokens, -1)
        return self.output(mixed), cache


class Block(nnx.Module):
    """One block without its FFN: `enter` gives the FFN's input, `leave` takes its output."""

    def __init__(self, config: NetworkConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.config = config
        self.norm_1 = Norm.of(config)
        self.attention = Attention(config, kind, rngs=rngs)
        if config.block != "shared":
            self.norm_2 = Norm.of(config)
        if config.sandwich:
            self.norm_attention, self.norm_ffn = Norm.of(config), Norm.of(config)

    def enter(self, x: Array, positions: Array, cache: Cache | None) -> tuple[Array, Array, Cache | None]:
        """From the residual stream to the stream beside the FFN, the FFN's input, and the grown cache."""
        read = self.norm_1(x)
        mixed, cache = self.attention(read, positions, cache)
        if self.config.sandwich:
            mixed = self.norm_attention(mixed)
        residual = x + mixed
        if self.config.block == "shared":
            return residual, read, cache
        return residual, self.norm_2(residual if self.config.block == "serial" else x), cache

    def leave(self, residual: Array, output: Array) -> Array:
        """From the stream beside the FFN and the FFN's output to the residual stream."""
        return residual + (self.norm_ffn(output) if self.config.sandwich else output)
