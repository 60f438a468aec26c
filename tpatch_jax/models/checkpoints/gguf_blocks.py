"""Weights as the blocks of a GGUF tensor type, K-quants too, which the gguf package reads and does not write."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

__all__ = ["TYPES", "block_width", "decode", "encode", "type_named"]

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""The types in which a whole model is written on demand: those that the gguf package writes as llama.cpp does."""

_IQ4 = np.asarray((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)

Rows = Float[np.ndarray, "rows width"]
Blocks = Float[np.ndarray, "blocks size"]
Packed = UInt8[np.ndarray, "blocks bytes"]


def type_named(name: str) -> "GGMLQuantizationType":
    """The type that one of `TYPES` names.

    Args:
        name: as users write it.

    Raises:
        TPatchError: there is none of that name.
    """
    import gguf

    if name not in TYPES:
        raise TPatchError(
            f"a whole model cannot be written in the type {name!r}; choose keep or one of {', '.join(TYPES)}, or write "
            "it in f16 and let llama.cpp's llama-quantize make the other of it"
        )
    return gguf.GGMLQuantizationType[name.upper()]


def block_width(kind: "GGMLQuantizationType") -> int:
    """How many weights of a row stand in one block; a row is a whole number of blocks.

    Args:
        kind: the tensor's type.
    """
    import gguf

    return gguf.GGML_QUANT_SIZES[kind][0]


def encode(rows: Rows, kind: "GGMLQuantizationType", name: str) -> np.ndarray:
    """Rows of weights as a tensor type stores them. Zeros come back as exact zeros in every type.

    Args:
        rows: ``[rows, width]``, float32; the width is a multiple of the type's block.
        kind: the type.
        name: the tensor's name, for messages.

    Returns:
        Numbers for F32 and F16, else bytes, ``[rows, bytes]``.

    Raises:
        TPatchError: nothing writes that type, or a weight is too large for it.
    """
    import gguf

    size, bytes_ = gguf.GGML_QUANT_SIZES[kind]
    if not rows.any():
        # No scale, no weight: in every type a block of zero bytes is a block of zeros.
        if kind.name in ("F32", "F16"):
            return np.zeros(rows.shape, np.dtype(f"float{8 * bytes_}"))
        return np.zeros((rows.shape[0], rows.shape[1] // size * bytes_), np.uint8)
    rows = np.ascontiguousarray(rows, np.float32)
    if packer := _PACKERS.get(kind.name):
        return packer(rows.reshape(-1, size)).reshape(rows.shape[0], -1)
    try:
        # What is too large for the type is seen below.
        with np.errstate(over="ignore", invalid="ignore"):
            blocks = gguf.quantize(rows, kind)
    except NotImplementedError as error:
        raise TPatchError(
            f"'{name}' is stored as {kind.name}, and new neurons cannot be written in that type; choose another for "
            "the whole model: --type q8_0 (type='q8_0'), or any of " + ", ".join(TYPES)
        ) from error
    if kind.name != "F32" and not np.isfinite(decode(blocks, kind)).all():
        raise TPatchError(
            f"'{name}' holds weights as large as {np.abs(rows).max():.3g}, too large for {kind.name}; choose another "
            "type for the whole model: --type bf16 (type='bf16'), or f32"
        )
    return blocks


def decode(blocks: np.ndarray, kind: "GGMLQuantizationType") -> Rows:
    """The weights that `encode` stored, float32.

    Args:
        blocks: as the type stores them.
        kind: the type.
    """
    import gguf

    return gguf.dequantize(blocks, kind).astype(np.float32, copy=False)


def _half(x: np.ndarray) -> np.ndarray:
    """Rounded to float16, as scales are stored."""
    return x.astype(np.float16).astype(np.float32)


def _bytes(x: np.ndarray) -> Packed:
    """The bytes of float16 scales, one a block."""
    return x.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _divided(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """``x / by``, zero where ``by`` is."""
    return np.divide(x, by, out=np.zeros(np.broadcast_shapes(x.shape, by.shape), np.float32), where=by != 0)


def _affine(blocks: Blocks, size: int, levels: int, scales: int) -> tuple[np.ndarray, ...]:
    """``x ≈ d·s·q - m·t`` in parts of `size` weights: ``q`` up to `levels`, ``s`` and ``t`` up to `scales`.

    Returns:
        ``q``, ``s``, ``t`` as bytes and ``d``, ``m``.
    """
    parts = blocks.reshape(blocks.shape[0], -1, size)
    low = np.minimum(parts.min(-1), 0)
    step = (np.maximum(parts.max(-1), low) - low) / levels
    d, m = _half(step.max(-1) / scales), _half(-low.min(-1) / scales)
    s = np.rint(_divided(step, d[:, None])).clip(0, scales)
    t = np.rint(_divided(-low, m[:, None])).clip(0, scales)
    q = np.rint(_divided(parts + (m[:, None] * t)[..., None], (d[:, None] * s)[..., None])).clip(0, levels)
    return q.reshape(blocks.shape).astype(np.uint8), s.astype(np.uint8), t.astype(np.uint8), d, m


def _symmetric(blocks: Blocks, size: int, levels: int, scales: int) -> tuple[np.ndarray, ...]:
    """``x ≈ d·s·q`` in parts of `size` weights: ``q`` from ``-levels`` to ``levels - 1``, ``s`` up to ``scales - 1``.

    Returns:
        ``q + levels`` as bytes, ``s`` as whole numbers, and ``d``.
    """
    parts = blocks.reshape(blocks.shape[0], -1, size)
    step = np.abs(parts).max(-1) / (levels - 0.5)
    d = _half(step.max(-1) / (scales - 1))
    s = np.rint(_divided(step, d[:, None])).clip(0, scales - 1)
    q = np.rint(_divided(parts, (d[:, None] * s)[..., None])).clip(-levels, levels - 1)
    return (q.reshape(blocks.shape) + levels).astype(np.uint8), s.astype(np.int8), d


def _joined(q: np.ndarray, bits: int, places: int) -> Packed:
    """Several numbers in a byte: of every ``32·places`` (or 16) weights those 32 apart, the first in the low bits."""
    shifts = (bits * np.arange(places, dtype=np.uint8)).reshape(1, 1, places, 1)
    return np.bitwise_or.reduce(q << shifts, axis=2).reshape(q.shape[0], -1).astype(np.uint8)


def _six_bits(s: np.ndarray, t: np.ndarray) -> Packed:
    """Eight scales and eight offsets of six bits in twelve bytes, as Q4_K and Q5_K have them."""
    first = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    second = (t[:, :4] & 63) | ((t[:, 4:] >> 4) << 6)
    return np.concatenate([first, second, (s[:, 4:] & 15) | ((t[:, 4:] & 15) << 4)], -1).astype(np.uint8)


def _q2_k(blocks: Blocks) -> Packed:
    q, s, t, d, m = _affine(blocks, 16, 3, 15)
    return np.concatenate([s | (t << 4), _joined(q.reshape(-1, 2, 4, 32), 2, 4), _bytes(d), _bytes(m)], -1)


def _q3_k(blocks: Blocks) -> Packed:
    q, s, d = _symmetric(blocks, 16, 4, 32)
    high = _joined((q >> 2).reshape(-1, 1, 8, 32), 1, 8)
    low = _joined((q & 3).reshape(-1, 2, 4, 32), 2, 4)
    stored = (s + 32).astype(np.uint8)
    scales = np.concatenate(
        [
            (stored[:, :8] & 15) | ((stored[:, 8:] & 15) << 4),
            _joined((stored >> 4).reshape(-1, 1, 4, 4), 2, 4),
        ],
        -1,
    )
    return np.concatenate([high, low, scales, _bytes(d)], -1)


def _q4_k(blocks: Blocks) -> Packed:
    q, s, t, d, m = _affine(blocks, 32, 15, 63)
    return np.concatenate([_bytes(d), _bytes(m), _six_bits(s, t), _joined(q.reshape(-1, 4, 2, 32), 4, 2)], -1)


def _q5_k(blocks: Blocks) -> Packed:
    q, s, t, d, m = _affine(blocks, 32, 31, 63)
    high = _joined((q >> 4).reshape(-1, 1, 8, 32), 1, 8)
    low = _joined((q & 15).reshape(-1, 4, 2, 32), 4, 2)
    return np.concatenate([_bytes(d), _bytes(m), _six_bits(s, t), high, low], -1)


def _q6_k(blocks: Blocks) -> Packed:
    q, s, d = _symmetric(blocks, 16, 32, 128)
    low = _joined((q & 15).reshape(-1, 2, 2, 64), 4, 2)
    high = _joined((q >> 4).reshape(-1, 2, 4, 32), 2, 4)
    return np.concatenate([low, high, s.view(np.uint8), _bytes(d)], -1)


def _nearest(x: np.ndarray) -> np.ndarray:
    """The place of the nearest of IQ4's sixteen values."""
    return np.searchsorted((_IQ4[1:] + _IQ4[:-1]) / 2, x).astype(np.uint8)


def _iq4_nl(blocks: Blocks) -> Packed:
    # The largest weight takes the largest value, whose sign the scale takes over.
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[:, None], -1)
    d = _half(largest[:, 0] / _IQ4[0])
    q = _nearest(_divided(blocks, d[:, None]))
    return np.concatenate([_bytes(d), _joined(q.reshape(-1, 1, 2, 16), 4, 2)], -1)


def _iq4_xs(blocks: Blocks) -> Packed:
    parts = blocks.reshape(blocks.shape[0], -1, 32)
    step = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0] / _IQ4[0]
    d = _half(np.abs(step).max(-1) / 31)
    s = np.rint(_divided(step, d[:, None])).clip(-32, 31)
    q = _nearest(_divided(parts, (d[:, None] * s)[..., None]))
    stored = (s + 32).astype(np.uint16)
    high = np.bitwise_or.reduce((stored >> 4) << (2 * np.arange(8, dtype=np.uint16)), axis=-1)
    low = (stored[:, ::2] & 15) | ((stored[:, 1::2] & 15) << 4)
    packed = _joined(q.reshape(-1, 8, 2, 16), 4, 2)
    return np.concatenate([_bytes(d), high.reshape(-1, 1).view(np.uint8), low.astype(np.uint8), packed], -1)


_PACKERS: dict[str, Callable[[Blocks], Packed]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
