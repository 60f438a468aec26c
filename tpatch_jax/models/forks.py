"""Rows that are cut at one layer, of which only the end is run again."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.blocks import Around, Cache
from tpatch_jax.models.caches import empty_cache
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.pytrees import with_static_fields
from tpatch_jax.models.stack import leave_block, run_block, without_ffn
from tpatch_jax.models.tracing import trace
from tpatch_jax.typing import Params

__all__ = ["Fork", "after", "fork", "resume_fork"]


@with_static_fields("layer")
class Fork(NamedTuple):
    """Rows cut at one layer, of which only the end is run again: a change at a token reaches no earlier one.

    A pytree, of which the layer is static.

    Attributes:
        query: the FFN's input from each row's first position on, ``[rows, span, d]``.
        output: the FFN's output there, ``[rows, span, d]``.
        residual: the residual stream beside the FFN there, ``[rows, span, d]``.
        positions: where that is, ``[rows, span]``; positions past a row's end are padding.
        caches: keys and values of all tokens in each layer after the cut.
        hidden: the residual stream after the last block there, as the row stands, ``[rows, span, d]``.
        layer: the cut.
    """

    query: Float[Array, "rows span hidden"]
    output: Float[Array, "rows span hidden"]
    residual: Float[Array, "rows span hidden"]
    positions: Int[Array, "rows span"]
    caches: list[Cache]
    hidden: Float[Array, "rows span hidden"]
    layer: int


def fork(
    config: NetworkConfig,
    params: Params,
    tokens: Int[Array, "rows tokens"],
    layer: int,
    first: Int[Array, "rows"],
    span: int,
) -> Fork:
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

    Raises:
        TPatchError: the network is no decoder.
    """
    if config.architecture != "decoder":
        raise TPatchError(f"rows of an {config.architecture} cannot be forked; only those of a decoder can")
    traced = trace(config, params, tokens, layer)
    positions = first[:, None] + jnp.arange(span)
    index = jnp.minimum(positions, tokens.shape[1] - 1)[..., None]
    end = lambda x: jnp.take_along_axis(x, index, 1)  # noqa: E731
    residual = traced.context["residual"]
    x = leave_block(config, config.kind(layer), without_ffn(params["layers"][layer]), residual, traced.output)
    empty = empty_cache(config, params, tokens.shape[0], tokens.shape[1])
    caches = []
    for number in range(layer + 1, config.layers):
        kind = config.kind(number)
        x, cache = run_block(
            config, kind, params["layers"][number], x, traced.context["positions"], empty[number], Around()
        )
        caches.append(cache)
    return Fork(end(traced.query), end(traced.output), end(residual), positions, caches, end(x), layer)


def resume_fork(
    config: NetworkConfig, params: Params, forked: Fork, output: Float[Array, "rows span hidden"]
) -> Float[Array, "rows span hidden"]:
    """Run the rows' ends after the cut from a given FFN output: the residual stream, ``[rows, span, d]``.

    Args:
        config: the network's description.
        params: the network's parameters.
        forked: from `fork`.
        output: the FFN's output to go on from, ``[rows, span, d]``.
    """
    layer = forked.layer
    x = leave_block(config, config.kind(layer), without_ffn(params["layers"][layer]), forked.residual, output)
    for number, cache in zip(range(layer + 1, config.layers), forked.caches, strict=True):
        x, _ = run_block(config, config.kind(number), params["layers"][number], x, forked.positions, cache, Around())
    return x


def after(params: Params, layer: int) -> Params:
    """The parameters that `resume_fork` and the logits read, so that a compiled program does not carry the rest.

    Args:
        params: the network's parameters.
        layer: the cut.
    """
    layers = {number: entry for number, entry in params["layers"].items() if number > layer}
    others = {name: entry for name, entry in params.items() if name not in ("layers", "encoder")}
    return {**others, "layers": {layer: without_ffn(params["layers"][layer]), **layers}}
