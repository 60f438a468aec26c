"""The table of model families, and how a ``config.json`` finds its row."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.zoo.family import Family, Settings, setting
from tpatch_jax.models.zoo.gemma import GEMMA, GEMMA_2, GEMMA_3
from tpatch_jax.models.zoo.gpt_2 import GPT_2
from tpatch_jax.models.zoo.gpt_j import GPT_J
from tpatch_jax.models.zoo.gpt_neo import GPT_NEO
from tpatch_jax.models.zoo.gpt_neox import GPT_NEOX
from tpatch_jax.models.zoo.llama import LLAMA, MISTRAL, QWEN_2, QWEN_3
from tpatch_jax.models.zoo.opt import OPT
from tpatch_jax.models.zoo.phi_3 import PHI_3

__all__ = ["FAMILIES", "configure", "family_of"]

FAMILIES: tuple[Family, ...] = (
    GPT_2,
    GPT_NEO,
    GPT_J,
    GPT_NEOX,
    LLAMA,
    MISTRAL,
    QWEN_2,
    QWEN_3,
    GEMMA,
    GEMMA_2,
    GEMMA_3,
    PHI_3,
    OPT,
)
"""Every family that `tpatch_jax.load_model` reads."""


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``, or an error that lists the known ones."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise TPatchError(f"config.json names the architecture {model_type!r}; supported are {known}")


def configure(settings: Settings) -> NetworkConfig:
    """The `NetworkConfig` of a model from what its ``config.json`` says.

    Args:
        settings: the parsed file, ``model_type`` among its keys.

    Raises:
        TPatchError: an unknown architecture, activation or rotary rule, or a missing setting.
    """
    return family_of(setting(settings, "model_type")).configure(settings)
