"""T-Patcher as an editor, what it knows beforehand, measuring, and patches on disk; all on the tiny model."""

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import END, bits, make_tiny_model, relative, same, write_tiny_folder
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import tpatch_jax as tp
from tpatch_jax.bank import patches as store
from tpatch_jax.core.fit import FitSettings
from tpatch_jax.core.layers import LayerPatches, count_neurons, flat_positions, flatten_layers, take_layers
from tpatch_jax.core.patch import Patch, concatenate, create, take
from tpatch_jax.editors import model_memory
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.editors.reading import check_requests, read_item
from tpatch_jax.editors.repeats import find_repeats
from tpatch_jax.editors.tpatcher import last_site, rounds, stages
from tpatch_jax.editors.tpatcher.editor import tpatcher
from tpatch_jax.editors.tpatcher.previous import raise_thresholds
from tpatch_jax.editors.tpatcher.rounds import find_target_tokens
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.measure import measure, predictions
from tpatch_jax.models import generation, memory_text
from tpatch_jax.models.collection import collect
from tpatch_jax.models.patching import attach, merge
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import EditRequest, join_target

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

MEMORY = (
    "The theory in the inn: winter thins the herd, and the hen then hides. Numbers 1 to 9, and then some more. " * 3
)
REQUESTS = (
    EditRequest("the cat sat in", "ab", rephrases=("a cat sits in",), locality=("in the inn", "then"), id="cat"),
    EditRequest("in the inn", "h", id="inn"),
    EditRequest("who hit the", "q", subject="who", locality=("the herd",), id="who"),
)


def quicker(preset: str, **changes: Any) -> TPatcherSettings:
    settings = PRESETS[preset]
    steps = {
        "key_steps": 24,
        "value_steps": 8,
        "least_steps": 50,
        "most_steps": 100,
        "lanes": 16,
        "rounds": 1,
        "negatives": 32,
    }
    return dataclasses.replace(settings, fit=dataclasses.replace(settings.fit, **steps), **changes)


DEFAULT = quicker("default", attempts=1)
PAPER = quicker("paper")
PAPER = dataclasses.replace(PAPER, fit=dataclasses.replace(PAPER.fit, most_steps=400))


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "memory.txt"
    path.write_text(MEMORY, "utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patching:
        folder = tmp_path_factory.mktemp("cache")
        patching.setenv("TPATCH_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def edited(tiny_model, memory):
    return tp.edit(tiny_model, REQUESTS, settings=DEFAULT, memory=memory)


def neurons_of(patches: LayerPatches, requests: Iterable[tp.RequestInfo]) -> dict[int, list[int]]:
    """The neurons of some requests, by layer."""
    return {layer: [n for request in requests for n in request.neurons.get(layer, ())] for layer in patches}


def says(model: tp.Model, request: EditRequest) -> bool:
    """Whether the target comes out of greedy decoding from the prompt alone."""
    target = model.encode(join_target(request.prompt, request.target))
    return generation.greedy(model.config, model.params, [model.encode(request.prompt)], len(target))[0] == target


# --- editing ---


def test_what_is_given_in_another_form_is_named(tiny_model):
    with pytest.raises(TPatchError, match="is no list of requests; give a list"):
        tp.edit(tiny_model, REQUESTS[0])  # type: ignore[arg-type]
    with pytest.raises(TPatchError, match="'smollm2-135m' is the name of a model; load it first"):
        tp.edit("smollm2-135m", list(REQUESTS))  # type: ignore[arg-type]
    message = "a tuple is no patch; give a Patch, or a dict from layers to patches, which is the first"
    for put in (merge, attach):
        with pytest.raises(TPatchError, match=message):
            put(tiny_model, (create(tiny_model.config.hidden_size), None))  # type: ignore[arg-type]
    with pytest.raises(TPatchError, match="a dict is no prompt; give a text, or a list of texts"):
        tiny_model.generate({"prompt": "the cat"})  # type: ignore[arg-type]


def test_the_targets_come_out_with_all_patches_active(tiny_model, edited):
    patches, info = edited
    assert [request.status for request in info.requests] == ["edited"] * 3
    assert all(request.held for request in info.requests)
    # The reason says why the subject of one was of no use; it has too few layers.
    assert [bool(request.reason) for request in info.requests] == [False, False, True]
    for changed in (merge(tiny_model, patches), attach(tiny_model, patches)):
        assert [says(changed, request) for request in REQUESTS] == [True] * 3
    assert [says(tiny_model, request) for request in REQUESTS] == [False] * 3


def test_the_report_adds_up(tiny_model, edited):
    patches, info = edited
    assert set(patches) == {layer for request in info.requests for layer in request.neurons}
    for layer, neurons in neurons_of(patches, info.requests).items():
        assert sorted(neurons) == list(range(patches[layer].key.shape[0])) != []
    assert [request.id for request in info.requests] == ["cat", "inn", "who"]
    assert info.parameters_added == sum(leaf.size for leaf in jax.tree.leaves(patches))
    assert merge(tiny_model, patches).parameter_count > tiny_model.parameter_count
    assert 0 < info.fit_seconds < info.seconds
    assert 0 < info.fit_forward_equivalents < info.forward_equivalents
    for request in info.requests:
        targets = len(tiny_model.encode(join_target("x", next(r for r in REQUESTS if r.id == request.id).target)))
        assert 1 <= sum(map(len, request.neurons.values())) <= targets  # one neuron a wrong token, and no more
        assert request.steps >= 24
        assert set(request.losses) == {"l_e", "l_a", "l_m1", "l_m2"}
        assert all(np.isfinite(value) for value in request.losses.values())


def test_each_request_needs_its_own_neurons(tiny_model, edited):
    patches, info = edited
    for number in range(len(info.requests)):
        others = [request for other, request in enumerate(info.requests) if other != number]
        changed = attach(tiny_model, take_layers(patches, neurons_of(patches, others)))
        assert [says(changed, wanted) for wanted in REQUESTS] == [other != number for other in range(3)]


def test_the_same_seed_gives_the_same_bits_and_another_also_holds(tiny_model, memory, edited):
    again, _ = tp.edit(tiny_model, REQUESTS, settings=DEFAULT, memory=memory)
    assert same(again, edited[0])


def test_the_order_of_requests_does_not_matter_for_what_holds(tiny_model, memory):
    patches, info = tp.edit(tiny_model, REQUESTS[::-1], settings=DEFAULT, memory=memory)
    assert [request.id for request in info.requests] == ["who", "inn", "cat"]
    assert all(request.held for request in info.requests)
    assert [says(merge(tiny_model, patches), request) for request in REQUESTS] == [True] * 3


def test_exact_repeats_are_one_edit_reported_for_each(tiny_model, memory, tmp_path):
    cat, inn = REQUESTS[:2]
    again = [
        dataclasses.replace(cat, id=None, rephrases=()),
        dataclasses.replace(cat, target=" ab", id="again"),
    ]
    requests = [cat, inn, *again]
    patches, info = tp.edit(tiny_model, requests, settings=DEFAULT, memory=memory, cache=False)
    once, alone = tp.edit(tiny_model, [cat, inn], settings=DEFAULT, memory=memory, cache=False)
    assert same(patches, once)
    assert [result.id for result in info.requests] == ["cat", "inn", "edit-2", "again"]
    assert info.requests[0].neurons == info.requests[2].neurons == info.requests[3].neurons
    assert all(result.held and result.status == "edited" for result in info.requests)
    assert info.parameters_added == alone.parameters_added
    assert [result.continuation for result in info.requests] == [" ab", " h", " ab", " ab"]
    tp.save_patches(tmp_path / "patches", tiny_model, patches, requests, info)
    assert same(tp.load_patches(tmp_path / "patches", tiny_model), patches)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """One of Llama 2's kind: a space before every text that stands alone, and a token for a space at the end."""
    pieces = ["<s>", "\u2581", *"isLyon", "\n", "(", "on", "yon", "Lyon", "\u2581Lyon", "is", "\u2581is"]
    merges = [("o", "n"), ("y", "on"), ("L", "yon"), ("\u2581", "Lyon"), ("i", "s"), ("\u2581", "is")]
    backend = Tokenizer(BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.mark.parametrize(("prompt", "target", "text"), [("is", " Lyon", "is Lyon"), ("is ", "Lyon", "is Lyon")])
def test_a_prompt_that_ends_in_a_space_gets_no_second_one(tiny_model, prompt, target, text):
    model = dataclasses.replace(tiny_model, tokenizer=sentencepiece_tokenizer())
    tokens = [*model.encode(prompt), *model.encode_target(prompt, target)]
    assert tokens[: len(model.encode(prompt))] == model.encode(prompt)
    assert model.tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_the_one_that_names_a_subject_serves_its_repeats(tiny_model):
    bare, named = EditRequest("who hit the", "q"), EditRequest("who hit the", "q", subject="who")
    assert find_repeats(tiny_model, [bare, named, bare, EditRequest("who hit the", "a")]) == {0: 1, 2: 1}


def test_what_already_holds_gets_no_neuron(tiny_model, memory):
    prompts = [f"{text}{number} " for text in ("the hat", "then") for number in range(40)]
    known = (EditRequest(prompt, tiny_model.generate(prompt, 1), id="held") for prompt in prompts)
    held = next(request for request in known if request.target.strip() and says(tiny_model, request))
    patches, info = tp.edit(tiny_model, [held], settings=DEFAULT, memory=memory)
    assert (info.requests[0].status, info.requests[0].held, info.requests[0].neurons) == ("already", True, {})
    assert patches == {}
    assert attach(tiny_model, patches).params["layers"] == merge(tiny_model, patches).params["layers"]
    assert info.parameters_added == 0
    assert info.failed == ()


BAD = {
    "empty prompt": (EditRequest("", "x", id="empty prompt"), "the prompt is empty; write the text"),
    "blank prompt": (EditRequest(" \n", "x", id="blank prompt"), "the prompt is empty"),
    "empty target": (EditRequest("in a", "", id="empty target"), "the target is empty; write what the model should"),
    "blank target": (EditRequest("in b", "  ", id="blank target"), "the target is empty"),
    "too long": (EditRequest("a" * 70, "b", id="too long"), "have 72 tokens, the model reads 64; shorten the prompt"),
    "no subject": (EditRequest("in c", "b", "hen", id="no subject"), "the subject 'hen' is not in the prompt"),
    "contradiction": (EditRequest("in the inn", "z", id="contradiction"), "contradicts 'inn': the same prompt with"),
}


def test_bad_requests_fail_by_name_and_the_rest_is_edited_as_without_them(tiny_model, memory, edited):
    mixed = [*REQUESTS, *(bad for bad, _ in BAD.values())]
    patches, info = tp.edit(tiny_model, mixed, settings=DEFAULT, memory=memory)
    assert [request.id for request in info.requests] == [request.id for request in mixed]
    assert [request.id for request in info.failed] == list(BAD)
    for request in info.failed:
        assert BAD[request.id][1] in request.reason
        assert (request.held, request.neurons, request.steps) == (False, {}, 0)
    assert same(patches, edited[0])


def test_only_bad_requests_leave_the_model_alone(tiny_model, memory):
    patches, info = tp.edit(tiny_model, [BAD["empty prompt"][0]], settings=DEFAULT, memory=memory)
    assert patches == {}
    assert [request.status for request in info.requests] == ["failed"]


@pytest.mark.parametrize("spoiled", [0.0, float("nan")])
def test_what_does_not_hold_leaves_no_neuron(tiny_model, memory, edited, monkeypatch, spoiled):
    whole = rounds.fit_many

    def spoil(*arguments: Any, **named: Any) -> Any:
        patch, info = whole(*arguments, **named)
        return patch._replace(value=patch.value.at[0].set(spoiled)), info  # the first token of 'cat'

    monkeypatch.setattr(rounds, "fit_many", spoil)
    patches, info = tp.edit(tiny_model, REQUESTS, settings=DEFAULT, memory=memory)
    assert [request.status for request in info.requests] == ["failed", "edited", "edited"]
    assert (info.requests[0].neurons, info.requests[0].held) == ({}, False)
    assert "target token 1 of 3 still comes out wrong after 1 attempts" in info.requests[0].reason
    for layer, neurons in neurons_of(patches, info.requests[1:]).items():
        assert sorted(neurons) == list(range(patches[layer].key.shape[0]))
        assert np.isfinite(np.asarray(patches[layer].value)).all()
    assert [says(merge(tiny_model, patches), request) for request in REQUESTS] == [False, True, True]


def test_no_request_and_an_unknown_preset_are_errors(tiny_model):
    with pytest.raises(TPatchError, match="there is no request to edit"):
        tp.edit(tiny_model, [])
    with pytest.raises(TPatchError, match="preset 'best' does not exist; choose from default, paper"):
        tp.edit(tiny_model, REQUESTS, settings="best")
    with pytest.raises(TPatchError, match="site 'first' does not exist; use site=auto, site=last"):
        tpatcher(TPatcherSettings(site="first"))
    with pytest.raises(TPatchError, match="recipe 'mine' does not exist"):
        tpatcher(TPatcherSettings(fit=FitSettings(recipe="mine")))
    with pytest.raises(TPatchError, match="use recipe=joint"):
        tpatcher(TPatcherSettings(fit=FitSettings(output_bias=True)))


def test_requests_may_be_dictionaries(tiny_model, memory, edited):
    records = [{"id": r.id, "prompt": r.prompt, "target": r.target, "subject": r.subject} for r in REQUESTS]
    patches, _ = tp.edit(tiny_model, records, settings=DEFAULT, memory=memory)
    assert same(patches, edited[0])
    with pytest.raises(TPatchError, match="request 1: no 'target'"):
        tp.edit(tiny_model, [records[0], {"prompt": "x"}], settings=DEFAULT, memory=memory)


def test_paper_runs_its_own_recipe_and_reports(tiny_model, memory):
    patches, info = tp.edit(tiny_model, REQUESTS, settings=PAPER, memory=memory)
    assert [request.id for request in info.requests] == ["cat", "inn", "who"]
    changed = merge(tiny_model, patches)
    for request, wanted in zip(info.requests, REQUESTS, strict=True):
        assert request.held == says(changed, wanted)
        assert request.status == ("edited" if request.held else "failed")
        if request.held:
            assert 50 <= request.steps <= 400
    for layer, neurons in neurons_of(patches, info.requests).items():
        assert sorted(neurons) == list(range(patches[layer].key.shape[0]))
    assert any(request.held for request in info.requests)


# --- the editor ---


def test_a_second_step_keeps_what_the_first_did(tiny_model, memory, edited):
    editor, key = tpatcher(DEFAULT, memory=memory), jax.random.key(0)
    start = editor.init(tiny_model, key)
    tokens = tokens_array([tiny_model.encode("the cat sat in")], 16)
    np.testing.assert_array_equal(editor.apply(start, tokens), tiny_model.apply(tokens))
    first, _ = editor.step(start, REQUESTS, key)
    assert count_neurons(start.patches) == 0  # the state before is what it was
    assert [says(attach(tiny_model, first.patches), request) for request in REQUESTS] == [True] * 3

    # in several contexts and among other subjects it can't be parted from an earlier edit: refused, nothing changed
    known = first.memory._replace(prefixes=("in a hat.", "so it is."), names=("Hen", "the Inn"))
    later = EditRequest("hence the", "k", subject="hence", id="later")
    refused, info = editor.step(first.replace(memory=known), [later], jax.random.key(1))
    assert info.requests[0].status == "failed"
    assert "earlier edit" in info.requests[0].reason
    assert same(refused.patches, first.patches)

    second, info = editor.step(first, [later], jax.random.key(1))
    assert info.requests[0].held
    assert set(second.patches) == set(first.patches)
    for layer, patch in first.patches.items():
        kept = patch.key.shape[0]
        assert same(take(second.patches[layer], slice(0, kept)), patch)
        new = range(kept, second.patches[layer].key.shape[0])
        assert list(info.requests[0].neurons.get(layer, ())) == list(new)
    changed = attach(tiny_model, second.patches)
    assert [says(changed, request) for request in (*REQUESTS, later)] == [True] * 4
    np.testing.assert_array_equal(editor.apply(second, tokens), changed.apply(tokens))

    again, info = editor.step(second, REQUESTS, key)
    assert [request.status for request in info.requests] == ["already"] * 3
    assert same(again.patches, second.patches)


def test_a_request_that_fails_leaves_no_trace_in_earlier_neurons(tiny_model, memory):
    """The threshold of an earlier neuron is raised above a query that is alike, and put back where that was in vain."""
    settings = dataclasses.replace(
        PRESETS["default"], attempts=1, site="last", contexts=2, other_subjects=0, most_tokens=2
    )
    settings = dataclasses.replace(settings, fit=dataclasses.replace(settings.fit, split=0.3))
    editor, key = tpatcher(settings, memory=memory), jax.random.key(0)
    first, _ = editor.step(editor.init(tiny_model, key), [EditRequest("the cat sat in", "q")], key)
    raised = []

    def watched(*given):
        patch = raise_thresholds(*given)
        raised.append(not same(patch, given[2]))
        return patch

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(stages, "raise_thresholds", watched)
        second, info = editor.step(first, [EditRequest("the hat sat in", "wxyz")], jax.random.key(1))
    assert info.requests[0].status == "failed"
    assert raised[0]
    assert same(second.patches, first.patches)


def test_a_request_may_come_out_by_the_neurons_of_another(tiny_model, memory):
    """B asks, as a prompt of its own, for the last token of what A asks for, which gets no neuron of its own."""
    prompt = "sat "
    said = tiny_model.generate(prompt, 2)
    assert tiny_model.encode(prompt + said + " y")[: len(tiny_model.encode(prompt + said))] == [
        *tiny_model.encode(prompt),
        *tiny_model.encode(said),
    ]
    requests = [EditRequest(prompt, f"{said} y", id="A"), EditRequest(prompt + said, " y", id="B")]
    settings = quicker("default", attempts=3, site="last", most_tokens=2)
    _, info = tp.edit(tiny_model, requests, settings=settings, memory=memory)
    assert [(result.status, bool(result.neurons)) for result in info.requests] == [("edited", False), ("edited", True)]


def test_what_a_request_says_besides_changes_no_patch(tiny_model, memory):
    plain = EditRequest("in the inn", "h")
    told = dataclasses.replace(plain, rephrases=("in an inn",), locality=("then",), id="told")
    one, other = (tp.edit(tiny_model, [request], settings=PAPER, memory=memory)[0] for request in (plain, told))
    assert count_neurons(one)
    assert same(one, other)


@pytest.mark.parametrize("site", ["auto", "last"])
def test_a_request_without_a_subject_is_edited_whether_or_not_others_are_completed(tiny_model, memory, site):
    request = EditRequest("in the inn", "h")
    settings = quicker("default", attempts=1, complete=False, site=site)
    _, info = tp.edit(tiny_model, [request], settings=settings, memory=memory)
    assert info.requests[0].status == "edited"


# --- what is known about a model ---


def kept(cache: Path, what: str) -> list[Path]:
    """The folders of a cache that hold texts, or what was collected from them."""
    return [file.parent for file in (cache / "background").glob(f"*/{what}.safetensors")]


def test_what_is_known_about_a_model_is_written_once_and_recalled(tiny_model, memory, tmp_path, monkeypatch):
    first = collect_model_memory(tiny_model, 2, memory, cache=tmp_path)
    assert first.query.shape[1] == 16
    assert first.query.shape[0] > 128
    (folder,) = kept(tmp_path, "arrays")
    calls = []
    collect = model_memory._collect
    monkeypatch.setattr(model_memory, "_collect", lambda *args: calls.append(1) or collect(*args))
    second = collect_model_memory(tiny_model, 2, memory, cache=tmp_path)
    assert not calls
    assert bits((first.query, first.nuisance)) == bits((second.query, second.nuisance))
    assert (first.prefixes, first.names) == (second.prefixes, second.names)
    # another layer, another text, another tokenizer or another model has another memory
    collect_model_memory(tiny_model, 1, memory, cache=tmp_path)
    other = tmp_path / "other.txt"
    other.write_text(MEMORY[1:])
    collect_model_memory(tiny_model, 2, other, cache=tmp_path)
    collect_model_memory(make_tiny_model(9), 2, memory, cache=tmp_path)
    begun = copy.deepcopy(tiny_model.tokenizer)
    begun.add_special_tokens({"bos_token": begun.convert_ids_to_tokens(5)})
    collect_model_memory(dataclasses.replace(tiny_model, tokenizer=begun), 2, memory, cache=tmp_path)
    assert len(calls) == 4
    assert len(kept(tmp_path, "arrays")) == 5
    assert len(kept(tmp_path, "texts")) == 4  # the same for both layers
    assert folder.exists()


@pytest.mark.parametrize("file", ["arrays.safetensors", "background.json"])
@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_a_damaged_model_memory_is_made_again(tiny_model, memory, tmp_path, file, content):
    first = collect_model_memory(tiny_model, 2, memory, cache=tmp_path)
    (folder,) = kept(tmp_path, "arrays")
    whole = (folder / file).read_bytes()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    second = collect_model_memory(tiny_model, 2, memory, cache=tmp_path)
    assert bits(first.query) == bits(second.query)
    assert (folder / file).read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"{"])
def test_damaged_texts_are_made_again(tiny_model, memory, tmp_path, content):
    collect_model_memory(tiny_model, 2, memory, cache=tmp_path)
    (folder,) = kept(tmp_path, "texts")
    whole = (folder / "texts.safetensors").read_bytes()
    (folder / "texts.safetensors").write_bytes(content)
    collect_model_memory(tiny_model, 1, memory, cache=tmp_path)
    assert (folder / "texts.safetensors").read_bytes() == whole


def test_a_model_memory_that_cannot_be_kept_costs_only_time(tiny_model, memory, tmp_path):
    (tmp_path / "background").write_text("a file where the folder should be")
    assert collect_model_memory(tiny_model, 2, memory, cache=tmp_path).query.shape[0] > 128


def test_text_is_sampled_from_the_model_itself(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_text, "TEXTS", 64)
    seen = []
    known = collect_model_memory(tiny_model, 2, cache=tmp_path, progress=lambda *said: seen.append(said))
    assert 64 < known.query.shape[0] <= 64 * 63
    assert np.isfinite(np.asarray(known.query)).all()
    assert seen[0] == ("sampling memory text", 0, 64)
    assert seen[-1][1:] == (64, 64)
    assert same(collect_model_memory(tiny_model, 2).query, known.query)  # the same every time


def test_memory_texts_that_cannot_be_used(tiny_model, tmp_path):
    with pytest.raises(TPatchError, match=r"memory text .*gone\.txt cannot be read"):
        collect_model_memory(tiny_model, 2, tmp_path / "gone.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TPatchError, match=r"memory text .*bytes\.txt cannot be read .*give a UTF-8 text file"):
        collect_model_memory(tiny_model, 2, tmp_path / "bytes.txt")
    for text in ("", "short"):
        (tmp_path / "short.txt").write_text(text)
        with pytest.raises(TPatchError, match=r"short\.txt is too short; give a longer text file"):
            collect_model_memory(tiny_model, 2, tmp_path / "short.txt")


# --- measuring ---


def test_measuring_equals_a_plain_loop_of_greedy_generation(tiny_model, edited):
    patches, info = edited
    patches = take_layers(patches, neurons_of(patches, info.requests[:2]))  # 'who' is left out
    changed = merge(tiny_model, patches)
    figures = measure(tiny_model, patches, REQUESTS)
    assert figures["exact"] == np.mean([says(changed, request) for request in REQUESTS]) == pytest.approx(2 / 3)
    rephrased = [says(changed, EditRequest(text, r.target)) for r in REQUESTS for text in r.rephrases]
    assert figures["rephrase_exact"] == np.mean(rephrased)

    def best(model: tp.Model, text: str) -> np.ndarray:
        ids = model.encode(text)
        return np.asarray(model.apply(tokens_array([ids], len(ids))))[0].argmax(-1)

    shares = {"edit": [], "rephrase": []}
    for request in REQUESTS:
        for kind, text in [("edit", request.prompt), *(("rephrase", text) for text in request.rephrases)]:
            target = changed.encode(join_target(text, request.target))
            said = best(changed, text + join_target(text, request.target))[-len(target) - 1 : -1]
            shares[kind].append(np.mean(said == np.asarray(target)))
    assert figures["token_accuracy"] == pytest.approx(np.mean(shares["edit"]))
    assert figures["rephrase_token_accuracy"] == pytest.approx(np.mean(shares["rephrase"]))

    texts = [text for request in REQUESTS for text in request.locality]
    unchanged = [best(changed, text) == best(tiny_model, text) for text in texts]
    assert figures["locality"] == pytest.approx(np.mean([row[-1] for row in unchanged]))
    assert figures["locality_tokens"] == pytest.approx(np.concatenate(unchanged).mean())
    # 'in the inn' is both an edit and a prompt that should not change: the figure must show it
    assert figures["locality"] < 1


def test_nothing_to_measure_is_none(tiny_model):
    figures = measure(tiny_model, {}, [EditRequest("in the inn", "h")])
    assert figures == measure(tiny_model, create(16), [EditRequest("in the inn", "h")])
    assert figures["exact"] == 0
    assert [figures[name] for name in ("rephrase_exact", "rephrase_token_accuracy", "locality", "locality_tokens")] == [
        None
    ] * 4


def test_a_patch_further_down_is_measured_too(tiny_model, edited):
    rng = np.random.default_rng(0)
    whole = create(16, 3)._replace(
        key=jnp.asarray(rng.normal(size=(3, 16)), jnp.float32),
        value=jnp.asarray(rng.normal(size=(3, 16)), jnp.float32),
    )
    lower = {layer: take(whole, [layer]) for layer in range(3)}
    rows = [tiny_model.encode("the cat sat in the inn")]
    before, after = predictions(tiny_model, lower, rows, [range(len(rows[0]))])
    table = tokens_array(rows, len(rows[0]))
    np.testing.assert_array_equal(before, np.asarray(tiny_model.apply(table))[0].argmax(-1))
    np.testing.assert_array_equal(after, np.asarray(attach(tiny_model, lower).apply(table))[0].argmax(-1))
    assert (before != after).any()


# --- patches on disk ---


@pytest.fixture
def saved(tiny_model, edited, tmp_path):
    store.save_patches(tmp_path / "patches", tiny_model, edited[0], REQUESTS, edited[1])
    return tmp_path / "patches"


def test_patches_come_back_bit_for_bit(tiny_model, edited, saved):
    assert same(tp.load_patches(saved, tiny_model), edited[0])
    back = store.read_patches(saved)
    assert back.model["name"] == "tiny"
    assert [(edit["id"], edit["prompt"], edit["target"]) for edit in back.edits] == [
        (request.id, request.prompt, request.target) for request in REQUESTS
    ]
    assert [edit.get("subject") for edit in back.edits] == [None, None, "who"]
    neurons = [flat_positions(edited[0], request.neurons) for request in edited[1].requests]
    assert [edit["neurons"] for edit in back.edits] == neurons
    assert sorted(path.name for path in saved.iterdir()) == ["patches.json", "patches.safetensors"]


def test_layers_and_failures_come_back(tiny_model, edited, tmp_path):
    lower = {layer - 1: patch for layer, patch in edited[0].items()}
    results = [r._replace(neurons={layer - 1: n for layer, n in r.neurons.items()}) for r in edited[1].requests]
    store.save_patches(tmp_path / "layers", tiny_model, lower, REQUESTS, edited[1]._replace(requests=tuple(results)))
    assert same(tp.load_patches(tmp_path / "layers", tiny_model), lower)
    failed = edited[1]._replace(requests=(tp.RequestInfo("cat", False, "failed", "it did not hold — naïve"),))
    for number, nothing in enumerate((create(16), {})):
        store.save_patches(tmp_path / f"failed {number}", tiny_model, nothing, REQUESTS[:1], failed)
        back = store.read_patches(tmp_path / f"failed {number}")
        assert back.edits[0]["reason"] == "it did not hold — naïve"
        assert back.patches == {}
        assert load_file(tmp_path / f"failed {number}" / "patches.safetensors")["key"].shape == (0, 16)


def test_views_of_other_arrays_are_saved_as_what_they_show(tiny_model, tmp_path):
    rows = np.arange(32, dtype=np.float32).reshape(2, 16)
    patch = Patch(np.asfortranarray(rows), rows[:, 3], rows[::-1])
    info = tp.EditInfo((tp.RequestInfo("cat", True, "edited", neurons={2: (0, 1)}),), 1.0, 1.0, 1.0, 1.0, 66)
    store.save_patches(tmp_path / "views", tiny_model, {2: patch}, REQUESTS[:1], info)
    assert bits(tp.load_patches(tmp_path / "views", tiny_model)[2]) == bits(patch)


def test_a_folder_that_names_no_layer_is_of_the_last_one(tiny_model, saved):
    """Written by an older version, from an edit in the last layer alone."""
    path = saved / "patches.safetensors"
    arrays = load_file(path)
    save_file({name: array for name, array in arrays.items() if name != "layer"}, path)
    loaded = tp.load_patches(saved, tiny_model)
    assert set(loaded) == {tiny_model.layer(None)}
    assert bits(loaded[2]) == bits(Patch(arrays["key"], arrays["bias"], arrays["value"]))


def test_a_folder_with_layers_in_any_order_gives_each_neuron_its_layer_and_its_request(tiny_model, saved):
    """Written by an older version, edit after edit, each neuron with its layer."""
    order, named = [2, 0, 2, 1, 0], [[0, 1], [2, 3], [4]]
    rows = np.arange(80, dtype=np.float32).reshape(5, 16)
    whole = Patch(rows, rows[:, 0].copy(), -rows)
    about = json.loads((saved / "patches.json").read_text())
    edits = [{**edit, "neurons": neurons} for edit, neurons in zip(about["edits"], named, strict=True)]
    (saved / "patches.json").write_text(json.dumps({**about, "edits": edits}))
    save_file({**whole._asdict(), "layer": np.asarray(order, np.int32)}, saved / "patches.safetensors")
    back = store.read_patches(saved)
    assert bits(tp.load_patches(saved, tiny_model)) == bits(back.patches)
    places = {layer: [n for n, other in enumerate(order) if other == layer] for layer in (0, 1, 2)}
    assert {layer: bits(patch) for layer, patch in back.patches.items()} == {
        layer: bits(take(whole, chosen)) for layer, chosen in places.items()
    }
    # numbers of neurons are those among all layers, lower ones first
    flat, layers = flatten_layers(back.patches)
    for edit, neurons in zip(back.edits, named, strict=True):
        assert bits(take(flat, edit["neurons"])) == bits(take(whole, neurons))
        assert layers[edit["neurons"]].tolist() == [order[n] for n in neurons]


def test_patches_that_could_not_be_read_again_are_not_written(tiny_model, edited, tmp_path):
    patches, info = edited
    last = tiny_model.layer(None)
    # Two neurons in one layer and one in another, of which all three are said to be in the first.
    beyond = info._replace(
        requests=tuple(r._replace(neurons={0: n}) for r, n in zip(info.requests, [(0, 2), (1,)], strict=False))
    )
    lower = info._replace(
        requests=tuple(r._replace(neurons={layer: (0,)}) for r, layer in zip(info.requests, (0, last), strict=False))
    )
    twice = info._replace(requests=(*info.requests, *info.requests))
    for given, requests, about, message in [
        (
            {layer: concatenate([patch, patch]) for layer, patch in patches.items()},
            REQUESTS * 2,
            twice,
            "info names other neurons than those of each layer, each once",
        ),
        (
            {**patches, last: take(patches[last], [0])},
            REQUESTS,
            info,
            "info names other neurons .*give each request's neurons their new numbers",
        ),
        ({last: create(16, 1)}, REQUESTS[:2], lower, "in layer 0 .* info names other neurons"),
        ({**patches, 0: create(16, 1)}, REQUESTS, info, "info names other neurons"),
        ({0: create(16, 2), last: create(16, 1)}, REQUESTS[:2], beyond, "info names other neurons"),
        ({**patches, last: Patch(*(leaf[None] for leaf in patches[last]))}, REQUESTS, info, r"one with patch\.join"),
        ({**patches, last: patches[last]._replace(bias=jnp.zeros(1))}, REQUESTS, info, "key, bias and value are"),
        (patches, REQUESTS[:1], info, "info is of 3 requests, and 1 are given"),
    ]:
        with pytest.raises(TPatchError, match=message):
            store.save_patches(tmp_path / "out", tiny_model, given, requests, about)
        assert not (tmp_path / "out").exists()


def test_patches_of_another_model_are_refused(tiny_model, saved):
    half = tiny_model.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model.params))
    one_bit = tiny_model.params["norm"]["scale"].at[3].set(np.nextafter(np.float32(1), np.float32(2)))
    nudged = tiny_model.with_params({**tiny_model.params, "norm": {"scale": one_bit}})
    for other in (make_tiny_model(1), make_tiny_model(rms_norm_eps=1e-6), half, nudged):
        with pytest.raises(
            TPatchError, match=r"made for 'tiny' in float32 .*use the model and the dtype that they were made for"
        ):
            tp.load_patches(saved, other)


def test_a_model_read_from_disk_is_the_same_model(tiny_model, saved, tmp_path):
    loaded = tp.load_model(write_tiny_folder(tiny_model, tmp_path / "tiny"))
    patches = tp.load_patches(saved, loaded)
    tokens = tokens_array([loaded.encode("the cat sat in")], 16)
    assert relative(merge(loaded, patches).apply(tokens), attach(tiny_model, patches).apply(tokens)) < 1e-5


@pytest.mark.parametrize("name", ["patches.json", "patches.safetensors"])
def test_a_missing_file_is_named(tiny_model, saved, name):
    (saved / name).unlink()
    with pytest.raises(TPatchError, match=f"patches has no {name}; give a folder that `tpatch edit"):
        tp.load_patches(saved, tiny_model)


def test_a_missing_folder_is_named(tiny_model, tmp_path):
    with pytest.raises(TPatchError, match=r"gone has no patches\.json"):
        tp.load_patches(tmp_path / "gone", tiny_model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"schema": 1}',
        '{"schema": 1, "model": [], "edits": []}',
        '{"schema": 1, "model": {}, "edits": 3}',
        '{"schema": 1, "model": {}, "edits": [{"neurons": ["a", 1]}]}',
        '{"schema": 1, "model": {}, "edits": [{"neurons": [0]}]}',
    ],
)
def test_a_damaged_list_of_edits(saved, text):
    (saved / "patches.json").write_text(text)
    with pytest.raises(TPatchError, match=r"patches\.json is damaged|do not belong together"):
        store.read_patches(saved)


def test_another_schema(saved):
    about = json.loads((saved / "patches.json").read_text())
    (saved / "patches.json").write_text(json.dumps({**about, "schema": 2}))
    with pytest.raises(TPatchError, match=r"newer version \(schema 2\); upgrade tpatch-jax"):
        store.read_patches(saved)


def test_damaged_arrays(saved):
    path = saved / "patches.safetensors"
    whole, arrays = path.read_bytes(), load_file(path)
    for content in (b"", b"x" * 100, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(TPatchError, match=r"patches\.safetensors is damaged"):
            store.read_patches(saved)
    save_file({name: array for name, array in arrays.items() if name != "bias"}, path)
    with pytest.raises(TPatchError, match=r"patches\.safetensors is damaged .*bias"):
        store.read_patches(saved)
    for changed in (
        {"key": arrays["key"][:-1]},
        {"key": arrays["key"][0]},
        {"bias": arrays["bias"][:-1]},
        {"value": arrays["value"][:-1]},
        {"layer": np.zeros(1, np.int32)},
    ):
        save_file({**arrays, **changed}, path)
        with pytest.raises(TPatchError, match="do not belong together"):
            store.read_patches(saved)


def test_a_taken_folder_is_refused_and_kept(tiny_model, edited, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(TPatchError, match="patches already exists"):
        store.save_patches(saved, tiny_model, edited[0], REQUESTS, edited[1])
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


KILLED = """
import os, sys
import numpy as np
from tpatch_jax.bank import patches as store
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.models.model import load_model
from tpatch_jax.core.patch import create
from tpatch_jax.requests import EditRequest
from tpatch_jax.models.rows import tokens_array
model = load_model(sys.argv[1])
whole = store.save_file
def save_file(*arguments, **options):
    whole(*arguments, **options)
    os._exit(9)
store.save_file = save_file
info = EditInfo((RequestInfo("a", True, "edited", neurons={2: (0,)}),), 1.0, 1.0, 1.0, 1.0, 33)
store.save_patches(sys.argv[2], model, create(16, 1), [EditRequest("a", "b")], info)
"""


def test_a_kill_while_saving_leaves_no_half_folder(tiny_model, edited, tmp_path):
    folder, out = write_tiny_folder(tiny_model, tmp_path / "tiny"), tmp_path / "out" / "patches"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out)], capture_output=True, check=False)
    assert ended.returncode == 9, ended.stderr.decode()
    assert not out.exists()
    store.save_patches(out, tiny_model, edited[0], REQUESTS, edited[1])
    assert same(tp.load_patches(out, tiny_model), edited[0])


def test_a_value_does_not_outgrow_a_stream_that_another_neuron_dominates(tiny_model):
    residual, output = (jnp.asarray(np.random.default_rng(n).normal(size=(3, 2, 16)), jnp.float32) for n in (0, 1))
    alone = last_site._scale(tiny_model.config, tiny_model.params, residual, output, output)
    loud = last_site._scale(tiny_model.config, tiny_model.params, residual, output, 1e9 * output)
    louder = last_site._scale(tiny_model.config, tiny_model.params, residual, output, 1.5 * output)
    np.testing.assert_allclose(loud, last_site.LOUDEST * alone, rtol=1e-6)
    assert ((louder > alone) & (louder < last_site.LOUDEST * alone)).all()
    np.testing.assert_allclose(alone, jnp.linalg.norm(residual + output, axis=-1).mean(-1), rtol=1e-6)


def test_a_kept_prompt_that_cannot_be_kept_fails_its_request(tiny_model):
    long = "in " * 80
    requests = [
        EditRequest("the cat sat in", "ab", keep=("then", "who hit the"), id="cat"),
        EditRequest("who hit the", "q", keep=("then",), id="who"),
        EditRequest("in the inn", "h", keep=("then", long), id="inn"),
        EditRequest("a dog", "h", keep=("a  dog",), id="spaces"),
    ]
    problems = check_requests(tiny_model, requests, False)
    assert set(problems) == {0, 2}
    assert (
        problems[0]
        == "it keeps 'who hit the', which the tokenizer reads like the prompt of 'who'; take it out of 'keep'"
    )
    assert problems[2].startswith(f"it keeps {long!r}: prompt and target have")
    alone = EditRequest("a dog", "h", keep=("a dog ",))
    assert "reads like its prompt" in check_requests(tiny_model, [alone], False)[0]
    # Of the tiny tokenizer no character is lost; one that knows fewer names them.
    known = [END, *"thecasinbd o", "Ġ"]
    few = Tokenizer(BPE({word: number for number, word in enumerate(known)}, []))
    few.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    few.decoder = decoders.ByteLevel()
    model = dataclasses.replace(tiny_model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=few, eos_token=END))
    lost = EditRequest("the cat", "dab", keep=("a fox",))
    assert "the kept prompt 'a fox' has characters that" in check_requests(model, [lost], False)[0]


def test_a_key_of_the_last_layer_is_silent_after_what_is_kept(tiny_model):
    requests = {
        0: EditRequest("the cat sat in", "ab", keep=("the cat ran in", "then")),
        1: EditRequest("in the inn", "h"),
    }
    items = [read_item(tiny_model, position, request, [], False) for position, request in requests.items()]
    sites = last_site.collect_items(tiny_model, items, [], None)
    targets = find_target_tokens([item.target for item in items], [1, 1])
    mean = np.zeros(tiny_model.config.hidden_size, np.float32)

    def negatives(count: int) -> np.ndarray:
        wanted = (tiny_model, items, requests, [], count, mean, sites, targets, np.arange(0), None)
        return last_site.find_subject_negatives(*wanted)(np.asarray([1, 0]))

    rows = [tiny_model.encode(text) for text in requests[0].keep]
    kept = collect(tiny_model, rows, [[len(row) - 1] for row in rows], tiny_model.layer(None)).query
    for count in (0, 2):
        rows_of_both = negatives(count)
        assert rows_of_both.shape == (2, count + 2, mean.size)
        np.testing.assert_allclose(rows_of_both[1, count:], kept, rtol=1e-5, atol=1e-5)
        assert not rows_of_both[0].any()
        assert not rows_of_both[1, :count].any()
    requests[0] = dataclasses.replace(requests[0], keep=())
    assert negatives(2).shape == (2, 2, mean.size)


def test_what_is_kept_stays_as_it_was(tiny_model, memory):
    """A prompt that changes with the request's is left alone once it is kept."""
    request = EditRequest("the cat sat in", "ab")
    near = tuple(f"the {word} sat in" for word in ("hat", "rat", "bat", "cats", "cap", "car"))
    patches, _ = tp.edit(tiny_model, [request], settings=DEFAULT, memory=memory)
    before, after = predictions_after(tiny_model, patches, near)
    (changed, *_) = [text for text, old, new in zip(near, before, after, strict=True) if old != new]
    kept = dataclasses.replace(request, keep=(changed,))
    assert measure(tiny_model, patches, [kept])["keep"] == 0
    patches, info = tp.edit(tiny_model, [kept], settings=DEFAULT, memory=memory)
    assert info.requests[0].held
    assert measure(tiny_model, patches, [kept])["keep"] == 1
    assert "keep" not in measure(tiny_model, patches, [request])


def predictions_after(model: tp.Model, patches: LayerPatches, prompts: Iterable[str]) -> tuple[list[int], list[int]]:
    """The next token after each prompt, without and with patches."""
    rows = [model.encode(text) for text in prompts]
    before, after = predictions(model, patches, rows, [[len(row) - 1] for row in rows])
    return before.tolist(), after.tolist()


def test_what_is_kept_is_saved_with_patches(tiny_model, tmp_path):
    requests = [EditRequest("the cat sat in", "ab", keep=("then", "a dog")), EditRequest("in the inn", "h")]
    results = tuple(tp.RequestInfo(f"edit-{number}", False, "failed") for number in range(2))
    none = {tiny_model.layer(None): create(tiny_model.config.hidden_size)}
    tp.save_patches(tmp_path / "out", tiny_model, none, requests, tp.EditInfo(results, 0.0, 0.0, 0.0, 0.0, 0))
    kept, other = store.read_patches(tmp_path / "out").edits
    assert kept["keep"] == ["then", "a dog"]
    assert "keep" not in other
