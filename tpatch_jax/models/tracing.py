"""The cut: everything up to and through one FFN, and everything after it from a given output."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpatch_jax.models.blocks import Around, Cache
from tpatch_jax.models.config import LayerKind, NetworkConfig
from tpatch_jax.models.heads import logits
from tpatch_jax.models.pytrees import with_static_fields
from tpatch_jax.models.stack import Batch, embed_batch, embed_tokens, enter_block, leave_block, run_block, without_ffn
from tpatch_jax.typing import Params

__all__ = [
    "Trace",
    "apply",
    "enter_block_after",
    "gather",
    "hidden",
    "hidden_after",
    "resume",
    "run_block_after",
    "trace",
    "trace_after",
]


@with_static_fields("layer")
class Trace(NamedTuple):
    """What `trace` gives at the cut: the arrays that editing needs. A pytree, of which the layer is static.

    Attributes:
        query: the FFN's input, ``[batch, tokens, d]``.
        output: the FFN's output, ``[batch, tokens, d]``.
        context: whatever `resume` needs besides: the residual stream beside the FFN, ``[batch, tokens, d]``, the
            positions, ``[batch, tokens]``; of an encoder which of them are no padding, ``[batch, tokens]`` bool; and,
            unless the cut is in the last layer, what the layers after it read besides (``"around"``).
        layer: the cut.
    """

    query: Float[Array, "batch tokens hidden"]
    output: Float[Array, "batch tokens hidden"]
    context: dict[str, Any]
    layer: int


def _continued(begun: Cache, which: Int[Array, " rows"], tokens: int) -> Cache:
    """The beginning of each row, with room for so many tokens more."""
    longer = lambda x: jnp.pad(jnp.take(x, which, axis=0), ((0, 0), (0, 0), (0, tokens), (0, 0)))  # noqa: E731
    return Cache(longer(begun.key), longer(begun.value))


@partial(jax.jit, static_argnames=("config", "kind"))
def enter_block_after(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Float[Array, "rows tokens hidden"],
    positions: Int[Array, "rows tokens"],
    begun: Cache,
    which: Int[Array, " rows"],
) -> tuple[Array, Array, Array]:
    """A block behind a prefix whose cache is given, up to its feed-forward network's output."""
    return enter_block(config, kind, params, x, positions, _continued(begun, which, x.shape[1]), Around())


@partial(jax.jit, static_argnames=("config", "kind"))
def run_block_after(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Float[Array, "rows tokens hidden"],
    positions: Int[Array, "rows tokens"],
    begun: Cache,
    which: Int[Array, " rows"],
) -> Array:
    """A whole block behind a prefix whose cache is given."""
    return run_block(config, kind, params, x, positions, _continued(begun, which, x.shape[1]), Around())[0]


def trace(config: NetworkConfig, params: Params, batch: Batch, layer: int) -> Trace:
    """Run everything up to the FFN of one layer, and that FFN.

    Args:
        config: the network's description.
        params: the network's parameters.
        batch: what to run it on; see `tpatch_jax.models.networks`.
        layer: where to cut, ``0 … config.layers - 1``; of an encoder-decoder a layer of its decoder.

    Returns:
        The `Trace` at the cut.
    """
    tokens, x, positions, around = embed_batch(config, params, batch)
    for index in range(layer):
        x, _ = run_block(config, config.kind(index), params["layers"][index], x, positions, None, around)
    residual, query, output = enter_block(
        config, config.kind(layer), params["layers"][layer], x, positions, None, around
    )
    context = {"residual": residual, "positions": positions}
    if not config.causal:
        context["valid"] = tokens >= 0
    if layer < config.layers - 1 and any(part is not None for part in around):
        context["around"] = around
    return Trace(query, output, context, layer)


def trace_after(
    config: NetworkConfig,
    params: Params,
    tokens: Int[Array, "batch tokens"],
    layer: int,
    begun: list[Cache],
    which: Int[Array, "batch"],
    first: Int[Array, "batch"],
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
        The `Trace` at ``tokens``, in the last layer as `trace` has it; in an earlier one `hidden_after` goes on.
    """
    positions = first[:, None] + jnp.arange(tokens.shape[1])
    x = embed_tokens(config, params, tokens, positions)
    for index in range(layer):
        x = run_block_after(config, config.kind(index), params["layers"][index], x, positions, begun[index], which)
    kind, weights = config.kind(layer), params["layers"][layer]
    residual, query, output = enter_block_after(config, kind, weights, x, positions, begun[layer], which)
    return Trace(query, output, {"residual": residual, "positions": positions}, layer)


def hidden(
    config: NetworkConfig, params: Params, traced: Trace, output: Float[Array, "batch tokens hidden"]
) -> Float[Array, "batch tokens hidden"]:
    """Run everything after the cut but the final norm and the vocabulary projection: ``[batch, tokens, d]``."""
    layer, positions = traced.layer, traced.context["positions"]
    around = traced.context.get("around", Around())
    x = leave_block(
        config, config.kind(layer), without_ffn(params["layers"][layer]), traced.context["residual"], output
    )
    for index in range(layer + 1, config.layers):
        x, _ = run_block(config, config.kind(index), params["layers"][index], x, positions, None, around)
    return x


def hidden_after(
    config: NetworkConfig,
    params: Params,
    traced: Trace,
    output: Float[Array, "batch tokens hidden"],
    begun: list[Cache],
    which: Int[Array, "batch"],
) -> Float[Array, "batch tokens hidden"]:
    """`hidden` of what `trace_after` gave: the residual stream after the last block, ``[batch, tokens, d]``.

    Args:
        config: the network's description, of a decoder.
        params: the network's parameters.
        traced: from `trace_after`.
        output: the FFN's output to go on from, ``[batch, tokens, d]``.
        begun: from `begin`, with these parameters.
        which: the text that each row begins with, ``[batch]`` int.
    """
    layer, positions = traced.layer, traced.context["positions"]
    x = leave_block(
        config, config.kind(layer), without_ffn(params["layers"][layer]), traced.context["residual"], output
    )
    for index in range(layer + 1, config.layers):
        x = run_block_after(config, config.kind(index), params["layers"][index], x, positions, begun[index], which)
    return x


def resume(
    config: NetworkConfig, params: Params, traced: Trace, output: Float[Array, "batch tokens hidden"]
) -> Float[Array, "batch *tokens vocabulary"]:
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


def gather(traced: Trace, lane: Int[Array, "rows"], position: Int[Array, "rows"]) -> Trace:
    """Keep only some positions of a trace, as a batch of one-token rows: ``[rows, 1, d]``.

    Only a cut in the last layer may be resumed after it, for there the rest acts on each position alone. Of a
    classifier that reads the first token, position 0 decides; one that reads the mean cannot be gathered.

    Args:
        traced: a trace of ``[batch, tokens]``.
        lane: which batch row, ``[rows]`` int.
        position: which token, ``[rows]`` int.

    Returns:
        The `Trace` of these rows.
    """
    pick = lambda x: x[lane, position][:, None]  # noqa: E731
    return Trace(pick(traced.query), pick(traced.output), jax.tree.map(pick, traced.context), traced.layer)


def apply(config: NetworkConfig, params: Params, batch: Batch) -> Float[Array, "batch *tokens vocabulary"]:
    """The whole network.

    Args:
        config: the network's description.
        params: the network's parameters.
        batch: what to run it on; see `tpatch_jax.models.networks`.

    Returns:
        Logits, ``[batch, tokens, vocabulary]``, or of a classifier ``[batch, labels]``; float32.
    """
    traced = trace(config, params, batch, config.layers - 1)
    return resume(config, params, traced, traced.output)
