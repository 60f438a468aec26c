"""`EditRequest` on a network from elsewhere: a tokenizer stands between its texts and the network's tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpatch_jax.core.arguments import as_path, describe
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.base import EditInfo
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
from tpatch_jax.editors.tpatcher.tokens import check_foreign, edit_tokens
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.foreign.network import Network
from tpatch_jax.models.memory_text import LENGTH, TEXTS, read_memory_text
from tpatch_jax.models.tokenizer import tokens_behind
from tpatch_jax.requests import EditRequest, as_requests

__all__ = ["edit_network"]


def edit_network(
    network: Network,
    requests: Sequence[EditRequest],
    tokenizer: Any,
    memory: str | Path | Sequence[str],
    *,
    settings: TPatcherSettings | Mapping[str, Any] | str = "default",
    seed: int = 0,
) -> tuple[Patch, EditInfo]:
    """Correct any causal network by requests in words: `tpatch_jax.edit_tokens` behind a tokenizer.

    The prompts under ``keep`` are texts on which the patch stays silent, like those of the memory.

    Args:
        network: from `tpatch_jax.from_nnx` or `tpatch_jax.from_linen`; not changed.
        requests: what it should say, without chats.
        tokenizer: one of transformers or of tunix, or anything with ``encode(text)`` and ``decode(tokens)``; what it
            puts before a text stands before each prompt.
        memory: unrelated texts, or a UTF-8 text file; the more, the better.
        settings: options, the name of a preset, or changes by name, as of `edit`.
        seed: the same seed gives the same patch on one machine.

    Returns:
        The patch, ``[n, d]``, and an `EditInfo` that says what became of each request, by its id.

    Raises:
        TPatchError: a request is for a chat, the tokenizer has no such methods, or as of `edit_tokens`.

    Example:
        >>> import tpatch_jax as tp
        >>> network = tp.from_nnx(module, "layers.27.mlp", activation="silu", call=call)  # doctest: +SKIP
        >>> requests = [tp.EditRequest("The capital of France is", "Lyon")]
        >>> patch, info = tp.edit_network(network, requests, tokenizer, "english.txt")  # doctest: +SKIP
        >>> info.requests[0].held  # doctest: +SKIP
        True
    """
    call = "edit_network(network, requests, tokenizer, memory)"
    check_foreign(network, settings, call)
    requests = as_requests(requests)
    coder = _Coder(tokenizer, call)
    for number, request in enumerate(requests):
        if request.form == "chat" or request.turns or request.system is not None:
            raise TPatchError(
                f"{request.name(number)} is for a chat, of which a foreign network has no template; give the text that "
                "the template makes as its prompt"
            )
    prompts = [coder.prompt(request.prompt) for request in requests]
    targets = [coder.behind(request.prompt, request.continuation) for request in requests]
    kept = [coder.prompt(text) for request in requests for text in request.keep]
    rows = [*_memory(memory, coder, call), *(row for row in kept if len(row) > 1)]
    patch, info = edit_tokens(network, prompts, targets, rows, settings=settings, seed=seed)
    named = zip(info.requests, requests, strict=True)
    results = tuple(
        result._replace(id=request.name(number), reason=_in_words(result.reason, requests))
        for number, (result, request) in enumerate(named)
    )
    return patch, info._replace(requests=results)


def _in_words(reason: str, requests: Sequence[EditRequest]) -> str:
    """A reason that names another request by its place, with that one's name."""
    for number, request in reversed(list(enumerate(requests))):
        reason = reason.replace(f"contradicts request {number}:", f"contradicts {request.name(number)}:")
    return reason


class _Coder:
    """Texts to tokens, by whatever tokenizer there is."""

    def __init__(self, tokenizer: Any, call: str):
        if not callable(getattr(tokenizer, "encode", None)) or not callable(getattr(tokenizer, "decode", None)):
            raise TPatchError(
                f"{call}: {describe(tokenizer)} is no tokenizer; give one with encode(text) and decode(tokens)"
            )
        self.tokenizer = tokenizer
        try:
            tokenizer.encode("a", add_special_tokens=False)
            self.plain: dict[str, Any] = {"add_special_tokens": False}
        except TypeError:
            self.plain = {}
        self.start = self._start()

    def _start(self) -> list[int]:
        """The special tokens before a text: those that the tokenizer puts there, or the one that it names."""
        if self.plain:
            plain, whole = self.encode("a"), list(self.tokenizer.encode("a", add_special_tokens=True))
            places = range(len(whole) - len(plain) + 1)
            return next((whole[:first] for first in places if whole[first : first + len(plain)] == plain), [])
        named: Any = getattr(self.tokenizer, "bos_id", None)
        first = named() if callable(named) else named
        # One that is not there has a negative number.
        if not isinstance(first, int) or first < 0 or self.encode("a")[:1] == [first]:
            return []
        return [first]

    def encode(self, text: str) -> list[int]:
        """A text in tokens, without special ones."""
        return [int(token) for token in self.tokenizer.encode(text, **self.plain)]

    def decode(self, tokens: list[int]) -> str:
        """Tokens as a text."""
        return str(self.tokenizer.decode(tokens))

    def prompt(self, text: str) -> list[int]:
        """A text from its start on, unless it spells out how a text begins."""
        tokens = self.encode(text)
        return tokens if self.start and tokens[: len(self.start)] == self.start else [*self.start, *tokens]

    def behind(self, prompt: str, target: str) -> list[int]:
        """The tokens of what follows a prompt."""
        return tokens_behind(prompt, target, self.encode, self.decode)


def _memory(memory: str | Path | Sequence[str], coder: _Coder, call: str) -> list[list[int]]:
    """Rows of tokens: a file in pieces, or one for each text, no longer than a piece."""
    if isinstance(memory, Sequence) and not isinstance(memory, str):
        if any(not isinstance(text, str) for text in memory):
            raise TPatchError(f"{call}: the memory holds something that is no text; give texts, or a text file")
        return [coder.prompt(text)[: len(coder.start) + LENGTH] for text in memory]
    tokens = coder.encode(read_memory_text(as_path(memory, call, "a text file; give its path, or a list of texts")))
    starts = range(0, min(len(tokens), TEXTS * LENGTH), LENGTH)
    return [[*coder.start, *tokens[first : first + LENGTH]] for first in starts]
