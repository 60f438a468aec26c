"""Phi-3: a Llama whose query, key and value, and whose gate and up, are stored in one tensor each."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Fused, Settings, setting
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["PHI_3"]


def _phi_3(settings: Settings) -> NetworkConfig:
    window, layers = settings.get("sliding_window") or 0, setting(settings, "num_hidden_layers")
    return configure_llama(settings, "phi3", windows=(window,) * layers if window else ())


_ATTENTION = tuple(f"layers.{{}}.attention.{part}" for part in ("query", "key", "value"))
_FFN = tuple(f"layers.{{}}.ffn.{part}" for part in ("gate", "up"))

PHI_3 = Family(
    "phi3",
    ("phi3",),
    _phi_3,
    "model.",
    {path: name for path, name in NAMES.items() if path not in (*_ATTENTION, *_FFN)},
    fused=(
        Fused("model.layers.{}.self_attn.qkv_proj", _ATTENTION),
        Fused("model.layers.{}.mlp.gate_up_proj", _FFN),
    ),
    export="exact as Llama",
)
