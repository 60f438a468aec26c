"""Mixtral, Qwen 2 and 3 MoE, OLMoE and gpt-oss: decoders whose feed-forward networks are mixtures of experts."""

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import Mixture, NetworkConfig
from tpatch_jax.models.families.family import (
    QUERY_NORM,
    ExpertNames,
    Family,
    Fused,
    Settings,
    setting,
    windows,
)
from tpatch_jax.models.families.llama import NAMES, configure_llama

__all__ = ["EXPERT_NAMES", "GPT_OSS", "MIXTRAL", "OLMOE", "QWEN_2_MOE", "QWEN_3_MOE"]

_PLAIN = {"ffn_bias": False, "query_bias": False, "output_bias": False}
_DENSE, _SPARSE_STEP = "mlp_only_layers", "decoder_sparse_step"


def _count(settings: Settings) -> int:
    """How many experts there are, which files of different versions of transformers say under different names."""
    said = {settings[name] for name in ("num_local_experts", "num_experts") if settings.get(name) is not None}
    if len(said) > 1:
        raise TPatchError(
            f"config.json has {settings['num_local_experts']} 'num_local_experts' and {settings['num_experts']} "
            "'num_experts'; leave the one that the weights have"
        )
    return said.pop() if said else setting(settings, "num_experts")


def _mixture(settings: Settings, width: str, normalised: bool, shared_width: int = 0) -> Mixture:
    count, active = _count(settings), setting(settings, "num_experts_per_tok")
    if not 1 <= active <= count:
        raise TPatchError(
            f"config.json has {count} experts and 'num_experts_per_tok' {active}, of which none can be run; one to all "
            "of them must be chosen"
        )
    return Mixture(count, active, setting(settings, width), normalised, shared_width)


def _dense_layers(settings: Settings) -> tuple[int, ...]:
    """The layers without experts."""
    step, listed = settings.get(_SPARSE_STEP) or 1, settings.get(_DENSE) or ()
    layers = range(setting(settings, "num_hidden_layers"))
    dense = tuple(layer for layer in layers if layer in listed or (layer + 1) % step)
    if len(dense) == len(layers):
        raise TPatchError(
            f"config.json leaves no layer to the experts ({_DENSE!r}, {_SPARSE_STEP!r}); use the family without experts"
        )
    return dense


def _gpt_oss(settings: Settings) -> NetworkConfig:
    mixture = _mixture(settings, "intermediate_size", True)
    limit = float(setting(settings, "swiglu_limit"))
    if limit <= 0:
        raise TPatchError(f"config.json has 'swiglu_limit' {limit}, and only experts with a limit are supported")
    return configure_llama(
        settings,
        "gpt_oss",
        ffn_width=0,
        ffn_bias=False,
        sinks=True,
        windows=windows(settings, setting(settings, "num_hidden_layers")),
        mixture=mixture._replace(biased=True, limit=limit, slope=float(settings.get("swiglu_alpha") or 1.702)),
    )


def _mixtral(settings: Settings) -> NetworkConfig:
    window, layers = settings.get("sliding_window") or 0, setting(settings, "num_hidden_layers")
    return configure_llama(
        settings,
        "mixtral",
        **_PLAIN,
        ffn_width=0,
        windows=(window,) * layers if window else (),
        mixture=_mixture(settings, "intermediate_size", True),
    )


def _olmoe(settings: Settings) -> NetworkConfig:
    if settings.get("sliding_window"):
        raise TPatchError("config.json asks for 'sliding_window', which an OLMoE does not have; remove it")
    return configure_llama(
        settings,
        "olmoe",
        ffn_width=0,
        ffn_bias=False,
        query_norm=True,
        query_norm_wide=True,
        attention_clip=float(settings.get("clip_qkv") or 0.0),
        mixture=_mixture(settings, "intermediate_size", bool(settings.get("norm_topk_prob"))),
    )


def _qwen_2_moe(settings: Settings) -> NetworkConfig:
    dense = _dense_layers(settings)
    return configure_llama(
        settings,
        "qwen2_moe",
        query_bias=bool(settings.get("qkv_bias", True)),
        output_bias=False,
        ffn_bias=False,
        ffn_width=setting(settings, "intermediate_size") if dense else 0,
        windows=windows(settings, setting(settings, "num_hidden_layers")),
        mixture=_mixture(
            settings,
            "moe_intermediate_size",
            bool(settings.get("norm_topk_prob")),
            setting(settings, "shared_expert_intermediate_size"),
        ),
        dense_layers=dense,
    )


def _qwen_3_moe(settings: Settings) -> NetworkConfig:
    dense, layers = _dense_layers(settings), setting(settings, "num_hidden_layers")
    window = (settings.get("sliding_window") or 0) if settings.get("use_sliding_window") else 0
    return configure_llama(
        settings,
        "qwen3_moe",
        query_norm=True,
        ffn_bias=False,
        ffn_width=setting(settings, "intermediate_size") if dense else 0,
        windows=(window,) * layers if window else (),
        mixture=_mixture(settings, "moe_intermediate_size", bool(settings.get("norm_topk_prob"))),
        dense_layers=dense,
    )


_GATE_AND_UP = Fused("model.layers.{}.mlp.experts.gate_up_proj", ("layers.{}.experts.gate", "layers.{}.experts.up"))
_DOWN = Fused("model.layers.{}.mlp.experts.down_proj", ("layers.{}.experts.down",))


def _named(block: str, gate: str, up: str, down: str) -> ExpertNames:
    expert = f"model.layers.{{}}.{block}.experts.{{}}"
    each = {"gate": gate, "up": up, "down": down}
    return ExpertNames(
        {f"layers.{{}}.experts.{part}": f"{expert}.{name}" for part, name in each.items()},
        (_GATE_AND_UP, _DOWN),
        renamed=() if block == "mlp" else ((f".{block}.", ".mlp."),),
    )


EXPERT_NAMES = _named("mlp", "gate_proj", "up_proj", "down_proj")
_NAMES = {**NAMES, "layers.{}.experts.router": "model.layers.{}.mlp.gate"}
_SHARED = {
    f"layers.{{}}.experts.shared.{part}": f"model.layers.{{}}.mlp.shared_expert.{part}_proj"
    for part in ("gate", "up", "down")
}

MIXTRAL = Family(
    "mixtral",
    ("mixtral",),
    _mixtral,
    "model.",
    {**_NAMES, "layers.{}.experts.router": "model.layers.{}.block_sparse_moe.gate"},
    experts=_named("block_sparse_moe", "w1", "w3", "w2"),
    export="approximate only",
)
OLMOE = Family("olmoe", ("olmoe",), _olmoe, "model.", {**_NAMES, **QUERY_NORM}, experts=EXPERT_NAMES, export="none")
QWEN_2_MOE = Family(
    "qwen2_moe",
    ("qwen2_moe",),
    _qwen_2_moe,
    "model.",
    {**_NAMES, **_SHARED, "layers.{}.experts.shared.share": "model.layers.{}.mlp.shared_expert_gate"},
    ffn_width="moe_intermediate_size",
    experts=EXPERT_NAMES,
    export="none",
)
QWEN_3_MOE = Family(
    "qwen3_moe",
    ("qwen3_moe",),
    _qwen_3_moe,
    "model.",
    {**_NAMES, **QUERY_NORM},
    ffn_width="moe_intermediate_size",
    experts=EXPERT_NAMES,
    export="approximate only",
)
GPT_OSS = Family(
    "gpt_oss",
    ("gpt_oss",),
    _gpt_oss,
    "model.",
    {
        **NAMES,
        "layers.{}.experts.router": "model.layers.{}.mlp.router",
        "layers.{}.attention.sinks": "model.layers.{}.self_attn.sinks",
    },
    experts=ExpertNames(
        {},
        (_GATE_AND_UP._replace(by_neuron=True), _DOWN),
        transposed=False,
    ),
    export="none",
)
