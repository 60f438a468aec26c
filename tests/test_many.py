"""Many edits in one step: what stands inside their prompts is a negative, and rows may lie on disk."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from tpatch_jax.core.memory import NO_ANSWER, create_memory, extend
from tpatch_jax.editors.reading import read_item, swapped_prompts, with_shared_numbers
from tpatch_jax.editors.tpatcher import last_site, stages
from tpatch_jax.editors.tpatcher.editor import tpatcher
from tpatch_jax.editors.tpatcher.last_site import collect_inner
from tpatch_jax.editors.tpatcher.previous import create_empty
from tpatch_jax.editors.tpatcher.rounds import find_target_tokens
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.models import collection
from tpatch_jax.models.collection import Sites, collect
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.rows_on_disk import RowsOnDisk

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMOTION = "standard"  # optax takes steps

REQUESTS = [EditRequest(text, "b") for text in ("the cat sat in", "the cat", "who hit the", "in the inn")]
QUICK = dataclasses.replace(
    PRESETS["default"],
    site="last",
    attempts=2,
    fit=dataclasses.replace(PRESETS["default"].fit, key_steps=24, value_steps=8, rounds=1, negatives=32, lanes=4),
)


def items(model, requests=REQUESTS):
    return [read_item(model, number, request, (), False) for number, request in enumerate(requests)]


def test_each_place_inside_prompts_is_read_once_and_no_end_of_one(tiny_model):
    read = items(tiny_model)
    prompts = [tuple(item.rows[0][: item.starts[0]]) for item in read]
    ends = {tuple(item.rows[0][: place + 1]) for item in read for place in item.places(0)}
    begins = sorted({prompt[:length] for prompt in prompts for length in range(1, len(prompt))} - ends)
    expected = collect(tiny_model, begins, [[len(begin) - 1] for begin in begins], tiny_model.layer(None)).query
    inner = collect_inner(tiny_model, read, None)
    assert len(inner) == len(begins)
    nearest = np.abs(inner[:, None] - expected).max(-1).argmin(1)
    np.testing.assert_allclose(inner, expected[nearest], rtol=1e-4, atol=1e-5)
    assert prompts[1] in {prompt[: len(prompts[1])] for prompt in prompts[:1]}  # one prompt begins another
    assert prompts[1] not in begins
    assert len(collect_inner(tiny_model, read, None, most=3)) == 3


def test_what_stands_inside_many_prompts_is_a_negative(tiny_model, tmp_path, monkeypatch):
    memory = tmp_path / "memory.txt"
    memory.write_text("The theory in the inn: winter thins the herd, and the hen then hides. " * 4, "utf-8")
    seen, last_memory = [], last_site.last_memory
    monkeypatch.setattr(
        stages,
        "last_memory",
        lambda *given: seen.append(last_memory(*given)) or seen[-1],
    )
    editor, key = tpatcher(dataclasses.replace(QUICK, many_from=4), memory=memory), jax.random.key(0)
    with jax.default_matmul_precision("highest"):
        state = editor.init(tiny_model, key)
        for count in (3, 4):
            editor.step(state, REQUESTS[:count], key)
    inner = np.asarray(collect_inner(tiny_model, items(tiny_model), None))
    for memory, applies in zip(seen, (False, True), strict=True):
        rows = np.asarray(memory.query)[np.asarray(memory.answer) == NO_ANSWER]
        among = [np.abs(rows - one).max(1).min() < 1e-5 for one in inner]
        assert all(among) if applies else not any(among)


def test_of_very_many_edits_all_bare_prompts_are_negatives_and_some_contexts(tiny_model, tmp_path, monkeypatch):
    memory = tmp_path / "memory.txt"
    memory.write_text("The theory in the inn: winter thins the herd, and the hen then hides. " * 4, "utf-8")
    known = tpatcher(QUICK, memory=memory).init(tiny_model, jax.random.key(0)).memory
    rng, targets = np.random.default_rng(1), find_target_tokens([[5, 6], [7]], [3, 4])
    query = rng.normal(size=(len(targets.answers), tiny_model.config.hidden_size)).astype(np.float32)
    for most, expected in ((99, 10), (7, 10), (2, 5), (0, 3)):
        monkeypatch.setattr(last_site, "CONTEXT_ROWS", most)
        previous = create_empty(tiny_model.config.hidden_size, np.dtype(np.float32))
        extended = last_site.last_memory(QUICK, known, previous, Sites(query, query, query), targets)
        kept = np.flatnonzero(np.asarray(extended.answer) >= 0)
        assert len(kept) == expected
        rows = [int(np.abs(query - row).max(1).argmin()) for row in np.asarray(extended.query)[kept]]
        assert set(targets.bare.tolist()) <= set(rows)
        np.testing.assert_array_equal(np.asarray(extended.answer)[kept], targets.answers[rows])


def test_rows_on_disk_and_in_memory_give_the_same(tiny_model, monkeypatch):
    rows = [[7, 8, 9, 20 + number] for number in range(9)]
    plain = collect(tiny_model, rows, [[1, 3]] * 9, 2)
    monkeypatch.setattr(collection, "LARGE", 64)
    assert isinstance(collect(tiny_model, rows, [[1, 3]] * 9, 2).query, np.ndarray)
    kept = collect(tiny_model, rows, [[1, 3]] * 9, 2, on_disk=True)
    for field, expected in zip(kept, plain, strict=True):
        assert isinstance(field, RowsOnDisk)
        np.testing.assert_array_equal(field[:], expected)
    base = create_memory(np.eye(tiny_model.config.hidden_size, dtype=np.float32))
    both = [extend(base, [source.query, source.query], np.arange(36), 40) for source in (kept, plain)]
    np.testing.assert_array_equal(both[0].query, both[1].query)
    np.testing.assert_array_equal(both[0].answer, both[1].answer)
    assert both[0].answer.tolist()[:6] == [-2, -2, -2, -2, 0, 1]
    assert both[0].answer.tolist()[-1] == NO_ANSWER


def test_an_edit_does_not_depend_on_where_its_rows_lie(tiny_model, monkeypatch, tmp_path):
    memory = tmp_path / "memory.txt"
    memory.write_text("The theory in the inn: winter thins the herd, and the hen then hides. " * 4, "utf-8")
    editor, key = tpatcher(QUICK, memory=memory), jax.random.key(0)
    with jax.default_matmul_precision("highest"):
        state = editor.init(tiny_model, key)
        plain = editor.step(state, REQUESTS, key)[0].patches
        monkeypatch.setattr(collection, "LARGE", 64)
        seen = []
        collect_items = last_site.collect_items
        monkeypatch.setattr(stages, "collect_items", lambda *given: seen.append(collect_items(*given)) or seen[-1])
        kept = editor.step(state, REQUESTS, key)[0].patches
    assert isinstance(seen[0].query, RowsOnDisk)
    chex.assert_trees_all_equal(kept, plain)


def test_each_number_of_a_token_is_in_memory_once(tiny_model):
    many = [EditRequest(f"the cat sat {'in the inn ' * number}", "b") for number in (1, 2, 3)]
    read = [
        item._replace(rows=[[token + 1000 for token in row] for row in item.rows]) for item in items(tiny_model, many)
    ]
    shared = with_shared_numbers(iter(read))
    assert shared == read
    numbers = [token for item in shared for row in item.rows for token in row]
    assert len({id(number) for number in numbers}) == len(set(numbers)) < len(numbers)
    before = [token for item in read for row in item.rows for token in row]
    assert len({id(number) for number in before}) > len(set(before))


def test_other_subjects_are_read_for_what_wants_a_neuron_and_later_for_what_is_asked(tiny_model, monkeypatch):
    wanted = [
        EditRequest(f"the {name} sat in", target, name) for name, target in (("cat", "b"), ("hen", "q"), ("fox", "z"))
    ]
    read = [read_item(tiny_model, number, request, (), False) for number, request in enumerate(wanted)]
    targets = find_target_tokens([item.target for item in read], [1, 1, 1])
    mean = np.full(tiny_model.config.hidden_size, 0.5, np.float32)
    calls, collected = [], last_site.collect
    monkeypatch.setattr(
        last_site, "collect", lambda model, rows, *a, **k: calls.append(len(rows)) or collected(model, rows, *a, **k)
    )
    monkeypatch.setattr(last_site, "find_mates", lambda *given: {})

    def negatives_of(first):
        given = (
            tiny_model,
            read,
            dict(enumerate(wanted)),
            ("herd", "inn", "theory"),
            2,
            mean,
            Sites(*[mean[None]] * 3),
            targets,
        )
        return last_site.find_subject_negatives(*given, np.asarray(first, int), None)

    whole, some, none = negatives_of([0, 1, 2]), negatives_of([1]), negatives_of([])
    assert calls == [6, 2]
    numbers = np.asarray([2, 1, 2])
    expected = whole(numbers)
    assert expected.shape == (3, 2, tiny_model.config.hidden_size)
    np.testing.assert_array_equal(expected[0], expected[2])
    assert np.abs(expected - mean).max(-1).min() > 0.01
    assert calls == [6, 2]  # all are read
    np.testing.assert_allclose(some(numbers), expected, rtol=1e-5, atol=1e-5)
    assert calls == [6, 2, 2]  # the fox alone
    np.testing.assert_allclose(none(numbers), expected, rtol=1e-5, atol=1e-5)
    assert calls == [6, 2, 2, 4]
    assert none(numbers[:0]).shape == (0, 2, tiny_model.config.hidden_size)


def test_other_requests_that_serve_as_negatives_do_not_depend_on_the_order(tiny_model):
    names, targets = ("cat", "hen", "fox", "dog", "inn", "hat"), "bqzxkw"
    wanted = [EditRequest(f"the {name} sat in", target, name) for name, target in zip(names, targets, strict=True)]

    def chosen_in(order):
        requests = {position: wanted[number] for position, number in enumerate(order)}
        read = [read_item(tiny_model, position, request, (), False) for position, request in requests.items()]
        mates = last_site.find_mates(read, requests, 2)
        swapped = swapped_prompts(tiny_model, requests, ("theory", "herd"), 2)
        named = lambda at: requests[at].subject  # noqa: E731
        return {named(at): [*map(named, others)] for at, others in mates.items()}, {
            named(at): texts for at, texts in swapped.items()
        }

    first = chosen_in(range(6))
    assert first == chosen_in([3, 5, 0, 4, 1, 2]) == chosen_in([5, 4, 3, 2, 1, 0])
    assert sorted(map(len, first[0].values())) == [2] * 6
