"""The table of model families: how each one's configuration and checkpoint names map onto ours."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import DecoderConfig

__all__ = ["FAMILIES", "Family", "configure", "family_of"]

Settings = Mapping[str, Any]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Family(NamedTuple):
    """One row of the table.

    Attributes:
        name: what we call it.
        model_types: the ``model_type`` values of ``config.json`` that belong to it.
        configure: from the settings of ``config.json`` to a `DecoderConfig`.
        names: from the path of one of our parameters to the checkpoint's name, both with ``{}`` for the layer.
            Kernels named here are stored transposed.
    """

    name: str
    model_types: tuple[str, ...]
    configure: Callable[[Settings], DecoderConfig]
    names: Mapping[str, str]


def _setting(settings: Settings, name: str) -> Any:
    if settings.get(name) is None:
        raise TPatchError(f"config.json has no '{name}'; copy the model's original config.json beside its weights")
    return settings[name]


def activation(name: str) -> str:
    """Our name of an activation that ``config.json`` names, or an error that lists the known ones."""
    if name not in _ACTIVATIONS:
        raise TPatchError(f"config.json names the activation {name!r}; known are {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def rope(settings: Settings, width: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies of the rotary embedding, scaling applied, and the factor on its cosines and sines.

    Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (older files).

    Args:
        settings: what ``config.json`` says.
        width: how many entries of each head are rotated.
    """
    rules = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    theta = float(rules.get("rope_theta") or settings.get("rope_theta") or 10_000.0)
    frequencies = [theta ** (-2 * pair / width) for pair in range(width // 2)]
    kind = rules.get("rope_type", rules.get("type", "default")) or "default"
    if kind == "default":
        return tuple(frequencies), 1.0
    if kind == "linear":
        return tuple(frequency / rules["factor"] for frequency in frequencies), 1.0
    if kind == "llama3":
        return tuple(_llama3(frequency, rules) for frequency in frequencies), 1.0
    raise TPatchError(f"config.json asks for rotary embeddings of type {kind!r}; known are default, linear, llama3")


def _llama3(frequency: float, rules: Settings) -> float:
    """Llama 3's rule: long wavelengths are stretched, short ones kept, those between blended."""
    factor, low, high = rules["factor"], rules["low_freq_factor"], rules["high_freq_factor"]
    turns = rules["original_max_position_embeddings"] * frequency / (2 * math.pi)
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency


def _llama(settings: Settings) -> DecoderConfig:
    heads = _setting(settings, "num_attention_heads")
    width = _setting(settings, "hidden_size")
    head_width = settings.get("head_dim") or width // heads
    frequencies, scale = rope(settings, head_width)
    bias = bool(settings.get("attention_bias"))
    return DecoderConfig(
        family="llama",
        vocabulary=_setting(settings, "vocab_size"),
        width=width,
        layers=_setting(settings, "num_hidden_layers"),
        heads=heads,
        key_value_heads=settings.get("num_key_value_heads") or heads,
        head_width=head_width,
        ffn_width=_setting(settings, "intermediate_size"),
        context=_setting(settings, "max_position_embeddings"),
        activation=activation(settings.get("hidden_act", "silu")),
        ffn_bias=bool(settings.get("mlp_bias")),
        norm_epsilon=settings.get("rms_norm_eps", 1e-6),
        query_bias=bias,
        output_bias=bias,
        rope_frequencies=frequencies,
        rope_scale=scale,
        tied=bool(settings.get("tie_word_embeddings")),
    )


_LLAMA_NAMES = {
    "embed.embedding": "model.embed_tokens.weight",
    "layers.{}.norm_1.scale": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.query": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.key": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.value": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.output": "model.layers.{}.self_attn.o_proj",
    "layers.{}.norm_2.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.ffn.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.ffn.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.ffn.down": "model.layers.{}.mlp.down_proj",
    "norm.scale": "model.norm.weight",
    "head": "lm_head",
}

FAMILIES: tuple[Family, ...] = (Family("llama", ("llama",), _llama, _LLAMA_NAMES),)
"""Every family that `tpatch_jax.load_model` reads."""


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``, or an error that lists the known ones."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise TPatchError(f"config.json names the architecture {model_type!r}; supported are {known}")


def configure(settings: Settings) -> DecoderConfig:
    """The `DecoderConfig` of a model from what its ``config.json`` says.

    Args:
        settings: the parsed file, ``model_type`` among its keys.

    Raises:
        TPatchError: an unknown architecture, activation or rotary rule, or a missing setting.
    """
    return family_of(_setting(settings, "model_type")).configure(settings)
