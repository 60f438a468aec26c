"""Guarded answers: compared by what is said up to the end of the sentence. And what banks of earlier versions kept."""

from typing import Any

import pytest
from bank_engine import ENGINE, StandIn, make_bank
from conftest import make_tiny_model

from tpatch_jax.bank.adding import add_with
from tpatch_jax.bank.changing import guard_with
from tpatch_jax.bank.guards import GuardedAnswers, refused_by_guards
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.state import Guard
from tpatch_jax.display.bank import bank_view
from tpatch_jax.display.page import page
from tpatch_jax.models import sentences
from tpatch_jax.requests import EditRequest

LYON = EditRequest("The capital of France is", "Lyon", id="lyon")


@pytest.mark.parametrize(
    ("guarded", "said", "kept"),
    [
        (" it. the", " it. a hen", True),  # what comes after the sentence may change
        (" it.", " it\nthen", True),
        (" it", " it, then", True),
        (" it.", " it and me.", False),
        (" it.", " me.", False),
    ],
)
def test_a_guarded_answer_is_kept_if_the_sentence_says_the_same(monkeypatch, guarded, said, kept):
    model, guard = make_tiny_model(), Guard("the cat", guarded)
    tokens = model.encode(said)
    monkeypatch.setattr(sentences.generation, "greedy", lambda *_, **__: [tokens])
    answers, asked = GuardedAnswers(model), []

    def wrong(items: list[Any]) -> list[int]:
        asked.append(list(items[0].target))
        return [0]

    assert answers.changed(model, [guard], wrong) == ([] if kept else [guard])
    assert asked == [model.encode_target("the cat", guarded)]
    if kept:  # it is guarded in the tokens in which it is said now, up to the end of the sentence
        answers.changed(model, [guard], wrong)
        assert model.decode(asked[1]).rstrip() == sentences.first_sentence(said).rstrip()


def test_a_guard_that_says_its_tokens_costs_no_other_look(monkeypatch):
    model = make_tiny_model()
    monkeypatch.setattr(sentences.generation, "greedy", None)
    assert GuardedAnswers(model).changed(model, [Guard("the cat", " it")], lambda items: []) == []


def test_a_request_for_a_guarded_prompt_is_refused_before_anything_is_fitted(tmp_path):
    folder = make_bank(tmp_path / "bank")
    guard_with(folder, [Guard(LYON.prompt, " Paris.")], ())

    def never(bank: Any) -> Any:
        raise AssertionError("nothing has to be fitted")

    info = add_with(folder, [LYON], never)
    ((name, prompt, target, reason),) = info.failed
    assert (name, prompt, target) == ("lyon", LYON.prompt, "Lyon")
    assert reason.startswith("it would change the guarded answer 'Paris.' after 'The capital of France is'; --force")
    assert open_bank(folder).edits == ()
    # the others are taken in, and with force this one too
    fake = lambda bank: ENGINE  # noqa: E731
    assert add_with(folder, [LYON, EditRequest("b", "x", id="b")], fake).added == ("b",)
    assert add_with(folder, [LYON], fake, force=True).added == ("lyon",)


def test_a_request_that_wants_what_is_guarded_is_not_refused():
    guards = [Guard("The capital of France is", " Paris, a city.")]
    targets = ("Paris", "paris, a city.", "Paris, a city. It lies", "Lyon", "Par")
    wanted = [EditRequest(f"{guards[0].prompt} ", target) for target in targets]
    assert sorted(refused_by_guards(wanted, guards)) == [3, 4]
    assert refused_by_guards([EditRequest("The capital of Italy is", "Lyon")], guards) == {}


class Former(StandIn):
    """The engine of earlier versions, which kept what was most probable under the target's tokens."""

    def step(self, *given: Any) -> Any:
        stepped = super().step(*given)
        results = [one._replace(evidence={**one.evidence, "said_before": "Borisir Lling"}) for one in stepped.results]
        return stepped._replace(results=results)


def test_what_earlier_versions_kept_is_not_taken_for_what_was_said(tmp_path):
    folder = make_bank(tmp_path / "bank")
    add_with(folder, [EditRequest("Q", "weak A", id="old")], lambda bank: Former())
    (edit,) = open_bank(folder).edits
    assert edit.evidence["said_before"] is None
    assert edit.evidence["said_under_target"] == "Borisir Lling"
    assert "Borisir" not in page("bank", bank_view(open_bank(folder)))
    # now beside it, as it is done today: two more make the old one be fitted again
    new = [EditRequest(f"P{number}", "B", id=f"new-{number}") for number in range(2)]
    said = {"P0": " Boris Johnson.", "P1": None}
    info = add_with(folder, new, lambda bank: Former(), say=lambda engine, held, asked: [said[r.prompt] for r in asked])
    assert info.refitted == ("old",)
    old, first, second = open_bank(folder).edits
    assert [one.evidence["said_before"] for one in (old, first, second)] == [None, " Boris Johnson.", None]
    assert old.evidence["said_under_target"] == "Borisir Lling"
    assert " Boris Johnson.".strip() in page("bank", bank_view(open_bank(folder)))


def test_what_was_said_when_an_edit_was_added_stays_when_it_is_fitted_again(tmp_path):
    folder = make_bank(tmp_path / "bank")
    say = lambda engine, held, asked: [f" {one.prompt} with {len(held.edits)}." for one in asked]  # noqa: E731
    add_with(folder, [EditRequest("Q", "weak A", id="weak")], lambda bank: ENGINE, say=say)
    info = add_with(folder, [EditRequest(f"P{n}", "B") for n in range(2)], lambda bank: ENGINE, say=say)
    assert info.refitted == ("weak",)
    assert [edit.evidence["said_before"] for edit in open_bank(folder).edits] == [
        " Q with 0.",
        " P0 with 1.",
        " P1 with 1.",
    ]
    add_with(folder, [EditRequest("Q", "C")], lambda bank: ENGINE, say=say)
    assert open_bank(folder).edits[-1].evidence["said_before"] == " Q with 3."
