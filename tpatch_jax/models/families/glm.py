"""GLM-4: a Llama that rotates neighbouring pairs of a part of each head; the later one with sandwich norms."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Fused, Settings
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["GLM", "GLM_4"]


def _glm(settings: Settings, family: str = "glm", **changes: object) -> NetworkConfig:
    settings = {"partial_rotary_factor": 0.5, **settings}
    return configure_llama(settings, family, rope_adjacent=True, output_bias=False, ffn_bias=False, **changes)


def _glm_4(settings: Settings) -> NetworkConfig:
    return _glm(settings, "glm4", sandwich=True)


_FFN = ("layers.{}.ffn.gate", "layers.{}.ffn.up")
_NAMES = {path: name for path, name in NAMES.items() if path not in _FFN}
_FUSED = (Fused("model.layers.{}.mlp.gate_up_proj", _FFN),)
GLM = Family("glm", ("glm",), _glm, "model.", _NAMES, fused=_FUSED, export="approximate only")
GLM_4 = Family(
    "glm4",
    ("glm4",),
    _glm_4,
    "model.",
    {
        **_NAMES,
        "layers.{}.norm_attention.scale": "model.layers.{}.post_self_attn_layernorm.weight",
        "layers.{}.norm_ffn.scale": "model.layers.{}.post_mlp_layernorm.weight",
    },
    fused=_FUSED,
    export="approximate only",
)
