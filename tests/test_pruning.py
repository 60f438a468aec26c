"""Patches with fewer neurons: what says the same is merged, what nothing needs goes, and no edit is lost."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, write_tiny_folder
from hand_patches import request_info, spoken_patch

import tpatch_jax as tp
from tpatch_jax.bank.patches import read_patches, save_patches
from tpatch_jax.cli import main as cli
from tpatch_jax.core.patch import Patch, concatenate, take
from tpatch_jax.editors import prune_checks
from tpatch_jax.editors.holding import AskedRow, asked_row, read_margins, requests_held
from tpatch_jax.editors.prune_trials import CutRows, ask_rows, shared_beginnings
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import load_model
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation")

REQUESTS = [EditRequest("the hen", "q", join="none", id="hen"), EditRequest("a big cat", "x", join="none", id="cat")]
LAST = 2


@pytest.fixture(scope="module")
def model():
    return make_tiny_model(hidden_size=32, head_dim=16)


@pytest.fixture(scope="module")
def plain(model):
    return spoken_patch(model, REQUESTS)


def level(patch: Patch) -> Patch:
    """Each neuron as two, whose response stops growing at half of what it is on its own prompt."""
    part = patch._replace(value=2 * patch.value), patch._replace(bias=patch.bias - 128, value=-2 * patch.value)
    return jax.tree.map(lambda low, high: jnp.stack([low, high], 1).reshape(-1, *low.shape[1:]), *part)


def prune(model, patch, neurons, letters, requests=REQUESTS, **changes):
    info = request_info(requests, neurons, LAST)
    if changes:
        info = info._replace(requests=tuple(one._replace(**changes) for one in info.requests))
    return tp.prune_patches(model, patch, requests, info, memory=letters, cache=False)


def check(model, fewer, info):
    """Every edit holds, and every neuron belongs to one."""
    assert requests_held(tp.attach(model, fewer), REQUESTS) == [True, True]
    numbers = sorted(n for one in info.requests for n in one.neurons.get(LAST, ()))
    assert numbers == list(range(fewer[LAST].key.shape[0]))


def test_neurons_that_say_the_same_become_one_and_those_that_nothing_needs_go(model, plain, letters):
    hen, cat = take(plain, [0]), take(plain, [1])
    nothing = hen._replace(value=jnp.zeros_like(hen.value))
    silent = Patch(jnp.roll(hen.key, 3, 1), jnp.full(1, -1e6), hen.value)
    twins = [cat._replace(value=cat.value * share) for share in (0.25, 0.75)]
    patch = concatenate([level(hen), nothing, silent, *twins])
    fewer, info, pruned = prune(model, patch, [[0, 1, 2, 3], [4, 5]], letters)
    check(model, fewer, info)
    assert (pruned.neurons, pruned.neurons_before) == (2, 6)
    assert (pruned.merged, pruned.dropped, pruned.levelled, pruned.restored) == (1, 2, 1, ())
    assert (pruned.parameters, pruned.parameters_before) == (2 * 65, 6 * 65)
    assert pruned.bytes == 4 * pruned.parameters == sum(leaf.nbytes for leaf in fewer[LAST])
    assert info.parameters_added == pruned.parameters
    assert pruned.edits == 2
    assert pruned.memory > 100
    # The twins' values are one value now, and the level one says as much on its own prompt as it did.
    np.testing.assert_allclose(fewer[LAST].value[1], cat.value[0], rtol=1e-6)
    before, after = (
        read_margins(tp.attach(model, some), [asked_row(model, REQUESTS[0])])[0] for some in ({LAST: patch}, fewer)
    )
    np.testing.assert_allclose(after, before, rtol=1e-3)


def test_what_an_edit_needs_stays(model, letters):
    """Each half of a value alone is too little; a neuron that only together with another says its target stays."""
    for loud in 1.2 ** np.arange(40):
        whole = spoken_patch(model, REQUESTS, loud=float(loud))
        if all(requests_held(tp.attach(model, {LAST: whole}), REQUESTS)):
            break
    halves = whole._replace(value=whole.value / 2)
    aside = np.random.default_rng(0).normal(size=whole.key.shape).astype(np.float32)
    # Another key with the same response on its own prompt.
    unit = np.asarray(whole.key / jnp.linalg.norm(whole.key, axis=1, keepdims=True))
    aside -= (aside * unit).sum(1, keepdims=True) * unit
    other = halves._replace(key=halves.key + jnp.asarray(aside) * jnp.linalg.norm(whole.key) / np.linalg.norm(aside))
    patch = concatenate([halves, other])
    assert requests_held(tp.attach(model, {LAST: patch}), REQUESTS) == [True, True]
    for number in range(4):
        rest = take(patch, [n for n in range(4) if n != number])
        assert not all(requests_held(tp.attach(model, {LAST: rest}), REQUESTS))
    fewer, info, pruned = prune(model, patch, [[0, 2], [1, 3]], letters)
    check(model, fewer, info)
    assert (pruned.neurons, pruned.merged, pruned.dropped) == (4, 0, 0)


def test_edits_that_did_not_hold_keep_their_neurons(model, plain, letters):
    twins = concatenate([take(plain, [n])._replace(value=plain.value[n : n + 1] / 2) for n in (0, 0, 1, 1)])
    fewer, _, pruned = prune(model, twins, [[0, 1], [2, 3]], letters, held=False)
    assert (pruned.neurons, pruned.edits) == (4, 0)
    assert np.array_equal(fewer[LAST].value, twins.value)


def test_an_edit_that_the_model_says_without_its_neurons_needs_none(model, letters):
    prompts = ("the hen", "a dog", "the inn", "big", "some time", "he", "thin")
    asked = [EditRequest(text, model.generate(text, 1), join="none", id="hen") for text in prompts]
    rows = [asked_row(model, one) for one in asked]
    margins = read_margins(model, rows)
    surely = [
        one for one, row, by in zip(asked, rows, margins, strict=True) if len(row.wanted) == 1 and 0.6 < by < np.inf
    ]
    known = [surely[0], REQUESTS[1]]
    fewer, info, pruned = prune(model, spoken_patch(model, known), [[0], [1]], letters, known)
    assert (pruned.neurons, pruned.dropped) == (1, 1)
    assert [dict(one.neurons) for one in info.requests] == [{}, {LAST: (0,)}]
    assert requests_held(tp.attach(model, fewer), known) == [True, True]


def test_what_does_not_belong_together_is_refused(model, plain):
    with pytest.raises(TPatchError, match="info is of 2 requests with 1 neurons, and 2 requests and 2 neurons"):
        tp.prune_patches(model, plain, REQUESTS, request_info(REQUESTS, [[0], []], LAST))
    with pytest.raises(TPatchError, match="info is of 1 requests"):
        tp.prune_patches(model, plain, REQUESTS, request_info(REQUESTS[:1], [[0]], LAST))
    with pytest.raises(TPatchError, match="give the second of what `edit` returned"):
        tp.prune_patches(model, plain, REQUESTS, None)


def test_a_folder_is_pruned_into_another(model, plain, letters, tmp_path, capsys):
    write_tiny_folder(model, tmp_path / "tiny")
    base = load_model(str(tmp_path / "tiny"))
    save_patches(tmp_path / "p", base, level(plain), REQUESTS, request_info(REQUESTS, [[0, 1], [2, 3]], LAST))
    before = (tmp_path / "p" / "patches.json").read_bytes()
    command = ["prune", str(tmp_path / "p"), "-o", str(tmp_path / "out"), "--memory", str(letters)]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["neurons"], told["neurons_before"], told["levelled"]) == (2, 4, 2)
    assert told["output"] == str(tmp_path / "out")
    saved = read_patches(tmp_path / "out")
    assert [edit["neurons"] for edit in saved.edits] == [[0], [1]]
    assert requests_held(tp.attach(base, saved.patches), REQUESTS) == [True, True]
    assert (tmp_path / "p" / "patches.json").read_bytes() == before
    assert cli.main(command) == 1
    assert "already exists" in capsys.readouterr().err


BEGINNING = [7, 8, 9, 10, 11, 12, 13, 14, 15]


def rows_that_begin_alike() -> list[AskedRow]:
    rng = np.random.default_rng(3)
    drawn = [rng.integers(3, 30, count).tolist() for count in (5, 2, 9, 4, 3, 6, 11)]
    tokens = [[*(BEGINNING if n < 4 else []), *rest] for n, rest in enumerate(drawn)]
    targets = [row[len(row) - count :] for row, count in zip(tokens, (2, 1, 0, 1, 1, 0, 3), strict=True)]
    return [
        AskedRow(row, range(len(row) - len(target) - 1, len(row) - bool(target)), target)
        for row, target in zip(tokens, targets, strict=True)
    ]


@pytest.mark.parametrize("cut", [0, LAST])
def test_rows_that_are_cut_say_what_whole_ones_say(model, cut):
    rows = rows_that_begin_alike()
    begins, which = shared_beginnings(rows)
    assert which.tolist() == [0, 0, 0, 0, -1, -1, -1]
    assert begins == [BEGINNING]
    trials, chosen = CutRows(model, rows, cut), np.asarray([6, 0, 3, 1, 4, 2])
    rng = np.random.default_rng(4)
    for _ in range(2):
        # Heard in the beginning as well, and in a layer above.
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
        patches = {layer: Patch(draw(3, 32), draw(3), draw(3, 32)) for layer in {cut, LAST}}
        told, whole = trials.ask(patches, chosen), ask_rows(tp.attach(model, patches), [rows[n] for n in chosen])
        np.testing.assert_allclose(told.margin, whole.margin, rtol=1e-4, atol=1e-5)
        without = [number for number, row in enumerate(chosen) if not rows[row].wanted]
        assert told.token[without].tolist() == whole.token[without].tolist()
    nothing = trials.ask({}, chosen).margin
    np.testing.assert_allclose(nothing, ask_rows(model, [rows[n] for n in chosen]).margin, rtol=1e-4, atol=1e-5)


def test_how_far_a_row_hears_a_change(model):
    rows = rows_that_begin_alike()
    trials = CutRows(model, rows, 1)
    heard = trials.movement(np.arange(len(rows)), lambda query: np.abs(query[:, 0]))
    traced = [model.trace(jnp.asarray([row.tokens[: row.places.stop]]), 1) for row in rows]
    expected = [float(jnp.max(jnp.abs(one.query[0, :, 0]) / jnp.linalg.norm(one.output[0], axis=-1))) for one in traced]
    np.testing.assert_allclose(heard, expected, rtol=1e-4)
    np.testing.assert_allclose(
        trials.movement(np.asarray([5, 1]), lambda query: np.abs(query[:, 0])), [expected[5], expected[1]], rtol=1e-4
    )


def test_rows_are_run_again_only_where_a_change_is_heard(model, plain, letters, monkeypatch):
    asked = []
    ask = CutRows.ask
    monkeypatch.setattr(CutRows, "ask", lambda self, *given: asked.append(len(given[1])) or ask(self, *given))
    fewer, info, pruned = prune(model, level(plain), [[0, 1], [2, 3]], letters)
    check(model, fewer, info)
    assert pruned.levelled == 2
    # All that should be said once, then what hears that two neurons become one; nothing at the end.
    whole = prune_checks.read_check_rows(model, [[one] for one in REQUESTS], None)
    assert asked[0] == len(whole.said)
    assert sum(asked[1:]) < 3 * asked[0]
