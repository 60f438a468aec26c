"""T5 in both versions, and so FLAN-T5 and mT5: an encoder-decoder with relative positions and unscaled attention."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, activation, setting

__all__ = ["T5", "T5_GATED"]

CONTEXT = 512
"""The length of pretraining. Relative positions know no limit; longer inputs can be allowed by ``n_positions``."""

DISTANCE = 128
"""From which distance on all are alike, in files that do not say it."""


def is_gated(settings: Settings) -> bool:
    """Whether the FFN is gated, as in version 1.1, FLAN-T5 and mT5; what else the setting may say is an error."""
    kind = settings.get("feed_forward_proj") or "relu"
    if kind.count("-") > kind.startswith("gated-"):
        raise TPatchError(f"config.json asks for the FFN {kind!r}; write for instance 'relu' or 'gated-gelu'")
    return kind.startswith("gated-")


def _configure(family: str, settings: Settings) -> NetworkConfig:
    gated, act = is_gated(settings), (settings.get("feed_forward_proj") or "relu").removeprefix("gated-")
    # Only T5 scales what its unembedding reads, and only where that once was the embedding. transformers 5 says so by a
    # setting of its own, and that all T5 are tied.
    scaled = settings.get("scale_decoder_outputs")
    if scaled is None:
        scaled = settings.get("tie_word_embeddings") is not False
    scaled = scaled and settings["model_type"] == "t5"
    heads, buckets = setting(settings, "num_heads"), setting(settings, "relative_attention_num_buckets")
    distance = settings.get("relative_attention_max_distance") or DISTANCE
    if distance <= buckets // 2:
        raise TPatchError(
            f"config.json puts distances up to {distance} into {buckets} buckets; 'relative_attention_max_distance' "
            "must be more than half of 'relative_attention_num_buckets'"
        )
    shared = {
        "family": family,
        "vocabulary": setting(settings, "vocab_size"),
        "hidden_size": setting(settings, "d_model"),
        "heads": heads,
        "key_value_heads": heads,
        "head_width": setting(settings, "d_kv"),
        "ffn_width": setting(settings, "d_ff"),
        "context": settings.get("n_positions") or CONTEXT,
        # transformers reads "gated-gelu" as the approximation by tanh
        "activation": "gelu_tanh" if gated and act == "gelu" else activation(act),
        "gated": bool(gated),
        "norm_epsilon": setting(settings, "layer_norm_epsilon"),
        "attention_scale": 1.0,
        "relative_buckets": buckets,
        "relative_distance": distance,
    }
    layers = setting(settings, "num_layers")
    encoder = NetworkConfig(**shared, layers=layers, causal=False)
    return NetworkConfig(
        **shared,
        layers=settings.get("num_decoder_layers") or layers,
        encoder=encoder,
        tied=True,
        head_scale=shared["hidden_size"] ** -0.5 if scaled else 1.0,
    )


_PARTS = {
    "norm_1.scale": "layer.0.layer_norm.weight",
    "attention.query": "layer.0.SelfAttention.q",
    "attention.key": "layer.0.SelfAttention.k",
    "attention.value": "layer.0.SelfAttention.v",
    "attention.output": "layer.0.SelfAttention.o",
    "norm_cross.scale": "layer.1.layer_norm.weight",
    "cross.query": "layer.1.EncDecAttention.q",
    "cross.key": "layer.1.EncDecAttention.k",
    "cross.value": "layer.1.EncDecAttention.v",
    "cross.output": "layer.1.EncDecAttention.o",
}


def _stack(ours: str, theirs: str, ffn: int, gated: bool) -> dict[str, str]:
    parts = dict(_PARTS) | {
        "norm_2.scale": f"layer.{ffn}.layer_norm.weight",
        "ffn.gate": f"layer.{ffn}.DenseReluDense.wi_0",
        "ffn.up": f"layer.{ffn}.DenseReluDense.{'wi_1' if gated else 'wi'}",
        "ffn.down": f"layer.{ffn}.DenseReluDense.wo",
    }
    return {
        f"{ours}relative.embedding": f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        f"{ours}norm.scale": f"{theirs}.final_layer_norm.weight",
        **{f"{ours}layers.{{}}.{part}": f"{theirs}.block.{{}}.{name}" for part, name in parts.items()},
    }


def _family(name: str, gated: bool) -> Family:
    return Family(
        name,
        ("t5", "mt5"),
        lambda settings: _configure(name, settings),
        "",
        {
            "embed.embedding": "shared.weight",
            **_stack("encoder.", "encoder", 1, gated),
            **_stack("", "decoder", 2, gated),
            "head": "lm_head",
        },
        # a leftover in the first releases
        constants=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ffn_width="d_ff",
        export="approximate only",
        accepts=lambda settings: is_gated(settings) == gated,
        own_head=True,
    )


T5 = _family("t5", gated=False)
T5_GATED = _family("t5_v1_1", gated=True)
