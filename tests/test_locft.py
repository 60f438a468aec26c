"""LocFT-BF: epochs over all edits in mini-batches, one down projection, the token that ends the answer."""

import dataclasses
import doctest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_tiny_model, relative, same, tiny_tokenizer
from tiny_families import tiny_model as family

from tpatch_jax.core.patch import create
from tpatch_jax.editors import locft as locft_module
from tpatch_jax.editors.locft import (
    LocftSettings,
    LocftState,
    _generator,
    _train,
    _with_end,
    check_locft,
    locft,
    restore_kernel,
    save_kernel,
)
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.registry import METHODS, method_settings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.records import Probe, Record
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"  # optax takes steps

KEY = jax.random.key(0)
# All of one length, so that few shapes are compiled.
WANTED = [EditRequest("the cat sat in", "q"), EditRequest("the dog ran on", "x"), EditRequest("the fox lay by", "z")]
QUICK = LocftSettings(adam_rate=3e-2, epochs=150, batch_size=2, layer="0", loss_enough=0.05)


@pytest.fixture(scope="module")
def model() -> Model:
    """What it says can be nearly certain, so that a loss can be low."""
    random = make_tiny_model(num_hidden_layers=2)
    return random.with_params({**random.params, "head": jax.tree.map(lambda leaf: 6 * leaf, random.params["head"])})


@pytest.fixture(scope="module")
def edited(model) -> tuple[LocftState, Any]:
    editor = locft(QUICK)
    return editor.step(editor.init(model, KEY), WANTED, KEY)


def changed(before: Any, after: Any) -> list[str]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for (path, old), new in pairs if not same(old, new)]


def test_edits_hold_and_end_and_one_matrix_changes(model, edited):
    before = bits(model.params)
    state, info = edited
    assert [(one.held, one.status, one.reason) for one in info.requests] == [(True, "edited", "")] * 3
    assert info.parameters_added == 0
    assert info.forward_equivalents > info.fit_forward_equivalents > 0
    assert changed(model.params, state.edited.params) == ["layers/0/ffn/down/kernel"]
    assert bits(model.params) == before
    # The end is said behind the target: without it a text of eight tokens would follow.
    assert [state.edited.generate(one.prompt, 8) for one in WANTED] == [f" {one.target}" for one in WANTED]
    batch = jnp.asarray([model.encode_prompt(WANTED[0].prompt)])
    assert same(locft(QUICK).apply(state, batch), state.edited.apply(batch))


def test_an_epoch_is_adam_on_mini_batches_in_its_order(model):
    """Two epochs against the formula on whole logits, mini-batches and the end included."""
    state = locft(QUICK).init(model, KEY)
    items = [_with_end(model, read_item(model, n, one, (), False), True) for n, one in enumerate(WANTED)]
    assert all(item.target[-1] == model.end and item.rows[0][-1] == model.end for item in items)
    settings = dataclasses.replace(QUICK, epochs=2, adam_rate=1e-2)
    trained = _train(state, items, KEY, settings, None)

    def loss(kernel: Any, chosen: Any) -> Any:
        layers = dict(model.params["layers"])
        layers[0] = {**layers[0], "ffn": {**layers[0]["ffn"], "down": {"kernel": kernel}}}
        other, total = model.with_params({**model.params, "layers": layers}), 0.0
        for number in chosen:
            item = items[number]
            log_p = jax.nn.log_softmax(other.apply(jnp.asarray([item.rows[0]]))[0])
            total -= log_p[jnp.asarray(item.places(0)), jnp.asarray(item.target)].mean()
        return total / len(chosen)

    generator, kernel = _generator(KEY), model.params["layers"][0]["ffn"]["down"]["kernel"]
    first = second = np.zeros(kernel.shape)
    count = 0
    for _ in range(2):
        order = generator.permutation(3)
        for part in (order[:2], order[2:]):
            count += 1
            slope = np.asarray(jax.grad(loss)(kernel, part.tolist()), np.float64)
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            update = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
            kernel = jnp.asarray(kernel - 1e-2 * update, jnp.float32)
    assert trained.updates == count
    assert relative(jax.tree.leaves(trained.trained)[0], kernel) < 1e-3


def test_a_low_loss_makes_no_step_and_ends_training(model, edited):
    state, _ = edited
    items = [_with_end(model, read_item(model, n, one, (), False), True) for n, one in enumerate(WANTED)]
    again = _train(state, items, KEY, dataclasses.replace(QUICK, loss_enough=0.5), None)
    assert (again.updates, again.loss < 0.5) == (0, True)
    assert same(again.trained, state.trained)
    lower = _train(state, items, KEY, dataclasses.replace(QUICK, loss_enough=0.0, epochs=2), None)
    assert lower.updates == 4
    same_state, info = locft(QUICK).step(state, WANTED, KEY)
    assert [one.status for one in info.requests] == ["already"] * 3
    assert same(same_state.trained, state.trained)


def test_a_stream_is_trained_on_earlier_edits_as_well(model):
    editor = locft(QUICK)
    state, _ = editor.step(editor.init(model, KEY), WANTED[:2], KEY)
    assert [one.prompt for one in state.requests] == [one.prompt for one in WANTED[:2]]
    after, _ = editor.step(state, WANTED[2:], KEY)
    assert [after.edited.generate(one.prompt, 8) for one in WANTED] == [f" {one.target}" for one in WANTED]
    # A later edit of the same prompt takes the earlier one's place.
    later, _ = editor.step(after, [EditRequest(WANTED[0].prompt, "k")], KEY)
    assert [(one.prompt, one.target) for one in later.requests[-1:]] == [(WANTED[0].prompt, "k")]
    assert len(later.requests) == 3
    alone = dataclasses.replace(QUICK, replay=False)
    forgetful, _ = locft(alone).step(state, WANTED[2:], KEY)
    assert len(forgetful.requests) == 3
    assert not same(forgetful.trained, after.trained)


def test_a_saved_state_goes_on_as_it_was(model, edited):
    state, _ = edited
    restored = restore_kernel(locft(QUICK).init(model, KEY), save_kernel(state))
    assert same(restored.edited.params, state.edited.params)
    assert restored.requests == state.requests
    with pytest.raises(TPatchError, match="take the same model"):
        restore_kernel(locft(QUICK).init(model, KEY), {**save_kernel(state), "kernel": np.zeros((2, 3))})


def test_what_does_not_hold_is_said_and_kept_or_not(model):
    wanted = [WANTED[0], EditRequest("", "x")]
    for keep in (True, False):
        settings = dataclasses.replace(QUICK, epochs=1, adam_rate=1e-4, keep_failed=keep)
        editor = locft(settings)
        fresh = editor.init(model, KEY)
        state, info = editor.step(fresh, wanted, KEY)
        assert [one.held for one in info.requests] == [False, False]
        fate = "the change was kept all the same" if keep else "nothing was kept"
        assert f"does not come out after 1 updates, and {fate}; raise epochs" in info.requests[0].reason
        assert "the prompt is empty" in info.requests[1].reason
        assert same(state.trained, fresh.trained) != keep
    settings = dataclasses.replace(QUICK, adam_rate=1e38)
    state, info = locft(settings).step(fresh, WANTED[:1], KEY)
    assert "the loss is not finite" in info.requests[0].reason
    assert "lower adam_rate" in info.requests[0].reason
    assert same(state.trained, fresh.trained)


def test_models_that_read_whole_inputs_are_edited_too():
    other = family("bert", num_hidden_layers=2)
    labels = other.config.labels
    said = labels.index(other.classify(["the cat sat in"])[0])
    request = EditRequest("the cat sat in", labels[(said + 1) % len(labels)])
    state, info = locft(QUICK).step(locft(QUICK).init(other, KEY), [request], KEY)
    assert info.requests[0].held
    assert state.edited.classify([request.prompt]) == [request.target]
    item = read_item(other, 0, request, (), False)
    assert _with_end(other, item, True) is item


def test_it_is_evaluated(model):
    records = [
        Record(f"r{n}", (one,), {"reliability": (Probe(one.prompt, one.target),), "locality": (Probe("an ox", "up"),)})
        for n, one in enumerate(WANTED)
    ]
    report = evaluate(model, records, ["locft"], "batch", cache=False, settings={"locft": QUICK}, other_facts=0)
    assert report["results"][1]["metrics"]["exact"] == 1.0
    assert METHODS["locft"].routing is None


def test_layers_and_values_that_make_no_sense_are_named(model):
    def layer(count: int) -> int:
        config = dataclasses.replace(model.config, layers=count)
        layers = {n: {"ffn": {}} for n in range(count)}
        return check_locft(dataclasses.replace(model, config=config, params={"layers": layers}), LocftSettings())

    assert [layer(count) for count in (1, 2, 30, 32)] == [0, 1, 20, 22]
    with pytest.raises(TPatchError, match="layer '7' does not exist; use layer=auto or 0 to 1"):
        locft(LocftSettings(layer="7")).init(model, KEY)
    with pytest.raises(TPatchError, match="something is attached to layer 0, which LocFT trains"):
        locft(QUICK).init(attach(model, {0: create(16, 1)}), KEY)
    endless = dataclasses.replace(model, settings={**model.settings, "eos_token_id": None}, tokenizer=tiny_tokenizer())
    endless.tokenizer.eos_token = None
    with pytest.raises(TPatchError, match=r"no token that ends a text; train without it \(end_token=false\)"):
        locft(QUICK).init(endless, KEY)
    assert check_locft(endless, dataclasses.replace(QUICK, end_token=False)) == 0
    for name, wrong in (("layer", "top"), ("epochs", 0), ("batch_size", 0), ("adam_rate", 0.0), ("loss_enough", -1.0)):
        with pytest.raises(TPatchError, match=f"{name} (is )?'?{wrong}"):
            method_settings(["locft"], changes={name: wrong})


def test_examples_work():
    result = doctest.testmod(locft_module, optionflags=doctest.ELLIPSIS)
    assert (result.failed, result.attempted > 0) == (0, True)
