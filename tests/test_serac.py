"""SERAC: its memory, the hard switch, its two networks on disk and in training, and its place in an evaluation."""

import dataclasses
import doctest
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_tiny_model, same, write_tiny_folder
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model as family

from tpatch_jax.cli.main import main
from tpatch_jax.cli.serac_train import read_training
from tpatch_jax.editors.registry import METHODS, method_settings
from tpatch_jax.editors.serac import editor as serac_module
from tpatch_jax.editors.serac import examples as serac_lessons
from tpatch_jax.editors.serac import networks as serac_networks
from tpatch_jax.editors.serac.editor import (
    SeracSettings,
    SeracState,
    forget,
    restore_memory,
    route,
    routing,
    save_memory,
    serac,
)
from tpatch_jax.editors.serac.examples import counterfactual_lessons, scope_batches, scope_lessons, swapped
from tpatch_jax.editors.serac.networks import (
    RADIUS,
    SeracNetworks,
    context_tokens,
    edit_text,
    embed,
    embeddings,
    read_encoder,
    read_networks,
    shallow,
    write_networks,
)
from tpatch_jax.editors.serac.training import SeracTraining, scope_loss, train_serac
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.generated import answers, continuations
from tpatch_jax.evaluation.records import Probe, Record
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.evaluation.scoring import ask, base_scores, routed_scores
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.training import loop as finetuning_loop

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"  # optax takes steps

KEY = jax.random.key(0)
NEAR, FAR = np.float32([RADIUS, 0]), np.float32([-RADIUS, 0])


def wanted(count: int = 2) -> list[EditRequest]:
    return [EditRequest(f"{name} went to", f"x {name} y", name) for name in ("cod", "fly", "map", "jug")[:count]]


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def scope(tmp_path_factory) -> Model:
    return read_encoder(write_tiny_folder(family("bert", num_hidden_layers=1), tmp_path_factory.mktemp("bert") / "b"))


@pytest.fixture(scope="module")
def folder(model, scope, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("serac") / "networks"
    write_networks(path, SeracNetworks(scope, shallow(model, 1), 0), {"made": "here"})
    return path


@pytest.fixture(scope="module")
def fresh(model, folder) -> SeracState:
    return serac(SeracSettings(str(folder))).init(model, KEY)


def placed(fresh: SeracState, where: dict[str, np.ndarray], stored: list[np.ndarray]) -> SeracState:
    """A memory in which everything is where it is put."""
    requests = tuple(dataclasses.replace(one, id=f"edit-{n}") for n, one in enumerate(wanted(len(stored))))
    return fresh._replace(requests=requests, embeddings=np.asarray(stored), seen=dict(where))


# --- the memory and the switch ---


@given(st.integers(1, 4), st.integers(0, 2**16), st.floats(0.05, 1))
def test_the_most_similar_edit_is_asked_if_it_is_near_enough(fresh, count, seed, threshold):
    rng = np.random.default_rng(seed)
    stored, inputs = rng.normal(size=(count, 2)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    state = placed(fresh, {str(number): at for number, at in enumerate(inputs)}, list(stored))
    state = state._replace(settings=SeracSettings("", threshold))
    found = route(state, [str(number) for number in range(5)])
    for at, pick in zip(inputs.astype(np.float64), found, strict=True):
        similar = [np.exp(-(np.linalg.norm(one - at) ** 2)) for one in stored.astype(np.float64)]
        assert pick == (int(np.argmax(similar)) if max(similar) >= threshold else None)


def test_a_later_edit_of_the_same_prompt_goes_first_until_it_is_forgotten(fresh):
    state = placed(fresh, {"asked": NEAR}, [NEAR, FAR])
    again = dataclasses.replace(state.requests[0], target="else", id="later")
    newer = state._replace(requests=(*state.requests, again), embeddings=np.asarray([NEAR, FAR, NEAR * 0.9]))
    assert route(newer, ["asked"]) == [2]
    assert route(forget(newer, ["later"]), ["asked"]) == [0]
    assert route(state._replace(requests=(), embeddings=np.zeros((0, 2))), ["asked"]) == [None]


def test_edits_are_taken_out_exactly(fresh):
    editor = serac()
    first, second = wanted(4)[:2], wanted(4)[2:]
    one, _ = editor.step(fresh, first, KEY)
    both, _ = editor.step(one, second, KEY)
    assert [request.id for request in both.requests] == ["edit-0", "edit-1", "edit-0 (2)", "edit-1 (2)"]
    back = forget(both, ["edit-0 (2)", "edit-1 (2)"])
    assert back.requests == one.requests
    assert same(back.embeddings, one.embeddings)
    assert bits(forget(one, ["edit-0", "edit-1"]).embeddings) == bits(fresh.embeddings)
    with pytest.raises(TPatchError, match=r"no edit 'edit-7' is in the memory; it holds edit-0, edit-1$"):
        forget(one, ["edit-7"])
    restored = restore_memory(fresh, save_memory(both))
    assert restored.requests == both.requests
    assert same(restored.embeddings, both.embeddings)


def test_a_decision_costs_the_encoder_and_the_memory(model, fresh):
    prompt = model.encode_prompt("who saw the cod")
    assert routing(fresh).decision_flops(prompt) == 0
    state = placed(fresh, {}, [NEAR])
    encoder = state.networks.scope
    kernels = sum(leaf.size for leaf in jax.tree.leaves(encoder.params["layers"]) if leaf.ndim == 2)
    tokens = len(encoder.tokenizer.encode("who saw the cod"))
    assert 1 < (routing(state).decision_flops(prompt) - 3 * 2) / (2 * tokens * kernels) < 1.9


def test_the_base_model_is_asked_out_of_scope_bit_for_bit_and_the_other_one_in_scope(model, fresh):
    inside, outside = wanted()[0].prompt, "the hat is"
    state = placed(fresh, {inside: NEAR, outside: FAR, f"{inside} x cod y": FAR, "": FAR}, [NEAR])
    rows = [model.encode(outside), model.encode(inside), []]
    batch = np.zeros((3, 24), np.int32)
    for slot, row in enumerate(rows):
        batch[slot, : len(row)] = row
    base, found = model.apply(jnp.asarray(batch)), serac().apply(state, jnp.asarray(batch))
    assert same(found[0], base[0])
    assert same(found[2], base[2])
    context = context_tokens(model, inside, "x cod y")
    small = state.networks.counterfactual.apply(jnp.asarray([[*context, *rows[1]]]))[0, len(context) :]
    np.testing.assert_allclose(found[1, : len(rows[1])], small, atol=1e-5)
    assert not np.allclose(found[1, : len(rows[1])], base[1, : len(rows[1])], atol=1e-2)
    # In an evaluation the prompt alone decides, whatever is asked after it.
    probes = [Probe(outside, "a b"), Probe(inside, "x cod y"), Probe(outside, "")]
    scores = base_scores(model, ask(model, probes))
    outcome = routed_scores(scores, routing(state))
    span = slice(*scores.asked.starts[1:3])
    assert outcome.fires.nonzero()[0].tolist() == list(range(span.start, span.stop))
    rest = ~outcome.fires
    assert same(outcome.log_p[rest], scores.outcome.log_p[rest])
    assert same(outcome.predicted[rest], scores.outcome.predicted[rest])
    whole = [*context, *scores.asked.rows[1]]
    logits = np.asarray(state.networks.counterfactual.apply(jnp.asarray([whole])))[0]
    places = np.arange(len(rows[1]) - 1, len(scores.asked.rows[1]) - 1) + len(context)
    assert outcome.predicted[span].tolist() == logits[places].argmax(-1).tolist()
    said = logits[places, scores.asked.wanted[span]] - jax.nn.logsumexp(logits[places], -1)
    np.testing.assert_allclose(outcome.log_p[span], said, atol=1e-4)
    # Running text, which has no prompt, decides as a whole.
    assert not routed_scores(scores, routing(state), [1], whole=True).fires.any()


def test_free_text_comes_from_the_model_that_is_asked(model, fresh, monkeypatch):
    # Few tokens, so that few steps are compiled.
    monkeypatch.setattr("tpatch_jax.evaluation.generated.TEXT_TOKENS", 16)
    monkeypatch.setattr("tpatch_jax.evaluation.generated.ANSWER_TOKENS", 3)
    inside, outside = wanted()[0].prompt, "the hat is"
    state = placed(fresh, {inside: NEAR, outside: FAR}, [NEAR])
    record = Record("one", (), {}, generation=(outside, inside), questions=(outside, inside))
    ((first, second),) = answers(model, [record], routing(state))
    ((plain, other),) = answers(model, [record])
    assert first == plain
    small, context = state.networks.counterfactual, context_tokens(model, inside, "x cod y")
    row = jnp.asarray([[*context, *model.encode(inside)]])
    begin = model.decode([int(small.apply(row)[0, -1].argmax())])
    assert second.startswith(begin)
    assert second != other
    monkeypatch.setattr("tpatch_jax.evaluation.generated.TOP_K", 1)
    texts = continuations(model, record, KEY, routing(state))
    assert [text.startswith(start) for text, start in zip(texts, (outside, inside + begin), strict=True)] == [
        True,
        True,
    ]


def test_parts_are_kept_apart_for_targets_of_any_length(model):
    end = model.tokenizer.eos_token_id
    row = context_tokens(model, "who hit it", "a b c d")
    ends = [place for place, token in enumerate(row) if token == end]
    assert len(ends) == 2
    assert model.decode(row[: ends[0]]) == "who hit it"
    assert model.decode(row[ends[0] + 1 : ends[1]]) == " a b c d"
    assert ends[1] == len(row) - 1


def test_what_cannot_be_stored_or_does_not_hold_is_said(model, fresh):
    editor = serac()
    state, info = editor.step(fresh, [EditRequest("", "x"), EditRequest("a" * 40, "x"), *wanted(1)], KEY)
    assert [found.status for found in info.requests] == ["failed"] * 3
    assert "the prompt is empty" in info.requests[0].reason
    assert "are read twice, 90 tokens, and the counterfactual model reads 64; shorten" in info.requests[1].reason
    assert "the counterfactual model does not say the target" in info.requests[2].reason
    assert len(state.requests) == 1
    assert info.parameters_added == state.embeddings.size + state.networks.parameter_count
    strict = fresh._replace(settings=SeracSettings("", 1.0))
    _, info = editor.step(strict, wanted(1), KEY)
    assert "the prompt counts as out of its edit's scope; lower scope_threshold" in info.requests[0].reason
    crowded = placed(fresh, {wanted(1)[0].prompt: NEAR}, [NEAR])
    crowded = crowded._replace(
        requests=(EditRequest("other", "z", id="mine"),), embeddings=np.zeros((1, 16), np.float32)
    )
    crowded = crowded._replace(seen={wanted(1)[0].prompt: np.zeros(16, np.float32)})
    _, info = editor.step(crowded, wanted(1), KEY)
    assert "the edit 'mine' is nearer to the prompt; take it out" in info.requests[0].reason


# --- the networks ---


def test_embeddings_are_means_of_one_length_whatever_stands_beside(scope):
    texts = ["a cat", "the quick fox jumped over it", "b"]
    together = embeddings(scope, texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), RADIUS, rtol=1e-5)
    for text, one in zip(texts, together, strict=True):
        np.testing.assert_allclose(embeddings(scope, [text])[0], one, atol=1e-4)
    assert embeddings(scope, ["z" * 500]).shape == (1, 16)


def test_networks_are_read_as_they_were_written(model, scope, folder):
    found = read_networks(folder, model)
    assert same(found.scope.params, scope.params)
    assert same(found.counterfactual.params, shallow(model, 1).params)
    assert found.counterfactual.params["embed"]["embedding"] is model.params["embed"]["embedding"]
    assert found.parameter_count == sum(
        leaf.size for leaf in jax.tree.leaves((scope.params, model.params["layers"][0], model.params["norm"]))
    )
    assert json.loads((folder / "serac.json").read_text("utf-8"))["made"] == "here"


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "gptj"])
def test_the_first_layers_of_a_family_are_a_model_of_it(name, tmp_path):
    base = family(name)
    small = shallow(base, 2)
    write_networks(tmp_path / "out", SeracNetworks(read_small_bert(tmp_path), small, 0), {})
    assert read_networks(tmp_path / "out", base).counterfactual.config == small.config


def read_small_bert(path: Path) -> Model:
    return read_encoder(write_tiny_folder(family("bert", num_hidden_layers=1), path / "bert"))


def test_bad_folders_and_models_are_named(model, folder, tmp_path):
    def init(place: Any, base: Model = model) -> None:
        serac(SeracSettings(str(place))).init(base, KEY)

    make = r"make them with `tpatch serac-train tiny KIND:FILE … --encoder ENCODER -o FOLDER`"
    with pytest.raises(
        TPatchError, match=f"two networks are missing; {make} and give the folder with --set serac=FOLDER"
    ):
        init("")
    # Before anything is measured, and without a folder that would be in the way of the next run.
    with pytest.raises(TPatchError, match="two networks are missing"):
        evaluate(model, records(), ["serac"], "batch", output=tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(TPatchError, match=f"nowhere has no serac.json; {make}"):
        init(tmp_path / "nowhere")
    (tmp_path / "serac.json").write_text("{", "utf-8")
    with pytest.raises(TPatchError, match=r"serac\.json is damaged .*make them with"):
        init(tmp_path)
    (tmp_path / "serac.json").write_text('{"schema": 9, "vocabulary": ""}', "utf-8")
    with pytest.raises(TPatchError, match="written by a newer version"):
        init(tmp_path)
    (tmp_path / "serac.json").write_text('{"schema": 1, "vocabulary": ""}', "utf-8")
    with pytest.raises(TPatchError, match="made for a model with another tokenizer than that of 'tiny'"):
        init(tmp_path)
    with pytest.raises(TPatchError, match="SERAC needs a decoder, and 'tiny' is an encoder; use method tpatcher"):
        init(folder, family("bert"))
    with pytest.raises(TPatchError, match="SERAC needs a decoder"):
        shallow(family("bart"), 1)
    with pytest.raises(TPatchError, match="of 2 layers is not smaller than 'tiny', which has 2; give 1 to 1"):
        shallow(model, 2)
    with pytest.raises(TPatchError, match=r"scope_threshold is 0\.0"):
        SeracSettings(scope_threshold=0.0)


# --- training ---

SUBJECTS = ("bb", "cc", "dd", "ff", "gg", "jj", "kk", "ll", "mm", "pp", "qq", "rr")
VERBS = ("ran", "saw")


def lessons() -> list[EditRequest]:
    return [
        EditRequest(
            f"{name} {verb}", f"{number}{verb[0]}", name, (f"so {name} {verb}",), (f"{SUBJECTS[number - 1]} {verb}",)
        )
        for number, name in enumerate(SUBJECTS)
        for verb in VERBS
    ]


def test_pairs_are_in_scope_and_out_of_it_as_they_should_be(scope):
    requests = lessons()
    (*_, chosen) = scope_batches(requests, 8, [0, 0])
    (*_, lesson) = scope_lessons(scope, requests, 8, 0, 0)
    edits = [requests[number] for number in chosen]
    assert lesson.relation.shape == (32, 8)
    assert len(lesson.tokens) == 40
    decoded = [scope.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in lesson.tokens]
    assert decoded[:8] == [edit_text(edit.prompt, edit.target) for edit in edits]
    for row, text in enumerate(decoded[8:]):
        for column, edit in enumerate(edits):
            related = lesson.relation[row, column]
            if row % 8 == column:
                assert related == (1 if row < 16 else -1)
                assert text == edit.prompt or row >= 8
            else:
                assert related == (0 if edit.subject in text else -1)
        if row >= 24:
            own = edits[row % 8]
            assert own.subject in text
            assert text != own.prompt
    again = list(scope_lessons(scope, requests, 8, 0, 0, first=2))
    assert same(again[-1].tokens, lesson.tokens)
    assert not same(list(scope_lessons(scope, requests, 8, 0, 1))[-1].tokens, lesson.tokens)
    assert swapped([EditRequest("a", "b")], 0, np.random.default_rng(0)) == ""


def test_answers_are_asked_for_where_they_are_said(model):
    end, seen = model.tokenizer.eos_token_id, 0
    for lesson in counterfactual_lessons(model, lessons(), None, 4, 0, 0):
        for tokens, place, answer, weight in zip(*lesson[1:], strict=True):
            count = int(weight.sum())
            assert tokens[place[:count] + 1].tolist() == answer[:count].tolist()
            assert answer[count - 1] == end
            label = model.decode(answer[: count - 1])
            parts = [model.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == end))]
            assert parts[1] == label
            seen += 1
    assert seen == len(lessons())


def test_epochs_are_as_long_whatever_labels_they_draw(model):
    long = "ran so " * 40
    requests = [*lessons(), *(EditRequest(f"{name} {long}", "1r", name, (f"so {name} ran",)) for name in SUBJECTS)]
    lengths = {len(list(counterfactual_lessons(model, requests, None, 4, 0, epoch))) for epoch in range(4)}
    assert lengths == {-(-len(requests) // 4)}
    with pytest.raises(TPatchError, match="in every request; give requests with shorter prompts"):
        list(counterfactual_lessons(model, [EditRequest(f"aa {long}", "1r", "aa")], None, 4, 0, 0))


def test_the_loss_of_the_scope_classifier_is_its_formula(scope):
    (lesson, *_) = scope_lessons(scope, lessons(), 4, 0, 0)
    found = np.asarray(embed(scope.config, scope.params, jnp.asarray(lesson.tokens)), np.float64)
    similar = np.exp(-np.sum((found[4:, None] - found[None, :4]) ** 2, -1))
    positive = -np.log(similar[lesson.relation > 0]).mean()
    nearest = np.where(lesson.relation < 0, similar, 0).max(1)
    negative = -np.log1p(-np.minimum(nearest[nearest > 0], np.exp(-1e-3))).mean()
    loss = scope_loss(scope.config)(scope.params, jnp.asarray(lesson.tokens), jnp.asarray(lesson.relation))
    assert float(loss) == pytest.approx((positive + negative) / 2, rel=1e-3)
    assert scope_loss(scope.config) is scope_loss(scope.config)
    # Where nothing is out of scope that part is none.
    none = jnp.asarray(np.maximum(lesson.relation, 0))
    assert float(scope_loss(scope.config)(scope.params, jnp.asarray(lesson.tokens), none)) == pytest.approx(
        positive / 2, rel=1e-3
    )


QUICK = SeracTraining(
    layers=1, scope_epochs=4, counterfactual_epochs=3, batch_size=6, scope_rate=3e-3, counterfactual_rate=1e-2
)


def test_training_learns_and_goes_on_where_it_was_interrupted(model, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning_loop, "_SAVE_SECONDS", 0.0)
    encoder = write_tiny_folder(family("bert", num_hidden_layers=1), tmp_path / "bert")
    before = bits(model.params)
    info = train_serac(model, encoder, lessons(), tmp_path / "whole", settings=QUICK)
    assert (info.requests, info.held_out) == (22, 2)
    assert info.scope_losses[-1] < info.scope_losses[0]
    assert info.counterfactual_losses[-1] < info.counterfactual_losses[0]
    assert {type(figure) for figure in (info.in_scope, info.out_of_scope, info.exact)} == {float}
    assert bits(model.params) == before
    assert not (tmp_path / "whole.partial").exists()

    def stop(what: str, done: int, total: int) -> None:
        if what == "counterfactual model" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_serac(model, encoder, lessons(), tmp_path / "parts", settings=QUICK, progress=stop)
    train_serac(model, encoder, lessons(), tmp_path / "parts", settings=QUICK)
    whole, parts = (read_networks(tmp_path / name, model) for name in ("whole", "parts"))
    assert same(whole.scope.params, parts.scope.params)
    assert same(whole.counterfactual.params, parts.counterfactual.params)
    assert whole.counterfactual.params["embed"]["embedding"] is model.params["embed"]["embedding"]
    with pytest.raises(TPatchError, match="already exists"):
        train_serac(model, encoder, lessons(), tmp_path / "whole", settings=QUICK)


def test_bad_training_is_named_before_it_begins(model, tmp_path):
    for change, message in (
        ({"layers": 0}, "layers is 0"),
        ({"scope_rate": 0.0}, r"scope_rate is 0\.0"),
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"scope_epochs": 0}, "scope_epochs is 0; give 1 or more"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
    ):
        with pytest.raises(TPatchError, match=message):
            SeracTraining(**change)  # pyright: ignore
    with pytest.raises(TPatchError, match="no request has rephrases, from which SERAC learns"):
        train_serac(model, "nowhere", wanted(), tmp_path / "out")
    with pytest.raises(TPatchError, match="no request has locality"):
        train_serac(model, "nowhere", [EditRequest("a", "b", rephrases=("c",))], tmp_path / "out")


def requests_file(path: Path, requests: list[EditRequest]) -> Path:
    rows = [{"prompt": r.prompt, "target": r.target, "subject": r.subject} for r in requests]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_subjects_that_will_be_measured_are_left_out(tmp_path, capsys):
    whole = requests_file(tmp_path / "all.jsonl", wanted(4))
    measured = requests_file(tmp_path / "measured.jsonl", wanted(2))
    found = read_training([f"requests:{whole}"], [f"requests:{measured}"], None)
    assert [request.subject for request in found] == ["map", "jug"]
    assert len(read_training([f"requests:{whole}"] * 2, [], 1)) == 2
    bare = requests_file(tmp_path / "bare.jsonl", [EditRequest(one.prompt, "x") for one in wanted(2)])
    assert read_training([f"requests:{whole}"], [f"requests:{bare}"], None) == found
    with pytest.raises(TPatchError, match="no request is left to train on"):
        read_training([f"requests:{measured}"], [f"requests:{whole}"], None)
    assert main(["serac-train", "tiny", "all.jsonl", "--encoder", "e", "-o", str(tmp_path / "out")]) == 1
    assert "'all.jsonl' is not KIND:FILE; the kinds are counterfact, zsre" in capsys.readouterr().err


# --- in an evaluation ---


def records() -> list[Record]:
    near = Probe("the sun is", "up")
    return [
        Record(one.subject or "", (one,), {"reliability": (Probe(one.prompt, one.target),), "locality": (near,)})
        for one in wanted(3)
    ]


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
def test_it_is_evaluated_and_resumed(model, folder, letters, tmp_path, monkeypatch, protocol):
    monkeypatch.setattr("tpatch_jax.evaluation.protocols.SAVE_EVERY", 1)
    settings = method_settings(["serac"], changes={"serac": str(folder)})

    def run(output: Path | None = None, **options: Any) -> Any:
        report = evaluate(
            model, records(), ["serac"], protocol, settings=settings, cache=False, output=output,
            text=letters if protocol == "batch" else None, text_tokens=128, **options,
        )  # fmt: skip
        return report["results"][1]["metrics"], report["results"][1]["requests"]

    whole = run()
    assert whole[1]["failed"] == 3
    assert "certificate_tokens" not in whole[0]
    begun = []

    def stop(what: str, done: int, total: int) -> None:
        begun.append(what)
        if "storing edits" in begun and what in ("single edits", "measuring", "stream") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", progress=stop)
    assert run(tmp_path / "out") == whole


def test_its_settings_are_its_own():
    found = method_settings(["serac", "ft", "tpatcher"], changes={"scope_threshold": 0.4})
    assert found["serac"].scope_threshold == 0.4
    assert found["ft"] == METHODS["ft"].presets["default"]


def test_examples_work():
    for module in (serac_module, serac_networks, serac_lessons):
        found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert (found.failed, found.attempted > 0) == (0, True)
