"""OPT: GPT-2 with ReLU, separate query, key and value, and positions that begin at row two."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, activation, configure_plain, setting

__all__ = ["OPT"]

_OFFSET = 2


def _opt(settings: Settings) -> NetworkConfig:
    heads, hidden_size = setting(settings, "num_attention_heads"), setting(settings, "hidden_size")
    if (
        not settings.get("do_layer_norm_before", True)
        or settings.get("word_embed_proj_dim", hidden_size) != hidden_size
    ):
        raise TPatchError(
            "config.json describes the one OPT (350m) that normalises after its layers, which is not supported; "
            "use another size"
        )
    if not settings.get("layer_norm_elementwise_affine", True) or settings.get("_remove_final_layer_norm"):
        raise TPatchError("config.json leaves out OPT's norms or their weights, which is not supported")
    context, bias = setting(settings, "max_position_embeddings"), settings.get("enable_bias", True)
    return configure_plain(
        "opt",
        settings,
        hidden_size=hidden_size,
        heads=heads,
        layers=setting(settings, "num_hidden_layers"),
        ffn_width=setting(settings, "ffn_dim"),
        context=context,
        activation=activation(settings.get("activation_function", "relu")),
        ffn_bias=bias,
        query_bias=bias,
        output_bias=bias,
        positions=context + _OFFSET,
        position_offset=_OFFSET,
        tied=bool(settings.get("tie_word_embeddings", True)),
    )


OPT = Family(
    "opt",
    ("opt",),
    _opt,
    "model.",
    {
        "embed.embedding": "model.decoder.embed_tokens.weight",
        "positions.embedding": "model.decoder.embed_positions.weight",
        "layers.{}.norm_1": "model.decoder.layers.{}.self_attn_layer_norm",
        "layers.{}.attention.query": "model.decoder.layers.{}.self_attn.q_proj",
        "layers.{}.attention.key": "model.decoder.layers.{}.self_attn.k_proj",
        "layers.{}.attention.value": "model.decoder.layers.{}.self_attn.v_proj",
        "layers.{}.attention.output": "model.decoder.layers.{}.self_attn.out_proj",
        "layers.{}.norm_2": "model.decoder.layers.{}.final_layer_norm",
        "layers.{}.ffn.up": "model.decoder.layers.{}.fc1",
        "layers.{}.ffn.down": "model.decoder.layers.{}.fc2",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    },
    ffn_width="ffn_dim",
    biases="enable_bias",
)
