"""Running some more tokens on top of those that were read: a key-value cache in every layer."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from tpatch_jax.models.blocks import Around, Cache
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.embedded import Embedded, tokens_of
from tpatch_jax.models.stack import (
    attention_bias,
    embed_tokens,
    encode,
    grow_block,
    read_states,
    run_block,
    source_bias,
    without_ffn,
)
from tpatch_jax.typing import Params

__all__ = ["Cache", "begin", "decode", "empty_cache"]


def empty_cache(
    config: NetworkConfig,
    params: Params,
    batch: int,
    context: int,
    source: Num[Array, "batch ..."] | Embedded | None = None,
) -> list[Cache]:
    """A key-value cache for every layer, for ``batch`` lanes of at most ``context`` tokens.

    Args:
        config: the network's description.
        params: the network's parameters.
        batch: how many lanes.
        context: at most so many tokens.
        source: of an encoder-decoder what its encoder reads; see `tpatch_jax.models.stack.Pair`.

    Returns:
        A cache without any token; what the decoder reads of the encoder's states is in it.
    """
    dtype = params["embed"]["embedding"].dtype
    shape, latent = (batch, config.key_value_heads, context), config.latent
    # One array for all, for none is ever changed.
    if latent is None:
        key = value = jnp.zeros((*shape, config.head_width), dtype)
    else:
        key, value = (jnp.zeros((*shape, width), dtype) for width in (latent.turning, latent.width))
    empty = [Cache(key, value) for _ in range(config.layers)]
    if source is None:
        return empty
    states, bias = encode(config, params, source), source_bias(config, source)
    return [
        cache._replace(states=read_states(config, without_ffn(params["layers"][index]), states, bias))
        for index, cache in enumerate(empty)
    ]


def decode(
    config: NetworkConfig,
    params: Params,
    tokens: Int[Array, "batch tokens"] | Embedded,
    positions: Int[Array, "batch tokens"],
    cache: list[Cache],
    *,
    in_place: bool = False,
) -> tuple[Float[Array, "batch tokens hidden"], list[Cache]]:
    """Run some more tokens on top of a cache.

    Args:
        config: the network's description.
        params: the network's parameters.
        tokens: ``[batch, tokens]`` int; or the same with embeddings in the place of some.
        positions: their positions, ``[batch, tokens]`` int; a position past the cache's end marks padding.
        cache: from `empty_cache` or an earlier call.
        in_place: write into the cache's own arrays, which are then not to be used again: those of an earlier call, as
            an empty cache is one array for all layers.

    Returns:
        The residual stream after the last block, ``[batch, tokens, d]`` (see `logits`), and the new cache.
    """
    x, grown = embed_tokens(config, params, tokens, positions), []
    around = Around(attention_bias(config, params, tokens_of(tokens), positions, cache[0].key.shape[2]))
    for index in range(config.layers):
        kind, weights = config.kind(index), params["layers"][index]
        if in_place:
            x, entry = grow_block(config, kind, weights, x, positions, *cache[index], around)
        else:
            x, entry = run_block(config, kind, weights, x, positions, cache[index], around)
        grown.append(entry)
    return x, grown


def begin(config: NetworkConfig, params: Params, tokens: Int[Array, "texts tokens"]) -> list[Cache]:
    """What `trace_after` needs of the texts with which its rows begin.

    Args:
        config: the network's description, of a decoder.
        params: the network's parameters.
        tokens: ``[texts, tokens]`` int, padded on the right with anything.

    Returns:
        Keys and values of their tokens in every layer.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decode(config, params, tokens, positions, empty_cache(config, params, tokens.shape[0], tokens.shape[1]))[1]
