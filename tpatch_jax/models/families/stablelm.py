"""StableLM 2: a Llama with layer norms that rotates a part of each head."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, setting
from tpatch_jax.models.families.llama import NAMES, configure_llama, with_norm_biases

__all__ = ["STABLELM"]


def _stablelm(settings: Settings) -> NetworkConfig:
    if settings.get("qk_layernorm"):
        raise TPatchError("config.json asks for 'qk_layernorm', which is not supported; use a StableLM without it")
    return configure_llama(
        {"partial_rotary_factor": 0.25, **settings},
        "stablelm",
        norm="layer",
        norm_epsilon=setting(settings, "layer_norm_eps"),
        query_bias=bool(settings.get("use_qkv_bias")),
        output_bias=False,
        ffn_bias=False,
        block="shared" if settings.get("use_parallel_residual") else "serial",
    )


STABLELM = Family("stablelm", ("stablelm",), _stablelm, "model.", with_norm_biases(NAMES))
