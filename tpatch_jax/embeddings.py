"""Embeddings as a part of prompts: what a vision tower, or anything else, puts in front of a text or inside it."""

import hashlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tpatch_jax.errors import TPatchError
from tpatch_jax.images import IMAGE, find_file

__all__ = ["EMBEDDINGS", "EmbeddingPrompt", "as_embeddings", "embedding_prompt", "is_named", "plain_text"]

EMBEDDINGS = "[embeddings sha256 "
"""With this the names of embeddings begin, which stand for them in files and reports."""

_MEND = "give an array [n, hidden_size] of floats, or the path of a .npy that holds one"


class EmbeddingPrompt(str):
    """A text with embeddings where a prompt stands. As a text it is their name, made of their digest, and the text.

    So it is told from others, kept in files and shown like any prompt, and only what reads prompts asks for the
    embeddings. Files keep the name alone, never the embeddings.

    Attributes:
        text: the text.
        embeddings: ``[n, hidden_size]``, float32; what the network's own embedding table would give for ``n`` tokens.
        positions: which tokens of the text they stand in place of, of those that the model reads, the first being 0;
            ``None`` puts them in front of the text, behind what begins every text.

    Example:
        >>> one = EmbeddingPrompt("The chest is", np.zeros((2, 4)))
        >>> str(one)  # doctest: +ELLIPSIS
        '[embeddings sha256 ...] The chest is'
        >>> one == EmbeddingPrompt("The chest is", np.ones((2, 4)))
        False
    """

    text: str
    embeddings: Float[np.ndarray, "n hidden"]
    positions: tuple[int, ...] | None

    def __new__(cls, text: str, embeddings: Any, positions: Any = None) -> "EmbeddingPrompt":
        """Name a text with embeddings, which are copied.

        Raises:
            TPatchError: the text is none, the embeddings are no such array, or there is no position for each.
        """
        if not isinstance(text, str) or isinstance(text, EmbeddingPrompt):
            raise TPatchError(f"the text beside the embeddings is {_named(text)}; give a text, '' for none")
        vectors = as_embeddings(embeddings)
        places = None if positions is None else _as_positions(positions, len(vectors))
        what = f"{vectors.shape} {places} ".encode() + vectors.tobytes()
        made = super().__new__(cls, f"{EMBEDDINGS}{hashlib.sha256(what).hexdigest()[:16]}] {text}")
        made.text, made.embeddings, made.positions = text, vectors, places
        return made

    def strip(self, chars: str | None = None, /) -> "EmbeddingPrompt":
        """The same without white space around the text; at its end alone where positions count from its start."""
        text = self.text.strip(chars) if self.positions is None else self.text.rstrip(chars)
        return self if text == self.text else EmbeddingPrompt(text, self.embeddings, self.positions)

    def __deepcopy__(self, memo: Any) -> "EmbeddingPrompt":
        """The prompt itself, which never changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is copied and sent to other processes."""
        return EmbeddingPrompt, (self.text, np.asarray(self.embeddings), self.positions)


def _named(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def as_embeddings(
    embeddings: Any, where: str = "the embeddings", folder: Path | None = None
) -> Float[np.ndarray, "n hidden"]:
    """Embeddings as an array that never changes.

    Args:
        embeddings: an array ``[n, hidden_size]`` of floats, nested lists of them, or the path of a ``.npy`` of one.
        where: what is read, as a message begins.
        folder: where relative paths begin; without it, or where there is no such file, in the working directory.

    Raises:
        TPatchError: it is none of these, holds nothing, or something that is not finite.

    Example:
        >>> as_embeddings([[0.5, 1.0]]).shape
        (1, 2)
    """
    if isinstance(embeddings, str | PathLike):
        embeddings = _read_array(find_file(embeddings, folder), where)
    try:
        array = np.asarray(embeddings)
    except (ValueError, TypeError):
        array = np.zeros(0, object)
    if array.dtype == object or (array.ndim == 0 and not hasattr(embeddings, "shape")):
        raise TPatchError(f"{where} are {_named(embeddings)}; {_MEND}")
    # bfloat16 is no kind of NumPy's own.
    if array.ndim != 2 or not array.size or array.dtype.kind in "biuSUc":
        raise TPatchError(f"{where} are an array of {array.dtype} {list(array.shape)}; {_MEND}")
    vectors = np.array(array, np.float32, order="C")
    if not np.isfinite(vectors).all():
        raise TPatchError(f"{where} hold something that is not finite; mend what made them")
    vectors.setflags(write=False)
    return vectors


def _read_array(path: Path, where: str) -> np.ndarray:
    if path.suffix.lower() != ".npy":
        raise TPatchError(f"{where}: {path} is no .npy; {_MEND}")
    try:
        with path.open("rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise TPatchError(f"{where}: {path} cannot be read ({reason}); write it by numpy.save") from None


def _as_positions(positions: Any, count: int) -> tuple[int, ...]:
    try:
        array = np.asarray(positions)
    except (ValueError, TypeError):
        array = np.zeros(0, object)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or len(array) != count:
        raise TPatchError(
            f"positions are {str(positions)[:60]!r}; give a whole number for each of the {count} embeddings, the "
            "token in whose place it stands"
        )
    places = tuple(array.tolist())
    if min(places) < 0 or len(set(places)) < count:
        raise TPatchError(f"positions are {list(places)}; give numbers of tokens, from 0 on, each once")
    return places


def plain_text(prompt: str) -> str:
    """The text of a prompt without its embeddings, if it has any.

    Example:
        >>> plain_text(EmbeddingPrompt("Is it normal?", np.zeros((1, 4)))), plain_text("Is it?")
        ('Is it normal?', 'Is it?')
    """
    return prompt.text if isinstance(prompt, EmbeddingPrompt) else prompt


def is_named(prompt: str) -> bool:
    """Whether a prompt is a picture or has embeddings, of which files keep the name alone; or such a name.

    Example:
        >>> is_named(EmbeddingPrompt("Is it?", np.zeros((1, 4)))), is_named("image sha256 660c"), is_named("Is it?")
        (True, True, False)
    """
    return prompt.startswith((EMBEDDINGS, IMAGE))


def embedding_prompt(entry: Any, beside: EmbeddingPrompt, where: str, folder: Path | None = None) -> str:
    """What stands in ``rephrases``, ``locality`` or ``keep`` of a request with embeddings, as a prompt.

    Args:
        entry: a text, which is read with the request's embeddings; other embeddings, which are read with its text and
            positions; an object with ``prompt``, ``embeddings`` or both, and ``positions``; or a prompt with
            embeddings, which stays as it is. An object of a ``prompt`` alone is that text without any.
        beside: the request's prompt.
        where: what is read, as a message begins.
        folder: where relative paths begin.

    Raises:
        TPatchError: it is none of these.

    Example:
        >>> asked = EmbeddingPrompt("Is it normal?", np.zeros((1, 4)))
        >>> plain_text(embedding_prompt(np.ones((1, 4)), asked, "locality"))
        'Is it normal?'
        >>> embedding_prompt({"prompt": "The sky is"}, asked, "locality")
        'The sky is'
    """
    if isinstance(entry, EmbeddingPrompt):
        return entry
    if isinstance(entry, str) and entry.strip():
        if beside.positions is not None:
            raise TPatchError(
                f"{where} is a text, and the request's positions are those of another; give an object with 'prompt', "
                "'embeddings' and 'positions'"
            )
        return EmbeddingPrompt(entry, beside.embeddings)
    if not isinstance(entry, Mapping):
        return EmbeddingPrompt(beside.text, as_embeddings(entry, where, folder), beside.positions)
    unknown = sorted(set(entry) - {"prompt", "embeddings", "positions"})
    if unknown or not entry:
        has = ", ".join(map(repr, unknown)) or "nothing"
        raise TPatchError(f"{where} has {has}; give 'prompt', 'embeddings' or both")
    text = entry.get("prompt", beside.text)
    if not isinstance(text, str):
        raise TPatchError(f"{where}: 'prompt' is {_named(text)}; write it as a string")
    if "embeddings" not in entry:
        if not text.strip() or "positions" in entry:
            raise TPatchError(f"{where} has no 'embeddings'; give them, or a 'prompt' alone")
        return text
    positions = entry.get("positions", beside.positions if text == beside.text else None)
    try:
        return EmbeddingPrompt(text, as_embeddings(entry["embeddings"], where, folder), positions)
    except TPatchError as error:
        raise TPatchError(f"{where}: {error}") from None
