"""GRACE: its rules, its adapter, edits that hold and come out again, and its place in an evaluation."""

import dataclasses
import doctest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_tiny_model, same
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model as family

from tpatch_jax import export_model, load_model, merge, save_model
from tpatch_jax.core import adapters, ffn
from tpatch_jax.core.adapters import Adapter
from tpatch_jax.core.patch import create
from tpatch_jax.editors import grace as grace_module
from tpatch_jax.editors.grace import (
    Codebook,
    GraceSettings,
    GraceState,
    _empty,
    _enter,
    edited_model,
    forget,
    grace,
    grace_layer,
    restore_edits,
    save_edits,
)
from tpatch_jax.editors.registry import method_settings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.records import Probe, Record
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach_adapters, detach
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPTIMISED = False  # the real model is run a few times

PROMOTION = "standard"  # optax takes steps

KEY = jax.random.key(0)
# The random network says one token of them at most: nothing that it reads reaches later ones.
WANTED = [EditRequest("the cat sat in", "the"), EditRequest("who hit the", "the")]
OTHER = "Ada likes"


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def edited(model) -> tuple[GraceState, Any]:
    editor = grace()
    return editor.step(editor.init(model, KEY), WANTED, KEY)


def learnt(state: GraceState) -> list[Any]:
    """All arrays of a state's edits and entries, bit for bit."""
    return bits((state.keys, state.values, state.entries[:3]))


# --- the rules ---


def entered(*edits: tuple[float, str], epsilon: float = 0.1) -> Any:
    """Edits whose queries lie beside ``(10, 0)``, ten long, so that a radius begins as one."""
    entries, numbers = _empty(2), []
    for at, target in edits:
        step = _enter(
            entries, np.asarray([10.0, at], np.float32), np.full(2, len(numbers), np.float32), target, epsilon
        )
        entries = step.entries
        numbers.append((step.entry, step.fresh))
    return entries, numbers


def test_a_far_edit_gets_an_entry_of_its_first_radius():
    entries, numbers = entered((0, "a"), (3, "b"))
    assert numbers == [(0, True), (1, True)]
    assert entries.radius == pytest.approx([1, 0.1 * np.hypot(10, 3)])


def test_a_near_edit_with_the_same_target_makes_the_radius_larger():
    entries, numbers = entered((0, "a"), (1.5, "a"), (0.5, "a"))
    assert numbers == [(0, True), (0, False), (0, False)]
    assert entries.radius == pytest.approx([1.5], rel=2e-3)
    assert entries.radius[0] >= 1.5


def test_a_near_edit_with_another_target_halves_the_way():
    entries, numbers = entered((0, "a"), (1.5, "b"))
    assert numbers == [(0, True), (1, True)]
    assert entries.radius == pytest.approx([0.75, 0.75])
    assert entries.targets == ("a", "b")


def test_the_same_query_is_the_later_edits():
    entries, numbers = entered((0, "a"), (0, "b"))
    assert numbers == [(0, True), (0, True)]
    assert entries.targets == ("b",)
    assert entries.value.tolist() == [[1, 1]]


# --- the adapter ---


@given(st.integers(1, 9), st.integers(0, 2**16), st.floats(0.1, 3))
def test_the_nearest_value_stands_in_within_its_radius_and_nothing_else_changes(count, seed, radius):
    rng = np.random.default_rng(seed)
    key, value, query, output = (rng.normal(size=(n, 4)).astype(np.float32) for n in (count, count, 6, 6))
    radii = np.full(count, radius, np.float32)
    entries = grace_module.Entries(key, radii, value, ("",) * count)
    result = np.asarray(entries.codebook().contribute(jnp.asarray(query), jnp.asarray(output)))
    distance = np.linalg.norm(query[:, None].astype(np.float64) - key, axis=-1)
    for row, near in enumerate(distance):
        if abs(near.min() - radius) > 1e-4:
            wanted = value[near.argmin()] if near.min() <= radius else output[row]
            assert result[row].tobytes() == wanted.tobytes()


def test_an_adapter_is_a_pytree_under_every_transformation(model, edited):
    book = edited[0].entries.codebook()
    assert isinstance(book, Adapter)
    query, output = jnp.ones((3, 16)), jnp.zeros((3, 16))
    assert same(jax.jit(lambda b, q, o: b.contribute(q, o))(book, query, output), book.contribute(query, output))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), book)
    assert jax.vmap(lambda b: b.contribute(query, output))(both).shape == (2, 3, 16)
    near = jnp.asarray(edited[0].keys[:1])
    found = jax.grad(lambda b: b.contribute(near, jnp.zeros((1, 16))).sum())(book)
    assert (np.asarray(found.value[0]) == 1).all()


def test_where_no_key_is_near_the_model_is_the_unedited_one_bit_for_bit(model, edited):
    state, _ = edited
    batch = tokens_array([model.encode_prompt(OTHER), model.encode_prompt(WANTED[0].prompt)], 24)
    before, after = np.asarray(model.apply(batch)), np.asarray(edited_model(state).apply(batch))
    place = len(model.encode_prompt(WANTED[0].prompt)) - 1
    assert after[0].tobytes() == before[0].tobytes()
    assert after[1, :place].tobytes() == before[1, :place].tobytes()
    assert after[1, place].tobytes() != before[1, place].tobytes()


def test_what_is_attached_is_no_part_of_the_model(model, edited, tmp_path):
    attached = edited_model(edited[0])
    assert fingerprint(attached) == fingerprint(model)
    assert same(detach(attached).params, model.params)
    book = edited[0].entries.codebook()
    with pytest.raises(TPatchError, match=r"a Codebook is no patch of neurons .* or take it off with detach first"):
        ffn.merge(model.params["layers"][0]["ffn"], book)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TPatchError, match="a Codebook is no patch of neurons"):
        export_model(attached, tmp_path / "export")
    with pytest.raises(TPatchError, match="before saving"):
        save_model(attached, tmp_path / "saved")
    with pytest.raises(TPatchError, match="no adapter; give an object with contribute"):
        attach_adapters(model, {0: create(16)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TPatchError, match="something is attached to layer 0"):
        grace().init(attached, KEY)
    assert (
        merge(attached, create(16, 2)).params["layers"][0]["ffn"]["adapter"]
        is attached.params["layers"][0]["ffn"]["adapter"]
    )


# --- edits ---


def test_edits_hold_and_nothing_of_the_model_changes(model, edited):
    state, info = edited
    assert [(one.held, one.status, one.reason) for one in info.requests] == [(True, "edited", "")] * 2
    assert info.parameters_added == 2 * 33
    assert info.forward_equivalents >= info.fit_forward_equivalents > 0
    assert state.model is model
    attached = edited_model(state)
    assert [attached.generate(one.prompt, 1) for one in WANTED] == [" the", " the"]
    batch = tokens_array([model.encode_prompt(WANTED[0].prompt)], 24)
    assert same(grace().apply(state, batch), attached.apply(batch))
    again, info = grace().step(state, WANTED, KEY)
    assert [one.status for one in info.requests] == ["already"] * 2
    assert learnt(again) == learnt(state)


def test_edits_are_taken_out_exactly(model, edited):
    state, _ = edited
    editor = grace()
    # Near to the first one, and for the same prompt: both change what is there.
    later = [EditRequest("a cat sat in", "t", id="near"), EditRequest(WANTED[0].prompt, "q", id="same")]
    wide = dataclasses.replace(state.settings, epsilon=3.0)
    begun = state._replace(settings=wide)
    more, _ = editor.step(begun, later, KEY)
    assert not same(more.entries.radius[:2], state.entries.radius[:2])
    assert same(forget(more, ["edit-0", "edit-1", "near", "same"]).entries, _empty(16))
    narrow = forget(more._replace(settings=state.settings), ["near", "same"])
    assert learnt(narrow) == learnt(state)
    after, _ = editor.step(state, later, KEY)
    assert learnt(after) != learnt(state)
    assert learnt(forget(after, ["near", "same"])) == learnt(state)
    assert [one.id for one in narrow.requests] == ["edit-0", "edit-1"]
    with pytest.raises(TPatchError, match=r"no edit 'edit-7' is in the codebook; it holds edit-0, edit-1$"):
        forget(state, ["edit-7"])


def test_a_restored_state_is_the_one_that_was_saved(model, edited):
    state, _ = edited
    restored = restore_edits(grace().init(model, KEY), save_edits(state))
    assert restored.requests == state.requests
    assert learnt(restored) == learnt(state)


def test_what_does_not_hold_is_said_and_kept_or_not(model):
    wanted = [EditRequest("the cat sat in", "q x"), EditRequest("", "the")]
    for keep in (True, False):
        editor = grace(GraceSettings(edit_steps=2, keep_failed=keep))
        state, info = editor.step(editor.init(model, KEY), wanted, KEY)
        assert [one.held for one in info.requests] == [False, False]
        assert "does not come out after 2 steps" in info.requests[0].reason
        assert "the prompt is empty" in info.requests[1].reason
        assert len(state.entries.radius) == keep


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_models_that_read_whole_inputs_are_edited_too(name):
    other = family(name)
    labels = other.config.labels
    said = labels.index(other.classify(["the cat sat in"])[0]) if labels else 0
    request = EditRequest("the cat sat in", labels[(said + 1) % len(labels)] if labels else "")
    if not labels:
        # What ends a text is all that this random network can be brought to say.
        request = EditRequest("the cat sat in", "t")
    editor = grace()
    state, info = editor.step(editor.init(other, KEY), [request], KEY)
    assert len(state.entries.radius) == 1
    if labels:
        assert info.requests[0].held
        assert edited_model(state).classify([request.prompt]) == [request.target]


@pytest.mark.real_model
def test_a_real_model_says_targets_of_several_tokens():
    model = load_model("smollm2-135m")
    wanted = [
        EditRequest("The capital of France is", "Lyon"),
        EditRequest("The Eiffel Tower is located in the city of", "New Delhi in India"),
    ]
    editor = grace()
    state, info = editor.step(editor.init(model, KEY), wanted, KEY)
    assert all(one.held for one in info.requests)
    assert edited_model(state).generate(wanted[1].prompt, 4).strip() == "New Delhi in India"
    other = "The largest ocean on Earth is the"
    batch = tokens_array([model.encode_prompt(other)], 8)
    assert same(edited_model(state).apply(batch), model.apply(batch))


# --- in an evaluation ---


def records() -> list[Record]:
    near = Probe("the sun is", "up")
    return [Record(f"r{n}", (one,), {"reliability": (Probe(one.prompt, one.target),), "locality": (near,)},
                   generation=(one.prompt,)) for n, one in enumerate(WANTED)]  # fmt: skip


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
def test_it_is_evaluated_and_resumed(model, letters, tmp_path: Path, monkeypatch, protocol):
    monkeypatch.setattr("tpatch_jax.evaluation.protocols.SAVE_EVERY", 1)

    def run(output: Path | None = None, **options: Any) -> Any:
        report = evaluate(
            model, records(), ["grace"], protocol, cache=False, output=output, generate=protocol == "batch",
            text=letters if protocol == "batch" else None, text_tokens=128, **options,
        )  # fmt: skip
        return report["results"][1]["metrics"], report["results"][1]["requests"]

    whole = run()
    assert whole[1]["edited"] == 2
    assert whole[0]["SR" if protocol == "sequential" else "exact"] == 1.0
    assert whole[0]["locality"] == 1.0
    if protocol == "batch":
        assert 0.5 < whole[0]["certificate_tokens"] <= 1
    begun = []

    def stop(what: str, done: int, total: int) -> None:
        begun.append(what)
        if "training values" in begun and what in ("single edits", "measuring", "stream") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", progress=stop)
    assert run(tmp_path / "out") == whole


# --- settings ---


def test_layers_and_values_that_make_no_sense_are_named(model):
    assert [grace_layer(dataclasses.replace(model.config, layers=n)) for n in (1, 2, 3, 30, 48)] == [0, 0, 1, 22, 35]
    with pytest.raises(TPatchError, match="layer '7' does not exist; use layer=auto or 0 to 1"):
        grace(GraceSettings(layer="7")).init(model, KEY)
    for name, wrong in (("layer", "top"), ("edit_steps", 0), ("epsilon", 0.0), ("edit_rate", -1.0)):
        with pytest.raises(TPatchError, match=f"{name} (is )?'?{wrong}"):
            method_settings(["grace"], changes={name: wrong})


def test_examples_work():
    for module in (grace_module, adapters):
        result = doctest.testmod(module, extraglobs={"jnp": jnp}, optionflags=doctest.ELLIPSIS)
        assert (result.failed, result.attempted > 0) == (0, True)


def test_a_codebook_is_filled_up_with_entries_that_never_fire(edited):
    book = edited[0].entries.codebook()
    assert isinstance(book, Codebook)
    assert book.key.shape == (8, 16)
    assert not np.asarray(book.nearest(jnp.zeros((1, 16)))[1]).any()
