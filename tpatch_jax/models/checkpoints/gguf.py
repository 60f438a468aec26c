"""GGUF checkpoints as Hugging Face folders: one entry of `ARCHITECTURES` per family."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tpatch_jax.core.arguments import install_advice
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.gguf_metadata import Metadata, listed, special_ids
from tpatch_jax.models.checkpoints.gguf_tokenizer import tokenizer_files
from tpatch_jax.typing import Progress

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = [
    "ARCHITECTURES",
    "CONVERTER_VERSION",
    "UNCHANGED",
    "Architecture",
    "Fix",
    "Progress",
    "convert_gguf",
    "open_gguf",
]

# Raise it whenever the written files change: folders that an older converter cached are then rebuilt.
CONVERTER_VERSION = 1

_READABLE = "use a file in F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K or IQ1_S to IQ4_XS"


class Fix(NamedTuple):
    """How a tensor of a GGUF file becomes that of a Hugging Face file, and back.

    Attributes:
        read: from GGUF to Hugging Face.
        write: its inverse.
        turned: whether rows become columns.
    """

    read: Callable[[np.ndarray, Metadata], np.ndarray]
    write: Callable[[np.ndarray, Metadata], np.ndarray]
    turned: bool = False


class Architecture(NamedTuple):
    """How one GGUF architecture becomes one Hugging Face family.

    Attributes:
        config: the family's ``config.json`` from a file's keys.
        tensors: from a GGUF name to a Hugging Face name; a leading ``blk.{i}.`` stands for every layer.
        fixes: how values change on the way, by the GGUF name as written in `tensors` or `biases`.
        tied: may be absent from a file: the head of a model with tied embeddings.
        settings: may be present: tensors that are settings in Hugging Face files; each takes the configuration, and
            gives what changes.
        biases: may be present, in some layers or in all: by the entry of ``config.json`` that says so, as `tensors`.
        shapes: from ``config.json`` to the shapes of weights of `tensors`, as NumPy has them, but for tables of tokens,
            which are compared where they are loaded; a bias has the first number.
    """

    config: Callable[[Metadata], dict[str, Any]]
    tensors: dict[str, str]
    fixes: dict[str, Fix]
    tied: str
    settings: dict[str, Callable[[np.ndarray, Metadata, dict[str, Any]], dict[str, Any]]]
    biases: dict[str, dict[str, str]]
    shapes: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]

    def expected(self, layers: int, setting: str | None = None) -> dict[str, tuple[str, str]]:
        """Every tensor of `tensors`, or the biases of a setting: its GGUF name, that name there, the other name."""
        names = self.tensors if setting is None else self.biases[setting]
        return {
            pattern.format(i=i): (pattern, target.format(i=i))
            for pattern, target in names.items()
            for i in (range(layers) if "{i}" in pattern else [0])
        }


def open_gguf(source: Path) -> "tuple[GGUFReader, Metadata, Architecture]":
    """Open a GGUF file of an architecture that is supported.

    Args:
        source: the file.

    Returns:
        The reader of the gguf package, the file's keys, and what is known of its architecture.

    Raises:
        TPatchError: the gguf package is missing, the file is damaged or a part of a model, or its architecture or the
            type of a tensor is not known.
    """
    try:
        import gguf
    except ImportError as error:
        raise TPatchError(
            f"{source}: reading GGUF needs the gguf package: {install_advice('gguf>=0.17', 'demo')}"
        ) from error

    try:
        reader = gguf.GGUFReader(source)
        metadata = Metadata(source, {key: field.contents() for key, field in reader.fields.items()})
    # gguf checks little: a cut or foreign file surfaces as whatever its parsing stumbled on
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            raise TPatchError(
                f"{source}: a tensor has type {unknown[1]}, which the installed gguf package does not know; "
                f"update that package, or {_READABLE}"
            ) from error
        raise TPatchError(
            f"{source}: not a readable GGUF file ({_damage(source, error)}); download or export it again"
        ) from error

    name = metadata["general.architecture"]
    if name not in ARCHITECTURES:
        raise TPatchError(
            f"{source}: architecture '{name}' is not supported; supported: {listed(ARCHITECTURES)}. "
            "Use the model's Hugging Face folder"
        )
    if (parts := metadata.get("split.count", 0)) > 1:
        raise TPatchError(
            f"{source}: one of {parts} parts of a model; join them with llama.cpp's llama-gguf-split --merge"
        )
    return reader, metadata, ARCHITECTURES[name]


def _damage(source: Path, error: Exception) -> str:
    """What is wrong with a file that gguf stumbled on, where that can be told."""
    try:
        with source.open("rb") as file:
            begin = file.read(4)
    except OSError as failure:
        return failure.strerror or str(failure)
    if not begin:
        return "it is empty"
    if not b"GGUF".startswith(begin):
        return "it does not begin as one"
    if version := re.search(r"version (\d+)", str(error)):
        return f"its version is {version[1]}; 2 and 3 are read"
    return "it is cut short or damaged"


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
    reader, metadata, architecture = open_gguf(source)
    import gguf
    from safetensors.numpy import save_file

    name = metadata["general.architecture"]
    config = architecture.config(metadata)
    for file, content in tokenizer_files(metadata, metadata.count(f"{name}.context_length")).items():
        (folder / file).write_text(content, encoding="utf-8")

    layers = metadata.count(f"{name}.block_count")
    expected = architecture.expected(layers)
    present = {tensor.name for tensor in reader.tensors}
    missing = expected.keys() - present - {architecture.tied}
    biases: dict[str, tuple[str, str]] = {}
    for setting in architecture.biases:
        possible = architecture.expected(layers, setting)
        config[setting] = not possible.keys().isdisjoint(present)
        biases |= possible if config[setting] else {}
    expected |= biases
    if unknown := sorted(present - expected.keys() - architecture.settings.keys()):
        raise TPatchError(f"{source}: a {name} model with {listed(unknown)} is not supported; use a plain {name} model")
    if missing:
        raise TPatchError(f"{source}: the tensors {listed(sorted(missing))} are missing; download or export it again")

    shapes = architecture.shapes(config)
    weights: dict[str, np.ndarray] = {}
    for done, tensor in enumerate(reader.tensors, 1):
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise TPatchError(
                f"{source}: tensor '{tensor.name}' has the unsupported type {tensor.tensor_type.name}; {_READABLE}"
            ) from error
        if tensor.name in architecture.settings:
            config |= architecture.settings[tensor.name](weight, metadata, config)
        else:
            pattern, target = expected[tensor.name]
            _check_shape(source, tensor.name, weight.shape, pattern, shapes)
            # safetensors stores the buffer as it lies, so a transposed view has to be copied first
            weights[target] = np.ascontiguousarray(architecture.fixes.get(pattern, UNCHANGED).read(weight, metadata))
        if progress is not None:
            progress("converting", done, len(reader.tensors))
    # llama.cpp adds a bias where a layer has one; a Hugging Face network has it in all layers or in none.
    for _, target in biases.values():
        if target not in weights:
            weights[target] = np.zeros(weights[target.removesuffix("bias") + "weight"].shape[:1], np.float32)

    special = {f"{role}_token_id": id for role, id in special_ids(metadata).items() if role != "unk"}
    tied = {"tie_word_embeddings": architecture.tied not in present}
    _write_json(folder / "config.json", config | special | tied | {"dtype": "float32", "torch_dtype": "float32"})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes its file readable by the owner only, which a cache shared by a team must not be
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    _write_json(folder / "generation_config.json", {key: id for key, id in special.items() if id is not None})


def _check_shape(
    source: Path, name: str, shape: tuple[int, ...], pattern: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Make sure that a tensor is of the shape that a file's metadata imply, where these tell."""
    weight, _, part = pattern.rpartition(".")
    wanted = shapes.get(weight, shape) if part == "weight" else shapes.get(weight, shape)[:1]
    if shape != wanted:
        raise TPatchError(
            f"{source}: tensor '{name}' has the shape {list(shape)}, and the file's metadata imply {list(wanted)}; "
            "download or export it again"
        )


UNCHANGED = Fix(lambda weight, metadata: weight, lambda weight, metadata: weight)
_TRANSPOSED = Fix(lambda weight, metadata: weight.T, lambda weight, metadata: weight.T, True)


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where a plain widening gives 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- llama, which is Mistral too ---


def _llama_config(metadata: Metadata) -> dict[str, Any]:
    hidden, heads = metadata.count("llama.embedding_length"), metadata.count("llama.attention.head_count")
    head = metadata.count("llama.attention.key_length", hidden // heads)
    if metadata.get("llama.rope.dimension_count", head) != head:
        raise TPatchError(f"{metadata.source}: rotary positions on part of a head are not supported for llama")
    theta = _decimal(metadata.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.count("llama.feed_forward_length"),
        "max_position_embeddings": metadata.count("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata.count("llama.block_count"),
        "num_key_value_heads": metadata.count("llama.attention.head_count_kv", heads),
        "rms_norm_eps": _decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_theta": theta} | _scaling(metadata),
        "rope_theta": theta,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }


def _scaling(metadata: Metadata) -> dict[str, Any]:
    # llama.cpp takes a file that names no kind as linear, and no factor, in the old key or the new, as 1
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear")) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default"}
    if kind != "linear":
        raise TPatchError(f"{metadata.source}: rope scaling '{kind}' is not supported; use a model without it")
    return {"rope_type": "linear", "factor": _decimal(factor)}


def _llama3_scaling(factors: np.ndarray, metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """The rule behind Llama 3's factors, one for each pair of a head's entries, by which its frequency is divided.

    The file keeps no more than the factors. Every Llama 3 has the same rule but for its largest factor.
    """
    rope = config["rope_parameters"]
    factor, low, high, original = _decimal(factors.max()), 1.0, 4.0, 8192
    width = config["head_dim"]
    turns = original / (2 * np.pi) * rope["rope_theta"] ** (-np.arange(0, width, 2) / width)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    rule = 1.0 / ((1.0 - kept) / factor + kept)
    if (
        rope["rope_type"] != "default"
        or factors.shape != rule.shape
        or factor < 1.0
        or not np.allclose(factors, rule, rtol=1e-4, atol=0.0)
    ):
        raise TPatchError(
            f"{metadata.source}: the factors in 'rope_freqs.weight' are not those of Llama 3 (low_freq_factor 1, "
            "high_freq_factor 4, 8192 positions at first), and a GGUF file keeps nothing else of the rule; "
            "use the model's Hugging Face folder"
        )
    llama3 = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {"rope_parameters": rope | llama3 | {"original_max_position_embeddings": original}}


def _half_split(heads: str) -> Fix:
    """Undo llama.cpp's row order: its rope turns rows (2j, 2j+1) of a head together, Hugging Face's (j, j+d/2)."""

    def reordered(weight: np.ndarray, metadata: Metadata, *, write: bool) -> np.ndarray:
        count = metadata.get(heads, metadata["llama.attention.head_count"])
        half = weight.shape[0] // count // 2
        halves = (2, half) if write else (half, 2)
        return weight.reshape(count, *halves, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)

    return Fix(partial(reordered, write=False), partial(reordered, write=True))


def _llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return {
        **dict.fromkeys(("output_norm", "blk.{i}.attn_norm", "blk.{i}.ffn_norm"), (hidden,)),
        **dict.fromkeys(("blk.{i}.ffn_gate", "blk.{i}.ffn_up"), (inner, hidden)),
        **dict.fromkeys(("blk.{i}.attn_k", "blk.{i}.attn_v"), (keys, hidden)),
        "blk.{i}.attn_q": (queries, hidden),
        "blk.{i}.attn_output": (hidden, queries),
        "blk.{i}.ffn_down": (hidden, inner),
    }


_LLAMA = Architecture(
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
        f"blk.{{i}}.attn_{name}.{part}": _half_split(f"llama.attention.{heads}")
        for name, heads in (("q", "head_count"), ("k", "head_count_kv"))
        for part in ("weight", "bias")
    },
    tied="output.weight",
    settings={"rope_freqs.weight": _llama3_scaling},
    biases={
        setting: {f"blk.{{i}}.{name}.bias": f"model.layers.{{i}}.{target}_proj.bias" for name, target in names.items()}
        for setting, names in {
            "mlp_bias": {"ffn_gate": "mlp.gate", "ffn_up": "mlp.up", "ffn_down": "mlp.down"},
            "attention_bias": {
                "attn_q": "self_attn.q",
                "attn_k": "self_attn.k",
                "attn_v": "self_attn.v",
                "attn_output": "self_attn.o",
            },
        }.items()
    },
    shapes=_llama_shapes,
)


# --- gpt2 ---


def _gpt2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["n_embd"], config["n_inner"]
    return {
        **dict.fromkeys(_GPT2_NORMS, (hidden,)),
        "position_embd": (config["n_positions"], hidden),
        "blk.{i}.attn_qkv": (3 * hidden, hidden),
        "blk.{i}.attn_output": (hidden, hidden),
        "blk.{i}.ffn_up": (inner, hidden),
        "blk.{i}.ffn_down": (hidden, inner),
    }


def _gpt2_config(metadata: Metadata) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        # llama.cpp has no other for this architecture
        "activation_function": "gelu_new",
        "layer_norm_epsilon": _decimal(metadata["gpt2.attention.layer_norm_epsilon"]),
        "n_embd": metadata.count("gpt2.embedding_length"),
        "n_head": metadata.count("gpt2.attention.head_count"),
        "n_inner": metadata.count("gpt2.feed_forward_length"),
        "n_layer": metadata.count("gpt2.block_count"),
        "n_positions": metadata.count("gpt2.context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }


# GGUF keeps every matrix as [out, in], Hugging Face's GPT-2 as [in, out]
_GPT2_MATRICES = {
    "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
    "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
    "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
    "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
}

_GPT2_NORMS = {
    "output_norm": "transformer.ln_f",
    "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
}

_GPT2 = Architecture(
    config=_gpt2_config,
    tensors={
        "token_embd.weight": "transformer.wte.weight",
        "position_embd.weight": "transformer.wpe.weight",
        "output.weight": "lm_head.weight",
    }
    | {
        f"{name}.{part}": f"{target}.{part}"
        for name, target in (_GPT2_MATRICES | _GPT2_NORMS).items()
        for part in ("weight", "bias")
    },
    fixes={f"{name}.weight": _TRANSPOSED for name in _GPT2_MATRICES},
    tied="output.weight",
    settings={},
    biases={},
    shapes=_gpt2_shapes,
)

ARCHITECTURES = {"llama": _LLAMA, "gpt2": _GPT2}
"""The architectures that are read and written, by GGUF's names."""
