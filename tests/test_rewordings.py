"""Wordings learnt from a memory: which frames ask the same, and that a patch is fitted on them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model

from tpatch_jax.editors.input_memory import collect_inputs
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.rewordings import MOST, learn_rewordings, named, reworded
from tpatch_jax.models.rows import ASK
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"

BORN = ("Where was {} born?", "{} is from which town?", "In which town was {} born?")
NAMES = st.from_regex(r"[A-Z][a-z]{3,8} [A-Z][a-z]{3,8}", fullmatch=True).filter(lambda name: name.count(" ") == 1)


@given(st.lists(NAMES, min_size=1, max_size=8, unique=True), NAMES)
def test_frames_that_meet_at_a_fact_ask_the_same(names, other):
    facts = [(frame.replace("{}", name), f"town {name}") for name in names for frame in BORN]
    learnt = learn_rewordings(facts)
    assert {frame: set(alike) for frame, alike in learnt.items()} == {one: set(BORN) - {one} for one in BORN}
    for frame in BORN:
        asked = reworded(frame.replace("{}", other), other, learnt, 9)
        assert set(asked) == {one.replace("{}", other) for one in BORN} - {frame.replace("{}", other)}
        assert reworded(frame.replace("{}", other), None, learnt, 1) == asked[:1]


def test_what_happens_to_have_the_same_answer_once_asks_something_else():
    names = [f"Anna {letter}orn" for letter in "BCDFGHKLMN"]
    facts = [(frame.replace("{}", name), "Rome" if name == names[0] else name) for name in names for frame in BORN[:2]]
    facts += [(f"Where did {name} die?", "Rome") for name in names]
    learnt = learn_rewordings(facts)
    assert "Where did {} die?" not in learnt[BORN[0]]
    assert learnt[BORN[0]] == (BORN[1],)


def test_other_answers_other_names_and_texts_without_a_name_teach_nothing():
    facts = [("Where was Anna Born born?", "Rome"), ("Anna Born is from which town?", "Oslo")]
    facts += [("Where was Berta Born born?", "Oslo"), ("who hit the mat", "x"), ("what sat on the mat", "x")]
    facts += [("Ada or Ada?", "x"), ("Is it Ada?", "x")]
    assert learn_rewordings(facts) == {}
    assert reworded("who hit the mat", None, {}, 3) == []


def test_only_the_most_frequent_are_kept():
    facts = [(f"Ada word{number}", "x") for number in range(3 * MOST)]
    assert all(len(alike) == MOST for alike in learn_rewordings(facts).values())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Name the twin city of Donetsk.", "Donetsk"),
        ("Where is University of York?", "University of York"),
        ("who hit the mat", ""),
        ("What is it?", ""),
    ],
)
def test_names(text, name):
    assert named(text) == name


def test_a_patch_is_fitted_on_the_wordings_that_its_memory_has(monkeypatch, tmp_path):
    model, memory = tiny_model("bart"), tmp_path / "memory.jsonl"
    texts = ("the cat sat in", "who hit the mat", "an inn is a house", "the hat is in the house", "the mat hit the cat")
    memory.write_text("\n".join(json.dumps({"prompt": text}) for text in texts), "utf-8")
    plain = collect_model_memory(model, 1, memory, cache=tmp_path / "cache")
    assert plain.rewordings == {}  # nothing in it has a name
    seen = {}

    def learn(facts):
        seen.update(facts)
        return {"who hit {}": ("the mat {}", "an {}")}

    monkeypatch.setattr("tpatch_jax.editors.input_memory.learn_rewordings", learn)
    first = collect_model_memory(model, 1, memory, cache=tmp_path / "other")
    second = collect_model_memory(model, 1, memory, cache=tmp_path / "other")
    assert first.rewordings == second.rewordings == {"who hit {}": ("the mat {}", "an {}")}
    assert set(seen) == set(texts)
    request = EditRequest("who hit the cat", "the house", subject="the cat")
    wordings = reworded(request.prompt, request.subject, first.rewordings, 5)
    item = read_item(model, 0, request, ("a", "b", "c"), False, wordings=wordings)
    assert item.texts[:3] == ["who hit the cat", "the mat the cat", "an the cat"]
    assert len(item.texts) == 4
    read = [model.decode(row[: row.index(ASK)]) for row in item.rows]
    assert read == item.texts


def test_a_classifier_learns_none():
    model = tiny_model("bert")
    rows = [model.encode_prompt(text) for text in ("the cat sat in", "who hit the mat", "an inn is a house")]
    assert collect_inputs(model, 1, rows, ("the cat sat in", "who hit the mat"))[-1] == {}
