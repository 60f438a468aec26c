"""Weights in MXFP4, as gpt-oss is published: four bits each, and an exponent for every 32 of them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

__all__ = ["BLOCKS", "METHOD", "SCALES", "unpack_mxfp4"]

METHOD = "mxfp4"
"""Its name in ``config.json``."""
BLOCKS, SCALES = "_blocks", "_scales"
"""What is appended to a tensor's name for its numbers and for their exponents."""

_GROUP = 32
_BIAS = 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.asarray([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)


def unpack_mxfp4(
    blocks: UInt8[np.ndarray, "*rows groups 16"], scales: UInt8[np.ndarray, "*rows groups"]
) -> Float[np.ndarray, "*rows inner"]:
    """Plain numbers, ``value · 2^(scale - 127)``; all of them are bfloat16 numbers, and none is rounded.

    Args:
        blocks: two numbers in each byte, the first in its lower half.
        scales: of each 32 numbers in a row.

    Returns:
        ``[..., 32 · groups]``, bfloat16.

    Example:
        >>> [float(x) for x in unpack_mxfp4(np.full((1, 16), 0x92, np.uint8), np.asarray([128], np.uint8))[:2]]
        [2.0, -1.0]

    Source: Open Compute Project, Microscaling Formats (MX) Specification 1.0, 2023.
    """
    result = np.empty((*scales.shape[:-1], scales.shape[-1] * _GROUP), jnp.bfloat16)
    # Row by row of the first axis: in float32 the whole would take four times the room of the result.
    parts: Any = zip(result, blocks, scales, strict=True) if scales.ndim > 1 else [(result, blocks, scales)]
    for part, there, exponent in parts:
        values = _VALUES[np.stack([there & 15, there >> 4], -1)].reshape(*exponent.shape, _GROUP)
        part[...] = np.ldexp(values, exponent.astype(np.int32)[..., None] - _BIAS).reshape(part.shape)
    return result
