"""The text part of networks that read images or speech as well: which are read, and how their tensors are named."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["TEXT_OF", "has_text_part", "text_names", "text_settings"]

TEXT_OF = "tpatch_text_of"
"""In settings, while a model is read: the architecture of which they describe the text part."""

_WHOLE = (
    *("gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "qwen2_5_vl"),
    *("qwen2_vl", "qwen3_vl", "smolvlm", "vipllava", "voxtral"),
)
"""Architectures that compute on text alone what a network of text computes."""

_ALONE = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Names that a text part has within, and as a model of its own: text alone has one position where images have three."""

_OF_ALL = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
_IMAGES = ("mrope_interleaved", "mrope_section")
_OURS = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
_INSIDE = ("model.language_model.", "language_model.model.", "model.text_model.", "language_model.")


def has_text_part(settings: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes a network of which the text part is read."""
    return settings.get("model_type") in _WHOLE and any(
        isinstance(settings.get(name), Mapping) for name in ("text_config", "vision_config", "audio_config")
    )


def text_settings(raw: Mapping[str, Any], completed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a text part, as if it were a model of its own.

    Args:
        raw: what ``config.json`` says.
        completed: the same with the architecture's defaults.

    Example:
        >>> whole = {"model_type": "llava", "text_config": {"model_type": "llama"}, "tie_word_embeddings": False}
        >>> text_settings(whole, whole)
        {'model_type': 'llama', 'tie_word_embeddings': False, 'tpatch_text_of': 'llava'}
    """
    inner, said = completed.get("text_config") or {}, raw.get("text_config") or {}
    text = dict(inner) | {name: entry for name, entry in said.items() if entry is not None}
    text |= {name: completed[name] for name in _OF_ALL if completed.get(name) is not None and said.get(name) is None}
    text |= {name: raw[name] for name in _OF_ALL if raw.get(name) is not None}
    text["model_type"] = _ALONE.get(text.get("model_type", ""), text.get("model_type", ""))
    if isinstance(rules := text.get("rope_parameters"), Mapping):
        kept = {name: entry for name, entry in rules.items() if name not in _IMAGES and entry != "mrope"}
        text["rope_parameters"] = kept
        # The rules are complete; what an older file says of them would be read instead of them by others.
        text.pop("rope_scaling", None)
    text.pop("architectures", None)
    return text | {TEXT_OF: raw["model_type"]}


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Which tensors belong to the text part: from the names that a model of its own would give them to those there are.

    Args:
        names: of all tensors.

    Example:
        >>> text_names(["model.language_model.norm.weight", "model.visual.norm.weight", "lm_head.weight"])
        {'model.norm.weight': 'model.language_model.norm.weight', 'lm_head.weight': 'lm_head.weight'}
    """
    result = {}
    for name in names:
        inside = next((name.removeprefix(first) for first in _INSIDE if name.startswith(first)), None)
        alone = name if inside is None else inside if inside.startswith("lm_head.") else f"model.{inside}"
        if alone.startswith(_OURS):
            result[alone] = name
    return result
