"""Make the references: one tiny random checkpoint a family, and what torch's network says with it, layer by layer.

    python tests/reference/make_references.py            # all of them
    python tests/reference/make_references.py gpt2 opt   # only these

Each family gets ``<name>/config.json`` and ``<name>/model.safetensors``, as transformers writes them, and
``<name>_expected.safetensors`` with the ``tokens``, the residual stream after each block (``layer_0`` and on) and the
``logits``. Needs torch (the ``parity`` extra); ``tests/test_reference.py``, which reads the result, does not.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_inner": 32, "n_positions": 48, **ENDS}
GATED = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    **ENDS,
}
ROTATION = {"rope_type": "default", "rope_theta": 100.0}
GEMMA = {**GATED, "head_dim": 8, "rope_parameters": ROTATION}

SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT, "n_head": 4},
    "gpt_neo": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 48,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 8,
        **ENDS,
    },
    "gptj": {**GPT, "n_head": 2, "rotary_dim": 4},
    "gpt_neox": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
        "rope_parameters": {**ROTATION, "partial_rotary_factor": 0.5},
        **ENDS,
    },
    "llama": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {**GATED, "head_dim": 8, "rope_parameters": ROTATION, "sliding_window": 8},
    "qwen2": {**GATED, "rope_parameters": ROTATION},
    "qwen3": {**GATED, "head_dim": 8, "rope_parameters": ROTATION, "tie_word_embeddings": True},
    "gemma": {**GEMMA, "num_key_value_heads": 1},
    "gemma2": {
        **GEMMA,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
        "query_pre_attn_scalar": 5,
    },
    "gemma3_text": {
        **GEMMA,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 5,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
        },
    },
    "phi3": {
        **GATED,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [2.0, 4.0, 8.0],
            "original_max_position_embeddings": 32,
        },
    },
    "opt": {
        "vocab_size": 64,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        **ENDS,
    },
}
"""What distinguishes each family, in little: windows shorter than the tokens, soft caps that bite."""

TOKENS = {"llama": 40}
"""How many tokens a row has, where it is not 24: Llama's rule of rotation is for lengths past 32."""


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A family's network in torch, weights as they come; eager attention, since only it has soft caps and all windows.

    Args:
        name: a key of `SETTINGS`.
        changes: settings that differ from those.
    """
    config = AutoConfig.for_model(name, **{**SETTINGS[name], **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The blocks of any decoder, in order."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def run(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the residual stream after each block, before the final norm."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.nn.Module, object, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: object, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    hooks = [block.register_forward_hook(keep(f"layer_{n}")) for n, block in enumerate(blocks(model))]
    with torch.no_grad():
        found["logits"] = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights of such a size that every part of the network matters; biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            kind = type(module).__name__
            if isinstance(module, torch.nn.Embedding):
                spread = 1.0
            else:
                # GPT-2's kernels are [in, out]
                spread = parameter.shape[0 if kind == "Conv1D" else -1] ** -0.5 if parameter.ndim == 2 else 0.3
            # Gemma's norms multiply by one more than their weight
            centre = float("Norm" in kind and leaf == "weight" and not kind.startswith("Gemma"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + centre)
    return model.eval()


def make(name: str, folder: Path) -> None:
    """Write one family's reference into a folder."""
    model = randomise(build(name), 0)
    shape = (2, TOKENS.get(name, 24))
    tokens = torch.randint(0, SETTINGS[name]["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    (folder / name).mkdir(exist_ok=True)
    with TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(temporary) / file, folder / name / file)
    expected = {**run(model, tokens), "tokens": tokens.to(torch.int32)}
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, folder / f"{name}_expected.safetensors")


def main(names: Sequence[str]) -> None:
    """Write the references named, or all."""
    for name in names or SETTINGS:
        make(name, Path(__file__).parent)


if __name__ == "__main__":
    main(sys.argv[1:])
