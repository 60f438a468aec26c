"""The shapes of a network's parameters, and what they tell of merged patches."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tpatch_jax.core import ffn
from tpatch_jax.models.blocks import Block, Norm
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.typing import Params

__all__ = ["merged_neurons", "parameter_shapes"]


def parameter_shapes(config: NetworkConfig, merged: Mapping[int, int] | None = None) -> Params:
    """The shapes of all parameters, as `jax.ShapeDtypeStruct` leaves in the parameters' own nesting.

    Args:
        config: the network's description.
        merged: how many patch neurons are merged into which layers.
    """
    embed = {"embed": {"embedding": _shape((config.vocabulary, config.hidden_size))}}
    result = {**(embed if config.image is None else _image_shapes(config)), **_stack_shapes(config, merged or {})}
    if config.encoder:
        result["encoder"] = _stack_shapes(config.encoder, {})
    if config.labels:
        head = {"dense": config.hidden_size} if config.head_activation else {}
        head |= {"output": len(config.labels)}
        result["classifier"] = {
            name: _linear_shapes(config.hidden_size, outputs, True) for name, outputs in head.items()
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


def _stack_shapes(config: NetworkConfig, merged: Mapping[int, int]) -> Params:
    """The shapes of a stack without what it shares with others: embedding and head."""

    def of(module: nnx.Module) -> Params:
        return nnx.to_pure_dict(nnx.state(module))

    def network(extra: int) -> Params:
        hidden, bias = config.ffn_width + extra, config.ffn_bias or extra > 0
        readers = ("gate", "up") if config.gated else ("up",)
        entries = {name: _linear_shapes(config.hidden_size, hidden, bias) for name in readers}
        return {**entries, "down": _linear_shapes(hidden, config.hidden_size, config.ffn_bias)}

    block = of(nnx.eval_shape(lambda: Block(config, config.kind(0), rngs=nnx.Rngs(0))))
    norm = of(nnx.eval_shape(lambda: Norm.of(config)))
    result: Params = {
        "layers": {index: {**block, "ffn": network(merged.get(index, 0))} for index in range(config.layers)}
    }
    if not config.post_norm:
        result["norm"] = norm
    if config.embed_norm:
        result["norm_embed"] = norm
    for name, rows in (("positions", config.positions), ("token_types", config.token_types)):
        if rows:
            result[name] = {"embedding": _shape((rows, config.hidden_size))}
    if config.relative_buckets:
        result["relative"] = {"embedding": _shape((config.relative_buckets, config.heads))}
    return result


def merged_neurons(config: NetworkConfig, params: Params) -> dict[int, int]:
    """How many patch neurons are merged into which layers; layers without any are left out."""
    extra = {index: ffn.width(layer["ffn"]) - config.ffn_width for index, layer in params["layers"].items()}
    return {index: count for index, count in extra.items() if count}
