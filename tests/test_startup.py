"""What a process finds already worked out by an earlier one, and when it works it out anew."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from conftest import make_tiny_model
from safetensors.numpy import load_file, save_file

import tpatch_jax as tp
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.tpatcher import last_site
from tpatch_jax.models import fingerprint as fingerprint_
from tpatch_jax.models.checkpoints import completed_settings
from tpatch_jax.models.checkpoints.folder import read_settings
from tpatch_jax.models.collection import Sites, predicted
from tpatch_jax.models.fingerprint import fingerprint, tokenizer_fingerprint
from tpatch_jax.models.sharding import ALIGNMENT, place
from tpatch_jax.storage.kept_text import keep_text


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """A cache of its own, empty."""
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_text_is_made_once_for_its_mark_and_again_if_it_is_damaged(cache):
    made = []

    def keep(mark: str) -> str:
        return keep_text("kind", mark, lambda: made.append(mark) or f"text of {mark}", lambda text: "text" in text)

    assert [keep("a"), keep("a"), keep("b")] == ["text of a", "text of a", "text of b"]
    assert made == ["a", "b"]
    for content in (b"damaged", b"\xff\xfe"):
        for path in (cache / "kind").iterdir():
            path.write_bytes(content)
        assert keep("a") == "text of a"
    assert made == ["a", "b", "a", "a"]


def test_a_text_is_made_where_the_cache_is_a_file(cache):
    cache.write_text("", "utf-8")
    assert keep_text("kind", "a", lambda: "text", bool) == "text"


def test_settings_are_completed_once_for_what_they_say(cache, tmp_path, tiny_folder, monkeypatch):
    folder, asked = tiny_folder(tmp_path), []
    ask = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: asked.append(1) or ask(*args, **kwargs)
    )
    first = read_settings(folder)
    assert read_settings(folder) == first
    assert len(asked) == 1
    path = folder / "config.json"
    changed = {**json.loads(path.read_text("utf-8")), "rms_norm_eps": 0.25}
    path.write_text(json.dumps(changed), "utf-8")
    assert read_settings(folder)["rms_norm_eps"] == 0.25
    assert len(asked) == 2
    monkeypatch.setattr(completed_settings, "version", lambda name: "another")
    read_settings(folder)
    assert len(asked) == 3
    for kept in (cache / "settings").iterdir():
        kept.write_text("[1]", "utf-8")
    assert read_settings(folder)["rms_norm_eps"] == 0.25
    assert len(asked) == 4
    # What sends transformers to other files depends on these, too.
    path.write_text(json.dumps({**changed, "configuration_files": ["config.json"]}), "utf-8")
    for _ in range(2):
        assert read_settings(folder)["rms_norm_eps"] == 0.25
    assert len(asked) == 6


def test_settings_that_transformers_refuses_are_refused_again(cache, tmp_path, tiny_folder):
    folder = tiny_folder(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "hidden_act": [1]}), "utf-8")
    for _ in range(2):
        with pytest.raises(tp.TPatchError, match=r"config\.json cannot be used"):
            read_settings(folder)


def test_a_fingerprint_is_taken_once_for_files_that_stay_what_they_are(cache, tmp_path, tiny_folder, monkeypatch):
    folder, taken = tiny_folder(tmp_path), []
    mix = fingerprint_._mix
    monkeypatch.setattr(fingerprint_, "_mix", lambda leaf: taken.append(1) or mix(leaf))
    plain = fingerprint(tp.load_model(folder))  # a small one is not kept
    each = len(taken)
    fingerprint(tp.load_model(folder))
    assert len(taken) == 2 * each > 0
    monkeypatch.setattr(fingerprint_, "LARGE_MODEL", 0)
    assert [fingerprint(tp.load_model(folder)) for _ in range(2)] == [plain, plain]
    assert len(taken) == 3 * each
    # In another precision, or with other weights in memory, it is another model of the same files.
    model = tp.load_model(folder, dtype="bfloat16")
    assert fingerprint(model) != plain
    model = tp.load_model(folder)
    other = model.with_params(jax.tree.map(lambda leaf: leaf + 1, model.params))
    assert fingerprint(other) != plain
    model.params["norm"]["scale"] = model.params["norm"]["scale"] + 1
    assert fingerprint(model) != plain
    # Weights that change on disk change it, also where their size and their time stay the same.
    path = folder / "model.safetensors"
    before, tensors = path.stat(), load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name] + np.float32(0.5)
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    now = fingerprint(tp.load_model(folder))
    monkeypatch.setattr(fingerprint_, "LARGE_MODEL", 2**40)
    assert now == fingerprint(tp.load_model(folder)) != plain


def test_a_tokenizers_fingerprint_is_kept_for_what_it_says(cache, tmp_path, tiny_folder, monkeypatch):
    folder, described = tiny_folder(tmp_path), []
    plain = tokenizer_fingerprint(tp.load_model(folder))
    monkeypatch.setattr(fingerprint_, "LARGE_TOKENIZER", 0)
    describe = fingerprint_.describe_tokenizer
    monkeypatch.setattr(
        fingerprint_, "describe_tokenizer", lambda tokenizer: described.append(1) or describe(tokenizer)
    )
    assert [tokenizer_fingerprint(tp.load_model(folder)) for _ in range(2)] == [plain, plain]
    assert len(described) == 1
    model = tp.load_model(folder)
    model.tokenizer.add_tokens(["another"])
    assert tokenizer_fingerprint(model) != plain


def test_the_moment_of_an_unembedding_is_computed_once(cache, tmp_path, tiny_model, monkeypatch):
    known = ModelMemory(jnp.ones((4, 16)), jnp.eye(16), (), (), cache=tmp_path / "kept")
    fresh = lambda: tiny_model.with_params(dict(tiny_model.params))  # noqa: E731
    computed, compute = [], last_site.moment
    monkeypatch.setattr(last_site, "moment", lambda table: computed.append(1) or compute(table))
    first = np.asarray(last_site.start_values(fresh(), known))
    assert np.array_equal(last_site.start_values(fresh(), known), first)
    assert len(computed) == 1
    for path in (tmp_path / "kept").rglob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert np.array_equal(last_site.start_values(fresh(), known), first)
    other = make_tiny_model(seed=1)
    assert not np.array_equal(last_site.start_values(other, known), first)
    last_site.start_values(fresh(), known._replace(cache=None))
    assert len(computed) == 4


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_parameter_is_placed_without_another_copy_and_depends_on_nothing(dtype):
    stored = np.arange(35, dtype=np.float32).reshape(5, 7)
    placed = place("layers.0.ffn.up.kernel", stored.T, dtype, None)
    assert placed.unsafe_buffer_pointer() % ALIGNMENT == 0
    stored[:] = 0
    assert placed.dtype == (dtype or "float32")
    np.testing.assert_array_equal(np.asarray(placed, np.float32), np.arange(35).reshape(5, 7).T)
    assert place("empty", np.zeros((0, 3), np.float32), dtype, None).shape == (0, 3)
    assert float(place("scalar", np.float32(3.0).reshape(()), dtype, None)) == 3


def test_few_rows_say_what_they_say_among_many(tiny_model):
    rng = np.random.default_rng(0)
    sites = Sites(*(rng.normal(size=(70, 16)).astype(np.float32) for _ in Sites._fields))
    all_rows = predicted(tiny_model, sites)
    for count in (1, 4, 5, 64):
        few = Sites(*(array[:count] for array in sites))
        np.testing.assert_array_equal(predicted(tiny_model, few), all_rows[:count])
