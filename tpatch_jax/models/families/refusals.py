"""Why a network is not read, from what its ``config.json`` says of it, whatever it calls itself."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["refuse"]

_RECURRENT = "some of its layers are recurrent"
_EXPERTS = "its feed-forward networks are other mixtures of experts"
_LATENT = "its attention keeps compressed keys and values (multi-head latent attention)"
_SPARSE = "its attention picks the tokens that it sees by an index"
_VISION = "it reads images as well"
_AUDIO = "it reads or says speech"
_SHARED = "all its layers share one feed-forward network, so that a patch would join it in every layer"
_RELATIVE = "its attention scores depend on relative positions"
_TWO = "it holds several networks, one for each side of a search"
_ALIBI = "its attention scores fall with distance (ALiBi)"
_UNEVEN = "its layers differ in their parts and sizes"
_OLDER = "it is laid out as its first release was"

_ASKED_FOR: Mapping[str, tuple[str, ...]] = {
    _RECURRENT: (
        *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe"),
        *("lfm2_vl", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next"),
        *("recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
    ),
    _EXPERTS: (
        *("dbrx", "ernie4_5_moe", "flex_olmo", "glm4_moe", "granitemoe", "granitemoeshared"),
        *("hunyuan_v1_moe", "llama4", "llama4_text", "minimax", "phimoe"),
        *("qwen3_vl_moe", "switch_transformers"),
    ),
    _LATENT: ("deepseek_v32", "kimi_k2", "minicpm3"),
    _VISION: (
        *("florence2", "gemma3", "gemma3n", "gemma4", "idefics3", "internvl", "llama4", "llava", "minicpmv"),
        *("mistral3", "mllama", "paligemma", "phi3_v", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"),
        *("smolvlm",),
    ),
    _AUDIO: ("qwen2_audio", "speech_to_text", "voxtral", "wav2vec2"),
    _SHARED: ("albert",),
    _RELATIVE: ("deberta", "deberta-v2"),
    _TWO: ("dpr",),
    _ALIBI: ("bloom", "mpt"),
    _UNEVEN: ("nemotron-nas", "openelm"),
    _OLDER: ("phi-msft",),
}
"""Why architectures that are often asked for are not read; what their settings say comes besides."""

_SIGNS: Mapping[str, tuple[str, ...]] = {
    _EXPERTS: (
        *("moe_intermediate_size", "moe_num_experts", "n_routed_experts", "num_experts", "num_experts_per_tok"),
        *("num_local_experts", "num_shared_experts"),
    ),
    _LATENT: ("kv_lora_rank",),
    _SPARSE: ("index_n_heads", "index_topk", "sparse_attention_config"),
    _RECURRENT: (
        *("conv_L_cache", "hybrid_override_pattern", "linear_conv_kernel_dim", "linear_key_head_dim"),
        *("mamba_d_state", "mamba_expand", "mamba_num_heads", "ssm_cfg", "ssm_state_size", "wkv_head_size"),
    ),
    _VISION: ("mm_vision_tower", "vision_config", "vision_tower", "visual"),
    _AUDIO: ("audio_config", "num_mel_bins", "whisper_config"),
    _ALIBI: ("alibi", "use_alibi"),
    _UNEVEN: ("block_configs",),
}
"""Settings with a value, and what of a network they tell."""

_RECURRENT_LAYERS = ("conv", "linear", "mamba", "recurrent", "ssm")
_MEND = {
    _RECURRENT: "edit a model whose layers all attend",
    _EXPERTS: "edit a dense model of the same makers",
    _LATENT: "edit a model with grouped or ordinary attention",
    _VISION: "edit the checkpoint of its text network, if there is one",
    _AUDIO: "edit a model of text",
    _TWO: "name the folder of one of them",
    _OLDER: "take the checkpoint of the same model that transformers reads without code of its own",
}


def _layers(entry: Any) -> Iterable[str]:
    return (kind for kind in entry if isinstance(kind, str)) if isinstance(entry, list) else ()


def refuse(settings: Mapping[str, Any]) -> str:
    """Why a network is not read, and what to do instead; empty where its settings tell nothing.

    Args:
        settings: of ``config.json``, with or without the settings of its parts in them.

    Example:
        >>> refuse({"model_type": "new", "audio_config": {"layers": 4}})
        'it reads or says speech, which is not run here; edit a model of text'
    """
    named, reasons = settings.get("model_type"), []
    parts = [settings, *(entry for entry in settings.values() if isinstance(entry, Mapping))]
    for reason, names in _ASKED_FOR.items():
        if named in names:
            reasons.append(reason)
    for reason, signs in _SIGNS.items():
        if any(_says(part.get(sign)) for part in parts for sign in signs):
            reasons.append(reason)
    kinds = [
        kind for part in parts for name in ("layer_types", "layers_block_type") for kind in _layers(part.get(name))
    ]
    if any(sign in kind for kind in kinds for sign in _RECURRENT_LAYERS) or "rwkv" in str(named):
        reasons.append(_RECURRENT)
    if not reasons and settings.get("auto_map") and not _transformers_knows(str(named)):
        reasons.append("its checkpoint brings it as Python code (auto_map)")
    reasons = list(dict.fromkeys(reasons))
    if not reasons:
        return ""
    *first, last = reasons
    told = f"{', '.join(first)} and {last}" if first else last
    mend = next((_MEND[reason] for reason in reasons if reason in _MEND), "")
    return f"{told}, which is not run here" + (f"; {mend}" if mend else "")


def _says(entry: Any) -> bool:
    """Whether a setting says that there is something; one expert, or none, is an ordinary network."""
    return entry is True or entry not in (None, 0, 1, "", [], {})


def _transformers_knows(named: str) -> bool:
    from transformers import CONFIG_MAPPING

    return named in CONFIG_MAPPING
