"""Passes that texts share: rows run behind a common beginning are as if they had been run whole."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model as tiny_model_of

from tpatch_jax.models import collection, networks
from tpatch_jax.models.collection import collect, collect_once
from tpatch_jax.models.rows import tokens_array

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPARE = 8
tokens = lambda least, most: st.lists(st.integers(1, 299), min_size=least, max_size=most)  # noqa: E731


@pytest.fixture(scope="module")
def windowed():
    """A model of which some layers see only a few tokens back."""
    return make_tiny_model(
        3,
        {
            **make_tiny_model().settings,
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": 4,
        },
    )


def check(model, texts, rests, which, layer):
    rows = [[*texts[own], *rest] for own, rest in zip(which, rests, strict=True)]
    lengths = np.asarray([len(text) for text in texts], np.int32)
    begun = networks.begin(model.config, model.params, tokens_array(texts, SPARE))
    whole = model.trace(tokens_array(rows, 2 * SPARE), layer)
    first = lengths[np.asarray(which)]
    after = networks.trace_after(
        model.config, model.params, tokens_array(rests, SPARE), layer, begun, jnp.asarray(which), jnp.asarray(first)
    )
    for lane, rest in enumerate(rests):
        span = slice(int(first[lane]), int(first[lane]) + len(rest))
        for own, expected in (
            (after.query, whole.query),
            (after.output, whole.output),
            (after.context["residual"], whole.context["residual"]),
        ):
            np.testing.assert_allclose(own[lane, : len(rest)], expected[lane, span], rtol=1e-5, atol=1e-5)


@given(
    texts=st.lists(tokens(1, SPARE), min_size=3, max_size=3),
    rests=st.lists(tokens(1, SPARE), min_size=4, max_size=4),
    which=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    layer=st.sampled_from([0, 2]),
)
def test_rows_behind_beginnings_of_other_lengths_are_traced_as_a_whole(tiny_model, texts, rests, which, layer):
    check(tiny_model, texts, rests, which, layer)


@given(
    texts=st.lists(tokens(1, SPARE), min_size=3, max_size=3),
    rests=st.lists(tokens(1, SPARE), min_size=4, max_size=4),
    which=st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_a_window_reaches_back_into_the_beginning_and_no_further(windowed, texts, rests, which):
    assert windowed.config.kind(0).window == 4
    check(windowed, texts, rests, which, 2)


@given(st.data())
def test_collecting_with_beginnings_is_collecting_without(tiny_model, data):
    begins = [[7, 8, 9], [10, 11, 12, 13, 14]]
    count = collection.WORTH_SHARING
    rests = data.draw(st.lists(tokens(2, SPARE), min_size=3 * count, max_size=3 * count))
    rows = [[*(begins[number % 3] if number % 3 < 2 else []), *rest] for number, rest in enumerate(rests)]
    # Positions inside a beginning, at its end, and after it.
    positions = [
        sorted(data.draw(st.sets(st.integers(max(0, len(row) - 3), len(row) - 1), min_size=1))) for row in rows
    ]
    plain = collect(tiny_model, rows, positions, 2)
    shared = collect(tiny_model, rows, positions, 2, begins=begins)
    chex.assert_trees_all_close(shared, plain, rtol=1e-5, atol=1e-5)


def test_beginnings_are_run_once_and_only_if_worth_it(tiny_model, monkeypatch):
    calls = []
    begin = networks.begin
    monkeypatch.setattr(collection.networks, "begin", lambda *a: calls.append(a) or begin(*a))
    rows = [[7, 8, 9, 20 + number, 21] for number in range(collection.WORTH_SHARING)]
    collect(tiny_model, rows[:-1], [[4]] * (len(rows) - 1), 2, begins=[[7, 8, 9]])
    assert not calls
    done = []
    collect(tiny_model, rows, [[4]] * len(rows), 2, done.append, begins=[[7, 8, 9]])
    assert len(calls) == 1
    assert done[-1] == len(rows)
    # A row of which a position lies inside the beginning is run whole.
    calls.clear()
    collect(tiny_model, rows, [[1, 4]] * len(rows), 2, begins=[[7, 8, 9]])
    assert not calls


@given(st.data())
def test_texts_that_begin_others_are_read_in_them(tiny_model, data):
    stem = data.draw(tokens(2, SPARE))
    ends = data.draw(st.lists(tokens(0, 3), min_size=4, max_size=4))
    rows = [[*stem, *end] for end in ends] + [stem, stem, data.draw(tokens(1, SPARE)), [5]]
    every = [range(len(row)) for row in rows]
    some = [sorted(data.draw(st.sets(st.sampled_from(list(span))))) for span in every]
    for positions in (every, some):
        once = collect_once(tiny_model, rows, positions, 1)
        for array, expected in zip(once, collect(tiny_model, rows, positions, 1), strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


def test_each_token_is_read_once(tiny_model, monkeypatch):
    read = []

    def counted(model, rows, positions, layer, progress=None):
        read.extend(map(list, rows))
        return collect(model, rows, positions, layer, progress)

    monkeypatch.setattr(collection, "collect", counted)
    done = []
    # the prompt of two answers, of which one has a single token; and what stands behind the last position
    rows = [[1, 2, 3, 9], [1, 2, 3, 7, 8], [4, 5, 6], [4, 5, 6]]
    sites = collect_once(tiny_model, rows, [[2], [2, 3], [0, 1], []], 0, done.append)
    assert sorted(read) == [[1, 2, 3, 7], [4, 5]]
    assert len(sites.query) == 5
    assert np.array_equal(sites.query[0], sites.query[1])
    assert done[-1] == 4
    read.clear()
    assert collect_once(tiny_model, [[1, 2]], [[]], 0).query.shape == (0, tiny_model.config.hidden_size)
    assert read == []


def test_an_encoders_texts_are_read_whole():
    encoder = tiny_model_of("bert")
    rows = [[1, 2, 3], [1, 2, 3, 4]]
    once, whole = (one(encoder, rows, [[0], [0]], 1) for one in (collect_once, collect))
    assert np.array_equal(once.query, whole.query)
