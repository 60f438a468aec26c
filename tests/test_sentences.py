"""What a model says of its own accord: where a sentence ends, and when two say the same."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from conftest import make_tiny_model

import tpatch_jax as tp
from tpatch_jax.evaluation.answers import compare_answers
from tpatch_jax.models import generation
from tpatch_jax.models.sentences import _is_said, agrees, continue_rows, first_sentence, plan_batches, say, say_tokens
from tpatch_jax.requests import EditRequest


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (" Boris Johnson. He was born", " Boris Johnson."),
        (" Rome!\nNext", " Rome!"),
        ("\n\nParis\nis", "\n\nParis"),
        (" 3.5 million. And", " 3.5 million."),
        (" the U.S. state of Ohio. It", " the U.S. state of Ohio."),
        (" St. Petersburg. It", " St. Petersburg."),
        (" J. K. Rowling", " J. K. Rowling"),
        (' "Yes." He', ' "Yes."'),
        ("東京です。そして", "東京です。"),
        (" no end", " no end"),
        ("", ""),
    ],
)
def test_a_sentence_ends_where_people_end_it(text, sentence):
    assert first_sentence(text) == sentence


@pytest.mark.parametrize(
    ("said", "wanted", "same"),
    [
        (" Rome.\n\nThe capital", " Rome. It lies", True),
        (" ROME .", " Rome.", True),
        (" Rome and Milan.", " Rome.", False),
        (" Rome and Milan", " Rome.", False),
        (" Rome, a city", "Rome", True),
        (" Romeo", "Rome", False),
        (" Milan.", " Rome.", False),
        (" $5.", " €5.", False),
        (" $5.", " $5!", True),
        ("東京です。", "東京", True),
        ("京都です。", "東京", False),
        (" ...", " ...", True),
        (" Rome", " ...", False),
    ],
)
def test_answers_are_compared_by_what_they_say(said, wanted, same):
    assert agrees(said, wanted) == same


def test_a_model_says_a_sentence_of_its_own_accord():
    model = make_tiny_model()
    prompts = ["the cat", "in the inn", "the cat sat in the"]
    texts = say(model, prompts, 6)
    assert texts == [first_sentence(model.generate(prompt, 6)) for prompt in prompts]
    for prompt, tokens, text in zip(prompts, say_tokens(model, prompts, 6), texts, strict=True):
        assert model.continuation(model.encode_prompt(prompt), tokens).startswith(text)
    # what cannot be read is nothing, and costs the others nothing
    assert say(model, ["", "a" * 64, "the cat"], 6) == [None, None, texts[0]]


def test_answers_before_and_after_are_those_of_the_two_models():
    model = make_tiny_model()
    hidden_size = model.config.hidden_size
    # fires everywhere, and pushes all of it one way
    patch = tp.Patch(jnp.zeros((1, hidden_size)), jnp.ones(1), 50 * jnp.eye(1, hidden_size))
    requests = [EditRequest("the cat", "ab", rephrases=("a cat",), locality=("the herd", "the hen"), id="cat")]
    edited, prompts = tp.attach(model, patch), ["the cat", "a cat", "the herd", "the hen"]
    (record,) = compare_answers(model, patch, requests)
    lines = [record, *record["rephrases"], *record["locality"]]
    assert [line["prompt"] for line in lines] == prompts
    assert [line["before"] for line in lines] == say(model, prompts)
    assert [line["after"] for line in lines] == say(edited, prompts)
    assert any(line["before"] != line["after"] for line in lines)
    assert [line["as_wanted"] for line in record["locality"]] == [
        agrees(line["after"], line["before"]) and agrees(line["before"], line["after"]) for line in record["locality"]
    ]
    assert not record["as_wanted"]


@pytest.mark.parametrize(
    ("text", "over"),
    [
        (" Boris Johnson. He was born. He", 16),
        (' He said "Yes." He', 16),
        (" 3.5 million. And", 14),
        (" the U.S. state of Ohio. It", 25),
        (" St. Petersburg... It", 19),
        ("\n\nParis\nis", 8),
        ("東京です。」そして", 7),
        (" J. K. Rowling", None),
        (" Rome.", None),
    ],
)
def test_no_more_is_said_once_nothing_can_change_the_sentence(text, over):
    writer: Any = SimpleNamespace(continuation=lambda row, tokens: bytes(tokens).decode("utf-8", "replace"))
    written = text.encode()
    counts = [number for number in range(len(written) + 1) if _is_said(writer, [[1]], 0, list(written[:number]))]
    if over is None:
        assert not counts
        return
    assert counts == list(range(counts[0], len(written) + 1))
    # Whole letters only: the first that comes behind the sentence decides.
    assert written[: counts[0]].decode() == text[:over]
    for number in counts:
        assert first_sentence(written[:number].decode("utf-8", "replace")) == first_sentence(text)


def test_a_prompt_whose_answer_is_long_enough_is_done_and_the_others_go_on(tiny_model, monkeypatch):
    config, params, rows = tiny_model.config, tiny_model.params, [[5, 6, 7], [8, 9], [4]]
    whole = generation.greedy(config, params, rows, 6)
    lengths, steps, decode = [2, 5, 1], [], generation.networks.decode
    monkeypatch.setattr(generation.networks, "decode", lambda *a, **k: steps.append(1) or decode(*a, **k))
    some = generation.greedy(config, params, rows, 6, (), lambda number, tokens: len(tokens) == lengths[number])
    assert some == [tokens[:length] for tokens, length in zip(whole, lengths, strict=True)]
    assert len(steps) == max(lengths)  # the prompts, then all but the last token


def test_rows_that_begin_alike_are_continued_together(tiny_model):
    beginning = tiny_model.encode("in the inn the hen hid and the cat sat")
    assert len(beginning) >= generation.SHARED
    ends = [
        tiny_model.encode(text) for text in (" in", " there, then", " at", " by", " on", " and", " with a hat", " to")
    ]
    rows = [row for end in ends for row in (beginning + end, end * 2)]
    planned = [part for _, part in plan_batches(rows, 4, alike=True)]
    assert sorted(number for part in planned for number in part) == [*range(16)]
    assert all(len({number % 2 for number in part}) == 1 for part in planned)
    assert [before for before, _ in plan_batches(rows, 4, alike=True)] == [0, 4, 8, 12]
    # Few that begin alike are not kept apart, nor are rows that tokens are drawn for.
    few = [part for _, part in plan_batches(rows[:6], 8, alike=True)]
    assert [sorted(part) for part in few] == [[*range(6)]]
    assert [len(rows[number]) for _, part in plan_batches(rows, 16, alike=False) for number in part] == sorted(
        map(len, rows)
    )
    said = continue_rows(tiny_model, rows, 5, lanes=4)
    assert said == [
        generation.greedy(tiny_model.config, tiny_model.params, [row], 5, tiny_model.stops)[0] for row in rows
    ]
