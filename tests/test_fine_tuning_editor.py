"""Fine-tuning as an editor: it holds on every architecture, trains what it should, and stays within its bounds."""

import dataclasses
import doctest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_tiny_model, relative, same
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model as family

from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.fine_tuning import editor as fine_tuning_module
from tpatch_jax.editors.fine_tuning import settings as fine_tuning_settings
from tpatch_jax.editors.fine_tuning import step as fine_tuning_step
from tpatch_jax.editors.fine_tuning.editor import (
    FineTuningState,
    fine_tuning,
    restore_trained,
    save_trained,
)
from tpatch_jax.editors.fine_tuning.examples import draw, grouped, read_pool
from tpatch_jax.editors.fine_tuning.settings import FINE_TUNING_PRESETS, FineTuningSettings
from tpatch_jax.editors.fine_tuning.step import ADAM, beginning, splice, update
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.registry import METHODS, method_settings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.records import Probe, Record
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.models import networks
from tpatch_jax.models.collection import batches
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"  # optax takes steps

QUICK = FineTuningSettings(adam_rate=1e-2, passes=100)
KEY = jax.random.key(0)
TEXTS = ("the cat sat in", "who hit the")


def requests_for(model: Model, texts: tuple[str, ...] = TEXTS) -> list[EditRequest]:
    """What the model does not say: other labels, or a few letters."""
    labels = model.config.labels
    if not labels:
        return [EditRequest(text, answer) for text, answer in zip(texts, ("ab", "q"), strict=False)]
    said = [labels.index(label) for label in model.classify(texts)]
    return [EditRequest(text, labels[(at + 1) % len(labels)]) for text, at in zip(texts, said, strict=True)]


def said(model: Model, request: EditRequest) -> str:
    if model.config.labels:
        return model.classify([request.prompt])[0]
    count = len(model.encode(f" {request.target}")) if model.config.architecture == "decoder" else 8
    return model.generate(request.prompt, count).strip()


def edit(model: Model, settings: FineTuningSettings = QUICK, wanted: Any = None, **options: Any):
    editor = fine_tuning(settings, **options)
    return editor.step(editor.init(model, KEY), requests_for(model) if wanted is None else wanted, KEY)


def changed(before: Any, after: Any) -> set[str]:
    """The paths of all arrays that are not the same bit for bit."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for (path, old), new in pairs if not same(old, new)}


# Two layers are enough for one that is trained and one that is not.
MODELS = {
    "decoder": lambda: make_tiny_model(num_hidden_layers=2),
    "classifier": lambda: family("bert", num_hidden_layers=2),
    "pooled": lambda: family("bert", num_hidden_layers=2, classifier_pooling="mean"),
    "answerer": lambda: family("bart", encoder_layers=1, decoder_layers=2),
}
PATHS = {"last": ("layers/1/ffn/",), "0": ("layers/0/ffn/",), "all": ("layers/", "encoder/layers/")}
CASES = [("decoder", "0"), ("decoder", "all"), *((kind, "last") for kind in MODELS)]


@pytest.fixture(scope="module")
def decoder() -> Model:
    return MODELS["decoder"]()


@pytest.mark.parametrize(("kind", "scope"), CASES)
def test_edits_hold_and_nothing_else_changes(kind, scope):
    model = MODELS[kind]()
    before = bits(model.params)
    state, info = edit(model, dataclasses.replace(QUICK, scope=scope))
    assert [(found.held, found.status, found.reason) for found in info.requests] == [(True, "edited", "")] * 2
    assert [said(state.edited, request) for request in requests_for(model)] == [r.target for r in requests_for(model)]
    assert info.parameters_added == 0
    assert 0 < info.fit_seconds < info.seconds
    assert info.forward_equivalents > info.fit_forward_equivalents > 0
    paths = changed(model.params, state.edited.params)
    assert paths
    assert all(path.startswith(PATHS[scope]) for path in paths)
    assert bits(model.params) == before
    ((_, batch),) = batches(model.config, [model.encode_prompt(TEXTS[0])])
    assert same(fine_tuning(QUICK).apply(state, batch), state.edited.apply(batch))


@given(st.floats(1e-5, 1e-2), st.floats(1e-4, 1e-1), st.integers(0, 3))
def test_no_parameter_goes_further_than_it_may(decoder, most, rate, seed):
    editor = fine_tuning(FineTuningSettings(max_change=most, adam_rate=rate, passes=3))
    state = editor.init(decoder, KEY)
    for number, request in enumerate(requests_for(decoder)[:2]):
        state, _ = editor.step(state, [request], jax.random.key(seed + number))
    for new, old in zip(
        jax.tree.leaves(state.trained), jax.tree.leaves(beginning(decoder.params, state.trained)), strict=True
    ):
        # up to one rounding of a float32
        spacing = np.spacing(np.abs(np.asarray(old)) + np.float32(most))
        assert (np.abs(np.asarray(new) - np.asarray(old)) <= most + spacing).all()


@pytest.mark.parametrize(("kind", "kl"), [("decoder", 0.5), ("pooled", 0.0), ("classifier", 0.0), ("answerer", 0.0)])
def test_what_is_cut_equals_the_whole_network(kind, kl, letters, inputs):
    """Gradients, losses and updates of the quick way and of the plain one."""
    model = MODELS[kind]()
    items = [read_item(model, number, request, (), False) for number, request in enumerate(requests_for(model))]
    memory = letters if kind == "decoder" else inputs
    pool = read_pool(model, memory, None, None) if kl else None
    last = model.layer(None)
    first = {"layers": {last: {"ffn": model.params["layers"][last]["ffn"]}}}
    found = []
    for whole_network in (False, True):
        (group,) = grouped(model, items, 32, whole_network)
        trained = jax.tree.map(jnp.copy, first)
        moments, history = ADAM.init(trained), []
        for number in range(2):
            rng = np.random.default_rng(number)
            calm = None if pool is None else draw(model, pool, 64, rng, whole_network)
            trained, moments, losses = update(
                model.config, trained, moments, model.params, group.lesson, calm, kl, 1e-3, np.inf
            )
            history.append({name: float(loss) for name, loss in losses.items()})
        # after a few steps Adam's moment is a mean of the gradients
        found.append((jax.device_get(moments.mu), jax.device_get(trained), history))
    for quick, plain in zip(jax.tree.leaves(found[0][:2]), jax.tree.leaves(found[1][:2]), strict=True):
        assert relative(quick, plain) < 1e-5
    assert jax.tree.leaves(found[0][2]) == pytest.approx(jax.tree.leaves(found[1][2]), rel=1e-5, abs=1e-6)


def test_kl_keeps_the_memory_closer(decoder, letters):
    tokens = jnp.asarray([decoder.encode(letters.read_text("utf-8"))[:60]])
    before = jax.nn.log_softmax(decoder.apply(tokens))
    distance = []
    for kl in (0.0, 5.0):
        state, info = edit(decoder, dataclasses.replace(QUICK, kl=kl), memory=letters)
        assert info.requests[0].held
        assert ("kl" in info.requests[0].losses) == (kl > 0)
        now = jax.nn.log_softmax(state.edited.apply(tokens))
        distance.append(float(jnp.mean(jnp.sum(jnp.exp(before) * (before - now), -1))))
    assert 0 < distance[1] < 0.8 * distance[0]


def test_steps_stack_and_leave_earlier_states_alone(decoder):
    editor = fine_tuning(QUICK)
    fresh = editor.init(decoder, KEY)
    one, two = requests_for(decoder)[:2]
    first, info = editor.step(fresh, [one], KEY)
    kept = bits(first.trained)
    again, _ = editor.step(fresh, [one], KEY)
    assert bits(again.trained) == kept
    second, _ = editor.step(first, [two], KEY)
    assert bits(first.trained) == kept
    alone, _ = editor.step(fresh, [two], KEY)
    assert not same(second.trained, alone.trained)
    assert said(second.edited, two) == two.target
    held, info = editor.step(first, [one], KEY)
    assert (info.requests[0].status, info.requests[0].steps) == ("already", 0)
    assert same(held.trained, first.trained)


@pytest.mark.parametrize("scope", ["last", "all"])
@pytest.mark.parametrize("kind", ["decoder", "answerer"])
def test_saved_parameters_are_restored(kind, scope):
    model = MODELS[kind]()
    editor = fine_tuning(dataclasses.replace(QUICK, scope=scope))
    fresh = editor.init(model, KEY)
    state = fresh._replace(trained=jax.tree.map(lambda leaf: leaf + 1, fresh.trained))
    arrays = save_trained(state)
    restored: FineTuningState = restore_trained(fresh, arrays)
    assert same(restored.trained, state.trained)
    assert same(restored.edited.params, splice(model.params, state.trained))
    name = next(iter(arrays))
    with pytest.raises(TPatchError, match=f"'{name}' is not among the saved parameters; resume with the same model"):
        restore_trained(fresh, {other: array for other, array in arrays.items() if other != name})


def test_a_request_that_cannot_be_worked_on_fails_alone(decoder):
    good = requests_for(decoder)[0]
    _, info = edit(decoder, wanted=[EditRequest("the cat", ""), good])
    assert [found.held for found in info.requests] == [False, True]
    assert "the target is empty" in info.requests[0].reason
    state, info = edit(decoder, wanted=[EditRequest("", "a")])
    assert same(state.edited.params, decoder.params)
    assert info.forward_equivalents == 0


def test_what_does_not_hold_is_said_and_kept_or_not(decoder):
    weak = dataclasses.replace(QUICK, adam_rate=1e-6, passes=2)
    state, info = edit(decoder, weak)
    assert {found.status for found in info.requests} == {"failed"}
    assert "still comes out wrong after 2 updates, and the change was kept all the same" in info.requests[0].reason
    assert changed(decoder.params, state.edited.params)
    state, info = edit(decoder, dataclasses.replace(weak, keep_failed=False))
    assert "wrong after 2 updates, and nothing was kept; raise passes or adam_rate" in info.requests[0].reason
    assert same(state.edited.params, decoder.params)


def test_training_goes_on_to_the_loss_that_is_asked_for(decoder):
    _, soon = edit(decoder)
    # With its small unembedding the tiny network comes no lower than 2.45.
    _, late = edit(decoder, dataclasses.replace(QUICK, loss_enough=2.7))
    assert all(found.held for found in (*soon.requests, *late.requests))
    assert max(found.losses["l_e"] for found in soon.requests) > 2.7
    assert max(found.losses["l_e"] for found in late.requests) < 2.7
    assert late.requests[0].steps > soon.requests[0].steps


def test_losses_that_are_no_numbers_leave_nothing_behind(decoder):
    state, info = edit(decoder, dataclasses.replace(QUICK, adam_rate=1e30))
    assert "the loss is not finite after" in info.requests[0].reason
    assert "lower adam_rate, which is 1e+30" in info.requests[0].reason
    assert same(state.edited.params, decoder.params)


def test_a_model_in_bfloat16_keeps_its_type(decoder):
    half = decoder.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder.params))
    state, info = edit(half)
    assert all(found.held for found in info.requests)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.edited.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype(jnp.float32)}
    with pytest.raises(TPatchError, match=r"max_change=0\.001 is finer than 'tiny' in bfloat16 can tell; load"):
        edit(half, dataclasses.replace(QUICK, max_change=1e-3))


def test_an_attached_patch_stays_as_it_is(decoder):
    patch = Patch(jnp.ones((1, 16)), jnp.zeros(1), jnp.ones((1, 16)))
    model = attach(decoder, patch)
    state, info = edit(model)
    assert all(found.held for found in info.requests)
    assert same(state.edited.params["layers"][1]["ffn"]["patch"], patch)
    paths = save_trained(fine_tuning(dataclasses.replace(QUICK, scope="all")).init(model, KEY))
    assert not [path for path in paths if "patch" in path]


def test_a_new_number_of_requests_compiles_little(decoder):
    wanted = [EditRequest(f"the cat {letter}", "ab") for letter in "bcdfg"]
    edit(decoder, wanted=wanted)
    before = update._cache_size()
    edit(decoder, wanted=wanted[:4])
    edit(decoder, dataclasses.replace(QUICK, adam_rate=3e-3, passes=7), wanted=wanted)
    assert update._cache_size() == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scope", "first", "scope 'first' does not exist; use scope=last, scope=all or a layer's number"),
        ("scope", "-1", "scope '-1' does not exist"),
        ("adam_rate", 0.0, "adam_rate is 0.0; give a positive number"),
        ("adam_rate", float("nan"), "adam_rate is nan; give a positive number"),
        ("passes", 0, "passes is 0; give 1 or more"),
        ("batch_size", 0, "batch_size is 0; give 1 or more"),
        ("kl_tokens", -3, "kl_tokens is -3; give 1 or more"),
        ("kl", -1.0, "kl is -1.0; give 0, which leaves it out"),
        ("max_change", float("inf"), "max_change is inf; give 0"),
        ("loss_enough", -1.0, "loss_enough is -1.0; give 0"),
    ],
)
def test_bad_settings_are_named(name, value, message):
    with pytest.raises(TPatchError, match=message):
        FineTuningSettings(**{name: value})


def test_a_layer_that_is_not_there_is_named(decoder):
    with pytest.raises(TPatchError, match="layer 7 is not in this model; it has layers 0 to 1"):
        fine_tuning(FineTuningSettings(scope="7")).init(decoder, KEY)


def test_kl_of_a_model_that_cannot_sample_needs_a_memory():
    with pytest.raises(TPatchError, match="cannot sample text"):
        edit(MODELS["classifier"](), dataclasses.replace(QUICK, kl=1.0))


def test_its_settings_are_no_other_methods():
    names = {field.name for field in dataclasses.fields(FineTuningSettings)}
    for name, method in METHODS.items():
        if not name.startswith("ft"):
            changes = {"passes": 3}
            found = method_settings([name, "ft"], changes=changes)
            assert found[name] == method.presets["default"]
            assert found["ft"].passes == 3
    assert names >= {"scope", "kl", "max_change"}
    variants = {name.removeprefix("ft-"): method for name, method in METHODS.items() if name.startswith("ft-")}
    for name, method in variants.items():
        assert method.presets["default"] == FINE_TUNING_PRESETS[name]


def records() -> list[Record]:
    found = []
    for number, (subject, target) in enumerate(zip(("Ada", "Bob", "Cyd"), ("red", "sky", "ash"), strict=True)):
        prompt, near = f"{subject} likes", Probe("The sun is", "sky")
        probes = {"reliability": (Probe(prompt, target),), "locality": (near,)}
        found.append(Record(f"r{number}", (EditRequest(prompt, target, subject),), probes))
    return found


METHODS_USED = {"batch": ["tpatcher", "ft-kl"], "single": ["ft"], "sequential": ["ft"]}


@pytest.mark.parametrize("protocol", METHODS_USED)
def test_it_is_evaluated_and_resumed(decoder, letters, tmp_path: Path, monkeypatch, protocol):
    monkeypatch.setattr("tpatch_jax.evaluation.protocols.SAVE_EVERY", 1)
    methods = METHODS_USED[protocol]
    changes = {"adam_rate": 1e-2, "passes": 60}
    if "tpatcher" in methods:
        changes |= {"site": "last", "contexts": 1, "other_subjects": 0, "attempts": 1, "key_steps": 4, "value_steps": 4}
    settings = method_settings(methods, changes=changes)

    def run(output: Path | None = None, **options: Any) -> list[Any]:
        report = evaluate(
            decoder, records(), methods, protocol, settings=settings, memory=letters, cache=False, output=output,
            **options,
        )  # fmt: skip
        return [(result["method"], result["metrics"], result["requests"]) for result in report["results"]]

    whole = run()
    found = {name: figures for name, figures, _ in whole}
    assert [*found] == ["unedited", *methods]
    assert found["unedited"]["exact"] == 0.0
    assert found[methods[1 if protocol == "batch" else 0]]["SR" if protocol == "sequential" else "exact"] == 1.0
    begun = []

    def stop(what: str, done: int, total: int) -> None:
        begun.append(what)
        if "fine-tuning" in begun and what in ("single edits", "measuring", "stream") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", progress=stop)
    assert run(tmp_path / "out") == whole


def test_examples_work():
    for module in (fine_tuning_module, fine_tuning_settings, fine_tuning_step):
        assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
    assert splice({"a": {1: 2}}, {}) == {"a": {1: 2}}
    assert networks.pointwise(make_tiny_model().config)
