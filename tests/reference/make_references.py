"""Make the references: one tiny random checkpoint a family, and what torch's network says with it, layer by layer.

    python tests/reference/make_references.py            # all of them
    python tests/reference/make_references.py gpt2 opt   # only these

Each family gets ``<name>/config.json`` and ``<name>/model.safetensors``, as transformers writes them, and
``<name>_expected.safetensors`` with the ``tokens``, the residual stream after each block (``layer_0`` and on) and the
``logits``; of an encoder-decoder also what its encoder reads, ``source``, and its residual stream (``encoder_0`` and
on); of a network that reads images ``pixel_values`` in place of tokens, of one that reads sound ``input_features`` as
its ``source``. -1 is padding, where residual streams are zero.
Needs torch (the ``parity`` extra); ``tests/test_reference.py``,
which reads the result, does not.
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
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
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
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 12,
    "beta_fast": 1.5,
    "beta_slow": 0.2,
}
EXPERTS = {"num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
GEMMA = {**GATED, "head_dim": 8, "rope_parameters": ROTATION}
LABELS = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    **LABELS,
}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    **LABELS,
}
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

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
    "doge": {
        **GATED,
        "head_dim": 8,
        "rope_parameters": ROTATION,
        "attention_bias": True,
        "sliding_window": 8,
        "keep_window_size": 40,
    },
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
    "smollm3": {
        **GATED,
        "rope_parameters": ROTATION,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "olmo2": {**GATED, "rope_parameters": ROTATION},
    "olmo3": {
        **GATED,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": YARN,
        },
    },
    "exaone4": {
        **GATED,
        "rope_parameters": ROTATION,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {
        **GATED,
        "rope_parameters": ROTATION,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.7,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.5,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "stablelm": {**GATED, "use_qkv_bias": True, "rope_parameters": {**ROTATION, "partial_rotary_factor": 0.5}},
    "cohere": {**GATED, "rope_parameters": ROTATION, "logit_scale": 0.5, "attention_bias": True},
    "cohere2": {
        **GATED,
        "rope_parameters": ROTATION,
        "logit_scale": 2.0,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm": {**GATED, "head_dim": 8, "rope_parameters": {**ROTATION, "partial_rotary_factor": 0.5}},
    "glm4": {**GATED, "head_dim": 8, "rope_parameters": {**ROTATION, "partial_rotary_factor": 0.5}},
    "ernie4_5": {**GATED, "head_dim": 8, "rope_parameters": ROTATION, "tie_word_embeddings": True},
    "starcoder2": {**GATED, "rope_parameters": ROTATION, "sliding_window": 8, "tie_word_embeddings": True},
    "mixtral": {**GATED, "rope_parameters": ROTATION, "sliding_window": 8, **EXPERTS, "num_local_experts": 4},
    # The second layer has no experts; the shared expert of the others is as wide as none of them.
    "qwen2_moe": {
        **GATED,
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
        "mlp_only_layers": [1],
        "rope_parameters": ROTATION,
    },
    "qwen3_moe": {
        **GATED,
        **EXPERTS,
        "head_dim": 8,
        "num_experts": 6,
        "moe_intermediate_size": 8,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "rope_parameters": ROTATION,
    },
    "olmoe": {**GATED, **EXPERTS, "num_experts": 5, "clip_qkv": 1.5, "rope_parameters": ROTATION},
    "gpt_oss": {
        **GATED,
        **EXPERTS,
        "head_dim": 8,
        "num_local_experts": 4,
        "swiglu_limit": 1.0,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {**YARN, "truncate": False},
    },
    # The first layer has no experts; queries are made at once, of their narrow vector, and experts chosen among all.
    "deepseek_v2": {
        **GATED,
        **EXPERTS,
        **LATENT,
        "q_lora_rank": None,
        "n_routed_experts": 5,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4},
    },
    "deepseek_v3": {
        **GATED,
        **EXPERTS,
        **LATENT,
        "q_lora_rank": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-3,
        "rope_parameters": ROTATION,
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
    "bert": {**ENCODER, "hidden_act": "gelu"},
    "roberta": {**ENCODER, "max_position_embeddings": 50, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": 64,
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 48,
        **LABELS,
    },
    "electra": {**ENCODER, "embedding_size": 8, "hidden_act": "gelu", "pad_token_id": 0},
    "modernbert": {
        **ENCODER,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "bos_token_id": 1,
        "sep_token_id": 2,
        "eos_token_id": 2,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
        "mlp_bias": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    },
    # Patches that are no squares, and a row of pixels that fills none.
    "vit": {**IMAGES, "image_size": [13, 10], "patch_size": [4, 5], "num_channels": 1, "qkv_bias": False},
    "deit": {**IMAGES, "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_act": "gelu"},
    "bart": BART,
    "mbart": {**BART, "scale_embedding": True},
    "marian": {**BART, "activation_function": "swish", "scale_embedding": True, "pad_token_id": 63},
    "pegasus": {**BART, "activation_function": "relu", "scale_embedding": True, "pad_token_id": 0},
    # As many positions as the second convolution leaves of frames, and of frames of which no number divides the width.
    "whisper": {
        **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
        "num_mel_bins": 5,
        "max_source_positions": 11,
        "max_target_positions": 48,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "t5": T5,
    "t5_v1_1": {**T5, "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
"""What distinguishes each family, in little: windows shorter than the tokens, soft caps that bite.

The ``model_type`` is the name, where it is not among the settings.
"""

TOKENS = {"llama": 40}
"""How many tokens a row has, where it is not 24: Llama's rule of rotation is for lengths past 32."""


HEADS = ("classifier.weight", "classifier.out_proj.weight")
"""What tells labels apart; large, so that their logits are."""
LENGTHS = (24, 17, 5, 20)
"""How much of each row an encoder reads; behind it is padding."""


def kind(name: str) -> Any:
    """The class of transformers that makes and loads a family's network."""
    if "image_size" in SETTINGS[name]:
        return AutoModelForImageClassification
    if "id2label" in SETTINGS[name]:
        return AutoModelForSequenceClassification
    if "num_mel_bins" in SETTINGS[name]:
        return AutoModelForSpeechSeq2Seq
    return AutoModelForSeq2SeqLM if "decoder_start_token_id" in SETTINGS[name] else AutoModelForCausalLM


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A family's network in torch, weights as they come; eager attention, since only it has soft caps and all windows.

    Args:
        name: a key of `SETTINGS`.
        changes: settings that differ from those.
    """
    settings = {"model_type": name, **SETTINGS[name], **changes}
    config = AutoConfig.for_model(**settings)
    if "image_size" in settings:
        # Of two classes that transformers has for a DeiT it takes the one that is named.
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForImageClassification"]
    model = kind(name).from_config(config, attn_implementation="eager")
    if config.model_type in ("t5", "mt5") and settings.get("tie_word_embeddings") is False:
        # transformers makes them tied whatever is asked for, and unties them for a checkpoint that has both.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The blocks of any decoder or encoder, in order; of an encoder-decoder those of its decoder."""
    stack = model.get_decoder() if model.config.is_encoder_decoder else model
    return next(module for module in stack.modules() if isinstance(module, torch.nn.ModuleList))


def run_images(model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of a network that reads images, ``[rows, channels, height, width]``."""
    with torch.no_grad():
        said = model(pixel_values, output_hidden_states=True)
    streams = said.hidden_states[1:]
    return {"logits": said.logits, **{f"layer_{number}": stream for number, stream in enumerate(streams)}}


def run(model: PreTrainedModel, tokens: torch.Tensor, source: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Logits, and the residual stream after each block, before the final norm.

    Args:
        model: the network.
        tokens: ``[rows, tokens]``; negative ones, which only encoders may be given, are padding.
        source: what the encoder of an encoder-decoder reads, ``[rows, source]``; negative ones are padding. Sound is
            ``[rows, mels, frames]`` float, and has none.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, read: torch.Tensor) -> Callable[[torch.nn.Module, object, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: object, output: Any) -> None:
            stream = (output[0] if isinstance(output, tuple) else output).detach()
            found[name] = torch.where((read >= 0)[..., None], stream, 0)

        return hook

    hooks = [block.register_forward_hook(keep(f"layer_{n}", tokens)) for n, block in enumerate(blocks(model))]
    inputs: dict[str, Any] = {"input_ids": tokens}
    if source is not None:
        stack = next(part for part in model.get_encoder().modules() if isinstance(part, torch.nn.ModuleList))
        sound = source.ndim == 3
        read = torch.zeros(source.shape[0], source.shape[2] // 2) if sound else source
        hooks += [block.register_forward_hook(keep(f"encoder_{n}", read)) for n, block in enumerate(stack)]
        given = {"input_features": source} if sound else _padded(model, source)
        inputs = {**given, "decoder_input_ids": tokens, "use_cache": False}
    elif _classifies(model):
        inputs = _padded(model, tokens)
    else:
        inputs["use_cache"] = False
    with torch.no_grad():
        found["logits"] = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return found


def _classifies(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _padded(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Padding as transformers wants it: a token of its own, and a mask."""
    seen = tokens >= 0
    return {"input_ids": torch.where(seen, tokens, model.config.pad_token_id), "attention_mask": seen.long()}


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights of such a size that every part of the network matters; biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                # positions that are computed
                continue
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
            if name in HEADS and parameter.ndim == 2:
                # a GELU before it leaves less than tanh does
                spread = (18 if model.config.model_type == "electra" else 6) * spread
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + centre)
        for name, buffer in model.named_buffers():
            if name.endswith(("final_logits_bias", "e_score_correction_bias")):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model.eval()


def batch(name: str, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens of a reference, and the source of an encoder-decoder's; see `run`."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = SETTINGS[name]["vocab_size"]
    if not _classifies(model) and not model.config.is_encoder_decoder:
        return torch.randint(0, vocabulary, (2, TOKENS.get(name, 24)), generator=generator), None
    # The first few tokens are special: BART and RoBERTa give padding no position of its own.
    tokens = torch.randint(3, vocabulary, (len(LENGTHS), 24), generator=generator)
    read = torch.where(torch.arange(24) < torch.tensor(LENGTHS)[:, None], tokens, -1)
    if not model.config.is_encoder_decoder:
        return read, None
    if "num_mel_bins" in SETTINGS[name]:
        shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return tokens[1:3], torch.randn(shape, generator=generator)
    return torch.randint(3, vocabulary, (2, 24), generator=generator), read[1:3]


def make(name: str, folder: Path) -> None:
    """Write one family's reference into a folder."""
    model = randomise(build(name), 0)
    images = "image_size" in SETTINGS[name]
    tokens, source = (torch.zeros(0), None) if images else batch(name, model)
    (folder / name).mkdir(exist_ok=True)
    with TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(temporary) / file, folder / name / file)
    if images:
        config, generator = model.vit.embeddings if name == "vit" else model.deit.embeddings, torch.Generator()
        shape = (2, model.config.num_channels, *config.image_size)
        pixel_values = torch.randn(shape, generator=generator.manual_seed(1))
        expected = {**run_images(model, pixel_values), "pixel_values": pixel_values}
    else:
        expected = {**run(model, tokens, source), "tokens": tokens.to(torch.int32)}
    if source is not None:
        expected["source"] = source if source.is_floating_point() else source.to(torch.int32)
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, folder / f"{name}_expected.safetensors")


def main(names: Sequence[str]) -> None:
    """Write the references named, or all."""
    for name in names or SETTINGS:
        make(name, Path(__file__).parent)


if __name__ == "__main__":
    main(sys.argv[1:])
