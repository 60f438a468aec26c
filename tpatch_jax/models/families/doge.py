"""Doge: a Qwen 3 with gates on the stream and scores of keys; its FFN may have biases, unlike that of a Qwen 3."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import QUERY_NORM, Family, Settings, rotated_context, setting
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["DOGE"]


def _doge(settings: Settings) -> NetworkConfig:
    if settings.get("is_moe"):
        raise TPatchError("config.json asks for 'is_moe', experts of a kind that is not run here; take a dense Doge")
    window, layers = settings.get("sliding_window") or 0, setting(settings, "num_hidden_layers")
    # In longer texts attention would leave out the keys of the lowest scores.
    kept = settings.get("keep_window_size") or 2048
    return configure_llama(
        settings,
        "doge",
        query_norm=True,
        key_scores=True,
        residual_gates=True,
        context=min(rotated_context(settings), kept),
        windows=(window,) * layers if window else (),
    )


DOGE = Family(
    "doge",
    ("doge",),
    _doge,
    "model.",
    {
        **NAMES,
        **QUERY_NORM,
        "layers.{}.attention.decay": "model.layers.{}.self_attn.A",
        "layers.{}.attention.step": "model.layers.{}.self_attn.dt_proj",
        "layers.{}.gate_attention": "model.layers.{}.input_residual",
        "layers.{}.gate_ffn": "model.layers.{}.post_attention_residual",
    },
    biases="mlp_bias",
)
