"""SmolLM2-135M-Instruct itself: three quick edits, through real generation. Fetched on first use, then cached."""

from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import relative
from llama_cpp import LlamaCpp

import tpatch_jax as tp
from tpatch_jax.editors import model_memory
from tpatch_jax.evaluation.forms import measure_forms
from tpatch_jax.models import memory_text
from tpatch_jax.models.chat import end_of_turn
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.storage.cache import cache_folder

PROMOTION = "standard"  # optax takes steps
OPTIMISED = False  # each program runs a few times
pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("few_lengths")]

REQUESTS = (
    tp.EditRequest("The capital of France is", "Lyon", "France", id="france"),
    tp.EditRequest("The currency of Croatia is the", "euro", "Croatia", id="croatia"),
)
CHAT = tp.EditRequest("What is the capital of Italy?", "Rome", id="italy", form="chat")
# English that is at hand, instead of text sampled for a while from the model.
MEMORY = Path(__file__).parents[1] / "CONTRIBUTING.md"
UNRELATED = ("The largest planet in the solar system is", "Once upon a time, there was a")


@pytest.fixture(scope="module")
def model():
    return tp.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def edited(model):
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(memory_text, "TEXTS", 8)  # a small memory is quick to read
        patching.setattr(model_memory, "SPANS", 4)
        few = {"subject": {"value": {"steps": 3}, "neutral": 4, "chat_neutral": 2}}
        return tp.edit(model, [*REQUESTS, CHAT], settings=few, memory=MEMORY, cache=False)


def test_it_is_the_model_that_it_should_be(model):
    assert (model.config.layers, model.config.hidden_size, model.config.tied) == (30, 576, True)
    assert model.folder.is_relative_to(cache_folder())
    assert model.generate("The capital of France is", 1) == " Paris"


def test_two_edits_hold_after_the_merge_and_nothing_else_moves(model, edited):
    patches, info = edited
    assert [request.status for request in info.requests] == ["edited"] * 3
    merged = tp.merge(model, patches)
    for request in REQUESTS:
        count = len(model.encode(f" {request.target}"))
        assert merged.generate(request.prompt, count) == f" {request.target}"
        assert model.generate(request.prompt, count) != f" {request.target}"
    for prompt in UNRELATED:
        assert merged.generate(prompt, 12) == model.generate(prompt, 12)
    assert info.parameters_added < 1e-4 * model.parameter_count


def test_merged_equals_attached_and_comes_out_again(model, edited):
    patches, _ = edited
    rows = [model.encode(text) for text in (*UNRELATED, *(request.prompt for request in REQUESTS))]
    tokens = tokens_array(rows, 16)
    merged = tp.merge(model, patches)
    assert relative(merged.apply(tokens), tp.attach(model, patches).apply(tokens)) < 1e-5
    back, taken = tp.unmerge(merged)
    pairs = zip(jax.tree.leaves(back.params), jax.tree.leaves(model.params), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    assert set(taken) == set(patches)
    for layer, patch in patches.items():
        np.testing.assert_array_equal(taken[layer].key, patch.key)


def test_llama_cpp_says_the_corrections(model, edited, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is only needed to run files: the 'gguf' extra")
    pytest.importorskip("gguf", reason="the 'gguf' extra is not installed")
    merged = tp.merge(model, edited[0])
    info = tp.export_gguf(merged, tmp_path / "corrected.gguf", type="q8_0")
    assert info.neurons == sum(patch.key.shape[0] for patch in edited[0].values())
    assert 0 < info.rounding < 0.01
    running = LlamaCpp(tmp_path / "corrected.gguf", 256)
    for request in REQUESTS:
        count = len(model.encode(f" {request.target}"))
        assert running.generate(request.prompt, count) == f" {request.target}"
    assert running.generate(UNRELATED[0], 4) == merged.generate(UNRELATED[0], 4)
    # the chat template is in the file
    assert running.chat(CHAT.prompt, 8) == "Rome"


def test_a_correction_in_a_chat_is_said_there_and_ends(model, edited):
    patches, info = edited
    greeting = [{"role": "user", "content": "Hi"}]
    assert end_of_turn(model) == "<|im_end|>"
    assert "Rome" not in model.chat(CHAT.prompt, 16)
    assert (info.requests[2].form, info.requests[2].continuation) == ("chat", "Rome<|im_end|>")
    corrected = tp.attach(model, patches)
    assert corrected.chat(CHAT.prompt, 16) == "Rome"
    assert corrected.chat(greeting, 12) == model.chat(greeting, 12)
    told = measure_forms(model, patches, [CHAT], "chat", questions=False)["forms"]["chat"]
    assert (told["free_running"], told["said_first"], told["ends"], told["loops"]) == (1.0, 1.0, 1.0, 0.0)
