"""Whisper checkpoints of CTranslate2 as Hugging Face folders."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save_file

from tpatch_jax.errors import TPatchError
from tpatch_jax.typing import Progress

__all__ = ["convert_ctranslate2"]

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_VERSION = 6
_HEADS = 64
"""The width of a head in every Whisper."""

_PLAIN = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "encoder/layer_norm": "encoder.layer_norm",
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    "decoder/layer_norm": "decoder.layer_norm",
}
_PARTS = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_LEAVES = {"gamma": "weight", "beta": "bias"}


def _read_variables(source: Path) -> dict[str, np.ndarray]:
    """The arrays of a ``model.bin``: after a header name, axes, type and bytes of each, without any code."""

    def number(file: BinaryIO, kind: str) -> int:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

    def text(file: BinaryIO) -> str:
        return file.read(number(file, "H"))[:-1].decode()

    arrays: dict[str, np.ndarray] = {}
    try:
        with source.open("rb") as file:
            version = number(file, "I")
            if version != _VERSION or text(file) != "WhisperSpec":
                raise TPatchError(f"{source} is no Whisper of CTranslate2's format {_VERSION}; convert it again")
            number(file, "I")
            for _ in range(number(file, "I")):
                name = text(file)
                shape = [number(file, "I") for _ in range(number(file, "B"))]
                kind, size = number(file, "B"), number(file, "I")
                if kind not in _TYPES:
                    raise TPatchError(f"{source}: {name} is of a type that is not read here; use float16 or float32")
                arrays[name] = np.frombuffer(file.read(size), _TYPES[kind]).reshape(shape)
    except (OSError, struct.error, ValueError) as error:
        raise TPatchError(f"{source} is damaged ({error}); get it again") from None
    return arrays


def _tensors(arrays: dict[str, np.ndarray], source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The same arrays under the names of transformers, in float32."""
    for name, array in arrays.items():
        if array.ndim == 0 or name.startswith("decoder/alignment"):
            continue
        if array.dtype not in (np.float32, np.float16):
            raise TPatchError(f"{source}: {name} is {array.dtype}, a quantised checkpoint; use float16 or float32")
        array = array.astype(np.float32)
        parent, _, leaf = name.rpartition("/")
        leaf = _LEAVES.get(leaf, leaf)
        if name in _PLAIN or parent in _PLAIN:
            yield f"model.{_PLAIN[name]}" if name in _PLAIN else f"model.{_PLAIN[parent]}.{leaf}", array
            continue
        side, layer, part = (*parent.split("/", 2), "", "")[:3]
        if not layer.startswith("layer_") or part not in _PARTS:
            raise TPatchError(f"{source}: {name} is no part of a Whisper")
        names = _PARTS[part]
        for theirs, piece in zip(names, np.split(array, len(names)), strict=True):
            if theirs.endswith("k_proj") and leaf == "bias":
                # A Whisper has none there, and the format holds zeros.
                if piece.any():
                    raise TPatchError(f"{source}: {name} has a bias of keys, which no Whisper has")
                continue
            yield f"model.{side}.layers.{layer.removeprefix('layer_')}.{theirs}.{leaf}", np.ascontiguousarray(piece)


def convert_ctranslate2(source: Path, folder: Path, *, progress: Progress | None = None) -> None:
    """Write a Whisper of CTranslate2 as a Hugging Face folder: float32 weights, configuration and tokenizer.

    Args:
        source: its ``model.bin``, with ``config.json`` and ``tokenizer.json`` beside it.
        folder: an existing, empty folder.
        progress: called with the stage, the tensors done and the tensors in all.

    Raises:
        TPatchError: it is no such file, or quantised.

    Example:
        >>> convert_ctranslate2(Path("whisper-tiny.en/model.bin"), Path("tiny.en"))  # doctest: +SKIP
    """
    arrays = _read_variables(source)
    if progress:
        progress("converting", 0, len(arrays))
    tensors = dict(_tensors(arrays, source))
    try:
        told = json.loads((source.parent / "config.json").read_text("utf-8"))
        tokens = json.loads((source.parent / "tokenizer.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TPatchError(
            f"{source.parent}: its settings or its tokenizer cannot be read ({error}); get them again"
        ) from None
    ids = {entry["content"]: entry["id"] for entry in tokens["added_tokens"]}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, entries in _settings(tensors, told, ids).items():
        (folder / name).write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
    shutil.copyfile(source.parent / "tokenizer.json", folder / "tokenizer.json")
    if progress:
        progress("converting", len(arrays), len(arrays))


def _settings(tensors: dict[str, np.ndarray], told: dict[str, Any], ids: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The files of settings of such a folder."""
    vocabulary, width = tensors["model.decoder.embed_tokens.weight"].shape
    mels = tensors["model.encoder.conv1.weight"].shape[1]
    end = ids["<|endoftext|>"]
    ends = {
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        first = f"model.{side}.layers."
        layers = 1 + max(int(name.removeprefix(first).split(".")[0]) for name in tensors if name.startswith(first))
        sides[f"{side}_layers"] = layers
        sides[f"{side}_attention_heads"] = width // _HEADS
        sides[f"{side}_ffn_dim"] = tensors[f"{first}0.fc1.weight"].shape[0]
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": width,
        "vocab_size": vocabulary,
        "num_mel_bins": mels,
        "max_source_positions": tensors["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": tensors["model.decoder.embed_positions.weight"].shape[0],
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **sides,
        **ends,
    }
    several = "<|transcribe|>" in ids and vocabulary > 51_864
    generation = {
        **ends,
        "is_multilingual": several,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "max_length": config["max_target_positions"],
        "suppress_tokens": told.get("suppress_ids", []),
        "begin_suppress_tokens": told.get("suppress_ids_begin", []),
        "alignment_heads": told.get("alignment_heads"),
        "return_timestamps": False,
    }
    if several:
        languages = {name: number for name, number in ids.items() if number in set(told.get("lang_ids", []))}
        tasks = {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}
        generation |= {"lang_to_id": languages, "task_to_id": tasks}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": mels,
        "sampling_rate": 16_000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
        "padding_value": 0.0,
    }
    return {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
        "tokenizer_config.json": tokenizer,
    }
