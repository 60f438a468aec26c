"""BART and its kin: mBART, Marian and Pegasus, encoder-decoders of one kind with norms before or behind the parts."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, activation, configure_plain, setting

__all__ = ["BART", "MARIAN", "MBART", "PEGASUS", "stack_names"]

OFFSET = 2
"""The tables of positions begin with rows that stand for nothing."""


def _like_bart(family: str, settings: Settings, **differing: object) -> NetworkConfig:
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
        fields = {**shared, **differing, **fields}
        return configure_plain(family, settings, hidden_size=hidden_size, heads=heads, **fields)

    tied = bool(settings.get("tie_word_embeddings", True))
    return stack("decoder", encoder=stack("encoder", causal=False), tied=tied, head_bias=True)


_COMPUTED = {"embed_norm": False, "positions": 0, "position_offset": 0, "sinusoids": True}
"""Positions that are computed instead of learned, and no norm behind them."""


def _marian(settings: Settings) -> NetworkConfig:
    decoder = settings.get("decoder_vocab_size") or setting(settings, "vocab_size")
    if settings.get("share_encoder_decoder_embeddings") is False or decoder != setting(settings, "vocab_size"):
        raise TPatchError(
            "config.json gives encoder and decoder embeddings or vocabularies of their own "
            "('share_encoder_decoder_embeddings', 'decoder_vocab_size'), and one for both is supported"
        )
    return _like_bart("marian", settings, **_COMPUTED)


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


def stack_names(ours: str, theirs: str) -> dict[str, str]:
    """What checkpoints call the parts of a stack.

    Args:
        ours: what stands before our names.
        theirs: what stands before theirs.
    """
    return {
        f"{ours}norm": f"{theirs}.layer_norm",
        f"{ours}positions.embedding": f"{theirs}.embed_positions.weight",
        f"{ours}norm_embed": f"{theirs}.layernorm_embedding",
        **{f"{ours}layers.{{}}.{part}": f"{theirs}.layers.{{}}.{name}" for part, name in _PARTS.items()},
    }


BART = Family(
    "bart",
    ("bart",),
    lambda settings: _like_bart("bart", settings),
    "model.",
    {
        "embed.embedding": "model.shared.weight",
        **stack_names("encoder.", "model.encoder"),
        **stack_names("", "model.decoder"),
        "head": "lm_head",
        "head.bias": "final_logits_bias",
    },
    ffn_width="decoder_ffn_dim",
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    optional_row="final_logits_bias",
)
MBART = BART._replace(
    name="mbart",
    model_types=("mbart",),
    configure=lambda settings: _like_bart("mbart", settings, post_norm=False),
)
MARIAN = BART._replace(
    name="marian",
    model_types=("marian",),
    configure=_marian,
    constants=("embed_positions.weight",),
)
PEGASUS = MARIAN._replace(
    name="pegasus",
    model_types=("pegasus",),
    configure=lambda settings: _like_bart("pegasus", settings, post_norm=False, **_COMPUTED),
    position_tables=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
)
