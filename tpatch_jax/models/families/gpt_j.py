"""GPT-J: attention and FFN read the same norm, side by side; neighbours are rotated as pairs."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, activation, configure_plain, setting

__all__ = ["GPT_J"]


def _gpt_j(settings: Settings) -> NetworkConfig:
    heads, hidden_size = setting(settings, "n_head"), setting(settings, "n_embd")
    turned = settings.get("rotary_dim") or hidden_size // heads
    return configure_plain(
        "gptj",
        settings,
        hidden_size=hidden_size,
        heads=heads,
        layers=setting(settings, "n_layer"),
        ffn_width=settings.get("n_inner") or 4 * hidden_size,
        context=setting(settings, "n_positions"),
        activation=activation(setting(settings, "activation_function")),
        block="shared",
        norm_epsilon=setting(settings, "layer_norm_epsilon"),
        rope_frequencies=tuple(10_000.0 ** (-2 * pair / turned) for pair in range(turned // 2)),
        rope_adjacent=True,
        tied=bool(settings.get("tie_word_embeddings")),
        head_bias=True,
    )


GPT_J = Family(
    "gptj",
    ("gptj",),
    _gpt_j,
    "transformer.",
    {
        "embed.embedding": "transformer.wte.weight",
        "layers.{}.norm_1": "transformer.h.{}.ln_1",
        "layers.{}.attention.query": "transformer.h.{}.attn.q_proj",
        "layers.{}.attention.key": "transformer.h.{}.attn.k_proj",
        "layers.{}.attention.value": "transformer.h.{}.attn.v_proj",
        "layers.{}.attention.output": "transformer.h.{}.attn.out_proj",
        "layers.{}.ffn.up": "transformer.h.{}.mlp.fc_in",
        "layers.{}.ffn.down": "transformer.h.{}.mlp.fc_out",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    constants=(".attn.bias", ".attn.masked_bias"),
    ffn_width="n_inner",
)
