"""Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3: pre-norm blocks, rotary positions, grouped queries, a gated FFN."""

from collections.abc import Mapping

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import (
    QUERY_NORM,
    Family,
    Settings,
    activation,
    rope,
    rotated_context,
    setting,
    windows,
)

__all__ = ["LLAMA", "MISTRAL", "NAMES", "QWEN_2", "QWEN_3", "configure_llama", "with_norm_biases"]

NAMES = {
    "embed.embedding": "model.embed_tokens.weight",
    "layers.{}.norm_1.scale": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.query": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.key": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.value": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.output": "model.layers.{}.self_attn.o_proj",
    "layers.{}.norm_2.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.ffn.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.ffn.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.ffn.down": "model.layers.{}.mlp.down_proj",
    "norm.scale": "model.norm.weight",
    "head": "lm_head",
}


def with_norm_biases(names: Mapping[str, str]) -> dict[str, str]:
    """The names of a family whose norms have biases: those of the norms, not of their weights."""
    return {
        path.removesuffix(".scale"): name.removesuffix(".weight") if path.endswith(".scale") else name
        for path, name in names.items()
    }


def configure_llama(settings: Settings, family: str = "llama", **changes: object) -> NetworkConfig:
    """What all families of this kind share; ``changes`` are the fields in which one differs."""
    heads, hidden_size = setting(settings, "num_attention_heads"), setting(settings, "hidden_size")
    head_width = settings.get("head_dim") or hidden_size // heads
    frequencies, scale = rope(settings, head_width)
    bias = bool(settings.get("attention_bias"))
    fields = {
        "family": family,
        "vocabulary": setting(settings, "vocab_size"),
        "hidden_size": hidden_size,
        "layers": setting(settings, "num_hidden_layers"),
        "heads": heads,
        "key_value_heads": settings.get("num_key_value_heads") or heads,
        "head_width": head_width,
        "ffn_width": setting(settings, "intermediate_size"),
        "context": rotated_context(settings),
        "activation": activation(settings.get("hidden_act", "silu")),
        "ffn_bias": bool(settings.get("mlp_bias")),
        "norm_epsilon": settings.get("rms_norm_eps", 1e-6),
        "query_bias": bias,
        "output_bias": bias,
        "rope_frequencies": frequencies,
        "rope_scale": scale,
        "tied": bool(settings.get("tie_word_embeddings")),
    }
    return NetworkConfig(**{**fields, **changes})


def _mistral(settings: Settings) -> NetworkConfig:
    window, layers = settings.get("sliding_window") or 0, setting(settings, "num_hidden_layers")
    # With kinds of layers it is what others call Ministral.
    seen = windows(settings, layers) if settings.get("layer_types") else (window,) * layers if window else ()
    return configure_llama(settings, "mistral", windows=seen)


def _qwen_2(settings: Settings) -> NetworkConfig:
    seen = windows(settings, setting(settings, "num_hidden_layers"))
    return configure_llama(settings, "qwen2", query_bias=True, output_bias=False, windows=seen)


def _qwen_3(settings: Settings) -> NetworkConfig:
    seen = windows(settings, setting(settings, "num_hidden_layers"))
    return configure_llama(settings, "qwen3", query_norm=True, windows=seen)


LLAMA = Family(
    "llama", ("llama",), configure_llama, "model.", NAMES, constants=("rotary_emb.inv_freq",), biases="mlp_bias"
)
MISTRAL = Family("mistral", ("mistral",), _mistral, "model.", NAMES, export="exact as Llama")
QWEN_2 = Family("qwen2", ("qwen2",), _qwen_2, "model.", NAMES, export="exact as Llama")
QWEN_3 = Family("qwen3", ("qwen3",), _qwen_3, "model.", {**NAMES, **QUERY_NORM}, export="exact as Doge")
