"""SmolLM3: a Llama in which every few layers do without rotary positions."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, setting, windows
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["SMOLLM_3"]


def _smollm_3(settings: Settings) -> NetworkConfig:
    layers, rotated = setting(settings, "num_hidden_layers"), setting(settings, "no_rope_layers")
    if len(rotated) != layers:
        raise TPatchError(
            f"config.json has no_rope_layers for {len(rotated)} layers and {layers} layers; mend one of them"
        )
    # The list says 1 of a layer that rotates, whatever its name suggests.
    unrotated = tuple(layer for layer, rotates in enumerate(rotated) if not rotates)
    return configure_llama(settings, "smollm3", unrotated=unrotated, windows=windows(settings, layers))


SMOLLM_3 = Family("smollm3", ("smollm3",), _smollm_3, "model.", NAMES, biases="mlp_bias")
