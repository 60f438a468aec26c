"""Patches among weights that are quantised per tensor: they set no scale, and still say what they said."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, write_tiny_folder
from hand_patches import saved_folder, spoken_patch, with_outliers
from tiny_families import tiny_model

from tpatch_jax.cli import main as cli
from tpatch_jax.core import ffn
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.per_tensor import (
    choose_copies,
    choose_scales,
    fit_to_network,
    merge_per_tensor,
    split_neurons,
    weight_excess,
)
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.export import export_model
from tpatch_jax.models.checkpoints.outliers import activation_sizes, spread_outliers
from tpatch_jax.models.model import load_model
from tpatch_jax.models.patching import merge
from tpatch_jax.models.shapes import merged_neurons
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

WIDTH, HIDDEN, SHARP = 128, 32, 64.0


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def network(gated: bool) -> dict:
    params = {"up": {"kernel": draw(HIDDEN, WIDTH) / 6}, "down": {"kernel": draw(WIDTH, HIDDEN) / 12}}
    params |= {"gate": {"kernel": draw(HIDDEN, WIDTH + 1)[:, 1:] / 6}} if gated else {}
    # as trained networks have it, a few weights are far larger than all others
    return {name: {"kernel": jnp.asarray(entry["kernel"]).at[3, 5].set(3.0)} for name, entry in params.items()}


def sharp_patch() -> tuple[Patch, np.ndarray]:
    """Two neurons whose response together is level from 80 on, and a query at which they fire by 400 and by 320."""
    query = draw(1, HIDDEN)[0]
    key = SHARP * query
    key[0] *= 2
    bias = 400 - query @ key
    value = draw(2, HIDDEN)[0] * 0.05
    patch = Patch(*(jnp.asarray(each, jnp.float32) for each in ([key, key], [bias, bias - 80], [value, -value])))
    return patch, query


def rounded(params: dict) -> dict:
    """Every matrix in INT8 with a scale of its own."""

    def one(kernel):
        scale = jnp.abs(kernel).max() / 127
        return jnp.round(kernel / scale) * scale

    return {name: {**entry, "kernel": one(entry["kernel"])} for name, entry in params.items()}


@pytest.mark.parametrize("gated", [False, True])
def test_rounded_per_tensor_the_network_is_as_near_as_without_a_patch_and_the_patch_speaks(gated):
    params, (patch, query) = network(gated), sharp_patch()
    rows = jnp.asarray(draw(64, HIDDEN))
    wanted, said = (ffn.apply(params, x, "silu") for x in (rows, query))
    change = np.asarray(ffn.apply(ffn.attach(params, patch), query, "silu") - said)
    error = lambda network, x, wanted: float(jnp.abs(ffn.apply(rounded(network), x, "silu") - wanted).mean())  # noqa: E731

    plain, safe = ffn.merge(params, patch), merge_per_tensor(params, patch, np.stack([query, query]))
    usual = error(params, rows, wanted)
    assert error(plain, rows, wanted) > 3 * usual
    assert error(safe, rows, wanted) < 1.1 * usual
    assert ffn.width(safe) - WIDTH == 2
    assert weight_excess(plain, 2) > 20
    assert weight_excess(safe, 2) <= 1 + 1e-6
    # with its key as it is a neuron is less sharp and its value larger, so that without a gate two stand for it
    uncut = merge_per_tensor(params, patch, None)
    assert ffn.width(uncut) - WIDTH == (2 if gated else 4)
    assert weight_excess(uncut, ffn.width(uncut) - WIDTH) <= 1 + 1e-6
    safe = rounded(safe)
    spoken = np.asarray(ffn.apply(safe, query, "silu") - ffn.apply(rounded(params), query, "silu"))
    assert spoken @ change / (change @ change) == pytest.approx(1, abs=0.1)
    # where it is silent it stays so: a hundredth of what it says
    for name, bare in (("exact", ffn.merge(params, patch)), ("safe", uncut)):
        assert float(jnp.abs(ffn.apply(bare, rows, "silu") - wanted).max()) < 0.01 * np.abs(change).max(), name


def test_what_becomes_of_a_neuron():
    params, (patch, query) = network(True), sharp_patch()
    largest = {name: float(jnp.abs(params[name]["kernel"]).max()) for name in params}
    fitted = fit_to_network(params, patch, np.stack([query, np.full(HIDDEN, np.nan)]))
    key, whole = np.abs(np.asarray(fitted.patch.key)), np.abs(np.asarray(patch.key))
    np.testing.assert_allclose(key.max(1), largest["gate"], rtol=1e-6)
    # the first is cut at half of its largest entry, the second, of which no query is known, is not
    np.testing.assert_allclose(fitted.factors, np.array([0.5, 1]) * whole.max(1) / largest["gate"], rtol=1e-6)
    np.testing.assert_allclose(key[1] * fitted.factors[1], whole[1], rtol=1e-5)
    inputs = np.asarray(fitted.patch.key @ query + fitted.patch.bias) * fitted.factors
    np.testing.assert_allclose(inputs, [400, 320], rtol=1e-3)
    rows = np.abs(np.asarray(fitted.patch.value)).max(1) / np.asarray(fitted.shares)
    assert np.all(rows <= largest["down"] * (1 + 1e-6))
    assert np.all(np.log2(fitted.shares) % 1 == 0)
    # a neuron that fits already stays as it is
    mild = Patch(jnp.full((1, HIDDEN), 0.1), jnp.ones(1), jnp.full((1, HIDDEN), 0.1))
    same = fit_to_network(params, mild, None)
    assert (same.factors.tolist(), same.shares.tolist()) == ([1], [1])
    np.testing.assert_allclose(same.patch.key, mild.key, rtol=1e-6)


def rounded_input(x: np.ndarray) -> np.ndarray:
    """Activations in as many steps as torch has, one scale for all."""
    step = (max(x.max(), 0) - min(x.min(), 0)) / 127
    return np.round(x / step) * step


def test_neurons_share_a_hidden_value_that_would_set_the_scale_of_all():
    params = network(True)
    params["up"]["bias"], params["gate"]["bias"] = jnp.ones(WIDTH), jnp.zeros(WIDTH)
    # as in trained networks, one neuron fires hundreds of times as strongly as all others, at one token
    rows, loud = draw(64, HIDDEN), jnp.arange(WIDTH) == 7
    rows[0, 4] = 20
    for name in ("gate", "up"):
        params[name]["kernel"] = params[name]["kernel"].at[4].set(jnp.where(loud, 2.5, 0.01))
    hidden = lambda network, x: np.asarray(ffn.hidden(network, jnp.asarray(x), "silu"), np.float64)  # noqa: E731
    values = np.abs(hidden(params, rows))
    copies = choose_copies(params, values.max(0), np.square(values).mean(0), 256)
    assert copies.max() > 8
    assert 0 < copies.sum() - WIDTH <= 256
    split = split_neurons(params, copies)
    assert ffn.width(split) == copies.sum()
    before, after = (np.asarray(ffn.apply(each, jnp.asarray(rows), "silu")) for each in (params, split))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
    assert np.abs(hidden(split, rows)).max() < values.max() / 4

    def error(network: dict) -> float:
        """Of the other tokens, where ``down`` reads activations that are rounded together."""
        output = rounded_input(hidden(network, rows)) @ np.asarray(network["down"]["kernel"])
        return float(np.abs(output - before)[1:].mean())

    assert error(split) < error(params) / 4
    # No part is lost where the weights are rounded, as equal parts would be: together they read what the whole does.
    part = rounded({"up": split["up"]})["up"]["kernel"]
    neuron = int(copies.argmax())
    places = np.concatenate([np.arange(WIDTH), np.repeat(np.arange(WIDTH), copies - 1)])
    step = float(jnp.abs(split["up"]["kernel"]).max()) / 127
    whole, parts = (np.asarray(each, np.float64) for each in (params["up"]["kernel"], part))
    np.testing.assert_allclose(parts[:, places == neuron].sum(1), whole[:, neuron], atol=0.51 * step)
    # nothing to gain, no room: nothing is split
    assert choose_copies(params, np.ones(WIDTH), np.ones(WIDTH), 256).tolist() == [1] * WIDTH
    assert choose_copies(params, values.max(0), np.square(values).mean(0), 0).tolist() == [1] * WIDTH
    assert split_neurons(params, np.ones(WIDTH, int)) is params


REQUESTS = [EditRequest("the hen", "q", join="none", id="hen"), EditRequest("a big cat", "x", join="none", id="cat")]


def test_what_matrices_read_is_divided_by_powers_of_two_where_that_costs_least():
    kernels, rows = [draw(HIDDEN, WIDTH) / 6, draw(HIDDEN, 48) / 6], draw(64, HIDDEN)
    # as norms return them: a dimension far larger than all others
    rows[:, 4] *= 40
    scales = choose_scales(kernels, np.abs(rows).max(0), np.square(rows).mean(0))
    assert np.all(np.log2(scales) % 1 == 0)
    assert scales[4] == scales.max() > 1
    assert np.sum(scales != 1) < HIDDEN / 2

    def error(scales: np.ndarray) -> float:
        read = rounded_input(rows / scales)
        weights = [
            np.asarray(rounded({"up": {"kernel": jnp.asarray(k * scales[:, None])}})["up"]["kernel"]) for k in kernels
        ]
        return sum(float(np.square(read @ w - rows @ k).sum()) for w, k in zip(weights, kernels, strict=True))

    assert error(scales) < error(np.ones(HIDDEN)) / 4
    assert choose_scales([np.ones((4, 8))], np.ones(4), np.ones(4)).tolist() == [1] * 4


def test_outliers_are_found_at_every_token_and_spread():
    model = with_outliers(make_tiny_model(hidden_size=32, head_dim=16))
    rows = [model.encode("the hen"), model.encode("a big cat and a hen")]
    sizes = activation_sizes(model, rows)
    network, queries = model.params["layers"][2]["ffn"], [model.trace(jnp.asarray([row]), 2).query[0] for row in rows]
    query = np.abs(np.concatenate(queries))
    hidden = np.abs(np.asarray(ffn.hidden(network, jnp.concatenate(queries), "silu")))
    for name, values in (("norm_2", query), ("hidden", hidden)):
        np.testing.assert_allclose(sizes[2][name].largest, values.max(0), rtol=1e-4)
        weights = 1 / np.square(values).sum(1)
        np.testing.assert_allclose(sizes[2][name].square, weights @ np.square(values) / weights.sum(), rtol=1e-4)

    width, batch = model.config.ffn_width, jnp.asarray([rows[1]])
    spread, added = spread_outliers(model, rows, width + 40)
    widths = [ffn.width(layer["ffn"]) for layer in spread.params["layers"].values()]
    assert added == sum(widths) - 3 * width > 0
    assert max(widths) <= width + 40
    np.testing.assert_allclose(spread.apply(batch), model.apply(batch), rtol=1e-3, atol=1e-4)
    # without room no neuron is split, and what is left, powers of two, changes no bit
    scaled, added = spread_outliers(model, rows, width)
    assert added == 0
    assert any(
        jnp.any(scaled.params["layers"][i]["norm_2"]["scale"] != model.params["layers"][i]["norm_2"]["scale"])
        for i in range(3)
    )
    np.testing.assert_array_equal(scaled.apply(batch), model.apply(batch))
    # no gate to split, but norms with a bias
    gpt2 = tiny_model("gpt2")
    row = [1, 2, 3]
    spread, added = spread_outliers(gpt2, [row], gpt2.config.ffn_width + 40)
    assert added == 0
    np.testing.assert_allclose(spread.apply(jnp.asarray([row])), gpt2.apply(jnp.asarray([row])), rtol=1e-5, atol=1e-5)
    t5 = tiny_model("t5")
    assert spread_outliers(t5, [row], t5.config.ffn_width + 40) == (t5, 0)


def test_a_safe_export_and_what_it_says_of_itself(tmp_path, letters, capsys, monkeypatch):
    monkeypatch.setattr("tpatch_jax.storage.process.prepare_process", lambda: None)
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    model = with_outliers(make_tiny_model(hidden_size=32, head_dim=16))
    merged = merge(model, spoken_patch(model, REQUESTS))
    plain = export_model(merged, tmp_path / "plain")
    assert plain.weight_excess > 10
    assert (plain.safe_for, plain.error, plain.held_rounded) == (None, None, ())
    info = export_model(
        merged, tmp_path / "safe", safe_for="per-tensor", requests=REQUESTS, memory=letters, cache=False
    )
    assert (info.form, info.safe_for, info.ffn_width) == ("exact", "per-tensor", plain.ffn_width)
    assert info.weight_excess <= 1 + 1e-6
    # neurons that share what one had take the places of silent ones
    assert info.split_neurons + info.silent_neurons == plain.silent_neurons
    assert info.split_neurons > 0
    assert (info.error.held, info.error.lost) == (("hen", "cat"), ())
    assert (info.held_rounded, info.lost_rounded) == (("hen", "cat"), ())
    assert info.error.same_argmax > 0.9
    back = load_model(tmp_path / "safe")
    assert [back.generate(request.prompt, 1) for request in REQUESTS] == ["q", "x"]

    with pytest.raises(TPatchError, match="has no patches, so there is nothing to make safe"):
        export_model(model, tmp_path / "out", safe_for="per-tensor", memory=letters, cache=False)
    with pytest.raises(TPatchError, match="safe_for='int8' is no way to quantise; give 'per-tensor'"):
        export_model(merged, tmp_path / "out", safe_for="int8")
    gemma = tiny_model("gemma2")
    patch = Patch(*(jnp.ones(shape) for shape in ((1, gemma.config.hidden_size), (1,), (1, gemma.config.hidden_size))))
    with pytest.raises(TPatchError, match=r"cannot be made safe for quantising per tensor: .* per channel"):
        export_model(merge(gemma, patch), tmp_path / "out", approximate=True, safe_for="per-tensor")
    assert not (tmp_path / "out").exists()

    write_tiny_folder(model, tmp_path / "model")
    saved_folder(tmp_path / "patches", model, REQUESTS, spoken_patch(model, REQUESTS))
    command = ["export", str(tmp_path / "model"), str(tmp_path / "patches"), "--memory", str(letters), "-o"]
    assert cli.main([*command, str(tmp_path / "one"), "--safe-for", "per-tensor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["safe_for"], told["held_rounded"], told["lost_rounded"]) == ("per-tensor", ["hen", "cat"], [])
    assert merged_neurons(model.config, load_model(tmp_path / "one").params) != {}
    assert cli.main([*command[:3], "-o", str(tmp_path / "two")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not safe for INT8 per tensor: the largest weight of the patches is" in shown
    assert cli.main([*command, str(tmp_path / "three"), "--safe-for", "per-tensor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "in INT8 with one scale for each matrix 2 of 2 requests hold" in shown
    assert "not safe" not in shown
    assert cli.main([*command[:3], "-o", str(tmp_path / "x.gguf"), "--format", "gguf", "--safe-for", "per-tensor"]) == 1
    assert "--safe-for is for --format transformers" in " ".join(capsys.readouterr().err.split())
