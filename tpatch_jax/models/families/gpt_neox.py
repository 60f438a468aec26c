"""GPT-NeoX and Pythia: attention and FFN side by side, query, key and value stored head by head."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import (
    Family,
    Fused,
    Settings,
    activation,
    configure_plain,
    rope,
    rotated_context,
    setting,
)

__all__ = ["GPT_NEOX"]


def _gpt_neox(settings: Settings) -> NetworkConfig:
    heads, hidden_size = setting(settings, "num_attention_heads"), setting(settings, "hidden_size")
    bias = settings.get("attention_bias", True)
    frequencies, scale = rope(settings, hidden_size // heads)
    return configure_plain(
        "gpt_neox",
        settings,
        hidden_size=hidden_size,
        heads=heads,
        layers=setting(settings, "num_hidden_layers"),
        ffn_width=setting(settings, "intermediate_size"),
        context=rotated_context(settings),
        activation=activation(setting(settings, "hidden_act")),
        block="parallel" if settings.get("use_parallel_residual", True) else "serial",
        norm_epsilon=setting(settings, "layer_norm_eps"),
        query_bias=bias,
        output_bias=bias,
        rope_frequencies=frequencies,
        rope_scale=scale,
        tied=bool(settings.get("tie_word_embeddings")),
    )


GPT_NEOX = Family(
    "gpt_neox",
    ("gpt_neox",),
    _gpt_neox,
    "gpt_neox.",
    {
        "embed.embedding": "gpt_neox.embed_in.weight",
        "layers.{}.norm_1": "gpt_neox.layers.{}.input_layernorm",
        "layers.{}.attention.output": "gpt_neox.layers.{}.attention.dense",
        "layers.{}.norm_2": "gpt_neox.layers.{}.post_attention_layernorm",
        "layers.{}.ffn.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "layers.{}.ffn.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    fused=(
        Fused(
            "gpt_neox.layers.{}.attention.query_key_value",
            ("layers.{}.attention.query", "layers.{}.attention.key", "layers.{}.attention.value"),
            by_head=True,
        ),
    ),
    constants=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
)
