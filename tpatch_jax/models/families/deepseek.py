"""DeepSeek V2 and V3, Moonlight: latent attention, and experts beside one that every token passes through."""

import dataclasses
import math

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import Latent, Mixture, NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, rope, setting
from tpatch_jax.models.families.llama import NAMES, configure_llama
from tpatch_jax.models.families.mixtures import EXPERT_NAMES

__all__ = ["DEEPSEEK_2", "DEEPSEEK_3"]


def _configure(settings: Settings, family: str, mixture: Mixture, adjacent: bool) -> NetworkConfig:
    turning, bias = setting(settings, "qk_rope_head_dim"), bool(settings.get("attention_bias"))
    head_width = setting(settings, "qk_nope_head_dim") + turning
    frequencies, scale = rope(settings, turning)
    latent = Latent(
        setting(settings, "kv_lora_rank"),
        turning,
        setting(settings, "v_head_dim"),
        settings.get("q_lora_rank") or 0,
    )
    dense = settings.get("first_k_dense_replace") or 0
    if dense >= setting(settings, "num_hidden_layers"):
        raise TPatchError(
            f"config.json leaves no layer to the experts ('first_k_dense_replace' {dense}); use the family without "
            "experts"
        )
    return configure_llama(
        settings,
        family,
        key_value_heads=1,
        head_width=head_width,
        query_bias=bias,
        output_bias=bias,
        rope_frequencies=frequencies,
        rope_scale=scale,
        rope_adjacent=adjacent,
        attention_scale=head_width**-0.5 * _magnitude(settings) ** 2,
        mixture=mixture,
        dense_layers=tuple(range(dense)),
        latent=latent,
    )


def _magnitude(settings: Settings) -> float:
    """YaRN's factor on queries and on keys, which here is one on their scores."""
    rules = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    every = rules.get("mscale_all_dim")
    if rules.get("rope_type", rules.get("type", "default")) in ("default", None) or not every:
        return 1.0
    factor = setting(rules, "factor")
    return 0.1 * every * math.log(factor) + 1 if factor > 1 else 1.0


def _mixture(settings: Settings, groups: int, active_groups: int) -> Mixture:
    experts, active = setting(settings, "n_routed_experts"), setting(settings, "num_experts_per_tok")
    width, shared = setting(settings, "moe_intermediate_size"), settings.get("n_shared_experts") or 0
    if (settings.get("moe_layer_freq") or 1) != 1:
        raise TPatchError(
            f"config.json has 'moe_layer_freq' {settings['moe_layer_freq']}, which transformers does not read, so that "
            "it has experts in each layer behind the first dense ones; only 1 is supported"
        )
    if not shared:
        raise TPatchError("config.json has no 'n_shared_experts', without which transformers runs no such network")
    among = experts
    if groups:
        if experts % groups or not 1 <= active_groups <= groups:
            raise TPatchError(
                f"config.json has {experts} experts in 'n_group' {groups}, of which 'topk_group' {active_groups} are "
                "taken; they must be as many in each group, and one to all groups be taken"
            )
        among = experts // groups * active_groups
    if not 1 <= active <= among:
        raise TPatchError(
            f"config.json has {among} experts to choose from and 'num_experts_per_tok' {active}; one to all of them "
            "must be chosen"
        )
    scale = float(settings.get("routed_scaling_factor") or 1.0)
    # One group of all, or all groups, is no choice.
    groups = 0 if groups == active_groups else groups
    return Mixture(
        experts,
        active,
        width,
        False,
        joined_width=shared * width,
        groups=groups,
        active_groups=active_groups,
        scale=scale,
    )


def _deepseek_2(settings: Settings) -> NetworkConfig:
    method, limited = settings.get("topk_method") or "greedy", "group_limited_greedy"
    if method not in ("greedy", limited):
        raise TPatchError(f"config.json has 'topk_method' {method!r}; known of a DeepSeek V2 are greedy and {limited}")
    if settings.get("norm_topk_prob") or settings.get("scoring_func", "softmax") != "softmax":
        raise TPatchError(
            "config.json has 'norm_topk_prob' or a 'scoring_func' other than softmax, which transformers does not "
            "follow in a DeepSeek V2, and its makers' own code does; only networks without them are supported"
        )
    groups = (setting(settings, "n_group"), setting(settings, "topk_group")) if method == limited else (0, 0)
    return _configure(settings, "deepseek_v2", _mixture(settings, *groups), True)


def _deepseek_3(settings: Settings) -> NetworkConfig:
    method, scoring = settings.get("topk_method", "noaux_tc"), settings.get("scoring_func", "sigmoid")
    if (method, scoring) != ("noaux_tc", "sigmoid"):
        raise TPatchError(
            f"config.json has 'topk_method' {method!r} and 'scoring_func' {scoring!r}; known of a DeepSeek V3 are "
            "noaux_tc and sigmoid"
        )
    mixture = _mixture(settings, setting(settings, "n_group"), setting(settings, "topk_group"))
    normalised = bool(settings.get("norm_topk_prob", True))
    mixture = mixture._replace(logistic=True, corrected=True, normalised=normalised)
    # In its shared experts and dense layers it has no biases, whatever config.json says.
    config = _configure(settings, "deepseek_v3", mixture, bool(settings.get("rope_interleave", True)))
    return dataclasses.replace(config, ffn_bias=False)


def _predicting_further(settings: Settings) -> tuple[str, ...]:
    """Layers behind the last one, which say tokens after the next and are not run."""
    last = setting(settings, "num_hidden_layers")
    more = settings.get("num_nextn_predict_layers") or settings.get("num_mtp_layers") or 0
    return tuple(f"model.layers.{last + number}." for number in range(more))


_ATTENTION = {
    "query": "q_proj",
    "query_down": "q_a_proj",
    "query_norm.scale": "q_a_layernorm.weight",
    "query_up": "q_b_proj",
    "down": "kv_a_proj_with_mqa",
    "norm.scale": "kv_a_layernorm.weight",
    "up": "kv_b_proj",
    "output": "o_proj",
}
_NAMES = {
    **{path: name for path, name in NAMES.items() if ".attention." not in path},
    **{f"layers.{{}}.attention.{path}": f"model.layers.{{}}.self_attn.{name}" for path, name in _ATTENTION.items()},
    "layers.{}.experts.router": "model.layers.{}.mlp.gate",
    "layers.{}.experts.correction": "model.layers.{}.mlp.gate.e_score_correction_bias",
}
_EXPERTS = EXPERT_NAMES._replace(
    joined={
        f"layers.{{}}.ffn.{part}": f"model.layers.{{}}.mlp.shared_experts.{part}_proj"
        for part in ("gate", "up", "down")
    }
)


DEEPSEEK_2 = Family(
    "deepseek_v2",
    ("deepseek_v2",),
    _deepseek_2,
    "model.",
    _NAMES,
    ffn_width="n_shared_experts",
    biases="mlp_bias",
    experts=_EXPERTS,
    constants=("rotary_emb.inv_freq",),
)
DEEPSEEK_3 = Family(
    "deepseek_v3",
    ("deepseek_v3",),
    _deepseek_3,
    "model.",
    _NAMES,
    ffn_width="n_shared_experts",
    experts=_EXPERTS,
    # In fewer digits other experts would be chosen.
    precise=("experts.correction",),
    passes_over=_predicting_further,
    export="approximate only",
)
