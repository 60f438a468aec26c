"""`tpatch verify`: which edits hold in a model, and in what was made of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, write_tiny_folder
from hand_patches import saved_folder, spoken_patch

import tpatch_jax as tp
from tpatch_jax.cli import main as cli
from tpatch_jax.editors.holding import requests_held
from tpatch_jax.evaluation.verifying import place_edits, read_edits
from tpatch_jax.models.model import load_model, save_model
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

REQUESTS = [EditRequest("the hen", "q", join="none", id="hen"), EditRequest("a big cat", "x", join="none", id="cat")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    model = make_tiny_model(hidden_size=32, head_dim=16, intermediate_size=64, max_position_embeddings=128)
    write_tiny_folder(model, folder / "base")
    base = load_model(str(folder / "base"))
    patch = spoken_patch(base, REQUESTS)
    saved_folder(folder / "patches", base, REQUESTS, patch)
    corrected = tp.merge(base, patch)
    save_model(corrected, folder / "merged")
    tp.export_model(corrected, folder / "stock")
    tp.export_gguf(corrected, folder / "q8.gguf", type="q8_0")
    # Somebody's tool has rounded every weight of the stock folder, and lost the second neuron.
    stock = load_model(str(folder / "stock"))
    last = stock.params["layers"][2]["ffn"]
    down = {**last["down"], "kernel": last["down"]["kernel"].at[65].set(0)}
    layers = {**stock.params["layers"], 2: {**stock.params["layers"][2], "ffn": {**last, "down": down}}}
    save_model(stock.with_params({**stock.params, "layers": layers}), folder / "pruned")
    write_tiny_folder(make_tiny_model(), folder / "other")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        patching.setenv("COLUMNS", "200")
        yield folder


def run(capsys, *arguments):
    code = cli.main(["verify", *map(str, arguments), "--json"])
    assert code == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


STATES = {"base": "attached", "merged": "merged", "stock": "as it is", "q8.gguf": "as it is"}


@pytest.mark.parametrize("name", STATES)
def test_edits_hold_in_the_model_and_in_what_was_made_of_it(place, name):
    edits = read_edits(place / "patches")
    asked = place_edits(edits, load_model(str(place / name)))
    assert asked.state == STATES[name]
    assert requests_held(asked.model, edits.requests) == [True, True]
    # What the model says without the edits is known where it is at hand.
    assert (asked.unedited is None) == (STATES[name] == "as it is")
    if asked.unedited is not None:
        assert requests_held(asked.unedited, edits.requests) == [False, False]


def test_what_was_lost_is_named(place, capsys):
    told = run(capsys, place / "pruned", place / "patches", "--base", place / "base")
    assert (told["state"], told["held"], told["lost"], told["broken"]) == ("as it is", ["hen"], ["cat"], ["cat"])
    assert told["unedited"]["bare"]["said"] == 0
    assert cli.main(["verify", str(place / "pruned"), str(place / "patches")]) == 0
    shown = capsys.readouterr().out
    assert "has other weights than the edits" in shown
    assert "1 of 2 edits hold" in shown
    assert "lost cat" in shown


def test_other_neurons_among_the_weights_are_none_of_these_edits(place):
    base, edits = load_model(str(place / "base")), read_edits(place / "patches")
    own, other = edits.patches, {1: spoken_patch(base, [EditRequest("a big hen", "x", join="none")])}
    assert place_edits(edits, tp.merge(base, other)).state == "as it is"
    both = place_edits(edits, tp.merge(tp.merge(base, other), own))
    assert (both.state, both.unedited is not None) == ("merged", True)


def test_what_was_not_asked_counts_as_neither(place, capsys):
    arguments = (place / "base", place / "patches", "--forms", "lower")
    told = run(capsys, *arguments)
    assert (told["checked"], told["broken"], told["unasked"]) == (0, [], ["hen", "cat"])
    assert cli.main(["verify", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    assert "0 of 0 edits are said in every form" in shown
    assert "2 of 2 edits were not asked: " in shown


def test_each_edit_is_told_apart(place):
    base = load_model(str(place / "base"))
    edits = read_edits(place / "patches")
    assert requests_held(base, edits.requests) == [False, False]
    assert requests_held(place_edits(edits, base).model, edits.requests) == [True, True]
    assert requests_held(load_model(str(place / "pruned")), edits.requests) == [True, False]
    assert requests_held(base, []) == []


def test_models_that_cannot_have_the_edits_are_refused(place, capsys):
    patches = str(place / "patches")
    assert cli.main(["verify", str(place / "other"), patches]) == 1
    assert "is for a model that is 32 wide and the model 16" in capsys.readouterr().err
    assert cli.main(["verify", str(place / "stock"), patches, "--base", str(place / "merged")]) == 1
    assert "is not the model that" in capsys.readouterr().err
    assert cli.main(["verify", str(place / "base"), str(place / "other")]) == 1
    assert "has no patches.json" in capsys.readouterr().err


def test_the_uncorrected_model_in_another_precision_is_asked_as_it_is(place):
    edits, rough = read_edits(place / "patches"), load_model(str(place / "base"), dtype="bfloat16")
    asked = place_edits(edits, rough)
    assert (asked.state, asked.unedited) == ("as it is", None)
    assert np.all(np.asarray(asked.model.params["embed"]["embedding"] == rough.params["embed"]["embedding"]))
    assert jnp.bfloat16 == rough.params["embed"]["embedding"].dtype
