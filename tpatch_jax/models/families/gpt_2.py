"""GPT-2 in all sizes: learned positions, layer norms, and kernels stored as ``[in, out]``."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Fused, Settings, activation, configure_plain, setting

__all__ = ["GPT_2"]


def _gpt_2(settings: Settings) -> NetworkConfig:
    if settings.get("scale_attn_by_inverse_layer_idx") or settings.get("scale_attn_weights") is False:
        raise TPatchError("config.json changes the scale of attention, which no GPT-2 release does; not supported")
    heads, hidden_size = setting(settings, "n_head"), setting(settings, "n_embd")
    context = setting(settings, "n_positions")
    return configure_plain(
        "gpt2",
        settings,
        hidden_size=hidden_size,
        heads=heads,
        layers=setting(settings, "n_layer"),
        ffn_width=settings.get("n_inner") or 4 * hidden_size,
        context=context,
        activation=activation(setting(settings, "activation_function")),
        norm_epsilon=setting(settings, "layer_norm_epsilon"),
        query_bias=True,
        output_bias=True,
        positions=context,
        tied=bool(settings.get("tie_word_embeddings", True)),
    )


GPT_2 = Family(
    "gpt2",
    ("gpt2",),
    _gpt_2,
    "transformer.",
    {
        "embed.embedding": "transformer.wte.weight",
        "positions.embedding": "transformer.wpe.weight",
        "layers.{}.norm_1": "transformer.h.{}.ln_1",
        "layers.{}.attention.output": "transformer.h.{}.attn.c_proj",
        "layers.{}.norm_2": "transformer.h.{}.ln_2",
        "layers.{}.ffn.up": "transformer.h.{}.mlp.c_fc",
        "layers.{}.ffn.down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    fused=(
        Fused(
            "transformer.h.{}.attn.c_attn",
            ("layers.{}.attention.query", "layers.{}.attention.key", "layers.{}.attention.value"),
        ),
    ),
    transposed=False,
    constants=(".attn.bias", ".attn.masked_bias"),
    ffn_width="n_inner",
)
