"""Rows that begin alike, packed and cut at one layer, of which only the ends are run again."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.blocks import Around, Cache, Seen
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.pytrees import with_static_fields
from tpatch_jax.models.stack import embed_tokens, enter_block, leave_block, run_block, without_ffn
from tpatch_jax.typing import Params

__all__ = ["Fork", "Pack", "after", "around", "fork", "pack_queries", "resume_fork", "take_tokens"]


class Pack(NamedTuple):
    """Rows of text in a few sequences: what some rows of a sequence begin with stands there once.

    Each token sees its rows alone. Attention is between all tokens of a sequence, so that several short ones cost less
    than a long one.

    Attributes:
        tokens: ``[packs, sequences, tokens]`` int; padding is anything.
        positions: of each in its rows, ``[packs, sequences, tokens]`` int.
        sees: which tokens of its sequence each looks at, itself among them, ``[packs, sequences, tokens, tokens]``
            bool; padding sees itself.
        ends: the tokens of each sequence that are run again, ``[packs, sequences, ends]`` int; what fills up is
            padding.
        begins: those that ends look at and that are none themselves, ``[packs, sequences, begins]`` int; what fills up
            is padding.
    """

    tokens: Int[Array, "packs sequences tokens"]
    positions: Int[Array, "packs sequences tokens"]
    sees: Bool[Array, "packs sequences tokens tokens"]
    ends: Int[Array, "packs sequences ends"]
    begins: Int[Array, "packs sequences begins"]


@with_static_fields("layer")
class Fork(NamedTuple):
    """Packed rows cut at one layer, of which only the ends are run again: a change at a token reaches no earlier one.

    A pytree, of which the layer is static. The ends of a pack's sequences stand one after the other.

    Attributes:
        query: the FFN's input at the ends, ``[packs, ends, d]``.
        output: the FFN's output there, ``[packs, ends, d]``.
        residual: the residual stream beside the FFN there, ``[packs, ends, d]``.
        positions: of the ends in their rows, ``[packs, ends]``.
        seen: what the ends of each sequence look at, ``[packs, sequences, …]``: tokens before them, and each other.
        caches: keys and values of the tokens before them in each layer after the cut, ``[packs, sequences, …]``.
        hidden: the residual stream after the last block at the ends, as the rows stand, ``[packs, ends, d]``.
        layer: the cut.
    """

    query: Float[Array, "packs ends hidden"]
    output: Float[Array, "packs ends hidden"]
    residual: Float[Array, "packs ends hidden"]
    positions: Int[Array, "packs ends"]
    seen: Seen
    caches: list[Cache]
    hidden: Float[Array, "packs ends hidden"]
    layer: int


def fork(config: NetworkConfig, params: Params, pack: Pack, layer: int, rounded: Params | None = None) -> Fork:
    """Run packed rows through the network once and keep what running their ends again needs.

    Args:
        config: the network's description.
        params: the network's parameters.
        pack: the rows.
        layer: where to cut.
        rounded: what `around` gives with its matrices in bfloat16 (`tpatch_jax.core.products.round_matrices`), with
            which the other layers are run; by default those of ``params``. The cut's layer is run as it is.

    Returns:
        The `Fork`.

    Raises:
        TPatchError: the network is no decoder.
    """
    (packs, sequences, _), pack = pack.tokens.shape, _regroup(pack, (-1,))
    positions, layers, beside = pack.positions, params["layers"], _beside(pack)
    residual, query, output = _enter(config, params, pack, layer, rounded)
    x = leave_block(config, config.kind(layer), without_ffn(layers[layer]), residual, output)
    caches, (run, weights) = [], _blocks(params, rounded)
    for number in range(layer + 1, config.layers):
        x, cache = run(config, config.kind(number), weights[number], x, positions, None, beside)
        caches.append(take_tokens(cache, pack.begins, 2))
    query, output, residual, x = take_tokens((query, output, residual, x), pack.ends)
    where, seen = _seen_by_ends(pack)
    query, output, residual, x, where = _regroup((query, output, residual, x, where), (packs, -1))
    seen, caches = _regroup((seen, caches), (packs, sequences), 1)
    return Fork(query, output, residual, where, seen, caches, x, layer)


@partial(jax.jit, static_argnames=("axes", "count"))
def _regroup(arrays: Any, axes: tuple[int, ...], count: int = 2) -> Any:
    """The first axes of arrays, ``count`` of them, as others; by default packs and their sequences, or their ends."""
    return jax.tree.map(lambda leaf: leaf.reshape(*axes, *leaf.shape[count:]), arrays)


@partial(jax.jit, static_argnames="axis")
def take_tokens(arrays: Any, tokens: Int[Array, "packs tokens"], axis: int = 1) -> Any:
    """Some tokens of each pack, of every array of a pytree: ``[packs, all, …]`` to ``[packs, tokens, …]``.

    Args:
        arrays: a pytree.
        tokens: which.
        axis: that of the tokens in all of them.

    Example:
        >>> take_tokens(jnp.array([[[1.0], [2.0]]]), jnp.array([[1]])).tolist()
        [[[2.0]]]
    """

    def take(leaf: Array) -> Array:
        other = [place for place in range(1, leaf.ndim) if place != axis]
        return jnp.take_along_axis(leaf, jnp.expand_dims(tokens, other), axis)

    return jax.tree.map(take, arrays)


@jax.jit
def _seen_by_ends(pack: Pack) -> tuple[Array, Seen]:
    """The positions of packed rows' ends, and what they look at when they are run again."""
    rows = take_tokens(pack.sees, pack.ends)
    # An end looks at the ends before it as they are run again, not as they stood.
    parts = [jnp.take_along_axis(rows, columns[:, None], 2) for columns in (pack.begins, pack.ends)]
    begins, ends = (take_tokens(pack.positions, columns) for columns in (pack.begins, pack.ends))
    return ends, Seen(jnp.concatenate(parts, 2), jnp.concatenate([begins, ends], 1))


def pack_queries(config: NetworkConfig, params: Params, pack: Pack, layer: int) -> Float[Array, "packs ends hidden"]:
    """The FFN's input at the ends of packed rows; nothing above that layer is run.

    Args:
        config: the network's description.
        params: the network's parameters.
        pack: the rows.
        layer: whose FFN.

    Returns:
        ``[packs, ends, d]``, those of a pack's sequences one after the other.

    Raises:
        TPatchError: the network is no decoder.
    """
    packs, pack = len(pack.tokens), _regroup(pack, (-1,))
    _, query, _ = _enter(config, params, pack, layer)
    return _regroup(take_tokens(query, pack.ends), (packs, -1))


def _beside(pack: Pack) -> Around:
    """What blocks are told beside their input: which tokens of a sequence see which."""
    return Around(seen=Seen(pack.sees, pack.positions))


def _blocks(params: Params, rounded: Params | None) -> tuple[Callable[..., tuple[Array, Any]], Any]:
    """What runs the blocks beside the cut, and their parameters by layer."""
    return (run_block, params["layers"]) if rounded is None else (partial(run_block, rounded=True), rounded["layers"])


def _enter(
    config: NetworkConfig, params: Params, pack: Pack, layer: int, rounded: Params | None = None
) -> tuple[Array, Array, Array]:
    """Packed rows up to a layer's FFN: the residual stream beside it, its input and its output."""
    if config.architecture != "decoder":
        raise TPatchError(f"rows of an {config.architecture} cannot be packed; only those of a decoder can")
    positions, beside, (run, weights) = pack.positions, _beside(pack), _blocks(params, rounded)
    x = embed_tokens(config, params, pack.tokens, positions)
    for number in range(layer):
        x, _ = run(config, config.kind(number), weights[number], x, positions, None, beside)
    return enter_block(config, config.kind(layer), params["layers"][layer], x, positions, None, beside)


def resume_fork(
    config: NetworkConfig, params: Params, forked: Fork, output: Float[Array, "packs ends hidden"]
) -> Float[Array, "packs ends hidden"]:
    """Run the rows' ends after the cut from a given FFN output: the residual stream, ``[packs, ends, d]``.

    Args:
        config: the network's description.
        params: the network's parameters.
        forked: from `fork`.
        output: the FFN's output to go on from, ``[packs, ends, d]``.
    """
    layer, packs, sequences = forked.layer, *forked.seen.visible.shape[:2]
    seen, caches = _regroup((forked.seen, forked.caches), (-1,))
    residual, output, positions = _regroup((forked.residual, output, forked.positions), (packs * sequences, -1))
    beside = Around(seen=seen)
    x = leave_block(config, config.kind(layer), without_ffn(params["layers"][layer]), residual, output)
    for number, cache in zip(range(layer + 1, config.layers), caches, strict=True):
        x, _ = run_block(config, config.kind(number), params["layers"][number], x, positions, cache, beside)
    return _regroup(x, (packs, -1))


def after(params: Params, layer: int) -> Params:
    """The parameters that `resume_fork` and the logits read, so that a compiled program does not carry the rest.

    Args:
        params: the network's parameters, or what `around` gives of them.
        layer: the cut.
    """
    beside = around(params, layer)
    return {**beside, "layers": {number: entry for number, entry in beside["layers"].items() if number >= layer}}


def around(params: Params, layer: int) -> Params:
    """All parameters but those of a layer's feed-forward network, and of an encoder.

    Args:
        params: the network's parameters.
        layer: the cut.
    """
    others = {name: entry for name, entry in params.items() if name not in ("layers", "encoder")}
    return {**others, "layers": {**params["layers"], layer: without_ffn(params["layers"][layer])}}
