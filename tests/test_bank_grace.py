"""A bank whose edits are entries of a codebook: it knows their method by the editor's protocol alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import make_tiny_model, same

import tpatch_jax as tp
from tpatch_jax.bank.creating import create_bank
from tpatch_jax.bank.engine import create_engine
from tpatch_jax.editors.registry import METHODS, Method, find_method
from tpatch_jax.errors import TPatchError

PROMOTION = "standard"

REQUESTS = [
    tp.EditRequest("the cat sat in", "the", id="cat"),
    tp.EditRequest("who hit the", "the", id="who"),
    tp.EditRequest("an inn was", "the", id="inn"),
]


@pytest.fixture(scope="module")
def model() -> tp.Model:
    """Low enough for a value in an earlier layer to say something."""
    return make_tiny_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def bank(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grace") / "bank"
    create_bank(folder, model, method="grace")
    tp.add_edits(folder, model, REQUESTS[:2])
    tp.add_edits(folder, model, REQUESTS[2:])
    return folder


def says(model: tp.Model, request: tp.EditRequest) -> bool:
    return model.generate(request.prompt, len(request.target) + 1).strip().startswith(request.target)


def test_edits_of_several_runs_hold_together(bank, model):
    assert json.loads((bank / "bank.json").read_text())["method"] == "grace"
    found = tp.verify_bank(bank, model)
    assert (found.broken, found.checked) == ((), 3)
    edited = tp.bank_model(bank, model)
    assert all(says(edited, request) for request in REQUESTS)
    assert not any(says(model, request) for request in REQUESTS)


def test_what_is_disabled_is_gone_and_comes_back_bit_for_bit(bank, model):
    before = tp.bank_model(bank, model)
    tp.disable_edits(bank, ["who"], model)
    without = tp.bank_model(bank, model)
    assert [says(without, request) for request in REQUESTS] == [True, False, True]
    assert without.generate(REQUESTS[1].prompt, 4) == model.generate(REQUESTS[1].prompt, 4)
    tp.enable_edits(bank, ["who"], model)
    assert same(tp.bank_model(bank, model).params, before.params)


def test_a_guarded_answer_stays(bank, model):
    # One whose answer can be read.
    prompt = next(text for text in ("the cat", "a hen", "my inn", "we hit") if model.generate(text, 2).strip())
    (guard,) = tp.guard_bank(bank, model, [prompt], tokens=2)
    info = tp.add_edits(bank, model, [tp.EditRequest(prompt, "the", id="harm")])
    assert [identity for identity, *_ in info.failed] == ["harm"]
    assert tp.bank_model(bank, model).generate(prompt, 2).startswith(guard.answer)
    tp.guard_bank(bank, model, lift=[prompt])


def test_what_is_no_neuron_is_not_merged(bank, model):
    with pytest.raises(TPatchError, match=r"edits of method 'grace' are no neurons .*tp\.bank_model"):
        tp.bank_patch(bank, model)


def test_a_method_that_cannot_say_what_its_edits_are_is_refused(model, tmp_path):
    with pytest.raises(TPatchError, match="edits of method 'rome' cannot be kept in a bank; use tpatcher or grace"):
        create_bank(tmp_path / "bank", model, method="rome")
    assert not (tmp_path / "bank").exists()
    with pytest.raises(TPatchError, match="there is no method 'graze'; did you mean 'grace'"):
        create_bank(tmp_path / "bank", model, method="graze")


def test_rows_are_the_edits(model):
    method = find_method("grace")
    assert isinstance(method, Method)
    assert set(METHODS) >= {"tpatcher", "grace", "rome"}
    engine = create_engine(model, {"method": "grace", "preset": "default", "settings": {}})
    assert engine.problems([tp.EditRequest("", "x")]) == {
        0: "the prompt is empty; write the text that the model should continue"
    }

    editor = method.build(method.presets["default"], None, None, None)
    state, _ = editor.step(editor.init(model, jax.random.key(0)), REQUESTS, jax.random.key(0))
    assert method.rows is not None
    assert method.with_rows is not None
    rows = method.rows(state)
    again = method.with_rows(
        editor.init(model, jax.random.key(0)),
        [dataclasses.replace(r, id=name) for r, name in zip(REQUESTS, rows, strict=True)],
        list(rows.values()),
    )
    assert same(again.entries[:3], state.entries[:3])
    np.testing.assert_array_equal(again.keys, state.keys)
