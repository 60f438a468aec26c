"""The tokenizer in a model's folder, and when two of them are one."""

import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.image_reader import ImageReader, image_reader

__all__ = ["Tokenizer", "describe_tokenizer", "lost_characters", "read_tokenizer", "same_tokenizer", "tokens_behind"]

_OF_CALLS = ("truncation", "padding")

RECORD = "tpatch_source.json"
"""In a folder that was converted: what it was made from."""

_PROBE = "The capital of France is Paris"
"""A text that every tokenizer which knows its letters writes as it reads it."""


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None
    special_tokens_map: dict[str, Any]
    chat_template: Any
    is_fast: bool
    eos_token: str | None
    all_special_tokens: list[str]
    added_tokens_decoder: dict[int, Any]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """A conversation in the model's chat template."""
        ...

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


def read_tokenizer(folder: Path, config: NetworkConfig, settings: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer in a model's folder, or what reads its images.

    Args:
        folder: where it is.
        config: the network that it belongs to.
        settings: of a network that reads images, what `read_settings` gave.

    Raises:
        TPatchError: there is none, it is damaged, or it has more tokens than the network.
    """
    if config.image is not None:
        return image_reader(config, settings or {})
    try:
        tokenizer = _read(folder)
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
    _check_round_trip(cast(Tokenizer, tokenizer), folder)
    return cast(Tokenizer, tokenizer)


def _read(folder: Path) -> Any:
    """The tokenizer as `transformers.AutoTokenizer` would read it.

    That reads much else to find out the class. Folders that were converted from a GGUF file say it: their tokenizer is
    what tokenizer.json says and nothing else.
    """
    if (folder / RECORD).exists():
        told = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        if told.get("tokenizer_class") == "PreTrainedTokenizerFast":
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _check_round_trip(tokenizer: Tokenizer, folder: Path) -> None:
    """Make sure that a tokenizer writes what it reads, but for case, accents and spaces between signs.

    Raises:
        TPatchError: spaces or letters are not there any more, as where transformers 5.3.0 takes a byte-level tokenizer
            that is labelled as Llama's for one of SentencePiece's kind.
    """
    if lost_characters(tokenizer, _PROBE):
        return
    said = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False), skip_special_tokens=True)
    wanted, written = _folded(_PROBE), _folded(said)
    place, written_words = 0, written.split()
    # Words may come apart, as of a tokenizer without a decoder; none may run into the next.
    for word in wanted.split():
        parts = ""
        while place < len(written_words) and len(parts) < len(word):
            parts, place = parts + written_words[place], place + 1
        if parts != word:
            import transformers

            raise TPatchError(
                f"the tokenizer in {folder} reads {_PROBE!r} and writes {said!r} with transformers "
                f"{transformers.__version__}, so no text could be told from its tokens; install another version of "
                "transformers, or name the right tokenizer_class in tokenizer_config.json (PreTrainedTokenizerFast "
                "reads tokenizer.json as it is)"
            )


def _folded(text: str) -> str:
    """A text without what tokenizers may change: case, accents, forms of one letter."""
    apart = unicodedata.normalize("NFKD", text).casefold()
    return "".join(character for character in apart if unicodedata.category(character)[0] != "M")


def tokens_behind(
    prompt: str, target: str, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
) -> list[int]:
    """The token ids of what follows a prompt, read off the whole text where the prompt's stay the same in it.

    Args:
        prompt: the text before it.
        target: begins with the space between them, if there is one.
        encode: a text to its tokens, without special ones.
        decode: the inverse.
    """
    before, whole = encode(prompt), encode(prompt + target)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # A prompt that ends in a space has a token for it, which the whole text joins with the target's first. Alone the
    # target may bring a space again; behind something else, which is taken away, it does not.
    alone, text = encode(target), decode(whole)
    for joint in ("", "\n", "("):
        read, tokens = encode(joint), encode(joint + target)
        if tokens[: len(read)] == read and decode([*before, *tokens[len(read) :]]) == text:
            return tokens[len(read) :]
    return alone


def lost_characters(tokenizer: Tokenizer, text: str) -> list[str]:
    """The characters of a text that its tokens do not hold, each once: unknown ones, and those that are dropped.

    What a tokenizer changes on purpose (case, accents, forms of one letter, spaces, control characters) is not lost.

    Args:
        tokenizer: any of transformers.
        text: the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False)
        there = set(_folded(back))
        if tokenizer.unk_token and tokenizer.unk_token not in text:
            there = set(_folded(back.replace(tokenizer.unk_token, " ")))
        return list(dict.fromkeys(sign for sign in text if not set(_folded(sign).strip()) <= there and _seen(sign)))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    held, unknown = bytearray(len(text)), bytearray(len(text))
    for token, (first, last) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        # Some tokenizers name an ordinary token as the unknown one; where the text spells it out it is meant.
        lost = token == tokenizer.unk_token_id and text[first:last].strip() != tokenizer.unk_token
        (unknown if lost else held)[first:last] = b"\1" * (last - first)
    lost = [sign for sign, no in zip(text, unknown, strict=True) if no and _seen(sign)]
    dropped = [sign for sign, no, yes in zip(text, unknown, held, strict=True) if not (no or yes) and _seen(sign)]
    if dropped:
        # Behind a character that is dropped without a trace the offsets of others are wrong.
        alone = [sign for sign in text if _seen(sign) and not tokenizer.encode(sign, add_special_tokens=False)]
        lost += alone or dropped
    return list(dict.fromkeys(lost))


def _seen(character: str) -> bool:
    """Whether a character is one that a reader sees: no space, no control character, no accent of its own."""
    kind = unicodedata.category(character)
    return kind[0] not in "ZM" and kind not in ("Cc", "Cf")


def describe_tokenizer(tokenizer: Tokenizer) -> Any:
    """All that decides which tokens texts become, as plain JSON values.

    Args:
        tokenizer: any of transformers.
    """
    if isinstance(tokenizer, ImageReader):
        return tokenizer.settings
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
