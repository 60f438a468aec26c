"""The table of model families, and how a ``config.json`` finds its row."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.bart import BART, MARIAN, MBART, PEGASUS
from tpatch_jax.models.families.bert import BERT, DISTILBERT, ELECTRA, ROBERTA
from tpatch_jax.models.families.cohere import COHERE, COHERE_2
from tpatch_jax.models.families.deepseek import DEEPSEEK_2, DEEPSEEK_3
from tpatch_jax.models.families.doge import DOGE
from tpatch_jax.models.families.ernie_4_5 import ERNIE_4_5
from tpatch_jax.models.families.family import Family, Settings, setting
from tpatch_jax.models.families.gemma import GEMMA, GEMMA_2, GEMMA_3
from tpatch_jax.models.families.glm import GLM, GLM_4
from tpatch_jax.models.families.gpt_2 import GPT_2
from tpatch_jax.models.families.gpt_j import GPT_J
from tpatch_jax.models.families.gpt_neo import GPT_NEO
from tpatch_jax.models.families.gpt_neox import GPT_NEOX
from tpatch_jax.models.families.granite import GRANITE
from tpatch_jax.models.families.llama import LLAMA, MISTRAL, QWEN_2, QWEN_3
from tpatch_jax.models.families.mixtures import GPT_OSS, MIXTRAL, OLMOE, QWEN_2_MOE, QWEN_3_MOE
from tpatch_jax.models.families.modernbert import MODERNBERT
from tpatch_jax.models.families.olmo import EXAONE_4, OLMO_2, OLMO_3
from tpatch_jax.models.families.opt import OPT
from tpatch_jax.models.families.phi_3 import PHI_3
from tpatch_jax.models.families.refusals import refuse
from tpatch_jax.models.families.smollm_3 import SMOLLM_3
from tpatch_jax.models.families.stablelm import STABLELM
from tpatch_jax.models.families.starcoder_2 import STARCODER_2
from tpatch_jax.models.families.t5 import T5, T5_GATED
from tpatch_jax.models.families.vit import DEIT, VIT
from tpatch_jax.models.families.whisper import WHISPER

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
    DOGE,
    GEMMA,
    GEMMA_2,
    GEMMA_3,
    PHI_3,
    SMOLLM_3,
    OLMO_2,
    OLMO_3,
    EXAONE_4,
    GRANITE,
    STABLELM,
    COHERE,
    COHERE_2,
    GLM,
    GLM_4,
    ERNIE_4_5,
    STARCODER_2,
    MIXTRAL,
    QWEN_2_MOE,
    QWEN_3_MOE,
    OLMOE,
    GPT_OSS,
    DEEPSEEK_2,
    DEEPSEEK_3,
    OPT,
    BERT,
    ROBERTA,
    DISTILBERT,
    ELECTRA,
    MODERNBERT,
    BART,
    MBART,
    MARIAN,
    PEGASUS,
    T5,
    T5_GATED,
    VIT,
    DEIT,
    WHISPER,
)
"""Every family that `tpatch_jax.load_model` reads."""


def family_of(settings: Settings) -> Family:
    """The family of a model from what its ``config.json`` says, or an error that says why there is none."""
    model_type = setting(settings, "model_type")
    for family in FAMILIES:
        if model_type in family.model_types and family.accepts(settings):
            return family
    known = ", ".join(sorted({name for family in FAMILIES for name in family.model_types}))
    reason = refuse(settings)
    told = f"{model_type} is not: {reason}; " if reason else ""
    raise TPatchError(f"config.json names the architecture {model_type!r}; {told}supported are {known}")


def configure(settings: Settings) -> NetworkConfig:
    """The `NetworkConfig` of a model from what its ``config.json`` says.

    Args:
        settings: the parsed file, ``model_type`` among its keys.

    Raises:
        TPatchError: an unknown architecture, activation or rotary rule, or a missing setting.
    """
    return family_of(settings).configure(settings)
