"""WISE: the side memory, its routing, shards and how they are merged, and its place in an evaluation."""

import dataclasses
import doctest
import math
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

from tpatch_jax.core import ffn
from tpatch_jax.core.patch import create
from tpatch_jax.editors import wise as wise_module
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.registry import method_settings
from tpatch_jax.editors.wise import (
    DECAY,
    WiseSettings,
    WiseState,
    _lesson,
    _with_edit,
    check_wise,
    draw_mask,
    merge_shards,
    restore_memory,
    routing,
    routing_activations,
    save_memory,
    side_memory,
    wise,
)
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.records import Probe, Record
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.evaluation.scoring import ask, base_scores, routed_scores
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"

KEY = jax.random.key(0)
# A later edit of another target would change what an earlier one says: the network has few values.
WANTED = [EditRequest("the cat sat in", "q"), EditRequest("who hit Tom in", "q")]
OTHER = "0987654321"
QUICK = WiseSettings(
    layer="0", edit_steps=300, sgd_rate=0.3, mask_share=0.5, contexts=1, total_enough=0.5, max_change=9
)


@pytest.fixture(scope="module")
def model() -> Model:
    """What it says can be nearly certain, so that a loss can be low."""
    random = make_tiny_model(num_hidden_layers=2)
    return random.with_params({**random.params, "head": jax.tree.map(lambda leaf: 6 * leaf, random.params["head"])})


@pytest.fixture(scope="module")
def fresh(model, letters) -> WiseState:
    return wise(QUICK, memory=letters).init(model, KEY)


@pytest.fixture(scope="module")
def edited(fresh) -> tuple[WiseState, Any]:
    return wise(QUICK).step(fresh, WANTED, KEY)


# --- the side memory ---


@given(st.integers(1, 4), st.integers(0, 2**16), st.floats(0.1, 1))
def test_copies_are_merged_by_trimming_voting_and_averaging(count, seed, density):
    rng = np.random.default_rng(seed)
    main = rng.normal(size=(3, 4)).astype(np.float32)
    changes = rng.normal(size=(count, 3, 4)).astype(np.float32)
    merged = np.asarray(merge_shards(jnp.asarray(main), [jnp.asarray(main + one) for one in changes], density)) - main
    changes = (main + changes) - main
    kept = max(1, round(density * 12))
    trimmed = np.stack([np.where(np.abs(one) >= np.sort(np.abs(one).ravel())[-kept], one, 0) for one in changes])
    for place in np.ndindex(3, 4):
        column = trimmed[(slice(None), *place)]
        agreeing = [one for one in column if one * column.sum() > 0]
        assert merged[place] == pytest.approx(np.mean(agreeing) if agreeing else 0.0, abs=1e-5)


def test_an_edit_is_gradient_descent_on_its_loss_within_its_mask(model, fresh):
    """Three steps against the formula on whole logits."""
    settings = dataclasses.replace(QUICK, edit_steps=3, sgd_rate=0.05)
    state, fit = _with_edit(fresh._replace(settings=settings), read_item(model, 0, WANTED[0], fresh.contexts, False))
    main, mask = fresh.main, np.asarray(draw_mask(fresh, 0))
    item = read_item(model, 0, WANTED[0], fresh.contexts, False)
    assert len(item.rows) == 2
    held = list(fresh.held[int(wise_module.text_generator(WANTED[0].prompt).integers(len(fresh.held)))])
    network = model.params["layers"][0]["ffn"]

    def move(kernel: Any, row: list[int]) -> Any:
        query = model.trace(jnp.asarray([row]), 0).query[0, 1:]
        hidden = ffn.hidden(network, query, model.config.activation)
        return jnp.sqrt(jnp.sum(jnp.square(hidden @ (kernel - main)), -1) + 1e-12).mean()

    def loss(kernel: Any) -> Any:
        layers = {**model.params["layers"], 0: {**model.params["layers"][0]}}
        layers[0]["ffn"] = {**network, "down": {**network["down"], "kernel": kernel}}
        other, total = model.with_params({**model.params, "layers": layers}), 0.0
        outside = move(kernel, held)
        for number, row in enumerate(item.rows):
            log_p = jax.nn.log_softmax(other.apply(jnp.asarray([row]))[0])
            inside = move(kernel, row[: item.starts[number]])
            total -= log_p[jnp.asarray(item.places(number)), jnp.asarray(item.target)].mean() / 2
            total += jax.nn.relu(QUICK.beta * fresh.unit - inside) / 2
            total += jax.nn.relu(QUICK.gamma * fresh.unit - inside + outside) / 2
        return total + jax.nn.relu(outside - QUICK.alpha * fresh.unit)

    kernel = main
    for _ in range(3):
        kernel = kernel - 0.05 * (jax.grad(loss)(kernel) + DECAY * kernel) * mask
    np.testing.assert_allclose(state.shards[0], kernel, atol=1e-4)
    assert float(fit.total) == pytest.approx(float(loss(kernel)), rel=1e-3)
    assert int(fit.steps) == 3
    assert 0.3 < mask.mean() < 0.7
    assert same(np.asarray(state.shards[0])[~mask], np.asarray(main)[~mask])
    tokens, lesson = _lesson(item, held)
    assert tokens.shape[0] == len(lesson.edit) == 4


def test_no_parameter_goes_further_than_it_may(model, fresh):
    settings = dataclasses.replace(QUICK, edit_steps=5, max_change=1e-3, sgd_rate=10.0)
    state, _ = wise(settings).step(fresh._replace(settings=settings), WANTED[:1], KEY)
    assert np.abs(np.asarray(state.shards[0] - fresh.main)).max() <= 1e-3 * (1 + 1e-3)


# --- routing ---


def test_without_edits_it_is_the_unedited_model_bit_for_bit(model, fresh):
    batch = tokens_array([model.encode_prompt(OTHER), model.encode_prompt(WANTED[0].prompt)], 24)
    assert same(wise(QUICK).apply(fresh, batch), model.apply(batch))
    assert routing(fresh).contexts([[1, 2], [3]]) == [None, None]
    assert same(side_memory(fresh), fresh.main)


def test_the_activation_is_the_mean_change_over_a_prompt(model, edited):
    state, _ = edited
    prompts = [model.encode_prompt(text) for text in (WANTED[0].prompt, OTHER, "a")]
    moves = routing_activations(state, prompts)
    for prompt, one in zip(prompts, moves, strict=True):
        query = model.trace(jnp.asarray([prompt]), 0).query[0]
        hidden = ffn.hidden(model.params["layers"][0]["ffn"], query, model.config.activation)
        change = np.linalg.norm(np.asarray(hidden @ (side_memory(state) - state.main), np.float64), axis=-1)
        assert one == pytest.approx(change[1:].mean() if len(prompt) > 1 else change[0], rel=1e-4)


def test_a_decision_costs_the_layers_below_and_the_copy(model, fresh, edited):
    state, prompt = edited[0], model.encode_prompt(OTHER)
    layer = model.params["layers"][0]
    kernels = [layer["ffn"][name] for name in ("up", "gate")] + [layer["attention"]]
    products = sum(leaf.size for leaf in jax.tree.leaves(kernels) if leaf.ndim == 2) + state.main.size
    # Attention's scores, norms and lengths besides.
    assert 1 < routing(state).decision_flops(prompt) / (2 * len(prompt) * products) < 1.9
    assert routing(fresh).decision_flops(prompt) == 0


def test_out_of_scope_the_unedited_model_answers_bit_for_bit(model, edited):
    state, _ = edited
    routes = routing(state)
    texts = [model.encode_prompt(text) for text in (WANTED[0].prompt, OTHER)]
    assert routes.contexts(texts) == [[], None]
    moved = routing_activations(state, texts)
    assert moved[0] >= state.least * QUICK.scope_ratio > moved[1]
    batch = tokens_array(texts, 24)
    logits, before = (np.asarray(one) for one in (wise(QUICK).apply(state, batch), model.apply(batch)))
    assert logits[1].tobytes() == before[1].tobytes()
    assert logits[0].tobytes() != before[0].tobytes()
    probes = [Probe(OTHER, "a b"), Probe(WANTED[0].prompt, "q")]
    scores = base_scores(model, ask(model, probes))
    outcome = routed_scores(scores, routes)
    outside = ~outcome.fires
    assert outside.sum() == scores.asked.starts[1]
    assert same(outcome.log_p[outside], scores.outcome.log_p[outside])
    assert same(outcome.predicted[outside], scores.outcome.predicted[outside])


# --- edits ---


def test_edits_hold_and_nothing_of_the_model_changes(model, fresh, edited):
    state, info = edited
    before = bits(model.params)
    assert [(one.held, one.status, one.reason) for one in info.requests] == [(True, "edited", "")] * 2
    assert (state.edits, len(state.shards)) == (2, 1)
    assert info.parameters_added == fresh.main.size
    assert info.forward_equivalents > info.fit_forward_equivalents > 0
    assert bits(model.params) == before
    again, info = wise(QUICK).step(state, WANTED, KEY)
    assert [one.status for one in info.requests] == ["already"] * 2
    assert same(again.shards, state.shards)


def test_shards_begin_anew_with_other_masks(fresh):
    settings = dataclasses.replace(QUICK, edit_steps=2, shard_edits=1)
    state, info = wise(settings).step(fresh._replace(settings=settings), WANTED, KEY)
    assert (len(state.shards), state.edits) == (2, 2)
    assert info.parameters_added == 2 * fresh.main.size
    first, second = (np.asarray(shard) != np.asarray(fresh.main) for shard in state.shards)
    assert (first & ~second).any()
    assert (second & ~first).any()
    assert same(side_memory(state), merge_shards(fresh.main, state.shards, settings.density))
    again = restore_memory(fresh._replace(settings=settings), save_memory(state))
    assert same(again.shards, state.shards)
    assert (again.edits, again.least) == (state.edits, state.least)
    nothing = restore_memory(fresh, save_memory(fresh))
    assert (nothing.shards, nothing.edits, nothing.least) == ((), 0, math.inf)
    with pytest.raises(TPatchError, match="take the same model and layer"):
        restore_memory(fresh, {**save_memory(state), "shards": np.zeros((1, 2, 3))})


def test_a_mask_does_not_depend_on_x64(fresh):
    masks = []
    for wide in (False, True):
        jax.config.update("jax_enable_x64", wide)
        try:
            masks.append(np.asarray(draw_mask(fresh, 0)))
        finally:
            jax.config.update("jax_enable_x64", False)
    assert np.array_equal(*masks)
    assert 0 < masks[0].mean() < 1


def test_what_does_not_hold_is_said_and_kept_or_not(model, fresh):
    wanted = [WANTED[0], EditRequest("", "x")]
    for keep in (True, False):
        settings = dataclasses.replace(QUICK, edit_steps=2, sgd_rate=1e-3, keep_failed=keep)
        state, info = wise(settings).step(fresh._replace(settings=settings), wanted, KEY)
        assert [one.held for one in info.requests] == [False, False]
        fate = "the change was kept" if keep else "nothing was kept"
        assert f"does not come out after 2 steps, and {fate}; raise edit_steps" in info.requests[0].reason
        assert "the prompt is empty" in info.requests[1].reason
        assert len(state.shards) == keep
    settings = dataclasses.replace(QUICK, sgd_rate=1e38, edit_steps=3, max_change=1e38)
    state, info = wise(settings).step(fresh._replace(settings=settings), WANTED[:1], KEY)
    assert "the loss is not finite" in info.requests[0].reason
    assert not state.shards


def test_it_is_evaluated_and_resumed(model, letters, tmp_path):
    records = [
        Record(f"r{n}", (one,), {"reliability": (Probe(one.prompt, one.target),), "locality": (Probe(OTHER, "up"),)})
        for n, one in enumerate(WANTED)
    ]

    def run(output: Path | None = None, **options: Any) -> Any:
        report = evaluate(model, records, ["wise"], "batch", cache=False, output=output, memory=letters,
                          other_facts=0, settings={"wise": QUICK}, **options)  # fmt: skip
        return report["results"][1]["metrics"], report["results"][1]["requests"]

    whole = run()
    assert (whole[0]["exact"], whole[0]["locality"]) == (1.0, 1.0)

    seen = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(what)
        if "training the side memory" in seen and what == "measuring" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", progress=stop)
    assert run(tmp_path / "out") == whole


# --- settings ---


def test_layers_models_and_values_that_make_no_sense_are_named(model):
    def layer(count: int) -> int:
        config = dataclasses.replace(model.config, layers=count)
        layers = {n: {"ffn": {}} for n in range(count)}
        return check_wise(dataclasses.replace(model, config=config, params={"layers": layers}), WiseSettings())

    assert [layer(count) for count in (1, 2, 30, 32)] == [0, 1, 25, 27]
    with pytest.raises(TPatchError, match="layer '7' does not exist; use layer=auto or 0 to 1"):
        check_wise(model, WiseSettings(layer="7"))
    with pytest.raises(TPatchError, match="WISE needs a decoder, and 'tiny' is an encoder"):
        check_wise(family("bert"), WiseSettings())
    with pytest.raises(TPatchError, match="something is attached to layer 1, which WISE copies"):
        check_wise(attach(model, {1: create(16, 1)}), WiseSettings())
    wrong = {"layer": "top", "edit_steps": 0, "shard_edits": 0, "contexts": -1, "total_enough": -1.0, "alpha": -1.0}
    wrong |= {"gamma": -1.0, "sgd_rate": 0.0, "beta": 0.0, "scope_ratio": 2.0, "mask_share": 1.5, "density": 0.0}
    for name, value in {**wrong, "max_change": 0.0}.items():
        with pytest.raises(TPatchError, match=f"{name} (is )?'?{value}"):
            method_settings(["wise"], changes={name: value})
    with pytest.raises(TPatchError, match=r"alpha is 2\.0 and beta 1\.0"):
        WiseSettings(alpha=2.0)


def test_examples_work():
    result = doctest.testmod(wise_module, extraglobs={"jnp": jnp}, optionflags=doctest.ELLIPSIS)
    assert (result.failed, result.attempted > 0) == (0, True)
