"""Gemma 1, 2 and 3 (text): scaled embeddings, norms around one, and from 2 on sandwich norms and windows."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import QUERY_NORM, Family, Settings, activation, rope, setting, windows
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["GEMMA", "GEMMA_2", "GEMMA_3"]


def _gemma(settings: Settings) -> NetworkConfig:
    named = settings.get("hidden_activation") or settings.get("hidden_act") or "gelu"
    # The first release said "gelu" and meant its approximation by tanh.
    named = "gelu_pytorch_tanh" if named == "gelu" else named
    return configure_llama(settings, "gemma", **_common(settings, named))


def _common(settings: Settings, named: str) -> dict[str, object]:
    if settings.get("use_bidirectional_attention"):
        raise TPatchError("config.json describes a Gemma whose tokens see the ones after them, which is not a decoder")
    return {
        "activation": activation(named),
        "norm_shift": 1.0,
        "embed_scale": setting(settings, "hidden_size") ** 0.5,
        "tied": bool(settings.get("tie_word_embeddings", True)),
    }


def _later(settings: Settings) -> dict[str, object]:
    layers = setting(settings, "num_hidden_layers")
    return {
        **_common(settings, setting(settings, "hidden_activation")),
        "sandwich": True,
        "attention_scale": setting(settings, "query_pre_attn_scalar") ** -0.5,
        "attention_cap": settings.get("attn_logit_softcapping") or 0.0,
        "logit_cap": settings.get("final_logit_softcapping") or 0.0,
        "windows": windows(settings, layers),
    }


def _gemma_2(settings: Settings) -> NetworkConfig:
    return configure_llama(settings, "gemma2", **_later(settings))


def _gemma_3(settings: Settings) -> NetworkConfig:
    width = setting(settings, "head_dim")
    (everywhere, scale), (local, _) = (rope(settings, width, f"{kind}_attention") for kind in ("full", "sliding"))
    rotation = {"rope_frequencies": everywhere, "local_rope_frequencies": local, "rope_scale": scale}
    return configure_llama(settings, "gemma3", query_norm=True, **rotation, **_later(settings))


_SANDWICH = {
    **NAMES,
    "layers.{}.norm_attention.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.norm_2.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.{}.norm_ffn.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
GEMMA = Family("gemma", ("gemma",), _gemma, "model.", NAMES, export="exact as Granite")
GEMMA_2 = Family("gemma2", ("gemma2",), _gemma_2, "model.", _SANDWICH, export="approximate only")
GEMMA_3 = Family("gemma3", ("gemma3_text",), _gemma_3, "model.", {**_SANDWICH, **QUERY_NORM}, export="approximate only")
