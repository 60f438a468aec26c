"""A small ``config.json`` of every family, for random models that speak the tiny tokenizer of ``conftest``."""

import wave
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import LLAMA, make_tiny_model

from tpatch_jax.core.layers import split_layers
from tpatch_jax.core.patch import Patch
from tpatch_jax.models.families.registry import FAMILIES
from tpatch_jax.models.model import Model

ENDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
GPT = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 32, "n_positions": 64, "activation_function": "gelu_new"}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
GATED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5}
GEMMA = {
    **GATED,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
LATER = {
    **GEMMA,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}

LATENT = {
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 8,
}

ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 1,
    "id2label": {"0": "no", "1": "yes", "2": "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "n_positions": 64,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
}

IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "patch_size": 4,
    "qkv_bias": True,
    **{name: ENCODER[name] for name in ("id2label", "label2id")},
}

BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "activation_function": "gelu",
    "scale_embedding": False,
    "pad_token_id": 1,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
    "tie_word_embeddings": True,
}

SPEECH = {
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
    "num_mel_bins": 80,
    "max_source_positions": 10,
    "max_target_positions": 64,
    "preprocessor_config": {"feature_size": 80, "chunk_length": 1, "hop_length": 800},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "vit": {**IMAGES, "image_size": 8, "num_channels": 1},
    "deit": {**IMAGES, "image_size": [8, 12], "num_channels": 3},
    "gpt2": {**GPT, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 8,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "gptj": {**GPT, "rotary_dim": 4, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False},
    "gpt_neox": {
        **SIZES,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "llama": LLAMA,
    "mistral": {**GATED, "sliding_window": None},
    "qwen2": {**GATED, "use_sliding_window": False},
    "qwen3": {**GATED, "use_sliding_window": False, "tie_word_embeddings": True},
    "doge": {**GATED, "keep_window_size": 64, "sliding_window": 8},
    "gemma": GEMMA,
    "gemma2": {**LATER, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {
        **LATER,
        "model_type": "gemma3_text",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "phi3": {**GATED, "original_max_position_embeddings": 64, "sliding_window": None},
    "smollm3": {**GATED, "no_rope_layers": [1, 0, 1]},
    "olmo2": GATED,
    "olmo3": {
        **GATED,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "exaone4": {**GATED, "sliding_window": 8, "layer_types": LATER["layer_types"]},
    "granite": {
        **GATED,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "stablelm": {
        **GATED,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "cohere": {**GATED, "layer_norm_eps": 1e-5, "logit_scale": 0.5, "tie_word_embeddings": True},
    "cohere2": {
        **GATED,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.5,
        "sliding_window": 8,
        "layer_types": LATER["layer_types"],
        "tie_word_embeddings": True,
    },
    "glm": {**GATED, "attention_bias": True},
    "glm4": {**GATED, "attention_bias": True},
    "ernie4_5": {**GATED, "tie_word_embeddings": True},
    "starcoder2": {**GATED, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "mixtral": {**GATED, "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**GATED, **EXPERTS, "shared_expert_intermediate_size": 24, "norm_topk_prob": False},
    "qwen3_moe": {**GATED, **EXPERTS, "norm_topk_prob": True},
    "olmoe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "gpt_oss": {
        **GATED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "sliding_window": 8,
        "layer_types": LATER["layer_types"],
    },
    "deepseek_v2": {**GATED, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {
        **GATED,
        **LATENT,
        "q_lora_rank": 12,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "activation_function": "relu",
        "enable_bias": True,
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
    },
    "bert": {**ENCODER, "max_position_embeddings": 64, "type_vocab_size": 2},
    "roberta": {**ENCODER, "max_position_embeddings": 66, "type_vocab_size": 1},
    "distilbert": {
        "dim": 16,
        "hidden_dim": 32,
        "n_layers": 3,
        "n_heads": 2,
        "max_position_embeddings": 64,
        "activation": "gelu",
        **{name: ENCODER[name] for name in ("pad_token_id", "id2label", "label2id")},
    },
    "electra": {**ENCODER, "embedding_size": 8, "max_position_embeddings": 64, "type_vocab_size": 2},
    "modernbert": {
        **ENCODER,
        "max_position_embeddings": 64,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "norm_eps": 1e-5,
        "local_attention": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "bart": BART,
    "mbart": BART,
    "marian": {**BART, "activation_function": "swish"},
    "pegasus": {**BART, "activation_function": "relu"},
    "whisper": SPEECH,
    "t5": {**T5, "feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5_v1_1": {**T5, "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
NAMES = [family.name for family in FAMILIES]
KIN = (
    "doge",
    "smollm3",
    "olmo2",
    "olmo3",
    "exaone4",
    "granite",
    "stablelm",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "ernie4_5",
    "starcoder2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "electra",
    "modernbert",
    "mbart",
    "marian",
    "pegasus",
)
"""Families that are settings of the code which those before them run: one layer of them is edited."""


def tiny_settings(name: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of a family, by its name in the table of families."""
    return {"model_type": name, **ENDS, **SETTINGS[name], **changes}


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Model:
    """A random model of a family: three layers, width 16."""
    return make_tiny_model(seed, defaults=tiny_settings(name, **changes))


def tiny_pictures(model: Model, count: int, seed: int = 0) -> np.ndarray:
    """Random pictures of the size that a model reads, ``[count, height, width]`` or with channels, of bytes."""
    image = model.config.image
    assert image is not None
    drawn = np.random.default_rng(seed).integers(0, 256, (count, *image.size, image.channels), np.uint8)
    return drawn[..., 0] if image.channels == 1 else drawn


def write_pictures(path: Path, model: Model, count: int = 40) -> Path:
    """A file of random pictures, as the memory of a model that reads them."""
    np.savez(path, train_images=tiny_pictures(model, count, 1))
    return path


def tiny_sound(seed: int, seconds: float = 0.5) -> np.ndarray:
    """A few tones that come and go, ``[samples]``."""
    rng, time = np.random.default_rng(seed), np.arange(int(16_000 * seconds)) / 16_000
    tones = (np.sin(2 * np.pi * rng.uniform(100, 4000) * time) * rng.uniform(0, 1) for _ in range(4))
    return (0.1 * sum(tones) * (1 + np.sin(2 * np.pi * rng.uniform(2, 9) * time))).astype(np.float32)


def write_sound(path: Path, samples: np.ndarray, rate: int = 16_000, width: int = 2) -> Path:
    """A WAV file of samples ``[samples]`` or ``[samples, channels]`` from -1 to 1, of so many bytes each."""
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4") + 128 * (width == 1)
    raw = np.ascontiguousarray(whole).view(np.uint8).reshape(*whole.shape, 4)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1] if samples.ndim == 2 else 1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw.tobytes())
    return path


def write_recordings(folder: Path, count: int = 12) -> Path:
    """A folder of recordings, as the memory of a model of speech."""
    folder.mkdir()
    for number in range(count):
        write_sound(folder / f"{number}.wav", tiny_sound(100 + number))
    return folder


def shallow_model(name: str) -> Model:
    """The same with one layer, the kind of layer that stands in the middle."""
    settings = SETTINGS[name]
    changes: dict[str, Any] = {key: [settings[key][1]] for key in ("layer_types", "no_rope_layers") if key in settings}
    if "first_k_dense_replace" in settings:
        changes["first_k_dense_replace"] = 0
    depth = {"encoder_layers": 1, "decoder_layers": 1} if "decoder_layers" in settings else {"num_hidden_layers": 1}
    return tiny_model(name, **depth, **changes)


def patch_for(layers: tuple[int, ...], neurons: int = 3, seed: int = 5, scale: float = 0.3) -> dict[int, Patch]:
    """Random neurons in some layers, about half of them active on any query."""
    rng, count = np.random.default_rng(seed), neurons * len(layers)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    patch = Patch(draw(count, 16) * 0.3, draw(count), draw(count, 16) * scale)
    return split_layers(patch, np.repeat(layers, neurons))
