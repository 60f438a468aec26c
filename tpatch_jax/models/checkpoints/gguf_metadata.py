"""The key-value part of a GGUF file, and what the parts of the converter share in reading it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tpatch_jax.errors import TPatchError

__all__ = ["ROLES", "Metadata", "listed", "special_ids"]

ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""From the name of a special token in Hugging Face files to that in GGUF keys."""

# what llama.cpp takes where a file with a SentencePiece vocabulary names none
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}


class Metadata(dict[str, Any]):
    """Keys and values; a missing key is the user's business, so it says which file lacks it.

    Attributes:
        source: the file, for messages.
    """

    def __init__(self, source: Path, items: dict[str, Any]) -> None:
        """Take the keys and values of `source`."""
        super().__init__(items)
        self.source = source

    def __missing__(self, key: str) -> Any:
        """An error that names the key."""
        raise TPatchError(
            f"{self.source}: no metadata '{key}'; export the model to GGUF again with a current llama.cpp"
        )

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number; some models have one per layer there, which no family here does."""
        number = self[key] if default is None else self.get(key, default)
        if not isinstance(number, int):
            raise TPatchError(f"{self.source}: '{key}' is {number!r}; only models whose layers are all alike work")
        if number < 1:
            raise TPatchError(f"{self.source}: '{key}' is {number}; the file is damaged: download or export it again")
        return number


def special_ids(metadata: Metadata) -> dict[str, int | None]:
    """The ids of the tokens for beginning, end, unknown and padding; None where the file has none.

    llama.cpp passes over an id outside the vocabulary, which some exporters write for "none"; so does this.
    """
    known = len(metadata["tokenizer.ggml.tokens"])
    defaults = _SENTENCEPIECE_IDS if metadata["tokenizer.ggml.model"] == "llama" else {}
    ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for role, key in ROLES.items()}
    return {role: id if 0 <= id < known else defaults.get(role) for role, id in ids.items()}


def listed(names: Iterable[Any]) -> str:
    """Up to six names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
