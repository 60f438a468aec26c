"""GGUF checkpoints as Hugging Face folders.

One entry of `_ARCHITECTURES` per family, one of `_PRE_TOKENIZERS` per rule that splits text before byte-level BPE.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.errors import TPatchError

__all__ = ["CONVERTER_VERSION", "Progress", "convert_gguf"]

# Raise it whenever the written files change: folders that an older converter cached are then rebuilt.
CONVERTER_VERSION = 1

# stage, done, total (0 where the total is not known)
Progress = Callable[[str, int, int], None]

_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Metadata(dict[str, Any]):
    """The key-value part of a GGUF file; a missing key is the user's business, so it says which file lacks it."""

    def __init__(self, source: Path, items: dict[str, Any]) -> None:
        super().__init__(items)
        self.source = source

    def __missing__(self, key: str) -> Any:
        raise TPatchError(
            f"{self.source}: no metadata '{key}'; export the model to GGUF again with a current llama.cpp"
        )


class _Architecture(NamedTuple):
    """How one GGUF architecture becomes one Hugging Face family."""

    config: Callable[[_Metadata], dict[str, Any]]
    # GGUF tensor name -> Hugging Face tensor name; a leading "blk.{i}." stands for every layer
    tensors: dict[str, str]
    # keyed by the GGUF name as written in `tensors`
    fixes: dict[str, Callable[[np.ndarray, _Metadata], np.ndarray]]
    # may be absent from a file: the head of a model with tied embeddings
    tied: str


def convert_gguf(source: Path, folder: Path, *, progress: Progress | None = None) -> None:
    """Write a GGUF checkpoint as a Hugging Face folder: float32 weights, configuration and tokenizer.

    Args:
        source: The `.gguf` file.
        folder: An existing, empty folder; gets `config.json`, `generation_config.json`, `model.safetensors`,
            `tokenizer.json` and `tokenizer_config.json`.
        progress: Called with the stage, the tensors done and the tensors in all.

    Raises:
        TPatchError: The file is no readable GGUF, or its architecture, quantisation or tokenizer is not supported.

    Example:
        >>> convert_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("smollm2"))  # doctest: +SKIP
    """
    try:
        import gguf
    except ImportError as error:
        raise TPatchError(f'{source}: reading GGUF needs the gguf package; pip install "tpatch-jax[demo]"') from error
    from safetensors.numpy import save_file

    try:
        reader = gguf.GGUFReader(source)
        metadata = _Metadata(source, {key: field.contents() for key, field in reader.fields.items()})
    # gguf checks little: a cut or foreign file surfaces as whatever its parsing stumbled on
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise TPatchError(f"{source}: not a readable GGUF file ({error}); download or export it again") from error

    name = metadata["general.architecture"]
    if name not in _ARCHITECTURES:
        raise TPatchError(f"{source}: architecture '{name}' is not supported; supported: {_listed(_ARCHITECTURES)}")
    architecture = _ARCHITECTURES[name]
    config = architecture.config(metadata)
    _write_tokenizer(metadata, folder, config["max_position_embeddings"])

    layers = metadata[f"{name}.block_count"]
    expected = {
        pattern.format(i=i): (pattern, target.format(i=i))
        for pattern, target in architecture.tensors.items()
        for i in (range(layers) if "{i}" in pattern else [0])
    }
    present = {tensor.name for tensor in reader.tensors}
    if unknown := sorted(present - expected.keys()):
        raise TPatchError(
            f"{source}: a {name} model with {_listed(unknown)} is not supported; use a plain {name} model"
        )
    if missing := sorted(expected.keys() - present - {architecture.tied}):
        raise TPatchError(f"{source}: the tensors {_listed(missing)} are missing; download or export it again")

    weights: dict[str, np.ndarray] = {}
    for done, tensor in enumerate(reader.tensors, 1):
        pattern, target = expected[tensor.name]
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise TPatchError(
                f"{source}: tensor '{tensor.name}' has the unsupported type {tensor.tensor_type.name}; "
                "use a file in F32, F16, BF16, Q4_0 to Q8_0 or Q2_K to Q6_K"
            ) from error
        # safetensors stores the buffer as it lies, so a transposed view has to be copied first
        weights[target] = np.ascontiguousarray(architecture.fixes.get(pattern, _unchanged)(weight, metadata))
        if progress is not None:
            progress("converting", done, len(reader.tensors))

    special = {f"{role}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    special.pop("unk_token_id")
    tied = {"tie_word_embeddings": architecture.tied not in present}
    _write_json(folder / "config.json", config | special | tied | {"dtype": "float32", "torch_dtype": "float32"})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes its file readable by the owner only, which a cache shared by a team must not be
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    _write_json(folder / "generation_config.json", {key: id for key, id in special.items() if id is not None})


def _unchanged(weight: np.ndarray, metadata: _Metadata) -> np.ndarray:
    return weight


# --- llama ---


def _llama_config(metadata: _Metadata) -> dict[str, Any]:
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    head = metadata.get("llama.attention.key_length", hidden // heads)
    if metadata.get("llama.rope.dimension_count", head) != head:
        raise TPatchError(f"{metadata.source}: rotary positions on part of a head are not supported for llama")
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise TPatchError(f"{metadata.source}: rope scaling '{scaling}' is not supported; use a model without it")
    theta = _decimal(metadata.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "rms_norm_eps": _decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where a plain widening gives 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _half_split(heads: str) -> Callable[[np.ndarray, _Metadata], np.ndarray]:
    """Undo llama.cpp's row order: its rope turns rows (2j, 2j+1) of a head together, Hugging Face's (j, j+d/2)."""

    def fix(weight: np.ndarray, metadata: _Metadata) -> np.ndarray:
        count = metadata.get(heads, metadata["llama.attention.head_count"])
        rows, columns = weight.shape
        pairs = weight.reshape(count, rows // count // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(rows, columns)

    return fix


_ARCHITECTURES = {
    "llama": _Architecture(
        config=_llama_config,
        tensors={
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
            "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
            "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
            "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
            "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
            "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
            "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
            "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
            "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
            "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
        },
        fixes={
            "blk.{i}.attn_q.weight": _half_split("llama.attention.head_count"),
            "blk.{i}.attn_k.weight": _half_split("llama.attention.head_count_kv"),
        },
        tied="output.weight",
    ),
}


# --- tokenizer ---

# the name in Hugging Face files -> the name in GGUF keys
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

# `tokenizer.ggml.pre` -> the `pre_tokenizer` of tokenizer.json
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "default": _BYTE_LEVEL,
    "gpt-2": _BYTE_LEVEL,
    "gpt2": _BYTE_LEVEL,
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
            _BYTE_LEVEL | {"use_regex": False},
        ],
    },
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
}


def _write_tokenizer(metadata: _Metadata, folder: Path, longest: int) -> None:
    from tokenizers import Tokenizer

    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise TPatchError(f"{metadata.source}: tokenizer '{kind}' is not supported; supported: gpt2 (byte-level BPE)")
    if pre not in _PRE_TOKENIZERS:
        raise TPatchError(
            f"{metadata.source}: pre-tokenizer '{pre}' is not supported; supported: {_listed(_PRE_TOKENIZERS)}"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    special = {
        f"{role}_token": tokens[id]
        for role, key in _ROLES.items()
        if (id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }

    def added(id: int) -> dict[str, Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {"id": id, "content": tokens[id], "special": types[id] == _CONTROL} | flags

    processors: list[dict[str, Any]] = [_BYTE_LEVEL]
    # llama.cpp adds a BOS for Llama 3 even where the file does not say so
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        first = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
        a, b = ({"Sequence": {"id": id, "type_id": 0}} for id in "AB")
        ids = {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}}
        processors.append(
            {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, first, b], "special_tokens": ids}
        )

    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(id) for id, type in enumerate(types) if type in (_CONTROL, _USER_DEFINED)],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": processors[0] if len(processors) == 1 else {"type": "Sequence", "processors": processors},
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
            "ignore_merges": pre == "llama-bpe",
        },
    }
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    # tokenizers raises bare Exception
    except Exception as error:
        raise TPatchError(
            f"{metadata.source}: the tokenizer is damaged ({error}); download or export it again"
        ) from error
    tokenizer.save(str(folder / "tokenizer.json"))

    template = metadata.get("tokenizer.chat_template")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": longest,
        }
        | special
        | ({} if template is None else {"chat_template": template}),
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
