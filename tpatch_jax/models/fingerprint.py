"""A fingerprint of a model: which configuration and which weights a patch was made for."""

import dataclasses
import hashlib
import json
import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.core.devices import automatically
from tpatch_jax.models.model import Model
from tpatch_jax.models.tokenizer import describe_tokenizer
from tpatch_jax.storage.kept_text import keep_text

__all__ = ["fingerprint", "fingerprint_attached", "remember_files", "tokenizer_fingerprint"]

_FIRST_NAMES = {"hidden_size": "width"}
"""What fields of the description were called when fingerprints were first taken, which stay what they are."""

VERSION = 1
LARGE_MODEL = 2**26
"""Of so many bytes of parameters it takes longer to read them once more than to look up what they gave."""

LARGE_TOKENIZER = 2**18


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
    description = json.dumps(told, sort_keys=True, default=_described)

    def take() -> str:
        digest = hashlib.sha256(description.encode())
        sums = [(jax.tree_util.keystr(path), leaf, _mix(leaf)) for path, leaf in leaves]
        for path, leaf, mixed in sums:
            digest.update(f"{path} {leaf.shape} {leaf.dtype} {np.asarray(mixed).tolist()}".encode())
        return digest.hexdigest()[:32]

    files = _files_of(model, arrays)
    result = take() if files is None else keep_text("fingerprints", f"{VERSION} {files} {description}", take, _is_hex)
    object.__setattr__(model, "_fingerprint", (arrays, result))
    return result


@automatically
def fingerprint_attached(model: Model) -> str:
    """A short text that is the same exactly for the same patches and adapters attached to the same layers.

    Args:
        model: the model; what its `fingerprint` tells does not count.

    Returns:
        32 hexadecimal digits; empty where nothing is attached.
    """
    beside = {index: ffn.attached(layer["ffn"]) for index, layer in model.params["layers"].items()}
    leaves = jax.tree_util.tree_leaves_with_path(beside)
    if not any(beside.values()):
        return ""
    digest = hashlib.sha256(str(jax.tree.structure(beside)).encode())
    for path, leaf in leaves:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()[:32]


def remember_files(model: Model, files: str) -> None:
    """Let a model know which files its parameters were read from, so that its fingerprint is taken once for them.

    Args:
        model: as it was read; what is made of it knows nothing of files.
        files: names them, and says when they changed; see `tpatch_jax.models.checkpoints.folder.mark_files`.
    """
    object.__setattr__(model, "_files", (jax.tree.leaves(model.params), files))


def _files_of(model: Model, arrays: list[Any]) -> str | None:
    """The files that a large model's arrays were read from; none if another array has come in."""
    read, files = vars(model).get("_files", ([], None))
    if len(read) != len(arrays) or not all(map(operator.is_, read, arrays)):
        return None
    return files if sum(array.nbytes for array in arrays) > LARGE_MODEL else None


def _is_hex(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", text) is not None


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

    def take() -> str:
        told = [describe_tokenizer(model.tokenizer), model.start]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    # Putting a large tokenizer in order takes longer than recognising it.
    text = "" if fast is None else fast.to_str()
    mark = f"{VERSION} {model.start} {text}"
    result = keep_text("fingerprints", mark, take, _is_hex) if len(text) > LARGE_TOKENIZER else take()
    object.__setattr__(model, "_tokenizer_fingerprint", (model.tokenizer, size, result))
    return result
