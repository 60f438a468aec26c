"""What the unedited model answers freely, kept on disk: computed once, then recalled by content."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpatch_jax.core import ffn
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.storage.files import write_text

__all__ = ["recall_answers"]

VERSION = 1


def recall_answers(
    cache: Path | None, model: Model, kind: str, asked: list[Any], answer: Callable[[], list[Any]]
) -> list[Any]:
    """What a model answers: from the disk, where the same was asked before.

    Args:
        cache: folder where answers are kept; ``None`` keeps nothing.
        model: the unedited model; what one with patches says is not kept.
        kind: how it is asked, which is a part of the content as well.
        asked: what decides the answers besides, as JSON can hold it, one entry an answer.
        answer: asks the model.

    Returns:
        One entry for each that was asked.

    Example:
        >>> recall_answers(None, None, "sentences", ["2 + 2 ="], lambda: [" 4"])
        [' 4']
    """
    if cache is None or ffn.any_attached(model.params):
        return answer()
    content = json.dumps([VERSION, fingerprint(model), kind, asked])
    path = cache / "answers" / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"
    try:
        kept = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        kept = None
    if isinstance(kept, list) and len(kept) == len(asked):
        return kept
    answers = answer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(answers))
    except (OSError, TPatchError):
        pass  # A full disk costs time, not correctness.
    return answers
