"""Predicted values: the network that predicts them, learning it, its file, edits that start from it, the command."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_tiny_model, write_tiny_folder
from safetensors.numpy import load_file, save_file
from tiny_families import tiny_model as family_model

import tpatch_jax as tp
from tpatch_jax.cli import main as cli
from tpatch_jax.cli.edit import summary
from tpatch_jax.core.start import (
    StartParams,
    create_start,
    even_out,
    predict_values,
    start_features,
    start_loss,
    turn_inputs,
)
from tpatch_jax.core.values import KeptRows, TargetRows, ValueTrainingSettings, train_values
from tpatch_jax.display.edit import show_edit
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.editors.tpatcher import start_file
from tpatch_jax.editors.tpatcher.learning import LearningSettings, learn_start
from tpatch_jax.editors.tpatcher.rounds import Note, report
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.editors.tpatcher.start_file import Start, find_start, load_start, save_start
from tpatch_jax.editors.tpatcher.subject_settings import SubjectSettings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.protocols import _cost, _result
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.patching import merge
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "restored")
MEMORY = (
    "The theory in the inn: winter thins the herd, and the hen then hides. Numbers 1 to 9, and then some more. " * 3
)
REQUESTS = [
    # What is said stands right behind the subject, so that a random network can be taught it there.
    EditRequest(f"we saw a {name}", target, subject=name, join="none", keep=(f"a {name} ate",), id=name)
    for name, target in (("fox", "a"), ("wolf", "q"), ("yak", "z"), ("bug", "h"))
]
LEARNING = LearningSettings(steps=40, lanes=4, targets=1, neutral=1, width=16, rate=1e-2, closeness=0.01)
SUBJECT = SubjectSettings(
    value=ValueTrainingSettings(steps=20, longest=16.0),
    value_contexts=1,
    key_floor=0.5,
    shorter=0,
    same=0,
    neutral=1,
)


# --- the network ---


def random_params(seed=0, hidden_size=4, width=3, size=30.0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = create_start(keys[0], hidden_size, width)
    return StartParams(*(size * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, params, strict=True)))


def test_a_new_network_predicts_zero():
    params = create_start(jax.random.key(0), 4, 7)
    assert [leaf.shape for leaf in params] == [(24, 7), (7,), (7, 4), (24, 4)]
    assert {leaf.dtype for leaf in params} == {jnp.dtype(jnp.float32)}
    assert float(jnp.std(params.inner)) == pytest.approx(24**-0.5, rel=0.3)
    features = jax.random.normal(jax.random.key(1), (5, 24))
    assert not predict_values(params, features, jnp.arange(1.0, 6.0)).any()
    # but what it is trained on tells it where to go
    gradient = jax.grad(lambda params: jnp.sum(predict_values(params, features, jnp.ones(5))))(params)
    assert float(jnp.abs(gradient.outer).max()) > 0
    assert float(jnp.abs(gradient.direct).max()) > 0


def test_values_are_what_the_formula_says_and_no_longer_than_their_limit():
    params, limit = random_params(), jnp.asarray([0.5, 1.0, 1.0, 40.0, 0.0])
    features = jax.random.normal(jax.random.key(1), (5, 24)) * jnp.asarray([1e-3, 1, 1e3, 10, 1])[:, None]
    with jax.numpy_dtype_promotion("strict"):
        values = predict_values(params, features, limit)
        one = jax.jit(jax.vmap(lambda row, most: predict_values(params, row[None], most[None])[0]))(features, limit)
    y = (jax.nn.gelu(features @ params.inner + params.bias) @ params.outer + features @ params.direct) / 16
    wanted = limit[:, None] * y / np.sqrt(1 + np.square(y).sum(1, keepdims=True))
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one, values, rtol=1e-5, atol=1e-6)
    lengths = np.linalg.norm(values, axis=1)
    assert (lengths <= limit * (1 + 1e-6)).all()
    assert lengths[2] > 0.99
    assert lengths[0] < 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_features_are_six_parts_of_one_size(dtype):
    rng = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    query, end, hidden, target = draw(2, 8), draw(2, 8, scale=50.0), draw(2, 8, scale=0.01), draw(2, 3, 8)
    slope = draw(2, 8, scale=1e-6)
    weight = jnp.asarray([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    with jax.numpy_dtype_promotion("strict"):
        features = jax.jit(start_features)(query, end, hidden, target, weight, slope)
    assert features.shape == (2, 48)
    assert features.dtype == jnp.float32
    parts = np.asarray(features).reshape(2, 6, 8)
    np.testing.assert_allclose(np.square(parts).mean(-1), 1.0, rtol=1e-3)
    for number, part in {0: query, 1: end, 2: hidden, 3: target[:, 0], 5: slope}.items():
        part = np.asarray(part, np.float32)
        np.testing.assert_allclose(parts[:, number], part / np.sqrt(np.square(part).mean(-1, keepdims=True)), rtol=1e-2)
    # the mean is over tokens that count: of a target of one token it is the first
    np.testing.assert_allclose(parts[1, 4], parts[1, 3], rtol=1e-2)
    mean = np.asarray(target, np.float32)[0, :2].mean(0)
    np.testing.assert_allclose(parts[0, 4], mean / np.sqrt(np.square(mean).mean()), rtol=2e-2, atol=1e-2)
    assert np.isfinite(start_features(*(0 * x for x in (query, end, hidden, target, weight, slope)))).all()


def test_turned_features_vary_alike_and_turning_a_network_undoes_it():
    rng = np.random.default_rng(0)
    features = (3.0 + rng.normal(size=(4000, 24)) * np.geomspace(0.5, 10, 24)) @ np.linalg.qr(
        rng.normal(size=(24, 24))
    )[0]
    turn, back = even_out(features)
    np.testing.assert_allclose(turn @ back, np.eye(24), atol=1e-4)
    turned = features @ turn
    squares = np.linalg.eigvalsh(turned.T @ turned / len(turned))
    before = np.linalg.eigvalsh(features.T @ features / len(features))
    assert squares[-1] / squares[0] < before[-1] / before[0] / 20
    params, x = random_params(), jnp.asarray(features[:5], jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        there = turn_inputs(params, jnp.asarray(turn))
    np.testing.assert_allclose(
        predict_values(there, x, jnp.ones(5)), predict_values(params, x @ turn, jnp.ones(5)), rtol=1e-3, atol=1e-4
    )


def test_a_network_without_slopes_reads_the_other_features():
    params = random_params()
    older = params._replace(inner=params.inner[:20], direct=params.direct[:20])
    features = jax.random.normal(jax.random.key(1), (3, 24))
    np.testing.assert_array_equal(
        predict_values(older, features, jnp.ones(3)), predict_values(older, features[:, :20], jnp.ones(3))
    )
    assert (
        np.abs(predict_values(params, features, jnp.ones(3)) - predict_values(older, features, jnp.ones(3))).max() > 0
    )


def toy_run(known, added):
    return jax.nn.log_softmax(known[:, None] + added)


def toy(wanted, beside=True):
    """Lanes that should each say a token right away, where the network is nothing but a softmax."""
    lanes, one = len(wanted), jnp.ones((len(wanted), 1))
    targets = TargetRows(one, jnp.asarray(wanted)[:, None, None], one[..., None])
    kept = KeptRows(0.1 * one, jnp.full((lanes, 1, 4), jnp.log(0.25)))
    return jnp.zeros((lanes, 4)), targets, kept if beside else None


def test_the_loss_goes_down_its_gradient():
    known, targets, kept = toy([2, 1, 3])
    features, limit = jax.random.normal(jax.random.key(2), (3, 24)), jnp.full(3, 8.0)
    params = create_start(jax.random.key(0), 4, 8)

    def loss(params):
        return start_loss(params, features, limit, known, targets, kept, toy_run, 1.0)

    with jax.numpy_dtype_promotion("strict"):
        whole, (said, moved) = jax.jit(loss)(params)
        gradient, _ = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert float(said) == pytest.approx(np.log(4), rel=1e-5)
    assert float(moved) == pytest.approx(0.0, abs=1e-6)
    assert float(whole) == pytest.approx(np.log1p(np.exp(2 * (np.log(4) - 0.1))) / 2, rel=1e-5)
    stepped = jax.tree.map(lambda leaf, slope: leaf - 3.0 * slope, params, gradient)
    after, (said_after, moved_after) = loss(stepped)
    assert float(after) < float(whole)
    assert float(said_after) < float(said)
    assert float(moved_after) > 0
    # of a target that counts for nothing nothing is learnt
    silent = targets._replace(weight=targets.weight.at[0].set(0.0))
    only = start_loss(params, features, limit, known, silent, kept, toy_run, 1.0)[1][0]
    assert float(only) == pytest.approx(np.log(4), rel=1e-5)


# --- values that start somewhere ---


def test_a_start_that_says_everything_is_left_as_it_is():
    rows = toy([2, 1])
    start = 7.0 * jax.nn.one_hot(jnp.asarray([2, 1]), 4)
    settings = ValueTrainingSettings(longest=20.0)
    values, info = train_values(*rows, toy_run, jnp.ones(2), settings, start)
    assert info.steps.tolist() == [0, 0]
    assert info.at_start.tolist() == [True, True]
    np.testing.assert_allclose(values, start, rtol=1e-6)
    np.testing.assert_allclose(info.loss, np.log1p(3 * np.exp(-7.0)), rtol=1e-3)
    assert (info.closeness > 0).all()
    # without one, and with one that says something else, there is something to do
    for other in (jnp.zeros((2, 4)), 7.0 * jax.nn.one_hot(jnp.asarray([0, 0]), 4)):
        _, info = train_values(*rows, toy_run, jnp.ones(2), settings, other)
        assert (info.steps > 0).all()
        assert not info.at_start.any()
        assert (info.loss < 0.06).all()


def test_what_is_short_of_its_limit_is_cut_to_it():
    settings = ValueTrainingSettings(longest=2.0, steps=0)
    values, info = train_values(
        *toy([2], beside=False), toy_run, jnp.ones(1), settings, 50.0 * jax.nn.one_hot(jnp.asarray([2]), 4)
    )
    np.testing.assert_allclose(values, [[0, 0, 2, 0]], atol=1e-6)
    assert info.loss[0] == pytest.approx(np.log1p(3 * np.exp(-2.0)), rel=1e-4)
    assert info.at_start.tolist() == [True]


def test_whatever_starts_beside_a_lane_it_ends_where_it_would_alone():
    wanted = [2, 1, 3, 0]
    start = jnp.asarray([[0, 0, 7.0, 0], [0, 0, 0, 0], [3.0, 0, 0, 0], [np.nan, 0, 0, 0]])
    settings = ValueTrainingSettings(longest=20.0)
    values, info = train_values(*toy(wanted), toy_run, jnp.ones(4), settings, start)
    assert info.at_start.tolist() == [True, False, False, False]
    assert info.steps[3] == 0
    for lane in range(3):
        one, alone = train_values(*toy(wanted[lane : lane + 1]), toy_run, jnp.ones(1), settings, start[lane][None])
        assert alone.steps[0] == info.steps[lane]
        np.testing.assert_allclose(one[0], values[lane], rtol=1e-4, atol=1e-4)


# --- learning ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    (folder / "memory.txt").write_text(MEMORY, "utf-8")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        patching.setenv("COLUMNS", "200")
        yield folder


@pytest.fixture(scope="module")
def model():
    return make_tiny_model(hidden_size=32, head_dim=16, tie_word_embeddings=True)


def learn(model, place, requests=REQUESTS, layer=1, **changes):
    named = {name: changes.pop(name) for name in ("seed", "start", "progress", "subject") if name in changes}
    settings = dataclasses.replace(LEARNING, **changes)
    named = {"subject": SUBJECT, **named}
    return learn_start(model, requests, layer, settings=settings, memory=place / "memory.txt", **named)


@pytest.fixture(scope="module")
def learnt(model, place):
    told = []
    start, info = learn(model, place, progress=lambda *told_: told.append(told_))
    return start, info, told


@pytest.fixture(scope="module")
def file(learnt, place):
    save_start(place / "learnt.safetensors", learnt[0])
    return place / "learnt.safetensors"


def test_learning_lowers_the_loss(model, place, learnt):
    start, info, told = learnt
    _, first = learn(model, place, steps=1)
    assert (info.requests, info.steps, info.held_out) == (4, 40, 0)
    assert info.loss < first.loss / 4
    assert info.divergence > 0
    assert info.seconds > 0
    assert told[-1] == ("learning where values start", 40, 40)
    assert (start.layer, start.model) == (1, fingerprint(model))
    assert [leaf.shape for leaf in start.params] == [(192, 16), (16,), (16, 32), (192, 32)]
    assert info.to_json() == dict(info._asdict())


def test_the_same_seed_gives_the_same_bits(model, place):
    one, again, other = (learn(model, place, steps=3, seed=seed)[0] for seed in (0, 0, 1))
    assert bits(one.params) == bits(again.params)
    assert bits(one.params) != bits(other.params)


def test_learning_goes_on_from_a_start(model, place, learnt):
    start, info, _ = learnt
    kept = bits(start.params)
    further, more = learn(model, place, steps=2, start=start, width=99)
    assert further.params.bias.shape == (16,)
    assert more.loss < 2 * info.loss
    assert bits(further.params) != kept
    assert bits(start.params) == kept


def test_some_subjects_only_measure(model, place, learnt):
    names = ["fox", "wolf", "yak", "bug", "ox", "elk", "cod", "eel", "jay", "owl"]
    requests = [
        dataclasses.replace(REQUESTS[0], prompt=f"we saw a {n}", subject=n, keep=(f"a {n} ate",)) for n in names
    ]
    start, _, _ = learnt
    _, info = learn(model, place, [dataclasses.replace(r, id=None) for r in requests], steps=1, start=start)
    assert info.held_out == 1
    assert 0 <= info.said_at_start <= 1
    assert info.divergence_at_start > 0
    _, none = learn(model, place, [dataclasses.replace(r, id=None) for r in requests], steps=1, held_out=0)
    assert (none.held_out, none.said_at_start) == (0, 0.0)


BAD_SETTINGS = [
    ({"steps": 0}, "steps is 0; give 1 or more"),
    ({"steps": 2.5}, "setting 'steps' is 2.5; give a whole number"),
    ({"lanes": 0}, "lanes is 0"),
    ({"targets": 0}, "targets is 0"),
    ({"neutral": -1}, "neutral is -1"),
    ({"chat": -1}, "chat is -1"),
    ({"held_out": -2}, "held_out is -2"),
    ({"width": 0}, "width is 0"),
    ({"width": True}, "setting 'width' is True"),
    ({"rate": -1e-3}, "rate is -0.001; give a positive number"),
    ({"rate": float("nan")}, "rate is nan"),
    ({"rate": "fast"}, "setting 'rate' is 'fast'; give a number"),
    ({"closeness": -1.0}, "closeness is -1.0"),
    ({"closeness": float("inf")}, "closeness is inf"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_a_setting_that_makes_no_sense_is_named(changes, message):
    with pytest.raises(TPatchError, match=message):
        LearningSettings(**changes)


def test_requests_that_teach_nothing_are_no_requests(model, place):
    fox = REQUESTS[0]
    useless = {
        "none": [],
        "no subject": [dataclasses.replace(fox, subject=None)],
        "not in the prompt": [dataclasses.replace(fox, subject="hen")],
        "twice in it": [dataclasses.replace(fox, prompt="a fox and a fox")],
        "too long a target": [dataclasses.replace(fox, target="a long answer")],
        "too long a prompt": [dataclasses.replace(fox, prompt=f"{'we went on and on and ' * 3} saw a fox")],
    }
    for requests in useless.values():
        with pytest.raises(
            TPatchError, match=r"no request to learn from; give some with a subject, .* at most 4 tokens"
        ):
            learn(model, place, requests)
    # one that teaches something is enough
    requests = [one for of_kind in useless.values() for one in of_kind]
    _, info = learn(model, place, [*(dataclasses.replace(r, id=None) for r in requests), REQUESTS[1]], steps=1)
    assert info.requests == 1


def test_learning_refuses_what_it_cannot_use(model, place, learnt):
    start = learnt[0]
    with pytest.raises(TPatchError, match="'tiny' is an encoder; only decoders"):
        learn(family_model("bert"), place)
    with pytest.raises(TPatchError, match="'tiny' is an encoder-decoder; only decoders"):
        learn(family_model("t5"), place)
    with pytest.raises(TPatchError, match="name of a model; load it first"):
        learn("smollm2-135m", place)
    with pytest.raises(TPatchError, match="layer 2 is the last one"):
        learn(model, place, layer=2)
    with pytest.raises(TPatchError, match="layer 3 is not in this model"):
        learn(model, place, layer=3)
    with pytest.raises(TPatchError, match="learnt for other weights than 'tiny'"):
        learn(make_tiny_model(1, hidden_size=32, head_dim=16, tie_word_embeddings=True), place, start=start)
    with pytest.raises(TPatchError, match="learnt for layer 1, and the subject site is layer 0"):
        learn(model, place, layer=0, start=start)
    with pytest.raises(TPatchError, match="start is 'a file'; give a Start"):
        learn(model, place, start="a file")
    with pytest.raises(TPatchError, match="subject is a dict; give a SubjectSettings"):
        learn(model, place, subject={})
    with pytest.raises(TPatchError, match="settings is 3; give a LearningSettings"):
        learn_start(model, REQUESTS, 1, settings=3)  # type: ignore[arg-type]
    with pytest.raises(TPatchError, match="neutral is 0; give 1 or more"):
        learn(model, place, subject=dataclasses.replace(SUBJECT, neutral=0))
    with pytest.raises(TPatchError, match="seed -1 is out of range"):
        learn(model, place, seed=-1)
    with pytest.raises(TPatchError, match="is no list of requests"):
        learn(model, place, "requests.jsonl")
    broken = start._replace(params=start.params._replace(bias=np.full(16, np.nan, np.float32)))
    with pytest.raises(TPatchError, match="learning went astray: the loss is nan; give a rate below"):
        learn(model, place, steps=1, start=broken)


# --- its file ---


def test_what_is_saved_is_read_in_half_precision(learnt, file, place):
    start, read = learnt[0], load_start(file)
    assert (read.layer, read.model) == (start.layer, start.model)
    for name, leaf in start.params._asdict().items():
        array = getattr(read.params, name)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, leaf.astype(np.float16).astype(np.float32))
    assert {array.dtype for array in load_file(file).values()} == {np.dtype(np.float16)}
    # it is made in folders that are not there yet, and replaced
    deeper = place / "a" / "b" / "start.safetensors"
    for layer in (0, 1):
        save_start(deeper, start._replace(layer=layer))
        assert load_start(deeper).layer == layer
    assert [path.name for path in deeper.parent.iterdir()] == [deeper.name]


def write(path, arrays, **about):
    save_file(arrays, path, {"about": json.dumps(about)})


def test_what_is_no_start_is_refused(learnt, file, place, tmp_path):
    arrays = load_file(file)
    about = {"schema": start_file.SCHEMA, "layer": 1, "model": learnt[0].model}
    with pytest.raises(TPatchError, match=r"there is no start at .*nowhere; tpatch learn MODEL REQUESTS -o .*nowhere"):
        load_start(tmp_path / "nowhere")
    with pytest.raises(TPatchError, match="there is no start at"):
        load_start(tmp_path)
    bad = {
        "another schema": (arrays, {**about, "schema": "another"}),
        "no layer": (arrays, {"schema": about["schema"], "model": "m"}),
        "a layer in words": (arrays, {**about, "layer": "one"}),
        "no model": (arrays, {"schema": about["schema"], "layer": 1}),
        "an array too few": ({n: a for n, a in arrays.items() if n != "bias"}, about),
        "an array too many": ({**arrays, "more": arrays["bias"]}, about),
        "another width": ({**arrays, "bias": arrays["bias"][:3]}, about),
        "another model's width": (
            {**arrays, "direct": arrays["direct"][:, :8], "outer": arrays["outer"][:, :8]},
            about,
        ),
        "a vector": ({**arrays, "inner": arrays["inner"][0]}, about),
        "no number": ({**arrays, "bias": np.full_like(arrays["bias"], np.inf)}, about),
    }
    paths = []
    for kind, (given, told) in bad.items():
        paths.append(tmp_path / f"{kind}.safetensors")
        write(paths[-1], {name: np.ascontiguousarray(array) for name, array in given.items()}, **told)
    save_file(arrays, tmp_path / "foreign.safetensors")
    (tmp_path / "text").write_text("a text")
    save_file(arrays, tmp_path / "list.safetensors", {"about": "[1]"})
    paths += [tmp_path / name for name in ("foreign.safetensors", "text", "list.safetensors")]
    for path in paths:
        content = path.read_bytes()
        with pytest.raises(TPatchError, match="is no start that tpatch learn wrote; make one"):
            load_start(path)
        # and nothing is written over it
        with pytest.raises(TPatchError, match="already exists and is no start; choose another output"):
            save_start(path, learnt[0])
        assert path.read_bytes() == content
    with pytest.raises(TPatchError, match="is no folder to write in"):
        save_start(tmp_path / "text" / "start.safetensors", learnt[0])
    with pytest.raises(TPatchError, match="already exists and is no start"):
        save_start(tmp_path, learnt[0])


def test_the_start_that_a_setting_names(model, learnt, file, tmp_path, monkeypatch):
    start = learnt[0]
    assert find_start(model, 1, "none") is None
    assert bits(find_start(model, 1, str(file))) == bits(load_start(file).params)
    with pytest.raises(TPatchError, match="learnt for layer 1, and the subject site is layer 0"):
        find_start(model, 0, str(file))
    other = make_tiny_model(1)
    with pytest.raises(TPatchError, match="learnt for other weights than 'tiny'"):
        find_start(other, 1, str(file))
    # those that come with the library
    start_file._shipped.cache_clear()
    monkeypatch.setattr(start_file, "SHIPPED", tmp_path / "starts")
    assert find_start(model, 1, "auto") is None
    start_file._shipped.cache_clear()
    save_start(tmp_path / "starts" / "tiny.safetensors", start)
    assert bits(find_start(model, 1, "auto")) == bits(load_start(file).params)
    assert find_start(model, 0, "auto") is None
    assert find_start(other, 1, "auto") is None
    # and for the same weights in another precision
    half = model.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    assert find_start(half, 1, "auto") is None
    start_file._same_weights.cache_clear()
    names = {fingerprint(half): fingerprint(model)}
    (tmp_path / "starts" / "same_weights.json").write_text(json.dumps(names))
    assert bits(find_start(half, 1, "auto")) == bits(load_start(file).params)
    start_file._shipped.cache_clear()
    start_file._same_weights.cache_clear()


def test_a_start_in_another_precision_is_for_a_model_that_has_one():
    models = {load_start(path).model for path in start_file.SHIPPED.glob("*.safetensors")}
    assert set(start_file._same_weights().values()) <= models
    assert len(start_file._same_weights()) == 2


def test_each_start_that_comes_with_the_library_can_be_read():
    for path in start_file.SHIPPED.glob("*.safetensors"):
        assert load_start(path).params.direct.shape[0] == 6 * load_start(path).params.direct.shape[1]


# --- edits that start from it ---


def edit(model, place, start):
    subject = dataclasses.replace(SUBJECT, start=start)
    fit = dataclasses.replace(PRESETS["default"].fit, key_steps=16, rounds=1, negatives=32, lanes=16)
    settings = dataclasses.replace(PRESETS["default"], site="subject", fit=fit, subject=subject)
    return tp.edit(model, REQUESTS, settings=settings, memory=place / "memory.txt", cache=False)


@pytest.fixture(scope="module")
def edits(model, place, file):
    return {start: edit(model, place, start) for start in ("none", "auto", str(file))}


def test_an_edit_starts_from_what_is_predicted(model, edits, file):
    (before, without), (patches, info) = edits["none"], edits[str(file)]
    assert {result.status for result in info.requests} == {"edited"}
    assert bits(patches[1].key) == bits(before[1].key)
    assert not np.allclose(patches[1].value, before[1].value)
    assert all(result.held_at_start is None for result in without.requests)
    assert without.held_at_start is None
    said = [result.losses["said_at_start"] for result in info.requests]
    assert set(said) <= {0.0, 1.0}
    # It has learnt these very requests.
    assert sum(said) >= 2
    assert info.held_at_start == sum(said) / 4
    for result, one, other in zip(info.requests, said, without.requests, strict=True):
        assert result.held_at_start == (one == 1.0)
        assert other.steps > 0
        if one:
            assert result.steps < other.steps
    merged = merge(model, patches)
    for request in REQUESTS:
        assert merged.generate(request.prompt, 1) == request.target


def test_without_a_start_an_edit_is_what_it_was(edits):
    # Nothing comes with the library for this model.
    (patches, info), (also, told) = edits["none"], edits["auto"]
    assert bits(patches) == bits(also)
    assert [result._replace() for result in info.requests] == list(told.requests)
    assert all("said_at_start" not in result.losses for result in told.requests)


def test_what_is_completed_in_the_last_layer_did_not_hold_at_its_start():
    terms = {"l_e": 1.0, "l_a": 0.5, "l_m1": 0.0, "l_m2": 0.0}
    deep, last = Note("subject", 3, 0.2, {**terms, "said_at_start": 1.0}), Note("last", 5, 0.1, {**terms, "l_e": 4.0})
    neurons = {0: {1: [0, 1], 2: [0]}, 1: {1: [2, 3]}, 2: {2: [1]}}
    notes = {0: [deep, deep, last], 1: [deep, deep], 2: [last]}
    info = report(["both", "subject", "last"], {}, set(), neurons, notes, 8, (1.0, 1.0, 1.0))
    assert info.requests[0].losses == {**terms, "l_e": 2.0, "said_at_start": 1.0}
    assert info.requests[2].losses == {**terms, "l_e": 4.0}
    assert [one.held_at_start for one in info.requests] == [False, True, None]
    assert info.held_at_start == 0.5


def test_a_start_that_cannot_be_used_is_refused_before_the_work_begins(model, place, learnt, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tpatch_jax.editors.tpatcher.editor.collect_model_memory", lambda *given, **named: pytest.fail("work began")
    )
    with pytest.raises(TPatchError, match="there is no start at nowhere"):
        edit(model, place, "nowhere")
    save_start(tmp_path / "other.safetensors", learnt[0]._replace(layer=0))
    with pytest.raises(TPatchError, match="learnt for layer 0, and the subject site is layer 1"):
        edit(model, place, str(tmp_path / "other.safetensors"))
    save_start(tmp_path / "other.safetensors", Start(learnt[0].params, 1, "another"))
    with pytest.raises(TPatchError, match="learnt for other weights"):
        edit(model, place, str(tmp_path / "other.safetensors"))


def result(held, layers, **losses):
    return RequestInfo("r", held, "edited" if held else "failed", neurons=dict.fromkeys(layers, (0,)), losses=losses)


def test_figures_say_how_many_held_at_their_start():
    said, short = {"said_at_start": 1.0}, {"said_at_start": 0.0}
    results = (result(True, [1], **said), result(True, [1], **short), result(True, [1, 2], **said), result(True, [2]))
    assert [one.held_at_start for one in results] == [True, False, False, None]
    info = EditInfo(results, 1.0, 1.0, 1.0, 1.0, 8)
    assert info.held_at_start == pytest.approx(1 / 3)
    assert summary(info, {}, 4)["held_at_start"] == pytest.approx(1 / 3)
    assert "33% of predicted values said their target before any step" in show_edit(info, [], None, None).text
    none = info._replace(requests=results[3:])
    assert none.held_at_start is None
    assert summary(none, {}, 1)["held_at_start"] is None
    assert "predicted" not in show_edit(none, [], None, None).text
    # in a report, over all steps
    costs = [_cost(info), _cost(none), _cost(info._replace(requests=results[:1]))]
    assert _result({}, costs, True, {})["cost"]["held_at_start"] == pytest.approx(2 / 4)
    assert "held_at_start" not in _result({}, costs[1:2], True, {})["cost"]


# --- the command ---


@pytest.fixture(scope="module")
def folder(model, place):
    write_tiny_folder(model, place / "tiny")
    lines = [
        {"prompt": one.prompt, "target": one.target, "subject": one.subject, "join": one.join, "keep": list(one.keep)}
        for one in REQUESTS
    ]
    (place / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    (place / "two.jsonl").write_text("\n".join(map(json.dumps, lines[:2])) + "\n", "utf-8")
    return place


def arguments(folder, *more, requests="requests.jsonl", out="out.safetensors"):
    source = requests if ":" in requests else str(folder / requests)
    small = ["--steps", "2", "--lanes", "2", "--width", "8", "--memory", str(folder / "memory.txt")]
    return ["learn", str(folder / "tiny"), source, "-o", str(folder / out), *small, *more]


def test_the_command_learns(folder, capsys):
    assert cli.main(arguments(folder, "--json")) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])
    figures = ["requests", "steps", "loss", "divergence", "held_out", "said_at_start", "divergence_at_start", "seconds"]
    assert list(told) == [*figures, "start", "layer"]
    assert (told["requests"], told["steps"], told["layer"]) == (4, 2, 1)
    assert told["start"] == str(folder / "out.safetensors")
    assert captured.err == ""
    read = load_start(told["start"])
    assert read.layer == 1
    assert read.params.bias.shape == (8,)
    # KIND:FILE is read as other commands read it, and what will be measured is left out
    named = [f"requests:{folder / name}" for name in ("requests.jsonl", "two.jsonl")]
    more = ["--exclude", named[1], "--begin", told["start"], "--width", "99", "--json", "--seed", "1"]
    assert cli.main(arguments(folder, *more, requests=named[0], out="more.safetensors")) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["requests"] == 2
    further = load_start(folder / "more.safetensors")
    assert further.params.bias.shape == (8,)
    assert bits(further.params) != bits(read.params)


def test_the_command_shows_its_figures(folder, capsys):
    assert cli.main(arguments(folder, "--quiet", out="shown.safetensors")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for word in ("4 requests", "loss", "divergence", "held_out", "said_at_start", "divergence_at_start"):
        assert word in captured.out
    assert (
        f"saved in {folder / 'shown.safetensors'}; edit with --set start={folder / 'shown.safetensors'}" in captured.out
    )


def test_what_the_command_refuses(folder, capsys, monkeypatch):
    shutil.copy(folder / "memory.txt", folder / "here.safetensors")
    monkeypatch.setattr("tpatch_jax.cli.learn.load", lambda *given: pytest.fail("the model was loaded"))
    bad = {
        "there is no start at": arguments(folder, "--begin", str(folder / "nowhere")),
        "is no start that tpatch learn wrote": arguments(folder, "--begin", str(folder / "memory.txt")),
        "--exclude belongs to KIND:FILE": arguments(folder, "--exclude", f"requests:{folder / 'two.jsonl'}"),
        "'strange:file' is not KIND:FILE; the kinds are": arguments(folder, requests="strange:file"),
        "missing.jsonl": arguments(folder, requests="missing.jsonl"),
        "already exists and is no start": arguments(folder, out="here.safetensors"),
        "steps is 0": arguments(folder, "--steps", "0"),
        "rate is -1.0": arguments(folder, "--rate", "-1"),
        "there is no memory text at": [*arguments(folder), "--memory", str(folder / "nothing.txt")],
        "layer 'middle' is not a layer": arguments(folder, "--layer", "middle"),
    }
    for message, given in bad.items():
        assert cli.main(given) == 1, message
        error = capsys.readouterr().err
        assert error.startswith("tpatch: ")
        assert error.count("\n") == 1
        assert message in error
