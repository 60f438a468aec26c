"""Corrected models as GGUF files: not one byte of an original weight changes, and llama.cpp says the same."""

import copy
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, relative, same
from gguf import GGMLQuantizationType as Quant
from llama_cpp import LlamaCpp
from test_gguf import GPT2_NAMES, TEMPLATE, TOKENS, tiny_keys, tiny_tensors, write_gguf, write_gpt2
from tiny_families import patch_for, tiny_model
from tokenizers import normalizers

from tpatch_jax.bank import patches as store
from tpatch_jax.cli import main as cli
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.gguf_blocks import block_width, decode, encode
from tpatch_jax.models.checkpoints.gguf_export import GGUFInfo, export_gguf
from tpatch_jax.models.model import Model, load_model
from tpatch_jax.models.patching import attach, merge
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "cached")

PATCHED, NEURONS = 1, 3
K_QUANTS = (Quant.Q2_K, Quant.Q3_K, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K, Quant.IQ4_XS)
SMALL = (Quant.Q8_0, Quant.Q5_1, Quant.Q5_0, Quant.Q4_1, Quant.Q4_0, Quant.IQ4_NL)
COPIED = (None, Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_1, Quant.IQ4_NL, Quant.Q4_K, Quant.Q6_K)
ROWS = np.random.default_rng(4).integers(3, 255, (2, 12))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """GGUF files are converted into a cache for this module."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def draw_patch(hidden: int, neurons: int = NEURONS, seed: int = 5) -> Patch:
    rng = np.random.default_rng(seed)
    key, bias, value = (rng.normal(size=shape) for shape in ((neurons, hidden), (neurons,), (neurons, hidden)))
    return Patch(*(jnp.asarray(array, jnp.float32) for array in (0.5 * key, bias, value)))


def logits_of(model: Model) -> np.ndarray:
    return np.asarray(model.apply(jnp.asarray(ROWS)))


def wide_tensors(hidden: int, inner: int) -> dict[str, np.ndarray]:
    """The tiny Llama's tensors in another size, which K-quants can store."""
    rng, tensors = np.random.default_rng(0), tiny_tensors()
    sizes = {64: hidden, 96: inner, 32: hidden // 2, len(TOKENS): len(TOKENS)}
    return {
        name: (rng.normal(size=[sizes[size] for size in array.shape]) * 0.1 + ("norm" in name)).astype(np.float32)
        for name, array in tensors.items()
    }


def write_llama(path: Path, kind: Quant | None = None, **keys: Any) -> Path:
    """A tiny Llama all of whose matrices are of a type; embeddings in eight bits, as quantisers leave them."""
    tensors = wide_tensors(64, 96)
    settings = tiny_keys()
    if kind is not None and block_width(kind) > 32:
        tensors = wide_tensors(256, 512)
        sizes = {"embedding_length": 256, "feed_forward_length": 512, "rope.dimension_count": 64}
        settings |= {f"llama.{name}": size for name, size in sizes.items()}
    quants = {}
    if kind is not None:
        quants = {name: kind for name, array in tensors.items() if array.ndim == 2}
        quants["token_embd.weight"] = Quant.Q8_0
        tensors = {
            name: encode(array, kind, name) if quants.get(name) == kind and array.ndim == 2 else array
            for name, array in tensors.items()
        }
        quants = {name: each for name, each in quants.items() if tensors[name].dtype in (np.uint8, np.float32)}
    return write_gguf(path, "llama", settings | keys, tensors, quants)


def tensors_in(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def keys_in(path: Path) -> dict[str, tuple[Any, Any]]:
    fields = gguf.GGUFReader(path).fields
    return {name: (field.contents(), field.types) for name, field in fields.items() if not name.startswith("GGUF.")}


def check_copy(source: Path, copy: Path, info: GGUFInfo, layers: tuple[int, ...] = (PATCHED,)) -> None:
    """Every byte of the source is where it belongs, and everything else is nothing but new neurons."""
    old, new = tensors_in(source), tensors_in(copy)
    widened, added = set(), new.keys() - old.keys()
    for name, tensor in old.items():
        assert new[name].tensor_type == tensor.tensor_type, name
        if tensor.shape.tolist() == new[name].shape.tolist():
            assert tensor.data.tobytes() == new[name].data.tobytes(), name
            continue
        widened.add(name)
        assert name.split(".")[2] in ("ffn_gate", "ffn_up", "ffn_down"), name
        rows, *columns = tensor.data.shape
        part = new[name].data[:rows, : columns[0]] if columns else new[name].data[:rows]
        assert part.tobytes() == tensor.data.tobytes(), name
        down = "ffn_down" in name
        behind = new[name].data[:, columns[0] :] if down else new[name].data[rows:]
        assert behind.size > 0
        weights = decode(np.ascontiguousarray(behind), tensor.tensor_type)
        patched = int(name.split(".")[1]) in layers
        # what an up projection adds is the constant one, by its bias, and so zero itself in a gated network
        assert weights.any() == (patched and ("ffn_up.weight" not in name or "blk.0.ffn_gate.weight" not in old)), name
        # of a silent neuron in a block with others the down projection need not be zero: nothing is multiplied with it
        assert down or not weights[NEURONS:].any(), f"{name}: silent neurons"
    assert (info.copied, info.widened, info.added) == (len(old) - len(widened), len(widened), len(added))
    before, after = keys_in(source), keys_in(copy)
    width = f"{before['general.architecture'][0]}.feed_forward_length"
    assert after.pop(width)[0] == info.ffn_width
    del before[width]
    assert list(after) == list(before)
    assert after == before
    assert (info.bytes, info.bytes_added) == (copy.stat().st_size, copy.stat().st_size - source.stat().st_size)


# --- a GGUF file with patches in it ---


@pytest.mark.parametrize("kind", COPIED, ids=lambda kind: kind and kind.name)
def test_no_byte_of_the_original_changes(kind, tmp_path):
    source = write_llama(tmp_path / "model.gguf", kind)
    before = source.read_bytes()
    model = load_model(source)
    merged = merge(model, {PATCHED: draw_patch(model.config.hidden_size)})
    info = export_gguf(merged, tmp_path / "out.gguf")
    width, block = model.config.ffn_width, 32 if kind is None else max(block_width(kind), 32)
    # of plain numbers the width is as llama.cpp's quantiser wants it: 96 is a multiple of 32
    assert info.ffn_width == width + block
    assert (info.neurons, info.silent_neurons) == (NEURONS, 2 * block - NEURONS)
    check_copy(source, tmp_path / "out.gguf", info)
    assert source.read_bytes() == before

    back = load_model(tmp_path / "out.gguf")
    assert (back.config.ffn_width, back.config.ffn_bias) == (info.ffn_width, True)
    if kind is None:
        error = relative(logits_of(back), logits_of(merged))
        assert relative(logits_of(model), logits_of(merged)) > 0.05
        assert error < 1e-6
        assert back.generate("the cat", 8) == merged.generate("the cat", 8)
        assert info.rounding == 0
    else:
        assert 0 < info.rounding < 0.15
    if kind in (Quant.Q8_0, Quant.Q4_K):
        assert relative(logits_of(back), logits_of(merged)) < 3 * info.rounding


def test_biases_are_there_where_patches_are_and_nowhere_else(tmp_path):
    source = write_llama(tmp_path / "model.gguf")
    patch = draw_patch(64)
    export_gguf(merge(load_model(source), {PATCHED: patch}), tmp_path / "out.gguf")
    tensors = tensors_in(tmp_path / "out.gguf")
    assert [name for name in tensors if name.endswith("bias")] == ["blk.1.ffn_gate.bias", "blk.1.ffn_up.bias"]
    gate, up = (np.asarray(tensors[f"blk.1.ffn_{name}.bias"].data) for name in ("gate", "up"))
    assert gate.dtype == up.dtype == np.float32
    np.testing.assert_array_equal(gate, [*np.zeros(96), *np.asarray(patch.bias), *np.zeros(32 - NEURONS)])
    np.testing.assert_array_equal(up, [*np.zeros(96), *np.ones(NEURONS), *np.zeros(32 - NEURONS)])


def test_what_was_corrected_is_corrected_again(tmp_path):
    """The file's biases keep their bytes, and a layer that had none gets some."""
    source = write_llama(tmp_path / "model.gguf", Quant.Q8_0)
    first = merge(load_model(source), {PATCHED: draw_patch(64)})
    export_gguf(first, tmp_path / "first.gguf")
    loaded = load_model(tmp_path / "first.gguf")
    patches = {0: draw_patch(64, seed=6), PATCHED: draw_patch(64, seed=7)}
    second = merge(loaded, patches)
    info = export_gguf(second, tmp_path / "second.gguf")
    assert (info.neurons, info.ffn_width, info.added) == (2 * NEURONS, 96 + 64, 2)
    check_copy(tmp_path / "first.gguf", tmp_path / "second.gguf", info, (0, PATCHED))
    back = load_model(tmp_path / "second.gguf")
    assert relative(logits_of(back), logits_of(second)) < 3 * info.rounding
    with pytest.raises(
        TPatchError, match=r"'blk\.0\.ffn_gate\.weight' in .* is \[96, 64\], and in the model \[128, 64\]"
    ):
        export_gguf(dataclasses.replace(second, name=str(source)), tmp_path / "third.gguf")


def test_attached_patches_are_merged_and_without_any_the_file_is_a_copy(tmp_path):
    source = write_llama(tmp_path / "model.gguf", Quant.Q4_0)
    model, patches = load_model(source), {PATCHED: draw_patch(64)}
    export_gguf(attach(model, patches), tmp_path / "attached.gguf")
    export_gguf(merge(model, patches), tmp_path / "merged.gguf")
    assert (tmp_path / "attached.gguf").read_bytes() == (tmp_path / "merged.gguf").read_bytes()
    with pytest.raises(TPatchError, match=r"activated by ReLU, and the network there by silu"):
        export_gguf(attach(model, patches, relu=True), tmp_path / "relu.gguf")
    info = export_gguf(model, tmp_path / "copy.gguf")
    assert (info.neurons, info.widened, info.added, info.bytes_added) == (0, 0, 0, 0)
    assert (tmp_path / "copy.gguf").read_bytes() == source.read_bytes()


class OtherWriter(gguf.GGUFWriter):
    """Writes what the package reads and does not write: another alignment, and a list without entries."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.add_custom_alignment(128)

    def write_header_to_file(self, path: Path | None = None) -> None:
        self.add_key_value("general.tags", [], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
        super().write_header_to_file(path)

    def _pack_val(self, val: Any, vtype: gguf.GGUFValueType, *arguments: Any, **options: Any) -> bytes:
        if val == [] and vtype is gguf.GGUFValueType.ARRAY:
            return self._pack("I", vtype) + self._pack("I", gguf.GGUFValueType.STRING) + self._pack("Q", 0)
        return super()._pack_val(val, vtype, *arguments, **options)


def test_keys_alignment_and_lists_without_entries(tmp_path):
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(gguf, "GGUFWriter", OtherWriter)
        source = write_llama(tmp_path / "model.gguf", Quant.Q5_0, **{"general.file_type": 8, "x.flag": True})
    assert gguf.GGUFReader(source).fields["general.tags"].contents() == []
    info = export_gguf(merge(load_model(source), {PATCHED: draw_patch(64)}), tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.alignment == 128
    assert {tensor.data_offset % 128 for tensor in reader.tensors} == {0}
    before, after = keys_in(source), keys_in(tmp_path / "out.gguf")
    assert before.keys() - after.keys() == {"general.tags"}
    assert after["x.flag"] == (True, [gguf.GGUFValueType.BOOL])
    assert after["tokenizer.chat_template"][0] == TEMPLATE
    changed = {name for name in after if before[name] != after[name]}
    assert changed == {"llama.feed_forward_length"}
    assert after["llama.feed_forward_length"] == (info.ffn_width, [gguf.GGUFValueType.UINT32])


@pytest.mark.parametrize("kind", [None, Quant.Q8_0], ids=["F32", "Q8_0"])
def test_gpt2(kind, tmp_path):
    quants = {f"blk.{i}.{name}.weight": kind for i in range(2) for name in GPT2_NAMES.values() if name[:3] == "ffn"}
    quants = {name: kind for name in quants if kind and "norm" not in name}
    source = write_gpt2(tmp_path / "model.gguf", quants=quants)
    model = load_model(source)
    merged = merge(model, {PATCHED: draw_patch(32)})
    info = export_gguf(merged, tmp_path / "out.gguf")
    assert (info.architecture, info.ffn_width, info.added) == ("gpt2", 160, 0)
    check_copy(source, tmp_path / "out.gguf", info)
    back = load_model(tmp_path / "out.gguf")
    assert relative(logits_of(back), logits_of(merged)) < (1e-6 if kind is None else 3 * info.rounding)


# --- types ---


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "q4_0"])
def test_all_matrices_in_one_type(type, tmp_path):
    source = write_llama(tmp_path / "model.gguf", Quant.Q8_0)
    model = load_model(source)
    merged = merge(model, {PATCHED: draw_patch(64)})
    info = export_gguf(merged, tmp_path / "out.gguf", type=type)
    old, new = tensors_in(source), tensors_in(tmp_path / "out.gguf")
    for name, tensor in new.items():
        embedding = name == "token_embd.weight" and type[0] == "q"
        wanted = "F32" if len(tensor.shape) == 1 else "Q8_0" if embedding else type.upper()
        assert tensor.tensor_type.name == wanted, name
        if name in old and tensor.tensor_type == old[name].tensor_type and "ffn" not in name:
            assert tensor.data.tobytes() == old[name].data.tobytes(), name
    assert info.converted == sum(old[name].tensor_type != new[name].tensor_type for name in old)
    names = {"f32": "ALL_F32"}
    wanted = gguf.LlamaFileType[names.get(type, f"MOSTLY_{type.upper()}")]
    assert keys_in(tmp_path / "out.gguf").get("general.file_type", (wanted,))[0] == wanted
    back = load_model(tmp_path / "out.gguf")
    assert relative(logits_of(back), logits_of(merged)) < (1e-6 if type == "f32" else max(10 * info.rounding, 2e-2))
    assert info.rounding < 0.12


def test_a_row_that_blocks_do_not_fill_is_in_sixteen_bits(tmp_path):
    tensors = wide_tensors(48, 96)
    keys = tiny_keys() | {"llama.embedding_length": 48, "llama.rope.dimension_count": 12, "general.file_type": 0}
    source = write_gguf(tmp_path / "model.gguf", "llama", keys, tensors)
    export_gguf(merge(load_model(source), {0: draw_patch(48)}), tmp_path / "out.gguf", type="q4_0")
    new = tensors_in(tmp_path / "out.gguf")
    assert new["blk.0.ffn_gate.weight"].tensor_type == Quant.F16
    assert new["blk.0.ffn_down.weight"].tensor_type == Quant.Q4_0
    assert keys_in(tmp_path / "out.gguf")["general.file_type"][0] == gguf.LlamaFileType.MOSTLY_Q4_0


@pytest.mark.parametrize("kind", [Quant.F32, Quant.F16, Quant.BF16, *SMALL, *K_QUANTS], ids=lambda kind: kind.name)
def test_blocks_hold_what_they_can(kind):
    """The packers of this library against the reader of the gguf package, blocks of every kind of content."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(24, 512)) * 10.0 ** rng.integers(-3, 3, (24, 1))).astype(np.float32)
    rows[0], rows[1, :256], rows[2] = 0, 0, np.abs(rows[2])
    rows[3], rows[4, 5] = -np.abs(rows[3]), 9
    stored = decode(encode(rows, kind, "rows"), kind)
    assert not stored[0].any()
    assert not stored[1, :256].any()
    bits = 8 * gguf.GGML_QUANT_SIZES[kind][1] / block_width(kind)
    allowed = {32: 0, 16: 2.5e-3, 8.5: 0.012, 6.5625: 0.03}.get(bits, 0.4 if bits < 4 else 0.13 if bits <= 5 else 0.06)
    for row, back in zip(rows[1:], stored[1:], strict=True):
        assert relative(back, row) <= allowed


@pytest.mark.parametrize("kind", [Quant.IQ2_XXS, Quant.IQ3_S, Quant.IQ1_M])
def test_a_type_that_nothing_writes_is_named_with_what_to_do(kind, tmp_path):
    source = write_llama(tmp_path / "model.gguf", Quant.Q4_K)
    tensors = tensors_in(source)
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    # blocks of zeros
    ffn = {
        name: np.zeros((one.shape[1], one.shape[0] // size * stored), np.uint8)
        for name, one in tensors.items()
        if "ffn_" in name and "norm" not in name
    }
    rest = {name: np.array(one.data) for name, one in tensors.items() if name not in ffn}
    quants = dict.fromkeys(ffn, kind) | {name: tensors[name].tensor_type for name in rest}
    sizes = {"embedding_length": 256, "feed_forward_length": 512, "rope.dimension_count": 64}
    keys = tiny_keys() | {f"llama.{name}": size for name, size in sizes.items()}
    source = write_gguf(tmp_path / "coarse.gguf", "llama", keys, rest | ffn, quants)
    merged = merge(load_model(source), {PATCHED: draw_patch(256)})
    with pytest.raises(TPatchError, match=rf"'blk\.1\.ffn_\w+\.weight' is stored as {kind.name}, .*--type q8_0"):
        export_gguf(merged, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*"))
    info = export_gguf(merged, tmp_path / "out.gguf", type="q8_0")
    assert info.rounding < 0.01


def test_a_type_too_coarse_or_too_small_for_patches(tmp_path):
    tensors = wide_tensors(256, 512)
    quants = {name: Quant.TQ2_0 for name in tensors if "ffn_" in name and "norm" not in name}
    sizes = {"embedding_length": 256, "feed_forward_length": 512, "rope.dimension_count": 64}
    keys = tiny_keys() | {f"llama.{name}": size for name, size in sizes.items()}
    source = write_gguf(tmp_path / "ternary.gguf", "llama", keys, tensors, quants)
    merged = merge(load_model(source), {PATCHED: draw_patch(256)})
    with pytest.raises(TPatchError, match=r"stored as TQ2_0, too coarse for patches .*--type q8_0"):
        export_gguf(merged, tmp_path / "out.gguf")
    patch = draw_patch(64)
    source = write_llama(tmp_path / "half.gguf", Quant.F16)
    large = merge(load_model(source), {PATCHED: patch._replace(key=patch.key * 1e5)})
    with pytest.raises(TPatchError, match=r"'blk\.1\.ffn_gate\.weight' holds weights as large as .* too large for F16"):
        export_gguf(large, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*"))
    export_gguf(large, tmp_path / "out.gguf", type="bf16")


# --- what may be given ---


@pytest.fixture(scope="module")
def merged(tmp_path_factory, cached) -> Model:
    source = write_llama(tmp_path_factory.mktemp("source") / "model.gguf", Quant.Q8_0)
    return merge(load_model(source), {PATCHED: draw_patch(64)})


def test_names_that_cannot_be_written_to(merged, tmp_path):
    source = Path(merged.name)
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "nothing")
    for path, words in {
        source: "is the model itself, which stays as it is",
        tmp_path / "link.gguf": "is the model itself, which stays as it is",
        tmp_path / "there.gguf": r"there\.gguf already exists; choose another output file",
        tmp_path / "folder.gguf": "already exists",
        tmp_path / "dangling.gguf": "already exists",
        tmp_path / "out.bin": r"out\.bin is no name of a GGUF file; write to NAME\.gguf",
        tmp_path / "there.gguf" / "out.gguf": "is no folder; choose another output file",
    }.items():
        with pytest.raises(TPatchError, match=words):
            export_gguf(merged, path)
    for type in ("q4_k", "int8", ""):
        with pytest.raises(
            TPatchError, match=rf"in the type '{type}'; choose keep or one of f32, f16, .*llama-quantize"
        ):
            export_gguf(merged, tmp_path / "out.gguf", type=type)
    with pytest.raises(TPatchError, match="load it first"):
        export_gguf(str(source), tmp_path / "out.gguf")  # type: ignore[arg-type]
    with pytest.raises(TPatchError, match="8 is not the name of a type"):
        export_gguf(merged, tmp_path / "out.gguf", type=8)  # type: ignore[arg-type]
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert not (tmp_path / "out.gguf").exists()


def test_folders_above_are_made(merged, tmp_path):
    calls = []
    export_gguf(merged, tmp_path / "a" / "b" / "out.gguf", progress=lambda *call: calls.append(call))
    count = len(tensors_in(tmp_path / "a" / "b" / "out.gguf"))
    assert calls == [("writing", done, count) for done in range(1, count + 1)]


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -1000])
def test_a_source_that_was_cut_since(keep, tmp_path):
    source = write_llama(tmp_path / "model.gguf")
    model = merge(load_model(source), {PATCHED: draw_patch(64)})
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(TPatchError, match=r"model\.gguf: not a readable GGUF file"):
        export_gguf(model, tmp_path / "out.gguf")
    source.unlink()
    with pytest.raises(TPatchError, match=r"model\.gguf, which the model was read from, is not there any more"):
        export_gguf(model, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_source_of_another_architecture_or_with_other_weights(merged, tmp_path):
    other = write_gguf(tmp_path / "mamba.gguf", "mamba", tiny_keys("mamba"), tiny_tensors())
    with pytest.raises(TPatchError, match="architecture 'mamba' is not supported; supported: llama, gpt2"):
        export_gguf(dataclasses.replace(merged, name=str(other)), tmp_path / "out.gguf")
    layers = {**merged.params["layers"]}
    layers[0] = {**layers[0], "norm_1": {"scale": layers[0]["norm_1"]["scale"] * 2}}
    changed = merged.with_params({**merged.params, "layers": layers})
    with pytest.raises(TPatchError, match=r"'blk\.0\.attn_norm\.weight' in .* holds other weights than the model"):
        export_gguf(changed, tmp_path / "out.gguf")
    gate = layers[1]["ffn"]["gate"]
    layers[1] = {**layers[1], "ffn": {**layers[1]["ffn"], "gate": {**gate, "kernel": gate["kernel"].at[3, 5].add(1)}}}
    layers[0] = merged.params["layers"][0]
    changed = merged.with_params({**merged.params, "layers": layers})
    with pytest.raises(TPatchError, match=r"'blk\.1\.ffn_gate\.weight' in .* holds other weights"):
        export_gguf(changed, tmp_path / "out.gguf")
    shorter = {name: array for name, array in tiny_tensors().items() if "blk.1" not in name}
    other = write_gguf(tmp_path / "shorter.gguf", "llama", tiny_keys() | {"llama.block_count": 1}, shorter)
    with pytest.raises(TPatchError, match=r"shorter\.gguf does not hold 'blk\.1\.attn_k\.weight', which the model has"):
        export_gguf(dataclasses.replace(merged, name=str(other)), tmp_path / "out.gguf")
    more = {**wide_tensors(64, 96), "blk.2.attn_norm.weight": np.ones(64, np.float32)}
    other = write_gguf(tmp_path / "more.gguf", "llama", tiny_keys(), more)
    with pytest.raises(
        TPatchError, match=r"more\.gguf holds 'blk\.2\.attn_norm\.weight', which the model does not have"
    ):
        export_gguf(dataclasses.replace(merged, name=str(other)), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*"))


def test_a_file_in_the_other_byte_order(merged, tmp_path):
    source = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(source, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TPatchError, match=r"big\.gguf: its numbers are in the other byte order"):
        export_gguf(dataclasses.replace(merged, name=str(source)), tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        # what NumPy raises
        (OSError("4352 requested and 1248 written"), r"not all of it fits there \(4352 requested and 1248 written\)"),
    ],
)
def test_a_full_disk_leaves_nothing(merged, tmp_path, monkeypatch, error, why):
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(TPatchError, match=rf"cannot write .*out\.gguf: {why}; free some room"):
        export_gguf(merged, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_in_bfloat16(tmp_path):
    """The patches are for the rounded weights; the file keeps the others."""
    source = write_llama(tmp_path / "model.gguf", Quant.Q8_0)
    model = load_model(source, dtype="bfloat16")
    info = export_gguf(merge(model, {PATCHED: draw_patch(64)}), tmp_path / "out.gguf")
    check_copy(source, tmp_path / "out.gguf", info)


# --- biases that are read ---


def test_biases_of_some_layers_are_read_and_the_others_are_zero(tmp_path):
    rng, tensors = np.random.default_rng(1), tiny_tensors()
    draw = lambda size: rng.normal(size=size).astype(np.float32)  # noqa: E731
    extra = {"blk.1.ffn_up.bias": draw(96), "blk.0.ffn_down.bias": draw(64), "blk.1.attn_v.bias": draw(32)}
    source = write_gguf(tmp_path / "model.gguf", "llama", tiny_keys(), tensors | extra)
    layers = load_model(source).params["layers"]
    np.testing.assert_array_equal(layers[1]["ffn"]["up"]["bias"], extra["blk.1.ffn_up.bias"])
    np.testing.assert_array_equal(layers[0]["ffn"]["down"]["bias"], extra["blk.0.ffn_down.bias"])
    np.testing.assert_array_equal(layers[1]["attention"]["value"]["bias"], extra["blk.1.attn_v.bias"])
    for network, name in ((layers[0]["ffn"], "up"), (layers[1]["ffn"], "gate"), (layers[1]["attention"], "output")):
        assert not np.asarray(network[name]["bias"]).any()
    wrong = extra | {"blk.1.ffn_up.bias": draw(95)}
    source = write_gguf(tmp_path / "wrong.gguf", "llama", tiny_keys(), tensors | wrong)
    with pytest.raises(
        TPatchError, match=r"wrong\.gguf: tensor 'blk\.1\.ffn_up\.bias' has the shape \[95\], .* imply \[96\]"
    ):
        load_model(source)


# --- a folder as GGUF ---

FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases everywhere": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "qwen2": ("qwen2", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def check_llama_cpp(path: Path, model: Model, allowed: float = 0.03) -> None:
    """Where llama.cpp is installed, the most probable next tokens and their probabilities are ours."""
    if importlib.util.find_spec("xllamacpp") is None:
        return
    running, rows = LlamaCpp(path, 64), np.random.default_rng(1).integers(3, 255, (4, 6))
    ours, compared = np.asarray(jax.nn.log_softmax(model.apply(jnp.asarray(rows))[:, -1])), 0
    for row, logits in zip(rows.tolist(), ours, strict=True):
        for token, theirs in running.log_probabilities(row, 5).items():
            assert abs(logits[token] - theirs) < allowed
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_becomes_a_whole_file(name, tmp_path):
    family, changes = FOLDERS[name]
    model = tiny_model(family, **changes)
    merged = merge(model, patch_for((0, 2)))
    info = export_gguf(merged, tmp_path / "out.gguf")
    assert (info.neurons, info.silent_neurons, info.ffn_width, info.rounding) == (6, 90, 64, 0)
    assert info.architecture == ("gpt2" if family == "gpt2" else "llama")
    back = load_model(tmp_path / "out.gguf")
    np.testing.assert_allclose(logits_of(back), logits_of(merged), rtol=0, atol=1e-4)
    for text in ("the cat in the hat", "  two  spaces\n", "é"):
        assert back.encode(text) == model.encode(text)
    assert back.tokenizer.eos_token_id == model.tokenizer.eos_token_id
    check_llama_cpp(tmp_path / "out.gguf", merged)


def test_each_of_several_chat_templates_has_its_key(tmp_path):
    model = tiny_model("llama")
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = {"tool use": "tools {{ messages }}", "default": TEMPLATE}
    export_gguf(merge(dataclasses.replace(model, tokenizer=tokenizer), patch_for((0,))), tmp_path / "out.gguf")
    keys = {name: value for name, (value, _) in keys_in(tmp_path / "out.gguf").items() if "chat_template" in name}
    assert keys == {
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools {{ messages }}",
    }
    back = load_model(tmp_path / "out.gguf").tokenizer
    assert back.chat_template == {"default": TEMPLATE, "tool_use": "tools {{ messages }}"}
    messages = [{"role": "user", "content": "the"}]
    assert back.apply_chat_template(messages, tokenize=False) == "<|im_start|>the<|im_end|>"


def test_llama_3_s_rotation(tmp_path):
    rules = {**LLAMA_3, "original_max_position_embeddings": 32}
    merged = merge(tiny_model("llama", rope_parameters=rules), patch_for((1,)))
    export_gguf(merged, tmp_path / "out.gguf")
    check_llama_cpp(tmp_path / "out.gguf", merged)
    # with wider heads the factors tell the rule
    rules = {**LLAMA_3, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    model = make_tiny_model(head_dim=32, rope_parameters=rules)
    export_gguf(merge(model, patch_for((1,))), tmp_path / "wide.gguf")
    back = load_model(tmp_path / "wide.gguf")
    np.testing.assert_allclose(back.config.rope_frequencies, model.config.rope_frequencies, rtol=1e-5)


@pytest.mark.parametrize("kind", [Quant.Q4_K, Quant.Q6_K, Quant.Q4_1], ids=lambda kind: kind.name)
def test_llama_cpp_reads_blocks_as_we_do(kind, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is only needed to run files: the 'gguf' extra")
    source = write_llama(tmp_path / "model.gguf", kind)
    model = load_model(source)
    export_gguf(merge(model, {PATCHED: draw_patch(model.config.hidden_size)}), tmp_path / "out.gguf")
    # llama.cpp rounds what is multiplied with such blocks to eight bits
    check_llama_cpp(tmp_path / "out.gguf", load_model(tmp_path / "out.gguf"), 0.3)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3": ("qwen3", {}, "it is no Llama, because it normalises queries and keys"),
    "gemma": ("gemma", {}, "it is no Llama, because .* its embeddings are scaled"),
    "gpt_neox": ("gpt_neox", {}, "it is no Llama and no GPT-2"),
    "opt": ("opt", {}, "it is no Llama and no GPT-2"),
    "bert": ("bert", {}, "it is no Llama and no GPT-2"),
    "t5": ("t5", {}, "it is an encoder-decoder"),
    "window": ("mistral", {"sliding_window": 8}, "sees only 8 of 64 tokens"),
    "activation": ("llama", {"hidden_act": "gelu"}, "the format has no keys for its activation"),
    "exact gelu": ("gpt2", {"activation_function": "gelu"}, "the format has no keys for its activation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused_with_what_to_do(name, tmp_path):
    family, changes, words = REFUSED[name]
    merged = merge(tiny_model(family, **changes), patch_for((2,)))
    with pytest.raises(TPatchError, match=rf"'tiny' cannot be written as GGUF: .*{words}.*--format transformers"):
        export_gguf(merged, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["normalizer", "split", "slow"])
def test_tokenizers_that_are_not_written(kind, tmp_path):
    model = merge(make_tiny_model(), patch_for((2,)))
    backend: Any = model.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if kind == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    elif kind == "split":
        backend.pre_tokenizer = type(backend.pre_tokenizer)(add_prefix_space=True)
    else:
        model = dataclasses.replace(model, tokenizer=object())
    with pytest.raises(TPatchError, match=r"the tokenizer of 'tiny' is no byte-level BPE .*convert_hf_to_gguf\.py"):
        export_gguf(model, tmp_path / "out.gguf")


# --- the command ---


@pytest.fixture
def edited(tmp_path, monkeypatch) -> tuple[str, str]:
    """A GGUF file and patches for it, as ``tpatch edit`` leaves them."""
    monkeypatch.setattr("tpatch_jax.storage.process.prepare_process", lambda: None)
    source = write_llama(tmp_path / "model.gguf", Quant.Q8_0)
    info = EditInfo((RequestInfo("said", True, "edited", neurons={PATCHED: tuple(range(NEURONS))}),), 0, 0, 0, 0, 0)
    requests = [EditRequest("the", "cat")]
    store.save_patches(tmp_path / "patches", load_model(source), {PATCHED: draw_patch(64)}, requests, info)
    return str(source), str(tmp_path / "patches")


def test_the_command(edited, tmp_path, capsys):
    source, patches = edited
    out = str(tmp_path / "corrected.gguf")
    assert cli.main(["export", source, patches, "--format", "gguf", "-o", out, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    told = json.loads(captured.out.splitlines()[-1])
    assert (told["output"], told["architecture"], told["type"], told["neurons"]) == (out, "llama", "keep", NEURONS)
    assert same(load_model(out).params["embed"], load_model(source).params["embed"])

    half = str(tmp_path / "half.gguf")
    assert cli.main(["export", source, patches, "--format", "gguf", "--type", "f16", "-o", half]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("3 neurons in", "for llama.cpp: llama, matrices in f16", "all layers are 128 wide", "are rounded by"):
        assert words in shown
    assert cli.main(["generate", half, "--prompt", "the cat", "--max-new-tokens", "2", "--json"]) == 0
    capsys.readouterr()

    for arguments, words in {
        ("-o", out, "--format", "gguf"): "corrected.gguf already exists",
        ("-o", source, "--format", "gguf"): "is the model itself",
        ("-o", str(tmp_path / "folder"), "--format", "gguf"): "write to NAME.gguf",
        ("-o", str(tmp_path / "new.gguf")): "give --format gguf, too",
        ("-o", str(tmp_path / "folder"), "--type", "f16"): "--type is for --format gguf",
        ("-o", str(tmp_path / "new.gguf"), "--format", "gguf", "--approximate"): "are for --format transformers",
    }.items():
        assert cli.main(["export", source, patches, *arguments]) == 1
        error = capsys.readouterr().err
        assert words in " ".join(error.split())
    assert not (tmp_path / "new.gguf").exists()
