"""ROME, R-ROME and MEMIT: the algebra of their updates, their statistics, edits of a tiny model, and the harness."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative, same
from hypothesis import given
from hypothesis import strategies as st
from test_evaluation import make_records
from tiny_families import tiny_model as make_family

from tpatch_jax import EditRequest, TPatchError
from tpatch_jax.core import ffn
from tpatch_jax.core.patch import create
from tpatch_jax.editors.base import Editor
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.registry import METHODS, method_settings
from tpatch_jax.editors.rome import hidden_moment as statistics
from tpatch_jax.editors.rome.hidden_moment import hidden_moment, moment_rows, sampled_contexts
from tpatch_jax.editors.rome.memit import MemitSettings, memit, memit_layers, memit_weight
from tpatch_jax.editors.rome.rank_one import damped, distribute_update, rank_one
from tpatch_jax.editors.rome.rome import R_ROME_PRESETS, ROME_PRESETS, RomeSettings, find_update, rome, rome_layer
from tpatch_jax.editors.rome.state import Attempt, RomeState, edited, report, restore, save, says
from tpatch_jax.editors.rome.subject_value import (
    OffsetInfo,
    ValueSettings,
    fork_requests,
    round_network,
    train_offsets,
    value_rows,
)
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.models.rows import tokens_array

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "few")

KEY = jax.random.key(0)
# A random model's attention carries little on, so each prompt ends with its subject.
LOOSE = ValueSettings(clamp=50.0, value_rate=2.0)
ROME = RomeSettings(layer="1", value=LOOSE)
MEMIT = MemitSettings(layers="0,1", value=LOOSE, moment_weight="1")
REQUESTS = (
    EditRequest("He met Eve", "the", "Eve", id="eve"),
    EditRequest("We hit Bob", "t", "Bob", id="bob"),
    EditRequest("He met Cyd", "the", "Cyd", id="cyd"),
)


class Begun(NamedTuple):
    editor: Editor
    fresh: RomeState


@pytest.fixture(scope="module")
def of_rome(tiny_model: Model, letters: Path, few: None) -> Begun:
    editor = rome(ROME, memory=letters)
    return Begun(editor, editor.init(tiny_model, KEY))


@pytest.fixture(scope="module")
def of_memit(tiny_model: Model, letters: Path, few: None) -> Begun:
    editor = memit(MEMIT, memory=letters)
    return Begun(editor, editor.init(tiny_model, KEY))


# --- algebra ---


def network(inner: int, outer: int, bias: bool, seed: int) -> tuple[dict[str, Any], np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    down = {"kernel": jnp.asarray(rng.normal(size=(inner, outer)), jnp.float32)}
    down |= {"bias": jnp.asarray(rng.normal(size=outer), jnp.float32)} if bias else {}
    # Neurons of very different loudness, as real ones are.
    rows = rng.normal(size=(4 * inner, inner)) * np.exp(rng.normal(size=inner))
    params = {"up": {"kernel": jnp.ones((outer, inner), jnp.float32)}, "down": down}
    return params, (rows.T @ rows / len(rows)).astype(np.float32), rng


def said(params: dict[str, Any], x: Any) -> np.ndarray:
    down = params["down"]
    return np.asarray(x, np.float64) @ np.asarray(down["kernel"], np.float64) + np.asarray(down.get("bias", 0.0))


# Of few sizes, so that little is compiled.
SIZES = {
    "inner": st.sampled_from([2, 9]),
    "outer": st.sampled_from([1, 5]),
    "bias": st.booleans(),
    "seed": st.integers(0, 99),
}


@given(**SIZES)
def test_a_key_gets_its_value_and_what_is_orthogonal_stays(inner: int, outer: int, bias: bool, seed: int) -> None:
    params, moment, rng = network(inner, outer, bias, seed)
    key, at, value = rng.normal(size=inner), rng.normal(size=inner), rng.normal(size=outer)
    direction = np.linalg.solve(moment.astype(np.float64), key)
    direction /= np.linalg.norm(direction)
    at += key * np.sign(at @ direction) * np.sign(key @ direction)  # not nearly orthogonal itself
    asked, wanted, known, prompt = (jnp.asarray(array, jnp.float32) for array in (key, value, moment, at))
    for bare in (None, prompt):
        after = rank_one(params, asked, wanted, known, at=bare)
        where = key if bare is None else at
        np.testing.assert_allclose(said(after, where), value, rtol=2e-4, atol=2e-4)
        other = rng.normal(size=inner)
        other -= (other @ direction) * direction
        np.testing.assert_allclose(said(after, other), said(params, other), rtol=2e-3, atol=2e-3)
        change = np.asarray(after["down"]["kernel"]) - np.asarray(params["down"]["kernel"])
        expected = np.outer(direction, (value - said(params, where)) / (where @ direction))
        np.testing.assert_allclose(change, expected, rtol=2e-3, atol=2e-3)
        assert after["up"] is params["up"]
        assert after["down"].get("bias") is params["down"].get("bias")


@given(**SIZES, count=st.sampled_from([1, 4]), weight=st.sampled_from([0.1, 1.0, 100.0]))
def test_many_keys_move_as_least_squares_say(
    inner: int, outer: int, bias: bool, seed: int, count: int, weight: float
) -> None:
    params, moment, rng = network(inner, outer, bias, seed)
    keys, residuals = rng.normal(size=(count, inner)), rng.normal(size=(count, outer))
    asked, wanted, known = (jnp.asarray(array, jnp.float32) for array in (keys, residuals, moment))
    after = distribute_update(params, asked, wanted, known, weight)
    change = np.asarray(after["down"]["kernel"], np.float64) - np.asarray(params["down"]["kernel"], np.float64)

    def objective(added: np.ndarray) -> float:
        return np.sum((keys @ added - residuals) ** 2) + weight * np.trace(added.T @ moment @ added)

    expected = np.linalg.solve(weight * moment.astype(np.float64) + keys.T @ keys, keys.T @ residuals)
    np.testing.assert_allclose(change, expected, rtol=1e-2, atol=1e-3)
    for _ in range(3):
        assert objective(expected) <= objective(expected + 0.1 * rng.normal(size=change.shape))
    # Order makes no difference, and nothing asked for is nothing done.
    turned = distribute_update(params, asked[::-1], wanted[::-1], known, weight)
    assert relative(turned["down"]["kernel"], after["down"]["kernel"]) < 1e-4
    nothing = distribute_update(params, asked, 0 * wanted, known, weight)
    assert same(nothing["down"]["kernel"], params["down"]["kernel"])


def test_the_kernel_keeps_its_type() -> None:
    params, moment, _ = network(4, 3, True, 0)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert rank_one(half, jnp.ones(4), jnp.ones(3), jnp.asarray(moment))["down"]["kernel"].dtype == jnp.bfloat16
    flat = damped(jnp.ones((4, 4)), 0.1)
    assert float(np.linalg.eigvalsh(np.asarray(flat))[0]) == pytest.approx(0.1, rel=1e-4)


def test_shapes_of_another_layer_are_refused() -> None:
    params, moment, _ = network(4, 3, False, 0)
    moment = jnp.asarray(moment)
    with pytest.raises(TPatchError, match="4 hidden neurons"):
        rank_one(params, jnp.ones(5), jnp.ones(3), moment)
    with pytest.raises(TPatchError, match="4 hidden neurons"):
        rank_one(params, jnp.ones(4), jnp.ones(3), moment[:3, :3])
    with pytest.raises(TPatchError, match="3 wide"):
        rank_one(params, jnp.ones(4), jnp.ones(2), moment)
    with pytest.raises(TPatchError, match="one row of each"):
        distribute_update(params, jnp.ones((2, 4)), jnp.ones((3, 3)), moment, 1.0)


# --- statistics ---


def test_the_second_moment_equals_a_plain_loop(tiny_model) -> None:
    rows = [tiny_model.encode(text) for text in ("a cat sat in the inn and so on", "who hit the fox?", "I")]
    network = tiny_model.params["layers"][1]["ffn"]
    expected, count = np.zeros((32, 32)), 0
    for row in rows:
        traced = tiny_model.trace(tokens_array([row], len(row)), 1)
        inner = ffn.hidden(network, traced.query[0], "silu")
        down = inner @ network["down"]["kernel"]
        np.testing.assert_allclose(down, traced.output[0], rtol=1e-4, atol=1e-5)
        expected += np.asarray(inner, np.float64).T @ np.asarray(inner, np.float64)
        count += len(row)
    found = hidden_moment(tiny_model, 1, rows)
    assert found.dtype == jnp.float32
    assert relative(found, expected / count) < 1e-5
    with pytest.raises(TPatchError, match="32 hidden neurons"):
        hidden_moment(tiny_model, 1, rows[2:])


def test_statistics_are_kept_and_go_on(tiny_model, tmp_path: Path, letters: Path, monkeypatch) -> None:
    rows = moment_rows(tiny_model, letters)
    assert sum(map(len, rows)) == 8 * 64
    assert sum(map(len, moment_rows(tiny_model, letters, 100))) == 100
    monkeypatch.setattr(statistics, "SAVE_EVERY", 2)
    whole = hidden_moment(tiny_model, 1, rows)

    def stop(what: str, done: int, total: int) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        hidden_moment(tiny_model, 1, rows, cache=tmp_path, progress=stop)
    assert seen == [0, 2, 4]
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        hidden_moment(tiny_model, 1, rows, cache=tmp_path, progress=stop)
    assert seen == [4]
    assert same(hidden_moment(tiny_model, 1, rows, cache=tmp_path), whole)
    monkeypatch.setattr(statistics, "batches", None)  # The model is not run again.
    assert same(hidden_moment(tiny_model, 1, rows, cache=tmp_path), whole)
    monkeypatch.undo()
    (kept,) = (tmp_path / "moments").glob("*/*")
    (kept / "sum.safetensors").write_bytes(b"damaged")
    assert relative(hidden_moment(tiny_model, 1, rows, cache=tmp_path), whole) < 1e-5


def test_contexts_are_the_models_own(tiny_model) -> None:
    found = sampled_contexts(tiny_model, ((5, 3), (8, 6)))
    assert len(found) == 9
    assert all(text.endswith(".") for text in found)
    assert found == sampled_contexts(tiny_model, ((5, 3), (8, 6)))
    for number, text in enumerate(found):
        start = ("The", "Therefore", "Because", "I", "You")[(number - 3 * (number > 2)) % 5]
        # A start that is longer than the text is cut.
        assert text.startswith(start[:5])


# --- values ---


def test_requests_never_couple(tiny_model: Model) -> None:
    items = [read_item(tiny_model, n, request, (), False) for n, request in enumerate(REQUESTS[:2])]
    rows = [value_rows(tiny_model, request, item) for request, item in zip(REQUESTS, items, strict=False)]
    scale, settings = jnp.asarray([1.0, 2.0]), LOOSE._replace(value_steps=5)
    together, info = train_offsets(tiny_model, fork_requests(tiny_model, rows, 1), scale, settings, stream=True)
    assert together.any(-1).all()
    forked = fork_requests(tiny_model, rows[1:], 1)
    alone, alone_info = train_offsets(tiny_model, forked, scale[1:], settings, stream=True)
    assert relative(together[1], alone[0]) < 1e-4
    assert alone_info.steps[0] == info.steps[1]


def test_an_offset_is_clamped_and_stops_when_it_is_enough(tiny_model: Model) -> None:
    item = read_item(tiny_model, 0, REQUESTS[0], (), False)
    forked = fork_requests(tiny_model, [value_rows(tiny_model, REQUESTS[0], item)], 1)
    offsets, info = train_offsets(tiny_model, forked, jnp.asarray([2.0]), ValueSettings(clamp=0.05))
    assert np.linalg.norm(offsets[0]) == pytest.approx(0.1, rel=1e-4)
    assert info.steps[0] == 39
    offsets, info = train_offsets(tiny_model, forked, jnp.asarray([2.0]), ValueSettings(clamp=1.0, value_enough=100.0))
    assert info.steps[0] == 0
    assert not offsets.any()


def test_products_of_bfloat16_give_nearly_the_same_offset_and_are_asked_for(tiny_model: Model) -> None:
    item = read_item(tiny_model, 0, REQUESTS[0], (), False)
    forked = fork_requests(tiny_model, [value_rows(tiny_model, REQUESTS[0], item)], 1)
    assert round_network(tiny_model, 1, LOOSE) is None
    settings = LOOSE._replace(offset_precision="bfloat16", value_steps=4, value_extra_steps=0)
    rounded = round_network(tiny_model, 1, settings)
    offsets, near = (
        train_offsets(tiny_model, forked, jnp.asarray([2.0]), settings, rounded=network)[0]
        for network in (None, rounded)
    )
    assert 0 < relative(near[0], offsets[0]) < 0.1


def test_only_a_target_that_is_not_reached_takes_extra_steps(tiny_model: Model) -> None:
    item = read_item(tiny_model, 0, REQUESTS[0], (), False)
    forked = fork_requests(tiny_model, [value_rows(tiny_model, REQUESTS[0], item)], 1)
    settings = LOOSE._replace(value_steps=3, value_extra_steps=0)
    offsets, info = train_offsets(tiny_model, forked, jnp.asarray([2.0]), settings)
    assert info.steps[0] == 2
    # The loss as a whole, which has the penalty in it, is above this.
    reached = settings._replace(value_extra_steps=6, value_enough=float(info.nll[0]) * 1.0001)
    same_offsets, same_info = train_offsets(tiny_model, forked, jnp.asarray([2.0]), reached)
    assert same_info.steps[0] == 2
    np.testing.assert_array_equal(same_offsets, offsets)
    missed = reached._replace(value_enough=float(info.nll[0]) / 100)
    _, more = train_offsets(tiny_model, forked, jnp.asarray([2.0]), missed)
    assert more.steps[0] == 8
    assert more.nll[0] < info.nll[0]


# --- edits ---


def test_rome_makes_a_model_say_the_target(tiny_model: Model, of_rome: Begun) -> None:
    editor, fresh = of_rome
    assert same(fresh.moments, editor.init(tiny_model, jax.random.key(7)).moments)
    state, info = editor.step(fresh, REQUESTS[:1], KEY)
    (found,) = info.requests
    assert (found.id, found.held, found.status, found.site) == ("eve", True, "edited", "subject")
    assert found.steps > 0
    assert info.parameters_added == 0
    assert info.forward_equivalents >= info.fit_forward_equivalents > 0
    model = edited(state)
    assert model.generate("He met Eve", 1) == " the"
    batch = tokens_array([tiny_model.encode("He met Eve in")], 16)
    assert same(editor.apply(state, batch), model.apply(batch))
    assert not same(editor.apply(state, batch), tiny_model.apply(batch))
    assert same(editor.apply(fresh, batch), tiny_model.apply(batch))
    changed = [
        path
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(tiny_model.params), jax.tree.leaves(model.params), strict=True
        )
        if old is not new
    ]
    assert [jax.tree_util.keystr(path) for path in changed] == ["['layers'][1]['ffn']['down']['kernel']"]
    again = restore(fresh, save(state))
    assert same(editor.apply(again, batch), editor.apply(state, batch))


def test_rome_and_r_rome_differ_only_in_the_key_they_divide_by(tiny_model: Model, of_rome: Begun) -> None:
    item = read_item(tiny_model, 0, REQUESTS[0], of_rome.fresh.contexts, False)
    update = find_update(tiny_model, 1, REQUESTS[0], item, LOOSE)
    network = tiny_model.params["layers"][1]["ffn"]
    # The mean is that of the contexts, of which the bare prompt is one.
    keys = []
    for row in value_rows(tiny_model, REQUESTS[0], item)[:-1]:
        query = tiny_model.trace(tokens_array([row.tokens], len(row.tokens)), 1).query[0, row.subject]
        keys.append(np.asarray(ffn.hidden(network, query, "silu")))
    assert relative(update.key, np.mean(keys, 0)) < 1e-4
    assert relative(update.bare, keys[0]) < 1e-4
    outcomes = []
    for averaged in (False, True):
        settings = replace(of_rome.fresh.settings, averaged_key=averaged)
        after, _ = of_rome.editor.step(of_rome.fresh._replace(settings=settings), REQUESTS[:1], KEY)
        outcomes.append(np.asarray(after.down_projections[1]) - np.asarray(network["down"]["kernel"]))
        at = update.key if averaged else update.bare
        assert relative(np.asarray(at) @ np.asarray(after.down_projections[1]), update.value) < 1e-3
    left, right = (np.linalg.svd(change)[0][:, 0] for change in outcomes)
    assert abs(left @ right) == pytest.approx(1, abs=1e-4)
    assert relative(*outcomes) > 1e-3
    assert replace(ROME_PRESETS["default"], averaged_key=True) == R_ROME_PRESETS["default"]


def test_edits_stack(tiny_model: Model, of_rome: Begun) -> None:
    editor, fresh = of_rome
    together, info = editor.step(fresh, REQUESTS[:2], KEY)
    state, _ = editor.step(fresh, REQUESTS[:1], KEY)
    state, _ = editor.step(state, REQUESTS[1:2], KEY)
    assert same(together.down_projections, state.down_projections)
    item = read_item(tiny_model, 1, REQUESTS[1], (), False)
    assert info.requests[1].held == says(edited(state), [item])[0]
    # The first edit counts: the second one alone is another one.
    alone, _ = editor.step(fresh, REQUESTS[1:2], KEY)
    assert relative(alone.down_projections[1], together.down_projections[1]) > 1e-3


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_what_does_not_hold_is_kept_or_not(of_rome: Begun, of_memit: Begun, method: str) -> None:
    editor, fresh = of_rome if method == "rome" else of_memit
    weak = ValueSettings(value_steps=2, clamp=0.01)
    for keep in (True, False):
        settings = replace(fresh.settings, value=weak, keep_failed=keep)
        state, info = editor.step(fresh._replace(settings=settings), REQUESTS[:2], KEY)
        assert [(request.held, request.status) for request in info.requests] == [(False, "failed")] * 2
        assert bool(state.down_projections) == keep
        fate = "the update was kept" if keep else "nothing was kept"
        assert all(fate in request.reason for request in info.requests)


def test_memit_edits_several_at_once(tiny_model: Model, of_memit: Begun) -> None:
    editor, fresh = of_memit
    assert len(fresh.contexts) == 2
    state, info = editor.step(fresh, REQUESTS, KEY)
    assert [request.status for request in info.requests] == ["edited"] * 3
    assert sorted(state.down_projections) == [0, 1]
    model = edited(state)
    assert [model.generate(request.prompt, 1).strip() for request in REQUESTS] == ["the", "t", "the"]
    batch = tokens_array([tiny_model.encode("He met Eve in")], 16)
    assert same(editor.apply(restore(fresh, save(state)), batch), model.apply(batch))
    # In another order it is the same.
    turned, _ = editor.step(fresh, REQUESTS[::-1], KEY)
    assert all(relative(turned.down_projections[layer], state.down_projections[layer]) < 1e-3 for layer in (0, 1))
    # One that cannot be done does not hinder the others.
    hopeless = [*REQUESTS[:2], EditRequest("Nobody", "x")]
    state, info = editor.step(fresh, hopeless, KEY)
    assert [request.status for request in info.requests] == ["edited", "edited", "failed"]


def test_layers_and_weights_are_the_authors_where_they_name_them(tiny_model) -> None:
    config = tiny_model.config
    for family, layers, width, wanted, several, weight in (
        ("gpt2", 24, 1024, 8, (4, 5, 6, 7, 8), 4096),
        ("gpt2", 36, 1280, 12, (8, 9, 10, 11, 12), 5120),
        ("gpt2", 48, 1600, 17, (13, 14, 15, 16, 17), 20000),
        ("gptj", 28, 4096, 5, (3, 4, 5, 6, 7, 8), 15000),
        ("llama", 32, 4096, 5, (4, 5, 6, 7, 8), 15000),
        ("llama", 3, 16, 1, (0, 1), 64),
    ):
        known = replace(config, family=family, layers=layers, hidden_size=width, ffn_width=4 * width)
        assert rome_layer(known) == wanted
        assert memit_layers(known) == several
        assert memit_weight(known) == weight
    assert rome_layer(config, "2") == 2
    assert memit_layers(config, "2, 0") == (0, 2)
    assert memit_weight(config, "9") == 9
    for wrong in ("3", "-1", "low"):
        with pytest.raises(TPatchError, match="0 to 2"):
            rome_layer(config, wrong)
        with pytest.raises(TPatchError, match="0 to 2"):
            memit_layers(config, f"1,{wrong}")
    for wrong in ("0", "much"):
        with pytest.raises(TPatchError, match="moment_weight"):
            memit_weight(config, wrong)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_what_cannot_be_edited_says_why(tiny_model, letters: Path, method: str) -> None:
    editor = METHODS[method].build(method_settings([method])[method], letters, None, None)
    state = editor.init(tiny_model, KEY)
    requests = [
        EditRequest("Ada has", "the"),
        EditRequest("Ada has", "the", "Bob"),
        EditRequest("Ada, Ada has", "the", "Ada"),
        EditRequest("Ada has", "", "Ada"),
        EditRequest("Ada " + "has " * 40, "the", "Ada"),
    ]
    after, info = editor.step(state, requests, KEY)
    reasons = [request.reason for request in info.requests]
    assert all(request.status == "failed" for request in info.requests)
    for reason, part in zip(
        reasons, ("has none", "not in the prompt", "2 times", "target is empty", "64"), strict=True
    ):
        assert part in reason
    assert not after.down_projections
    with pytest.raises(TPatchError, match="needs a decoder"):
        editor.init(make_family("bert"), KEY)
    layer = max(state.moments)
    patched = attach(tiny_model, {layer: create(16, 1)})
    with pytest.raises(TPatchError, match="merge or detach"):
        editor.init(patched, KEY)


@pytest.mark.parametrize(
    ("protocol", "methods"),
    [("single", ["rome", "memit", "tpatcher"]), ("sequential", ["r-rome", "alphaedit", "ultraedit", "neuraldb"])],
)
def test_methods_run_side_by_side(
    tiny_model: Model, letters: Path, tmp_path: Path, protocol: str, methods: list[str]
) -> None:
    quick: dict[str, Any] = {"contexts": 1, "other_subjects": 0, "attempts": 1, "rounds": 1, "site": "last"}
    known = {name: value for name, value in quick.items() if "tpatcher" in methods}
    known |= {f"{method}.value_steps": 2 for method in methods if method != "ultraedit"}
    known |= {"alphaedit.null_space": 1e3} if "alphaedit" in methods else {}
    settings = method_settings(methods, changes=known)
    options: dict[str, Any] = {"methods": methods, "settings": settings, "memory": letters, "cache": False}
    report = evaluate(tiny_model, make_records()[:2], protocol=protocol, output=tmp_path / "report", **options)
    assert [result["method"] for result in report["results"]] == ["unedited", *methods]
    for result in report["results"][1:]:
        assert {"ES", "PS", "NS", "S", "exact"} <= result["metrics"].keys()
        assert result["cost"]["forward_equivalents"] > 0
        assert sum(result["requests"].values()) == 2


def test_what_was_kept_is_said() -> None:
    fit = OffsetInfo(*np.ones((3, 1)))
    reason = "the target does not come out after the update; nothing was kept"
    tried = {0: Attempt(fit, 0), 1: Attempt(fit, 0, reason), 2: Attempt(fit, 0)}
    held = {0: False, 1: False, 2: True}
    undone, lost, good = report("abc", {}, tried, held, False, (1.0, 1.0, 1.0)).requests
    assert "a later edit of this step undid it, and the update was kept" in undone.reason
    assert (lost.reason, good.status) == (reason, "edited")
    undone = report("abc", {}, tried, held, True, (1.0, 1.0, 1.0)).requests[0]
    assert "the update was kept (keep_failed)" in undone.reason


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("value_steps", 0), ("value_extra_steps", -1), ("value_rate", 0.0), ("clamp", -1.0), ("moment_tokens", 0),
     ("ridge", -1.0), ("together", 0)],
)  # fmt: skip
def test_values_that_make_no_sense_are_named(name: str, wrong: float) -> None:
    with pytest.raises(TPatchError, match=f"{name} is {wrong}"):
        method_settings(["memit"], changes={name: wrong})
    if name != "together":
        with pytest.raises(TPatchError, match=f"{name} is {wrong}"):
            method_settings(["rome"], changes={name: wrong})


def test_a_precision_that_does_not_exist_is_named() -> None:
    with pytest.raises(
        TPatchError, match="offset_precision 'float16' does not exist; use one of auto, float32, bfloat16"
    ):
        method_settings(["rome"], changes={"offset_precision": "float16"})


def test_norms_behind_the_network_are_not_for_memit(letters: Path) -> None:
    with pytest.raises(TPatchError, match="a norm stands between"):
        memit(MEMIT, memory=letters).init(make_family("gemma2"), KEY)
