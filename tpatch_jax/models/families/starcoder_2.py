"""StarCoder 2: rotary positions and grouped queries, layer norms, and two matrices in the FFN."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, setting
from tpatch_jax.models.families.llama import NAMES, configure_llama, with_norm_biases

__all__ = ["STARCODER_2"]


def _starcoder_2(settings: Settings) -> NetworkConfig:
    bias, window = bool(settings.get("use_bias", True)), settings.get("sliding_window") or 0
    return configure_llama(
        settings,
        "starcoder2",
        gated=False,
        norm="layer",
        norm_epsilon=setting(settings, "norm_epsilon"),
        query_bias=bias,
        output_bias=bias,
        ffn_bias=bias,
        windows=(window,) * setting(settings, "num_hidden_layers") if window else (),
        tied=bool(settings.get("tie_word_embeddings", True)),
    )


_FFN = {
    "layers.{}.ffn.up": "model.layers.{}.mlp.c_fc",
    "layers.{}.ffn.down": "model.layers.{}.mlp.c_proj",
}
_OTHERS = {path: name for path, name in with_norm_biases(NAMES).items() if ".ffn." not in path}
STARCODER_2 = Family("starcoder2", ("starcoder2",), _starcoder_2, "model.", {**_OTHERS, **_FFN}, biases="use_bias")
