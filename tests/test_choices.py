"""General ability by multiple choice: questions that are read or made, and what saved patches do to the answers."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model
from tiny_families import tiny_model as family_model

import tpatch_jax as tp
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.choices import ChoiceQuestion, choice_probes, choose_answers, read_choices
from tpatch_jax.evaluation.saved_patches import evaluate_choices
from tpatch_jax.evaluation.scoring import ask, base_scores
from tpatch_jax.models.model import Model

QUESTIONS = [
    ChoiceQuestion("the cat sat in", ("the inn", "a hat", "it"), 0),
    ChoiceQuestion("the hen hid in", ("a long, long while", "b"), 1),
    ChoiceQuestion("who is in the inn", ("a hen", "the cat", "he", "x"), 2),
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def log_likelihood(model: Model, prompt: str, choice: str) -> float:
    read = model.encode_prompt(prompt)
    target = model.encode(f" {choice}")
    log_p = jax.nn.log_softmax(model.apply(jnp.asarray([read + target], jnp.int32))[0].astype(jnp.float32))
    return sum(float(log_p[len(read) + place - 1, token]) for place, token in enumerate(target))


def test_the_likeliest_choice_is_that_of_the_whole_answers(tiny_model: Model) -> None:
    base = base_scores(tiny_model, ask(tiny_model, choice_probes(QUESTIONS)))
    likelihood = [[log_likelihood(tiny_model, one.prompt, choice) for choice in one.choices] for one in QUESTIONS]
    assert choose_answers(QUESTIONS, base, base.outcome).tolist() == [int(np.argmax(each)) for each in likelihood]
    each = [
        int(np.argmax(np.divide(of_one, [len(choice.encode()) for choice in question.choices])))
        for of_one, question in zip(likelihood, QUESTIONS, strict=True)
    ]
    assert choose_answers(QUESTIONS, base, base.outcome, normalised=True).tolist() == each


def test_what_patches_do_is_the_edited_model_beside_the_unedited_one(tiny_model: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    key, value = (jnp.asarray(rng.normal(size=(6, 16)), jnp.float32) for _ in range(2))
    patches = {1: Patch(key, jnp.full(6, 3.0), 5 * value)}
    edited = tp.attach(tiny_model, patches)
    right = {}
    for name, model in (("before", tiny_model), ("after", edited)):
        chosen = [np.argmax([log_likelihood(model, one.prompt, choice) for choice in one.choices]) for one in QUESTIONS]
        right[name] = np.asarray(chosen)
    answers = np.asarray([one.answer for one in QUESTIONS])
    report = evaluate_choices(tiny_model, patches, QUESTIONS, output=tmp_path / "report", cache=False)
    unedited, patched = (result["metrics"] for result in report["results"])
    assert unedited["choices_accuracy"] == patched["choices_accuracy_unedited"] == np.mean(right["before"] == answers)
    assert unedited["choices_unchanged"] == 1
    assert patched["choices_accuracy"] == np.mean(right["after"] == answers)
    assert patched["choices_unchanged"] == np.mean(right["after"] == right["before"]) < 1
    points = 100 * (patched["choices_accuracy"] - unedited["choices_accuracy"])
    assert patched["choices_points"] == pytest.approx(points)
    # Read again, and no report of other questions.
    assert evaluate_choices(tiny_model, patches, QUESTIONS, output=tmp_path / "report", cache=False) == report
    other = [*QUESTIONS[:2], ChoiceQuestion(QUESTIONS[2].prompt, QUESTIONS[2].choices, 1)]
    with pytest.raises(TPatchError, match="belongs to a run with questions="):
        evaluate_choices(tiny_model, patches, other, output=tmp_path / "report", cache=False)


def test_without_neurons_nothing_changes(tiny_model: Model) -> None:
    metrics = evaluate_choices(tiny_model, {}, QUESTIONS, cache=False)["results"][1]["metrics"]
    assert (metrics["choices_unchanged"], metrics["choices_points"]) == (1, 0)


def test_questions_are_read_with_the_answer_or_its_number(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2 + 2 =", "choices": ["4", "5"], "answer": "4"},
        {"prompt": "Wo liegt Köln?", "choices": ["am Rhein", "an der Elbe"], "answer": 0},
    ]
    path = write_lines(tmp_path / "questions.jsonl", rows)
    assert read_choices(path) == [
        ChoiceQuestion("2 + 2 =", ("4", "5"), 0),
        ChoiceQuestion("Wo liegt Köln?", ("am Rhein", "an der Elbe"), 0),
    ]
    assert read_choices(path, 1) == read_choices(path)[:1]
    # Whole words in any case: what is edited is not general ability.
    assert read_choices(path, subjects=["KÖLN", "Rhein"]) == read_choices(path)[:1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2 + 2 =", "choices": ["4"], "answer": 0}, "'choices' must be two different texts or more"),
        ({"prompt": "2 + 2 =", "choices": ["4", "4"], "answer": 0}, "'choices' must be two different texts or more"),
        ({"prompt": "2 + 2 =", "choices": "45", "answer": 0}, "'choices' must be a list of texts"),
        ({"prompt": "", "choices": ["4", "5"], "answer": 0}, "'prompt' must be a text that is not empty"),
        ({"prompt": "2 + 2 =", "choices": ["4", "5"]}, "no 'answer'"),
        ({"prompt": "2 + 2 =", "choices": ["4", "5"], "answer": 2}, "one of the choices, or its number from 0 to 1"),
        ({"prompt": "2 + 2 =", "choices": ["4", "5"], "answer": "6"}, "one of the choices, or its number from 0 to 1"),
        ({"prompt": "2 + 2 =", "choices": ["4", "5"], "answer": True}, "one of the choices, or its number from 0 to 1"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "questions.jsonl", [{"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0}, row])
    with pytest.raises(TPatchError, match=f"record 2: .*{message}"):
        read_choices(path)


def test_more_questions_than_there_are_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "questions.jsonl", [{"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0}])
    for n, subjects, message in (
        (2, (), "gives 1 questions, but 2 were asked for"),
        (0, (), "0 questions were asked for"),
        (None, ("1",), "gives 0 questions that name no edited subject"),
    ):
        with pytest.raises(TPatchError, match=message):
            read_choices(path, n, subjects=subjects)
    with pytest.raises(TPatchError, match="not of choices but of requests"):
        read_choices(write_lines(tmp_path / "requests.jsonl", [{"prompt": "a", "target": "b"}]))


def counterfact(relation: str, true: str, neighbours: list[str]) -> dict[str, Any]:
    rewrite = {"relation_id": relation, "target_true": {"str": true}, "target_new": {"str": "x"}}
    return {"requested_rewrite": rewrite, "paraphrase_prompts": [], "neighborhood_prompts": neighbours}


def test_questions_are_made_of_neighbours_with_answers_of_their_relation(tmp_path: Path) -> None:
    tongues = ["Greek", "Dutch", "Thai", "Czech", "Welsh"]
    rows = [
        counterfact("P103", tongue, [f"Person {number} of {tongue} speaks", f"Person {number} said it in"])
        for number, tongue in enumerate(tongues)
    ]
    # Of a relation with fewer than four answers nothing is made.
    rows.append(counterfact("P36", "Rome", ["The capital of Italy is"]))
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps(rows), "utf-8")
    made = read_choices(path)
    assert [one.prompt for one in made[:6]] == [row["neighborhood_prompts"][0] for row in rows[:5]] + [
        "Person 0 said it in"
    ]
    assert len(made) == 10
    for number, one in enumerate(made):
        assert one.choices[one.answer] == tongues[number % 5]
        assert len({*one.choices}) == 4
        assert {*one.choices} <= {*tongues}
    # A question is the same wherever its record stands.
    path.write_text(json.dumps(rows[::-1]), "utf-8")
    assert {*read_choices(path)} == {*made}
    assert len(read_choices(path, subjects=["Person 0"])) == 8


def test_a_classifier_weighs_no_answers() -> None:
    model = family_model("bert")
    assert model.config.labels
    with pytest.raises(TPatchError, match="labels its inputs and weighs no answers"):
        evaluate_choices(model, {}, QUESTIONS)
    with pytest.raises(TPatchError, match="there are no questions"):
        evaluate_choices(make_tiny_model(), {}, [])
