"""Hugging Face style folders: what is written is read back, and what is wrong with one is said."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, same, write_tiny_folder
from safetensors.numpy import load_file, save_file
from tiny_families import tiny_model as tiny_of
from tiny_families import tiny_settings

from tpatch_jax.core.layers import split_layers
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.reading import read_item
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.families.registry import configure
from tpatch_jax.models.model import Model, load_model, save_model
from tpatch_jax.models.patching import merge, unmerge
from tpatch_jax.requests import EditRequest

WEIGHTS = "model.safetensors"
ONE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_model: Model, tmp_path: Path) -> Path:
    return write_tiny_folder(tiny_model, tmp_path / "tiny")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value != "absent"}))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path, parts: int = 3) -> list[Path]:
    """Split the weights into shards with an index, as transformers does for large models."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    index, paths = {}, []
    for part in range(parts):
        path = folder / f"model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = names[part::parts]
        save_file({name: tensors[name] for name in chosen}, path)
        index.update(dict.fromkeys(chosen, path.name))
        paths.append(path)
    (folder / WEIGHTS).unlink()
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return paths


def refused(folder: Path, message: str) -> None:
    with pytest.raises(TPatchError, match=message):
        load_model(folder)


# --- round trips ---


def test_names_are_those_of_hugging_face(folder):
    names = set(load_file(folder / WEIGHTS))
    assert len(names) == 3 * 9 + 3
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", ONE} <= names
    assert {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"} <= names
    assert load_file(folder / WEIGHTS)[ONE].shape == (32, 16)  # [out, in]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_tied_and_biased_models_come_back(tmp_path, changes):
    model = make_tiny_model(1, **changes)
    loaded = load_model(write_tiny_folder(model, tmp_path / "tiny"))
    assert loaded.config == model.config
    assert same(loaded.params, model.params)


@pytest.mark.parametrize("biased", [False, True])
def test_a_merged_model_comes_back_with_its_neurons(tmp_path, biased):
    model = make_tiny_model(1, mlp_bias=biased)
    rng = np.random.default_rng(0)
    key, value = (jnp.asarray(rng.normal(size=(3, 16)), jnp.float32) for _ in range(2))
    patches = split_layers(Patch(key, jnp.arange(3.0), value), [0, 2, 2])
    merged = merge(model, patches)
    folder = write_tiny_folder(merged, tmp_path / "merged")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["tpatch_neurons"] == {"0": 1, "2": 2}
    assert settings["intermediate_size"] == 32
    loaded = load_model(folder)
    assert same(loaded.params, merged.params)
    back, taken = unmerge(loaded)
    assert same(back.params, model.params)
    assert same(taken, patches)
    # and a model that lost them again does not claim them
    save_model(back, tmp_path / "back")
    assert "tpatch_neurons" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_the_count_of_merged_neurons_must_match_the_weights(tiny_model, tmp_path):
    patch = Patch(jnp.ones((2, 16)), jnp.ones(2), jnp.ones((2, 16)))
    folder = write_tiny_folder(merge(tiny_model, patch), tmp_path / "merged")
    edit_config(folder, tpatch_neurons={"2": 3})
    refused(folder, r"layers\.2\.mlp\..* has shape .*34.*config.json implies .*35")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_of_the_weights_is_kept_or_chosen(tiny_model, tmp_path, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_model.params)
    folder = write_tiny_folder(tiny_model.with_params(params), tmp_path / "tiny")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert same(load_model(folder).params, params)
    for wanted in ("float32", "bfloat16"):
        found = load_model(folder, dtype=wanted).params
        assert same(found, jax.tree.map(lambda leaf, wanted=wanted: leaf.astype(wanted), params))


def test_an_unknown_type_is_an_error(folder):
    with pytest.raises(TPatchError, match="dtype 'float16' is not supported; use 'float32' or 'bfloat16'"):
        load_model(folder, dtype="float16")


def test_shards_with_an_index_are_one_model(tiny_model, folder):
    assert len(shard(folder)) == 3
    assert same(load_model(folder).params, tiny_model.params)


def test_several_files_without_an_index_are_one_model(tiny_model, folder):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert same(load_model(folder).params, tiny_model.params)


def test_the_tokenizer_goes_along_and_the_index_does_not(folder, tmp_path):
    shard(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.bin").write_bytes(b"x")
    model = load_model(folder)
    save_model(model, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names >= {"config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert not {name for name in names if "index" in name or name.endswith(".bin")}
    copy = load_model(tmp_path / "copy")
    assert same(copy.params, model.params)
    assert copy.encode("the cat") == model.encode("the cat")


def test_what_old_checkpoints_carry_besides_is_passed_over(tiny_model, folder, tmp_path):
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}))
    assert same(load_model(folder).params, tiny_model.params)
    tied = make_tiny_model(1, tie_word_embeddings=True)
    second = write_tiny_folder(tied, tmp_path / "tied")
    edit_weights(second, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert same(load_model(second).params, tied.params)


def test_a_head_that_differs_from_the_embedding_is_read_and_one_that_stands_alone_is_both(tmp_path):
    tied = make_tiny_model(1, tie_word_embeddings=True)
    folder = write_tiny_folder(tied, tmp_path / "tied")
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}))
    loaded = load_model(folder)
    assert not loaded.config.tied
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], 2 * tied.params["embed"]["embedding"].T)
    save_model(loaded, tmp_path / "again")
    assert same(load_model(tmp_path / "again").params, loaded.params)
    alone = write_tiny_folder(tied, tmp_path / "alone")
    edit_weights(alone, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert same(load_model(alone).params, tied.params)


def test_the_model_s_own_file_counts_and_two_of_one_kind_do_not(tiny_model, folder):
    other = {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(other, folder / "model_ema.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert same(load_model(folder).params, tiny_model.params)
    (folder / "model.safetensors.index.json").unlink()
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    refused(folder, "twice, in model_ema.safetensors and in weights.safetensors; leave the model's own files")


def test_a_text_ends_where_the_generation_settings_say_so_too(folder):
    before = load_model(folder).stops
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*before, 7]}))
    assert load_model(folder).stops == tuple(sorted({*before, 7}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load_model(folder).stops == tuple(sorted({*before, 9}))


# --- rotary embeddings ---


def frequencies(**settings: Any) -> np.ndarray:
    base = make_tiny_model().settings
    base = {name: value for name, value in base.items() if name != "rope_theta"}
    return np.asarray(configure({**base, "head_dim": 32, **settings}).rope_frequencies)


def test_old_and_new_ways_to_say_the_same_rotation(folder):
    wanted = 500_000.0 ** -(np.arange(0, 32, 2) / 32)
    for settings in (
        {"rope_theta": 500_000.0},
        {"rope_theta": 500_000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}},
    ):
        np.testing.assert_allclose(frequencies(**settings), wanted, rtol=1e-12)
    np.testing.assert_allclose(frequencies(), 10_000.0 ** -(np.arange(0, 32, 2) / 32), rtol=1e-12)
    linear = {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    np.testing.assert_allclose(frequencies(**linear), wanted / 4, rtol=1e-12)


@pytest.mark.parametrize("where", ["rope_theta", "rope_parameters"])
def test_folders_say_it_in_both_ways(folder, where):
    new = {"rope_theta": 777.0, "rope_type": "default"}
    if where == "rope_theta":
        edit_config(folder, rope_theta=777.0)
    else:
        edit_config(folder, rope_theta="absent", rope_parameters=new)
    found = load_model(folder).config.rope_frequencies
    np.testing.assert_allclose(found, 777.0 ** -(np.arange(0, 8, 2) / 8), rtol=1e-12)


def test_llama_3_s_rule_agrees_with_another_formulation():
    factor, low, high, original, theta = 8.0, 1.0, 4.0, 8192, 500_000.0
    plain = theta ** -(np.arange(0, 32, 2) / 32)
    # Meta's own words: by wavelength instead of by turns
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    middle = (1 - smooth) * plain / factor + smooth * plain
    wanted = np.where(
        wavelength > original / low, plain / factor, np.where(wavelength < original / high, plain, middle)
    )
    rules = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rules["original_max_position_embeddings"] = original
    new = frequencies(rope_parameters={**rules, "rope_type": "llama3", "rope_theta": theta})
    old = frequencies(rope_theta=theta, rope_scaling={**rules, "type": "llama3"})
    np.testing.assert_allclose(new, wanted, rtol=1e-12)
    np.testing.assert_allclose(old, wanted, rtol=1e-12)
    kinds = {"long": wavelength > original / low, "short": wavelength < original / high}
    assert kinds["long"].any()
    assert kinds["short"].any()
    assert not (kinds["long"] | kinds["short"]).all()


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_texts_that_need_the_long_factors_are_beyond_the_context(name):
    assert configure(tiny_settings(name, rope_parameters=LONG)).context == 16
    assert configure(tiny_settings(name)).context == 64


def test_a_mistral_with_kinds_of_layers_sees_as_far_as_they_say():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert configure(tiny_settings("mistral", sliding_window=8, layer_types=kinds)).windows == (8, 0, 8)
    assert configure(tiny_settings("mistral", sliding_window=8)).windows == (8, 8, 8)
    assert configure(tiny_settings("mistral")).windows == ()


def test_a_null_in_the_settings_is_what_transformers_makes_of_it(tmp_path):
    folder = write_tiny_folder(tiny_of("gemma2"), tmp_path / "gemma2")
    edit_config(folder, layer_types="absent")
    wanted = load_model(folder).config.windows
    assert wanted == (8, 0, 8)
    edit_config(folder, layer_types=None)
    assert load_model(folder).config.windows == wanted


def test_another_rotation_is_an_error():
    with pytest.raises(TPatchError, match="rotary embeddings of type 'dynamic'; known are default, linear, llama3"):
        frequencies(rope_scaling={"rope_type": "dynamic", "factor": 2.0})


# --- what can be wrong with a folder ---


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "tiny: no config.json")
    with pytest.raises(TPatchError, match=r"has no config\.json"):
        checkpoint.read_settings(folder)


@pytest.mark.parametrize("text", ["", "{", "not JSON", '{"model_type": "llama"'])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json is not JSON .*fetch the model again")


def test_config_that_is_not_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "config.json is not JSON")


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"model_type": 3}'])
def test_config_that_names_no_architecture(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json names no 'model_type'")


@pytest.mark.parametrize("kind", ["mamba", "xlnet", "Llama", ""])
def test_unknown_architecture(folder, kind):
    edit_config(folder, model_type=kind)
    refused(folder, f"names the architecture '{kind}'; .*supported are .*llama")


def test_unknown_activation(folder):
    edit_config(folder, hidden_act="mish")
    refused(folder, "names the activation 'mish'; known are .*silu")


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": [2]}, {"vocab_size": None}])
def test_a_setting_of_the_wrong_kind(folder, changes):
    edit_config(folder, **changes)
    refused(folder, "config.json")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "tiny holds no safetensors weights; put model.safetensors beside config.json")


def test_pickled_weights_are_never_read(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo owned'\ntR.")
    refused(folder, "pytorch_model.bin is a pickle, which is never read: convert it")


def test_a_missing_shard(folder):
    shard(folder)[1].unlink()
    refused(folder, "lacks the shards model-00002-of-00003.safetensors that its index lists")


def test_an_index_that_promises_what_its_shard_lacks(folder):
    path = shard(folder)[1]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    refused(folder, f"{name} is missing")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "index.json is damaged")


@pytest.mark.parametrize("name", [ONE, "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor(folder, name):
    edit_weights(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"does not hold the model that its config.json describes: {name} is missing$")


def test_a_wrong_shape(folder):
    edit_weights(folder, lambda tensors: tensors.update({ONE: np.zeros((31, 16), np.float32)}))
    refused(folder, rf"{ONE} has shape \(31, 16\), config.json implies \(32, 16\)")


def test_a_transposed_matrix_is_a_wrong_shape(folder):
    edit_weights(folder, lambda tensors: tensors.update({ONE: np.ascontiguousarray(tensors[ONE].T)}))
    refused(folder, rf"{ONE} has shape \(16, 32\), config.json implies \(32, 16\)")


def test_a_configuration_of_another_size_names_the_tensors(folder):
    edit_config(folder, intermediate_size=48)
    refused(folder, r"model.layers.0.mlp.*; and 4 more$")


def test_an_extra_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": np.zeros((32, 16))}))
    refused(folder, "model.layers.3.mlp.up_proj.weight is not part of a llama model")


def test_a_bias_that_the_configuration_does_not_know(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(folder, lambda tensors: tensors.update({name: np.ones(16, np.float32)}))
    refused(folder, f"{name} is not part of a llama model")


def test_quantised_weights(folder):
    edit_weights(folder, lambda tensors: tensors.update({ONE: np.ones((32, 16), np.int8)}))
    refused(folder, f"{ONE} is I8: a quantised checkpoint")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("content", [b"", b"not safetensors at all", "half"])
def test_damaged_weights(folder, sharded, content):
    path = shard(folder)[0] if sharded else folder / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    refused(folder, f"{path.name} is damaged .*fetch it again")


def test_no_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    refused(folder, "tiny has no tokenizer that can be read")


def test_a_damaged_tokenizer(folder):
    for text in ("{", "{}", '{"model": {"type": "BPE"}}'):
        (folder / "tokenizer.json").write_text(text)
        refused(folder, "tiny has no tokenizer that can be read .*copy the model's own tokenizer.json there")


def test_the_tokenizer_is_looked_at_before_the_weights(folder):
    (folder / "tokenizer.json").write_text("{")
    (folder / WEIGHTS).unlink()
    refused(folder, "tiny has no tokenizer that can be read")


def test_weights_that_are_a_folder(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder, "model.safetensors is damaged .*fetch it again")


def test_a_tokenizer_with_more_tokens_than_the_model(tiny_model, tmp_path):
    small = make_tiny_model(vocab_size=256)
    folder = write_tiny_folder(small, tmp_path / "small")
    assert small.tokenizer.vocab_size > 256
    refused(folder, f"has {small.tokenizer.vocab_size} tokens and the model 256: it belongs to another model")


def test_a_token_that_was_added_beyond_the_model_s_is_refused_only_where_it_is_used(folder):
    model = load_model(folder)
    added = [f"<image {number}>" for number in range(model.config.vocabulary)]
    model.tokenizer.add_tokens(added)
    model.tokenizer.save_pretrained(folder)
    model = load_model(folder)
    assert len(model.tokenizer) > model.config.vocabulary
    assert model.encode("the cat")
    for read in (model.encode, model.encode_prompt, model.generate):
        with pytest.raises(TPatchError, match=f"the token '{added[-1]}' in 'the {added[-1]}' is none of"):
            read(f"the {added[-1]}")
    # A rephrasing costs nobody's edit: the prompt stands in.
    item = read_item(model, 0, EditRequest("the cat", "k", rephrases=(f"the {added[-1]}",)), (), True)
    assert item.texts == ["the cat", "the cat"]


def test_a_token_that_begins_or_ends_texts_is_the_model_s(folder):
    tokenizer = load_model(folder).tokenizer
    tokenizer.add_tokens([f"<{number}>" for number in range(300)])
    tokenizer.add_special_tokens({"eos_token": "<last>"})
    tokenizer.save_pretrained(folder)
    refused(folder, "the eos_token of the tokenizer in")


def test_what_is_said_keeps_its_space_whatever_the_tokenizer_strips(tiny_model):
    class Pieces:
        """As SentencePiece's: a text that stands alone loses the space before its first word."""

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join((" a", " b", "c")[token] for token in tokens).removeprefix(" ")

    model = dataclasses.replace(tiny_model, tokenizer=Pieces())
    assert model.decode([0, 1]) == "a b"
    assert model.continuation([0], [1, 2]) == " bc"
    assert model.continuation([0], [2]) == "c"
    assert model.continuation([], [1]) == "b"


# --- writing ---


def test_an_output_folder_that_is_taken_is_kept(tiny_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(TPatchError, match="out already exists; choose another output folder"):
        save_model(tiny_model, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    def full(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TPatchError, match=r"cannot write .*out: No space left on device; free some room"):
        save_model(tiny_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import load_model, save_model
model = load_model(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_model(model, sys.argv[2])
except TPatchError as error:
    print(error)
"""


def test_a_disk_that_really_refuses_leaves_nothing(folder, tmp_path):
    # safetensors reports a failed write by an error of its own, not an OSError
    out = tmp_path / "out" / "model"
    command = [sys.executable, "-c", LIMITED, str(folder), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "cannot write" in ended.stdout
    assert "free some room" in ended.stdout
    assert list(out.parent.iterdir()) == []
