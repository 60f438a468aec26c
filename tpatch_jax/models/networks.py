"""The decoder network: Flax NNX modules inside, pure functions over a nested dict of parameters outside.

The parameters are ``{"embed": …, "positions"?: …, "layers": {0: {"norm_1", "attention", "norm_2", "ffn"}, …},
"norm": …, "head"?: …}``; `tpatch_jax.models.blocks` has the modules.
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
from tpatch_jax.models.blocks import Block, Cache, Norm, softcap
from tpatch_jax.models.config import LayerKind, NetworkConfig

__all__ = [
    "Cache",
    "Fork",
    "Trace",
    "apply",
    "argmax",
    "decode",
    "empty_cache",
    "final_weights",
    "finish",
    "finisher",
    "fork",
    "gather",
    "hidden",
    "leave_last",
    "logits",
    "merged_neurons",
    "residuals",
    "resume",
    "resume_fork",
    "shapes",
    "trace",
    "unembedding",
]

Params = dict[Any, Any]


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
def _enter(config: NetworkConfig, kind: LayerKind, params: Params, x: Array, positions: Array):
    residual, query, _ = _block(config, kind, params).enter(x, positions, None)
    return residual, query, ffn.apply(params["ffn"], query, config.activation)


@partial(jax.jit, static_argnames=("config", "kind"))
def _leave(config: NetworkConfig, kind: LayerKind, params: Params, residual: Array, output: Array) -> Array:
    return _block(config, kind, params).leave(residual, output)


@partial(jax.jit, static_argnames=("config", "kind"))
def _whole(config: NetworkConfig, kind: LayerKind, params: Params, x: Array, positions: Array, cache: Cache | None):
    block = _block(config, kind, params)
    residual, query, cache = block.enter(x, positions, cache)
    return block.leave(residual, ffn.apply(params["ffn"], query, config.activation)), cache


def _embed(config: NetworkConfig, params: Params, tokens: Array, positions: Array) -> Array:
    read = {name: params[name] for name in ("embed", "positions") if name in params}
    return _embedded(config, read, tokens, positions)


@partial(jax.jit, static_argnames="config")
def _embedded(config: NetworkConfig, params: Params, tokens: Array, positions: Array) -> Array:
    x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if config.positions:
        # Padding stands past the last position; the clipped row is never looked at.
        table = params["positions"]["embedding"]
        x = x + jnp.take(table, positions + config.position_offset, axis=0, mode="clip")
    return x


def _tail(config: NetworkConfig, params: Params) -> Params:
    """What `logits` reads, so that neither a merged nor an attached patch has it compiled again."""
    names = ("embed", "head", "norm") if config.tied else ("head", "norm")
    return {name: params[name] for name in names if name in params}


def logits(config: NetworkConfig, params: Params, hidden: Array) -> Array:
    """From the residual stream after the last block to logits: ``norm(hidden) · unembedding``.

    Args:
        config: the network's description.
        params: the network's parameters; only the final norm and the (un)embedding are read.
        hidden: ``[..., d]``; gather the positions of interest first, since the vocabulary is wide.

    Returns:
        ``[..., vocabulary]``, float32.
    """
    return _logits(config, _tail(config, params), hidden)


@partial(jax.jit, static_argnames="config")
def _logits(config: NetworkConfig, params: Params, hidden: Array) -> Array:
    x = nnx.merge(_norm_graph(config), params["norm"])(hidden)
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


def _positions(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def trace(config: NetworkConfig, params: Params, tokens: Array, layer: int) -> Trace:
    """Run everything up to the FFN of one layer, and that FFN.

    Args:
        config: the network's description.
        params: the network's parameters.
        tokens: ``[batch, tokens]`` int, padded on the right (causal attention never looks at it).
        layer: where to cut, ``0 … config.layers - 1``.

    Returns:
        The `Trace` at the cut.
    """
    positions = _positions(tokens)
    x = _embed(config, params, tokens, positions)
    for index in range(layer):
        x, _ = _whole(config, config.kind(index), params["layers"][index], x, positions, None)
    residual, query, output = _enter(config, config.kind(layer), params["layers"][layer], x, positions)
    return Trace(query, output, {"residual": residual, "positions": positions}, layer)


def hidden(config: NetworkConfig, params: Params, traced: Trace, output: Array) -> Array:
    """Run everything after the cut but the final norm and the vocabulary projection: ``[batch, tokens, d]``."""
    layer, positions = traced.layer, traced.context["positions"]
    x = _leave(config, config.kind(layer), _without_ffn(params["layers"][layer]), traced.context["residual"], output)
    for index in range(layer + 1, config.layers):
        x, _ = _whole(config, config.kind(index), params["layers"][index], x, positions, None)
    return x


def residuals(config: NetworkConfig, params: Params, tokens: Array) -> list[Array]:
    """The residual stream after every block, before the final norm: ``[batch, tokens, d]`` each."""
    positions = _positions(tokens)
    x, found = _embed(config, params, tokens, positions), []
    for index in range(config.layers):
        x, _ = _whole(config, config.kind(index), params["layers"][index], x, positions, None)
        found.append(x)
    return found


def resume(config: NetworkConfig, params: Params, traced: Trace, output: Array) -> Array:
    """Run everything after the cut from a given FFN output: logits ``[batch, tokens, vocabulary]``, float32.

    Args:
        config: the network's description.
        params: the network's parameters.
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
    traced = trace(config, params, tokens, layer)
    positions = first[:, None] + jnp.arange(span)
    index = jnp.minimum(positions, tokens.shape[1] - 1)[..., None]
    end = lambda x: jnp.take_along_axis(x, index, 1)  # noqa: E731
    kind, residual = config.kind(layer), traced.context["residual"]
    x = _leave(config, kind, _without_ffn(params["layers"][layer]), residual, traced.output)
    empty = empty_cache(config, params, *tokens.shape)
    caches = []
    for number in range(layer + 1, config.layers):
        kind = config.kind(number)
        x, cache = _whole(config, kind, params["layers"][number], x, traced.context["positions"], empty[number])
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
        x, _ = _whole(config, config.kind(number), params["layers"][number], x, forked.positions, cache)
    return x


def apply(config: NetworkConfig, params: Params, tokens: Array) -> Array:
    """The whole network: ``[batch, tokens]`` int to logits ``[batch, tokens, vocabulary]``, float32."""
    traced = trace(config, params, tokens, config.layers - 1)
    return resume(config, params, traced, traced.output)


def empty_cache(config: NetworkConfig, params: Params, batch: int, context: int) -> list[Cache]:
    """An empty key-value cache for every layer, for ``batch`` lanes of at most ``context`` tokens."""
    dtype = params["embed"]["embedding"].dtype
    shape = (batch, context, config.key_value_heads, config.head_width)
    return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]


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
    for index in range(config.layers):
        x, entry = _whole(config, config.kind(index), params["layers"][index], x, positions, cache[index])
        grown.append(entry)
    return x, grown


def shapes(config: NetworkConfig, merged: Mapping[int, int] | None = None) -> Params:
    """The shapes of all parameters, as `jax.ShapeDtypeStruct` leaves in the parameters' own nesting.

    Args:
        config: the network's description.
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

    block = of(nnx.eval_shape(lambda: Block(config, config.kind(0), rngs=nnx.Rngs(0))))
    result: Params = {
        "embed": {"embedding": shape((config.vocabulary, config.width))},
        "layers": {index: {**block, "ffn": network((merged or {}).get(index, 0))} for index in range(config.layers)},
        "norm": of(nnx.eval_shape(lambda: Norm.of(config))),
    }
    if config.positions:
        result["positions"] = {"embedding": shape((config.positions, config.width))}
    if not config.tied:
        result["head"] = linear(config.width, config.vocabulary, config.head_bias)
    elif config.head_bias:
        result["head"] = {"bias": shape((config.vocabulary,))}
    return result


def merged_neurons(config: NetworkConfig, params: Params) -> dict[int, int]:
    """How many patch neurons are merged into which layers; layers without any are left out."""
    extra = {index: ffn.width(layer["ffn"]) - config.ffn_width for index, layer in params["layers"].items()}
    return {index: count for index, count in extra.items() if count}


def finish(config: NetworkConfig, weights: Params, context: Params, output: Array) -> Array:
    """`resume` for rows cut in the last layer, each a position of its own: ``[rows, d]`` to ``[rows, vocabulary]``.

    Args:
        config: the network's description.
        weights: what `final_weights` returned.
        context: ``{"residual": [rows, d]}``.
        output: the FFN's output, ``[rows, d]``.
    """
    kind = config.kind(config.layers - 1)
    hidden = _leave(config, kind, weights["layer"], context["residual"][:, None], output[:, None])[:, 0]
    return logits(config, weights, hidden)


def leave_last(config: NetworkConfig, params: Params, residual: Array, output: Array) -> Array:
    """The residual stream after the last block from its FFN's output, ``[..., d]``, each position on its own."""
    last = config.layers - 1
    return _leave(config, config.kind(last), _without_ffn(params["layers"][last]), residual, output)


def unembedding(config: NetworkConfig, params: Params) -> Array:
    """The unembedding as the residual stream sees it, through the final norm's scale: ``[vocabulary, d]``."""
    table = params["embed"]["embedding"] if config.tied else params["head"]["kernel"].T
    return table * (params["norm"]["scale"] + jnp.asarray(config.norm_shift, table.dtype))


def final_weights(config: NetworkConfig, params: Params) -> Params:
    """The few parameters that `finish` reads, so that a compiled fit does not carry the rest."""
    return {**_tail(config, params), "layer": _without_ffn(params["layers"][config.layers - 1])}


@lru_cache(maxsize=16)
def finisher(config: NetworkConfig):
    """`finish` for one configuration, the same object every time, so that ``jit`` recognises it."""
    return partial(finish, config)
