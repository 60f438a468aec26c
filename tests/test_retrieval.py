"""Retrieval: what is looked up and where it stands in a prompt, thresholds from held texts, edits taken out again."""

import doctest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_models import CHATML, GEMMA, MISTRAL, PLAIN, chat_model
from conftest import make_tiny_model, same, write_tiny_folder
from tiny_families import tiny_model as family

from tpatch_jax.editors import retrieval as retrieval_module
from tpatch_jax.editors.registry import method_settings
from tpatch_jax.editors.retrieval import (
    HAIR,
    NEARLY_ONE,
    OTHERS,
    RetrievalSettings,
    RetrievalState,
    embed_texts,
    forget,
    read_retriever,
    restore_index,
    retrieval,
    retrieve,
    routing,
    save_index,
)
from tpatch_jax.editors.serac.networks import RADIUS, embeddings, read_encoder
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.records import Probe, Record
from tpatch_jax.evaluation.report import table
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.evaluation.scoring import ask, base_scores, routed_scores
from tpatch_jax.models import networks
from tpatch_jax.models.chat import as_turn, last_turn, render_chat
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"

KEY = jax.random.key(0)
TEXT = "In the inn she met Ada Lovelace, and they saw Mount Fuji, the sun, and Lake Geneva in the rain. " * 8
WANTED = [EditRequest("Bob Bird is in", "q", "Bob Bird"), EditRequest("who hit Tom Cod", "x", "Tom Cod")]
OTHER = "0987654321"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "memory.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(num_hidden_layers=2, max_position_embeddings=128)


@pytest.fixture(scope="module")
def fresh(model, text) -> RetrievalState:
    return retrieval(memory=text).init(model, KEY)


@pytest.fixture(scope="module")
def edited(fresh) -> tuple[RetrievalState, Any]:
    return retrieval().step(fresh, WANTED, KEY)


def context_of(state: RetrievalState, prompt: str) -> str | None:
    (context,) = routing(state).contexts([state.model.encode_prompt(prompt)])
    return None if context is None else state.model.decode(context)


# --- the retriever ---


def test_the_default_embedding_is_its_formula(fresh):
    retriever, model, text = fresh.retriever, fresh.model, "Bob Bird"
    rows = np.asarray(model.encode(text))
    states = np.asarray(networks.residuals(model.config, model.params, jnp.asarray(rows[None]))[0][0], np.float64)
    states /= np.linalg.norm(states, axis=-1, keepdims=True)
    weight = retriever.weight[rows].astype(np.float64)
    embedded = weight @ states / weight.sum() - retriever.mean
    embedded -= (embedded @ retriever.direction) * retriever.direction
    np.testing.assert_allclose(embed_texts(retriever, [text])[0], embedded / np.linalg.norm(embedded), atol=1e-5)
    assert np.linalg.norm(retriever.direction) == pytest.approx(1, abs=1e-5)
    # What is frequent in the held texts counts less than what is not there.
    common, rare = (retriever.weight[model.encode(letter)[0]] for letter in "n9")
    assert common < rare / 2
    assert not embed_texts(retriever, [" "]).any()


def test_an_encoder_embeds_if_it_is_given(model, text, tmp_path):
    folder = write_tiny_folder(family("bert", num_hidden_layers=1), tmp_path / "bert")
    retriever = read_retriever(model, RetrievalSettings(encoder=str(folder)), memory=text)
    embedded = embed_texts(retriever, ["a cat", "the inn", "a cat"])
    np.testing.assert_allclose(
        embedded * RADIUS, embeddings(read_encoder(folder), ["a cat", "the inn", "a cat"]), atol=1e-4
    )
    assert retriever.held.shape[1] == 16
    with pytest.raises(TPatchError, match="nowhere"):
        read_retriever(model, RetrievalSettings(encoder=str(tmp_path / "nowhere")), memory=text)


def test_a_threshold_is_above_every_held_text(edited):
    state, _ = edited
    names, held = state.retriever.names, state.retriever.held
    assert set(names) == {"Ada Lovelace", "Mount Fuji", "Lake Geneva"}
    assert len(names) < OTHERS
    for request, key, threshold in zip(state.requests, state.keys, state.thresholds, strict=True):
        texts = [request.prompt.replace(str(request.subject), name) for name in names]
        most = max((held @ key).max(), (embed_texts(state.retriever, texts) @ key).max())
        assert threshold == pytest.approx(min(most + state.settings.margin + HAIR, NEARLY_ONE), abs=1e-5)
        assert [context_of(state, prompt) for prompt in texts] == [None] * len(texts)
    # It depends on nothing that is edited beside it.
    alone, _ = retrieval().step(state._replace(requests=(), keys=state.keys[:0], thresholds=state.thresholds[:0]),
                                WANTED[1:], KEY)  # fmt: skip
    assert alone.thresholds[0] == pytest.approx(state.thresholds[1], abs=1e-6)
    all_one, _ = retrieval().step(
        state._replace(requests=(), keys=state.keys[:0], thresholds=state.thresholds[:0],
                       settings=RetrievalSettings(similarity=0.5)), WANTED, KEY,
    )  # fmt: skip
    assert all_one.thresholds.tolist() == [0.5, 0.5]


# --- what is read ---


def test_an_empty_index_is_the_unedited_model_bit_for_bit(model, fresh):
    batch = tokens_array([model.encode_prompt(OTHER), model.encode_prompt(WANTED[0].prompt)], 24)
    assert same(retrieval().apply(fresh, batch), model.apply(batch))
    assert routing(fresh).contexts([model.encode_prompt(one.prompt) for one in WANTED]) == [None, None]
    scores = base_scores(model, ask(model, [Probe(WANTED[0].prompt, "q"), Probe(OTHER, "")]))
    assert same(routed_scores(scores, routing(fresh)), scores.outcome)


def test_a_prompt_near_an_edit_is_read_behind_it_and_no_other(model, edited):
    state, _ = edited
    assert context_of(state, WANTED[0].prompt) == "New Fact: Bob Bird is in q\nPrompt: "
    assert context_of(state, OTHER) is None
    rows = [model.encode_prompt(OTHER), model.encode_prompt(WANTED[0].prompt)]
    batch = tokens_array(rows, 24)
    logits, before = (np.asarray(one) for one in (retrieval().apply(state, batch), model.apply(batch)))
    assert logits[0].tobytes() == before[0].tobytes()
    context = model.encode("New Fact: Bob Bird is in q\nPrompt: ")
    whole = np.asarray(model.apply(jnp.asarray([[*context, *rows[1]]])))[0, len(context) :]
    np.testing.assert_allclose(logits[1, : len(rows[1])], whole, atol=1e-4)
    # The prompt decides, whatever is asked after it; every token of the answer is read behind the edit.
    probes = [Probe(OTHER, "a b"), Probe(WANTED[0].prompt, "qx")]
    scores = base_scores(model, ask(model, probes))
    outcome = routed_scores(scores, routing(state))
    assert outcome.fires.nonzero()[0].tolist() == list(range(scores.asked.starts[1], scores.asked.starts[2]))
    assert same(outcome.log_p[~outcome.fires], scores.outcome.log_p[~outcome.fires])
    asked = np.asarray(model.apply(jnp.asarray([[*context, *scores.asked.rows[1]]])))[0]
    places = np.arange(len(rows[1]) - 1, len(scores.asked.rows[1]) - 1) + len(context)
    assert outcome.predicted[outcome.fires].tolist() == asked[places].argmax(-1).tolist()


def test_a_decision_costs_an_embedding_and_the_index(model, fresh, edited, tmp_path):
    state, prompt = edited[0], model.encode_prompt(OTHER)
    kernels = sum(leaf.size for leaf in jax.tree.leaves(model.params["layers"][0]) if leaf.ndim == 2)
    # Of the first layer alone; its attention's scores and norms besides.
    decision = routing(state).decision_flops(prompt)
    assert 1 < (decision - 2 * state.keys.size) / (2 * len(prompt) * kernels) < 1.9
    assert routing(fresh).decision_flops(prompt) == 0
    encoder = read_encoder(write_tiny_folder(family("bert", num_hidden_layers=1), tmp_path / "bert"))
    other = state._replace(retriever=state.retriever._replace(encoder=encoder))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(encoder.params["layers"]) if leaf.ndim == 2)
    decision = routing(other).decision_flops(prompt) - 2 * state.keys.size
    assert 1 < decision / (2 * len(encoder.tokenizer.encode(OTHER)) * kernels) < 1.9
    assert routing(other).decision_flops([]) == 2 * state.keys.size


def test_several_edits_stand_there_the_nearest_last(edited):
    state, _ = edited
    near = state._replace(
        settings=RetrievalSettings(nearest=2, fact="({})", question=""),
        thresholds=np.asarray([-1, -1], np.float32),
        seen={},
    )
    assert context_of(near, WANTED[1].prompt) == "(Bob Bird is in q)(who hit Tom Cod x)"
    assert retrieve(near, [WANTED[0].prompt]) == [[1, 0]]
    later, _ = retrieval().step(state, [EditRequest(WANTED[0].prompt, "z", id="later")], KEY)
    assert context_of(later, WANTED[0].prompt) == "New Fact: Bob Bird is in z\nPrompt: "
    assert context_of(forget(later, ["later"]), WANTED[0].prompt) == "New Fact: Bob Bird is in q\nPrompt: "


def test_a_token_that_begins_a_text_stays_in_front():
    model = make_tiny_model(num_hidden_layers=1)
    object.__setattr__(model, "start", (0,))
    prompt = model.encode_prompt("who hit")
    assert prompt[0] == 0
    state = RetrievalState(model, None, (), np.zeros(0), np.zeros(0), RetrievalSettings(), {})  # pyright: ignore
    assert routing(state).joined(prompt, [7, 8], [*prompt, 9]) == [0, 7, 8, *prompt[1:], 9]


@pytest.mark.parametrize("template", [CHATML, GEMMA, MISTRAL])
def test_in_a_chat_an_edit_stands_before_what_the_user_says_last(template, text):
    model = chat_model(template, num_hidden_layers=1)
    turns = [[("user", "one two")], [("user", "one two"), ("assistant", "three"), ("user", "four five")]]
    for messages in turns:
        rendered = render_chat(model, [{"role": role, "content": said} for role, said in messages])
        span = last_turn(model, rendered)
        assert span is not None
        assert rendered[slice(*span)].strip() == messages[-1][1]
    assert last_turn(model, "one two") is None
    state, _ = retrieval().step(retrieval(memory=text).init(model, KEY), WANTED[:1], KEY)
    prompt = render_chat(model, [{"role": "user", "content": as_turn(WANTED[0].prompt)}])
    row = model.encode_prompt(prompt)
    context = routing(state).contexts([row])[0]
    assert context is not None
    read = model.decode_all(routing(state).joined(row, context, row))
    turn = as_turn(WANTED[0].prompt)
    assert read == prompt.replace(turn, f"New Fact: Bob Bird is in q\nPrompt: {turn}")
    # An edit that was made for a chat is looked up and stands there without the template's words, too.
    wanted = EditRequest("Who hit Tom Cod?", "x", "Tom Cod", form="chat")
    chatted, _ = retrieval().step(retrieval(memory=text).init(model, KEY), [wanted], KEY)
    assert context_of(chatted, "Who hit Tom Cod?") == "New Fact: Who hit Tom Cod? x\nPrompt: "


def test_a_template_without_marks_is_no_conversation():
    assert last_turn(chat_model(PLAIN, num_hidden_layers=1), "user: one\nassistant: ") is None
    assert last_turn(chat_model(None, num_hidden_layers=1), "one") is None
    assert last_turn(family("bert"), "one") is None


# --- edits ---


def test_an_edit_that_is_said_holds_and_one_that_is_not_says_why(model, fresh):
    prompt, results = WANTED[0].prompt, {}
    for letter in "abcdefghijklmnop":
        state, info = retrieval().step(fresh, [EditRequest(prompt, letter, join="none")], KEY)
        results[letter] = info.requests[0]
        context = model.encode(f"New Fact: {prompt}{letter}\nPrompt: ")
        said = int(model.apply(jnp.asarray([[*context, *model.encode(prompt)]]))[0, -1].argmax())
        assert info.requests[0].held == (model.decode([said]) == letter)
        if letter == "c":
            assert info.parameters_added == state.keys.size + 1
    reasons = {one.reason for one in results.values() if not one.held}
    assert reasons == {
        "the model does not say the target though it reads the edit; try another fact= or question= (the edit stays "
        "stored)"
    }


def test_what_cannot_be_retrieved_is_said(model, fresh):
    wanted = [EditRequest("", "x"), EditRequest("b" * 100, "x"), WANTED[0]]
    far = fresh._replace(settings=RetrievalSettings(similarity=1.0))
    state, info = retrieval().step(far, wanted, KEY)
    assert [one.held for one in info.requests] == [False] * 3
    assert "the prompt is empty" in info.requests[0].reason
    assert "no nearer to it than held texts are; lower margin, or give similarity" in info.requests[2].reason
    assert len(state.requests) == 2
    _, info = retrieval().step(fresh, wanted[1:2], KEY)
    assert "prompt and edit are longer than the model reads; shorten the prompt" in info.requests[0].reason
    first, _ = retrieval().step(fresh, [EditRequest(WANTED[1].prompt, "y", id="mine")], KEY)
    moved = first._replace(keys=embed_texts(first.retriever, [WANTED[0].prompt]) * 2)
    _, info = retrieval().step(moved, WANTED[:1], KEY)
    assert "the edit 'mine' is nearer to the prompt; take it out, or raise nearest" in info.requests[0].reason


def test_edits_are_taken_out_exactly_and_a_saved_index_is_the_same(fresh, edited):
    state, _ = edited
    both, _ = retrieval().step(state, [EditRequest("an inn was", "q"), EditRequest("Al Fox ran", "z")], KEY)
    assert [one.id for one in both.requests] == ["edit-0", "edit-1", "edit-0 (2)", "edit-1 (2)"]
    back = forget(both, ["edit-0 (2)", "edit-1 (2)"])
    assert back.requests == state.requests
    assert same((back.keys, back.thresholds), (state.keys, state.thresholds))
    with pytest.raises(TPatchError, match=r"no edit 'edit-7' is in the index; it holds edit-0, edit-1$"):
        forget(state, ["edit-7"])
    again = restore_index(fresh, save_index(both))
    assert again.requests == both.requests
    assert same((again.keys, again.thresholds), (both.keys, both.thresholds))


def test_it_is_evaluated_and_resumed(model, text, tmp_path):
    near = Probe(OTHER, "up")
    records = [
        Record(f"r{n}", (one,), {"reliability": (Probe(one.prompt, one.target),), "locality": (near,)})
        for n, one in enumerate(WANTED)
    ]

    def run(output: Path | None = None, **options: Any) -> Any:
        report = evaluate(model, records, ["retrieval"], "batch", cache=False, output=output, memory=text,
                          other_facts=0, **options)  # fmt: skip
        assert report["results"][1]["properties"] == {"undo": "exact", "stock_checkpoint": False}
        assert table([("none", report["results"][0]), ("it", report["results"][1])])[-2:] == [
            ["undo", "", "exact"], ["stock_checkpoint", "", "no"]]  # fmt: skip
        return report["results"][1]["metrics"], report["results"][1]["requests"]

    whole = run()
    assert whole[0]["locality"] == 1.0
    seen = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(what)
        if "storing edits" in seen and what == "measuring" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", progress=stop)
    assert run(tmp_path / "out") == whole


# --- settings ---


def test_values_and_models_that_make_no_sense_are_named(model):
    with pytest.raises(TPatchError, match="layer '7' does not exist; use layer=auto or 0 to 1"):
        retrieval(RetrievalSettings(layer="7")).init(model, KEY)
    with pytest.raises(TPatchError, match="retrieval needs a decoder, and 'tiny' is an encoder"):
        retrieval().init(family("bert"), KEY)
    for name, wrong in (("layer", "top"), ("similarity", 2.0), ("margin", -0.1), ("nearest", 0)):
        with pytest.raises(TPatchError, match=f"{name} (is )?'?{wrong}"):
            method_settings(["retrieval"], changes={name: wrong})
    for fact in ("New Fact", "{} {}"):
        with pytest.raises(TPatchError, match=r"times; put it once, for the edit"):
            RetrievalSettings(fact=fact)


def test_examples_work():
    result = doctest.testmod(retrieval_module, optionflags=doctest.ELLIPSIS)
    assert (result.failed, result.attempted > 0) == (0, True)
