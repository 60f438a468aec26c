"""Networks by name, without weights: what their ``config.json`` says."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.folder import read_settings
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.registry import configure

__all__ = ["SHAPES", "network_shape"]


def _rotated(theta: float, **rules: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default", **rules}


SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "SmolLM2-135M": {
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu",
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_parameters": _rotated(100_000.0),
            "tie_word_embeddings": True,
        },
        "GPT-J-6B": {
            "model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048,
            "rotary_dim": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": False,
        },
        "Llama-3-8B": {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_parameters": _rotated(500_000.0),
            "tie_word_embeddings": False,
        },
        "Qwen3-8B": {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
            "rope_parameters": _rotated(1_000_000.0), "tie_word_embeddings": False,
        },
        "Gemma-3-12B": {
            "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360,
            "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256, "sliding_window": 1024,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 8,
            "rope_parameters": {
                "full_attention": _rotated(1_000_000.0, rope_type="linear", factor=8.0),
                "sliding_attention": _rotated(10_000.0),
            },
            "tie_word_embeddings": True,
        },
    }
)  # fmt: skip
"""What the ``config.json`` of each says; of Gemma 3 the part that reads text."""


def network_shape(name: str) -> tuple[str, NetworkConfig]:
    """A network's description by its name, or from a folder with its ``config.json``; no weights are read.

    Args:
        name: one of `SHAPES`, capitals or not, or a folder.

    Returns:
        The name as it is written here, and the `NetworkConfig`.

    Raises:
        TPatchError: there is neither, or it is a mixture of experts.

    Example:
        >>> network_shape("llama-3-8b")[1].hidden_size
        4096
    """
    for known, settings in SHAPES.items():
        if known.lower() == name.lower():
            return known, configure(settings)
    folder = Path(name)
    if (folder / "config.json").is_file():
        config = configure(read_settings(folder))
        if config.mixture:
            raise TPatchError(
                f"{name!r} is a mixture of experts, for which no plan is made; give the shape of a network without"
            )
        return name, config
    raise TPatchError(
        f"{name!r} is no shape to plan for; give one of {', '.join(SHAPES)}, or a folder with a config.json"
    )
