"""GGUF to Hugging Face: tensors, configuration and tokenizer, on tiny models written here."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer

from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.checkpoints.gguf import convert_gguf
from tpatch_jax.models.checkpoints.gguf_metadata import Metadata
from tpatch_jax.models.checkpoints.gguf_tokenizer import _byte_level

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, LAYERS = 64, 4, 2, 16, 96, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tiny_tensors(*, tied: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    if not tied:
        shapes["output"] = (len(TOKENS), HIDDEN)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,),
            f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HEADS * HEAD, HIDDEN),
            f"blk.{i}.attn_k": (KV_HEADS * HEAD, HIDDEN),
            f"blk.{i}.attn_v": (KV_HEADS * HEAD, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HEADS * HEAD),
            f"blk.{i}.ffn_gate": (INNER, HIDDEN),
            f"blk.{i}.ffn_up": (INNER, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, INNER),
        }
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray], quants: dict[str, Quant] | None = None
) -> Path:
    """Metadata (None leaves a key out) and tensors; a tensor of bytes is taken as quantised already."""
    writer = gguf.GGUFWriter(path, arch)
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in keys.items():
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, weight in tensors.items():
        quant = (quants or {}).get(name)
        if quant is None:
            writer.add_tensor(name, weight)
        else:
            weight = weight if weight.dtype == np.uint8 else gguf.quantize(weight, quant)
            writer.add_tensor(name, weight, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_keys(arch: str = "llama") -> dict[str, Any]:
    """What llama.cpp's converter writes for a SmolLM2 of this size."""
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.rope.dimension_count": HEAD,
        f"{arch}.rope.freq_base": 100000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_tiny_gguf(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    arch: str = "llama",
    quants: dict[str, Quant] | None = None,
    keys: dict[str, Any] | None = None,
) -> Path:
    return write_gguf(path, arch, tiny_keys(arch) | (keys or {}), tensors or tiny_tensors(), quants)


def converted(folder: Path, source: Path) -> Path:
    target = folder / "converted"
    target.mkdir()
    convert_gguf(source, target)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tiny")
    return converted(base, write_tiny_gguf(base / "tiny.gguf"))


def test_config_is_what_transformers_reads(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (config.max_position_embeddings, config.vocab_size) == (128, len(TOKENS))
    assert config.tie_word_embeddings
    assert config.hidden_act == "silu"


def test_tensors_keep_their_values_and_get_their_names(folder: Path) -> None:
    weights, tensors = load_file(folder / "model.safetensors"), tiny_tensors()
    assert len(weights) == len(tensors)
    assert all(weight.dtype == np.float32 for weight in weights.values())
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(weights["model.layers.1.mlp.down_proj.weight"], tensors["blk.1.ffn_down.weight"])
    np.testing.assert_array_equal(weights["model.layers.0.self_attn.v_proj.weight"], tensors["blk.0.attn_v.weight"])
    assert "lm_head.weight" not in weights


def test_an_untied_head_is_written(tmp_path: Path) -> None:
    tensors = tiny_tensors(tied=False)
    target = converted(tmp_path, write_tiny_gguf(tmp_path / "untied.gguf", tensors))
    weights = load_file(target / "model.safetensors")
    np.testing.assert_array_equal(weights["lm_head.weight"], tensors["output.weight"])
    assert not AutoConfig.from_pretrained(target).tie_word_embeddings


def test_attention_scores_agree_between_the_two_layouts_of_rotary_positions(folder: Path) -> None:
    weights, tensors = load_file(folder / "model.safetensors"), tiny_tensors()
    x = np.random.default_rng(1).normal(size=(5, HIDDEN))
    turns = np.exp(1j * np.arange(5)[:, None, None] * 100000.0 ** (-np.arange(HEAD // 2) / (HEAD // 2)))

    def interleaved(weight: np.ndarray) -> np.ndarray:
        pairs = (x @ weight.T.astype(float)).reshape(5, -1, HEAD // 2, 2)
        return (pairs[..., 0] + 1j * pairs[..., 1]) * turns

    def half_split(weight: np.ndarray) -> np.ndarray:
        heads = (x @ weight.T.astype(float)).reshape(5, -1, HEAD)
        return (heads[..., : HEAD // 2] + 1j * heads[..., HEAD // 2 :]) * turns

    def scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.einsum("thd,shd->hts", q, np.repeat(k.conj(), HEADS // KV_HEADS, axis=1)).real

    for i in range(LAYERS):
        attention = f"model.layers.{i}.self_attn"
        q, k = tensors[f"blk.{i}.attn_q.weight"], tensors[f"blk.{i}.attn_k.weight"]
        ours = scores(
            half_split(weights[f"{attention}.q_proj.weight"]), half_split(weights[f"{attention}.k_proj.weight"])
        )
        np.testing.assert_allclose(ours, scores(interleaved(q), interleaved(k)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("quant", "error"), [(Quant.Q8_0, 0.02), (Quant.Q4_1, 0.25), (Quant.F16, 0.002)])
def test_quantised_tensors_come_back_near_their_values(tmp_path: Path, quant: Quant, error: float) -> None:
    tensors = tiny_tensors()
    names = {"token_embd.weight": quant, "blk.0.ffn_down.weight": quant}
    target = converted(tmp_path, write_tiny_gguf(tmp_path / "small.gguf", tensors, quants=names))
    weights = load_file(target / "model.safetensors")
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        assert weights[ours].dtype == np.float32
        assert 0 < np.abs(weights[ours] - tensors[theirs]).max() < error


@pytest.mark.parametrize("text", ["the cat", "In 1212:  naïve 日本語 🎉\n\tx", " the the", "<|im_start|>hi<|im_end|>"])
def test_tokenizer_round_trips(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_splits_digits_and_keeps_special_tokens_whole(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("12 the") == ["1", "2", "Ġthe"]
    encoding = tokenizer("<|im_start|>the 🎉<|im_end|>", return_offsets_mapping=True)
    assert (encoding.input_ids[0], encoding.input_ids[-1]) == (1, 2)
    assert tokenizer.decode(encoding.input_ids, skip_special_tokens=True) == "the 🎉"
    text = "a the cat"
    encoding = tokenizer(text, return_offsets_mapping=True)
    assert [text[start:end] for start, end in encoding.offset_mapping][:2] == ["a", "the"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|im_start|>the<|im_end|>"


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "llama-v3"])
def test_other_pre_tokenizers_may_merge_digits(tmp_path: Path, pre: str) -> None:
    target = converted(tmp_path, write_tiny_gguf(tmp_path / "tiny.gguf", keys={"tokenizer.ggml.pre": pre}))
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("12 the") == ["12", "Ġthe"]
    assert tokenizer("the").input_ids[0] != 1


def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_bos_token": True}
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path, write_tiny_gguf(tmp_path / "t.gguf", keys=keys)))
    encoding = tokenizer("a the", return_offsets_mapping=True)
    assert tokenizer.convert_ids_to_tokens(encoding.input_ids) == ["<|im_start|>", "a", "Ġthe"]
    assert encoding.offset_mapping[-1] == (2, 5)
    keys |= {"tokenizer.ggml.add_eos_token": True}
    (tmp_path / "both").mkdir()
    target = converted(tmp_path / "both", write_tiny_gguf(tmp_path / "b.gguf", keys=keys))
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids) == ["<|im_start|>", "a", "<|im_end|>"]
    assert tokenizer.encode("a", add_special_tokens=False) == [TOKENS.index("a")]


def test_progress_counts_tensors(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    target = tmp_path / "out"
    target.mkdir()
    convert_gguf(write_tiny_gguf(tmp_path / "t.gguf"), target, progress=lambda *call: calls.append(call))
    count = len(tiny_tensors())
    assert calls == [("converting", done, count) for done in range(1, count + 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; supported: llama, gpt2"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm' is not supported; supported: default"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer 't5' is not supported; supported: gpt2 \(byte-level BPE\), llama"),
        ({"tokenizer.ggml.model": "llama"}, "no metadata 'tokenizer.ggml.scores'"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "the tokenizer is damaged .* 1 scores"),
        ({"tokenizer.ggml.token_type": [1]}, "the tokenizer is damaged .* 1 types"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "no 'tokenizer.ggml.bos_token"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama.rope.dimension_count": HEAD // 2}, "rotary positions on part of a head"),
        ({"llama.attention.head_count": [HEADS, HEADS]}, r"head_count' is \[4, 4\]; only models whose layers are all"),
        ({"llama.block_count": None}, "no metadata 'llama.block_count'; export the model to GGUF again"),
        ({"llama.attention.head_count": 0}, r"'llama\.attention\.head_count' is 0; the file is damaged"),
        ({"llama.block_count": 0}, r"'llama\.block_count' is 0; the file is damaged"),
        (
            {"llama.attention.head_count_kv": 3},
            r"'blk\.0\.attn_k\.weight' has the shape \[32, 64\], and the file's metadata imply \[48, 64\]",
        ),
        (
            {"llama.feed_forward_length": 90},
            r"'blk\.0\.ffn_gate\.weight' has the shape \[96, 64\], .* imply \[90, 64\]",
        ),
        ({"split.count": 3}, "one of 3 parts of a model; join them"),
    ],
)
def test_unsupported_files_say_what_is_supported(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arch = change.pop("general.architecture", "llama")
    with pytest.raises(TPatchError, match=message):
        converted(tmp_path, write_tiny_gguf(tmp_path / "other.gguf", arch=arch, keys=change))


def test_tensors_of_another_type_or_name_are_named(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    odd = tensors | {"output_norm.weight": np.ones(HIDDEN, np.int32)}
    with pytest.raises(TPatchError, match=r"'output_norm\.weight' has the unsupported type I32; use a file in F32"):
        converted(tmp_path, write_tiny_gguf(tmp_path / "odd.gguf", odd))
    extra = tensors | {"blk.0.attn_q_norm.weight": np.ones(HIDDEN, np.float32)}
    (tmp_path / "extra").mkdir()
    with pytest.raises(TPatchError, match=r"llama model with blk\.0\.attn_q_norm\.weight is not supported"):
        converted(tmp_path / "extra", write_tiny_gguf(tmp_path / "extra.gguf", extra))
    blocks = {"output_norm.weight": np.zeros((HIDDEN // 32, 40), np.uint8)}
    quantised = write_tiny_gguf(tmp_path / "q8_1.gguf", tensors | blocks, quants={"output_norm.weight": Quant.Q8_1})
    (tmp_path / "q8_1").mkdir()
    with pytest.raises(TPatchError, match=r"unsupported type Q8_1; use a file in F32, F16, BF16, Q4_0 to Q8_0"):
        converted(tmp_path / "q8_1", quantised)
    del tensors["blk.1.ffn_up.weight"]
    (tmp_path / "less").mkdir()
    with pytest.raises(TPatchError, match=r"blk\.1\.ffn_up\.weight are missing"):
        converted(tmp_path / "less", write_tiny_gguf(tmp_path / "less.gguf", tensors))


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blk.0.ffn_gate.weight", (INNER + 1, HIDDEN), "[96, 64]"),
        ("blk.1.ffn_down.weight", (HIDDEN, INNER - 1), "[64, 96]"),
        ("blk.1.attn_q.weight", (60, HIDDEN), "[64, 64]"),
        ("blk.0.attn_k.weight", (HIDDEN, HIDDEN), "[32, 64]"),
        ("blk.0.attn_output.weight", (HIDDEN, 32), "[64, 64]"),
        ("blk.0.attn_norm.weight", (HIDDEN - 1,), "[64]"),
        ("blk.0.ffn_up.weight", (2, INNER, HIDDEN), "[96, 64]"),
        ("blk.0.ffn_up.bias", (INNER, HIDDEN), "[96]"),
        ("output_norm.weight", (HIDDEN, 2), "[64]"),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str, shape: tuple[int, ...], wanted: str) -> None:
    tensors = tiny_tensors() | {name: np.ones(shape, np.float32)}
    message = f"odd.gguf: tensor '{name}' has the shape {list(shape)}, and the file's metadata imply {wanted};"
    with pytest.raises(TPatchError, match=re.escape(message)):
        converted(tmp_path, write_tiny_gguf(tmp_path / "odd.gguf", tensors))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"GG", "it is cut short or damaged"),
        (b"\x89PNG\r\n" + bytes(300), "it does not begin as one"),
        (b"GGUF\x01\x00\x00\x00" + bytes(300), "its version is 1; 2 and 3 are read"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 300, "it is cut short or damaged"),
    ],
)
def test_what_is_no_gguf_file_says_why(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "odd.gguf").write_bytes(content)
    with pytest.raises(TPatchError, match=rf"odd\.gguf: not a readable GGUF file \({why}\); download or export it"):
        converted(tmp_path, tmp_path / "odd.gguf")


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -1000])
def test_a_cut_file_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    whole = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:keep])
    why = "it is cut short or damaged" if keep else "it is empty"
    with pytest.raises(TPatchError, match=rf"cut\.gguf: not a readable GGUF file \({why}\)"):
        converted(tmp_path, cut)


def test_merges_outside_the_vocabulary_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_gguf.MERGES", [*MERGES, "zz qq"])
    with pytest.raises(TPatchError, match="the tokenizer is damaged"):
        converted(tmp_path, write_tiny_gguf(tmp_path / "merges.gguf"))


def test_a_missing_gguf_package_is_an_error_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(TPatchError, match=r'pip install "tpatch-jax\[demo\]"'):
        convert_gguf(tmp_path / "any.gguf", tmp_path)


def test_written_json_is_plain(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_a_type_that_the_gguf_package_does_not_know_is_not_taken_for_damage(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "new.gguf", {"output_norm.weight": np.ones(77, np.float32)})
    content = source.read_bytes()
    # name, dimensions, then the type
    start = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    source.write_bytes(content[:start] + (4711).to_bytes(4, "little") + content[start + 4 :])
    with pytest.raises(TPatchError, match="type 4711, which the installed gguf package does not know; update"):
        converted(tmp_path, source)


def test_ids_outside_the_vocabulary_are_none(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.padding_token_id": 2**32 - 1}
    target = converted(tmp_path, write_tiny_gguf(tmp_path / "none.gguf", keys=keys))
    assert AutoTokenizer.from_pretrained(target).pad_token is None
    assert "pad_token_id" not in json.loads((target / "generation_config.json").read_text())


@pytest.mark.parametrize(("quant", "size"), [(Quant.IQ4_NL, 18), (Quant.Q6_K, 210)])
def test_types_that_only_llama_cpp_writes_are_read(tmp_path: Path, quant: Quant, size: int) -> None:
    rows = HIDDEN // 32 if quant == Quant.IQ4_NL else 1
    shape = (len(TOKENS), rows * size)
    blocks = np.random.default_rng(3).integers(0, 64, shape, dtype=np.uint8)
    tensors = tiny_tensors() | {"token_embd.weight": blocks}
    source = write_tiny_gguf(tmp_path / "q.gguf", tensors, quants={"token_embd.weight": quant})
    weights = load_file(converted(tmp_path, source) / "model.safetensors")
    expected = gguf.dequantize(blocks, quant)
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], expected)


# --- rotary scaling ---


def llama3_factors(theta: float, width: int, factor: float, original: int = 8192) -> np.ndarray:
    """What llama.cpp's converter writes into `rope_freqs.weight`, in its own words."""
    factors = []
    for pair in range(width // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / width)
        if wavelength < original / 4.0:
            factors.append(1.0)
        elif wavelength > original / 1.0:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(factors, np.float32)


def rope_of(folder: Path) -> dict[str, Any]:
    return AutoConfig.from_pretrained(folder).rope_parameters


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"llama.rope.scaling.type": "linear"}, {"rope_type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
            {"rope_type": "linear", "factor": 2.5},
        ),
        ({"llama.rope.scale_linear": 8.0}, {"rope_type": "linear", "factor": 8.0}),
    ],
)
def test_linear_scaling_is_a_setting(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    target = converted(tmp_path, write_tiny_gguf(tmp_path / "linear.gguf", keys=keys))
    assert rope_of(target) == {"rope_theta": 100000.0} | expected


LLAMA3 = {"llama.rope.freq_base": 500000.0, "llama.context_length": 131072}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama_3_become_its_rule(tmp_path: Path, factor: float) -> None:
    tensors = tiny_tensors() | {"rope_freqs.weight": llama3_factors(500000.0, HEAD, factor)}
    target = converted(tmp_path, write_tiny_gguf(tmp_path / "llama3.gguf", tensors, keys=LLAMA3))
    assert rope_of(target) == {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert len(load_file(target / "model.safetensors")) == len(tiny_tensors())


@pytest.mark.parametrize(
    ("factors", "keys"),
    [
        (llama3_factors(500000.0, HEAD, 8.0, original=4096), {}),
        (llama3_factors(500000.0, HEAD, 8.0) * np.float32(1.001), {}),
        (llama3_factors(500000.0, HEAD // 2, 8.0), {}),
        (np.full(HEAD // 2, 0.5, np.float32), {}),
        (llama3_factors(500000.0, HEAD, 8.0), {"llama.rope.scaling.factor": 2.0}),
    ],
)
def test_other_factors_are_refused(tmp_path: Path, factors: np.ndarray, keys: dict[str, Any]) -> None:
    tensors = tiny_tensors() | {"rope_freqs.weight": factors}
    with pytest.raises(TPatchError, match=r"'rope_freqs\.weight' are not those of Llama 3"):
        converted(tmp_path, write_tiny_gguf(tmp_path / "odd.gguf", tensors, keys=LLAMA3 | keys))


# --- SentencePiece ---

PIECES = [
    *("▁t", "he", "▁a", "in", "▁the", "at", "▁c", "er", "▁cat", "▁in", "cat", "the", "▁▁", "ca", "é", "re", "here"),
    *"▁taheicnré日",
]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<|user|>"]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": SPM_TOKENS,
    # SentencePiece gives the tokens that are not pieces 0, which is better than any piece has
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))] + [-1000.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4],
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": None,
    "tokenizer.ggml.add_bos_token": None,
    "tokenizer.chat_template": None,
}


def spm_tensors() -> dict[str, np.ndarray]:
    table = np.random.default_rng(5).normal(size=(len(SPM_TOKENS), HIDDEN)).astype(np.float32)
    return tiny_tensors() | {"token_embd.weight": table}


def spm_tokenizer(folder: Path, **keys: Any) -> Any:
    keys = SPM | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return AutoTokenizer.from_pretrained(
        converted(folder, write_tiny_gguf(folder / "spm.gguf", spm_tensors(), keys=keys))
    )


def joined_by_score(text: str) -> list[str]:
    """SentencePiece's BPE in its plainest form: join the neighbours whose union scores highest, the leftmost first."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = ["".join(pair) for pair in itertools.pairwise(parts)]
        known = [(PIECES.index(union), at) for at, union in enumerate(unions) if union in PIECES]
        if not known:
            break
        at = min(known)[1]
        parts[at : at + 2] = [unions[at]]
    bytewise = ([part] if part in PIECES else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts)
    return [token for tokens in bytewise for token in tokens]


def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer, rng = spm_tokenizer(tmp_path), np.random.default_rng(6)
    texts = ["the cat", "there in  the", "caté\n日本 x🎉"]
    texts += ["t" + "".join(rng.choice(list("  taheicnré日xZ\n🎉"), 30)) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert tokenizer.convert_ids_to_tokens(ids[1:]) == joined_by_score(text), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("x🎉").input_ids)[2:] == [
        *("<0x78>", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>")
    ]


def test_sentencepiece_does_not_join_letters_to_the_name_of_a_byte(tmp_path: Path) -> None:
    more = [*"<0x41>", "<0", "x4", "1>", "<0x4"]
    tokenizer = spm_tokenizer(
        tmp_path,
        tokens=SPM_TOKENS + more,
        scores=[*SPM["tokenizer.ggml.scores"], *(-100.0 - rank for rank in range(len(more)))],
        token_type=SPM["tokenizer.ggml.token_type"] + [1] * len(more),
    )
    assert tokenizer.tokenize("t<0x41>") == ["▁t", "<0x4", "1>"]
    assert tokenizer.tokenize("tA") == ["▁t", "<0x41>"]


def test_sentencepiece_begins_with_bos_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    tokenizer = spm_tokenizer(tmp_path, add_eos_token=True)
    assert tokenizer.encode("the") == [1, SPM_TOKENS.index("▁the"), 2]
    assert tokenizer.encode("the", add_special_tokens=False) == [SPM_TOKENS.index("▁the")]
    assert tokenizer.encode("") == [1, 2]
    (tmp_path / "without").mkdir()
    assert spm_tokenizer(tmp_path / "without", add_bos_token=False).encode("the") == [SPM_TOKENS.index("▁the")]


def test_sentencepiece_special_tokens_stay_whole(tmp_path: Path) -> None:
    # the ids that llama.cpp assumes
    tokenizer = spm_tokenizer(tmp_path, bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("<|user|>the</s>cat").input_ids)
    assert tokens == ["<s>", "<|user|>", "▁the", "</s>", "▁cat"]
    assert tokenizer.decode(tokenizer("<|user|>the").input_ids, skip_special_tokens=True) == "<|user|> the"
    encoding = tokenizer("the cat", return_offsets_mapping=True)
    assert encoding.offset_mapping[1:] == [(0, 3), (3, 7)]


def test_sentencepiece_puts_a_space_before_the_text_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    tokenizer = spm_tokenizer(tmp_path, add_space_prefix=False)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the cat").input_ids)
    assert tokens == ["<s>", "the", "▁cat"]
    assert tokenizer.decode(tokenizer(" the").input_ids, skip_special_tokens=True) == " the"
    # a continuation, which has its own space, is encoded alike with and without the text before it
    (tmp_path / "with").mkdir()
    tokenizer = spm_tokenizer(tmp_path / "with")
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in ("the", " cat", "the cat")]
    assert parts[0] + parts[1] == parts[2]


# --- gpt2 ---

GPT2_WIDTH, GPT2_HEADS, GPT2_CONTEXT = 32, 4, 24
GPT2_TOKENS = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
GPT2_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gpt2_state() -> dict[str, np.ndarray]:
    """A random GPT-2 under transformers' names, every matrix of another shape than its transpose."""
    rng, width = np.random.default_rng(8), GPT2_WIDTH
    shapes = {"wte.weight": (len(GPT2_TOKENS), width), "wpe.weight": (GPT2_CONTEXT, width)}
    for norm in ["ln_f", *(f"h.{i}.ln_{j}" for i in range(LAYERS) for j in (1, 2))]:
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(LAYERS):
        for name, shape in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
    return {
        f"transformer.{name}": (rng.normal(size=shape) * 0.3 + (".ln_" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def gpt2_tensors() -> dict[str, np.ndarray]:
    """The same as llama.cpp's converter stores it: its names, and the matrices of the blocks turned."""
    tensors = {}
    for name, weight in gpt2_state().items():
        parts = name.removeprefix("transformer.").split(".")
        block = f"blk.{parts[1]}." if parts[0] == "h" else ""
        own = ".".join(parts[2 if block else 0 : -1])
        turned = block and weight.ndim == 2
        tensors[f"{block}{GPT2_NAMES[own]}.{parts[-1]}"] = np.ascontiguousarray(weight.T) if turned else weight
    return tensors


def write_gpt2(
    path: Path, tensors: dict[str, np.ndarray] | None = None, *, quants: dict[str, Quant] | None = None, **keys: Any
) -> Path:
    end = len(GPT2_TOKENS) - 1
    metadata = {
        "gpt2.block_count": LAYERS,
        "gpt2.context_length": GPT2_CONTEXT,
        "gpt2.embedding_length": GPT2_WIDTH,
        "gpt2.feed_forward_length": 4 * GPT2_WIDTH,
        "gpt2.attention.head_count": GPT2_HEADS,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": GPT2_TOKENS,
        # older converters did not mark the end of text as control
        "tokenizer.ggml.token_type": [1] * len(GPT2_TOKENS),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
    }
    return write_gguf(path, "gpt2", metadata | keys, tensors or gpt2_tensors(), quants)


def test_gpt2_becomes_what_transformers_saves(tmp_path: Path) -> None:
    target = converted(tmp_path, write_gpt2(tmp_path / "gpt2.gguf"))
    weights, state = load_file(target / "model.safetensors"), gpt2_state()
    assert weights.keys() == state.keys()
    for name, weight in state.items():
        np.testing.assert_array_equal(weights[name], weight, err_msg=name)
    config = AutoConfig.from_pretrained(target)
    assert config.architectures == ["GPT2LMHeadModel"]
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (32, 4, LAYERS, 24)
    assert (config.n_inner, config.layer_norm_epsilon, config.activation_function) == (128, 1e-5, "gelu_new")
    assert config.tie_word_embeddings
    assert config.bos_token_id == config.eos_token_id == len(GPT2_TOKENS) - 1


def test_gpt2_tokenizer(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path, write_gpt2(tmp_path / "gpt2.gguf")))
    assert tokenizer.tokenize("a the 12") == ["a", "Ġthe", "Ġ", "12"]
    assert tokenizer.tokenize("a<|endoftext|>") == ["a", "<|endoftext|>"]
    assert tokenizer.decode(tokenizer("naïve 日本語 🎉\n").input_ids) == "naïve 日本語 🎉\n"
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.model_max_length == GPT2_CONTEXT


def test_a_head_of_gpt2_may_be_its_own(tmp_path: Path) -> None:
    head = np.random.default_rng(9).normal(size=(len(GPT2_TOKENS), GPT2_WIDTH)).astype(np.float32)
    target = converted(tmp_path, write_gpt2(tmp_path / "head.gguf", gpt2_tensors() | {"output.weight": head}))
    np.testing.assert_array_equal(load_file(target / "model.safetensors")["lm_head.weight"], head)
    assert not AutoConfig.from_pretrained(target).tie_word_embeddings


@pytest.mark.parametrize(("quant", "error"), [(Quant.Q8_0, 0.01), (Quant.Q4_0, 0.2), (Quant.F16, 0.001)])
def test_quantised_gpt2_comes_back_near_its_values(tmp_path: Path, quant: Quant, error: float) -> None:
    names = {name: quant for name, weight in gpt2_tensors().items() if weight.ndim == 2}
    target = converted(tmp_path, write_gpt2(tmp_path / "small.gguf", quants=names))
    weights = load_file(target / "model.safetensors")
    for name, weight in gpt2_state().items():
        assert weights[name].shape == weight.shape
        distance = np.abs(weights[name] - weight).max()
        assert 0 < distance < error if weight.ndim == 2 else distance == 0


def test_a_gpt2_that_is_not_whole_is_an_error(tmp_path: Path) -> None:
    tensors = gpt2_tensors()
    del tensors["blk.1.attn_qkv.bias"], tensors["position_embd.weight"]
    with pytest.raises(TPatchError, match=r"the tensors blk\.1\.attn_qkv\.bias, position_embd\.weight are missing"):
        converted(tmp_path, write_gpt2(tmp_path / "less.gguf", tensors))


# --- the networks themselves ---


def logits_of_folder(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What transformers and what this library computes from a converted folder."""
    torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.asarray(tokens.astype(np.int64))).logits.numpy()
    config, params, _ = checkpoint.read_folder(folder)
    return theirs, np.asarray(networks.apply(config, params, jnp.asarray(tokens, jnp.int32)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*")
@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_a_llama_that_went_through_gguf_computes_the_same(tmp_path: Path, rope: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")
    # a base as small as this brings some pairs beyond 8192 positions, some below 2048 and some between
    rules: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
    }
    config = transformers.LlamaConfig(
        vocab_size=len(SPM_TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": rope, "rope_theta": 5000.0} | rules[rope],
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(config).eval()

    def stored(name: str, weight: np.ndarray) -> np.ndarray:
        if "q_proj" not in name and "k_proj" not in name:
            return weight
        heads = weight.shape[0] // HEAD
        return weight.reshape(heads, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(weight.shape).copy()

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    tensors = {
        str(names.get_name(name, (".weight",))): stored(name, weight.numpy())
        for name, weight in original.state_dict().items()
    }
    keys = SPM | {"llama.rope.freq_base": 5000.0, "llama.context_length": 131072}
    if rope == "linear":
        keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    if rope == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(5000.0, HEAD, 8.0)
    target = converted(tmp_path, write_tiny_gguf(tmp_path / "llama.gguf", tensors, keys=keys))
    tokens = np.random.default_rng(10).integers(0, len(SPM_TOKENS), (2, 40))
    with torch.no_grad():
        expected = original(torch.asarray(tokens)).logits.numpy()
    theirs, ours = logits_of_folder(target, tokens)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*")
def test_a_gpt2_that_went_through_gguf_computes_the_same(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")
    config = transformers.GPT2Config(
        vocab_size=len(GPT2_TOKENS),
        n_embd=GPT2_WIDTH,
        n_head=GPT2_HEADS,
        n_layer=LAYERS,
        n_positions=GPT2_CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    original = transformers.GPT2LMHeadModel(config).eval()
    state = {name: torch.asarray(weight) for name, weight in gpt2_state().items()}
    original.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    target = converted(tmp_path, write_gpt2(tmp_path / "gpt2.gguf"))
    tokens = np.random.default_rng(11).integers(0, len(GPT2_TOKENS), (2, GPT2_CONTEXT))
    with torch.no_grad():
        expected = original(torch.asarray(tokens)).logits.numpy()
    theirs, ours = logits_of_folder(target, tokens)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)


def test_a_file_that_does_not_say_how_text_is_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {name: entry for name, entry in tiny_keys().items() if name != "tokenizer.ggml.pre"}
    with pytest.raises(TPatchError, match=r"no 'tokenizer\.ggml\.pre' says how text is split"):
        converted(tmp_path, write_gguf(tmp_path / "tiny.gguf", "llama", keys, tiny_tensors()))
    # Of GPT-2 it is known, and said.
    assert _byte_level(Metadata(tmp_path / "a", {**keys, "general.architecture": "gpt2"})).starts_with_bos is False
    assert "text is split as GPT-2 does" in caplog.text
