"""Granite 3: a Llama with factors on embeddings, attention scores, the parts of a block, and logits."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, setting
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["GRANITE"]


def _granite(settings: Settings) -> NetworkConfig:
    return configure_llama(
        settings,
        "granite",
        embed_scale=setting(settings, "embedding_multiplier"),
        attention_scale=setting(settings, "attention_multiplier"),
        residual_scale=setting(settings, "residual_multiplier"),
        head_scale=1 / setting(settings, "logits_scaling"),
    )


GRANITE = Family("granite", ("granite",), _granite, "model.", NAMES, biases="mlp_bias")
