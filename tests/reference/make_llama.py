"""Make ``tests/reference/llama``: a tiny Llama and what torch's network says with it, layer by layer.

    python tests/reference/make_llama.py

Needs torch (the ``parity`` extra); ``tests/test_reference.py``, which reads the result, does not.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS = {
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
}


def run(model: LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the residual stream after each block, before the final norm."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(_module: torch.nn.Module, _inputs: object, output: object) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    hooks = [block.register_forward_hook(keep(f"layer_{n}")) for n, block in enumerate(model.model.layers)]
    with torch.no_grad():
        found["logits"] = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return found


def randomise(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Weights of such a size that every part of the network matters; biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + ("norm" in name))
    return model.eval()


def main() -> None:
    """Write the folder."""
    folder = Path(__file__).parent / "llama"
    folder.mkdir(exist_ok=True)
    model = randomise(LlamaForCausalLM(LlamaConfig(**SETTINGS)), 0)
    tokens = torch.randint(0, SETTINGS["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = {**run(model, tokens), "tokens": tokens.to(torch.int32)}
    save_file(
        {name: tensor.contiguous() for name, tensor in expected.items()}, folder.parent / "llama_expected.safetensors"
    )
    settings = {**SETTINGS, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
