"""Rows of token ids: a prompt and its answer, and what of them each kind of network reads."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int

from tpatch_jax.core.sizes import power_of_two, round_up
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig

__all__ = ["ASK", "place_in", "row_length", "split_row", "tokens_array"]

STEP = 8
"""Of how many tokens the length of a short row is a multiple."""

ASK = -1
"""In a row of token ids: what stands before it is read whole by an encoder, what stands behind it is the answer."""


def row_length(tokens: int) -> int:
    """The length that a row is padded to: a multiple of 8 up to 64, then a power of two.

    Example:
        >>> row_length(5), row_length(17), row_length(70)
        (8, 24, 128)
    """
    return round_up(tokens, STEP) if tokens <= 64 else power_of_two(tokens)


def split_row(config: NetworkConfig, row: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """What an encoder reads of a row and what a decoder reads of it; see `tpatch_jax.models.model.Model`.

    Args:
        config: the network's description.
        row: token ids.

    Returns:
        Two parts; of a decoder the first is empty, of a classifier the second.
    """
    if config.architecture == "decoder":
        return (), row
    end = row.index(ASK) if ASK in row else len(row)
    return row[:end], row[end + 1 :] if config.encoder else ()


def place_in(config: NetworkConfig, row: Sequence[int], position: int) -> int:
    """Where the network says what follows a position of a row: a token of its decoder, or a classifier's first."""
    if config.architecture == "decoder":
        return position
    return position - len(split_row(config, row)[0]) - 1 if config.encoder else 0


def tokens_array(rows: Sequence[Sequence[int]], length: int, padding: int = 0) -> Int[Array, "rows length"]:
    """Token ids, padded on the right to ``[rows, length]``.

    Raises:
        TPatchError: an embedding stands in the place of a token.
    """
    table = np.full((len(rows), length), padding, np.int32)
    for row, ids in zip(table, rows, strict=True):
        try:
            row[: len(ids)] = ids
        except OverflowError:
            raise TPatchError(
                "a prompt with embeddings is read here, where token ids alone are; T-Patcher at site=last corrects "
                "such prompts"
            ) from None
    # Put as it is: `jnp.asarray` would compile a program for each new shape.
    return jax.device_put(table)
