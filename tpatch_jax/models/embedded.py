"""Embeddings in the place of tokens: in rows of token ids, and in the batches that networks run on."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.sizes import round_up
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.rows import tokens_array

__all__ = [
    "Embedded",
    "EmbeddedToken",
    "embedded_row",
    "plain_row",
    "put_embeddings",
    "table_of",
    "tokens_of",
    "written_tokens",
]


class Embedded(NamedTuple):
    """Token ids of which embeddings stand in the place of some: what a network runs on in the place of an array of ids.

    Attributes:
        tokens: ``[batch, tokens]`` int; those that are replaced may be anything but negative.
        embeddings: ``[batch, n, d]``, as wide as the embedding table.
        positions: which token each stands in place of, ``[batch, n]`` int; one past the last token marks padding.
    """

    tokens: Int[Array, "batch tokens"]
    embeddings: Float[Array, "batch n hidden"]
    positions: Int[Array, "batch n"]


class EmbeddedToken(int):
    """In a row of token ids an embedding in the place of a token: a negative number made of its digest.

    So rows are compared, cut and put together as lists of numbers, and equal embeddings are equal tokens.

    Attributes:
        vector: ``[d]``.
    """

    vector: Float[np.ndarray, " hidden"]

    def __new__(cls, vector: Float[np.ndarray, " hidden"]) -> "EmbeddedToken":
        """The number of an embedding."""
        digest = hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).digest()
        # Far from every id of a token, so that an array of ids refuses it.
        made = super().__new__(cls, -(2**62) + int.from_bytes(digest[:7], "big"))
        made.vector = vector
        return made


def embedded_row(
    row: Sequence[int], vectors: Float[np.ndarray, "n hidden"], positions: Sequence[int] | None, start: int, read: int
) -> list[int]:
    """A row of token ids with embeddings in front of a text or in the place of some of its tokens.

    Args:
        row: token ids of a text.
        vectors: the embeddings.
        positions: which tokens they replace; ``None`` puts them in front.
        start: how many tokens stand before the text in any case.
        read: how many tokens of the row may be replaced, the first ones.

    Raises:
        TPatchError: there are fewer tokens than a position asks for.
    """
    tokens = [EmbeddedToken(vector) for vector in vectors]
    if positions is None:
        return [*row[:start], *tokens, *row[start:]]
    if max(positions) >= read:
        raise TPatchError(
            f"embeddings are to stand at position {max(positions)}, and the text has {read} tokens; give 0 to "
            f"{read - 1}"
        )
    replaced = list(row)
    for place, token in zip(positions, tokens, strict=True):
        replaced[place] = token
    return replaced


def plain_row(row: Sequence[int]) -> list[int]:
    """A row with 0 in the place of embeddings."""
    return [0 if isinstance(token, EmbeddedToken) else token for token in row]


def written_tokens(row: Sequence[int]) -> list[int]:
    """The token ids of a row that are a text's."""
    return [token for token in row if not isinstance(token, EmbeddedToken)]


def table_of(rows: Sequence[Sequence[int]], length: int, padding: int = 0) -> Int[Array, "rows length"] | Embedded:
    """Rows as a network reads them: `tokens_array`, with the embeddings beside it where there are any."""
    places = [[at for at, token in enumerate(row) if isinstance(token, EmbeddedToken)] for row in rows]
    most = max(map(len, places), default=0)
    if not most:
        return tokens_array(rows, length, padding)
    vectors = [[row[at].vector for at in chosen] for row, chosen in zip(rows, places, strict=True)]  # type: ignore[attr-defined]
    width = next(len(vector) for row in vectors for vector in row)
    # Few sizes, so that pictures of nearly as many patches compile nothing new.
    size = round_up(most, 8)
    embeddings, positions = np.zeros((len(rows), size, width), np.float32), np.full((len(rows), size), length, np.int32)
    for number, (row, chosen) in enumerate(zip(vectors, places, strict=True)):
        if row:
            embeddings[number, : len(row)], positions[number, : len(row)] = row, chosen
    return Embedded(tokens_array([*map(plain_row, rows)], length, padding), *jax.device_put((embeddings, positions)))


def tokens_of(batch: Int[Array, "batch tokens"] | Embedded) -> Int[Array, "batch tokens"]:
    """The token ids of what a network or its encoder reads."""
    return batch.tokens if isinstance(batch, Embedded) else batch


def put_embeddings(
    tokens: Int[Array, "batch tokens"],
    embeddings: Float[Array, "batch n hidden"],
    positions: Int[Array, "batch n"] | None,
    width: int,
) -> Embedded:
    """Embeddings in front of tokens, or in the place of some of them. Pure: it may be called under ``jit``.

    Args:
        tokens: ``[batch, tokens]`` int.
        embeddings: ``[batch, n, width]``, what the embedding table would give for ``n`` tokens.
        positions: which tokens they replace, ``[batch, n]`` or ``[n]`` int; ``None`` puts them in front of all.
        width: of the embedding table.

    Raises:
        TPatchError: one of them is of another shape or kind, or a position that is known now is none of a token.
    """
    shape, dtype = getattr(embeddings, "shape", ()), getattr(embeddings, "dtype", np.dtype(object))
    if getattr(tokens, "ndim", 0) != 2:
        has = f"an array of shape {list(tokens.shape)}" if hasattr(tokens, "shape") else describe(tokens)
        raise TPatchError(f"the tokens beside embeddings are {has}; give an array of token ids, [batch, tokens]")
    count = tokens.shape[0]
    if (
        len(shape) != 3
        or shape[0] != count
        or not shape[1]
        or shape[2] != width
        or not jnp.issubdtype(dtype, jnp.floating)
    ):
        has = f"{dtype} {list(shape)}" if hasattr(embeddings, "shape") else describe(embeddings)
        raise TPatchError(f"the embeddings are {has}; give floats [{count}, n, {width}], some for each row of tokens")
    if positions is None:
        front = jnp.zeros((count, shape[1]), jnp.int32)
        joined = jnp.concatenate([front, jnp.asarray(tokens, jnp.int32)], 1)
        return Embedded(joined, jnp.asarray(embeddings), jnp.broadcast_to(jnp.arange(shape[1]), shape[:2]))
    kind, where = getattr(positions, "dtype", None), getattr(positions, "shape", ())
    if kind is None or not jnp.issubdtype(kind, jnp.integer) or where not in (shape[:2], shape[1:2]):
        has = f"{kind} {list(where)}" if kind is not None else describe(positions)
        raise TPatchError(f"positions are {has}; give whole numbers [{count}, {shape[1]}], a token for each embedding")
    if not isinstance(positions, Tracer):
        least, most = int(np.min(positions)), int(np.max(positions))
        if least < 0 or most >= tokens.shape[1]:
            raise TPatchError(f"positions go from {least} to {most}; the tokens are 0 to {tokens.shape[1] - 1}")
    places = jnp.broadcast_to(jnp.asarray(positions), shape[:2])
    # Whatever stood there is no padding.
    shown = jnp.asarray(tokens).at[jnp.arange(count)[:, None], places].set(0, mode="drop")
    return Embedded(shown, jnp.asarray(embeddings), places)
