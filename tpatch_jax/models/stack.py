"""A stack of blocks: its compiled programs, what they read of a batch, and all of them in a row."""

from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from tpatch_jax.core import ffn
from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.int8 import plain, plain_tree, take_rows
from tpatch_jax.core.products import in_float32, round_products
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.blocks import HIDDEN, Around, Block, Cache, States, relative_bias
from tpatch_jax.models.config import LayerKind, NetworkConfig
from tpatch_jax.models.embedded import Embedded, tokens_of
from tpatch_jax.models.encoder_states import keep_states
from tpatch_jax.models.experts import Routes
from tpatch_jax.models.shapes import block_graph, norm_graph
from tpatch_jax.typing import Params

__all__ = [
    "OFFSET",
    "STEPS",
    "Batch",
    "Pair",
    "attention_bias",
    "embed_audio",
    "embed_batch",
    "embed_images",
    "embed_rows",
    "embed_tokens",
    "encode",
    "enter_block",
    "feed_forward",
    "grow_block",
    "leave_block",
    "normalise",
    "padding_bias",
    "read_states",
    "residuals",
    "routes",
    "run_block",
    "source_bias",
    "without_ffn",
]

OFFSET, STEPS = 4.0, 2.0**18
"""How the numbers of log-mel frames, which lie around 0, become tokens: see `tpatch_jax.models.config.AudioInput`."""


class Pair(NamedTuple):
    """The batch of an encoder-decoder.

    Attributes:
        source: what the encoder reads, ``[batch, source]`` int, padded on the right with negative numbers; or the same
            with embeddings in the place of some tokens; of one that reads sound also ``input_features [batch, mels,
            frames]`` float, as transformers makes them.
        target: what the decoder reads, ``[batch, tokens]`` int, padded on the right with anything.
    """

    source: Int[Array, "batch source"] | Embedded | Float[Array, "batch mels frames"]
    target: Int[Array, "batch tokens"]


Batch: TypeAlias = (
    Int[Array, "batch tokens"]
    | Embedded
    | Float[Array, "batch channels height width"]
    | Float[Array, "batch mels frames"]
    | Pair
)
"""What a network is run on; see `tpatch_jax.models.networks`."""


def _block(config: NetworkConfig, kind: LayerKind, params: Params) -> Block:
    weights = plain_tree({name: params[name] for name in params if name != "ffn"})
    return nnx.merge(block_graph(config, kind)[0], weights)


@partial(jax.jit, static_argnames=("config", "kind"))
def enter_block(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
    cache: Cache | None,
    around: Around,
) -> tuple[
    Float[Array, "batch tokens hidden"], Float[Array, "batch tokens hidden"], Float[Array, "batch tokens hidden"]
]:
    """From the residual stream to the stream beside a block's FFN, that FFN's input, and its output."""
    block = _block(config, kind, params)
    residual, query, _ = block.enter(x, positions, cache, around)
    return residual, query, ffn.apply(params["ffn"], query, config.activation, block.beside(query))


@partial(jax.jit, static_argnames=("config", "kind"))
def feed_forward(
    config: NetworkConfig, kind: LayerKind, params: Params, query: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch hidden"]:
    """The output of a layer's feed-forward network, experts and what is attached included."""
    return ffn.apply(params["ffn"], query, config.activation, _block(config, kind, params).beside(query))


@partial(jax.jit, static_argnames=("config", "kind"))
def leave_block(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    residual: Float[Array, "*batch hidden"],
    output: Float[Array, "*batch hidden"],
) -> Float[Array, "*batch hidden"]:
    """From the stream beside a block's FFN and that FFN's output to the residual stream."""
    return _block(config, kind, params).leave(residual, output)


@partial(jax.jit, static_argnames=("config", "kind", "rounded"))
def run_block(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
    cache: Cache | None,
    around: Around,
    rounded: bool = False,
) -> tuple[Float[Array, "batch tokens hidden"], Cache | None]:
    """A whole block: the residual stream after it, and the grown cache.

    With ``rounded`` its matrices may be in bfloat16, and its products are; see `tpatch_jax.core.products`.
    """
    if rounded:
        run = round_products(lambda *read: run_block(config, kind, *read))
        return run(in_float32(params), x, positions, cache, around)
    block = _block(config, kind, params)
    residual, query, cache = block.enter(x, positions, cache, around)
    output = ffn.apply(params["ffn"], query, config.activation, block.beside(query))
    return block.leave(residual, output), cache


@partial(jax.jit, static_argnames=("config", "kind"), donate_argnames=("key", "value"))
def grow_block(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Float[Array, "batch tokens hidden"],
    positions: Int[Array, "batch tokens"],
    key: Float[Array, "batch groups seen width"],
    value: Float[Array, "batch groups seen inner"],
    states: States | None,
    around: Around,
) -> tuple[Float[Array, "batch tokens hidden"], Cache | None]:
    """`run_block` that writes into the cache's own arrays, which must not be used again."""
    return run_block(config, kind, params, x, positions, Cache(key, value, states), around)


@partial(jax.jit, static_argnames="config")
def read_states(
    config: NetworkConfig,
    params: Params,
    states: Float[Array, "batch source hidden"],
    bias: Float[Array, "batch 1 1 source"],
) -> tuple[
    Float[Array, "batch heads source width"], Float[Array, "batch heads source width"], Float[Array, "batch 1 1 source"]
]:
    """What a block's cross-attention reads of an encoder's states, as a `Cache` keeps it."""
    return _block(config, config.kind(0), params).cross.read(states, bias)


def embed_tokens(
    config: NetworkConfig,
    params: Params,
    tokens: Int[Array, "batch tokens"] | Embedded,
    positions: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens hidden"]:
    """The residual stream before the first block."""
    names = ("embed", "positions", "token_types", "norm_embed", "embed_project")
    tables = {name: params[name] for name in names if name in params}
    given = (tokens.embeddings, tokens.positions) if isinstance(tokens, Embedded) else None
    return embed_rows(config, tables, tokens_of(tokens), positions, given)


@partial(jax.jit, static_argnames="config")
def embed_rows(
    config: NetworkConfig, params: Params, tokens: Array, positions: Array, given: tuple[Array, Array] | None
) -> Array:
    """What `embed_tokens` returns, in one compiled program."""
    tokens = tokens if config.causal else jnp.maximum(tokens, 0)
    # What stands for padding may be no token at all; `take` alone would make it NaN, which attention carries to others.
    x = take_rows(params["embed"]["embedding"], tokens)
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if given is not None:
        # In the place of what the table gives, scaled: all that follows is theirs as well.
        vectors, places = given
        x = x.at[jnp.arange(x.shape[0])[:, None], places].set(vectors.astype(x.dtype), mode="drop")
    if config.positions:
        # Padding stands past the last position; the clipped row is never looked at.
        table = params["positions"]["embedding"]
        x = x + jnp.take(table, positions + config.position_offset, axis=0, mode="clip")
    if config.sinusoids:
        x = x + _sinusoids(positions, x.shape[-1]).astype(x.dtype)
    if config.token_types:
        x = x + params["token_types"]["embedding"][0]
    x = normalise(config, params["norm_embed"], x) if config.embed_norm else x
    if config.embed_width:
        x = x @ params["embed_project"]["kernel"] + params["embed_project"]["bias"]
    return x


def _sinusoids(positions: Int[Array, "batch tokens"], width: int) -> Float[Array, "batch tokens width"]:
    """Sines of each position in the first half, cosines in the other, ever slower.

    Source: Vaswani et al. 2017, section 3.5; the halves are those of Marian.
    """
    speeds = 10_000.0 ** (-2 * np.arange(width // 2) / width)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(speeds, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def normalise(config: NetworkConfig, params: Params, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
    """A norm of the network's kind."""
    return nnx.merge(norm_graph(config, x.shape[-1])[0], params)(x)


@jax.jit
def padding_bias(tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch 1 1 tokens"]:
    """`HIDDEN` at padding, as attention to these tokens adds it."""
    return jnp.where(tokens < 0, jnp.float32(HIDDEN), jnp.float32(0))[:, None, None]


def source_bias(config: NetworkConfig, source: Num[Array, "batch ..."] | Embedded) -> Float[Array, "batch 1 1 source"]:
    """What cross-attention adds to its scores at each of an encoder's states: `HIDDEN` at padding.

    Args:
        config: the network's description, of an encoder-decoder.
        source: what its encoder reads. Sound has no padding: what follows it is silence, which is seen.
    """
    audio = config.encoder.audio if config.encoder else None
    tokens = tokens_of(source)
    return padding_bias(tokens) if audio is None else jnp.zeros((tokens.shape[0], 1, 1, audio.positions))


@partial(jax.jit, static_argnames=("config", "seen"))
def _relative(config: NetworkConfig, params: Params, positions: Array, seen: int) -> Array:
    return relative_bias(config, params["embedding"], positions, seen)


def attention_bias(
    config: NetworkConfig,
    params: Params,
    tokens: Int[Array, "batch tokens"],
    positions: Int[Array, "rows tokens"],
    seen: int,
) -> Float[Array, "rows heads tokens seen"] | None:
    """What self-attention adds to its scores, if anything; one row of positions may serve all rows of tokens."""
    bias = None if config.causal else padding_bias(tokens)
    if config.relative_buckets:
        relative = _relative(config, params["relative"], positions, seen)
        return relative if bias is None else relative + bias
    return bias


@partial(jax.jit, static_argnums=0)
def _positions(shape: tuple[int, int]) -> Int[Array, "batch tokens"]:
    return jnp.broadcast_to(jnp.arange(shape[1]), shape)


def embed_batch(
    config: NetworkConfig, params: Params, batch: Batch
) -> tuple[Int[Array, "batch tokens"], Float[Array, "batch tokens hidden"], Int[Array, "batch tokens"], Around]:
    """The tokens that the stack reads, their embeddings and positions, and what all blocks read besides.

    Of an encoder-decoder these are the decoder's.

    Raises:
        TPatchError: the batch is not of the kind that the network reads.
    """
    if config.image is not None:
        x = embed_images(config, params, batch)
        positions = _positions(x.shape[:2])
        # All positions are there: an image has no padding.
        return positions, x, positions, Around()
    if config.audio is not None:
        x = embed_audio(config, params, batch)
        positions = _positions(x.shape[:2])
        return positions, x, positions, Around()
    if isinstance(batch, Pair) != (config.encoder is not None):
        wanted = "a Pair of source and target" if config.encoder else "one array of token ids"
        raise TPatchError(f"this {config.architecture} is run on {wanted}; give it that")
    if isinstance(batch, Pair):
        tokens = batch.target
        around = Around(None, encode(config, params, batch.source), source_bias(config, batch.source))
    else:
        tokens, around = batch, Around()
    read, tokens = tokens, tokens_of(tokens)
    if getattr(tokens, "ndim", 0) != 2:
        kind = f"an array of shape {list(tokens.shape)}" if hasattr(tokens, "shape") else f"a {type(tokens).__name__}"
        raise TPatchError(f"the tokens are {kind}; give an array of token ids, [batch, tokens]")
    positions = _positions(tokens.shape)
    # All rows have the same positions here, so one row of relative positions serves them all.
    single = positions[:1] if config.relative_buckets else positions
    around = around._replace(bias=attention_bias(config, params, tokens, single, tokens.shape[1]))
    return tokens, embed_tokens(config, params, read, positions), positions, around


def embed_images(config: NetworkConfig, params: Params, batch: Batch) -> Float[Array, "batch positions hidden"]:
    """The residual stream before the first block, of images: class token, distillation token if any, patches.

    Args:
        config: the network's description.
        params: the network's parameters.
        batch: pixels as bytes, ``[batch, height · width · channels]`` int, what follows them being padding; or as a
            checkpoint's image processor gives them, ``pixel_values [batch, channels, height, width]`` float.

    Raises:
        TPatchError: the batch is none of these.
    """
    image = config.image
    if image is None:
        raise TPatchError(f"this {config.architecture} reads tokens and no images")
    shape, dtype = getattr(batch, "shape", ()), getattr(batch, "dtype", np.dtype(object))
    height, width = image.size
    whole = len(shape) == 4 and shape[1:] == (image.channels, height, width) and jnp.issubdtype(dtype, jnp.floating)
    if not whole and not (len(shape) == 2 and shape[1] >= image.pixels and jnp.issubdtype(dtype, jnp.integer)):
        kind = f"{dtype} {list(shape)}" if hasattr(batch, "shape") else f"a {type(batch).__name__}"
        raise TPatchError(
            f"the images are {kind}; give pixel_values [batch, {image.channels}, {height}, {width}] of floats, or "
            f"pixels [batch, {image.pixels}] of whole numbers from 0 to 255"
        )
    assert not isinstance(batch, Pair | Embedded)
    return _embedded_images(config, {name: params[name] for name in ("image", "positions")}, batch)


@partial(jax.jit, static_argnames="config")
def _embedded_images(config: NetworkConfig, params: Params, batch: Num[Array, "batch ..."]) -> Array:
    image = config.image
    assert image is not None
    (rows, columns), (height, width) = image.grid, image.patch
    weights = params["image"]
    kernel = weights["patches"]["kernel"]
    if batch.ndim == 2:
        pixels = batch[:, : image.pixels].reshape(-1, *image.size, image.channels).astype(jnp.float32)
        mean, std = jnp.asarray(image.mean, jnp.float32), jnp.asarray(image.std, jnp.float32)
        values = jnp.moveaxis((pixels * jnp.float32(image.scale) - mean) / std, -1, 1)
    else:
        values = batch
    # What does not fill a patch at the right or the bottom is left out, as a convolution leaves it out.
    values = values[:, :, : rows * height, : columns * width].astype(kernel.dtype)
    cut = values.reshape(-1, image.channels, rows, height, columns, width)
    cut = jnp.transpose(cut, (0, 2, 4, 1, 3, 5)).reshape(-1, rows * columns, kernel.shape[0])
    x = cut @ kernel + weights["patches"]["bias"]
    tokens = [weights[name] for name in ("class_token", "distillation_token")[: image.first]]
    first = jnp.broadcast_to(jnp.stack(tokens), (x.shape[0], len(tokens), x.shape[-1]))
    return jnp.concatenate([first, x], 1) + params["positions"]["embedding"]


def embed_audio(config: NetworkConfig, params: Params, batch: Batch) -> Float[Array, "batch positions hidden"]:
    """The residual stream before the first block, of sound: two convolutions, each with GELU, and positions.

    Args:
        config: the encoder's description.
        params: the encoder's parameters.
        batch: frames as tokens, ``[batch, numbers]`` int, padded with negative numbers; or as a checkpoint's feature
            extractor gives them, ``input_features [batch, mels, frames]`` float.

    Raises:
        TPatchError: the batch is none of these.
    """
    audio = config.audio
    if audio is None:
        raise TPatchError(f"this {config.architecture} reads tokens and no sound")
    shape, dtype = getattr(batch, "shape", ()), getattr(batch, "dtype", np.dtype(object))
    whole = len(shape) == 3 and shape[1:] == (audio.mels, audio.frames) and jnp.issubdtype(dtype, jnp.floating)
    if not whole and not (len(shape) == 2 and shape[1] <= audio.numbers and jnp.issubdtype(dtype, jnp.integer)):
        kind = f"{dtype} {list(shape)}" if hasattr(batch, "shape") else f"a {type(batch).__name__}"
        raise TPatchError(
            f"the sound is {kind}; give input_features [batch, {audio.mels}, {audio.frames}] of floats, or tokens "
            f"[batch, at most {audio.numbers}]"
        )
    assert not isinstance(batch, Pair)
    return _embedded_audio(config, {name: params[name] for name in ("audio", "positions")}, batch)


@partial(jax.jit, static_argnames="config")
def _embedded_audio(config: NetworkConfig, params: Params, batch: Num[Array, "batch ..."]) -> Array:
    audio = config.audio
    assert audio is not None
    if batch.ndim == 2:
        values = batch.astype(jnp.float32) / STEPS - OFFSET
        # The feature extractor raises all that is fainter than the loudest by eight powers of ten, silence among it.
        silence = jnp.max(jnp.where(batch < 0, -jnp.inf, values), 1, keepdims=True) - 2
        values = jnp.where(batch < 0, silence, values)
        rest = jnp.broadcast_to(silence, (batch.shape[0], audio.numbers - batch.shape[1]))
        x = jnp.concatenate([values, rest], 1).reshape(-1, audio.frames, audio.mels)
    else:
        x = jnp.swapaxes(batch, 1, 2)
    weights = params["audio"]
    for name, stride in (("first", 1), ("second", 2)):
        kernel, bias = plain(weights[name]["kernel"]), weights[name]["bias"]
        width = 3
        parts = kernel.reshape(-1, width, kernel.shape[-1])
        beside = jnp.pad(x.astype(kernel.dtype), ((0, 0), (1, 1), (0, 0)))
        length = x.shape[1] // stride
        products = (beside[:, at : at + stride * length : stride] @ parts[:, at] for at in range(width))
        x = ACTIVATIONS["gelu"](sum(products, start=bias))
    return x + params["positions"]["embedding"]


def encode(
    config: NetworkConfig, params: Params, source: Num[Array, "batch ..."] | Embedded
) -> Float[Array, "batch source hidden"]:
    """What the encoder of an encoder-decoder makes of its source.

    Args:
        config: the network's description.
        params: the network's parameters.
        source: what the encoder reads; see `Pair`.

    Returns:
        Its states, ``[batch, source, d]``.

    Raises:
        TPatchError: the network has no encoder beside its decoder.
    """
    inner = config.encoder
    if inner is None:
        raise TPatchError(f"this {config.architecture} has no encoder beside its decoder; only an encoder-decoder has")
    if inner.audio is not None and not isinstance(source, Embedded):
        return keep_states(inner, params["encoder"], source, lambda: _encoded(config, inner, params, source))
    return _encoded(config, inner, params, source)


def _encoded(
    config: NetworkConfig, inner: NetworkConfig, params: Params, source: Num[Array, "batch ..."] | Embedded
) -> Array:
    weights = {"embed": params["embed"], **params["encoder"]}
    x = residuals(inner, weights, source)[-1]
    return x if inner.post_norm else _final_norm(inner, weights["norm"], x)


@partial(jax.jit, static_argnames="config")
def _final_norm(config: NetworkConfig, params: Params, x: Array) -> Array:
    return normalise(config, params, x)


def without_ffn(layer: Params) -> Params:
    """A layer's parameters but for its FFN's, so that a wider FFN has nothing compiled again that does not read it."""
    return {name: entry for name, entry in layer.items() if name != "ffn"}


def residuals(config: NetworkConfig, params: Params, batch: Batch) -> list[Float[Array, "batch tokens hidden"]]:
    """The residual stream after every block, before the final norm."""
    _, x, positions, around = embed_batch(config, params, batch)
    streams = []
    for index in range(config.layers):
        x, _ = run_block(config, config.kind(index), params["layers"][index], x, positions, None, around)
        streams.append(x)
    return streams


def routes(config: NetworkConfig, params: Params, batch: Batch) -> dict[int, Routes]:
    """Which experts each token goes to, by the layers that have any.

    Args:
        config: the network's description.
        params: the network's parameters.
        batch: what to run it on.

    Returns:
        Of each such layer experts and their weights, ``[batch, tokens, active]``.

    Example:
        >>> routes(model.config, model.params, jnp.asarray([[1, 2, 3]]))[0].expert.shape  # doctest: +SKIP
        (1, 3, 8)
    """
    _, x, positions, around = embed_batch(config, params, batch)
    chosen = {}
    for index in range(config.layers):
        kind, weights = config.kind(index), params["layers"][index]
        residual, query, output = enter_block(config, kind, weights, x, positions, None, around)
        if kind.mixed:
            chosen[index] = _route(config, kind, without_ffn(weights), query)
        x = leave_block(config, kind, without_ffn(weights), residual, output)
    return chosen


@partial(jax.jit, static_argnames=("config", "kind"))
def _route(config: NetworkConfig, kind: LayerKind, params: Params, query: Array) -> Routes:
    return _block(config, kind, params).experts.route(query)
