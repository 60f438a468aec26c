"""The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`, and byte-level ones back again.

One entry of `_KINDS` per algorithm, one of `_PRE_TOKENIZERS` per rule that splits text before byte-level BPE.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.gguf_metadata import ROLES, Metadata, listed, special_ids
from tpatch_jax.models.tokenizer import Tokenizer

__all__ = ["tokenizer_files", "tokenizer_keys"]

_log = logging.getLogger(__name__)

TEMPLATE = "tokenizer.chat_template"
"""The key of the default one; others have their names behind a point, of which a list stands in the plural's key."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

_LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        _BYTE_LEVEL | {"use_regex": False},
    ],
}

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")

# `tokenizer.ggml.pre` -> the `pre_tokenizer` of tokenizer.json
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "default": _BYTE_LEVEL,
    "gpt-2": _BYTE_LEVEL,
    "gpt2": _BYTE_LEVEL,
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3),
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
}


class _Kind(NamedTuple):
    """What one algorithm puts into tokenizer.json."""

    pre_tokenizer: dict[str, Any]
    decoder: dict[str, Any]
    model: dict[str, Any]
    processors: list[dict[str, Any]]
    # what the file's flag for a token before every text means where it is absent
    starts_with_bos: bool
    prefix_space: bool


def tokenizer_files(metadata: Metadata, longest: int) -> dict[str, str]:
    """The tokenizer's files.

    Args:
        metadata: of the GGUF file.
        longest: how many tokens the model takes.

    Returns:
        From the name of each file to its content.

    Raises:
        TPatchError: the algorithm is not supported, or its tables do not belong together.

    Example:
        >>> sorted(tokenizer_files(metadata, 2048))  # doctest: +SKIP
        ['tokenizer.json', 'tokenizer_config.json']
    """
    from tokenizers import Tokenizer

    name = metadata["tokenizer.ggml.model"]
    if name not in _KINDS:
        raise TPatchError(
            f"{metadata.source}: tokenizer '{name}' is not supported; supported: "
            "gpt2 (byte-level BPE), llama (SentencePiece BPE)"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if len(types) != len(tokens):
        raise _damaged(metadata, f"{len(tokens)} tokens, {len(types)} types")
    kind = _KINDS[name](metadata)
    ids = {role: id for role, id in special_ids(metadata).items() if id is not None}
    special = {*ids.values(), *(id for id, type in enumerate(types) if type == _CONTROL)}

    def added(id: int) -> dict[str, Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {"id": id, "content": tokens[id], "special": id in special} | flags

    processors = [*kind.processors, *_ends(metadata, kind, ids)]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(id) for id, type in enumerate(types) if id in special or type == _USER_DEFINED],
        "normalizer": None,
        "pre_tokenizer": kind.pre_tokenizer,
        "post_processor": {"type": "Sequence", "processors": processors} if len(processors) > 1 else None,
        "decoder": kind.decoder,
        "model": {"type": "BPE", "vocab": {token: id for id, token in enumerate(tokens)}} | kind.model,
    }
    if len(processors) == 1:
        content["post_processor"] = processors[0]
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    # tokenizers raises bare Exception
    except Exception as error:
        raise _damaged(metadata, str(error)) from error

    template = _read_templates(metadata)
    settings = {
        # any class of a family's own would build its tables anew, and not as this file has them
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": kind.prefix_space,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    settings |= {f"{role}_token": tokens[id] for role, id in ids.items()}
    settings |= {} if template is None else {"chat_template": template}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


def _damaged(metadata: Metadata, reason: str) -> TPatchError:
    return TPatchError(f"{metadata.source}: the tokenizer is damaged ({reason}); download or export it again")


def _ends(metadata: Metadata, kind: _Kind, ids: dict[str, int]) -> list[dict[str, Any]]:
    """The rule that puts tokens before and after every text, as llama.cpp does for this file."""
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", kind.starts_with_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    if not any(wanted.values()):
        return []
    tokens, used, pieces = metadata["tokenizer.ggml.tokens"], {}, {"bos": [], "eos": []}
    for role in (role for role, yes in wanted.items() if yes):
        if role not in ids:
            raise TPatchError(
                f"{metadata.source}: 'tokenizer.ggml.add_{role}_token' is set, and there is no "
                f"'tokenizer.ggml.{role}_token_id'; export the model to GGUF again"
            )
        token = tokens[ids[role]]
        used[token] = {"id": token, "ids": [ids[role]], "tokens": [token]}
        pieces[role] = [{"SpecialToken": {"id": token, "type_id": 0}}]
    single, second = (
        [*pieces["bos"], {"Sequence": {"id": sequence, "type_id": 0}}, *pieces["eos"]] for sequence in "AB"
    )
    return [{"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": used}]


def _byte_level(metadata: Metadata) -> _Kind:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        # GPT-2 itself splits that way; of others llama.cpp warns that it does.
        if metadata["general.architecture"] != "gpt2":
            raise TPatchError(
                f"{metadata.source}: no 'tokenizer.ggml.pre' says how text is split before its bytes are joined, and "
                "Llama 3, SmolLM and GPT-2 do so differently; export the model to GGUF again with a newer llama.cpp, "
                "or use its Hugging Face folder"
            )
        _log.warning(
            "%s: no 'tokenizer.ggml.pre'; text is split as GPT-2 does, and begins with no token", metadata.source
        )
        pre = "default"
    if pre not in _PRE_TOKENIZERS:
        raise TPatchError(
            f"{metadata.source}: pre-tokenizer '{pre}' is not supported; supported: {listed(_PRE_TOKENIZERS)}"
        )
    return _Kind(
        pre_tokenizer=_PRE_TOKENIZERS[pre],
        decoder=_BYTE_LEVEL,
        model={
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
            "ignore_merges": pre in _LLAMA3_NAMES,
        },
        processors=[_BYTE_LEVEL],
        # llama.cpp adds a BOS for Llama 3 even where the file does not say so
        starts_with_bos=pre in _LLAMA3_NAMES,
        prefix_space=False,
    )


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens whose union is a token, the best scored union first, then the longest left part."""
    pairs = [
        (token[:at], token[at:], scores[id])
        for token, id in ids.items()
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    pairs.sort(key=lambda pair: (-pair[2], -len(pair[0]), -len(pair[1])))
    return [(left, right) for left, right, _ in pairs]


def _sentencepiece(metadata: Metadata) -> _Kind:
    """SentencePiece's BPE, which joins the pair whose union scores highest, as BPE with the merges in that order."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    if len(scores) != len(tokens):
        raise _damaged(metadata, f"{len(tokens)} tokens, {len(scores)} scores")
    # those below come about by other ways than joining; their score, often 0, would put them before all others
    apart = (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    joined = {token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type not in apart}
    unknown = special_ids(metadata)["unk"]
    prefix_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix_space else []
    return _Kind(
        # A text that has a leading space gets no second one, as with transformers' own Llama tokenizer and unlike
        # SentencePiece. "always", because llama.cpp puts one after each special token too.
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always" if prefix_space else "never",
            "split": False,
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        model={
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": _BYTE in types,
            "merges": _merges(joined, scores),
        },
        processors=[],
        starts_with_bos=True,
        prefix_space=prefix_space,
    )


# `tokenizer.ggml.model` -> its part of tokenizer.json
_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


_NAMES = ("gpt-2", "smollm", "llama-bpe")
"""Which name of a rule that splits text is written."""

_PROBES = (
    "The capital of France is Paris.",
    "  two  spaces,\ttabs\n\nand lines \n",
    "it's 1234567 or 3.14; I'LL see",
    "naïve café, 日本語 и русский, 🎉🎉",
    "def f(x):\n    return x**2 + a_b[1:]",
)
"""Texts of which a tokenizer that was written must make the same tokens as before."""


def tokenizer_keys(tokenizer: Tokenizer, vocabulary: int, longest: int, model: str) -> dict[str, Any]:
    """A tokenizer as the keys of a GGUF file: the inverse of `tokenizer_files` for byte-level BPE.

    Args:
        tokenizer: the model's.
        vocabulary: how many tokens the model has; those beyond the tokenizer's are marked as unused.
        longest: how many tokens the model takes.
        model: what messages call the model.

    Raises:
        TPatchError: it is of another kind, or who reads the keys would make other tokens of some text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = {} if backend is None else json.loads(backend.to_str())
    kind = told.get("model") or {}
    pre = next((name for name in _NAMES if _splits(told.get("pre_tokenizer")) == _splits(_PRE_TOKENIZERS[name])), None)
    if kind.get("type") != "BPE" or pre is None or told.get("normalizer") is not None:
        raise _unwritten(
            model, f"is no byte-level BPE that splits text as one of {', '.join(_NAMES)}", "the only ones written"
        )
    added = {entry["id"]: entry for entry in told["added_tokens"]}
    names = {id: token for token, id in kind["vocab"].items()} | {id: entry["content"] for id, entry in added.items()}
    if max(names) >= vocabulary:
        raise _unwritten(model, f"has tokens from {vocabulary} on, which the model does not know", "and")
    types = {id: _CONTROL if entry["special"] else _USER_DEFINED for id, entry in added.items()}
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [names.get(id, f"[PAD{id}]") for id in range(vocabulary)],
        "tokenizer.ggml.token_type": [types.get(id, _NORMAL if id in names else _UNUSED) for id in range(vocabulary)],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in kind["merges"]],
    }
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    keys |= {f"tokenizer.ggml.{ROLES[role]}_token_id": int(id) for role, id in ids.items() if id is not None}
    plain, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    first = next((first for first in range(len(whole)) if whole[first : first + len(plain)] == plain), 0)
    keys |= {
        "tokenizer.ggml.add_bos_token": first > 0,
        "tokenizer.ggml.add_eos_token": len(whole) > first + len(plain),
    }
    keys |= _template_keys(tokenizer.chat_template)
    _check_written(tokenizer, keys, longest, model)
    return keys


def _read_templates(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """A file's chat template, or all of them by name, as a tokenizer's configuration has them."""
    template = metadata.get(TEMPLATE)
    others = {str(name): metadata.get(f"{TEMPLATE}.{name}") for name in metadata.get(f"{TEMPLATE}s", ())}
    named = {name: text for name, text in {"default": template, **others}.items() if text}
    return [{"name": name, "template": text} for name, text in named.items()] if others else template


def _template_keys(template: Any) -> dict[str, Any]:
    """The keys of a tokenizer's chat template, of several ones each by its name, of letters, digits and ``_`` alone."""
    named = dict(template) if isinstance(template, Mapping) else {"default": template}
    default = named.pop("default", None)
    keys: dict[str, Any] = {TEMPLATE: default} if default else {}
    others = {re.sub("[^a-zA-Z0-9]", "_", name): text for name, text in named.items()}
    if others:
        keys |= {f"{TEMPLATE}s": list(others)} | {f"{TEMPLATE}.{name}": text for name, text in others.items()}
    return keys


def _unwritten(model: str, reason: str, what: str) -> TPatchError:
    return TPatchError(
        f"the tokenizer of {model!r} {reason}, {what}; make a GGUF file of the model with llama.cpp's "
        "convert_hf_to_gguf.py, and edit and export that (tpatch edit model.gguf)"
    )


def _splits(rule: Any) -> Any:
    """A rule that splits text without what changes no token."""
    if isinstance(rule, dict):
        return {name: _splits(entry) for name, entry in rule.items() if name != "trim_offsets"}
    return [_splits(entry) for entry in rule] if isinstance(rule, list) else rule


def _check_written(tokenizer: Tokenizer, keys: dict[str, Any], longest: int, model: str) -> None:
    """Make sure that who reads the keys makes the same tokens of texts."""
    from tokenizers import Tokenizer as Backend

    metadata = Metadata(Path(model), {"general.architecture": "", **keys})
    read = Backend.from_str(tokenizer_files(metadata, longest)["tokenizer.json"])
    special = [
        token
        for token, kind in zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    for text in (*_PROBES, "a".join(["", *special[:32], ""])):
        for whole in (False, True):
            wanted = tokenizer.encode(text, add_special_tokens=whole)
            if read.encode(text, add_special_tokens=whole).ids != wanted:
                raise _unwritten(model, f"makes other tokens of {text[:40]!r} than the keys of a GGUF file say", "so")
