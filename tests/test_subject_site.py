"""The subject site: ends of rows run again, keys in closed form, values trained through the network, the whole edit."""

import dataclasses
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_tiny_model, relative
from tiny_families import tiny_model as family_model

import tpatch_jax as tp
import tpatch_jax.editors.tpatcher.editor as tpatcher_module
from tpatch_jax.core.memory import create_memory, extend
from tpatch_jax.core.recipes.whitened import whitened_key
from tpatch_jax.core.values import (
    KeptRows,
    TargetRows,
    ValueTrainingSettings,
    gauss_newton_step,
    kept_close,
    train_values,
)
from tpatch_jax.editors import subject_rows
from tpatch_jax.editors.frames import other_frames, same_frames
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.reading import check_requests, read_item, subject_token
from tpatch_jax.editors.subject_rows import (
    fork_rows,
    known_rows,
    pack_lanes,
    rephrase_rows,
    rounded_around,
    row_of,
    runner,
    short_rows,
)
from tpatch_jax.editors.tpatcher import stages, subject_site
from tpatch_jax.editors.tpatcher.editor import tpatcher
from tpatch_jax.editors.tpatcher.previous import create_empty, load_previous, save_previous
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.editors.tpatcher.subject_prompts import read_subject_rows
from tpatch_jax.editors.tpatcher.subject_settings import SubjectSettings
from tpatch_jax.editors.tpatcher.subject_site import read_subjects, subject_layer
from tpatch_jax.editors.wordings import Wording
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.patching import attach, merge
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.settings import change, known_names

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation")
MEMORY = (
    # No word of it ends like a subject below: in a random network a query tells little but its own token.
    "The theory in the inn: winter thins the herd, and the hen then hides. Numbers 1 to 9, and then some more. " * 3
)


# --- the ends of rows ---


def some_rows(model):
    """Rows of two lanes: some begin alike, one stands twice, one is only its subject."""
    twice = ("the cat hit a fox", 7)
    texts = [("the cat sat in the inn", 7), twice, ("a hen. the cat sat", 14), twice]
    others = [("who hit the herd in the inn", 3), ("the hen", 7), ("the hen sat", 7), ("in winter the hen", 17)]
    targets = ("ab", "q", "hit", "z")
    return [
        [row_of(model, Wording(*text), model.encode(target)) for text, target in zip(part, targets, strict=True)]
        for part in (texts, others)
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj"])
def test_the_ends_of_packed_rows_are_what_whole_rows_say(tiny_model, family):
    model = tiny_model if family == "llama" else family_model(family)
    rows = some_rows(tiny_model)
    size = model.config.vocabulary
    rows = [[row._replace(tokens=[token % size for token in row.tokens]) for row in part] for part in rows]
    rng = np.random.default_rng(0)
    added = jnp.asarray(rng.normal(size=(2, 4, model.config.hidden_size)), jnp.float32)
    for layer in range(model.config.layers):
        forked = fork_rows(model, rows, layer, 2)
        run = runner(model, layer)
        said = run(known_rows(forked, forked.places.reshape(2, -1)), added).reshape(2, 4, 2, -1)
        for lane, part in enumerate(rows):
            for number, row in enumerate(part):
                traced = networks.trace(model.config, model.params, jnp.asarray([row.tokens]), layer)
                output = traced.output.at[0, row.subject].add(added[lane, number])
                whole = jax.nn.log_softmax(networks.resume(model.config, model.params, traced, output))[0]
                there = row.places[:2]
                np.testing.assert_allclose(said[lane, number, : len(there)], whole[jnp.asarray(there)], atol=2e-4)
                before = forked.fork.query[lane, forked.first[lane, number]]
                np.testing.assert_allclose(before, traced.query[0, row.subject], rtol=1e-4, atol=1e-4)
        # and the change is one that shows
        silent = run(known_rows(forked, forked.places.reshape(2, -1)), 0 * added).reshape(2, 4, 2, -1)
        assert float(jnp.abs(said - silent).max()) > 0.01


def test_what_rows_begin_with_is_packed_once(tiny_model, monkeypatch):
    monkeypatch.setattr(subject_rows, "ENDS", 64)
    rows = some_rows(tiny_model)
    pack, begins = pack_lanes(rows)
    cat = rows[0]
    shared = cat[0].subject
    assert [row.tokens[:shared] for row in cat[:2]] == [cat[3].tokens[:shared]] * 2
    ends = [len(row.tokens) - row.subject for row in cat]
    assert pack.tokens.shape[:2] == (2, 1)
    assert begins[0] == [0, *np.cumsum(ends)[:-1].tolist()]
    count = shared + cat[2].subject + sum(ends)
    assert (np.asarray(pack.sees[0, 0]).sum(1) > 1).sum() <= count < sum(len(row.tokens) for row in cat)
    # padding looks at itself alone, and nothing looks at padding
    last = pack.tokens.shape[2] - 1
    assert np.asarray(pack.sees[..., last]).sum() == np.asarray(pack.sees[:, :, last]).sum() == 2


def test_many_rows_stand_in_several_sequences_of_one_pack(tiny_model):
    cat = some_rows(tiny_model)[0]
    long = row_of(tiny_model, Wording("the hen and the cat sat in the inn and the fox hit the cat", 43), [3, 4])
    rows = [*cat * 4, long, long._replace(tokens=[*long.tokens[:-1], 5])]
    pack, (begins,) = pack_lanes([rows])
    ends = [len(row.tokens) - row.subject for row in rows]
    sequences, room = pack.ends.shape[1:]
    assert sum(ends) <= sequences * room < 2 * sum(ends)
    assert sequences > 1
    places = [place for begin, count in zip(begins, ends, strict=True) for place in range(begin, begin + count)]
    assert len(set(places)) == sum(ends)
    assert max(places) < sequences * room
    sees, tokens = np.asarray(pack.sees[0]), np.asarray(pack.tokens[0])
    for row, begin in zip(rows, begins, strict=True):
        sequence, first = divmod(begin, room)
        # No row is cut in two, and its last token looks at all of it in its order.
        nodes = np.asarray(pack.ends[0, sequence, first : first + len(row.tokens) - row.subject])
        seen = np.flatnonzero(sees[sequence, nodes[-1]])
        order = np.argsort(np.asarray(pack.positions[0, sequence])[seen])
        assert tokens[sequence][seen[order]].tolist() == row.tokens
    # Two that begin alike stand in one sequence, and what they begin with stands there once.
    assert begins[-1] // room == begins[-2] // room
    forked = fork_rows(tiny_model, [rows], 1, 2)
    alone = fork_rows(tiny_model, [[row] for row in rows], 1, 2)
    apart = alone.fork.hidden[jnp.arange(len(rows))[:, None], alone.places[:, 0]]
    np.testing.assert_allclose(forked.fork.hidden[0, forked.places[0]], apart, atol=2e-5)


# --- keys ---


def some_queries(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)


def test_a_key_fires_on_its_own_queries_and_on_no_negative():
    queries = jnp.asarray(3 * some_queries(1, 1) + 0.1 * some_queries(4, 2))
    memory = create_memory(jnp.asarray(some_queries(200)))
    fitted = whitened_key(queries, jnp.array(7), memory, 0.6, 0.5)
    z = queries @ fitted.key + fitted.bias
    assert fitted.margin > 0
    np.testing.assert_allclose(min(z[0], z.mean()), 1.0, rtol=1e-4)
    assert (memory.query @ fitted.key + fitted.bias).max() < 0


def test_a_key_knows_the_start_of_a_text_as_well_as_what_stands_behind_other_words():
    rng = np.random.default_rng(5)
    subject, start = 3 * rng.normal(size=(2, 32))
    behind = subject + 0.2 * rng.normal(size=(6, 32))
    queries = jnp.asarray(np.concatenate([[0.2 * subject + start], behind]), jnp.float32)
    memory = create_memory(jnp.asarray(rng.normal(size=(400, 32)), jnp.float32))
    fitted = whitened_key(queries, jnp.array(7), memory, 0.7, 0.4)
    z = (queries - memory.mean) @ fitted.key
    # the mean of the queries would say less of the bare prompt
    mean = (queries - memory.mean) @ (memory.whitener @ memory.whitener.T @ (queries.mean(0) - memory.mean))
    assert mean[0] < 0.75 * mean[1:].mean()
    assert z[0] > 0.9 * z[1:].mean()
    assert fitted.margin > 0


def test_a_key_that_cannot_be_parted_says_so_unless_it_is_its_own_group():
    queries = jnp.asarray(3 * some_queries(1, 1) + 0.1 * some_queries(4, 2))
    memory = extend(create_memory(jnp.asarray(some_queries(200))), 2 * queries[:1], jnp.array([7]))
    assert whitened_key(queries, jnp.array(8), memory, 0.6, 0.5).margin < 0
    assert whitened_key(queries, jnp.array(7), memory, 0.6, 0.5).margin > 0


def test_a_key_turns_away_from_what_it_is_told_to_avoid():
    rng = np.random.default_rng(3)
    shared, mark = 3 * rng.normal(size=8), np.eye(8)[0] * 4
    queries = jnp.asarray(shared + mark + 0.1 * rng.normal(size=(4, 8)), jnp.float32)
    beside = jnp.asarray(shared - mark + 0.1 * rng.normal(size=(6, 8)), jnp.float32)
    memory = create_memory(jnp.asarray(some_queries(200)))

    def response(**options):
        fitted = whitened_key(queries, jnp.array(7), memory, 0.6, 0.5, **options)
        assert fitted.margin > 0
        return float(jnp.max(beside @ fitted.key + fitted.bias))

    assert response(avoid=beside, avoidance=1.0) < min(response(), 0)
    # as many rows of the mean change nothing
    nothing = jnp.broadcast_to(memory.mean, beside.shape)
    np.testing.assert_allclose(response(avoid=nothing, avoidance=1.0), response(), rtol=1e-5)


def test_what_a_key_turns_away_from_raises_its_threshold():
    rng = np.random.default_rng(3)
    shared, mark = 3 * rng.normal(size=8), np.eye(8)[0] * 4
    queries = jnp.asarray(shared + mark + 0.1 * rng.normal(size=(4, 8)), jnp.float32)
    beside = jnp.asarray(shared - 0.2 * mark + 0.1 * rng.normal(size=(6, 8)), jnp.float32)
    memory = create_memory(jnp.asarray(some_queries(200)))

    def responses(rows, **options):
        fitted = whitened_key(queries, jnp.array(7), memory, 0.1, 0.1, beside, 0.01, **options)
        assert fitted.margin > 0
        return rows @ fitted.key + fitted.bias

    assert float(jnp.max(responses(beside))) > 0
    for split in (0.05, 0.2, 0.5):
        # In units of the edit's own queries: z = 0 at the threshold and 1 at their least.
        loudest = float(jnp.max(responses(beside, avoid_split=split)))
        assert loudest == pytest.approx(-split / (1 - split), rel=1e-3)
        assert float(jnp.mean(responses(queries, avoid_split=split))) >= 1 - 1e-4
    # However near they are, the edit's own queries are recognised.
    near = queries + 0.01 * mark
    fitted = whitened_key(queries, jnp.array(7), memory, 0.1, 0.1, near, 0.0, avoid_split=0.9)
    assert fitted.margin > 0
    assert float(jnp.min(queries @ fitted.key + fitted.bias)) > 0


def test_rephrases_are_contexts_where_that_is_wanted(tiny_model):
    requests = [
        EditRequest("the cat is", "red", "cat", rephrases=("so is the cat", "a cat or a cat", "it is")),
        EditRequest("the hen is", "red", "hen"),
    ]
    rows = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    known = ModelMemory(jnp.asarray(rows), jnp.eye(16), ("in the inn.", "a hat."), ("Ann Bo",))
    before = create_empty(16, np.dtype(np.float32))

    def read(rephrases: bool) -> tuple:
        items = [read_item(tiny_model, n, one, known.prefixes, rephrases) for n, one in enumerate(requests)]
        subjects = read_subjects(tiny_model, known, 1, items, requests, before, SubjectSettings(shorter=0, same=0))
        return items, subjects.prompts

    (item, _), prompts = read(True)
    (row,) = rephrase_rows(tiny_model, requests[0], item, "subject")
    assert tiny_model.decode(row.tokens[: row.subject + 1]).endswith("cat")
    assert tiny_model.decode(row.tokens) == "so is the cat red"
    plain = read(False)[1]
    assert prompts == {0: [*plain[0], row], 1: [*plain[1], plain[1][0]]}
    assert len(rephrase_rows(tiny_model, requests[0], item, "prompt")) == 3


def test_among_many_edits_thresholds_lie_nearer_to_the_edits_own_queries(tiny_model):
    requests = [EditRequest("the fox is", "red", "fox"), EditRequest("the dog is", "red", "dog")]
    rows = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    known = ModelMemory(jnp.asarray(rows), jnp.eye(16), ("in the inn.", "a hat."), ("Ann Bo",))
    none = create_empty(16, np.dtype(np.float32))
    one = np.ones(1, np.int32)
    earlier = none._replace(lengths=one, starts=one, subjects=0 * one, groups=5 * one, subject_query=rows[:1])
    items = [read_item(tiny_model, n, request, known.prefixes, False) for n, request in enumerate(requests)]

    def keys(before, **changes):
        settings = SubjectSettings(shorter=0, same=0, key_floor=0.2, key_split=0.2, **changes)
        found = read_subjects(tiny_model, known, 1, items, requests, before, settings).keys
        length = np.linalg.norm(found.key, axis=1)
        # In a random network the other one looks too much like it.
        assert found.margin[1] > 0
        return found.key[1] / length[1], -found.bias[1] / length[1]

    few, many = keys(none, key_raise_from=3), keys(earlier, key_raise_from=3)
    assert keys(none, key_raise_from=3, key_raise=0.9)[1] == few[1]
    # The key looks where it looked, and asks for more of it.
    raised = keys(none, key_raise_from=2)
    np.testing.assert_allclose(raised[0], few[0], atol=1e-5)
    assert raised[1] > few[1]
    assert many[1] > keys(earlier, key_raise_from=4)[1]
    further = keys(none, key_raise_from=2, key_raise=0.4)
    np.testing.assert_allclose(further[1] - few[1], 2 * (raised[1] - few[1]), rtol=1e-3)


def test_even_one_subject_s_key_does_not_look_where_only_its_context_shows():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(1000, 128)).astype(np.float32)
    known = ModelMemory(jnp.asarray(rows), jnp.eye(rows.shape[1]), (), ())
    centre, moved = generator.normal(size=(2, rows.shape[1])).astype(np.float32)
    none = rows[:0], np.zeros(0, np.int32)

    def key(step: float) -> jax.Array:
        queries = np.stack([centre, centre + step * moved, centre - step * moved])[None]
        avoid = np.full((1, 8, rows.shape[1]), np.nan, np.float32)
        group, asks = np.asarray([7], np.int32), np.asarray([False])
        return subject_site._recognised(known, queries, group, avoid, asks, *none, SubjectSettings()).key[0]

    still, moving = key(0.0), key(3.0)
    assert np.isfinite(still).all()
    assert abs(moving @ moved) / (moving @ centre) < 0.5 * abs(still @ moved) / (still @ centre)


def test_a_key_turns_away_from_subjects_that_look_alike():
    rng = np.random.default_rng(4)
    shared, mark = 3 * rng.normal(size=8), np.eye(8)[0] * 2
    queries = jnp.asarray(shared + mark + 0.1 * rng.normal(size=(4, 8)), jnp.float32)
    alike = np.asarray(shared - mark + 0.1 * rng.normal(size=(3, 8)), np.float32)
    memory = extend(create_memory(jnp.asarray(some_queries(200))), jnp.asarray(alike), jnp.array([1, 2, 3]))
    margin = {w: float(whitened_key(queries, jnp.array(7), memory, 0.1, 0.5, rounds=w).margin) for w in (0, 3)}
    assert margin[3] > 1.2 * margin[0]
    # with nothing alike to turn away from, it is the same key
    plain = create_memory(jnp.asarray(0.1 * some_queries(200)))
    keys = [whitened_key(queries, jnp.array(7), plain, 0.1, 0.5, rounds=w).key for w in (0, 3)]
    np.testing.assert_allclose(keys[0], keys[1], rtol=1e-5)


# --- values ---


def lanes(count: int, seed: int = 0) -> tuple[jax.Array, TargetRows, KeptRows, jax.Array]:
    """Rows of a network that is one matrix, two to a lane, each of which should say something and stay."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(count, 2, 6)), jnp.float32)
    known = jnp.concatenate([hidden, hidden], 1)
    wanted = rng.integers(0, 6, (count, 2, 1))
    weight, activity = jnp.full((count, 2, 1), 0.5), jnp.asarray(rng.uniform(0.5, 1, (count, 2)), jnp.float32)
    targets = TargetRows(activity, jnp.asarray(np.repeat(wanted[:, :1], 2, 1)), weight)
    return known, targets, KeptRows(0.1 * activity, run(hidden, jnp.zeros((count, 2, 6)))), jnp.ones(count)


HEAD = 2 * jnp.eye(6) + 0.2


def run(known, added):
    return jax.nn.log_softmax((known[:, : added.shape[1]] + added) @ HEAD)


def train(known, targets, kept, scale, settings, start=None):
    start = jnp.zeros((scale.shape[0], 6)) if start is None else start
    return train_values(known, targets, kept, run, scale, settings, start)


def test_values_say_their_targets_within_their_limit():
    known, targets, kept, scale = lanes(5)
    settings = ValueTrainingSettings(steps=60, longest=8.0, enough=0.05)
    values, info = train(known, targets, kept, scale, settings)
    assert (info.loss < 0.05).all()
    assert (info.steps > 0).all()
    assert (jnp.linalg.norm(values, axis=1) <= 8.0 * 1.001).all()
    short = train(known, targets, None, scale, settings._replace(longest=0.5))[0]
    assert (jnp.linalg.norm(short, axis=1) <= 0.5 * 1.001).all()


def test_a_lane_ends_when_its_first_target_is_said_and_the_others_in_the_mean():
    known, targets, _, scale = lanes(1)
    settings, little = ValueTrainingSettings(steps=40, longest=8.0, enough=0.05), 0.001
    for stuck, ends in ((1, True), (0, False)):
        # One row stays what it is, whatever the value is, and counts for little.
        weight = jnp.full((1, 2, 1), 1 - little).at[0, stuck].set(little)
        rows = targets._replace(activity=targets.activity.at[0, stuck].set(0.0), weight=weight)
        _, info = train(known, rows, None, scale, settings)
        assert (info.steps[0] < 40) == ends
    heavy = targets._replace(activity=targets.activity.at[0, 1].set(0.0))
    assert train(known, heavy, None, scale, settings)[1].steps.tolist() == [40]


def test_lanes_do_not_couple():
    known, targets, kept, scale = lanes(5)
    settings = ValueTrainingSettings(steps=30, longest=8.0, enough=0.2)
    together, info = train(known, targets, kept, scale, settings)
    assert len(set(info.steps.tolist())) > 1  # they stop at different times, so lanes were dropped on the way
    for lane in range(5):
        one = jax.tree.map(lambda leaf, lane=lane: leaf[lane : lane + 1], (known, targets, kept, scale))
        alone, _ = train(*one, settings)
        np.testing.assert_allclose(together[lane], alone[0], rtol=1e-4, atol=1e-5)


def test_a_step_is_the_damped_least_squares_solution():
    rng = np.random.default_rng(3)
    slope, residual, weight = rng.normal(size=(2, 4, 7)), rng.normal(size=(2, 4)), rng.uniform(0.1, 1, (2, 4))
    weight[1, 2] = 0
    step = gauss_newton_step(*(jnp.asarray(x, jnp.float32) for x in (slope, residual, weight)), 0.3)
    for lane in range(2):
        root = np.sqrt(weight[lane])
        rows = np.concatenate([slope[lane] * root[:, None], np.sqrt(0.3) * np.eye(7)])
        aim = np.concatenate([-residual[lane] * root, np.zeros(7)])
        np.testing.assert_allclose(step[lane], np.linalg.lstsq(rows, aim, rcond=None)[0], rtol=1e-4, atol=1e-5)
    traced = jax.jit(jax.vmap(gauss_newton_step, (0, 0, 0, None)))(
        jnp.asarray(slope, jnp.float32), jnp.asarray(residual, jnp.float32), jnp.asarray(weight, jnp.float32), 0.3
    )
    np.testing.assert_allclose(traced, step, rtol=1e-5, atol=1e-6)


def test_kept_rows_hold_a_value_back():
    known, targets, kept, scale = lanes(4)
    # What should stay as it is looks much like what should change.
    kept = kept._replace(activity=0.8 * targets.activity)
    divergence = {}
    for closeness in (1e-6, 2.0):
        settings = ValueTrainingSettings(steps=30, longest=8.0, closeness=closeness, near=1e-9)
        values, info = train(known, targets, kept, scale, settings)
        now = run(known[:, 2:], kept.activity[..., None] * values[:, None])
        divergence[closeness] = float(kept_close(kept.before, now).mean())
        np.testing.assert_allclose(info.closeness.mean(), divergence[closeness], rtol=0.05)
    assert divergence[2.0] < 0.5 * divergence[1e-6]


def test_a_start_that_says_all_needs_no_step():
    known, targets, kept, scale = lanes(3)
    settings = ValueTrainingSettings(steps=40, longest=8.0, near=100.0)
    values, info = train(known, targets, kept, scale, settings)
    again, told = train(known, targets, kept, scale, settings, values)
    assert (info.steps > 1).all()
    assert (told.steps == 0).all()
    assert (told.loss < 0.05).all()
    np.testing.assert_allclose(again, values, rtol=1e-5)


def test_staying_close_costs_nothing_where_nothing_changes():
    before = jax.nn.log_softmax(jnp.asarray(some_queries(3)))
    np.testing.assert_allclose(kept_close(before, before), 0, atol=1e-7)
    assert (kept_close(before, jax.nn.log_softmax(-before)) > 0.1).all()


# --- where the subject is ---


@pytest.mark.parametrize(
    ("text", "subject"), [("the cat sat in", "cat"), ("who hit the", "who"), ("in the inn", "the inn")]
)
def test_the_subject_s_last_token_is_found(tiny_model, text, subject):
    end = text.index(subject) + len(subject)
    place = subject_token(tiny_model, text, end)
    ids = tiny_model.encode_prompt(text)
    assert tiny_model.decode(ids[: place + 1]) == text[:end]


def test_a_subject_of_marks_alone_is_found(tiny_model):
    assert subject_token(tiny_model, "who hit ? it", 9) == len(tiny_model.encode_prompt("who hit ?")) - 1


def test_a_prefix_that_names_the_subject_does_not_confuse(tiny_model):
    request = EditRequest("the cat sat in", "ab", subject="cat")
    item = read_item(tiny_model, 0, request, ["A cat is a cat."], False)
    text = item.texts[1]
    place = subject_token(tiny_model, text, text.rindex("cat") + 3)
    assert tiny_model.decode(item.rows[1][: place + 1]).endswith("the cat")


def test_a_subject_that_occurs_twice_or_not_at_all(tiny_model):
    requests = [EditRequest("the cat and the cat", "a", subject="cat"), EditRequest("who", "a", subject="cat")]
    problems = check_requests(tiny_model, requests, True)
    assert "occurs 2 times in the prompt" in problems[0]
    assert "is not in the prompt" in problems[1]
    assert 0 not in check_requests(tiny_model, requests, False)


def test_shorter_wordings_end_where_the_prompt_ends(tiny_model):
    request = EditRequest("we saw that the cat ran to the", "ab", subject="cat")
    item = read_item(tiny_model, 0, request, [], False)
    rows = short_rows(tiny_model, request, item, ["A fox.", "The inn is."])
    assert [tiny_model.decode(row.tokens) for row in rows] == ["A fox. cat ran to the ab", "The inn is. cat to the ab"]
    for row in rows:
        assert tiny_model.decode(row.tokens[: row.subject + 1]).endswith(" cat")
        assert [row.tokens[place + 1] for place in row.places] == row.wanted == item.target


def test_the_layer():
    assert (subject_layer(30), subject_layer(12), subject_layer(30, "7")) == (10, 4, 7)


# --- the whole edit ---


def settings(**changes):
    preset = PRESETS["default"]
    fit = dataclasses.replace(preset.fit, key_steps=16, rounds=1, negatives=32, lanes=16)
    subject = SubjectSettings(value=ValueTrainingSettings(steps=40, longest=16.0), key_floor=0.5, shorter=0, neutral=1)
    return dataclasses.replace(preset, site="subject", fit=fit, subject=subject, **changes)


@pytest.fixture(scope="module")
def edited(tmp_path_factory, quick_compilation):
    text = tmp_path_factory.mktemp("memory") / "memory.txt"
    text.write_text(MEMORY)
    model = make_tiny_model(hidden_size=32, head_dim=16)
    requests = [
        EditRequest("the fox sat in", "ab", subject="fox", id="fox"),
        EditRequest("a wolf hit the", "q", subject="wolf", id="wolf"),
        EditRequest("the fox ran to", "z", subject="fox", id="same subject"),
        EditRequest("in the inn", "h", id="no subject"),
        EditRequest("a dog and a dog", "h", subject="dog", id="twice"),
    ]
    patches, info = tp.edit(model, requests, settings=settings(), memory=text, cache=False)
    return model, requests, patches, info, text


def numbered(patches, *infos):
    """Each neuron of each layer is one request's."""
    results = [result for info in infos for result in info.requests]
    assert {layer for result in results for layer in result.neurons} <= set(patches)
    for layer, patch in patches.items():
        numbers = sorted(n for result in results for n in result.neurons.get(layer, ()))
        assert numbers == list(range(patch.key.shape[0]))


def test_what_holds_holds_and_says_where(edited):
    model, requests, patches, info, _ = edited
    results = {result.id: result for result in info.requests}
    assert results["twice"].status == "failed"
    assert "occurs 2 times" in results["twice"].reason
    assert results["no subject"].site == "last"
    last = model.config.layers - 1
    assert set(results["no subject"].neurons) == {last}
    deep = [result for result in info.requests if result.site == "subject"]
    assert deep
    for result in deep:
        # completed in the last layer at most
        assert min(result.neurons) == subject_layer(model.config.layers) != last
        assert set(result.neurons) <= {subject_layer(model.config.layers), last}
    numbered(patches, info)
    merged = merge(model, patches)
    for request, result in zip(requests, info.requests, strict=True):
        if result.held:
            assert merged.generate(request.prompt, 4).startswith(" " + request.target), result
    assert sum(result.held for result in info.requests) == 4


def test_values_trained_with_rounded_products_are_others_and_say_the_same(edited):
    model, requests, *_, text = edited
    layer, fitted = subject_layer(model.config.layers), {}
    for precision in ("float32", "bfloat16", "auto"):
        given = change(settings(), {"value_precision": precision})
        fitted[precision], info = tp.edit(model, requests[:1], settings=given, memory=text, cache=False)
        assert info.requests[0].held
    exact, rounded, auto = (fitted[precision][layer] for precision in ("float32", "bfloat16", "auto"))
    # a network as small as this gains nothing
    assert all(map(np.array_equal, exact, auto))
    assert np.array_equal(exact.key, rounded.key)
    assert 1e-6 < relative(rounded.value, exact.value) < 0.2
    with pytest.raises(TPatchError, match="value_precision 'float8' does not exist; use one of auto, float32"):
        tp.edit(model, requests[:1], settings=change(settings(), {"value_precision": "float8"}))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_ends_are_run_again_with_rounded_products(tiny_model, family):
    model = tiny_model if family == "llama" else family_model(family)
    size, layer = model.config.vocabulary, 1
    rows = some_rows(tiny_model)
    rows = [[row._replace(tokens=[token % size for token in row.tokens]) for row in part] for part in rows]
    added = np.random.default_rng(0).normal(size=(2, 4, model.config.hidden_size)).astype(np.float32)
    said = []
    for weights in (None, rounded_around(model, layer)):
        forked = fork_rows(model, rows, layer, 2, weights)
        run = runner(model, layer, rounded=weights)
        slope = jax.grad(
            lambda added, run=run, forked=forked: run(known_rows(forked, forked.places[..., 0]), added).std()
        )
        said.append((forked.fork.query, run(known_rows(forked, forked.places[..., 0]), added), slope(added)))
    (query, exact, pull), (same, rounded, other) = said
    assert 1e-6 < relative(same, query) < 0.05
    assert 1e-6 < relative(rounded, exact) < 0.05
    assert 1e-6 < relative(other, pull) < 0.2


def test_where_the_neurons_at_subjects_say_all_nothing_is_read_for_the_last_layer(edited, monkeypatch):
    model, requests, *_, text = edited
    layer = subject_layer(model.config.layers)
    everything, _ = tp.edit(model, requests[:2], settings=settings(), memory=text, cache=False)
    for name in ("collect_items", "last_memory", "find_subject_negatives", "start_values"):
        monkeypatch.setattr(stages, name, lambda *given, name=name: pytest.fail(name))
    said = tp.EditRequest("the fox sat in", model.generate("the fox sat in", 2), subject="fox", join="none")
    patches, info = tp.edit(model, [said], settings=settings(), memory=text, cache=False)
    assert not patches
    assert [result.status for result in info.requests] == ["already"]
    # What this network cannot be taught at a subject, as if it were.
    monkeypatch.setattr(stages, "wrong_rows", lambda *given: np.zeros(0, int))
    patches, info = tp.edit(model, requests[:2], settings=settings(), memory=text, cache=False)
    assert set(patches) == {layer}
    assert bits(patches[layer]) == bits(everything[layer])
    assert [(result.status, result.site) for result in info.requests] == [("edited", "subject")] * 2


def test_several_facts_about_one_subject_are_measured_by_the_unedited_model(edited):
    model, *_, text = edited
    endings = ("sat in", "ran to", "hit the", "hid in", "saw the")
    requests = [EditRequest(f"the fox {end}", target, "fox") for end, target in zip(endings, "qzjxk", strict=True)]
    options = settings()
    patches, _ = tp.edit(model, requests, settings=options, memory=text, cache=False)
    layer = subject_layer(model.config.layers)
    keys, lengths = np.asarray(patches[layer].key), np.linalg.norm(np.asarray(patches[layer].value), axis=1)
    # One recognition for all of them, and no value longer than the first one might be.
    np.testing.assert_allclose(keys, np.broadcast_to(keys[0], keys.shape), rtol=1e-5, atol=1e-5)
    tokens = tokens_array([model.encode("the fox")], 8)
    place = subject_token(model, "the fox", len("the fox"))
    output = np.linalg.norm(np.asarray(model.trace(tokens, layer).output)[0, place])
    assert len(lengths) == 10
    limit = options.subject.value.longest * output / (options.subject.plateau * subject_site.SHARPNESS)
    assert lengths.max() <= 1.001 * limit


def test_merged_is_attached_in_every_layer(edited):
    model, _, patches, _, _ = edited
    assert set(patches) == {1, 2}
    tokens = tokens_array([model.encode("the cat sat in the inn")], 24)
    assert relative(merge(model, patches).apply(tokens), attach(model, patches).apply(tokens)) < 1e-5


def test_a_second_step_keeps_what_the_first_did(edited):
    model, requests, _, _, text = edited
    editor, key = tpatcher(settings(), memory=text), jax.random.key(0)
    state, first = editor.step(editor.init(model, key), requests[:2], key)
    assert [result.held for result in first.requests] == [True, True]
    # the second step asks something else about a subject of the first, and something about a new one
    later = [requests[2], EditRequest("the yak ate in", "g", subject="yak", id="new")]
    state, second = editor.step(state, later, key)
    assert [result.held for result in second.requests] == [True, True]
    assert "subject" in {result.site for result in second.requests}
    numbered(state.patches, first, second)
    merged = merge(model, state.patches)
    for request in [*requests[:2], *later]:
        assert merged.generate(request.prompt, 4).startswith(" " + request.target), request


def test_edits_of_earlier_steps_are_saved_and_loaded(edited):
    model, requests, _, _, text = edited
    editor, key = tpatcher(settings(), memory=text), jax.random.key(0)
    previous = editor.step(editor.init(model, key), requests[:2], key)[0].previous
    loaded = load_previous(save_previous(previous))
    chex.assert_trees_all_equal(loaded, previous)
    assert [model.decode(row) for row in loaded.rows] == [f"{r.prompt} {r.target}" for r in requests[:2]]


def test_more_contexts_than_there_are(edited):
    model, requests, _, _, text = edited
    now = settings()
    now = dataclasses.replace(now, subject=dataclasses.replace(now.subject, key_contexts=60))
    # a statement and a question, which have different numbers of contexts
    asked = EditRequest("who hit the hen?", "ab", subject="hen", id="question")
    _, info = tp.edit(model, [requests[0], asked], settings=now, memory=text, cache=False)
    assert info.requests[0].site == "subject"
    assert [result.held for result in info.requests] == [True, True]


def test_every_setting_has_a_name_of_its_own():
    names = [name.rpartition(".")[2] for name in known_names(PRESETS["default"])]
    assert len(set(names)) == len(names)


def test_a_layer_is_a_word_or_a_number():
    assert [change(PRESETS["default"], [f"layer={layer}"]).layer for layer in ("auto", "7")] == ["auto", "7"]


def test_layers_that_cannot_be_used(tiny_model):
    with pytest.raises(TPatchError, match="layer 'first' is not a layer"):
        tpatcher(settings(layer="first"))
    with pytest.raises(TPatchError, match="layer 2 is the last one"):
        tpatcher(settings(layer="2")).init(tiny_model, jax.random.key(0))
    with pytest.raises(TPatchError, match="site 'middle' does not exist; use site=auto, site=last or site=subject"):
        tpatcher(dataclasses.replace(settings(), site="middle"))


def test_the_site_is_chosen_by_model_and_requests(edited, monkeypatch):
    model, requests, _, _, text = edited
    auto, key = dataclasses.replace(settings(), site="auto"), jax.random.key(0)

    def layer_of(model, settings):
        state = tpatcher(settings, memory=text).init(model, key)
        assert (state.subject_memory is None) == (state.subject_layer is None)
        return state.subject_layer

    assert layer_of(model, auto) == 1
    two_layers = make_tiny_model(num_hidden_layers=2)
    assert layer_of(two_layers, auto) is None
    assert layer_of(model, dataclasses.replace(auto, site="last")) is None
    with pytest.raises(TPatchError, match="layer 1 is the last one"):
        layer_of(two_layers, settings())
    with pytest.raises(TPatchError, match="layer 2 is the last one"):
        layer_of(model, dataclasses.replace(auto, layer="2"))
    # without any subject nothing is read at an earlier layer
    layers = []
    known = tpatcher_module.collect_model_memory
    monkeypatch.setattr(
        tpatcher_module,
        "collect_model_memory",
        lambda m, layer, *_, **__: layers.append(layer) or known(m, layer, *_, **__),
    )
    _, info = tp.edit(model, requests[3:4], settings=auto, memory=text, cache=False)
    assert [(result.held, result.site) for result in info.requests] == [(True, "last")]
    assert layers == [2]


def test_a_question_that_leaves_no_room_for_neutral_ones(edited):
    """Its own prompt stands in for them, asked at one place like them."""
    model, *_, text = edited
    frame = "abcdfgjk lmnopqr stuv xyz abcdf gjklmn pqrs abcdfgj. "
    request = EditRequest(f"{frame[-52:]}Is X? A: ", "qq", subject="X")
    _, info = tp.edit(model, [request], settings=settings(), memory=text, cache=False)
    assert info.requests[0].site == "subject" or "target token" in info.requests[0].reason


def test_without_completion_a_subject_that_cannot_be_told_apart_is_not_edited_elsewhere(edited, monkeypatch):
    """What a sweep over sites measures is the site's alone."""
    model, requests, _, _, text = edited
    recognised = subject_site._recognised
    monkeypatch.setattr(
        subject_site,
        "_recognised",
        lambda *given: (keys := recognised(*given))._replace(margin=-jnp.ones_like(keys.margin)),
    )
    _, info = tp.edit(model, requests[:1], settings=settings(complete=False), memory=text, cache=False)
    assert info.requests[0].status == "failed"
    assert "use complete=true" in info.requests[0].reason
    _, info = tp.edit(model, requests[:1], settings=settings(), memory=text, cache=False)
    assert (info.requests[0].status, info.requests[0].site) == ("edited", "last")


def test_what_is_kept_of_the_subject_stands_before_the_neutral_prompts(tiny_model):
    keep = ("a fox is in", "the sky is", "fox hit the fox")
    request = EditRequest("the fox ran", "ab", subject="fox", keep=keep)
    item, known = (
        read_item(tiny_model, 0, request, [], False),
        SimpleNamespace(names=["hen"], prefixes=["The inn."], passage=""),
    )
    options = SubjectSettings(neutral=4, shorter=0, value_contexts=1)
    (kept, also, *neutral) = read_subject_rows(tiny_model, known, [item], [request], [0], options).neutral[0]
    assert [tiny_model.decode(row.tokens) for row in (kept, also)] == ["a fox is in", "fox hit the fox"]
    for row in (kept, also):
        # The value acts at the subject's first mention, and what follows the last token has to stay.
        assert tiny_model.decode(row.tokens[: row.subject + 1]).endswith("fox")
        assert (row.places, row.wanted) == ([len(row.tokens) - 1], [])
    assert tiny_model.decode(also.tokens[: also.subject + 1]) == "fox"
    # What is kept takes no other prompt's place.
    others = [tiny_model.encode(text) for text, _ in other_frames(request, 4)]
    assert [row.tokens for row in neutral] == others


def test_other_wordings_of_the_relation_are_targets_where_the_library_knows_it(tiny_model):
    request = EditRequest("the mother tongue of fox is", "ab", subject="fox")
    item, known = (
        read_item(tiny_model, 0, request, [], False),
        SimpleNamespace(names=["hen"], prefixes=["The inn."], passage=""),
    )
    options = SubjectSettings(neutral=1, same=3, shorter=0, value_contexts=1)
    bare, *same = read_subject_rows(tiny_model, known, [item], [request], [0], options).prompts[0]
    wordings = same_frames(request, 3)
    assert len(wordings) == 3
    assert [row.tokens for row in same] == [tiny_model.encode(text) + item.target for text, _ in wordings]
    # Where it does not, the prompt itself stands in.
    request = EditRequest("the fox ran", "ab", subject="fox")
    item = read_item(tiny_model, 0, request, [], False)
    bare, *same = read_subject_rows(tiny_model, known, [item], [request], [0], options).prompts[0]
    assert [row.tokens for row in same] == [bare.tokens] * 3
