"""A fingerprint of a model: which configuration and which weights a patch was made for."""

import dataclasses
import hashlib
import json
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.core.devices import automatically
from tpatch_jax.models.model import Model
from tpatch_jax.models.tokenizer import describe_tokenizer

__all__ = ["fingerprint", "tokenizer_fingerprint"]

_FIRST_NAMES = {"hidden_size": "width"}
"""What fields of the description were called when fingerprints were first taken, which stay what they are."""


@jax.jit
def _mix(x: Array) -> Array:
    """Two 32-bit sums over every bit of an array, each sensitive to where the bits stand."""
    # Float64, which only a program with x64 can hold, is two numbers of 32 bits each.
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32).reshape(-1)
    place = jax.lax.iota(jnp.uint32, bits.shape[0])
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = mixed ^ (mixed >> 13)
    # With x64 sums of 32 bits would else have 64, and the same weights another fingerprint.
    sums = [jnp.sum(term, dtype=jnp.uint32) for term in (mixed, mixed * (place | jnp.uint32(1)))]
    return jnp.stack(sums)


def _described(config: Any) -> dict[str, Any]:
    return {_FIRST_NAMES.get(name, name): value for name, value in dataclasses.asdict(config).items()}


@automatically
def fingerprint(model: Model) -> str:
    """A short text that is the same exactly for the same configuration and the same weights.

    Attached patches are left out; merged ones count. Weights read in another precision are other weights.

    Args:
        model: the model.

    Returns:
        32 hexadecimal digits.
    """
    layers = {index: {**layer, "ffn": ffn.detach(layer["ffn"])} for index, layer in model.params["layers"].items()}
    leaves = jax.tree_util.tree_leaves_with_path({**model.params, "layers": layers})
    # Taken once for the same arrays, which never change; they are kept, so that no other has their place in memory.
    arrays = [leaf for _, leaf in leaves]
    known = vars(model).get("_fingerprint")
    if known is not None and len(known[0]) == len(arrays) and all(map(operator.is_, known[0], arrays)):
        return known[1]
    # Only what differs from the defaults, so that a new field of the description changes no older fingerprint.
    told = {
        _FIRST_NAMES.get(field.name, field.name): getattr(model.config, field.name)
        for field in dataclasses.fields(model.config)
        if getattr(model.config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=_described).encode())
    sums = [(jax.tree_util.keystr(path), leaf, _mix(leaf)) for path, leaf in leaves]
    for path, leaf, mixed in sums:
        digest.update(f"{path} {leaf.shape} {leaf.dtype} {np.asarray(mixed).tolist()}".encode())
    result = digest.hexdigest()[:32]
    object.__setattr__(model, "_fingerprint", (arrays, result))
    return result


def tokenizer_fingerprint(model: Model) -> str:
    """A short text that is the same exactly where texts become the same tokens.

    Args:
        model: the model; its weights do not count.

    Returns:
        32 hexadecimal digits.
    """
    # Counted where it is kept: a dict of all tokens would take longer than all else here.
    fast = getattr(model.tokenizer, "backend_tokenizer", None)
    size = len(model.tokenizer.get_vocab()) if fast is None else fast.get_vocab_size()
    known = vars(model).get("_tokenizer_fingerprint")
    if known is not None and known[0] is model.tokenizer and known[1] == size:
        return known[2]
    told = describe_tokenizer(model.tokenizer)
    result = hashlib.sha256(json.dumps([told, model.start], sort_keys=True).encode()).hexdigest()[:32]
    object.__setattr__(model, "_tokenizer_fingerprint", (model.tokenizer, size, result))
    return result
