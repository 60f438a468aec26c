"""The tokenizer in a model's folder, and when two of them are one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig

__all__ = ["Tokenizer", "describe_tokenizer", "read_tokenizer", "same_tokenizer"]

_OF_CALLS = ("truncation", "padding")


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    special_tokens_map: dict[str, Any]
    chat_template: Any
    is_fast: bool

    def __call__(self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool) -> Mapping[str, Any]:
        """A text in token ids, and where in it they stand."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """A text in token ids."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Token ids as a text."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str:
        """The name of a token."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """All tokens, by name."""
        ...

    def save_pretrained(self, save_directory: Path) -> object:
        """Write the tokenizer's files."""
        ...


def read_tokenizer(folder: Path, config: NetworkConfig) -> Tokenizer:
    """The tokenizer in a model's folder.

    Args:
        folder: where it is.
        config: the network that it belongs to.

    Raises:
        TPatchError: there is none, it is damaged, or it has more tokens than the network.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # The tokenizers package knows no kinds of errors, and a damaged file has many.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TPatchError(
            f"{folder} has no tokenizer that can be read ({reason}); copy the model's own tokenizer.json there, or, if "
            "another version of the tokenizers package wrote it, upgrade transformers and tokenizers"
        ) from error
    # Tokens that were added may lie beyond: Gemma 3 has one for images, which its models of text know nothing of.
    if tokenizer.vocab_size > config.vocabulary:
        raise TPatchError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens and the model {config.vocabulary}: "
            "it belongs to another model; copy the right one there"
        )
    for kind in ("bos", "eos", "cls", "sep"):
        if (getattr(tokenizer, f"{kind}_token_id") or 0) >= config.vocabulary:
            raise TPatchError(
                f"the {kind}_token of the tokenizer in {folder} is none of the model's {config.vocabulary} tokens: it "
                "belongs to another model; copy the right one there"
            )
    return cast(Tokenizer, tokenizer)


def describe_tokenizer(tokenizer: Tokenizer) -> Any:
    """All that decides which tokens texts become, as plain JSON values.

    Args:
        tokenizer: any of transformers.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return sorted(tokenizer.get_vocab().items())
    # How texts are cut and padded is set anew at every call.
    return {name: entry for name, entry in json.loads(fast.to_str()).items() if name not in _OF_CALLS}


def same_tokenizer(left: Tokenizer | None, right: Tokenizer | None) -> bool:
    """Whether two tokenizers make the same tokens of every text; either may be ``None``."""
    if left is right:
        return True
    if left is None or right is None or type(left) is not type(right):
        return False
    same_ends = left.special_tokens_map == right.special_tokens_map
    return same_ends and describe_tokenizer(left) == describe_tokenizer(right)
