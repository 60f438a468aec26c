#!/usr/bin/env bash
# Question: do `rms_norm_eps` and `norm_topk_prob` in a DeepSeek V2's `config.json` hold for its network in transformers?
# Good guess: yes; a network's norms have the epsilon that its configuration names, as a Llama's have, and `norm_topk_prob` is a field
#   of `DeepseekV2Config`, which DeepSeek's own modelling file follows (the weights of a token's experts then add up to one).
# What happens: the norms of the narrow vectors of queries, keys and values (`q_a_layernorm`, `kv_a_layernorm`) are made without an
#   epsilon, so that theirs is 1e-6 whatever the file says, in a V2 as in a V3; and a V2's router drops `norm_topk_prob`, so that logits
#   are the same bit for bit with it and without, while a V3's follows it. Whoever writes such a network by its configuration is off
#   where a checkpoint has another epsilon (Moonlight has 1e-5), and must not normalise a V2's weights.
# Seen with transformers 5.24.0 and torch 2.13.0, 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.24.0" "torch==2.13.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 48,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-3,
}
TOKENS = torch.arange(12)[None]


def say(name: str, normalised: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network with the same random weights whatever the setting, and its logits."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, norm_topk_prob=normalised)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model, model(TOKENS, use_cache=False).logits


for name, followed in (("deepseek_v2", False), ("deepseek_v3", True)):
    model, logits = say(name, True)
    layer = model.model.layers[0]
    inner = [norm.variance_epsilon for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm)]
    print(name, "epsilons:", layer.input_layernorm.variance_epsilon, inner)
    assert layer.input_layernorm.variance_epsilon == 1e-3
    assert inner == [1e-6, 1e-6]
    same = torch.equal(logits, say(name, False)[1])
    print(name, "the same logits without norm_topk_prob:", same)
    assert same == (not followed)
PYTHON
