"""The forms in which a request is fitted: in conversations, behind a longer text, with its subject spelt otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_models import GEMMA, chat_model
from jax.tree_util import Partial

from tpatch_jax.core import values
from tpatch_jax.core.patch import Patch, create
from tpatch_jax.core.recipes.staged import Recognised
from tpatch_jax.editors.forms import ask_in_chats, chat_rows, holds_in_chats, other_chats, respelled
from tpatch_jax.editors.locating import respell
from tpatch_jax.editors.model_memory import ModelMemory, collect_model_memory
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.subject_rows import PromptRow, short_ends
from tpatch_jax.editors.tpatcher import subject_site
from tpatch_jax.editors.tpatcher.previous import create_empty
from tpatch_jax.editors.tpatcher.subject_prompts import read_subject_rows
from tpatch_jax.editors.tpatcher.subject_settings import SubjectSettings
from tpatch_jax.editors.tpatcher.subject_site import (
    FittedSubjects,
    SubjectNeuron,
    Subjects,
    fit_subjects,
    read_subjects,
)
from tpatch_jax.models.chat import COMPLETE, end_of_turn
from tpatch_jax.models.collection import collect
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps

ANNA = EditRequest("The mother tongue of Anna Bell is", "Greek", subject="Anna Bell", form="both")


@pytest.fixture(scope="module")
def model():
    return chat_model()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"form": None}, False),
        ({"form": "bare"}, False),
        ({"form": None, "system": "Be brief."}, True),
        ({"form": None, "turns": (("user", "Hi"), ("assistant", "Yes?"))}, True),
    ],
)
def test_a_request_is_fitted_in_chats_where_it_says_so(model, changes, expected):
    assert holds_in_chats(model, dataclasses.replace(ANNA, **changes)) is expected


def test_a_request_is_asked_in_three_conversations_that_end(model):
    twins = ask_in_chats(model, ANNA, 3)
    assert len({twin.prompt for twin in twins}) == 3
    assert all(twin.target == "Greek" + end_of_turn(model) and twin.form == "bare" for twin in twins)
    assert COMPLETE + ANNA.prompt in twins[0].prompt
    assert "<|im_start|>system\n" in twins[1].prompt
    assert twins[2].prompt.count("<|im_start|>user") == 2
    assert [twin.prompt for twin in ask_in_chats(model, ANNA, 1)] == [twins[0].prompt]
    (behind,) = ask_in_chats(model, ANNA, 1, behind="A long text.")
    assert "user\nA long text.\n\n" + COMPLETE in behind.prompt


def test_a_question_is_asked_as_it_stands(model):
    asked = dataclasses.replace(ANNA, prompt="Question: Which language does Anna Bell speak?\nAnswer:")
    first, second, _ = ask_in_chats(model, asked, 3)
    assert "user\nWhich language does Anna Bell speak?<|im_end|>" in first.prompt
    assert "user\nWhich language does Anna Bell speak? Answer briefly.<|im_end|>" in second.prompt


def test_a_request_s_system_and_turns_stay(model):
    request = dataclasses.replace(ANNA, system="Be brief.", turns=(("user", "Hi"), ("assistant", "Yes?")))
    for twin in ask_in_chats(model, request, 3):
        assert "system\nBe brief." in twin.prompt
        assert "assistant\nYes?" in twin.prompt


def test_a_template_that_takes_no_system_is_asked_without():
    twins = ask_in_chats(chat_model(GEMMA), ANNA, 3)
    assert twins
    assert all("fewest" not in twin.prompt and "few words as" not in twin.prompt for twin in twins)


def test_other_facts_are_asked_in_chats(model):
    twins = other_chats(model, ANNA, 5)
    assert len({twin.prompt for twin in twins}) == 5
    assert all("Anna Bell" in twin.prompt and "mother tongue" not in twin.prompt for twin in twins)
    assert sum(COMPLETE in twin.prompt for twin in twins) == 2


def test_rows_of_chats_know_the_subject_of_the_last_turn(model):
    request = dataclasses.replace(ANNA, turns=(("user", "Who is Anna Bell?"), ("assistant", "A singer.")))
    (row,) = chat_rows(model, ask_in_chats(model, request, 1))
    assert model.decode(row.tokens[: row.subject + 1]).endswith(COMPLETE + "The mother tongue of Anna Bell")
    assert model.tokenizer.decode(row.wanted) == "Greek<|im_end|>"
    assert [row.tokens[place + 1] for place in row.places] == row.wanted
    (silent,) = chat_rows(model, ask_in_chats(model, request, 1), wanted=False)
    assert silent.tokens == row.tokens[: -len(row.wanted)]
    assert (silent.places, silent.wanted) == ([len(silent.tokens) - 1], [])


def test_other_spellings_are_aliases_and_lower_case(model):
    request = dataclasses.replace(ANNA, aliases=("Mrs Bell", "Anna Bell"))
    others = respelled(model, request, True)
    assert [other.subject for other in others] == ["Mrs Bell", "anna bell"]
    assert [other.prompt for other in others] == [
        "The mother tongue of Mrs Bell is",
        "The mother tongue of anna bell is",
    ]
    assert [other.subject for other in respelled(model, request, False)] == ["Mrs Bell"]
    assert respelled(model, respell(ANNA, "anna"), True) == []


def test_of_long_ends_the_shortest_stay():
    def row(end):
        return PromptRow([0] * (3 + end), 3, [2 + end], [])

    assert short_ends([row(5), row(17), row(16)]) == [row(5), row(16)]
    assert short_ends([row(40), row(30)]) == [row(30)]
    assert short_ends([]) == []


def read(model, request, tmp_path, **changes):
    known = collect_model_memory(model, 1, cache=tmp_path)
    item = read_item(model, 0, request, known.prefixes[:2], False)
    return read_subject_rows(model, known, [item], [request], [0], SubjectSettings(**changes)), known


def test_what_says_both_is_fitted_in_bare_text_and_in_chats(model, tmp_path):
    request = dataclasses.replace(ANNA, prompt="the hat of Ann is", subject="Ann")
    rows, known = read(model, request, tmp_path)
    assert known.passage
    assert collect_model_memory(model, 1, cache=tmp_path).passage == known.passage
    ends = {tuple(row.wanted) for row in rows.prompts[0]}
    bare = tuple(model.encode_target(request.prompt, request.continuation))
    assert bare in ends
    assert any(model.tokenizer.decode(list(end)).endswith("<|im_end|>") for end in ends)
    assert len(rows.neutral[0]) == SubjectSettings().neutral
    without, _ = read(model, dataclasses.replace(request, form="bare"), tmp_path)
    assert {tuple(row.wanted) for row in without.prompts[0]} == {bare}


def test_a_spelling_that_has_no_key_trains_no_value(tmp_path):
    request = EditRequest("so the hat of Ann is", " red", subject="Ann", aliases=("Bo",), form="bare")
    rows, _ = read(chat_model(None), request, tmp_path, lower_case=False)
    texts = {chat_model(None).decode(row.tokens[: row.subject + 1]) for row in rows.prompts[0]}
    assert any(text.endswith("hat of Bo") for text in texts)
    assert not any("ann" in text for text in texts)
    assert len(rows.spellings[0]) == 1


def test_another_spelling_has_a_key_of_its_own_unless_the_first_knows_it():
    model = chat_model(None)
    requests = [EditRequest("so the hat of Ann is", " red", subject="Ann"), EditRequest("bo is", " red", subject="bo")]
    rows = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    known = ModelMemory(jnp.asarray(rows), jnp.eye(16), ("in the inn.", "a hat."), ("Ann Bo",))
    items = [read_item(model, n, one, known.prefixes, False) for n, one in enumerate(requests)]
    before = create_empty(16, np.dtype(np.float32))

    def read(**changes):
        return read_subjects(model, known, 1, items, requests, before, SubjectSettings(**changes))

    both, one = read(), read(lower_case=False)
    assert (len(both.spelt), len(both.keys.key)) == (1, 3)
    assert (one.spelt, len(one.keys.key)) == ((), 2)
    assert both.spelt[0] in (0, -1)
    fires = np.dot(both.keys.key[2], _query(model, "so the hat of ann", 1)) + both.keys.bias[2]
    assert fires > SubjectSettings().plateau


def test_progress_counts_requests_however_many_neurons_each_has(monkeypatch):
    keys = Recognised(np.ones((3, 16), np.float32), np.zeros(3, np.float32), np.ones(3, np.float32), {})
    rows = {n: [PromptRow([1, 2], 0, [1], [3])] for n in range(3)}
    groups, queries = np.arange(3, dtype=np.int32), [np.zeros((2, 16), np.float32)] * 3
    read = Subjects(chat_model(None), 1, SubjectSettings(), [0, 1, 2], rows, rows, groups, queries, keys, [0, 1, 2])

    def fit_chunk(read, present, behind, chunk, kept, slot):
        four = Patch(np.ones((4 * len(chunk), 16), np.float32), np.ones(4 * len(chunk)), np.ones((4 * len(chunk), 16)))
        neurons = [SubjectNeuron(n, place, 1, 1.0, {}) for place, n in enumerate(np.repeat(chunk, 4).tolist())]
        return FittedSubjects(four, neurons)

    monkeypatch.setattr(subject_site, "_fit_chunk", fit_chunk)
    said = []
    no_patch = jax.tree.map(np.asarray, create(16))
    fit_subjects(read, no_patch, [True] * 3, create_empty(16, np.dtype(np.float32)), lambda *told: said.append(told))
    assert said == [("training values", done, 3) for done in (0, 2, 3)]


def _query(model, text, layer):
    tokens = model.encode_prompt(text)
    return collect(model, [tokens], [[len(tokens) - 1]], layer).query[0]


def test_keys_of_a_lane_stand_together_and_what_is_none_is_silent():
    key = jnp.arange(8.0).reshape(4, 2)
    keys = Recognised(key, jnp.arange(4.0), jnp.asarray([1.0, 1.0, 1.0, -1.0]), {})
    both = Subjects(None, 1, SubjectSettings(), [0, 1], {}, {}, np.zeros(2, int), [], keys, [0, 1], None, (1, 0))
    patch, there = subject_site._keys_of(both, [0, 1])
    assert there.tolist() == [[True, False], [True, True]]
    np.testing.assert_array_equal(patch.key, [[key[0], [0, 0]], [key[1], key[2]]])
    np.testing.assert_array_equal(patch.bias, [[0, subject_site.SILENT], [1, 2]])
    assert patch.value.shape == patch.key.shape


def test_slopes_are_those_of_the_residuals():
    def run(known, added):
        return jax.nn.log_softmax(jnp.sin(known + added))

    known = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)), jnp.float32)
    activity = jnp.asarray([[1.0, 0.5, 0.8], [1.0, 0.9, 0.3]])
    targets = values.TargetRows(activity, jnp.full((2, 3, 1), 1), jnp.full((2, 3, 1), 1 / 3))
    kept = values.KeptRows(activity, jax.nn.log_softmax(jnp.sin(known[:, 3:])))
    problem = values.ValueProblem(known, targets, kept, jnp.asarray([[1.0], [2.0]]), jnp.int32(4))
    move = jnp.full((2, 4), 0.3)
    (looked, _, _), slopes = values._look_with_slopes(Partial(run), problem, move)

    def residual(move):
        added = jnp.concatenate([activity, activity], 1)[..., None] * (move * problem.limit)[:, None]
        return values._look(Partial(run), problem, added)[1][0]

    slope = jax.jacobian(residual)(move)
    np.testing.assert_allclose(slopes(), [slope[lane, :, lane] for lane in range(2)], rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(looked, residual(move), rtol=1e-5, atol=1e-6)
