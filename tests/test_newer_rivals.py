"""AlphaEdit (with MEMIT's aligned steps and ROME in a null space), UltraEdit and NeuralDB: algebra, edits, settings."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative, same
from hypothesis import given
from hypothesis import strategies as st
from test_rome import LOOSE, REQUESTS, network
from tiny_families import tiny_model as family

from tpatch_jax import EditRequest, TPatchError
from tpatch_jax.core import ffn
from tpatch_jax.core.adapters import Adapter
from tpatch_jax.core.patch import create
from tpatch_jax.editors.neuraldb import (
    Database,
    NeuralDBSettings,
    NeuralDBState,
    forget,
    neuraldb,
    restore_edits,
    save_edits,
)
from tpatch_jax.editors.neuraldb import _adapters as neuraldb_adapters
from tpatch_jax.editors.neuraldb import edited_model as database_model
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.registry import method_settings
from tpatch_jax.editors.rome.alphaedit import AlphaEditSettings, alphaedit
from tpatch_jax.editors.rome.hidden_moment import hidden_moment, moment_rows
from tpatch_jax.editors.rome.memit import MemitSettings, memit
from tpatch_jax.editors.rome.rank_one import distribute_update, null_projection, project_update, rank_one
from tpatch_jax.editors.rome.rome import RomeSettings, rome
from tpatch_jax.editors.rome.state import RomeState, edited, restore, save
from tpatch_jax.editors.rome.subject_value import ValueSettings
from tpatch_jax.editors.ultraedit import (
    UltraEditSettings,
    UltraEditState,
    absorb,
    begin_moments,
    collect_features,
    pseudo_values,
    restore_updates,
    ridge_update,
    save_updates,
    ultraedit,
    ultraedit_maps,
    ultraedit_rate,
)
from tpatch_jax.editors.ultraedit import edited_model as ultraedit_model
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.models.rows import tokens_array

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "few")

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def middle(tiny_model: Model, letters: Path) -> float:
    """A threshold that about half of a layer's directions are below."""
    moment = hidden_moment(tiny_model, 1, moment_rows(tiny_model, letters))
    return float(np.median(np.linalg.eigvalsh(np.asarray(moment, np.float64))))


@pytest.fixture(scope="module")
def fresh(tiny_model: Model, letters: Path, middle: float) -> RomeState:
    return alphaedit(AlphaEditSettings("0,1", middle, 0.01, LOOSE), memory=letters).init(tiny_model, KEY)


# --- AlphaEdit ---


def change(after: dict[str, Any], before: dict[str, Any]) -> np.ndarray:
    return np.asarray(after["down"]["kernel"], np.float64) - np.asarray(before["down"]["kernel"], np.float64)


@given(st.integers(0, 99), st.sampled_from([1, 4]), st.sampled_from([0.1, 10.0]), st.booleans())
def test_preserved_keys_stay_and_the_update_is_the_papers(seed: int, count: int, weight: float, more: bool) -> None:
    params, _, rng = network(9, 5, True, seed)
    # Preserved keys of five directions; nothing else was ever read.
    preserved = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 9))
    moment = preserved.T @ preserved / 40
    projection = null_projection(jnp.asarray(moment, jnp.float32), 1e-4)
    assert float(jnp.trace(projection)) == pytest.approx(4, abs=1e-4)
    keys, residuals, before = (rng.normal(size=(rows, wide)) for rows, wide in ((count, 9), (count, 5), (3, 9)))
    earlier = before.T @ before if more else np.zeros((9, 9))
    asked, wanted, known = (jnp.asarray(array, jnp.float32) for array in (keys, residuals, earlier))
    after = project_update(params, asked, wanted, projection, weight, known if more else None)
    moved = change(after, params)
    assert np.abs(preserved @ moved).max() < 1e-4
    # As the authors' code has it, where the system is not symmetric.
    free = np.asarray(projection, np.float64)
    expected = np.linalg.solve(free @ (keys.T @ keys + earlier) + weight * np.eye(9), free @ keys.T @ residuals)
    np.testing.assert_allclose(moved, expected, rtol=1e-2, atol=2e-4)


@given(st.integers(0, 99), st.sampled_from([0.1, 10.0]))
def test_without_the_projection_it_is_memits(seed: int, weight: float) -> None:
    params, _, rng = network(9, 5, False, seed)
    asked, wanted = (jnp.asarray(rng.normal(size=(4, wide)), jnp.float32) for wide in (9, 5))
    whole = jnp.eye(9)
    assert relative(
        project_update(params, asked, wanted, whole, weight)["down"]["kernel"],
        distribute_update(params, asked, wanted, whole, weight)["down"]["kernel"],
    ) < 1e-5  # fmt: skip


@given(st.integers(0, 99))
def test_an_aligned_step_is_the_difference_of_two_solutions_made_at_one_time(seed: int) -> None:
    params, moment, rng = network(9, 5, False, seed)
    known = jnp.asarray(moment)
    keys, goals = (jnp.asarray(rng.normal(size=(6, wide)), jnp.float32) for wide in (9, 5))
    kernel = params["down"]["kernel"]

    def solved(count: int) -> Any:
        return distribute_update(params, keys[:count], goals[:count] - keys[:count] @ kernel, known, 2.0)

    first = solved(4)
    missing = goals[4:] - keys[4:] @ first["down"]["kernel"]
    second = distribute_update(first, keys[4:], missing, known, 2.0, keys[:4].T @ keys[:4])
    assert relative(change(second, first), change(solved(6), first)) < 1e-2
    # What the authors' code does, which knows of the text alone, is something else.
    plain = distribute_update(first, keys[4:], missing, known, 2.0)
    assert relative(change(plain, first), change(second, first)) > 1e-2


def test_a_rank_one_update_in_the_null_space_reaches_its_value_and_keeps_the_rest() -> None:
    params, _, rng = network(9, 5, True, 3)
    preserved = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 9))
    moment = jnp.asarray(preserved.T @ preserved / 40, jnp.float32)
    free, damped = null_projection(moment, 1e-4), moment + 1e-3 * jnp.eye(9)
    key, value = jnp.asarray(rng.normal(size=9), jnp.float32), jnp.asarray(rng.normal(size=5), jnp.float32)
    after = rank_one(params, key, value, damped, projection=free)
    said = np.asarray(key) @ np.asarray(after["down"]["kernel"]) + np.asarray(after["down"]["bias"])
    np.testing.assert_allclose(said, value, atol=1e-4)
    assert np.abs(preserved @ change(after, params)).max() < 1e-4
    assert np.abs(preserved @ change(rank_one(params, key, value, damped), params)).max() > 1e-2


def test_the_algebra_passes_every_transformation() -> None:
    params, _, rng = network(6, 3, False, 1)
    free = null_projection(jnp.diag(jnp.asarray([1.0, 1, 1, 0, 0, 0])), 0.5)
    keys, residuals = (jnp.asarray(rng.normal(size=(2, wide)), jnp.float32) for wide in (6, 3))

    def updated(keys: Any, residuals: Any) -> Any:
        return project_update(params, keys, residuals, free, 1.0)["down"]["kernel"]

    one = updated(keys, residuals)
    np.testing.assert_allclose(jax.jit(updated)(keys, residuals), one, atol=1e-6)
    both = jax.vmap(updated)(jnp.stack([keys, keys]), jnp.stack([residuals, residuals]))
    np.testing.assert_allclose(both[1], one, atol=1e-5)
    # Where nothing is written, nothing can be gained.
    slope = np.asarray(jax.grad(lambda r: jnp.sum(jnp.square(updated(keys, r) - updated(keys, 0 * r))))(0 * residuals))
    assert np.abs(slope).max() < 1e-6
    assert np.isfinite(np.asarray(jax.grad(lambda k: jnp.sum(updated(k, residuals)))(keys))).all()


def test_shapes_of_another_layer_are_refused() -> None:
    params, _, _ = network(4, 3, False, 0)
    with pytest.raises(TPatchError, match="4 hidden neurons"):
        project_update(params, jnp.ones((2, 5)), jnp.ones((2, 3)), jnp.eye(4), 1.0)
    with pytest.raises(TPatchError, match="one row of each"):
        project_update(params, jnp.ones((2, 4)), jnp.ones((1, 3)), jnp.eye(4), 1.0)


def test_alphaedit_edits_a_model_within_the_null_space(tiny_model: Model, letters: Path, fresh: RomeState) -> None:
    editor = alphaedit(fresh.settings, memory=letters)
    state, info = editor.step(fresh, REQUESTS, KEY)
    assert [request.status for request in info.requests] == ["edited"] * 3
    model = edited(state)
    assert [model.generate(request.prompt, 1).strip() for request in REQUESTS] == ["the", "t", "the"]
    for layer, kernel in state.down_projections.items():
        added = np.asarray(kernel) - np.asarray(tiny_model.params["layers"][layer]["ffn"]["down"]["kernel"])
        moment = np.asarray(hidden_moment(tiny_model, layer, moment_rows(tiny_model, letters)), np.float64)
        values, vectors = np.linalg.eigh(moment)
        kept = vectors[:, values >= fresh.settings.null_space]
        assert kept.shape[1] > 4
        assert np.abs(added).max() > 1e-2
        assert np.abs(kept.T @ added).max() < 1e-4
    batch = tokens_array([tiny_model.encode("He met Eve in")], 16)
    # The state from before is the undo, and what is saved comes back with what later steps have to keep.
    assert same(editor.apply(fresh, batch), tiny_model.apply(batch))
    again = restore(fresh, save(state))
    assert same(again.earlier, state.earlier)
    assert same(editor.apply(again, batch), editor.apply(state, batch))


def test_later_steps_keep_what_earlier_ones_wrote(tiny_model: Model, letters: Path, fresh: RomeState) -> None:
    editor = alphaedit(fresh.settings, memory=letters)
    first, _ = editor.step(fresh, REQUESTS[:1], KEY)
    second, _ = editor.step(first, REQUESTS[1:2], KEY)
    forgetful, _ = editor.step(first._replace(earlier={}), REQUESTS[1:2], KEY)
    key = np.linalg.eigh(np.asarray(first.earlier[0], np.float64))[1][:, -1]

    def moved(state: RomeState) -> float:
        before, after = (np.asarray(one.down_projections[0], np.float64) for one in (first, state))
        return float(np.linalg.norm(key @ (after - before)))

    assert moved(second) < 0.5 * moved(forgetful)


def test_memits_aligned_steps_are_saved_and_differ(tiny_model: Model, letters: Path) -> None:
    settings = MemitSettings(layers="0,1", value=LOOSE, moment_weight="1", aligned=True)
    editor = memit(settings, memory=letters)
    begun = editor.init(tiny_model, KEY)
    plain = begun._replace(settings=dataclasses.replace(begun.settings, aligned=False))
    states = []
    for state in (begun, plain):
        for request in REQUESTS[:2]:
            state, info = editor.step(state, [request], KEY)
            assert info.requests[0].held
        states.append(state)
    aligned, other = states
    assert sorted(aligned.earlier) == [0, 1]
    assert not other.earlier
    assert set(save(other)) == {"kernel-0", "kernel-1"}
    assert relative(aligned.down_projections[0], other.down_projections[0]) > 1e-3
    assert same(restore(begun, save(aligned)).earlier, aligned.earlier)


def test_rome_in_the_null_space(tiny_model: Model, letters: Path, middle: float) -> None:
    editor = rome(RomeSettings(layer="1", value=LOOSE, null_space=middle), memory=letters)
    begun = editor.init(tiny_model, KEY)
    state, info = editor.step(begun, REQUESTS[:1], KEY)
    assert info.requests[0].held
    added = np.asarray(state.down_projections[1]) - np.asarray(tiny_model.params["layers"][1]["ffn"]["down"]["kernel"])
    outside = added - np.asarray(begun.projections[1]) @ added
    assert np.abs(outside).max() < 1e-4 * np.abs(added).max()
    assert np.abs(added).max() > 1e-3


def test_alphaedits_settings_that_make_no_sense_are_named(tiny_model: Model, letters: Path) -> None:
    for name, wrong in (
        ("null_space", 0.0),
        ("null_space", -1.0),
        ("weight", 0.0),
        ("together", 0),
        ("moment_tokens", 0),
    ):
        with pytest.raises(TPatchError, match=f"{name} is {wrong}"):
            method_settings(["alphaedit"], changes={name: wrong})
    with pytest.raises(TPatchError, match=r"null_space is -1\.0"):
        method_settings(["rome"], changes={"null_space": -1.0})
    with pytest.raises(TPatchError, match="'9' does not exist"):
        alphaedit(AlphaEditSettings(layers="1,9"), memory=letters).init(tiny_model, KEY)
    with pytest.raises(TPatchError, match=r"uses every direction of layer 1's .* null_space, which is 1e-30; raise it"):
        alphaedit(AlphaEditSettings("1", 1e-30), memory=letters).init(tiny_model, KEY)
    with pytest.raises(TPatchError, match="a patch is attached to layer 1, which AlphaEdit edits"):
        alphaedit(AlphaEditSettings("1")).init(attach(tiny_model, {1: create(16, 2)}), KEY)


# --- UltraEdit ---

# With this rate a random network says one of three targets; there is no rate with which it says all.
ULTRA = UltraEditSettings(maps="down:2", rate=0.15)
MAPS = ((0, "down"), (1, "down"), (1, "up"))


@pytest.fixture(scope="module")
def ultra(tiny_model: Model) -> UltraEditState:
    return ultraedit(ULTRA).init(tiny_model, KEY)


def by_loop(parts: list[tuple[np.ndarray, np.ndarray]], rate: float, ridge: float) -> np.ndarray:
    """UltraEdit's update of the last part's map, after parts whose features count as well: plain NumPy, float64."""
    count, mean, scatter = 0, 0.0, 0.0
    for keys, gradients in parts:
        for key, gradient in zip(keys, gradients, strict=True):
            x = np.concatenate([key, gradient]).astype(np.float64)
            count += 1
            away = x - mean
            mean = mean + away / count
            scatter = scatter + away * (x - mean)
    deviation = np.sqrt(scatter / max(count - 1, 1))
    keys, gradients = (array.astype(np.float64) for array in parts[-1])
    inner = keys.shape[1]
    system, right = ridge * np.eye(inner), np.zeros((inner, gradients.shape[1]))
    for key, gradient in zip(keys, gradients, strict=True):
        x = (np.concatenate([key, gradient]) - mean) / (deviation + np.finfo(np.float32).eps)
        value = -rate * np.sum(x[:inner] ** 2) * x[inner:]
        system += np.outer(key, key)
        right += np.outer(key, value)
    return np.linalg.solve(system, right)


@given(st.integers(0, 99), st.sampled_from([2, 8]), st.sampled_from([4, 16]))
def test_ultraedits_update_equals_a_loop(seed: int, tokens: int, inner: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [
        tuple(rng.normal(size=(tokens, wide)).astype(np.float32) * np.exp(rng.normal(size=wide)).astype(np.float32)
              for wide in (inner, 3))
        for _ in range(2)
    ]  # fmt: skip
    moments, there = begin_moments(inner + 3), jnp.arange(16) < tokens
    padded = [tuple(jnp.asarray(np.pad(a, ((0, 16 - tokens), (0, 0)), constant_values=9)) for a in p) for p in parts]
    for part in padded:
        moments = absorb(moments, jnp.concatenate(part, 1), there.astype(jnp.float32))
    key, gradient = padded[-1]
    value = pseudo_values(moments, key, gradient, 0.01) * there[:, None]
    update = ridge_update(key * there[:, None], value, 0.5)
    expected = by_loop(parts, 0.01, 0.5)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(update, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def test_ultraedits_functions_pass_every_transformation() -> None:
    rng = np.random.default_rng(0)
    keys, gradients = (jnp.asarray(rng.normal(size=(3, wide)), jnp.float32) for wide in (5, 2))

    def updated(keys: Any, gradients: Any) -> Any:
        moments = absorb(begin_moments(7), jnp.concatenate([keys, gradients], 1), jnp.ones(3))
        return ridge_update(keys, pseudo_values(moments, keys, gradients, 0.1), 1.0)

    one = updated(keys, gradients)
    np.testing.assert_allclose(jax.jit(updated)(keys, gradients), one, atol=1e-5)
    both = jax.vmap(updated)(jnp.stack([keys, keys]), jnp.stack([gradients, gradients]))
    np.testing.assert_allclose(both[1], one, atol=1e-5)
    assert np.isfinite(np.asarray(jax.grad(lambda g: jnp.sum(updated(keys, g)))(gradients))).all()


def test_keys_and_gradients_are_those_of_the_maps(tiny_model: Model) -> None:
    # Two tokens of a target: the loss of the second one reaches the map at the first as well.
    request = EditRequest("He met Eve", "the q", "Eve")
    item = read_item(tiny_model, 0, request, (), False)
    (features,) = collect_features(tiny_model, [item], MAPS)
    tokens, row = tokens_array([item.rows[0]], len(item.rows[0])), item.rows[0]
    places = list(item.places(0))

    def loss(params: Any) -> Any:
        log_probs = jax.nn.log_softmax(tiny_model.with_params(params).apply(tokens))[0]
        return -sum(log_probs[place, row[place + 1]] for place in places)

    slope = jax.grad(loss)(tiny_model.params)["layers"]
    for (layer, name), (key, gradient) in features.items():
        query = tiny_model.trace(tokens, layer).query[0]
        network = tiny_model.params["layers"][layer]["ffn"]
        read = ffn.hidden(network, query, "silu") if name == "down" else query
        np.testing.assert_allclose(key, np.asarray(read)[places], rtol=1e-4, atol=1e-6)
        assert gradient.shape == (len(places), network[name]["kernel"].shape[1])
    # In the last layer nothing but the positions themselves counts, so that keys and gradients make up the slope.
    (last,) = collect_features(tiny_model, [item], ((2, "gate"), (2, "down")))
    for (layer, name), (key, gradient) in last.items():
        assert relative(key.T @ gradient, slope[layer]["ffn"][name]["kernel"]) < 1e-3


def test_ultraedit_edits_a_model_and_goes_on(tiny_model: Model, ultra: UltraEditState) -> None:
    editor = ultraedit(ULTRA)
    state, info = editor.step(ultra, REQUESTS, KEY)
    assert [request.status for request in info.requests] == ["edited", "failed", "failed"]
    assert all("which was kept (keep_failed)" in request.reason for request in info.requests[1:])
    assert info.forward_equivalents >= info.fit_forward_equivalents > 0
    assert sorted(state.kernels) == [(2, "down")]
    assert ultraedit_model(state).generate(REQUESTS[0].prompt, 1).strip() == REQUESTS[0].target
    batch = tokens_array([tiny_model.encode("He met Eve in")], 16)
    assert same(editor.apply(ultra, batch), tiny_model.apply(batch))
    again = restore_updates(ultra, save_updates(state))
    assert same(editor.apply(again, batch), editor.apply(state, batch))
    after, _ = editor.step(state, REQUESTS[1:2], KEY)
    resumed, _ = editor.step(again, REQUESTS[1:2], KEY)
    assert same(after.kernels, resumed.kernels)
    assert int(after.moments[32, 16].rows) == 4
    # A single token of a single map has nothing to be normalised by.
    alone = ultraedit(UltraEditSettings("up:1", 0.1))
    unchanged, info = alone.step(alone.init(tiny_model, KEY), REQUESTS[:1], KEY)
    assert not info.requests[0].held
    assert same(unchanged.kernels[1, "up"], tiny_model.params["layers"][1]["ffn"]["up"]["kernel"])


def test_what_ultraedit_cannot_reach_is_kept_or_not(tiny_model: Model) -> None:
    for keep in (True, False):
        editor = ultraedit(UltraEditSettings("down:0-1,up:1", rate=1e-9, keep_failed=keep))
        state, info = editor.step(editor.init(tiny_model, KEY), REQUESTS, KEY)
        assert [request.status for request in info.requests] == ["failed"] * 3
        assert sorted(state.kernels) == (list(MAPS) if keep else [])
        # Of the two down projections, which share a shape, six tokens; of the other map three.
        known = {shape: int(moments.rows) for shape, moments in state.moments.items()}
        assert known == ({(32, 16): 6, (16, 32): 3} if keep else {})
        fate = "was kept (keep_failed)" if keep else "nothing was kept"
        assert all(fate in request.reason for request in info.requests)


def test_ultraedits_maps_are_the_authors_where_they_name_them(tiny_model: Model) -> None:
    config = tiny_model.config
    mistral = dataclasses.replace(config, family="mistral", layers=32, hidden_size=4096, ffn_width=14336)
    assert ultraedit_maps(mistral) == ((29, "down"), (30, "down"))
    assert ultraedit_rate(mistral) == 1e-6
    assert ultraedit_rate(mistral, 0.5) == 0.5
    assert len(ultraedit_maps(dataclasses.replace(mistral, family="llama"))) == 12
    for layers, wanted in ((1, [0]), (3, [1]), (30, list(range(20, 29)))):
        maps = ultraedit_maps(dataclasses.replace(config, layers=layers))
        assert maps == tuple((layer, "down") for layer in wanted)
    assert ultraedit_maps(config, "gate:1, down:0-1") == ((0, "down"), (1, "down"), (1, "gate"))
    for wrong in ("top", "down", "down:", "down:2-1", "left:1", "down:-1", "up:1.5", ""):
        with pytest.raises(TPatchError, match="names none; use maps=auto"):
            UltraEditSettings(maps=wrong)
    with pytest.raises(TPatchError, match="layer 3 does not exist; use 0 to 2"):
        ultraedit(UltraEditSettings(maps="down:3")).init(tiny_model, KEY)
    with pytest.raises(TPatchError, match="have no gate"):
        ultraedit_maps(dataclasses.replace(config, gated=False), "gate:1")
    for name, value in (("rate", -1.0), ("rate", float("inf")), ("ridge", 0.0)):
        with pytest.raises(TPatchError, match=f"{name} is {value}"):
            method_settings(["ultraedit"], changes={name: value})
    with pytest.raises(TPatchError, match="UltraEdit needs a decoder"):
        ultraedit().init(family("bert"), KEY)


# --- NeuralDB ---

TABLE = NeuralDBSettings(layer="1", threshold=0.9, value=LOOSE)


@pytest.fixture(scope="module")
def table(tiny_model: Model, few: None) -> tuple[NeuralDBState, Any]:
    editor = neuraldb(TABLE)
    return editor.step(editor.init(tiny_model, KEY), REQUESTS, KEY)


@given(st.integers(1, 9), st.integers(0, 2**16), st.floats(0.1, 0.9))
def test_the_nearest_residual_is_added_where_it_is_near_and_nothing_else_changes(
    count: int, seed: int, threshold: float
) -> None:
    rng = np.random.default_rng(seed)
    reader = {name: {"kernel": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)} for name in ("up", "gate")}
    key, value, query, output = (
        rng.normal(size=(rows, wide)).astype(np.float32) for rows, wide in ((count, 6), (count, 4), (7, 4), (7, 4))
    )
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    keys, values = (jnp.asarray(np.pad(array, ((0, 9 - count), (0, 0)))) for array in (key, value))
    entries = Database(reader, keys, values, jnp.asarray(threshold, jnp.float32), "silu")
    result = np.asarray(entries.contribute(jnp.asarray(query), jnp.asarray(output)))
    inner = np.asarray(ffn.hidden(reader, jnp.asarray(query), "silu"), np.float64)
    cosine = inner @ key.T / np.linalg.norm(inner, axis=-1, keepdims=True)
    for row, near in enumerate(cosine):
        if abs(near.max() - threshold) > 1e-4:
            wanted = output[row] + value[near.argmax()] if near.max() > threshold else output[row]
            assert result[row].tobytes() == wanted.tobytes()


def test_a_database_is_a_pytree_under_every_transformation(table: tuple[NeuralDBState, Any]) -> None:
    (entries,) = neuraldb_adapters(table[0]).values()
    assert isinstance(entries, Adapter)
    query, output = jnp.ones((3, 16)), jnp.zeros((3, 16))
    assert same(jax.jit(lambda e, q, o: e.contribute(q, o))(entries, query, output), entries.contribute(query, output))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), entries)
    assert jax.vmap(lambda e: e.contribute(query, output))(both).shape == (2, 3, 16)
    always = dataclasses.replace(entries, threshold=jnp.asarray(-1.0))
    slope = jax.grad(lambda e: e.contribute(query, output).sum())(always)
    assert float(slope.value.sum()) == 3 * 16


def test_neuraldb_edits_and_is_the_unedited_model_where_no_key_fires(
    tiny_model: Model, table: tuple[NeuralDBState, Any]
) -> None:
    state, info = table
    assert [request.status for request in info.requests] == ["edited"] * 3
    assert info.parameters_added == 3 * (32 + 16)
    model = database_model(state)
    assert [model.generate(request.prompt, 1).strip() for request in REQUESTS] == ["the", "t", "the"]
    rows = [tiny_model.encode_prompt(text) for text in ("Ada likes", "He met Eve")]
    batch = tokens_array(rows, 16)
    before, after = np.asarray(tiny_model.apply(batch)), np.asarray(model.apply(batch))
    place = len(rows[1]) - 1
    assert after[0, : len(rows[0])].tobytes() == before[0, : len(rows[0])].tobytes()
    assert after[1, :place].tobytes() == before[1, :place].tobytes()
    assert after[1, place].tobytes() != before[1, place].tobytes()
    assert same(neuraldb(TABLE).apply(state, batch), model.apply(batch))
    assert fingerprint(model) == fingerprint(tiny_model)


def test_neuraldbs_edits_come_out_exactly_and_are_saved(tiny_model: Model, table: tuple[NeuralDBState, Any]) -> None:
    state, _ = table
    editor = neuraldb(TABLE)
    fresh = editor.init(tiny_model, KEY)
    assert database_model(fresh).params is tiny_model.params or same(database_model(fresh).params, tiny_model.params)
    two, _ = editor.step(fresh, REQUESTS[:2], KEY)
    # No edit looks at another one, so that a step of three is the same.
    without = forget(state, ["cyd"])
    assert [request.id for request in without.requests] == ["eve", "bob"]
    assert relative(without.values, two.values) < 1e-4
    assert without.keys.tobytes() == state.keys[:2].tobytes()
    assert same(forget(without, ["eve", "bob"])[3:5], fresh[3:5])
    with pytest.raises(TPatchError, match="no edit 'dan' is in the database; it holds eve, bob, cyd"):
        forget(state, ["dan"])
    again = restore_edits(fresh, save_edits(state))
    assert again.requests == state.requests
    assert same(again[3:5], state[3:5])


def test_a_later_edit_of_the_same_prompt_answers_until_it_is_forgotten(
    tiny_model: Model, table: tuple[NeuralDBState, Any]
) -> None:
    state, _ = table
    again = dataclasses.replace(REQUESTS[0], id="eve-2", target="t")
    after, info = neuraldb(TABLE).step(state, [again], KEY)
    says = lambda held: database_model(held).generate(again.prompt, 1).strip()  # noqa: E731
    assert info.requests[0].held
    states = state, after, forget(after, ["eve-2"]), forget(after, ["eve"])
    assert [*map(says, states)] == ["the", "t", "the", "t"]


def test_what_neuraldb_cannot_reach_is_kept_or_not(tiny_model: Model) -> None:
    weak = ValueSettings(value_steps=2, value_extra_steps=0, clamp=0.01)
    wanted = [*REQUESTS[:2], EditRequest("Nobody", "x")]
    for keep in (True, False):
        editor = neuraldb(dataclasses.replace(TABLE, value=weak, keep_failed=keep))
        state, info = editor.step(editor.init(tiny_model, KEY), wanted, KEY)
        assert not any(request.held for request in info.requests)
        assert len(state.keys) == len(state.requests) == 2 * keep
        assert ("the update was kept" if keep else "was taken out again") in info.requests[0].reason
        assert "has none" in info.requests[2].reason


def test_neuraldbs_settings_that_make_no_sense_are_named(tiny_model: Model) -> None:
    for name, wrong in (("threshold", 0.0), ("threshold", 1.5), ("threshold", -0.5), ("together", 0), ("layer", "top")):
        with pytest.raises(TPatchError, match=f"{name} (is )?'?{wrong}"):
            method_settings(["neuraldb"], changes={name: wrong})
    with pytest.raises(TPatchError, match="'7' does not exist"):
        neuraldb(NeuralDBSettings(layer="7")).init(tiny_model, KEY)
    with pytest.raises(TPatchError, match="a patch is attached to layer 1, which NeuralDB edits"):
        neuraldb(TABLE).init(attach(tiny_model, {1: create(16, 2)}), KEY)
    with pytest.raises(TPatchError, match="a norm stands between"):
        neuraldb().init(family("gemma2"), KEY)
