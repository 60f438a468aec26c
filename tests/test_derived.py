"""What is derived from a model's weights and its memory is made once, and goes with the model."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_tiny_model

import tpatch_jax as tp
from tpatch_jax.core import memory as core_memory
from tpatch_jax.core.memory import create_memory, second_moments
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors import model_memory
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.rome.hidden_moment import hidden_moment, moment_rows
from tpatch_jax.editors.tpatcher import last_site
from tpatch_jax.editors.tpatcher.last_site import forward_seconds, start_values
from tpatch_jax.models import derived
from tpatch_jax.models.derived import derive_once
from tpatch_jax.models.patching import attach

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMOTION = "standard"  # optax takes steps
PRECISION = None  # that of what is kept is asked


def test_a_value_is_made_once_for_a_key_and_anew_for_other_weights():
    model, made = make_tiny_model(3), []
    once = lambda key: derive_once(model, "sum", key, lambda: made.append(key) or len(made))  # noqa: E731
    assert [once("a"), once("a"), once("b"), once("a")] == [1, 1, 2, 1]
    assert derive_once(model, "other", "a", lambda: 7) == 7
    # A model says nothing about another one, equal or not.
    assert derive_once(make_tiny_model(3), "sum", "a", lambda: 9) == 9
    model.params["embed"]["embedding"] = 2 * model.params["embed"]["embedding"]
    assert once("a") == 3
    assert derive_once(model, "nothing", "a", lambda: None) is None
    assert derive_once(model, "nothing", "a", lambda: 5) == 5


def test_the_value_used_longest_ago_goes_first():
    model, made = make_tiny_model(3), []
    once = lambda key: derive_once(model, "sum", key, lambda: made.append(key) or key)  # noqa: E731
    for key in range(derived.MOST):
        once(key)
    once(0)
    once("one more")
    assert [once(0), once(2)] == [0, 2]
    assert made == [*range(derived.MOST), "one more"]
    once(1)
    assert made[-1] == 1


def test_what_is_derived_goes_with_the_model(letters, tmp_path, monkeypatch):
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path))
    model = make_tiny_model(4)
    request = tp.EditRequest("the cat sat in", "b")
    before = len(core_memory._MOMENTS)
    for _ in range(2):
        tp.edit(model, [request], memory=letters, settings={"site": "last", "attempts": 1, "fit.key_steps": 2})
    kept = vars(model)["_derived"]
    assert {kind: len(values) for kind, values in kept.items()} == {
        "memory": 1,
        "forward seconds": 1,
        "start values": 1,
    }
    (memory,) = kept["memory"].values()
    references = weakref.ref(model), weakref.ref(memory.query), weakref.ref(model.params["embed"]["embedding"])
    del model, kept, memory
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert len(core_memory._MOMENTS) <= before


def test_a_memory_is_read_once_and_again_when_its_files_change(letters, tmp_path, monkeypatch):
    model, loads, load = make_tiny_model(5), [], model_memory._load
    monkeypatch.setattr(model_memory, "_load", lambda folder: loads.append(folder) or load(folder))
    first = collect_model_memory(model, 1, letters, cache=tmp_path)
    second, third = (collect_model_memory(model, 1, letters, cache=tmp_path) for _ in range(2))
    assert third is second
    assert bits((first.query, first.nuisance)) == bits((second.query, second.nuisance))
    count = len(loads)
    file = loads[-1] / "arrays.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"{")
    mended = collect_model_memory(model, 1, letters, cache=tmp_path)
    assert len(loads) == count + 1
    assert bits(mended.query) == bits(second.query)
    assert file.read_bytes() == whole


def test_a_forward_pass_is_timed_once_for_a_shape(tiny_model, monkeypatch):
    model, runs, collect = tiny_model.with_params(tiny_model.params), [], last_site.collect
    monkeypatch.setattr(last_site, "collect", lambda *given: runs.append(len(given[1])) or collect(*given))
    texts = ("the cat sat in", "the hen hid in", "in the inn the cat and the hen sat, and then the fox hid")
    short, other, long = (read_item(model, 0, tp.EditRequest(text, "b"), [], False) for text in texts)
    seconds = forward_seconds(model, [short])
    assert seconds > 0
    assert runs == [1, 1]
    assert forward_seconds(model, [other]) == seconds
    assert runs == [1, 1]
    forward_seconds(model, [long])
    assert runs == [1] * 4
    forward_seconds(model, [short, long])
    assert runs == [1, 1, 1, 1, 4, 4]
    assert forward_seconds(model, []) == 0.0


def test_start_values_are_taken_once_for_a_precision(tiny_model, letters):
    model = tiny_model.with_params(tiny_model.params)
    known = collect_model_memory(model, 1, letters)
    first = start_values(model, known)
    assert start_values(model, known) is first
    with jax.default_matmul_precision("highest"):
        assert start_values(model, known) is not first
    known = known._replace(centres=jnp.ones((2, 16)))
    assert start_values(model, known) is known.centres
    # A patch in a layer does not change the unembedding, and neither do the start values.
    assert bits(
        start_values(
            attach(model, {1: tp.Patch(*(jnp.zeros(s) for s in ((1, 16), (1,), (1, 16))))}),
            known._replace(centres=None),
        )
    ) == bits(first)


def test_moments_of_a_memory_are_taken_once_and_not_of_what_may_change(monkeypatch):
    taken = []
    monkeypatch.setattr(core_memory, "second_moments", lambda query: taken.append(1) or second_moments(query))
    query = jax.random.normal(jax.random.key(0), (32, 4))
    memories = [create_memory(query, weight=weight) for weight in (0.2, 0.7)]
    assert len(taken) == 1
    np.testing.assert_array_equal(memories[0].mean, jnp.mean(query, 0))
    with jax.default_matmul_precision("highest"):
        create_memory(query)
    assert len(taken) == 2
    on_host = np.ones((8, 4), np.float32)
    first = create_memory(on_host)
    on_host *= 3
    assert float(create_memory(on_host).mean[0]) == 3 * float(first.mean[0])
    assert jax.jit(lambda rows: create_memory(rows).mean)(query).shape == (4,)
    place = id(query)
    assert place in core_memory._MOMENTS
    del query, memories
    gc.collect()
    assert place not in core_memory._MOMENTS


def test_what_is_attached_leaves_nothing_in_the_cache_of_the_bare_model(letters, tmp_path):
    model, rng = make_tiny_model(6), np.random.default_rng(0)
    key, value = (jnp.asarray(4 * rng.normal(size=(4, 16)), jnp.float32) for _ in range(2))
    patched = attach(model, {0: Patch(key, jnp.zeros(4), value)})
    moment_of = lambda asked, cache: hidden_moment(asked, 1, moment_rows(asked, letters), cache=cache)  # noqa: E731
    bare = collect_model_memory(model, 1, letters), moment_of(model, None)
    beside = collect_model_memory(patched, 1, letters, cache=tmp_path), moment_of(patched, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert bits(beside[0].query) != bits(bare[0].query)
    after = collect_model_memory(model, 1, letters, cache=tmp_path), moment_of(model, tmp_path)
    assert bits(after[0].query) == bits(bare[0].query)
    assert bits(after[1]) == bits(bare[1]) != bits(beside[1])
    # The bare model's is not taken by the patched one either.
    assert bits(collect_model_memory(patched, 1, letters, cache=tmp_path).query) == bits(beside[0].query)
