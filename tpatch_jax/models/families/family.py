"""What a family is, and what reading a ``config.json`` needs in every family."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig

__all__ = [
    "QUERY_NORM",
    "ExpertNames",
    "Family",
    "Fused",
    "Settings",
    "activation",
    "configure_plain",
    "is_longrope",
    "rope",
    "rotated_context",
    "setting",
    "windows",
]

Settings = Mapping[str, Any]

QUERY_NORM = {
    "layers.{}.attention.query_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.attention.key_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
}
"""Names of the norms of queries and keys, where a family has them."""


class Fused(NamedTuple):
    """Several of our linear layers that a checkpoint keeps in one tensor, one after the other.

    Attributes:
        name: the checkpoint's name of the linear layer, with ``{}`` for the layer.
        parts: the paths of our linear layers, with ``{}`` for the layer.
        by_head: whether the parts alternate head by head.
        by_neuron: whether they alternate neuron by neuron.
    """

    name: str
    parts: tuple[str, ...]
    by_head: bool = False
    by_neuron: bool = False


class ExpertNames(NamedTuple):
    """How a checkpoint names what the experts of a layer are made of: a tensor for each expert, or one for all.

    Attributes:
        each: from the path of our linear layers of all experts, with ``{}`` for the layer, to the name of one expert's,
            with ``{}`` for the layer and for the expert; empty where no file has such.
        fused: tensors that hold all experts, as transformers keeps them in memory from version 5 on.
        transposed: whether kernels lie in those as ``[experts, out, in]``.
        renamed: what stands in their place in other names where experts are fused.
        joined: names of what a patch joins beside experts, where it is a network that a checkpoint has; from our paths,
            with ``{}`` for the layer.
    """

    each: Mapping[str, str]
    fused: tuple[Fused, ...]
    transposed: bool = True
    renamed: tuple[tuple[str, str], ...] = ()
    joined: Mapping[str, str] = MappingProxyType({})


class Family(NamedTuple):
    """One row of the table of families.

    Attributes:
        name: what we call it.
        model_types: the ``model_type`` values of ``config.json`` that belong to it.
        configure: from the settings of ``config.json`` to a `NetworkConfig`.
        prefix: what the names of all tensors but the head begin with; some checkpoints leave it out.
        names: from the path of one of our parameters, or of a linear layer or norm that holds several, to the
            checkpoint's name; both with ``{}`` for the layer.
        fused: tensors that hold several of our linear layers.
        transposed: whether the checkpoint stores kernels as ``[out, in]``.
        constants: endings of tensors that checkpoints hold and networks compute.
        copies: endings of tensors that checkpoints hold and that are the embedding again.
        ffn_width: the entries of ``config.json`` that say how wide an FFN is, so that a wider one can be written; empty
            where it cannot be said.
        biases: the entry of ``config.json`` that gives biases to an FFN without any, if there is one.
        accepts: which settings belong to it, where families share a ``model_type``.
        own_head: whether an unembedding in the checkpoint says that the model has one of its own.
        optional_row: a tensor ``[1, n]`` that holds a bias ``[n]`` of ours, zero where a checkpoint leaves it out.
        views: from the path of one of our parameters to the shape that a checkpoint's tensor has of it, where it holds
            the same numbers in the same order.
        other_heads: what the names of tensors begin with that are no part of a classifier, in checkpoints without one.
        position_tables: tensors of computed positions that stock networks want in a file, though they need not be read.
        experts: how the experts of a mixture are named.
        precise: endings of our parameters' paths that are read in float32 whatever type the others get.
        passes_over: from the settings of ``config.json`` to what the names of tensors begin with that are no part of
            the network as it is run.
        export: how a corrected model of this family is written for the stock transformers library:
            ``"exact"``, ``"exact as"`` another architecture, ``"approximate only"`` or ``"none"``; see
            `tpatch_jax.models.checkpoints.export`.
    """

    name: str
    model_types: tuple[str, ...]
    configure: Callable[[Settings], NetworkConfig]
    prefix: str
    names: Mapping[str, str]
    fused: tuple[Fused, ...] = ()
    transposed: bool = True
    constants: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    ffn_width: str = "intermediate_size"
    biases: str = ""
    export: str = "exact"
    accepts: Callable[[Settings], bool] = lambda settings: True
    own_head: bool = False
    optional_row: str = ""
    other_heads: tuple[str, ...] = ()
    position_tables: tuple[str, ...] = ()
    experts: ExpertNames | None = None
    precise: tuple[str, ...] = ()
    passes_over: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
    views: Callable[[NetworkConfig], Mapping[str, tuple[int, ...]]] = lambda config: {}


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def setting(settings: Settings, name: str) -> Any:
    """One entry of ``config.json``, or an error that says it is missing."""
    if settings.get(name) is None:
        raise TPatchError(f"config.json has no '{name}'; copy the model's original config.json beside its weights")
    return settings[name]


def activation(name: str) -> str:
    """Our name of an activation that ``config.json`` names, or an error that lists the known ones."""
    if name not in _ACTIVATIONS:
        raise TPatchError(f"config.json names the activation {name!r}; known are {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def windows(settings: Settings, layers: int) -> tuple[int, ...]:
    """How far back each layer sees, from ``layer_types`` and ``sliding_window``; empty where all see everything."""
    window = settings.get("sliding_window") or 0
    kinds = settings.get("layer_types")
    if not window or not kinds:
        return ()
    if unknown := sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}):
        raise TPatchError(
            f"config.json has layers of type {unknown[0]!r}; only full_attention and sliding_attention are supported"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if len(windows) != layers:
        raise TPatchError(
            f"config.json has layer_types for {len(windows)} layers and {layers} layers; mend one of them"
        )
    return windows if any(windows) else ()


def _rotation(settings: Settings) -> Settings:
    """The rules of the rotary embedding, as transformers 5 or older files name them."""
    return settings.get("rope_parameters") or settings.get("rope_scaling") or {}


def is_longrope(settings: Settings) -> bool:
    """Whether heads turn by LongRoPE, whose factors depend on the text's length."""
    rules = _rotation(settings)
    return rules.get("rope_type", rules.get("type")) in ("longrope", "su")


def rotated_context(settings: Settings) -> int:
    """How many tokens a network with rotary positions reads, at the factors by which `rope` turns them.

    Texts longer than LongRoPE's original length would need its long factors from their first token on, so they are
    refused instead.
    """
    context = setting(settings, "max_position_embeddings")
    if not is_longrope(settings):
        return context
    original = _rotation(settings).get("original_max_position_embeddings")
    return min(context, original or settings.get("original_max_position_embeddings") or context)


def rope(settings: Settings, head_width: int, kind: str | None = None) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies of the rotary embedding, scaling applied, and the factor on its cosines and sines.

    Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (older files).

    Args:
        settings: what ``config.json`` says.
        head_width: width of one head; ``partial_rotary_factor`` says which share of it is rotated.
        kind: which entry to read where ``rope_parameters`` has one for each kind of layer.
    """
    rotation = _rotation(settings)
    rules = dict(rotation.get(kind, rotation) if kind else rotation)
    theta = float(rules.get("rope_theta") or settings.get("rope_theta") or 10_000.0)
    share = rules.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
    rotated = int(head_width * share)
    frequencies = tuple(theta ** (-2 * pair / rotated) for pair in range(rotated // 2))
    rule = rules.get("rope_type", rules.get("type", "default")) or "default"
    if rule == "default":
        return frequencies, 1.0
    if rule == "linear":
        return tuple(frequency / rules["factor"] for frequency in frequencies), 1.0
    if rule == "llama3":
        return tuple(_llama3(frequency, rules) for frequency in frequencies), 1.0
    if rule in ("longrope", "su"):
        short = rules["short_factor"]
        return tuple(f / factor for f, factor in zip(frequencies, short, strict=True)), _longrope_scale(settings, rules)
    if rule == "yarn":
        return _yarn(frequencies, theta, settings, rules, bool(rotation.get("truncate", True)))
    raise TPatchError(
        f"config.json asks for rotary embeddings of type {rule!r}; known are default, linear, llama3, longrope, yarn"
    )


def _yarn(
    frequencies: tuple[float, ...], theta: float, settings: Settings, rules: Settings, truncate: bool
) -> tuple[tuple[float, ...], float]:
    """YaRN's rule: slow pairs are stretched, fast ones kept, those between blended; and the scale of cosines and sines.

    Source: Peng et al. 2023, sections 3.2 and 3.4.
    """
    context, pairs = setting(settings, "max_position_embeddings"), len(frequencies)
    name = "original_max_position_embeddings"
    original = settings.get(name) or rules.get(name) or context
    factor = rules.get("factor") or context / original

    def edge(turns: float) -> float:
        return 2 * pairs * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = edge(rules.get("beta_fast") or 32), edge(rules.get("beta_slow") or 1)
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    shares = [min(max((pair - low) / (high - low or 0.001), 0.0), 1.0) for pair in range(pairs)]
    stretched = tuple(f * (1 - share + share / factor) for f, share in zip(frequencies, shares, strict=True))

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if rules.get("attention_factor") is not None:
        return stretched, float(rules["attention_factor"])
    over, under = rules.get("mscale"), rules.get("mscale_all_dim")
    return stretched, magnitude(over) / magnitude(under) if over and under else magnitude(1)


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


def _longrope_scale(settings: Settings, rules: Settings) -> float:
    """LongRoPE's factor on cosines and sines, which holds for short texts as well."""
    if rules.get("attention_factor"):
        return float(rules["attention_factor"])
    original = rules.get("original_max_position_embeddings") or setting(settings, "original_max_position_embeddings")
    factor = rules.get("factor") or setting(settings, "max_position_embeddings") / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def configure_plain(family: str, settings: Settings, *, hidden_size: int, heads: int, **fields: Any) -> NetworkConfig:
    """What the families with two matrices in the FFN, layer norms and as many keys as queries share.

    Args:
        family: the family's name.
        settings: the settings of ``config.json``.
        hidden_size: ``d``.
        heads: attention heads.
        fields: the other fields of `NetworkConfig`.
    """
    shared = {
        "vocabulary": setting(settings, "vocab_size"),
        "key_value_heads": heads,
        "head_width": hidden_size // heads,
        "gated": False,
        "ffn_bias": True,
        "norm": "layer",
    }
    return NetworkConfig(**{"family": family, "hidden_size": hidden_size, "heads": heads, **shared, **fields})
