"""Weights in INT8 with float patches beside them."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, relative, write_tiny_folder
from hand_patches import spoken_patch
from tiny_families import tiny_model

import tpatch_jax as tp
from tpatch_jax.cli import main as cli
from tpatch_jax.core.int8 import is_int8, plain, quantise
from tpatch_jax.editors.holding import requests_held
from tpatch_jax.editors.locft import LocftSettings, check_locft
from tpatch_jax.editors.wise import WiseSettings, check_wise
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model, load_model, save_model
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "restored")
PROMOTION = "standard"

pytest.importorskip("qwix", reason="weights in INT8 need the 'int8' extra")

REQUESTS = [EditRequest("the hen", "q", join="none", id="hen"), EditRequest("a big cat", "x", join="none", id="cat")]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(5, 200, (2, 9)))


def stored(model: Model) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


@pytest.fixture(scope="module")
def base():
    return make_tiny_model(hidden_size=64, head_dim=32, intermediate_size=128)


@pytest.fixture(scope="module")
def small(base):
    return tp.quantize_base(base)


@pytest.mark.parametrize("channels", [0, 1])
def test_each_channel_has_a_scale_of_its_own(channels):
    weights = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    weights[0, 0] = 100.0
    array = quantise(jnp.asarray(weights), channels)
    scale = np.abs(weights).max(1 - channels, keepdims=True) / 127.5
    assert array.qvalue.dtype == jnp.int8
    np.testing.assert_allclose(array.scale, scale, rtol=1e-6)
    assert np.all(np.abs(np.asarray(plain(array)) - weights) <= scale * 0.505)


def test_a_model_in_int8_is_the_one_that_its_weights_stand_for(base, small):
    float_again = tp.dequantize_base(small)
    assert (base.dtype, small.dtype, float_again.dtype) == ("float32", "int8", "float32")
    assert stored(small) < 0.3 * stored(base)
    assert relative(small.apply(TOKENS), float_again.apply(TOKENS)) < 1e-5
    assert 0 < relative(small.apply(TOKENS), base.apply(TOKENS)) < 0.05
    assert small.generate("the hen", 6) == float_again.generate("the hen", 6)
    assert len({fingerprint(each) for each in (base, small, float_again)}) == 3
    assert tp.dequantize_base(base) is base
    again = tp.quantize_base(small)
    assert fingerprint(again) == fingerprint(small)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_other_architectures_have_it_too(family):
    model = tiny_model(family)
    small = tp.quantize_base(model)
    assert any(map(is_int8, jax.tree.leaves(small.params, is_leaf=is_int8)))
    rows = jnp.asarray(np.random.default_rng(1).integers(5, 40, (2, 7)))
    batch = tp_batch(model, rows)
    assert relative(small.apply(batch), tp.dequantize_base(small).apply(batch)) < 1e-4
    assert relative(small.apply(batch), model.apply(batch)) < 0.2


def tp_batch(model, rows):
    from tpatch_jax.models.networks import Pair

    return Pair(rows, rows) if model.config.encoder else rows


def test_patches_stay_in_float_beside_it(small):
    patch = spoken_patch(plain_weights(small), REQUESTS)
    assert requests_held(small, REQUESTS) == [False, False]
    attached = tp.attach(small, patch)
    assert attached.params["layers"][2]["ffn"]["patch"].key.dtype == jnp.float32
    assert requests_held(attached, REQUESTS) == [True, True]
    with pytest.raises(TPatchError, match=r"weights are in INT8.*tp\.dequantize_base"):
        tp.merge(small, patch)
    merged = tp.merge(tp.dequantize_base(small), patch)
    assert relative(merged.apply(TOKENS), attached.apply(TOKENS)) < 1e-4
    assert fingerprint(tp.detach(attached)) == fingerprint(small)


def plain_weights(small):
    return tp.dequantize_base(small)


def test_what_needs_plain_weights_says_so(small, tmp_path):
    calls = {
        "save_model": lambda: save_model(small, tmp_path / "a"),
        "export_model": lambda: tp.export_model(small, tmp_path / "b"),
        "export_gguf": lambda: tp.export_gguf(small, tmp_path / "c.gguf"),
    }
    for name, call in calls.items():
        with pytest.raises(TPatchError, match=f"has weights in INT8, and {name} needs plain ones"):
            call()
    checks = {"LocFT": lambda: check_locft(small, LocftSettings()), "WISE": lambda: check_wise(small, WiseSettings())}
    for name, call in checks.items():
        with pytest.raises(TPatchError, match=f"has weights in INT8, and {name} needs plain ones"):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(TPatchError, match="use 'float32' or 'bfloat16', or 'int8'"):
        load_model("smollm2-135m", dtype="int4")


def test_without_qwix_the_error_says_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(TPatchError, match=r"need the qwix package: pip install"):
        tp.quantize_base(base)


def test_an_edit_is_fitted_through_the_network_in_int8(base, letters, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    folder = str(write_tiny_folder(base, tmp_path / "tiny"))
    single = ["--prompt", "the hen", "--target", "q", "--join", "none", "--memory", str(letters)]
    quick = ["--set", "site=last", "--set", "key_steps=24", "--set", "value_steps=8"]
    out = str(tmp_path / "out")
    assert cli.main(["edit", folder, *single, *quick, "--set", "base=int8", "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"][0]["after"].startswith("q")
    about = json.loads((tmp_path / "out" / "patches.json").read_text("utf-8"))["model"]
    assert about["dtype"] == "int8"
    small = load_model(folder, dtype="int8")
    assert about["fingerprint"] == fingerprint(small)
    assert cli.main(["generate", folder, "--patches", out, "--prompt", "the hen", "--dtype", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"].startswith("q")
    # The float model is another one; merged, the patches go into the weights that those in INT8 stand for.
    assert cli.main(["generate", folder, "--patches", out, "--prompt", "the hen"]) == 1
    assert "was made for" in capsys.readouterr().err.replace("were made for", "was made for")
    assert cli.main(["merge", folder, out, "-o", str(tmp_path / "merged"), "--dtype", "int8", "--json"]) == 0
    merged, attached = load_model(str(tmp_path / "merged")), tp.attach(small, tp.load_patches(out, small))
    assert relative(merged.apply(TOKENS), attached.apply(TOKENS)) < 1e-4
    for extra, message in {
        ("--set", "base=int4"): "is no precision of a base model",
        ("--set", "base=int8", "--dtype", "bfloat16"): "say different things",
    }.items():
        assert cli.main(["edit", folder, *single, *extra, "-o", str(tmp_path / "no")]) == 1
        assert message in capsys.readouterr().err
