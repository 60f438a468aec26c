"""Command R and R7B (Cohere and Cohere 2): attention and FFN side by side, layer norms without biases."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, setting, windows
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["COHERE", "COHERE_2"]


def _cohere(settings: Settings, family: str = "cohere", **changes: object) -> NetworkConfig:
    if settings.get("use_qk_norm"):
        raise TPatchError(
            "config.json asks for 'use_qk_norm', norms with weights for each head, which are not supported; use a "
            "Command R without them, or Command R7B"
        )
    return configure_llama(
        settings,
        family,
        block="shared",
        norm="layer",
        norm_bias=False,
        norm_epsilon=setting(settings, "layer_norm_eps"),
        ffn_bias=False,
        rope_adjacent=True,
        head_scale=setting(settings, "logit_scale"),
        tied=bool(settings.get("tie_word_embeddings", True)),
        **changes,
    )


def _cohere_2(settings: Settings) -> NetworkConfig:
    layers = setting(settings, "num_hidden_layers")
    seen = windows(settings, layers)
    # Layers that see everything know no positions.
    unrotated = tuple(layer for layer in range(layers) if not (seen and seen[layer]))
    return _cohere(settings, "cohere2", windows=seen, unrotated=unrotated)


_NAMES = {path: name for path, name in NAMES.items() if path != "layers.{}.norm_2.scale"}
COHERE = Family("cohere", ("cohere",), _cohere, "model.", _NAMES, export="approximate only")
COHERE_2 = Family("cohere2", ("cohere2",), _cohere_2, "model.", _NAMES, export="approximate only")
