"""OLMo 2 and 3, and EXAONE 4: Llamas whose norms follow attention and FFN instead of standing before them."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import QUERY_NORM, Family, Settings, rope, setting, windows
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["EXAONE_4", "OLMO_2", "OLMO_3"]

_AFTER = {"pre_norm": False, "sandwich": True, "query_norm": True, "ffn_bias": False}


def _olmo_2(settings: Settings) -> NetworkConfig:
    return configure_llama(settings, "olmo2", query_norm_wide=True, **_AFTER)


def _olmo_3(settings: Settings) -> NetworkConfig:
    width = settings.get("head_dim") or setting(settings, "hidden_size") // setting(settings, "num_attention_heads")
    (everywhere, scale), (local, other) = (rope(settings, width, f"{kind}_attention") for kind in ("full", "sliding"))
    if other != 1:
        raise TPatchError("config.json scales the rotation of layers with a window, which is not supported")
    return configure_llama(
        settings,
        "olmo3",
        query_norm_wide=True,
        windows=windows(settings, setting(settings, "num_hidden_layers")),
        rope_frequencies=everywhere,
        local_rope_frequencies=local,
        rope_scale=scale,
        **_AFTER,
    )


def _exaone_4(settings: Settings) -> NetworkConfig:
    layers = setting(settings, "num_hidden_layers")
    seen = windows(settings, layers)
    # With a window anywhere, only layers that have it rotate; without, all do.
    windowed = settings.get("sliding_window") is not None
    unrotated = tuple(layer for layer in range(layers) if windowed and not (seen and seen[layer]))
    return configure_llama(
        settings, "exaone4", query_bias=False, output_bias=False, windows=seen, unrotated=unrotated, **_AFTER
    )


_NAMES = {
    **{path: name for path, name in NAMES.items() if path not in ("layers.{}.norm_1.scale", "layers.{}.norm_2.scale")},
    **QUERY_NORM,
    "layers.{}.norm_attention.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.norm_ffn.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
OLMO_2 = Family("olmo2", ("olmo2",), _olmo_2, "model.", _NAMES, export="approximate only")
OLMO_3 = Family("olmo3", ("olmo3",), _olmo_3, "model.", _NAMES, export="approximate only")
EXAONE_4 = Family("exaone4", ("exaone4",), _exaone_4, "model.", _NAMES, export="approximate only")
