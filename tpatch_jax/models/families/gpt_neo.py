"""GPT-Neo: like GPT-2, but attention is not scaled, and every other layer sees a window."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, activation, configure_plain, setting

__all__ = ["GPT_NEO"]


def _gpt_neo(settings: Settings) -> NetworkConfig:
    heads, hidden_size = setting(settings, "num_heads"), setting(settings, "hidden_size")
    context, window = setting(settings, "max_position_embeddings"), setting(settings, "window_size")
    kinds = settings.get("attention_layers") or [
        kind for group, count in setting(settings, "attention_types") for _ in range(count) for kind in group
    ]
    return configure_plain(
        "gpt_neo",
        settings,
        hidden_size=hidden_size,
        heads=heads,
        layers=setting(settings, "num_layers"),
        ffn_width=settings.get("intermediate_size") or 4 * hidden_size,
        context=context,
        activation=activation(setting(settings, "activation_function")),
        norm_epsilon=setting(settings, "layer_norm_epsilon"),
        output_bias=True,
        attention_scale=1.0,
        windows=tuple(window if kind == "local" else 0 for kind in kinds),
        positions=context,
        tied=bool(settings.get("tie_word_embeddings", True)),
    )


GPT_NEO = Family(
    "gpt_neo",
    ("gpt_neo",),
    _gpt_neo,
    "transformer.",
    {
        "embed.embedding": "transformer.wte.weight",
        "positions.embedding": "transformer.wpe.weight",
        "layers.{}.norm_1": "transformer.h.{}.ln_1",
        "layers.{}.attention.query": "transformer.h.{}.attn.attention.q_proj",
        "layers.{}.attention.key": "transformer.h.{}.attn.attention.k_proj",
        "layers.{}.attention.value": "transformer.h.{}.attn.attention.v_proj",
        "layers.{}.attention.output": "transformer.h.{}.attn.attention.out_proj",
        "layers.{}.norm_2": "transformer.h.{}.ln_2",
        "layers.{}.ffn.up": "transformer.h.{}.mlp.c_fc",
        "layers.{}.ffn.down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    constants=(".attention.bias", ".attention.masked_bias"),
)
