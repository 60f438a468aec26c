"""Editing models that read whole inputs: classifiers, at their first token or at all of them, and encoder-decoders."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import relative, same, write_tiny_folder
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model

import tpatch_jax as tp
from tpatch_jax.cli import main as cli
from tpatch_jax.core.patch import preactivations
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.tpatcher.editor import tpatcher
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.measure import measure
from tpatch_jax.models.collection import Sites, batches, collect, joined, predicted, single_rows
from tpatch_jax.models.inputs import FIELDS, input_contexts, read_inputs
from tpatch_jax.models.memory_text import memory_rows
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.settings import change

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"  # optax takes steps

QUICK = change(
    dataclasses.replace(PRESETS["default"], input_contexts=2, other_subjects=1, attempts=2),
    {"input_key_steps": 8, "value_steps": 8, "lanes": 4, "answer_split": 0.7},
)
CLAIMS = ("the cat sat in", "who hit the mat", "an inn is a house")


@pytest.fixture(scope="module")
def classifier() -> Model:
    return tiny_model("bert")


@pytest.fixture(scope="module")
def pooled() -> Model:
    """A head that reads the mean of all tokens."""
    return tiny_model("bert", classifier_pooling="mean")


@pytest.fixture(scope="module")
def answerer() -> Model:
    return tiny_model("bart")


def corrections(model: Model, texts: tuple[str, ...] = CLAIMS) -> list[EditRequest]:
    """For each text a label that the classifier does not give it."""
    labels = model.config.labels
    said = [labels.index(label) for label in model.classify(texts)]
    with pytest.raises(TPatchError, match="put it into a list"):
        model.classify(texts[0])
    return [
        EditRequest(text, labels[(number + 1) % len(labels)], id=text) for text, number in zip(texts, said, strict=True)
    ]


def held(info: tp.EditInfo) -> list[tuple[str, bool, str]]:
    return [(request.id, request.held, request.reason) for request in info.requests]


# --- classifiers ---


@pytest.mark.parametrize("kind", ["classifier", "pooled"])
def test_all_labels_are_corrected_together(kind, inputs, request):
    model = request.getfixturevalue(kind)
    wanted = corrections(model)
    patches, info = tp.edit(model, wanted, settings=QUICK, memory=inputs, cache=False)
    assert held(info) == [(text, True, "") for text in CLAIMS]
    # one neuron per mistake
    assert {layer: patch.key.shape for layer, patch in patches.items()} == {model.layer(None): (len(CLAIMS), 16)}
    assert tp.merge(model, patches).classify(CLAIMS) == [request.target for request in wanted]
    figures = measure(model, patches, wanted)
    assert (figures["exact"], figures["token_accuracy"]) == (1.0, 1.0)


def test_labels_change_only_where_a_neuron_fires(classifier, inputs):
    texts = [*read_inputs(inputs), *CLAIMS]
    patches, _ = tp.edit(classifier, corrections(classifier), settings=QUICK, memory=inputs, cache=False)
    before, after = (model.classify(texts) for model in (classifier, tp.attach(classifier, patches, relu=True)))
    rows = [classifier.encode_prompt(text) for text in texts]
    sites = collect(classifier, rows, [[len(row) - 1] for row in rows], classifier.layer(None))
    fires = np.asarray(preactivations(patches[classifier.layer(None)], sites.query)).max(-1) > 0
    changed = np.asarray([one != other for one, other in zip(before, after, strict=True)])
    assert changed[-len(CLAIMS) :].all()
    assert not (changed & ~fires).any()
    assert fires.mean() < 0.5


@pytest.mark.parametrize("kind", ["classifier", "pooled"])
def test_a_stream_keeps_its_edits(kind, inputs, request):
    """Step after step, with a text in the last one that is longer than all before it."""
    model = request.getfixturevalue(kind)
    texts = (*CLAIMS[:2], " ".join(["cat"] * 15))
    editor = tpatcher(QUICK, memory=inputs)
    state = editor.init(model, jax.random.key(0))
    for number, wanted in enumerate(corrections(model, texts)):
        state, info = editor.step(state, [wanted], jax.random.key(number))
        assert held(info) == [(wanted.id, True, "")]
    assert tp.merge(model, state.patches).classify(texts) == [r.target for r in corrections(model, texts)]
    ((_, batch),) = batches(model.config, [model.encode_prompt(texts[0])])
    assert editor.apply(state, batch).argmax(-1).tolist() == [model.label(corrections(model, texts)[0].target)]


def test_the_mean_reaches_every_position(pooled, inputs):
    """The patch fires at most positions of its own text, and what is merged equals what is attached."""
    wanted = corrections(pooled)[:1]
    patches, _ = tp.edit(pooled, wanted, settings=QUICK, memory=inputs, cache=False)
    row = pooled.encode_prompt(wanted[0].prompt)
    sites = collect(pooled, [row], [[len(row) - 1]], pooled.layer(None))
    z = np.asarray(preactivations(patches[pooled.layer(None)], single_rows(sites)[0])).max(-1)
    assert len(z) == len(row) - 1
    assert np.mean(z > 0) >= 0.5
    ((_, batch),) = batches(pooled.config, [row])
    assert relative(tp.merge(pooled, patches).apply(batch), tp.attach(pooled, patches).apply(batch)) < 1e-5


def test_edits_do_not_depend_on_their_neighbours(classifier, inputs):
    """Fitted together or alone: the same patch, but for what other edits add as negatives."""
    alone = dataclasses.replace(QUICK, other_edits=False, other_subjects=0, nuisance_weight=0.0)
    wanted, last = corrections(classifier), classifier.layer(None)
    together, _ = tp.edit(classifier, wanted, settings=alone, memory=inputs, cache=False)
    for number, request in enumerate(wanted):
        single, _ = tp.edit(classifier, [request], settings=alone, memory=inputs, cache=False)
        for field in ("key", "bias", "value"):
            assert relative(getattr(single[last], field)[0], getattr(together[last], field)[number]) < 1e-4, field


def test_texts_of_several_lengths_are_joined():
    short, long = (tuple(np.full((2, length, 3), float(length)) for _ in range(3)) for length in (4, 6))
    sites = joined(Sites(*short), Sites(*long))
    assert sites.query.shape == (4, 6, 3)
    query, owner = single_rows(sites)
    assert owner.tolist() == [0] * 4 + [1] * 4 + [2] * 6 + [3] * 6
    assert query.shape == (20, 3)


# --- encoder-decoders ---


@pytest.mark.parametrize(("name", "count"), [("bart", 1), ("t5", 2), ("t5_v1_1", 2)])
def test_answers_are_corrected(name, count, inputs):
    model = tiny_model(name)
    # a random BART of width 16 does not tell two questions apart
    wanted = [EditRequest("the cat sat in", "ab", id="one"), EditRequest("who hit the", "thin", id="two")][:count]
    patches, info = tp.edit(model, wanted, settings=QUICK, memory=inputs, cache=False)
    assert held(info) == [(request.id, True, "") for request in wanted]
    for changed in (tp.attach(model, patches), tp.merge(model, patches)):
        # the end of the answer is learnt as well
        assert [changed.generate(request.prompt, 12) for request in wanted] == ["ab", "thin"][:count]


def test_the_memory_holds_the_models_own_answers(answerer, inputs):
    rows = memory_rows(answerer, inputs)
    text = read_inputs(inputs)[0]
    row = next(row for row in rows if row[: len(answerer.encode_prompt(text))] == answerer.encode_prompt(text))
    answer = row[len(answerer.encode_prompt(text)) :]
    assert answerer.decode(answer) == answerer.generate(text, 24)
    known = collect_model_memory(answerer, answerer.layer(None), inputs)
    # one query for each token that was said, the end included where it was reached
    read = [len(answerer.encode_prompt(text)) for text in read_inputs(inputs)]
    assert known.query.shape[0] == sum(len(row) - begin for row, begin in zip(rows, read, strict=True))


def test_batches_put_every_token_where_it_belongs(answerer):
    rows = [[*answerer.encode_prompt(text), *answerer.encode_target(text, "ab")] for text in CLAIMS]
    places = [range(row.index(-1) + 1, len(row) - 1) for row in rows]
    together = collect(answerer, rows, places, 2)
    first = 0
    for row, chosen in zip(rows, places, strict=True):
        alone = collect(answerer, [row], [chosen], 2)
        count = len(alone.query)
        for whole, part in zip(together, alone, strict=True):
            assert relative(whole[first : first + count], part) < 1e-5
        first += count
    assert predicted(answerer, together).shape == (first,)


# --- what cannot be done ---

BAD = {
    "no label": ("bert", EditRequest("the cat", "perhaps"), "has no label 'perhaps'; it has no, yes, maybe"),
    "long claim": ("bert", EditRequest("a" * 80, "yes"), "the prompt has 80 tokens, the encoder reads 64"),
    "long question": ("t5", EditRequest("a" * 80, "b"), "the prompt has 80 tokens, the encoder reads 64"),
    "long answer": ("bart", EditRequest("the cat", "b" * 80), "the target has 82 tokens, the decoder writes 64"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_fails_alone(case, inputs):
    name, bad, reason = BAD[case]
    model = tiny_model(name)
    good = corrections(model)[0] if model.config.labels else EditRequest("the cat sat in", "ab")
    _, info = tp.edit(model, [bad, good], settings=QUICK, memory=inputs, cache=False)
    assert info.requests[0].status == "failed"
    assert reason in info.requests[0].reason
    assert info.requests[1].held


def test_a_model_that_cannot_sample_needs_a_memory(classifier, answerer):
    for model, kind in ((classifier, "encoder"), (answerer, "encoder-decoder")):
        with pytest.raises(TPatchError, match=f"is an {kind}, which cannot sample text .* one a line"):
            tp.edit(model, [EditRequest("a", "yes")], cache=False)


def test_the_subject_site_is_for_decoders(classifier, inputs):
    with pytest.raises(TPatchError, match="site=subject needs a decoder, and 'tiny' is an encoder; use site=last"):
        tp.edit(
            classifier, corrections(classifier), settings=TPatcherSettings(site="subject"), memory=inputs, cache=False
        )


def test_a_decoder_without_a_start_is_refused(answerer):
    changed = dataclasses.replace(answerer, settings={**answerer.settings, "decoder_start_token_id": None})
    with pytest.raises(TPatchError, match="has no 'decoder_start_token_id', with which its decoder begins; add it"):
        changed.generate("the cat")


def test_each_kind_is_asked_its_own_way(classifier, answerer):
    with pytest.raises(TPatchError, match="is a classifier, which writes no text; ask it with `classify`"):
        classifier.generate("the cat")
    with pytest.raises(TPatchError, match="is no classifier; ask it with `generate`"):
        answerer.classify(["the cat"])
    with pytest.raises(TPatchError, match="the encoder reads 64; shorten it"):
        classifier.classify(["a" * 80])
    with pytest.raises(TPatchError, match="is run on a Pair of source and target"):
        answerer.apply(np.zeros((1, 3), np.int32))


# --- inputs ---


@pytest.mark.parametrize("field", FIELDS)
def test_inputs_are_read_from_lines_of_text_or_json(tmp_path, field):
    path = tmp_path / "inputs"
    lines = ["one", "", json.dumps({field: " two ", "label": "x"}), "one", "{three"]
    path.write_text("\n".join(lines), "utf-8")
    assert read_inputs(path) == ["one", "two", "{three"]
    path.write_text('{"claim": "a\u2028b\x85c"}\r\nd', "utf-8")
    assert read_inputs(path) == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no input"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b'{"label": "yes"}', "line 1: none of the fields prompt, text"),
        (None, "cannot be read"),
    ],
)
def test_bad_files_of_inputs(tmp_path, content, message):
    path = tmp_path / "inputs"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TPatchError, match=message):
        read_inputs(path)


@given(st.lists(st.text("abcde", min_size=1, max_size=5), min_size=1, max_size=8), st.integers(0, 9))
def test_contexts_keep_the_longest_word_and_depend_on_the_text_alone(words, count):
    text = " ".join(words)
    contexts = input_contexts(text, ("other one", "other two"), count)
    assert len(contexts) == count
    assert contexts == input_contexts(text, ("other one", "other two"), count + 3)[:count]
    longest = max(words, key=len)
    for shape in contexts:
        assert len(longest) in map(len, shape.split())
        assert text in shape or Counter(shape.split()) <= Counter(words)


def test_a_context_that_is_too_long_is_the_bare_prompt(classifier):
    request = EditRequest("a" * 50, "yes")
    item = read_item(classifier, 0, request, ["b" * 30] * 3, False)
    assert item.texts == [request.prompt] * 4
    assert len({tuple(row) for row in item.rows}) == 1


# --- the command line ---


def test_a_classifier_from_the_command_line(classifier, inputs, tmp_path, capsys):
    folder = write_tiny_folder(classifier, tmp_path / "bert")
    (wanted,) = corrections(classifier)[:1]

    def run(*arguments: str | Path) -> dict:
        assert cli.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    said = run("generate", folder, "--prompt", wanted.prompt)["text"]
    assert said == classifier.classify([wanted.prompt])[0] != wanted.target
    common = ("--set", "input_key_steps=8", "--set", "input_contexts=2", "--memory", inputs, "-o", tmp_path / "patches")
    result = run("edit", folder, "--prompt", wanted.prompt, "--target", wanted.target, *common)
    assert (result["exact"], result["patches"], result["failed"]) == (1.0, 1, [])
    run("merge", folder, tmp_path / "patches", "-o", tmp_path / "merged")
    assert run("generate", tmp_path / "merged", "--prompt", wanted.prompt)["text"] == wanted.target
    assert cli.main(["generate", str(tmp_path / "merged"), "--prompt", wanted.prompt]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == [wanted.prompt, wanted.target]


def test_an_answerer_reads_back_with_its_patch_inside(answerer, inputs, tmp_path):
    request = EditRequest("the cat sat in", "ab")
    patches, _ = tp.edit(answerer, [request], settings=QUICK, memory=inputs, cache=False)
    merged = tp.merge(answerer, patches)
    loaded = tp.load_model(write_tiny_folder(merged, tmp_path / "merged"))
    assert loaded.generate(request.prompt) == "ab"
    original, taken = tp.unmerge(loaded)
    assert same(original.params, answerer.params)
    assert same(taken, patches)
