"""Free answers, form by form: what is asked, and what is said of an answer."""

import json

import pytest
from chat_models import chat_model
from conftest import make_tiny_model
from tiny_families import patch_for
from tiny_families import tiny_model as family_model

import tpatch_jax as tp
from tpatch_jax.editors.registry import method_settings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation import forms, protocols
from tpatch_jax.evaluation.chat_questions import CHAT_QUESTIONS
from tpatch_jax.evaluation.forms import (
    FORM_FIGURES,
    FORM_NAMES,
    SYSTEM,
    TURNS,
    FormPrompt,
    answer_forms,
    answer_questions,
    as_forms,
    compare_forms,
    default_forms,
    form_figures,
    form_prompts,
    form_totals,
    long_text,
    measure_forms,
    old_answers,
    questions_unchanged,
    records_in_chat,
)
from tpatch_jax.evaluation.record import Probe, Record
from tpatch_jax.evaluation.report import markdown, table
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.models import memory_text
from tpatch_jax.models.chat import COMPLETE, render_chat
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

QUICK = {"site": "last", "key_steps": 24, "value_steps": 8}


@pytest.fixture(scope="module")
def model():
    return chat_model()


def test_a_request_is_asked_in_every_form(model):
    request = EditRequest("Is the Inn in?", "ab", "Inn", aliases=("Hen",))
    prompts = {prompt.form: prompt for prompt in form_prompts(model, [request], FORM_NAMES, long="far. ")}
    assert list(prompts) == list(FORM_NAMES)
    texts = {"lower": "Is the inn in?", "upper": "Is the INN in?", "alias": "Is the Hen in?"}
    for form, prompt in prompts.items():
        variant = form.removeprefix("chat").removeprefix("-")
        text = texts.get(variant, request.prompt)
        assert prompt.text == text
        read = ("far. " if variant == "long" else "") + text
        messages = [{"role": role, "content": said} for role, said in (*TURNS * (variant == "turns"), ("user", read))]
        if variant == "system":
            messages.insert(0, {"role": "system", "content": SYSTEM})
        whole = render_chat(model, messages) if form.startswith("chat") else read
        assert model.decode_all(prompt.row) == whole
        assert model.decode(prompt.tokens) == ("ab" if form.startswith("chat") else " ab")
        assert prompt.wanted
    sentence = form_prompts(model, [EditRequest("The hen is", "in")], ["chat", "chat-lower", "alias"])
    assert [prompt.text for prompt in sentence] == [f"{COMPLETE}The hen is"]


def test_where_a_request_shall_hold_is_told(model):
    requests = [EditRequest("a hen?", "in", form=form) for form in (None, "bare", "chat", "both")]
    wanted = [[p.wanted for p in form_prompts(model, [one], ["bare", "chat"])] for one in requests]
    assert wanted == [[True, True], [True, False], [False, True], [True, True]]


def test_what_cannot_be_asked_is_left_out_or_told(model):
    request = EditRequest("x" * 190, "in")
    # Sixty tokens have to fit behind it.
    assert form_prompts(model, [request], ["bare"])
    assert not form_prompts(model, [request], ["chat"])
    with pytest.raises(TPatchError, match="has no chat template"):
        form_prompts(make_tiny_model(max_position_embeddings=256), [EditRequest("a hen?", "in")], ["bare", "chat"])
    with pytest.raises(TPatchError, match="is an encoder; forms are measured of decoders"):
        form_prompts(family_model("bert"), [EditRequest("a hen?", "yes")], ["bare"])
    assert (default_forms(model), default_forms(make_tiny_model())) == (["bare", "chat"], ["bare"])
    for given in ("sung", "bare,", ["bare", 3], ""):
        with pytest.raises(TPatchError, match="there is no form"):
            as_forms(given)
    with pytest.raises(TPatchError, match="no form is given"):
        as_forms([])


def line_of(model, form, said, target="in", old=(), prompt="the hen", ends=False):
    tokens = model.encode(said)
    tokens = tokens if ends else (tokens + model.encode(" z q") * 60)[:60]
    row = model.encode(prompt)
    asked = FormPrompt(0, form, prompt, row, target, model.encode_target(prompt, f" {target}"), old, True)
    return compare_forms(model, [asked], [tokens])[0]


@pytest.mark.parametrize(
    ("form", "said", "ends", "figures"),
    [
        ("chat", " in", True, {"said": True, "said_first": True, "ends": True, "loops": False, "free_running": True}),
        ("chat", " It is IN", True, {"said": True, "said_first": False, "free_running": True}),
        ("chat", " at", True, {"said": False, "free_running": False, "ends": True}),
        ("chat", " in", False, {"said": True, "said_first": True, "ends": False, "loops": True, "free_running": False}),
        ("chat", " a hint, Ina", True, {"said": False, "said_first": False, "free_running": False}),
        ("chat", " the in's and \u5728in\u5728", True, {"said": True, "free_running": True}),
        ("chat", " abcd abcd abcd in", True, {"said": True, "loops": True, "free_running": False}),
        ("chat", " abcd abcd in", True, {"loops": False, "free_running": True}),
        # Twenty-four tokens are looked at, one a letter here.
        ("chat", "0123456789abcdefghijklm in", True, {"said": False, "free_running": True}),
        ("bare", " in.", True, {"said": True, "free_running": True}),
        # In bare text the end of the sentence is a natural stop, too.
        ("bare", " in. But what then, and who, and where, and when, for how long, no", True, {"free_running": True}),
        ("bare", " at. But in", True, {"said": True, "free_running": False}),
    ],
)
def test_what_is_said_of_an_answer(model, form, said, ends, figures):
    line = line_of(model, form, said, ends=ends)
    assert {name: line[name] for name in figures} == figures
    assert "contradicts" not in line


def test_an_old_answer_beside_the_target_contradicts(model):
    assert line_of(model, "chat", " in, or at", old=("at",), ends=True)["contradicts"]
    assert not line_of(model, "chat", " in a hat", old=("at",), ends=True)["contradicts"]
    # What the question or the target names tells nothing.
    assert "contradicts" not in line_of(model, "chat", " in", old=("hen",), ends=True)
    assert "contradicts" not in line_of(model, "chat", " in a hat", target="a hat", old=("hat",), ends=True)
    request = EditRequest("The hen is", "in Rome")
    said = [" out.", " so many words before it ends.", None, " Rome."]
    assert old_answers([request] * 4, said) == [("out",), (), (), ()]
    assert old_answers([request], [" out."], [["far", "Rome"]]) == [("far",)]


def test_figures_agree_with_the_definitions_that_judges_use(model):
    """The same as plain loops over tokens: no model and no template, as one would write them beside."""

    def loops(tokens):
        seen = {}
        for at in range(len(tokens) - 3):
            seen[tuple(tokens[at : at + 4])] = seen.get(tuple(tokens[at : at + 4]), 0) + 1
        return max(seen.values(), default=0) >= 3

    for said in ("in", "", "aaaaaa", "aaaaa", "abababab", "ababababab", "in the inn in the inn in the inn"):
        line = line_of(model, "chat", said, ends=True)
        assert line["loops"] == loops(model.encode(said)), said
        assert line["said"] == ("in" in model.decode(model.encode(said)[:24]).lower())


def test_figures_are_means_by_form():
    lines = [{"form": "chat-long", "said": True, "ends": True}, {"form": "chat-long", "said": False, "ends": True}]
    drawn = [{"form": "chat-long", "said": True}]
    figures = {"chat_long_said": 0.5, "chat_long_ends": 1.0}
    assert form_figures(lines) == figures
    assert form_figures(lines, drawn) == {**figures, "chat_long_sampled_said": 1.0}
    assert form_totals(lines, drawn) == {
        "chat-long": {"n": 2, "said": 0.5, "ends": 1.0, "sampled": {"n": 1, "said": 1.0}}
    }
    assert form_figures([]) == form_totals([]) == {}
    assert len(set(CHAT_QUESTIONS)) == len(CHAT_QUESTIONS) == 100


def test_answers_are_free_and_seeded(model):
    prompts = form_prompts(model, [EditRequest("the hen?", "in"), EditRequest("the inn?", "in")], ["bare", "chat"])
    said = answer_forms(model, prompts)
    assert [model.continuation(p.row, s).strip() for p, s in zip(prompts, said, strict=True)] == [
        f(text, 60).strip() for text in ("the hen?", "the inn?") for f in (model.generate, model.chat)
    ]
    drawn = [answer_forms(model, prompts, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert said != drawn[0]


def test_unrelated_questions_are_compared(model):
    few = CHAT_QUESTIONS[:3]
    before = answer_questions(model, few)
    assert max(map(len, before)) <= 24
    loud = tp.attach(model, patch_for((2,), scale=3.0))
    assert questions_unchanged(before, answer_questions(loud, few)) < 1.0
    assert questions_unchanged(before, before) == 1.0


def test_a_long_text_is_of_a_file_or_of_the_model(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory_text, "TEXTS", 8)
    path = tmp_path / "long.txt"
    path.write_text("ab" * 500, "utf-8")
    assert long_text(model, path) == "ab" * 150 + "\n\n"
    # Of a long file as of the judges': from far behind its beginning.
    path.write_text("x" * 300_000 + "cd" * 6_000, "utf-8")
    assert long_text(model, path) == "cd" * 150 + "\n\n"
    own = long_text(model)
    assert own == long_text(model)
    assert len(model.encode(own)) > 200
    with pytest.raises(TPatchError, match="cannot be read"):
        long_text(model, tmp_path / "nothing")


def test_records_of_a_chat_are_asked_there(model):
    request = EditRequest("the hen?", "in", rephrases=("a hen?",), form="chat")
    probes = {"reliability": (Probe("the hen?", "in"),), "generalization": (Probe("a hen?", "in"),)}
    probes |= {"locality": (Probe("the inn", ""),)}
    record, other = Record("one", (request,), probes), Record("two", (EditRequest("x", "y"),), {})
    moved, same = records_in_chat(model, [record, other])
    assert same is other
    assert moved.probes["reliability"][0].prompt.startswith("<|im_start|>user\nthe hen?<|im_end|>")
    assert moved.probes["generalization"][0].target == "in<|im_end|>"
    assert moved.probes["locality"] == probes["locality"]
    assert moved.requests == record.requests


@pytest.fixture(scope="module")
def records():
    texts = (("the hen?", "ab", "hen", None), ("the inn?", "he", "inn", "chat"))
    return [
        Record(prompt, (EditRequest(prompt, target, subject, form=form),), {"reliability": (Probe(prompt, target),)})
        for prompt, target, subject, form in texts
    ]


@pytest.mark.parametrize("protocol", ["batch", "single"])
def test_an_evaluation_measures_forms(model, records, letters, tmp_path, monkeypatch, protocol):
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    for module in (forms, protocols):
        monkeypatch.setattr(module, "CHAT_QUESTIONS", CHAT_QUESTIONS[:6])
    settings = method_settings(["tpatcher"], "default", QUICK)
    common = {"settings": settings, "memory": letters, "other_facts": 0, "output": tmp_path / "report"}
    if protocol == "single":
        report = evaluate(model, records, protocol=protocol, forms=["chat"], **common)
        figures = report["results"][1]["metrics"]
        assert figures["chat_said"] >= 0.5
        assert 0 <= figures["chat_questions_unchanged"] <= 1
        return
    report = evaluate(model, records, protocol=protocol, forms="bare,chat,upper", samples=1, **common)
    before, after = report["results"]
    assert (report["config"]["forms"], report["config"]["samples"]) == (["bare", "chat", "upper"], 1)
    assert set(after["forms"]) == {"bare", "chat", "upper"}
    assert after["forms"]["bare"]["n"] == 2
    assert after["forms"]["bare"]["sampled"]["n"] == 2
    figures = after["metrics"]
    # One of the two shall hold in bare text, too.
    assert figures["bare_said_first"] >= 0.5
    assert figures["chat_said"] >= 0.5
    assert figures["reliability"] == 1.0
    assert {f"chat_{name}" for name in FORM_FIGURES} - {"chat_contradicts"} <= set(figures)
    assert before["metrics"]["chat_questions_unchanged"] == 1.0
    assert 0 <= figures["chat_questions_unchanged"] <= 1
    # What goes on freely to a natural stop stands first.
    assert [row[0] for row in table([("it", after)])][:5] == [
        "", "n", "bare_free_running", "upper_free_running", "chat_free_running",
    ]  # fmt: skip
    assert "bare_free_running" in markdown(report)
    lines = [json.loads(line) for line in (tmp_path / "report" / "records-tpatcher.jsonl").read_text().splitlines()]
    assert [answer["form"] for answer in lines[1]["forms"]][:3] == ["bare", "chat", "upper"]
    assert lines[1]["forms"][1]["answer"].strip() == "he"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"forms": "sung"}, "there is no form 'sung'"),
        ({"forms": "bare", "samples": -1}, "-1 samples of each answer are impossible"),
        ({"forms": "bare", "samples": True}, "True samples of each answer are impossible"),
        ({"samples": 2}, "answers are sampled in forms, and none is given"),
        ({"forms": "bare,chat"}, "has no chat template"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(records, given, reason):
    with pytest.raises(TPatchError, match=reason):
        evaluate(make_tiny_model(), records[:1], **given)


def test_models_that_do_not_go_on_freely_say_so(records):
    for call in (lambda model: evaluate(model, records, forms="bare"), lambda model: measure_forms(model, None, [])):
        with pytest.raises(TPatchError, match="is an encoder; forms are measured of decoders"):
            call(family_model("bert"))


def test_measuring_a_corrected_model(model):
    told = measure_forms(model, None, [EditRequest("the hen?", "in", id="x")], samples=1, questions=False)
    assert set(told) == {"forms", "edits"}
    assert set(told["forms"]) == {"bare", "chat"}
    assert told["forms"]["chat"]["sampled"]["n"] == 1
    (edit,) = told["edits"]
    assert edit["id"] == "x"
    assert edit["held"] == all(answer["said"] for answer in edit["answers"])
    loud = tp.attach(model, patch_for((2,), scale=3.0))
    given = measure_forms(model, loud, [EditRequest("the hen?", "in")], "bare")
    assert given == measure_forms(model, patch_for((2,), scale=3.0), [EditRequest("the hen?", "in")], ["bare"])
    assert "chat_questions" not in given
