"""Files of embeddings that a decoder's memory holds: an ``.npz`` with ``embeddings`` and ``prompts``."""

from pathlib import Path

import numpy as np

from tpatch_jax.embeddings import EmbeddingPrompt
from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.reading import read_npz

__all__ = ["read_embedding_file"]


def read_embedding_file(path: str | Path, hidden_size: int) -> list[list[EmbeddingPrompt]]:
    """What a file of embeddings holds, as prompts: for each thing the shapes that show it.

    Args:
        path: an ``.npz`` with ``embeddings [things, n, hidden_size]`` or, each thing in several shapes,
            ``[things, shapes, n, hidden_size]``, and ``prompts``: the text that is read with them, or one for each.
        hidden_size: of the model.

    Returns:
        ``[things][shapes]`` prompts, as many shapes of each.

    Raises:
        TPatchError: it cannot be read, lacks an array, or they do not go together; the message names them.

    Example:
        >>> read_embedding_file("pictures.npz", 576)[0][0].text  # doctest: +SKIP
        'The diagnosis is'
    """
    arrays, there = read_npz(Path(path), ("embeddings", "prompts").__contains__)
    if len(arrays) < 2:
        raise TPatchError(
            f"{path} has {there}; a memory of embeddings has 'embeddings' and 'prompts', the "
            "text that is read with them"
        )
    embeddings, prompts = arrays["embeddings"], arrays["prompts"]
    if embeddings.ndim not in (3, 4) or not embeddings.size or embeddings.dtype.kind != "f":
        raise TPatchError(
            f"{path}: 'embeddings' is {embeddings.dtype} {list(embeddings.shape)}; give floats "
            "[things, n, hidden_size] or [things, shapes, n, hidden_size]"
        )
    if embeddings.shape[-1] != hidden_size:
        raise TPatchError(f"{path}: 'embeddings' are {embeddings.shape[-1]} wide, and the model is {hidden_size}")
    if not np.isfinite(embeddings).all():
        raise TPatchError(f"{path}: 'embeddings' hold something that is not finite; mend what made them")
    if prompts.dtype.kind != "U" or prompts.shape not in ((), (len(embeddings),)):
        raise TPatchError(
            f"{path}: 'prompts' is {prompts.dtype} {list(prompts.shape)}; give one text, or one for each of the "
            f"{len(embeddings)} things"
        )
    texts = np.broadcast_to(prompts, len(embeddings)).tolist()
    groups = embeddings if embeddings.ndim == 4 else embeddings[:, None]
    return [[EmbeddingPrompt(text, shape) for shape in group] for text, group in zip(texts, groups, strict=True)]
