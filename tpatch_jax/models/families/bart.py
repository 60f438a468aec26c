"""BART: an encoder-decoder with learned positions, whose norms follow the parts."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, activation, configure_plain, setting

__all__ = ["BART"]

OFFSET = 2
"""The tables of positions begin with rows that stand for nothing."""


def _bart(settings: Settings) -> NetworkConfig:
    hidden_size, context = setting(settings, "d_model"), setting(settings, "max_position_embeddings")
    act = activation(setting(settings, "activation_function"))

    def stack(side: str, **fields: object) -> NetworkConfig:
        shared = {
            "layers": setting(settings, f"{side}_layers"),
            "ffn_width": setting(settings, f"{side}_ffn_dim"),
            "context": context,
            "activation": act,
            "post_norm": True,
            "embed_norm": True,
            "embed_scale": hidden_size**0.5 if settings.get("scale_embedding") else 1.0,
            "query_bias": True,
            "output_bias": True,
            "positions": context + OFFSET,
            "position_offset": OFFSET,
        }
        heads = setting(settings, f"{side}_attention_heads")
        return configure_plain("bart", settings, hidden_size=hidden_size, heads=heads, **{**shared, **fields})

    tied = bool(settings.get("tie_word_embeddings", True))
    return stack("decoder", encoder=stack("encoder", causal=False), tied=tied, head_bias=True)


_PARTS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "norm_1": "self_attn_layer_norm",
    "cross.query": "encoder_attn.q_proj",
    "cross.key": "encoder_attn.k_proj",
    "cross.value": "encoder_attn.v_proj",
    "cross.output": "encoder_attn.out_proj",
    "norm_cross": "encoder_attn_layer_norm",
    "ffn.up": "fc1",
    "ffn.down": "fc2",
    "norm_2": "final_layer_norm",
}


def _stack(ours: str, theirs: str) -> dict[str, str]:
    return {
        f"{ours}positions.embedding": f"{theirs}.embed_positions.weight",
        f"{ours}norm_embed": f"{theirs}.layernorm_embedding",
        **{f"{ours}layers.{{}}.{part}": f"{theirs}.layers.{{}}.{name}" for part, name in _PARTS.items()},
    }


BART = Family(
    "bart",
    ("bart",),
    _bart,
    "model.",
    {
        "embed.embedding": "model.shared.weight",
        **_stack("encoder.", "model.encoder"),
        **_stack("", "model.decoder"),
        "head": "lm_head",
        "head.bias": "final_logits_bias",
    },
    ffn_width="decoder_ffn_dim",
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    optional_row="final_logits_bias",
)
