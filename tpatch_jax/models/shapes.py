"""The shapes of a network's parameters, and what they tell of merged patches."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from tpatch_jax.core import ffn
from tpatch_jax.models.blocks import Block, Norm
from tpatch_jax.models.config import LayerKind, NetworkConfig
from tpatch_jax.typing import Params

__all__ = ["block_graph", "merged_neurons", "norm_graph", "parameter_shapes"]

Graph: TypeAlias = tuple[nnx.GraphDef[Any], Params]
"""The structure of a module without its weights, and their shapes."""


def parameter_shapes(config: NetworkConfig, merged: Mapping[int, int] | None = None) -> Params:
    """The shapes of all parameters, as `jax.ShapeDtypeStruct` leaves in the parameters' own nesting.

    Args:
        config: the network's description.
        merged: how many patch neurons are merged into which layers.
    """
    width = config.embed_width or config.hidden_size
    embed = {"embed": {"embedding": _shape((config.vocabulary, width))}}
    result = {**(embed if config.image is None else _image_shapes(config)), **_stack_shapes(config, merged or {})}
    if config.encoder:
        result["encoder"] = {**_audio_shapes(config.encoder), **_stack_shapes(config.encoder, {})}
    if config.labels:
        dense = _linear_shapes(config.hidden_size, config.hidden_size, config.head_dense_bias)
        result["classifier"] = {
            **({"dense": dense} if config.head_activation else {}),
            **({"norm": _norm_shapes(config)} if config.head_norm else {}),
            "output": _linear_shapes(config.hidden_size, len(config.labels), True),
        }
    elif not config.tied:
        result["head"] = _linear_shapes(config.hidden_size, config.vocabulary, config.head_bias)
    elif config.head_bias:
        result["head"] = {"bias": _shape((config.vocabulary,))}
    return result


_shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def _linear_shapes(inputs: int, outputs: int, bias: bool) -> Params:
    entry = {"kernel": _shape((inputs, outputs))}
    return {**entry, "bias": _shape((outputs,))} if bias else entry


def _image_shapes(config: NetworkConfig) -> Params:
    """The shapes of what makes positions of an image: a patch's pixels are channel by channel, row by row."""
    image = config.image
    assert image is not None
    tokens = ("class_token", "distillation_token")[: image.first]
    inputs = image.channels * image.patch[0] * image.patch[1]
    patches = _linear_shapes(inputs, config.hidden_size, True)
    return {"image": {"patches": patches, **{name: _shape((config.hidden_size,)) for name in tokens}}}


def _audio_shapes(config: NetworkConfig) -> Params:
    """The shapes of what makes positions of sound, if an encoder reads it: each convolution sees three frames."""
    if config.audio is None:
        return {}
    width = config.hidden_size
    convolutions = {"first": config.audio.mels, "second": width}
    return {"audio": {name: _linear_shapes(3 * inputs, width, True) for name, inputs in convolutions.items()}}


def _graph_of(make: Callable[[], nnx.Module]) -> Graph:
    graph, state = nnx.split(nnx.eval_shape(make))
    # Without a sharding, which a leaf has from the mesh that happens to be set when it is made.
    return graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))


@lru_cache(maxsize=256)
def block_graph(config: NetworkConfig, kind: LayerKind) -> Graph:
    """The structure of a block without its weights and their shapes, made once per kind of layer; not to be changed."""
    return _graph_of(lambda: Block(config, kind, rngs=nnx.Rngs(0)))


@lru_cache(maxsize=256)
def norm_graph(config: NetworkConfig, width: int) -> Graph:
    """The same of a norm over so many numbers."""
    return _graph_of(lambda: Norm.of(config, width))


def _norm_shapes(config: NetworkConfig, width: int | None = None) -> Params:
    return dict(norm_graph(config, config.hidden_size if width is None else width)[1])


def _stack_shapes(config: NetworkConfig, merged: Mapping[int, int]) -> Params:
    """The shapes of a stack without what it shares with others: embedding and head."""

    def network(index: int) -> Params:
        extra = merged.get(index, 0)
        hidden, bias = config.width(index) + extra, config.ffn_bias or extra > 0
        readers = ("gate", "up") if config.gated else ("up",)
        entries = {name: _linear_shapes(config.hidden_size, hidden, bias) for name in readers}
        return {**entries, "down": _linear_shapes(hidden, config.hidden_size, config.ffn_bias)}

    kinds = [config.kind(index) for index in range(config.layers)]
    # Dicts of their own, as what is handed out may be changed.
    blocks = [jax.tree.map(lambda leaf: leaf, block_graph(config, kind)[1]) for kind in kinds]
    result: Params = {"layers": {index: {**block, "ffn": network(index)} for index, block in enumerate(blocks)}}
    if not config.post_norm:
        result["norm"] = _norm_shapes(config)
    width = config.embed_width or config.hidden_size
    if config.embed_norm:
        result["norm_embed"] = _norm_shapes(config, width)
    for name, rows in (("positions", config.positions), ("token_types", config.token_types)):
        if rows:
            result[name] = {"embedding": _shape((rows, width))}
    if config.embed_width:
        result["embed_project"] = _linear_shapes(width, config.hidden_size, True)
    if config.relative_buckets:
        result["relative"] = {"embedding": _shape((config.relative_buckets, config.heads))}
    return result


def merged_neurons(config: NetworkConfig, params: Params) -> dict[int, int]:
    """How many patch neurons are merged into which layers; layers without any are left out."""
    extra = {index: ffn.width(layer["ffn"]) - config.width(index) for index, layer in params["layers"].items()}
    return {index: count for index, count in extra.items() if count}
