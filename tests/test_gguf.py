"""GGUF to Hugging Face: tensors, configuration and tokenizer, on a tiny model written here."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.gguf import convert_gguf

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


def write_tiny_gguf(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    arch: str = "llama",
    model: str = "gpt2",
    pre: str = "smollm",
    add_bos: bool = False,
    scaling: str | None = None,
    quants: dict[str, Quant] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if scaling is not None:
        writer.add_string(f"{arch}.rope.scaling.type", scaling)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)
    for name, weight in (tiny_tensors() if tensors is None else tensors).items():
        quant = (quants or {}).get(name)
        if quant is None:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quantize(weight, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe"])
def test_other_pre_tokenizers_may_merge_digits(tmp_path: Path, pre: str) -> None:
    target = converted(tmp_path, write_tiny_gguf(tmp_path / "tiny.gguf", pre=pre))
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("12 the") == ["12", "Ġthe"]
    assert tokenizer("the").input_ids[0] != 1


def test_bos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path, write_tiny_gguf(tmp_path / "t.gguf", add_bos=True)))
    encoding = tokenizer("a the", return_offsets_mapping=True)
    assert tokenizer.convert_ids_to_tokens(encoding.input_ids) == ["<|im_start|>", "a", "Ġthe"]
    assert encoding.offset_mapping[-1] == (2, 5)


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
        ({"arch": "mamba"}, "architecture 'mamba' is not supported; supported: llama"),
        ({"pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm' is not supported; supported: default, gpt-2"),
        ({"model": "llama"}, "tokenizer 'llama' is not supported"),
        ({"scaling": "yarn"}, "rope scaling 'yarn' is not supported"),
    ],
)
def test_unsupported_files_say_what_is_supported(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(TPatchError, match=message):
        converted(tmp_path, write_tiny_gguf(tmp_path / "other.gguf", **change))  # pyright: ignore[reportArgumentType]


def test_tensors_of_another_type_or_name_are_named(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    odd = tensors | {"output_norm.weight": np.ones(HIDDEN, np.int32)}
    with pytest.raises(TPatchError, match=r"'output_norm\.weight' has the unsupported type I32; use a file in F32"):
        converted(tmp_path, write_tiny_gguf(tmp_path / "odd.gguf", odd))
    extra = tensors | {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}
    (tmp_path / "extra").mkdir()
    with pytest.raises(TPatchError, match=r"llama model with blk\.0\.attn_q\.bias is not supported"):
        converted(tmp_path / "extra", write_tiny_gguf(tmp_path / "extra.gguf", extra))
    del tensors["blk.1.ffn_up.weight"]
    (tmp_path / "less").mkdir()
    with pytest.raises(TPatchError, match=r"blk\.1\.ffn_up\.weight are missing"):
        converted(tmp_path / "less", write_tiny_gguf(tmp_path / "less.gguf", tensors))


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -1000])
def test_a_cut_file_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    whole = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:keep])
    with pytest.raises(TPatchError, match=r"cut\.gguf: not a readable GGUF file"):
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
