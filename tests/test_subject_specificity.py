"""Other facts about edited subjects: which are asked, and whether what is said of them stays."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model
from tiny_families import tiny_model as family_model

from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.frames import relations
from tpatch_jax.editors.wordings import NEUTRAL, NEUTRAL_QUESTIONS
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.other_facts import FRAMES, KINDS, choose_frames, kind_of_subject, topics_of
from tpatch_jax.evaluation.subject_specificity import (
    FIGURES,
    FORMS,
    OtherFact,
    compare_facts,
    facts_about,
    measure_specificity,
    specificity_figures,
    specificity_totals,
)
from tpatch_jax.models import networks
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"


def ask(prompt, subject, target="red"):
    return EditRequest(prompt, target, subject=subject)


def test_frames_are_whole_and_none_is_one_that_values_are_trained_on():
    frames = [frame for kind in KINDS for frame in FRAMES[kind]]
    texts = [text for frame in frames for text in (frame.statement, frame.question)]
    assert len(set(texts)) == len(texts)
    trained = {text for relation in relations() for text in (*relation.statements, *relation.questions)}
    assert not set(texts) & {*NEUTRAL, *NEUTRAL_QUESTIONS, *trained}
    assert all(text.count("{}") == 1 for text in texts)
    assert all(frame.question.endswith("?") and frame.statement[-1].isalpha() for frame in frames)
    assert all(frame.topics and frame.statement[:1] != "{" for frame in frames)
    assert all(12 <= len(FRAMES[kind]) <= 16 for kind in ("person", "place", "organisation", "work", "thing"))
    # A request that asks what a frame asks is not asked it, as far as its words tell what it is about.
    for frame in frames:
        about = ask(frame.statement.format("Ada"), "Ada")
        assert topics_of(about) & set(frame.topics) or not topics_of(about), frame


@pytest.mark.parametrize(
    ("prompt", "subject", "kind"),
    [
        ("The mother tongue of Jalil Lespert is", "Jalil Lespert", "person"),
        ("Ray Charles, the", "Ray Charles", "person"),
        ("Question: Where was Maria Altmann born?\nAnswer:", "Maria Altmann", "person"),
        ("The capital of Peru is", "Peru", "place"),
        ("Prespa Glacier is located in", "Prespa Glacier", "place"),
        ("In Bhopal, an official language is", "Bhopal", "place"),
        ("The headquarters of Propellerhead Software is in", "Propellerhead Software", "organisation"),
        ("Annamalai University is in", "Annamalai University", "organisation"),
        ("The original language of The Aeronauts is", "The Aeronauts", "work"),
        ("Valemont debuted on", "Valemont", "work"),
        ("Nokia N85 is developed by", "Nokia N85", "thing"),
        ("iOS 7", "iOS 7", "thing"),
    ],
)
def test_a_subject_has_a_kind(prompt, subject, kind):
    assert kind_of_subject(ask(prompt, subject)) == kind


@pytest.mark.parametrize(
    ("prompt", "topic"),
    [
        ("The mother tongue of Ada Old is", "language"),
        ("Ada Old passed away in", "death"),
        ("Ada Old, who holds a citizenship from", "origin"),
        ("Ada Old's profession is a", "work"),
        ("Ada Old follows the religion of", "religion"),
        ("Question: To whom was Ada Old married?\nAnswer:", "family"),
        ("Ada Old, from", "origin"),
    ],
)
def test_a_request_is_not_asked_its_own_relation(prompt, topic):
    request = ask(prompt, "Ada Old")
    assert topic in topics_of(request)
    frames = choose_frames(request, 16)
    assert len(frames) >= 9
    assert not any(topic in frame.topics for frame in frames)
    assert any(topic in frame.topics for frame in FRAMES["person"])


def test_frames_are_drawn_from_the_requests_text_alone():
    first, other = ask("Ada Old was born in", "Ada Old"), ask("Bob New was born in", "Bob New")
    assert choose_frames(first) == choose_frames(first, together=[first, other])
    assert choose_frames(first)[:2] == choose_frames(first, 2)
    drawn = {tuple(choose_frames(ask(f"Person{n} Old was born in", f"Person{n} Old"))) for n in range(8)}
    assert len(drawn) > 4
    # What another request asks of the same subject is another edit.
    every = choose_frames(first, 16)
    faith = ask("The faith of Ada Old is", "ADA OLD")
    assert [frame for frame in every if "religion" not in frame.topics] == choose_frames(first, 16, [faith])
    assert any("religion" in frame.topics for frame in every)
    assert choose_frames(EditRequest("Ada", "x")) == choose_frames(ask("Ada", " ")) == []


def test_what_is_asked_fits_the_model(tiny_model):
    requests = [
        ask("The ruler of the Ash is", "Ash"),
        EditRequest("It is", "x"),
        ask("Ada", "Bob"),
        ask("Ada likes", "Ada"),
    ]
    facts = facts_about(tiny_model, requests, count=2)
    assert {fact.number for fact in facts} == {0, 3}
    assert {fact.form for fact in facts} == {"statements", "questions"}
    assert all("the Ash" in fact.prompt for fact in facts if not fact.number)
    assert all(fact.row == tiny_model.encode_prompt(fact.prompt) for fact in facts if fact.form == "statements")
    asked = [fact for fact in facts if fact.form == "questions"]
    assert all(tiny_model.decode(fact.row) == f"Q: {fact.prompt}\nA:" for fact in asked)
    # Twelve tokens have to fit behind it.
    longest = max(len(fact.row) for fact in facts)
    narrow = dataclasses.replace(tiny_model, config=dataclasses.replace(tiny_model.config, context=longest + 11))
    assert max(len(fact.row) for fact in facts_about(narrow, requests, count=2)) < longest
    with pytest.raises(TPatchError, match="no form 'sung'; choose from statements, questions, chat"):
        facts_about(tiny_model, requests, ["sung"])
    asked = facts_about(family_model("t5"), requests, count=1)
    assert [fact.form for fact in asked] == ["questions"] * 2
    assert facts_about(family_model("bert"), requests) == []


def test_chat_goes_through_the_models_template():
    model = make_tiny_model(max_position_embeddings=128)
    request = ask("The Ash is in", "Ash")
    assert facts_about(model, [request], ["chat"]) == []
    model.tokenizer.chat_template = (
        "{{ bos_token }}U {{ messages[0]['content'] }}{% if add_generation_prompt %} M{% endif %}"
    )
    (fact,) = facts_about(model, [request], ["chat"], 1)
    text = model.tokenizer.decode(fact.row)
    assert text == f"<|endoftext|>U {fact.prompt} M"
    assert fact.prompt.endswith("?")
    model.tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert facts_about(model, [request], ["chat"]) == []


def line_of(model, target, before, after):
    fact = OtherFact(0, "chat", "p", model.encode("p"), target)
    (line,) = compare_facts(model, [fact], [model.encode(before)], [model.encode(after)])
    return [line[name] for name in FIGURES]


@pytest.mark.parametrize(
    ("target", "before", "after", "figures"),
    [
        ("red", " blue", " blue", [True, True, False]),
        ("red", " blue", " red", [True, False, True]),
        ("red", "blue", "Red!", [False, False, True]),
        ("red", " abcdefg", " abcdxyz", [True, True, False]),
        ("red", " abcxefg", " abcdxyz", [True, False, False]),
        ("red", " it is red", " red", [True, False, False]),
        ("red", " x", " reddish", [True, False, False]),
        ("red", "", "", [True, True, False]),
        ("red", "", "a", [False, False, False]),
        ("one two three four five six", " x", " one two three four", [True, False, True]),
        ("one two three four five six", " x", " one two three", [True, False, False]),
        ("?!", "x", "x?!", [True, False, True]),
    ],
)
def test_figures_of_one_fact(tiny_model, target, before, after, figures):
    assert line_of(tiny_model, target, before, after) == figures


def test_figures_are_shares_with_counts():
    def line(form, *values):
        return {"form": form, **dict(zip(FIGURES, values, strict=True))}

    lines = [line("statements", True, True, False), line("statements", False, False, True)]
    lines += [line("chat", True, False, False)] * 2
    figures = specificity_figures(lines)
    assert figures == {
        "subject_specificity": 0.75,
        "specificity_statements_first_token_kept": 0.5,
        "specificity_statements_five_tokens_kept": 0.5,
        "specificity_statements_target_said": 0.5,
        "specificity_chat_first_token_kept": 1.0,
        "specificity_chat_five_tokens_kept": 0.0,
        "specificity_chat_target_said": 0.0,
    }
    assert specificity_totals(lines) == {
        "statements": {"prompts": 2, "first_token_kept": 0.5, "five_tokens_kept": 0.5, "target_said": 0.5},
        "chat": {"prompts": 2, "first_token_kept": 1.0, "five_tokens_kept": 0.0, "target_said": 0.0},
    }
    assert specificity_figures([]) == specificity_totals([]) == {}


@pytest.mark.usefixtures("quick_compilation")
def test_a_neuron_that_always_speaks_is_seen(tiny_model):
    target = "Z" * 12
    requests = [ask("Ada likes", "Ada", target), EditRequest("The sky is", target)]
    table = np.asarray(networks.unembedding(tiny_model.config, tiny_model.params))
    (token,) = tiny_model.encode("Z")
    value = jnp.asarray(500 * table[token] / np.linalg.norm(table[token]))[None]
    patch = Patch(jnp.zeros_like(value), jnp.ones(1), value)
    first, second = measure_specificity(tiny_model, patch, requests, FORMS, 1)
    assert [line["form"] for line in first] == ["statements", "questions"]
    assert second == []
    for line in first:
        text = line["prompt"] if line["form"] == "statements" else f"Q: {line['prompt']}\nA:"
        assert line["before"] == tiny_model.generate(text, 12)
        assert line["after"] == target
        assert line["first_token_kept"] == (line["before"][:1] == "Z")
        assert not line["five_tokens_kept"]
        assert line["target_said"]
    unchanged, _ = measure_specificity(tiny_model, None, requests, FORMS, 1)
    assert specificity_figures(unchanged)["subject_specificity"] == 1
    assert [line["target_said"] for line in unchanged] == [False, False]
