"""All networks: Flax NNX modules inside, pure functions over a nested dict of parameters outside.

A network is run on a batch. That of a decoder is ``[batch, tokens]`` int, padded on the right with anything; that of an
encoder is the same, padded with negative numbers, which no token sees; that of an encoder-decoder is a `Pair` of one
for its encoder and one for its decoder.

The parameters are ``{"embed": …, "positions"?: …, "layers": {0: {"norm_1", "attention", "norm_2", "ffn"}, …},
"norm"?: …, "head"?: …}``, with ``"classifier"`` in place of ``"head"`` where labels are told apart, and the encoder of
an encoder-decoder under ``"encoder"``; `tpatch_jax.models.blocks` has the modules.
The feed-forward network of every block is not a module but the plain function `tpatch_jax.core.ffn.apply` over its own
sub-dict, because that is the place which patches change.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.blocks import HIDDEN, Around, Block, Cache, Norm, relative_bias, softcap
from tpatch_jax.models.config import LayerKind, NetworkConfig

__all__ = [
    "Batch",
    "Cache",
    "Fork",
    "Pair",
    "Trace",
    "apply",
    "argmax",
    "begin",
    "decode",
    "empty_cache",
    "encode",
    "final_weights",
    "finish",
    "finisher",
    "fork",
    "gather",
    "hidden",
    "leave_last",
    "logits",
    "pointwise",
    "residuals",
    "resume",
    "resume_fork",
    "trace",
    "trace_after",
    "unembedding",
    "unembedding_rows",
]

Params = dict[Any, Any]


class Pair(NamedTuple):
    """The batch of an encoder-decoder.

    Attributes:
        source: what the encoder reads, ``[batch, source]`` int, padded on the right with negative numbers.
        target: what the decoder reads, ``[batch, tokens]`` int, padded on the right with anything.
    """

    source: Array
    target: Array


Batch = Array | Pair
"""What a network is run on; see above."""


class Trace(NamedTuple):
    """What `trace` found at the cut: the arrays that editing needs.

    Attributes:
        query: the FFN's input, ``[batch, tokens, d]``.
        output: the FFN's output, ``[batch, tokens, d]``.
        context: whatever `resume` needs besides: the residual stream beside the FFN, ``[batch, tokens, d]``, the
            positions, ``[batch, tokens]``; of an encoder which of them are no padding, ``[batch, tokens]`` bool; and,
            unless the cut is in the last layer, what the layers after it read besides (``"around"``).
        layer: the cut.
    """

    query: Array
    output: Array
    context: dict[str, Any]
    layer: int


@lru_cache(maxsize=64)
def _block_graph(config: NetworkConfig, kind: LayerKind) -> nnx.GraphDef:
    """The structure of a block without its weights, made once per kind of layer."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, kind, rngs=nnx.Rngs(0))))[0]


@lru_cache(maxsize=64)
def _norm_graph(config: NetworkConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Norm.of(config)))[0]


def _block(config: NetworkConfig, kind: LayerKind, params: Params) -> Block:
    return nnx.merge(_block_graph(config, kind), {name: params[name] for name in params if name != "ffn"})


@partial(jax.jit, static_argnames=("config", "kind"))
def _enter(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Array,
    positions: Array,
    cache: Cache | None,
    around: Around,
):
    residual, query, _ = _block(config, kind, params).enter(x, positions, cache, around)
    return residual, query, ffn.apply(params["ffn"], query, config.activation)


@partial(jax.jit, static_argnames=("config", "kind"))
def _leave(config: NetworkConfig, kind: LayerKind, params: Params, residual: Array, output: Array) -> Array:
    return _block(config, kind, params).leave(residual, output)


@partial(jax.jit, static_argnames=("config", "kind"))
def _whole(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Array,
    positions: Array,
    cache: Cache | None,
    around: Around,
):
    block = _block(config, kind, params)
    residual, query, cache = block.enter(x, positions, cache, around)
    return block.leave(residual, ffn.apply(params["ffn"], query, config.activation)), cache


def _continued(begun: Cache, which: Array, tokens: int) -> Cache:
    """Each row's own beginning, with room for so many tokens more."""
    longer = lambda x: jnp.pad(jnp.take(x, which, axis=0), ((0, 0), (0, tokens), (0, 0), (0, 0)))  # noqa: E731
    return Cache(longer(begun.key), longer(begun.value))


@partial(jax.jit, static_argnames=("config", "kind"))
def _enter_after(
    config: NetworkConfig, kind: LayerKind, params: Params, x: Array, positions: Array, begun: Cache, which: Array
):
    return _enter(config, kind, params, x, positions, _continued(begun, which, x.shape[1]), Around())


@partial(jax.jit, static_argnames=("config", "kind"))
def _whole_after(
    config: NetworkConfig, kind: LayerKind, params: Params, x: Array, positions: Array, begun: Cache, which: Array
):
    return _whole(config, kind, params, x, positions, _continued(begun, which, x.shape[1]), Around())[0]


@partial(jax.jit, static_argnames="config")
def _states(config: NetworkConfig, params: Params, states: Array, bias: Array):
    return _block(config, config.kind(0), params).cross.read(states, bias)


def _embed(config: NetworkConfig, params: Params, tokens: Array, positions: Array) -> Array:
    tables = ("embed", "positions", "token_types", "norm_embed")
    return _embedded(config, {name: params[name] for name in tables if name in params}, tokens, positions)


@partial(jax.jit, static_argnames="config")
def _embedded(config: NetworkConfig, params: Params, tokens: Array, positions: Array) -> Array:
    tokens = tokens if config.causal else jnp.maximum(tokens, 0)
    # What stands for padding may be no token at all; `take` alone would make it NaN, which attention spreads.
    x = jnp.take(params["embed"]["embedding"], tokens, axis=0, mode="clip")
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if config.positions:
        # Padding stands past the last position; the clipped row is never looked at.
        table = params["positions"]["embedding"]
        x = x + jnp.take(table, positions + config.position_offset, axis=0, mode="clip")
    if config.token_types:
        x = x + params["token_types"]["embedding"][0]
    return _norm(config, params["norm_embed"], x) if config.embed_norm else x


def _norm(config: NetworkConfig, params: Params, x: Array) -> Array:
    return nnx.merge(_norm_graph(config), params)(x)


@jax.jit
def _hidden_at(tokens: Array) -> Array:
    """`HIDDEN` at padding, as attention to these tokens adds it: ``[batch, 1, 1, tokens]``."""
    return jnp.where(tokens < 0, jnp.float32(HIDDEN), jnp.float32(0))[:, None, None]


@partial(jax.jit, static_argnames=("config", "seen"))
def _relative(config: NetworkConfig, params: Params, positions: Array, seen: int) -> Array:
    return relative_bias(config, params["embedding"], positions, seen)


def _bias(config: NetworkConfig, params: Params, tokens: Array, positions: Array, seen: int) -> Array | None:
    """What self-attention adds to its scores, if anything."""
    bias = None if config.causal else _hidden_at(tokens)
    if config.relative_buckets:
        relative = _relative(config, params["relative"], positions, seen)
        return relative if bias is None else relative + bias
    return bias


def _begin(config: NetworkConfig, params: Params, batch: Batch) -> tuple[Array, Array, Array, Around]:
    """The decoder's own tokens, their embeddings and positions, and what all blocks read besides."""
    if isinstance(batch, Pair) != (config.encoder is not None):
        wanted = "a Pair of source and target" if config.encoder else "one array of token ids"
        raise TPatchError(f"this {config.architecture} is run on {wanted}; give it that")
    if isinstance(batch, Pair):
        tokens = batch.target
        around = Around(None, encode(config, params, batch.source), _hidden_at(batch.source))
    else:
        tokens, around = batch, Around()
    if getattr(tokens, "ndim", 0) != 2:
        found = f"an array of shape {list(tokens.shape)}" if hasattr(tokens, "shape") else f"a {type(tokens).__name__}"
        raise TPatchError(f"the tokens are {found}; give an array of token ids, [batch, tokens]")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # All rows have the same positions here, so one row of relative positions serves them all.
    around = around._replace(bias=_bias(config, params, tokens, positions[:1], tokens.shape[1]))
    return tokens, _embed(config, params, tokens, positions), positions, around


def encode(config: NetworkConfig, params: Params, source: Array) -> Array:
    """What the encoder of an encoder-decoder makes of its source.

    Args:
        config: the network's description.
        params: the network's parameters.
        source: ``[batch, source]`` int, padded on the right with negative numbers.

    Returns:
        Its states, ``[batch, source, d]``.
    """
    inner = config.encoder
    if inner is None:
        raise TPatchError(f"this {config.architecture} has no encoder of its own; only an encoder-decoder has")
    own = {"embed": params["embed"], **params["encoder"]}
    x = residuals(inner, own, source)[-1]
    return x if inner.post_norm else _final_norm(inner, own["norm"], x)


@partial(jax.jit, static_argnames="config")
def _final_norm(config: NetworkConfig, params: Params, x: Array) -> Array:
    return _norm(config, params, x)


def _tail(config: NetworkConfig, params: Params) -> Params:
    """What `logits` reads, so that neither a merged nor an attached patch has it compiled again."""
    names = ("embed", "head", "norm") if config.tied and not config.labels else ("head", "norm", "classifier")
    return {name: params[name] for name in names if name in params}


def logits(config: NetworkConfig, params: Params, hidden: Array, valid: Array | None = None) -> Array:
    """From the residual stream after the last block to logits: ``norm(hidden) · unembedding``, or the head's labels.

    A classification head reads the first token or the mean of all, ``output·act(dense·x)``.

    Args:
        config: the network's description.
        params: the network's parameters; only the final norm and the head or (un)embedding are read.
        hidden: ``[..., d]``; gather the positions of interest first, since the vocabulary is wide. Of a classifier
            ``[..., tokens, d]``.
        valid: of a classifier that reads the mean: which tokens are no padding, ``[..., tokens]`` bool; all by default.

    Returns:
        ``[..., vocabulary]``, or of a classifier ``[..., labels]``; float32.
    """
    return _logits(config, _tail(config, params), hidden, valid)


_HEAD_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def _labels(config: NetworkConfig, params: Params, hidden: Array, valid: Array | None) -> Array:
    x = hidden[..., 0, :]
    if config.pooling == "mean":
        weight = jnp.ones(hidden.shape[:-1], hidden.dtype) if valid is None else valid.astype(hidden.dtype)
        x = jnp.sum(hidden * weight[..., None], -2) / jnp.sum(weight, -1, keepdims=True)
    dense, output = params["dense"], params["output"]
    x = _HEAD_ACTIVATIONS[config.head_activation](x @ dense["kernel"] + dense["bias"])
    return (x @ output["kernel"] + output["bias"]).astype(jnp.float32)


@partial(jax.jit, static_argnames="config")
def _logits(config: NetworkConfig, params: Params, hidden: Array, valid: Array | None = None) -> Array:
    if config.labels:
        return _labels(config, params["classifier"], hidden, valid)
    x = hidden if config.post_norm else _norm(config, params["norm"], hidden)
    if config.head_scale != 1:
        x = x * jnp.asarray(config.head_scale, x.dtype)
    if config.tied:
        result = jnp.einsum("...d,vd->...v", x, params["embed"]["embedding"], preferred_element_type=jnp.float32)
    else:
        result = jnp.einsum("...d,dv->...v", x, params["head"]["kernel"], preferred_element_type=jnp.float32)
    if config.head_bias:
        result = result + params["head"]["bias"].astype(jnp.float32)
    return softcap(result, config.logit_cap)


def argmax(config: NetworkConfig, params: Params, hidden: Array) -> Array:
    """The most probable token after each residual stream, ``[..., d]`` to ``[...]`` int."""
    return _argmax(config, _tail(config, params), hidden)


@partial(jax.jit, static_argnames="config")
def _argmax(config: NetworkConfig, params: Params, hidden: Array) -> Array:
    return jnp.argmax(_logits(config, params, hidden), -1)


def _without_ffn(layer: Params) -> Params:
    return {name: entry for name, entry in layer.items() if name != "ffn"}


def trace(config: NetworkConfig, params: Params, batch: Batch, layer: int) -> Trace:
    """Run everything up to the FFN of one layer, and that FFN.

    Args:
        config: the network's description.
        params: the network's parameters.
        batch: what to run it on; see above.
        layer: where to cut, ``0 … config.layers - 1``; of an encoder-decoder a layer of its decoder.

    Returns:
        The `Trace` at the cut.
    """
    tokens, x, positions, around = _begin(config, params, batch)
    for index in range(layer):
        x, _ = _whole(config, config.kind(index), params["layers"][index], x, positions, None, around)
    residual, query, output = _enter(config, config.kind(layer), params["layers"][layer], x, positions, None, around)
    context = {"residual": residual, "positions": positions}
    if not config.causal:
        context["valid"] = tokens >= 0
    if layer < config.layers - 1 and any(part is not None for part in around):
        context["around"] = around
    return Trace(query, output, context, layer)


def begin(config: NetworkConfig, params: Params, tokens: Array) -> list[Cache]:
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


def trace_after(
    config: NetworkConfig, params: Params, tokens: Array, layer: int, begun: list[Cache], which: Array, first: Array
) -> Trace:
    """`trace` of rows that begin alike, of which only what differs is run: ``tokens`` are the rest of each.

    Args:
        config: the network's description, of a decoder.
        params: the network's parameters.
        tokens: what follows the beginnings, ``[batch, tokens]`` int.
        layer: where to cut.
        begun: from `begin`.
        which: the text that each row begins with, ``[batch]`` int.
        first: the length of that text, ``[batch]`` int.

    Returns:
        The `Trace` at ``tokens``, in the last layer as `trace` has it; in an earlier one it cannot be resumed.
    """
    positions = first[:, None] + jnp.arange(tokens.shape[1])
    x = _embed(config, params, tokens, positions)
    for index in range(layer):
        x = _whole_after(config, config.kind(index), params["layers"][index], x, positions, begun[index], which)
    kind, weights = config.kind(layer), params["layers"][layer]
    residual, query, output = _enter_after(config, kind, weights, x, positions, begun[layer], which)
    return Trace(query, output, {"residual": residual, "positions": positions}, layer)


def hidden(config: NetworkConfig, params: Params, traced: Trace, output: Array) -> Array:
    """Run everything after the cut but the final norm and the vocabulary projection: ``[batch, tokens, d]``."""
    layer, positions = traced.layer, traced.context["positions"]
    around = traced.context.get("around", Around())
    x = _leave(config, config.kind(layer), _without_ffn(params["layers"][layer]), traced.context["residual"], output)
    for index in range(layer + 1, config.layers):
        x, _ = _whole(config, config.kind(index), params["layers"][index], x, positions, None, around)
    return x


def residuals(config: NetworkConfig, params: Params, batch: Batch) -> list[Array]:
    """The residual stream after every block, before the final norm: ``[batch, tokens, d]`` each."""
    _, x, positions, around = _begin(config, params, batch)
    found = []
    for index in range(config.layers):
        x, _ = _whole(config, config.kind(index), params["layers"][index], x, positions, None, around)
        found.append(x)
    return found


def resume(config: NetworkConfig, params: Params, traced: Trace, output: Array) -> Array:
    """Run everything after the cut from a given FFN output.

    Args:
        config: the network's description.
        params: the network's parameters.
        traced: what `trace` returned, possibly through `gather` when the cut is in the last layer.
        output: the FFN's output to go on from, ``[batch, tokens, d]``.

    Returns:
        Logits, ``[batch, tokens, vocabulary]``, or of a classifier ``[batch, labels]``; float32.
    """
    return logits(config, params, hidden(config, params, traced, output), traced.context.get("valid"))


def pointwise(config: NetworkConfig) -> bool:
    """Whether everything after the last FFN acts on each position alone, and one position decides what is said."""
    return config.pooling == "first"


def gather(traced: Trace, lane: Array, position: Array) -> Trace:
    """Keep only some positions of a trace, as a batch of one-token rows: ``[rows, 1, d]``.

    Only a cut in the last layer may be resumed after it, for there the rest acts on each position alone. Of a
    classifier that reads the first token, position 0 decides; one that reads the mean cannot be gathered.

    Args:
        traced: a trace of ``[batch, tokens]``.
        lane: which batch row, ``[rows]`` int.
        position: which token, ``[rows]`` int.
    """
    pick = lambda x: x[lane, position][:, None]  # noqa: E731
    return Trace(pick(traced.query), pick(traced.output), jax.tree.map(pick, traced.context), traced.layer)


class Fork(NamedTuple):
    """Rows cut at one layer, of which only the end is run again: a change at a token reaches no earlier one.

    Attributes:
        query: the FFN's input from each row's first position on, ``[rows, span, d]``.
        output: the FFN's output there, ``[rows, span, d]``.
        residual: the residual stream beside the FFN there, ``[rows, span, d]``.
        positions: where that is, ``[rows, span]``; positions past a row's end are padding.
        caches: keys and values of all tokens in each layer after the cut.
        layer: the cut.
    """

    query: Array
    output: Array
    residual: Array
    positions: Array
    caches: list[Cache]
    layer: int


def fork(config: NetworkConfig, params: Params, tokens: Array, layer: int, first: Array, span: int) -> Fork:
    """Run rows through the network once and keep what running their ends again needs.

    Args:
        config: the network's description.
        params: the network's parameters.
        tokens: ``[rows, tokens]`` int, padded on the right.
        layer: where to cut.
        first: the position in each row from which on the FFN's output may change, ``[rows]`` int.
        span: how many positions from there are looked at.

    Returns:
        The `Fork`.
    """
    if config.architecture != "decoder":
        raise TPatchError(f"rows of an {config.architecture} cannot be forked; only those of a decoder can")
    traced = trace(config, params, tokens, layer)
    positions = first[:, None] + jnp.arange(span)
    index = jnp.minimum(positions, tokens.shape[1] - 1)[..., None]
    end = lambda x: jnp.take_along_axis(x, index, 1)  # noqa: E731
    residual = traced.context["residual"]
    x = _leave(config, config.kind(layer), _without_ffn(params["layers"][layer]), residual, traced.output)
    empty = empty_cache(config, params, tokens.shape[0], tokens.shape[1])
    caches = []
    for number in range(layer + 1, config.layers):
        kind = config.kind(number)
        x, cache = _whole(
            config, kind, params["layers"][number], x, traced.context["positions"], empty[number], Around()
        )
        caches.append(cache)
    return Fork(end(traced.query), end(traced.output), end(residual), positions, caches, layer)


def resume_fork(config: NetworkConfig, params: Params, forked: Fork, output: Array) -> Array:
    """Run the rows' ends after the cut from a given FFN output: the residual stream, ``[rows, span, d]``.

    Args:
        config: the network's description.
        params: the network's parameters.
        forked: from `fork`.
        output: the FFN's output to go on from, ``[rows, span, d]``.
    """
    layer = forked.layer
    x = _leave(config, config.kind(layer), _without_ffn(params["layers"][layer]), forked.residual, output)
    for number, cache in zip(range(layer + 1, config.layers), forked.caches, strict=True):
        x, _ = _whole(config, config.kind(number), params["layers"][number], x, forked.positions, cache, Around())
    return x


def apply(config: NetworkConfig, params: Params, batch: Batch) -> Array:
    """The whole network.

    Args:
        config: the network's description.
        params: the network's parameters.
        batch: what to run it on; see above.

    Returns:
        Logits, ``[batch, tokens, vocabulary]``, or of a classifier ``[batch, labels]``; float32.
    """
    traced = trace(config, params, batch, config.layers - 1)
    return resume(config, params, traced, traced.output)


def empty_cache(
    config: NetworkConfig, params: Params, batch: int, context: int, source: Array | None = None
) -> list[Cache]:
    """A key-value cache for every layer, for ``batch`` lanes of at most ``context`` tokens.

    Args:
        config: the network's description.
        params: the network's parameters.
        batch: how many lanes.
        context: at most so many tokens.
        source: of an encoder-decoder what its encoder reads, ``[batch, source]`` int, padded with negative numbers.

    Returns:
        A cache without any token; what the decoder reads of the encoder's states is in it.
    """
    dtype = params["embed"]["embedding"].dtype
    shape = (batch, context, config.key_value_heads, config.head_width)
    empty = [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]
    if source is None:
        return empty
    states, bias = encode(config, params, source), _hidden_at(source)
    return [
        cache._replace(states=_states(config, _without_ffn(params["layers"][index]), states, bias))
        for index, cache in enumerate(empty)
    ]


def decode(
    config: NetworkConfig, params: Params, tokens: Array, positions: Array, cache: list[Cache]
) -> tuple[Array, list[Cache]]:
    """Run some more tokens on top of a cache.

    Args:
        config: the network's description.
        params: the network's parameters.
        tokens: ``[batch, tokens]`` int.
        positions: their positions, ``[batch, tokens]`` int; a position past the cache's end marks padding.
        cache: from `empty_cache` or an earlier call.

    Returns:
        The residual stream after the last block, ``[batch, tokens, d]`` (see `logits`), and the new cache.
    """
    x, grown = _embed(config, params, tokens, positions), []
    around = Around(_bias(config, params, tokens, positions, cache[0].key.shape[1]))
    for index in range(config.layers):
        x, entry = _whole(config, config.kind(index), params["layers"][index], x, positions, cache[index], around)
        grown.append(entry)
    return x, grown


def finish(config: NetworkConfig, weights: Params, context: Params, output: Array) -> Array:
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
        hidden, text = _leave(config, kind, weights["layer"], residual, output), context["text"]
        same = ((text[:, None] == text) & context["valid"]).astype(hidden.dtype)
        mean = same @ hidden / jnp.sum(same, -1, keepdims=True)
        return logits(config, weights, mean[:, None])
    if not pointwise(config):
        hidden = _leave(config, kind, weights["layer"], residual, output)
        return logits(config, weights, hidden, jnp.any(residual != 0, -1))
    hidden = _leave(config, kind, weights["layer"], residual[:, None], output[:, None])
    return logits(config, weights, hidden if config.labels else hidden[:, 0])


def leave_last(config: NetworkConfig, params: Params, residual: Array, output: Array) -> Array:
    """The residual stream after the last block from its FFN's output, ``[..., d]``, each position on its own."""
    last = config.layers - 1
    return _leave(config, config.kind(last), _without_ffn(params["layers"][last]), residual, output)


def unembedding(config: NetworkConfig, params: Params) -> Array:
    """The unembedding as the residual stream sees it, through the final norm's scale: ``[vocabulary, d]``."""
    return unembedding_rows(config, params, slice(None))


def unembedding_rows(config: NetworkConfig, params: Params, tokens: Array | slice) -> Array:
    """The rows of `unembedding` of some tokens, ``[tokens, d]``."""
    embed, head = params.get("embed"), params.get("head")
    table = embed["embedding"][tokens] if config.tied and embed else head["kernel"].T[tokens] if head else None
    if table is None:
        raise TPatchError(f"this {config.architecture} has no unembedding; it tells labels apart")
    if config.post_norm:
        return table
    return table * (params["norm"]["scale"] + jnp.asarray(config.norm_shift, table.dtype))


def final_weights(config: NetworkConfig, params: Params) -> Params:
    """The few parameters that `finish` reads, so that a compiled fit does not carry the rest."""
    return {**_tail(config, params), "layer": _without_ffn(params["layers"][config.layers - 1])}


@lru_cache(maxsize=16)
def finisher(config: NetworkConfig):
    """`finish` for one configuration, the same object every time, so that ``jit`` recognises it."""
    return partial(finish, config)
