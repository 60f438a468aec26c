"""Chats: rendered in the tokenizer's template, ended as it ends them, and requests that hold in one."""

import dataclasses
import io
import json
import sys

import pytest
from chat_models import CHATML, GEMMA, MISTRAL, PLAIN, chat_model
from conftest import make_tiny_model, same, write_tiny_folder
from tiny_families import tiny_model as family_model
from tokenizers.processors import TemplateProcessing

import tpatch_jax as tp
from tpatch_jax.bank.editing import bank_model
from tpatch_jax.bank.patches import read_patches, saved_requests
from tpatch_jax.bank.state import states
from tpatch_jax.cli import main as cli
from tpatch_jax.editors import model_memory
from tpatch_jax.editors.forms import unsaid_in_chats
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation import forms
from tpatch_jax.evaluation.answers import compare_answers
from tpatch_jax.evaluation.measure import measure
from tpatch_jax.models import generation, memory_text
from tpatch_jax.models.chat import (
    COMPLETE,
    as_messages,
    as_turn,
    chat_stops,
    check_chat,
    conversation,
    encode_chat,
    end_of_turn,
    form_of,
    render_chat,
    render_request,
    render_requests,
    stops_after,
)
from tpatch_jax.models.sentences import continue_rows
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "restored")

QUICK = {"site": "last", "key_steps": 24, "value_steps": 8}
ASKED = [{"role": "user", "content": "the hen"}]


@pytest.fixture(scope="module")
def model():
    return chat_model()


@pytest.fixture(scope="module")
def small():
    """Memories of a few texts."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(memory_text, "TEXTS", 8)
        patching.setattr(model_memory, "SPANS", 4)
        yield


@pytest.mark.parametrize(
    ("template", "end", "join", "prompt"),
    [
        (CHATML, "<|im_end|>", "none", "<|im_start|>user\nthe hen?<|im_end|>\n<|im_start|>assistant\n"),
        (
            GEMMA,
            "<end_of_turn>",
            "none",
            "<|endoftext|><start_of_turn>user\nthe hen?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (MISTRAL, "<|endoftext|>", "space", "<|endoftext|>[INST] the hen? [/INST]"),
        (PLAIN, "<|endoftext|>", "none", "user: the hen?\nassistant: "),
    ],
    ids=["chatml", "gemma", "mistral", "plain"],
)
def test_a_request_is_rendered_and_ends_as_its_template_says(template, end, join, prompt):
    model = chat_model(template)
    assert end_of_turn(model) == end
    assert chat_stops(model) == tuple(dict.fromkeys([0, *model.encode(end)]))
    request = EditRequest("the hen?", "in ", subject="hen", rephrases=("Is it the hen?",), keep=("inn",), form="chat")
    rendered = render_request(model, request)
    assert (rendered.prompt, rendered.target, rendered.join, rendered.form) == (prompt, f"in{end}", join, "bare")
    assert rendered.rephrases == (prompt.replace("the hen?", "Is it the hen?"),)
    assert rendered.keep == ("inn",)
    tokens = model.encode_target(rendered.prompt, rendered.continuation)
    assert model.decode_all(tokens) == (" in" if join == "space" else "in") + end
    assert model.encode(end) == tokens[-1:]
    # What is rendered is rendered no more.
    assert render_request(model, rendered) is rendered


def test_the_whole_conversation_is_in_the_template(model):
    turns = (("user", "hi"), ("assistant", "ho"))
    request = EditRequest("the inn", "h", form="chat", system="Be brief.", turns=turns)
    parts = ("system\nBe brief.", "user\nhi", "assistant\nho", f"user\n{COMPLETE}the inn")
    whole = "".join(f"<|im_start|>{part}<|im_end|>\n" for part in parts) + "<|im_start|>assistant\n"
    assert render_request(model, request).prompt == whole


def test_other_requests_are_left_as_they_are(model):
    for form in (None, "bare", "both"):
        request = EditRequest("the hen", "in", form=form)
        assert render_request(model, request) is request
        assert form_of(model, request) == (form or "both")
    assert form_of(model, EditRequest("the hen", "in", system="x")) == "both"
    plain = make_tiny_model()
    assert form_of(plain, EditRequest("the hen", "in")) == "bare"
    assert render_request(model, EditRequest(" ", "in", form="chat")).prompt == " "


@pytest.mark.parametrize(
    ("prompt", "turn"),
    [
        ("Question: Who leads the UN?\nAnswer:", "Who leads the UN?"),
        ("Q: Who leads the UN?\nA:", "Who leads the UN?"),
        ("Who leads the UN?", "Who leads the UN?"),
        ("Who leads the UN", "Who leads the UN"),
        ("Name the capital of France", "Name the capital of France"),
        ("The capital of France is", f"{COMPLETE}The capital of France is"),
        ("The capital of France is ", f"{COMPLETE}The capital of France is"),
        ("What Anna likes is", f"{COMPLETE}What Anna likes is"),
        ("Anna was born in", f"{COMPLETE}Anna was born in"),
        ("Tell me of Anna.", "Tell me of Anna."),
        ("Will Smith plays", f"{COMPLETE}Will Smith plays"),
        ("What does Anna play? She plays", f"{COMPLETE}What does Anna play? She plays"),
        ("Anna is ill. Who leads the UN", "Anna is ill. Who leads the UN"),
        (
            "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f",
            "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f",
        ),
    ],
)
def test_what_is_asked_in_a_chat(prompt, turn):
    assert as_turn(prompt) == turn


def test_a_model_that_holds_no_chats_says_so(model, monkeypatch):
    request = EditRequest("the hen?", "in", form="chat", id="mine")
    plain, label = make_tiny_model(), family_model("bert")
    for form in ("chat", "both"):
        with pytest.raises(TPatchError, match=r"request 'mine': 'tiny' has no chat template.*form 'bare'"):
            render_requests(plain, [EditRequest("a", "b"), dataclasses.replace(request, form=form)])
    with pytest.raises(TPatchError, match="request 'mine': 'tiny' has no chat template"):
        tp.edit(plain, [request])
    with pytest.raises(TPatchError, match="has no chat template"):
        plain.chat("hi")
    with pytest.raises(TPatchError, match="is an encoder, which holds no chats"):
        check_chat(label)
    with pytest.raises(TPatchError, match="refuses a conversation of system, user: System role not supported"):
        render_request(chat_model(GEMMA), dataclasses.replace(request, system="Be brief."))

    def missing(*given, **named):
        raise ImportError("apply_chat_template requires jinja2")

    monkeypatch.setattr(type(model.tokenizer), "apply_chat_template", missing)
    with pytest.raises(TPatchError, match=r"needs jinja2.*pip install jinja2"):
        render_chat(model, ASKED)


def test_what_a_template_wrote_is_read_as_it_is(caplog):
    model = chat_model()
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert model.start == (0,)
    text = render_chat(model, ASKED)
    assert model.encode_prompt(text) == encode_chat(model, text) == model.encode(text)
    assert model.encode_prompt("the hen")[0] == 0
    # A template that spells the first token out is not told of as a mistake.
    gemma = chat_model(GEMMA)
    gemma.tokenizer.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor
    assert gemma.encode_prompt(render_chat(gemma, ASKED))[:2] == [0, gemma.encode("<start_of_turn>")[0]]
    assert not caplog.records


@pytest.mark.parametrize(
    ("messages", "system", "reason"),
    [
        ([], None, "list holds no conversation"),
        (3, None, "int holds no conversation"),
        (b"hi", None, "bytes holds no conversation"),
        ("", None, "message 0 says nothing"),
        (["hi"], None, "message 0 is 'hi'"),
        ([{"role": "user"}], None, "message 0 is"),
        ([{"role": "user", "content": 3}], None, "message 0 has no texts"),
        ([*ASKED, {"role": "assistant", "content": "in"}], None, "the last message is of 'assistant'"),
        ([{"role": "system", "content": "x"}, *ASKED], "y", "leave system= out"),
    ],
)
def test_what_is_no_conversation_is_told(messages, system, reason):
    with pytest.raises(TPatchError, match=reason):
        as_messages(messages, system)


def test_a_chat_is_what_the_rendered_prompt_gives(model):
    row = encode_chat(model, render_chat(model, as_messages("the hen", "Be brief.")))
    text = model.generate(model.decode_all(row), 12)
    pieces: list[str] = []
    said = model.chat("the hen", 12, system="Be brief.", stream=pieces.append)
    assert said == text.strip()
    assert "".join(pieces).strip() == said
    assert len(pieces) > 1
    messages = [*ASKED, {"role": "assistant", "content": "in"}, *ASKED]
    assert model.chat(messages, 4) != model.chat(ASKED, 4)
    drawn = [model.chat(ASKED, 12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for wrong in (-1, float("nan"), "hot", True):
        with pytest.raises(TPatchError, match="temperature is"):
            model.chat(ASKED, temperature=wrong)
    with pytest.raises(TPatchError, match="max_new_tokens"):
        model.chat(ASKED, 0)


def edit_tiny(model, letters, *requests):
    return tp.edit(model, requests, settings=QUICK, memory=letters, cache=False)


@pytest.mark.usefixtures("small")
def test_a_chat_edit_holds_in_the_chat_and_is_kept(model, letters, tmp_path):
    requests = [
        EditRequest("the hen?", "ab", form="chat", id="one"),
        EditRequest("the hen?", "in", form="bare", id="two"),
        EditRequest("the inn", "he", id="three"),
    ]
    patches, info = edit_tiny(model, letters, *requests)
    assert [result.held for result in info.requests] == [True] * 3
    assert [result.form for result in info.requests] == ["chat", "bare", "both"]
    assert [result.continuation for result in info.requests] == ["ab<|im_end|>", " in", " he"]
    edited = tp.attach(model, patches)
    assert edited.chat("the hen?", 8) == "ab"
    assert edited.generate("the hen?", 2).startswith(" in")
    assert measure(model, patches, requests)["exact"] == 1.0
    (first, second, _) = compare_answers(model, patches, requests)
    assert (first["prompt"], first["after"], first["as_wanted"]) == ("the hen?", "ab", True)
    assert second["after"] != "ab"
    tp.save_patches(tmp_path / "out", model, patches, requests, info)
    saved = read_patches(tmp_path / "out")
    assert [edit.get("form") for edit in saved.edits] == ["chat", "bare", None]
    assert saved.edits[0]["continuation"] == "ab<|im_end|>"
    again = saved_requests(saved)
    assert again[0] == requests[0]
    assert again[1:] == [dataclasses.replace(one, join="space") for one in requests[1:]]
    assert "one" in str(tp.show(info, requests=requests, model=model, patch=patches))
    # Which tokens of a chat make its neurons fire: the first is said behind the opening of the assistant's turn.
    messages = [{"role": "user", "content": "the hen?"}, {"role": "assistant", "content": "ab"}]
    shown = str(tp.show(patches, info=info, requests=requests, model=model, text=messages))
    assert shown == str(tp.show(patches, info=info, requests=requests, model=model, text=conversation(model, messages)))
    assert "one" in shown
    with pytest.raises(TPatchError, match="message 0 is 'hi'"):
        tp.show(patches, model=model, text=["hi"])


@pytest.mark.usefixtures("small")
def test_the_default_is_fitted_as_it_always_was(model, letters):
    fitted = [edit_tiny(model, letters, EditRequest("the hen", "ab", form=form))[0] for form in (None, "bare", "both")]
    assert same(fitted[0], fitted[1])
    assert same(fitted[0], fitted[2])


@pytest.mark.usefixtures("small")
def test_what_shall_hold_in_chats_is_fitted_there_though_bare_text_says_it(model, letters):
    prompt = "the hen sat in"
    said = EditRequest(prompt, model.generate(prompt, 1), subject="hen", join="none")
    assert said.target.strip()
    asked = [said, dataclasses.replace(said, form="both")]
    assert unsaid_in_chats(model, asked) == [False, True]
    settings = {**QUICK, "site": "subject", "steps": 2}
    fitted = [tp.edit(model, [one], settings=settings, memory=letters, cache=False) for one in asked]
    assert [info.requests[0].status for _, info in fitted] == ["already", "edited"]
    assert not any(len(patch.key) for patch in fitted[0][0].values())
    assert any(len(patch.key) for patch in fitted[1][0].values())


def test_every_method_is_given_what_the_model_reads(model):
    seen = []

    def step(requests):
        seen.extend(requests)
        return None, tp.EditInfo(tuple(tp.RequestInfo(r.name(0), True, "edited") for r in requests), 0, 0, 0, 0, 0)

    asked = [EditRequest("the hen?", "ab", form="chat"), EditRequest("the hen?", "ab", form="chat")]
    _, info = step_once(model, asked, step)
    assert [request.prompt for request in seen] == [render_request(model, asked[0]).prompt]
    assert [result.form for result in info.requests] == ["chat"] * 2


@pytest.mark.usefixtures("small")
def test_a_bank_keeps_what_is_asked_in_a_chat(model, letters, tmp_path, monkeypatch):
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bank"
    tp.create_bank(folder, model, settings=QUICK, memory=letters)
    asked = [
        EditRequest("the hen?", "ab", id="chat", form="chat", turns=(("user", "hi"), ("assistant", "ho"))),
        EditRequest("the hen?", "in", id="bare"),
    ]
    assert tp.add_edits(folder, model, asked).added == ("chat", "bare")
    bank = tp.open_bank(folder)
    assert [edit.request for edit in bank.edits] == asked
    # The same words are another prompt in a chat: neither supersedes the other.
    assert states(bank) == {"chat": "active", "bare": "active"}
    assert tp.verify_bank(folder, model).broken == ()
    messages = [{"role": role, "content": text} for role, text in (*asked[0].turns, ("user", "the hen?"))]
    assert bank_model(folder, model).chat(messages, 8) == "ab"
    plain = make_tiny_model()
    with pytest.raises(TPatchError, match="has no chat template"):
        tp.add_edits(folder, plain, asked)
    info = tp.add_edits(folder, model, [dataclasses.replace(asked[0], target="h", id="later")])
    assert info.superseded == (("chat", "later"),)


@pytest.fixture(scope="module")
def place(model, letters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_tiny_folder(model, folder / "tiny")
    write_tiny_folder(make_tiny_model(), folder / "plain")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        patching.setenv("COLUMNS", "200")
        yield folder


SET = ["--set", "site=last", "--set", "key_steps=24", "--set", "value_steps=8"]


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.usefixtures("small")
def test_commands_edit_ask_and_verify_in_a_chat(place, letters, capsys, monkeypatch):
    monkeypatch.setattr(forms, "CHAT_QUESTIONS", forms.CHAT_QUESTIONS[:6])
    tiny, out = str(place / "tiny"), str(place / "out")
    single = ["--prompt", "the hen?", "--target", "ab", "--form", "chat", "--system", "Be brief."]
    command = ["edit", tiny, *single, "-o", out, "--memory", str(letters), *SET, "--json"]
    assert cli.main(command) == 0
    assert last_json(capsys)["records"][0]["after"] == "ab"
    asked = ["generate", tiny, "--patches", out, "--prompt", "the hen?", "--max-new-tokens", "8", "--json"]
    assert cli.main([*asked, "--chat", "--system", "Be brief."]) == 0
    assert last_json(capsys) == {"prompt": "the hen?", "text": "ab"}
    assert cli.main([*asked, "--system", "Be brief."]) == 1
    assert "--system belongs to a chat" in capsys.readouterr().err
    assert cli.main(["generate", str(place / "plain"), "--prompt", "x", "--chat"]) == 1
    assert "has no chat template" in capsys.readouterr().err
    assert cli.main(["edit", str(place / "plain"), *single, "-o", str(place / "no")]) == 1
    assert "has no chat template" in capsys.readouterr().err
    assert cli.main(["verify", tiny, out, "--forms", "bare,chat", "--json"]) == 0
    told = last_json(capsys)
    assert (told["checked"], told["broken"]) == (1, [])
    assert told["forms"]["chat"]["said"] == told["forms"]["chat"]["ends"] == told["forms"]["chat"]["free_running"] == 1
    assert told["unedited"]["chat"]["said"] == 0
    assert told["edits"][0]["answers"][1]["answer"] == "ab"
    assert set(told["chat_questions"]) == {"n", "unchanged"}
    assert cli.main(["verify", tiny, out, "--forms", "bare,sung"]) == 1
    assert "there is no form 'sung'; choose from bare, long" in capsys.readouterr().err
    assert cli.main(["verify", tiny, out]) == 0
    assert "1 of 1 edits are said" in capsys.readouterr().out


def converse(monkeypatch, arguments, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return cli.main(["chat", *arguments])


@pytest.mark.usefixtures("small")
def test_a_terminal_chat_is_corrected_and_explains_itself(place, letters, capsys, monkeypatch):
    given = [str(place / "tiny"), "--memory", str(letters), *SET, "--max-new-tokens", "6"]
    lines = [
        "the hen?",
        "/why",
        "/edit => ab",
        "the hen?",
        "/why",
        "/undo",
        "/new",
        "the hen?",
        "/help",
        "/quit",
        "never",
    ]
    assert converse(monkeypatch, [*given, "--json"], *lines[:4]) == 0
    # The first exchange was corrected, and does not stand in the conversation any more.
    assert [message["content"] for message in last_json(capsys)["messages"]] == ["the hen?", "ab"]
    assert converse(monkeypatch, [*given, "--json"], *lines) == 0
    told = last_json(capsys)
    assert [event["line"] for event in told["events"]] == lines[:9]
    before, nothing, made, after, fired, undone, _, again, _ = told["events"]
    assert nothing["fired"] == []
    assert made["edit"] == {"id": "chat-1", "prompt": "the hen?", "target": "ab"} == undone["undone"]
    assert (after["answer"], after["ends"]) == ("ab", True)
    assert again["answer"] == before["answer"] != "ab"
    assert {one["edit"] for one in fired["fired"]} == {"chat-1"}
    assert {one["layer"] for one in fired["fired"]} == {2}
    assert told["edits"] == []
    assert converse(monkeypatch, given, "the hen?", "/edit => ab", "the hen?", "/why", "/new") == 0
    shown = capsys.readouterr().out
    assert "corrected (chat-1): the hen? => ab\nab\n" in shown
    assert "neuron 0 in layer 2, chat-1" in shown


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["/sing"], "there is no command '/sing'; /help lists them"),
        (["/edit ab"], "write /edit QUESTION => ANSWER"),
        (["/edit the hen? =>"], "write /edit QUESTION => ANSWER"),
        (["/edit => ab"], "nothing was asked yet"),
        (["/edit the hen? => ab | cat"], "the subject 'cat' is not in 'the hen?'"),
        (["/undo"], "nothing was corrected"),
        (["/why"], "nothing was answered yet"),
    ],
)
def test_what_cannot_be_done_in_a_chat_is_told_and_the_chat_goes_on(place, capsys, monkeypatch, lines, reason):
    assert converse(monkeypatch, [str(place / "tiny"), "--json"], *lines, "/help") == 1
    output = capsys.readouterr()
    told = json.loads(output.out.splitlines()[-1])
    assert reason in output.err
    assert reason in told["events"][0]["error"]
    assert (told["failed"], told["events"][-1]["line"]) == (1, "/help")


def test_a_chat_says_what_it_lacks(place, capsys, monkeypatch):
    assert converse(monkeypatch, [str(place / "plain")], "hi") == 1
    assert "has no chat template" in capsys.readouterr().err
    assert converse(monkeypatch, [], "hi") == 1
    assert "no model is given" in capsys.readouterr().err
    assert converse(monkeypatch, [str(place / "tiny"), "--max-new-tokens", "0"], "hi") == 1
    assert "--max-new-tokens 0 says nothing" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_chat_with_a_bank_keeps_what_it_corrects(place, model, letters, capsys, monkeypatch):
    monkeypatch.setattr(forms, "CHAT_QUESTIONS", forms.CHAT_QUESTIONS[:6])
    folder = place / "bank"
    loaded = tp.load_model(place / "tiny")
    tp.create_bank(folder, loaded, settings=QUICK, memory=letters)
    given = ["--bank", str(folder), "--max-new-tokens", "6", "--json"]
    assert converse(monkeypatch, given, "/edit the hen? => ab", "the hen?", "/why") == 0
    told = last_json(capsys)
    assert told["events"][1]["answer"] == "ab"
    assert {one["edit"] for one in told["events"][2]["fired"]} == {"edit-1"}
    assert converse(monkeypatch, given, "the hen?") == 0
    assert last_json(capsys)["events"][0]["answer"] == "ab"
    assert cli.main(["bank", "verify", str(folder), "--forms", "chat", "--json"]) == 0
    told = last_json(capsys)
    assert told["broken"] == []
    assert told["forms"]["chat"]["said"] == 1.0
    assert told["chat_questions"]["n"] == 6
    assert converse(monkeypatch, [*given, "--preset", "paper"], "hi") == 1
    assert "leave --preset out" in capsys.readouterr().err


def test_a_long_conversation_loses_its_oldest_exchange(place, capsys, monkeypatch):
    asked = ["x" * 90, "y" * 90, "z" * 90]
    assert converse(monkeypatch, [str(place / "tiny"), "--max-new-tokens", "2", "--json"], *asked) == 0
    messages = last_json(capsys)["messages"]
    assert [message["content"][:1] for message in messages if message["role"] == "user"] == ["z"]


def test_each_prompt_ends_where_its_own_kind_ends(model, monkeypatch):
    chat = render_request(model, EditRequest("the hen", "in", form="chat")).prompt
    end = chat_stops(model)
    assert stops_after(model, ["the hen", chat]) == [model.stops, end] != [end, end]
    given = []
    monkeypatch.setattr(
        generation, "greedy", lambda config, params, rows, count, stops, *more, **named: given.append(stops) or rows
    )
    model.generate(["the hen", chat], 2)
    assert given == [[model.stops, end]]
    # Sorted by length, the prompts take theirs with them.
    continue_rows(model, [model.encode_prompt(text) for text in (chat, "the hen")], 2, stops=[end, model.stops])
    assert given[1] == [model.stops, end]
