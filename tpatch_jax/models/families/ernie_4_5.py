"""ERNIE 4.5 without experts: a Llama that rotates neighbouring pairs."""

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["ERNIE_4_5"]


def _ernie_4_5(settings: Settings) -> NetworkConfig:
    bias = bool(settings.get("use_bias"))
    return configure_llama(settings, "ernie4_5", rope_adjacent=True, query_bias=bias, output_bias=bias, ffn_bias=bias)


ERNIE_4_5 = Family("ernie4_5", ("ernie4_5",), _ernie_4_5, "model.", NAMES, biases="use_bias")
