"""What goes into a GGUF file: every tensor of a corrected model, with its type and where its bytes come from."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tpatch_jax.core.devices import host
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.export import common_width, describe_exact
from tpatch_jax.models.checkpoints.gguf import ARCHITECTURES, UNCHANGED, Architecture, open_gguf
from tpatch_jax.models.checkpoints.gguf_blocks import block_width, decode, encode
from tpatch_jax.models.checkpoints.gguf_metadata import Metadata
from tpatch_jax.models.checkpoints.gguf_tokenizer import tokenizer_keys
from tpatch_jax.models.checkpoints.layout import flatten, join, layout
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.registry import configure, family_of
from tpatch_jax.models.model import Model
from tpatch_jax.models.shapes import merged_neurons

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderTensor

__all__ = ["FilePlan", "ModelPlan", "Plan", "PlannedTensor"]

LOST = 0.5
"""Where rounding takes as large a share of a patch as this, nothing is left of what it says."""

_EMBEDDINGS = ("token_embd.weight", "output.weight")
_WIDE = {"ffn_gate.weight": 0, "ffn_up.weight": 0, "ffn_gate.bias": 0, "ffn_up.bias": 0, "ffn_down.weight": 1}
"""Tensors of a layer that are as wide as its feed-forward network, and along which axis."""


class PlannedTensor(NamedTuple):
    """One tensor that is to be written.

    Attributes:
        name: in the file.
        kind: its type.
        shape: as NumPy has it, the longest jumps first.
        content: makes its numbers or bytes when they are written.
        fate: ``"copied"``, ``"widened"``, ``"added"`` or ``"converted"``; see `tpatch_jax.export_gguf`.
    """

    name: str
    kind: "GGMLQuantizationType"
    shape: tuple[int, ...]
    content: Callable[[], np.ndarray]
    fate: str

    def announce(self, writer: "GGUFWriter") -> None:
        """Tell a writer of the tensor's name, type and shape."""
        import gguf

        size, stored = gguf.GGML_QUANT_SIZES[self.kind]
        *rows, width = self.shape
        width = width // size * stored
        # The package takes a shape in bytes for what is given as bytes, and turns it into one in weights.
        dtype, shape = np.dtype(np.uint8), (*rows, width)
        if self.kind.name in ("F32", "F16"):
            dtype, shape = np.dtype(f"float{8 * stored}"), self.shape
        writer.add_tensor_info(self.name, shape, dtype, math.prod(rows) * width, raw_dtype=self.kind)


class Plan(ABC):
    """What is written of a model with merged patches.

    Attributes:
        model: it.
        metadata: the keys of the file that is copied or made.
        merged: how many patch neurons are in which layers.
        target: the description of the network in the file.
        kind: what all matrices are stored as; ``None`` keeps their types.
        architecture: what is known of the file's.
    """

    model: Model
    metadata: Metadata
    merged: dict[int, int]
    target: NetworkConfig
    kind: "GGMLQuantizationType | None"
    architecture: Architecture

    def __init__(
        self,
        model: Model,
        metadata: Metadata,
        settings: dict[str, Any],
        target: NetworkConfig,
        kind: "GGMLQuantizationType | None",
    ) -> None:
        """Settle what is written.

        Args:
            model: the model.
            metadata: the keys.
            settings: the ``config.json`` of the network in the file.
            target: what they describe.
            kind: what all matrices are stored as; ``None`` keeps their types.
        """
        self.model, self.metadata, self.target, self.kind = model, metadata, target, kind
        self.merged = merged_neurons(model.config, model.params)
        self.architecture = ARCHITECTURES[metadata["general.architecture"]]
        self._stored = layout(family_of(settings), target)
        self._leaves = dict(flatten(model.params))
        self._errors: list[float] = []

    @property
    def rounding(self) -> float:
        """How far the patches' weights are off in what was made so far, relative to themselves."""
        return math.sqrt(float(np.mean(np.square(self._errors)))) if self._errors else 0.0

    @property
    def silent(self) -> int:
        """How many neurons of zeros are added."""
        wider = (self.target.ffn_width - self.model.config.ffn_width) * self.target.layers
        return wider - sum(self.merged.values())

    @abstractmethod
    def writer(self, path: Path) -> "GGUFWriter":
        """A writer of the gguf package that has all keys.

        Args:
            path: the file that it shall write.
        """

    @abstractmethod
    def tensors(self) -> Iterator[PlannedTensor]:
        """Every tensor in the order of the file.

        Raises:
            TPatchError: one cannot be written.
        """

    def _chosen(self, name: str, shape: tuple[int, ...], current: "GGMLQuantizationType") -> "GGMLQuantizationType":
        """The type that a tensor gets; embeddings stay at eight bits or what they have, positions and vectors as is."""
        import gguf

        if self.kind is None or len(shape) < 2 or name == "position_embd.weight":
            return current
        kinds = gguf.GGMLQuantizationType
        bits = lambda kind: 8 * gguf.GGML_QUANT_SIZES[kind][1] / block_width(kind)  # noqa: E731
        wanted = self.kind
        if name in _EMBEDDINGS and bits(wanted) < bits(kinds.Q8_0):
            wanted = min(kinds.Q8_0, current, key=bits)
        return wanted if shape[-1] % block_width(wanted) == 0 else kinds.F16

    def _weights(self, pattern: str, name: str) -> Float[np.ndarray, "..."]:
        """A tensor as the file would hold it in float32, with zeros where layers become wider or had no bias."""
        stored = self._stored[name]
        parts = []
        for path, shape in zip(stored.paths, stored.shapes, strict=True):
            if path in self._leaves:
                array = host(self._leaves[path]).astype(np.float32)
                missing = [(0, new - old) for old, new in zip(array.shape, shape, strict=True)]
                parts.append(np.pad(array, missing) if any(map(any, missing)) else array)
            else:
                parts.append(np.zeros(shape, np.float32))
        fix = self.architecture.fixes.get(pattern, UNCHANGED)
        return np.ascontiguousarray(fix.write(join(stored, parts), self.metadata))

    def _encoded(self, pattern: str, name: str, planned: str, kind: "GGMLQuantizationType") -> np.ndarray:
        """All of a tensor in a type."""
        weights = self._weights(pattern, name)
        blocks = encode(weights, kind, planned)
        if axis := _added_along(pattern):
            width = self.model.config.ffn_width
            behind = slice(width, None) if axis == 1 else (slice(None), slice(width, None))
            self._note(weights[behind], decode(blocks, kind)[behind], planned, kind)
        return blocks

    def _note(self, weights: np.ndarray, stored: np.ndarray, name: str, kind: "GGMLQuantizationType") -> None:
        """Keep in mind what rounding takes of the patches' weights.

        Raises:
            TPatchError: it takes most of them.
        """
        total = float(np.square(weights).sum())
        if total:
            self._errors.append(math.sqrt(float(np.square(stored - weights).sum()) / total))
            if self._errors[-1] > LOST:
                raise TPatchError(
                    f"'{name}' is stored as {kind.name}, too coarse for patches ({self._errors[-1]:.0%} of their "
                    "weights would be lost); choose another type for the whole model: --type q8_0 (type='q8_0')"
                )

    def _is_patched(self, name: str) -> bool:
        """Whether a tensor is of a layer with patches, by either name."""
        return next((int(part) for part in name.split(".") if part.isdigit()), -1) in self.merged


def _added_along(pattern: str) -> int:
    """Along which axis, counted from one, a tensor grows with its feed-forward network; 0 for none."""
    return _WIDE.get(pattern.removeprefix("blk.{i}."), -1) + 1


class FilePlan(Plan):
    """A copy of the GGUF file that a model was read from, with the model's patches in it.

    Attributes:
        reader: the file, as the gguf package reads it.
    """

    reader: "GGUFReader"

    def __init__(self, model: Model, source: Path, kind: "GGMLQuantizationType | None") -> None:
        """Open the file and settle the width.

        Args:
            model: the model.
            source: the file.
            kind: what all matrices are stored as; ``None`` keeps their types.

        Raises:
            TPatchError: the file cannot be read, or its numbers are in another byte order than this machine's.
        """
        self.reader, metadata, _ = open_gguf(source)
        if self.reader.byte_order == "S":
            raise TPatchError(
                f"{source}: its numbers are in the other byte order; convert it with gguf-convert-endian, which comes "
                "with the gguf package"
            )
        self.kind = kind
        downs = [tensor for tensor in self.reader.tensors if tensor.name.endswith("ffn_down.weight")]
        blocks = [block_width(self._chosen(one.name, _shape(one), one.tensor_type)) for one in downs]
        family = family_of(model.settings)
        settings = {**model.settings, family.ffn_width: common_width(model, math.lcm(*blocks))}
        if merged_neurons(model.config, model.params) and family.biases:
            settings[family.biases] = True
        super().__init__(model, metadata, settings, configure(settings), kind)

    def writer(self, path: Path) -> "GGUFWriter":
        """A writer that has all keys of the file, with the new width and type."""
        import gguf

        name = self.metadata["general.architecture"]
        writer = gguf.GGUFWriter(path, name)
        # What is written is aligned by this; the key itself is among the others.
        writer.data_alignment = int(self.reader.alignment)
        changed: dict[str, Any] = {f"{name}.feed_forward_length": self.target.ffn_width}
        if self.kind is not None:
            changed["general.file_type"] = file_type(self.kind)
        for key, field in self.reader.fields.items():
            # The first are counts in the header, and the architecture is there already.
            if key.startswith("GGUF.") or key == "general.architecture":
                continue
            value, listed = changed.get(key, self.metadata[key]), field.types[0] is gguf.GGUFValueType.ARRAY
            # The package writes no list without entries, which says as much as none.
            if not listed or value:
                writer.add_key_value(key, value, field.types[0], field.types[-1] if listed else None)
        return writer

    def tensors(self) -> Iterator[PlannedTensor]:
        """Every tensor in the file's order, and new biases behind the weights that they belong to."""
        layers = self.model.config.layers
        expected = self.architecture.expected(layers)
        for setting in self.architecture.biases:
            expected |= self.architecture.expected(layers, setting)
        present = {tensor.name for tensor in self.reader.tensors}
        self._check_names(present, expected)
        for tensor in self.reader.tensors:
            if tensor.name in self.architecture.settings:
                yield _copied(tensor)
                continue
            yield self._planned(tensor, *expected[tensor.name])
            bias = tensor.name.removesuffix("weight") + "bias"
            if bias in expected and bias not in present and self._is_patched(bias):
                pattern, name = expected[bias]
                if _added_along(pattern):
                    yield self._vector(bias, pattern, name)

    def _check_names(self, present: set[str], expected: dict[str, tuple[str, str]]) -> None:
        """Make sure that the file holds the tensors that the model has."""
        source, mend = self.metadata.source, "load the file again, and merge patches that were made for it"
        wanted = {
            name for name in self.architecture.expected(self.model.config.layers) if expected[name][1] in self._stored
        }
        if missing := sorted(wanted - present - ({self.architecture.tied} if self.model.config.tied else set())):
            raise TPatchError(f"{source} does not hold '{missing[0]}', which the model has; {mend}")
        known = {name for name, (_, other) in expected.items() if other in self._stored} | set(
            self.architecture.settings
        )
        if unknown := sorted(present - known):
            raise TPatchError(f"{source} holds '{unknown[0]}', which the model does not have; {mend}")

    def _vector(self, planned: str, pattern: str, name: str) -> PlannedTensor:
        import gguf

        weights = self._weights(pattern, name)
        return PlannedTensor(planned, gguf.GGMLQuantizationType.F32, weights.shape, lambda: weights, "added")

    def _planned(self, tensor: "ReaderTensor", pattern: str, name: str) -> PlannedTensor:
        """A tensor of the file: as it is, with new blocks behind it, or in another type."""
        old = _shape(tensor)
        kind = self._chosen(tensor.name, old, tensor.tensor_type)
        axis = _added_along(pattern) - 1
        new = tuple(self.target.ffn_width if place == axis else size for place, size in enumerate(old))
        ours = self._stored[name].shape
        ours = ours[::-1] if self.architecture.fixes.get(pattern, UNCHANGED).turned else ours
        if axis >= 0:
            ours = (*ours[:axis], self.model.config.ffn_width, *ours[axis + 1 :])
        if old != ours:
            raise TPatchError(
                f"'{tensor.name}' in {self.metadata.source} is {list(old)}, and in the model {list(ours)}; load the "
                "file again, and merge patches that were made for it"
            )
        if kind == tensor.tensor_type and new == old:
            self._check(tensor, self._weights(pattern, name))
            return _copied(tensor)
        if kind == tensor.tensor_type:
            # Now rather than when half of the file is written: the type may be one that nothing writes.
            encode(np.full((1, block_width(kind)), float(self._is_patched(tensor.name)), np.float32), kind, tensor.name)
            return PlannedTensor(tensor.name, kind, new, partial(self._widened, tensor, pattern, name), "widened")

        def converted() -> np.ndarray:
            self._check(tensor, self._weights(pattern, name))
            return self._encoded(pattern, name, tensor.name, kind)

        return PlannedTensor(tensor.name, kind, new, converted, "converted")

    def _widened(self, tensor: "ReaderTensor", pattern: str, name: str) -> np.ndarray:
        """All blocks of a tensor as they are, and those of the new neurons behind them."""
        weights, axis, width = self._weights(pattern, name), _added_along(pattern) - 1, self.model.config.ffn_width
        self._check(tensor, weights)
        # A bias is one row.
        added = np.atleast_2d(weights[width:] if axis == 0 else weights[:, width:])
        blocks = encode(added, tensor.tensor_type, tensor.name)
        self._note(added, decode(blocks, tensor.tensor_type), tensor.name, tensor.tensor_type)
        return np.concatenate([np.asarray(tensor.data), blocks[0] if weights.ndim == 1 else blocks], axis)

    def _check(self, tensor: "ReaderTensor", weights: np.ndarray) -> None:
        """Make sure that the file's weights are the model's, but for its patches."""
        original = decode(np.asarray(tensor.data), tensor.tensor_type)
        if self.model.dtype != "float32":
            original = original.astype(jnp.dtype(self.model.dtype)).astype(np.float32)
        if not np.array_equal(original, weights[tuple(slice(size) for size in original.shape)]):
            raise TPatchError(
                f"'{tensor.name}' in {self.metadata.source} holds other weights than the model, and only patches are "
                "added to a file; load that file and merge patches that were made for it, or write what was changed "
                "otherwise with tpatch export --format transformers (tp.export_model)"
            )


def _shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    return tuple(reversed(tensor.shape.tolist()))


def _copied(tensor: "ReaderTensor") -> PlannedTensor:
    return PlannedTensor(tensor.name, tensor.tensor_type, _shape(tensor), lambda: np.asarray(tensor.data), "copied")


def file_type(kind: "GGMLQuantizationType") -> int:
    """What the key for a file's type says where all matrices have one.

    Args:
        kind: the matrices' type.
    """
    import gguf

    return int(gguf.LlamaFileType[f"{'ALL' if kind.name == 'F32' else 'MOSTLY'}_{kind.name}"])


class ModelPlan(Plan):
    """A file made of a model that was read from a folder: keys and tokenizer too.

    Attributes:
        plain: the type of matrices in the model's precision.
        settings: the ``config.json`` of the network in the file.
        factors: by how much Llama 3's rule divides the frequencies, where the model has it.
    """

    plain: "GGMLQuantizationType"
    settings: dict[str, Any]
    factors: Float[np.ndarray, "pairs"] | None

    def __init__(self, model: Model, kind: "GGMLQuantizationType | None") -> None:
        """Settle keys, width and settings.

        Args:
            model: the model.
            kind: what all matrices are stored as; ``None`` keeps the model's precision.

        Raises:
            TPatchError: llama.cpp has no such network, or none with biases in its feed-forward networks, or its
                tokenizer is of a kind that is not written.
        """
        import gguf

        kinds = gguf.GGMLQuantizationType
        self.plain = {"float32": kinds.F32, "bfloat16": kinds.BF16, "float16": kinds.F16}.get(model.dtype, kinds.F32)
        self.kind = kind
        width = model.config.ffn_width
        chosen = self._chosen("ffn_down.weight", (model.config.hidden_size, width), self.plain)
        settings, target, _, problems = describe_exact(model, common_width(model, block_width(chosen)))
        name = settings["model_type"]
        if problems or name not in _KEYS:
            why = f"it is no Llama, because {' and '.join(problems)}" if problems else "it is no Llama and no GPT-2"
            raise TPatchError(
                f"{model.name!r} cannot be written as GGUF: llama.cpp has biases in the feed-forward networks of Llama "
                f"and GPT-2 models, which patches need, and {why}. Write it for transformers (--format transformers, "
                "tp.export_model), or keep the patches beside the model (tpatch generate MODEL --patches PATCHES)"
            )
        keys = {
            "general.architecture": name,
            "general.type": "model",
            "general.name": Path(model.name).name,
            "general.file_type": file_type(kind or self.plain),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            **{f"{name}.{key}": value for key, value in _KEYS[name](settings, target).items()},
            **tokenizer_keys(model.tokenizer, target.vocabulary, target.context, model.name),
        }
        super().__init__(model, Metadata(Path(model.name), keys), settings, target, kind)
        self.settings = settings
        self.factors = _rope_factors(target, settings) if name == "llama" else None
        self._check_description()

    def _check_description(self) -> None:
        """Make sure that who reads the file's keys gets the network that the model is."""
        read = self.architecture.config(self.metadata)
        biases = {setting: bool(self.settings.get(setting)) for setting in self.architecture.biases}
        described = configure({**read, **biases, "tie_word_embeddings": self.target.tied})
        if self.factors is not None:
            turned = np.asarray(described.rope_frequencies) / self.factors
            if np.allclose(turned, self.target.rope_frequencies, rtol=1e-6, atol=0):
                described = dataclasses.replace(described, rope_frequencies=self.target.rope_frequencies)
        if described != self.target:
            names = [field for field in vars(described) if getattr(described, field) != getattr(self.target, field)]
            raise TPatchError(
                f"{self.model.name!r} cannot be written as GGUF: the format has no keys for its {', '.join(names)}; "
                "write it for transformers (--format transformers, tp.export_model)"
            )

    def writer(self, path: Path) -> "GGUFWriter":
        """A writer that has all keys."""
        import gguf

        writer = gguf.GGUFWriter(path, self.metadata["general.architecture"])
        kinds = gguf.GGUFValueType
        plain = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
        for key, value in self.metadata.items():
            if key == "general.architecture":
                continue
            if isinstance(value, list):
                inner = kinds.STRING if isinstance(value[0], str) else kinds.INT32
                writer.add_key_value(key, value, kinds.ARRAY, inner)
            else:
                writer.add_key_value(key, value, plain[type(value)])
        return writer

    def tensors(self) -> Iterator[PlannedTensor]:
        """Every tensor, layer after layer."""
        import gguf

        vector, layers = gguf.GGMLQuantizationType.F32, self.target.layers
        expected = self.architecture.expected(layers)
        if self.target.tied:
            del expected[self.architecture.tied]
        for setting in self.architecture.biases:
            # Biases that are there for the patches alone are zero in the other layers, which need none.
            for_patches = setting == "mlp_bias" and not self.model.config.ffn_bias
            for planned, (pattern, name) in self.architecture.expected(layers, setting).items():
                if self.settings.get(setting) and (
                    not for_patches or (_added_along(pattern) and self._is_patched(planned))
                ):
                    expected[planned] = pattern, name
        if self.factors is not None:
            factors = self.factors
            yield PlannedTensor("rope_freqs.weight", vector, factors.shape, lambda: factors, "added")
        for planned, (pattern, name) in expected.items():
            shape = self._stored[name].shape
            # Vectors stay in float32, in which llama.cpp computes with them.
            if len(shape) == 1:
                yield PlannedTensor(planned, vector, shape, partial(self._weights, pattern, name), "added")
                continue
            shape = shape[::-1] if self.architecture.fixes.get(pattern, UNCHANGED).turned else shape
            kind = self._chosen(planned, shape, self.plain)
            yield PlannedTensor(planned, kind, shape, partial(self._encoded, pattern, name, planned, kind), "converted")


def _llama_keys(settings: dict[str, Any], config: NetworkConfig) -> dict[str, Any]:
    rules = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    keys: dict[str, Any] = {
        "vocab_size": config.vocabulary,
        "context_length": config.context,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        "feed_forward_length": config.ffn_width,
        "rope.dimension_count": config.head_width,
        "rope.freq_base": float(rules.get("rope_theta") or settings.get("rope_theta") or 10_000.0),
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.key_value_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
    }
    if rules.get("rope_type", rules.get("type")) == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rules["factor"])}
    return keys


def _rope_factors(config: NetworkConfig, settings: dict[str, Any]) -> Float[np.ndarray, "pairs"] | None:
    """By how much Llama 3's rule divides the frequency of each pair of a head's entries; ``None`` without it."""
    rules = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rules.get("rope_type", rules.get("type")) != "llama3":
        return None
    theta = float(rules.get("rope_theta") or settings.get("rope_theta") or 10_000.0)
    plain = theta ** (-2 * np.arange(config.head_width // 2) / config.head_width)
    return (plain / np.asarray(config.rope_frequencies)).astype(np.float32)


def _gpt2_keys(settings: dict[str, Any], config: NetworkConfig) -> dict[str, Any]:
    return {
        "context_length": config.context,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        "feed_forward_length": config.ffn_width,
        "attention.head_count": config.heads,
        "attention.layer_norm_epsilon": float(config.norm_epsilon),
    }


_KEYS: dict[str, Callable[[dict[str, Any], NetworkConfig], dict[str, Any]]] = {
    "llama": _llama_keys,
    "gpt2": _gpt2_keys,
}
"""The keys of each architecture, without its name before them; ``model_type`` is called as the architecture is."""
