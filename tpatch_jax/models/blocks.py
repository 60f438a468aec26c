"""The parts of a network as Flax NNX modules: norms, attention, and a block without its feed-forward network."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import Latent, LayerKind, NetworkConfig
from tpatch_jax.models.experts import Experts

__all__ = [
    "HIDDEN",
    "Around",
    "Attention",
    "Block",
    "Cache",
    "CrossAttention",
    "LatentAttention",
    "Norm",
    "Seen",
    "States",
    "relative_bias",
    "softcap",
]

HIDDEN = -1e30
"""Added to the scores of what attention must not see. Not minus infinity: a padded position may see nothing at all."""


States: TypeAlias = tuple[
    Float[Array, "batch heads source width"], Float[Array, "batch heads source width"], Float[Array, "batch 1 1 source"]
]
"""What cross-attention reads of an encoder's states: keys, values, and what is added to the scores."""


class Cache(NamedTuple):
    """What one block's attention has read so far, head after head, as its products read it.

    Attributes:
        key: of the tokens, ``[batch, key_value_heads, context, head_width]``; of `LatentAttention` the key that all
            heads share, ``[batch, 1, context, turning]``.
        value: of the tokens, the same shape; of `LatentAttention` the narrow vector, ``[batch, 1, context, width]``.
        states: of an encoder's states, if it reads any: keys and values, ``[batch, heads, source, head_width]`` each,
            and what is added to the scores, ``[batch, 1, 1, source]``.
    """

    key: Float[Array, "batch groups seen width"]
    value: Float[Array, "batch groups seen inner"]
    states: States | None = None


class Seen(NamedTuple):
    """What each token looks at, where rows that begin alike share tokens; see `tpatch_jax.models.forks.Pack`.

    Attributes:
        visible: which of the tokens that were read, those of the cache first, ``[batch, tokens, seen]`` bool.
        positions: of these, ``[batch, seen]`` int.
    """

    visible: Bool[Array, "batch tokens seen"]
    positions: Int[Array, "batch seen"]


class Around(NamedTuple):
    """What all blocks of a stack read besides the residual stream.

    Attributes:
        bias: added to the scores of self-attention, broadcast to ``[batch, heads, tokens, seen]``: relative positions,
            and `HIDDEN` at the padding of an encoder.
        states: the encoder's states, ``[batch, source, d]``.
        states_bias: added to the scores of cross-attention, ``[batch, 1, 1, source]``: `HIDDEN` at padding.
        seen: what each token looks at, where it is not all that comes before it. A cache then holds tokens in the order
            in which they were read, and grows by those that are read now.
    """

    bias: Float[Array, "batch heads tokens seen"] | None = None
    states: Float[Array, "batch source hidden"] | None = None
    states_bias: Float[Array, "batch 1 1 source"] | None = None
    seen: Seen | None = None


class Norm(nnx.Module):
    """Root-mean-square or layer normalisation, computed in float32 whatever the parameters' type."""

    kind: str
    epsilon: float
    shift: float
    biased: bool
    scale: nnx.Param[Float[Array, " width"]]
    bias: nnx.Param[Float[Array, " width"]]

    def __init__(self, kind: str, epsilon: float, shift: float, width: int, biased: bool = True):
        self.kind, self.epsilon, self.shift, self.biased = kind, epsilon, shift, kind == "layer" and biased
        self.scale = nnx.Param(jnp.ones(width))
        if self.biased:
            self.bias = nnx.Param(jnp.zeros(width))

    @classmethod
    def of(cls, config: NetworkConfig, width: int | None = None) -> "Norm":
        """The kind of norm that a network uses."""
        width = width or config.hidden_size
        return cls(config.norm, config.norm_epsilon, config.norm_shift, width, config.norm_bias)

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        y = y * (self.scale[...].astype(jnp.float32) + self.shift)
        if self.biased:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def softcap(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """``cap · tanh(x / cap)``, or ``x`` itself where there is no cap."""
    return cap * jnp.tanh(x / cap) if cap else x


def _rotate(
    x: Float[Array, "batch tokens heads width"],
    positions: Int[Array, "batch tokens"],
    config: NetworkConfig,
    kind: LayerKind,
) -> Float[Array, "batch tokens heads width"]:
    """Rotary embedding of ``x [batch, tokens, heads, width]``."""
    frequencies = jnp.asarray(kind.rope_frequencies, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = (jnp.cos(angles) * kind.rope_scale)[:, :, None], (jnp.sin(angles) * kind.rope_scale)[:, :, None]
    pairs = len(kind.rope_frequencies)
    if config.rope_adjacent:
        turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
        first, second = jnp.moveaxis(turned.reshape(*x.shape[:-1], pairs, 2), -1, 0)
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1)
        return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * pairs).astype(x.dtype), rest], -1)
    first, second = x[..., :pairs].astype(jnp.float32), x[..., pairs : 2 * pairs].astype(jnp.float32)
    # Written into place: a CPU puts halves together element by element.
    for start, half in ((0, first * cos - second * sin), (pairs, second * cos + first * sin)):
        x = jax.lax.dynamic_update_slice_in_dim(x, half.astype(x.dtype), start, -1)
    return x


def _buckets(buckets: int, furthest: int) -> Int[np.ndarray, " distances"]:
    """The bucket of every distance up to the furthest that counts, in one direction: ``[furthest + 1]`` int."""
    near, distance = buckets // 2, np.arange(furthest + 1)
    # On the host, in float32: the last digit decides where a bucket begins, and in that one devices differ.
    share = np.log(np.maximum(distance, 1).astype(np.float32) / near) / math.log(furthest / near)
    far = np.minimum(near + (share * (buckets - near)).astype(np.int32), buckets - 1)
    return np.where(distance < near, distance, far).astype(np.int32)


def relative_bias(
    config: NetworkConfig, table: Float[Array, "buckets heads"], positions: Int[Array, "batch tokens"], seen: int
) -> Float[Array, "batch heads tokens seen"]:
    """T5's bias by relative position: near ones have buckets of their own, far ones share them, ever wider.

    Args:
        config: the network's description.
        table: ``[buckets, heads]``.
        positions: of the tokens, ``[batch, tokens]`` int.
        seen: how many tokens they look at, from the first on.

    Returns:
        ``[batch, heads, tokens, seen]``, float32.

    Source: Raffel et al. 2020, section 2.1.
    """
    ahead = jnp.arange(seen)[None, None] - positions[..., None]
    buckets, first = config.relative_buckets, jnp.zeros_like(ahead)
    if config.causal:
        distance = jnp.maximum(-ahead, 0)
    else:
        buckets //= 2
        first, distance = jnp.where(ahead > 0, buckets, 0), jnp.abs(ahead)
    furthest = config.relative_distance
    bucket = first + jnp.asarray(_buckets(buckets, furthest))[jnp.minimum(distance, furthest)]
    return jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 1)


def _attend(
    config: NetworkConfig,
    query: Float[Array, "batch tokens heads width"],
    key: Float[Array, "batch groups seen width"],
    value: Float[Array, "batch groups seen inner"],
    hide: Callable[[Array], Array],
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch tokens outer"]:
    """Weighted values of ``[batch, key_value_heads, seen, inner]`` for queries ``[batch, tokens, heads, width]``.

    What a head's sink takes of its weights is lost.
    """
    (batch, tokens, heads, width), (_, groups, seen, _) = query.shape, key.shape
    # Groups of heads that read the same keys side by side, so that each product is of two plain matrices.
    query = jnp.moveaxis(query.reshape(batch, tokens, groups, -1, width), 1, 3)
    query = query.reshape(batch, groups, -1, width)
    scores = jnp.einsum("bkqh,bksh->bkqs", query, key, preferred_element_type=jnp.float32)
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    scores = scores.reshape(batch, groups, -1, tokens, seen)
    scores = hide(softcap(scores * scale, config.attention_cap))
    sink = (
        jnp.full((groups, 1, 1, 1), -jnp.inf) if sinks is None else sinks.astype(jnp.float32).reshape(groups, -1, 1, 1)
    )
    # What is divided are a head's few sums, not its many weights, forwards and, above all, backwards.
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, -1, keepdims=True), sink))
    weights = jnp.exp(scores - largest).astype(value.dtype)
    total = jnp.sum(weights, -1, keepdims=True, dtype=jnp.float32) + jnp.exp(sink - largest)
    weights = weights.reshape(batch, groups, -1, seen)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights, value, preferred_element_type=jnp.float32)
    mixed = (mixed / total.reshape(batch, groups, -1, 1)).astype(value.dtype)
    return jnp.moveaxis(mixed.reshape(batch, heads, tokens, -1), 1, 2).reshape(batch, tokens, -1)


def _remember(
    key: Float[Array, "batch tokens groups width"],
    value: Float[Array, "batch tokens groups inner"],
    positions: Int[Array, "batch tokens"],
    cache: Cache | None,
    seen: Seen | None,
) -> tuple[Float[Array, "batch groups seen width"], Float[Array, "batch groups seen inner"], Cache | None]:
    """Keys and values of all that was read, head after head, and the grown cache."""
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    if seen is not None:
        if cache is not None:
            key, value = (jnp.concatenate(pair, 2) for pair in ((cache.key, key), (cache.value, value)))
        return key, value, Cache(key, value)
    if cache is None:
        return key, value, None
    # Positions past the cache's end belong to padding; dropping them keeps real entries whole.
    put = jax.vmap(lambda kept, new, where: kept.at[:, where].set(new.astype(kept.dtype), mode="drop"))
    key, value = put(cache.key, key, positions), put(cache.value, value, positions)
    return key, value, cache._replace(key=key, value=value)


def _hide_unseen(
    config: NetworkConfig,
    kind: LayerKind,
    scores: Float[Array, "batch groups group tokens seen"],
    positions: Int[Array, "batch tokens"],
    seen: Seen | None,
) -> Float[Array, "batch groups group tokens seen"]:
    """Scores with `HIDDEN` at what a token does not look at."""
    if not config.causal and not kind.window:
        return scores
    there = jnp.arange(scores.shape[-1])[None] if seen is None else seen.positions
    back = positions[:, :, None] - there[:, None, :]
    back = back if config.causal else jnp.abs(back)
    visible = back >= 0 if seen is None else seen.visible
    visible = visible & (back < kind.window) if kind.window else visible
    return jnp.where(visible[:, None, None], scores, HIDDEN)


def _by_group(bias: Float[Array, "batch heads tokens seen"], groups: int) -> Float[Array, "batch ..."]:
    """A bias ``[batch, heads or 1, tokens, seen]`` with its heads as scores have them, ``key_value_heads, group``."""
    heads = bias.shape[1]
    return bias[:, None] if heads == 1 else bias.reshape(bias.shape[0], heads // groups, groups, *bias.shape[2:])


class Attention(nnx.Module):
    """Self-attention with grouped queries and an optional cache."""

    config: NetworkConfig
    kind: LayerKind
    query: nnx.Linear
    key: nnx.Linear
    value: nnx.Linear
    output: nnx.Linear
    query_norm: Norm
    key_norm: Norm
    sinks: nnx.Param[Float[Array, " heads"]]
    decay: nnx.Param[Float[Array, " groups"]]
    step: nnx.Linear

    def __init__(self, config: NetworkConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.config, self.kind = config, kind
        inner, shared = config.heads * config.head_width, config.key_value_heads * config.head_width
        linear = partial(nnx.Linear, rngs=rngs)
        self.query = linear(config.hidden_size, inner, use_bias=config.query_bias)
        self.key = linear(config.hidden_size, shared, use_bias=config.query_bias and config.key_bias)
        self.value = linear(config.hidden_size, shared, use_bias=config.query_bias)
        self.output = linear(inner, config.hidden_size, use_bias=config.output_bias)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros(config.heads))
        if config.key_scores:
            self.decay = nnx.Param(jnp.zeros(config.key_value_heads))
            self.step = linear(shared, config.key_value_heads, use_bias=config.query_bias)
        if config.query_norm:
            widths = (inner, shared) if config.query_norm_wide else (config.head_width, config.head_width)
            self.query_norm, self.key_norm = (Norm.of(config, width) for width in widths)

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        positions: Int[Array, "batch tokens"],
        cache: Cache | None,
        around: Around,
    ) -> tuple[Float[Array, "batch tokens hidden"], Cache | None]:
        """Mix ``x [batch, tokens, d]`` at the given positions; a cache is read and grown."""
        config, bias, seen, (batch, tokens, _) = self.config, around.bias, around.seen, x.shape
        query, key = self.query(x), self.key(x)
        value = self.value(x)
        if config.query_norm_wide:
            query, key = self.query_norm(query), self.key_norm(key)
        if bound := config.attention_clip:
            query, key, value = (jnp.clip(part, -bound, bound) for part in (query, key, value))
        query = query.reshape(batch, tokens, config.heads, config.head_width)
        key = key.reshape(batch, tokens, config.key_value_heads, config.head_width)
        value = value.reshape(batch, tokens, config.key_value_heads, config.head_width)
        if config.query_norm and not config.query_norm_wide:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.kind.rope_frequencies:
            query, key = (_rotate(part, positions, config, self.kind) for part in (query, key))
        key, value, cache = _remember(key, value, positions, cache, seen)

        def hide(
            scores: Float[Array, "batch groups group tokens seen"],
        ) -> Float[Array, "batch groups group tokens seen"]:
            if config.key_scores:
                scores = scores + self._key_scores(value)[:, :, None, None]
            if bias is not None:
                scores = scores + _by_group(bias, config.heads // config.key_value_heads)
            return _hide_unseen(config, self.kind, scores, positions, seen)

        sinks = self.sinks[...] if config.sinks else None
        return self.output(_attend(config, query, key, value, hide, sinks)), cache

    def _key_scores(self, value: Float[Array, "batch groups seen width"]) -> Float[Array, "batch groups seen"]:
        """What is added to the scores of each key, ``exp(a·softplus(v·D))``, float32."""
        value = jnp.swapaxes(value, 1, 2)
        step = self.step(value.reshape(*value.shape[:2], -1).astype(self.step.kernel[...].dtype)).astype(jnp.float32)
        return jnp.swapaxes(jnp.exp(self.decay[...].astype(jnp.float32) * jax.nn.softplus(step)), 1, 2)


class LatentAttention(nnx.Module):
    """Self-attention whose keys and values are linear functions of one narrow vector ``c`` that all heads read.

    ``qᵢ·Kᵢc = (Kᵢᵀqᵢ)·c``, so that all heads look at ``c`` itself, and what they take of it is multiplied by their
    ``Vᵢ`` afterwards: the cache holds ``c`` and the key that turns, and no key or value of a head is ever made.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1 and appendix C.
    """

    config: NetworkConfig
    kind: LayerKind
    latent: Latent
    query_down: nnx.Linear
    query_norm: Norm
    query_up: nnx.Linear
    query: nnx.Linear
    down: nnx.Linear
    norm: Norm
    up: nnx.Linear
    output: nnx.Linear

    def __init__(self, config: NetworkConfig, kind: LayerKind, latent: Latent, *, rngs: nnx.Rngs):
        self.config, self.kind, self.latent = config, kind, latent
        linear, inner = partial(nnx.Linear, rngs=rngs), config.heads * config.head_width
        if latent.query_width:
            self.query_down = linear(config.hidden_size, latent.query_width, use_bias=config.query_bias)
            self.query_norm = Norm("rms", latent.epsilon, 0.0, latent.query_width)
            self.query_up = linear(latent.query_width, inner, use_bias=False)
        else:
            self.query = linear(config.hidden_size, inner, use_bias=False)
        self.down = linear(config.hidden_size, latent.width + latent.turning, use_bias=config.query_bias)
        self.norm = Norm("rms", latent.epsilon, 0.0, latent.width)
        made = config.heads * (config.head_width - latent.turning + latent.value_width)
        self.up = linear(latent.width, made, use_bias=False)
        self.output = linear(config.heads * latent.value_width, config.hidden_size, use_bias=config.output_bias)

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        positions: Int[Array, "batch tokens"],
        cache: Cache | None,
        around: Around,
    ) -> tuple[Float[Array, "batch tokens hidden"], Cache | None]:
        """Mix ``x [batch, tokens, d]`` at the given positions; a cache is read and grown."""
        config, latent, (batch, tokens, _) = self.config, self.latent, x.shape
        still = config.head_width - latent.turning
        query = self.query_up(self.query_norm(self.query_down(x))) if latent.query_width else self.query(x)
        query = query.reshape(batch, tokens, config.heads, config.head_width)
        narrow, key = jnp.split(self.down(x)[:, :, None], [latent.width], -1)
        turned, key = (_rotate(part, positions, config, self.kind) for part in (query[..., still:], key))
        key, narrow, cache = _remember(key, self.norm(narrow), positions, cache, around.seen)
        up = self.up.kernel[...].astype(x.dtype).reshape(latent.width, config.heads, -1)
        query = jnp.concatenate([jnp.einsum("bthn,chn->bthc", query[..., :still], up[..., :still]), turned], -1)
        hide = partial(_hide_unseen, config, self.kind, positions=positions, seen=around.seen)
        mixed = _attend(config, query, jnp.concatenate([narrow, key], -1), narrow, hide)
        mixed = mixed.reshape(batch, tokens, config.heads, latent.width)
        values = jnp.einsum("bthc,chv->bthv", mixed, up[..., still:])
        return self.output(values.reshape(batch, tokens, -1)), cache


class CrossAttention(nnx.Module):
    """Attention of a decoder's tokens to an encoder's states."""

    config: NetworkConfig
    query: nnx.Linear
    key: nnx.Linear
    value: nnx.Linear
    output: nnx.Linear

    def __init__(self, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.config = config
        inner, linear = config.heads * config.head_width, partial(nnx.Linear, rngs=rngs)
        self.query = linear(config.hidden_size, inner, use_bias=config.query_bias)
        self.key = linear(config.hidden_size, inner, use_bias=config.query_bias and config.key_bias)
        self.value = linear(config.hidden_size, inner, use_bias=config.query_bias)
        self.output = linear(inner, config.hidden_size, use_bias=config.output_bias)

    def read(self, states: Float[Array, "batch source hidden"], bias: Float[Array, "batch 1 1 source"]) -> States:
        """States ``[batch, source, d]`` and their bias as `Cache` keeps them."""
        shape = (*states.shape[:2], self.config.heads, self.config.head_width)
        key, value = (jnp.swapaxes(part(states).reshape(shape), 1, 2) for part in (self.key, self.value))
        return key, value, bias

    def __call__(self, x: Float[Array, "batch tokens hidden"], states: States) -> Float[Array, "batch tokens hidden"]:
        """What ``x [batch, tokens, d]`` takes from the states that `read` returned."""
        config, (key, value, bias) = self.config, states
        query = self.query(x).reshape(*x.shape[:2], config.heads, config.head_width)
        return self.output(_attend(config, query, key, value, lambda scores: scores + _by_group(bias, 1)))


class Block(nnx.Module):
    """One block without its FFN: `enter` gives the FFN's input, `leave` takes its output.

    Experts are part of the block: `beside` gives what they add to the output of the FFN, which is then no wider than
    the patches in it.
    """

    config: NetworkConfig
    kind: LayerKind
    norm_1: Norm
    attention: Attention | LatentAttention
    norm_cross: Norm
    cross: CrossAttention
    norm_2: Norm
    norm_attention: Norm
    norm_ffn: Norm
    gate_attention: nnx.Param[Float[Array, " hidden"]]
    gate_ffn: nnx.Param[Float[Array, " hidden"]]
    experts: Experts

    def __init__(self, config: NetworkConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.config, self.kind = config, kind
        if kind.mixed and config.mixture is not None:
            self.experts = Experts(config.mixture, config.hidden_size, config.activation, rngs=rngs)
        if config.pre_norm and kind.normed:
            self.norm_1 = Norm.of(config)
        if config.latent is not None:
            self.attention = LatentAttention(config, kind, config.latent, rngs=rngs)
        else:
            self.attention = Attention(config, kind, rngs=rngs)
        if config.encoder:
            self.norm_cross = Norm.of(config)
            self.cross = CrossAttention(config, rngs=rngs)
        if config.block != "shared" and config.pre_norm:
            self.norm_2 = Norm.of(config)
        if config.sandwich:
            self.norm_attention, self.norm_ffn = Norm.of(config), Norm.of(config)
        if config.residual_gates:
            self.gate_attention, self.gate_ffn = (nnx.Param(jnp.ones(config.hidden_size)) for _ in range(2))

    def enter(
        self,
        x: Float[Array, "batch tokens hidden"],
        positions: Int[Array, "batch tokens"],
        cache: Cache | None,
        around: Around,
    ) -> tuple[Float[Array, "batch tokens hidden"], Float[Array, "batch tokens hidden"], Cache | None]:
        """From the residual stream to the stream beside the FFN, the FFN's input, and the grown cache."""
        if self.config.post_norm:
            mixed, cache = self.attention(x, positions, cache, around)
            x = self.norm_1(x + mixed)
            if self.config.encoder:
                x = self.norm_cross(x + self._from_states(x, cache, around))
            return x, x, cache
        read = self.norm_1(x) if self.config.pre_norm and self.kind.normed else x
        mixed, cache = self.attention(read, positions, cache, around)
        if self.config.sandwich:
            mixed = self.norm_attention(mixed)
        kept = x * self.gate_attention[...].astype(x.dtype) if self.config.residual_gates else x
        residual = kept + self._scaled(mixed)
        if self.config.encoder:
            residual = residual + self._from_states(self.norm_cross(residual), cache, around)
        if self.config.block == "shared":
            return residual, read, cache
        if not self.config.pre_norm:
            return residual, residual, cache
        return residual, self.norm_2(residual if self.config.block == "serial" else x), cache

    def _from_states(
        self, x: Float[Array, "batch tokens hidden"], cache: Cache | None, around: Around
    ) -> Float[Array, "batch tokens hidden"]:
        if cache is not None and cache.states is not None:
            return self.cross(x, cache.states)
        if around.states is None or around.states_bias is None:
            raise TPatchError("a decoder with an encoder was run without its states; encode the source first")
        return self.cross(x, self.cross.read(around.states, around.states_bias))

    def beside(self, query: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"] | None:
        """What the experts make of the FFN's input, where there are any."""
        return self.experts(query) if self.kind.mixed else None

    def leave(
        self, residual: Float[Array, "*batch hidden"], output: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch hidden"]:
        """From the stream beside the FFN and the FFN's output to the residual stream."""
        if self.config.post_norm:
            return self.norm_2(residual + output)
        if self.config.residual_gates:
            residual = residual * self.gate_ffn[...].astype(residual.dtype)
        return residual + self._scaled(self.norm_ffn(output) if self.config.sandwich else output)

    def _scaled(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        scale = self.config.residual_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)
