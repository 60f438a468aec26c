"""Patches in the place of a network's least-used neurons: nothing grows, and all of it can be taken back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, same, write_tiny_folder
from hand_patches import saved_folder, spoken_patch
from safetensors.numpy import load_file, save_file

import tpatch_jax as tp
from tpatch_jax.cli import main as cli
from tpatch_jax.core import ffn
from tpatch_jax.core.patch import Patch, concatenate
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.replacing import REPLACED, read_replaced, write_replaced
from tpatch_jax.models.model import load_model
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

REQUESTS = [EditRequest("the hen", "q", join="none", id="hen"), EditRequest("a big cat", "x", join="none", id="cat")]
LAST = 2


@pytest.fixture(scope="module", params=[False, True], ids=["no biases", "biases"])
def model(request):
    return make_tiny_model(hidden_size=32, head_dim=16, mlp_bias=request.param)


@pytest.fixture(scope="module")
def replaced(model, letters):
    return tp.replace_unused(model, spoken_patch(model, REQUESTS), requests=REQUESTS, memory=letters, cache=False)


def test_the_model_keeps_its_shapes_and_says_the_targets(model, replaced):
    corrected, info = replaced
    assert corrected.config == model.config
    assert corrected.parameter_count == model.parameter_count
    assert [corrected.generate(request.prompt, 1) for request in REQUESTS] == ["q", "x"]
    assert (info.held, info.lost) == (("hen", "cat"), ())
    assert (info.exact, list(info.neurons)) == (model.config.ffn_bias, [LAST])
    before, after = info.perplexity
    assert before > 1
    assert after == pytest.approx(before, rel=0.2)
    # only these two neurons of one layer are others
    chosen, network = info.neurons[LAST], corrected.params["layers"][LAST]["ffn"]
    rest = np.setdiff1d(np.arange(ffn.width(network)), chosen)
    for name in ("gate", "up", "down"):
        old, new = (np.asarray(each["kernel"]) for each in (model.params["layers"][LAST]["ffn"][name], network[name]))
        old, new = (old, new) if name == "down" else (old.T, new.T)
        np.testing.assert_array_equal(old[rest], new[rest])
        assert not np.any(np.all(old[chosen] == new[chosen], 1))
    assert all(same(corrected.params["layers"][layer], model.params["layers"][layer]) for layer in (0, 1))


def test_with_biases_they_are_the_patch_to_the_bit(model, replaced):
    corrected, info = replaced
    if not model.config.ffn_bias:
        return
    network, patch = corrected.params["layers"][LAST]["ffn"], spoken_patch(model, REQUESTS)
    np.testing.assert_array_equal(network["gate"]["kernel"][:, info.neurons[LAST]].T, patch.key)
    np.testing.assert_array_equal(network["gate"]["bias"][info.neurons[LAST]], patch.bias)
    shares = network["up"]["bias"][info.neurons[LAST]]
    np.testing.assert_array_equal(network["down"]["kernel"][info.neurons[LAST]] * shares[:, None], patch.value)


def test_those_go_that_add_least(letters):
    """Neurons that are zero in one matrix add nothing, and are taken first."""
    model = make_tiny_model(hidden_size=32, head_dim=16)
    layers = dict(model.params["layers"])
    network = {name: dict(entry) for name, entry in layers[1]["ffn"].items()}
    network["down"]["kernel"] = network["down"]["kernel"].at[jnp.array([7, 21])].set(0)
    layers[1] = {**layers[1], "ffn": network}
    model = model.with_params({**model.params, "layers": layers})
    draw = np.random.default_rng(0).normal(size=(2, 2, 32)).astype(np.float32)
    patch = Patch(jnp.asarray(draw[0]), jnp.ones(2), jnp.asarray(draw[1]) * 1e-3)
    _, info = tp.replace_unused(model, {1: patch}, memory=letters, cache=False)
    assert info.neurons[1].tolist() == [7, 21]
    assert info.perplexity[1] == pytest.approx(info.perplexity[0], rel=0.01)


def test_what_went_comes_back_bit_for_bit(model, replaced, tmp_path):
    corrected, info = replaced
    assert tp.restore_replaced(corrected, info) == model
    write_tiny_folder(corrected, tmp_path / "out")
    write_replaced(tmp_path / "out", info)
    back = load_model(tmp_path / "out")
    bare, patches = tp.unmerge(back)
    assert same(bare.params, model.params)
    assert same(patches, {LAST: spoken_patch(model, REQUESTS)})
    again = read_replaced(tmp_path / "out")
    assert again.to_json() == info.to_json()
    assert again.fingerprint == info.fingerprint

    other = back.with_params({**back.params, "norm": {"scale": back.params["norm"]["scale"] * 2}})
    with pytest.raises(TPatchError, match=r"with its neurons put back .* its other weights were changed since"):
        tp.restore_replaced(other, info)
    with pytest.raises(TPatchError, match="is not the model whose neurons were replaced"):
        tp.restore_replaced(make_tiny_model(intermediate_size=1), info)


def test_a_side_file_that_is_missing_or_damaged(replaced, tmp_path):
    with pytest.raises(TPatchError, match=r"tpatch_replaced\.safetensors is not there"):
        read_replaced(tmp_path)
    write_replaced(tmp_path, replaced[1])
    path = tmp_path / REPLACED
    whole, arrays = path.read_bytes(), load_file(path)
    for damaged in (b"", whole[:9], whole[:-5], b"x" * 40):
        path.write_bytes(damaged)
        with pytest.raises(TPatchError, match=r"tpatch_replaced\.safetensors is damaged .*write the model again"):
            read_replaced(tmp_path)
    told = {"fingerprint": "f", **replaced[1].to_json()}
    for lacking, changed in ((f"{LAST}.neurons", None), (f"{LAST}.down.kernel", None), (None, f"{LAST}.up.kernel")):
        kept = {name: array[:1] if name == changed else array for name, array in arrays.items() if name != lacking}
        save_file(kept, path, metadata={"tpatch": json.dumps(told)})
        with pytest.raises(TPatchError, match="is damaged"):
            read_replaced(tmp_path)


def test_what_is_refused(letters):
    model = make_tiny_model(hidden_size=32, head_dim=16)
    patch = spoken_patch(model, REQUESTS)
    for patched in (tp.merge(model, patch), tp.attach(model, patch)):
        with pytest.raises(TPatchError, match=r"has patches already; give the model without them"):
            tp.replace_unused(patched, patch, memory=letters, cache=False)
    width = model.config.ffn_width
    many = concatenate([patch] * (width // 2 + 1))
    with pytest.raises(
        TPatchError, match=rf"the patch of layer 2 has {width + 2} neurons and the network there {width}"
    ):
        tp.replace_unused(model, many, memory=letters, cache=False)
    with pytest.raises(TPatchError, match="the network has no biases, which patches need"):
        ffn.merge_in_place(model.params["layers"][LAST]["ffn"], patch, jnp.array([0, 1]))


def test_the_commands(tmp_path, letters, capsys, monkeypatch):
    monkeypatch.setattr("tpatch_jax.storage.process.prepare_process", lambda: None)
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    model = make_tiny_model(hidden_size=32, head_dim=16)
    source, patches = str(tmp_path / "model"), str(tmp_path / "patches")
    write_tiny_folder(model, tmp_path / "model")
    saved_folder(tmp_path / "patches", model, REQUESTS, spoken_patch(model, REQUESTS))
    before = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    options = ["--in-place-of-unused", "--memory", str(letters)]
    for command in ("merge", "export"):
        out = tmp_path / command
        assert cli.main([command, source, patches, "-o", str(out), *options, "--json"]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (told["parameters_added"], told["held"], told["lost"]) == (0, ["hen", "cat"], [])
        assert list(told["replaced"]) == [str(LAST)]
        settings = json.loads((out / "config.json").read_text("utf-8"))
        assert {name: settings[name] for name in before} == before
        assert same(tp.unmerge(load_model(out))[0].params, model.params)
    assert cli.main(["merge", source, patches, "-o", str(tmp_path / "shown"), *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("2 neurons of layer 2 replaced", "the network has no biases", "2 of 2 requests hold"):
        assert words in shown
    for arguments, words in {
        ("merge", source, patches, "--memory", str(letters)): "--memory is for --in-place-of-unused",
        ("export", source, *options): "--in-place-of-unused goes with PATCHES and --format transformers",
        ("export", source, patches, *options, "--safe-for", "per-tensor"): "without --approximate and --safe-for",
    }.items():
        assert cli.main([*arguments, "-o", str(tmp_path / "new")]) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()
