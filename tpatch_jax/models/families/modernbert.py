"""ModernBERT with a classification head: an encoder with rotary positions, windows, pre-norms and a gated FFN."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.bert import configure_encoder
from tpatch_jax.models.families.family import Family, Fused, Settings, activation, rope, setting, windows

__all__ = ["MODERNBERT"]


def _modernbert(settings: Settings) -> NetworkConfig:
    hidden_size, heads = setting(settings, "hidden_size"), setting(settings, "num_attention_heads")
    layers, width = setting(settings, "num_hidden_layers"), hidden_size // heads
    if not settings.get("layer_types"):
        raise TPatchError("config.json has no 'layer_types'; copy the model's original config.json beside its weights")
    # So many tokens to either side, and the token itself.
    seen = windows({**settings, "sliding_window": setting(settings, "local_attention") // 2 + 1}, layers)
    (everywhere, scale), (local, other) = (rope(settings, width, f"{kind}_attention") for kind in ("full", "sliding"))
    if other != 1:
        raise TPatchError("config.json scales the rotation of layers with a window, which is not supported")
    if settings.get("norm_bias"):
        raise TPatchError("config.json gives norms biases ('norm_bias'), and no released ModernBERT has them")
    bias, ffn_bias = bool(settings.get("attention_bias")), bool(settings.get("mlp_bias"))
    return configure_encoder(
        "modernbert",
        {"classifier_pooling": "cls", **settings},
        hidden_size=hidden_size,
        heads=heads,
        layers=layers,
        ffn_width=setting(settings, "intermediate_size"),
        context=setting(settings, "max_position_embeddings"),
        activation=activation(setting(settings, "hidden_activation")),
        gated=True,
        ffn_bias=ffn_bias,
        post_norm=False,
        first_norm=False,
        norm_epsilon=setting(settings, "norm_eps"),
        norm_bias=False,
        query_bias=bias,
        output_bias=bias,
        windows=seen,
        rope_frequencies=everywhere,
        local_rope_frequencies=local,
        rope_scale=scale,
        head_activation=activation(setting(settings, "classifier_activation")),
        head_dense_bias=bool(settings.get("classifier_bias")),
        head_norm=True,
    )


_ATTENTION = tuple(f"layers.{{}}.attention.{part}" for part in ("query", "key", "value"))
_FFN = tuple(f"layers.{{}}.ffn.{part}" for part in ("gate", "up"))

MODERNBERT = Family(
    "modernbert",
    ("modernbert",),
    _modernbert,
    "model.",
    {
        "embed.embedding": "model.embeddings.tok_embeddings.weight",
        "norm_embed": "model.embeddings.norm",
        "layers.{}.norm_1": "model.layers.{}.attn_norm",
        "layers.{}.attention.output": "model.layers.{}.attn.Wo",
        "layers.{}.norm_2": "model.layers.{}.mlp_norm",
        "layers.{}.ffn.down": "model.layers.{}.mlp.Wo",
        "norm": "model.final_norm",
        "classifier.dense": "head.dense",
        "classifier.norm": "head.norm",
        "classifier.output": "classifier",
    },
    fused=(Fused("model.layers.{}.attn.Wqkv", _ATTENTION), Fused("model.layers.{}.mlp.Wi", _FFN)),
    biases="mlp_bias",
    other_heads=("decoder.", "lm_head."),
)
