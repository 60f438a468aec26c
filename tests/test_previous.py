"""Edits of earlier steps: neurons whose thresholds are raised for later ones, and rows that are collected anew."""

import jax.numpy as jnp
import numpy as np
import pytest

from tpatch_jax.core.patch import Patch, preactivations
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.tpatcher.last_site import collect_bare
from tpatch_jax.editors.tpatcher.previous import (
    NO_SUBJECT,
    PreviousEdits,
    create_empty,
    find_broken,
    find_firing,
    load_previous,
    raise_thresholds,
    refresh_sites,
    remember,
    save_previous,
)
from tpatch_jax.models.collection import collect, predicted
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest

REQUESTS = [EditRequest("the cat sat in", "ab"), EditRequest("who hit the", "q")]


@pytest.fixture
def previous(tiny_model) -> PreviousEdits:
    """Two edits whose wanted tokens are what the model says anyway."""
    items = [read_item(tiny_model, number, request, [], False) for number, request in enumerate(REQUESTS)]
    rows = [item.rows[0] for item in items]
    subject_query = collect(tiny_model, rows, [range(len(row)) for row in rows], 1).query
    sites = collect_bare(tiny_model, items)
    empty = create_empty(tiny_model.config.hidden_size, subject_query.dtype)
    previous = remember(empty, items, [(2, 7), (NO_SUBJECT, NO_SUBJECT)], sites, subject_query)
    return previous._replace(wanted=predicted(tiny_model, sites))


def neuron(query: np.ndarray, other: np.ndarray, response: float) -> Patch:
    """A neuron without an effect whose response is 2 on one query and ``response`` on another."""
    both = np.stack([query, other]).astype(np.float64)
    key = np.linalg.lstsq(both, np.asarray([2.0, response]), rcond=None)[0].astype(np.float32)
    return Patch(*(np.asarray(a, np.float32) for a in (key[None], np.zeros(1), np.zeros_like(key)[None])))


def test_a_threshold_is_raised_and_the_neuron_serves_its_edit_as_before(tiny_model, previous):
    other = np.random.default_rng(0).normal(size=previous.sites.query.shape[1]).astype(np.float32)
    query = previous.sites.query[0]
    patch = neuron(query, other, 0.5)
    # responses to the other edits' rows must not be the strongest ones
    assert np.asarray(preactivations(patch, jnp.asarray(previous.sites.query))).argmax() == 0
    higher = raise_thresholds(tiny_model, previous, patch, other[None])
    np.testing.assert_allclose(preactivations(higher, jnp.asarray(query)), 2.0, rtol=1e-4)
    assert preactivations(higher, jnp.asarray(other)) < 0 < preactivations(patch, jnp.asarray(other))


@pytest.mark.parametrize("response", [-1.0, 1.9, 4.0])
def test_a_neuron_that_is_silent_or_cannot_part_the_two_stays(tiny_model, previous, response):
    other = np.random.default_rng(0).normal(size=previous.sites.query.shape[1]).astype(np.float32)
    patch = neuron(previous.sites.query[0], other, response)
    assert raise_thresholds(tiny_model, previous, patch, other[None]) is patch


def test_a_neuron_that_an_edit_needs_stays(tiny_model, previous):
    other = np.random.default_rng(0).normal(size=previous.sites.query.shape[1]).astype(np.float32)
    patch = neuron(previous.sites.query[0], other, 0.5)
    # it fires on the second edit's rows too, weakly, and turns what they say
    weak = np.asarray(preactivations(patch, jnp.asarray(previous.sites.query)))[1:, 0].max()
    patch = patch._replace(bias=patch.bias + 0.4 - min(weak, 0.0), value=100 * patch.key)
    needed = previous._replace(wanted=predicted(tiny_model, previous.sites, patch))
    assert len(find_broken(tiny_model, needed, patch)) == 0
    assert len(find_broken(tiny_model, needed, raise_thresholds(tiny_model, needed, patch, other[None]))) == 0


def test_where_a_neuron_of_an_earlier_layer_fires_is_collected_anew(tiny_model, previous):
    width, rows = tiny_model.config.hidden_size, previous.rows
    assert [tiny_model.decode(row) for row in rows] == [f"{r.prompt} {r.target}" for r in REQUESTS]
    # fires on the first edit's subject only: it looks along what sets that query apart
    first, rest = previous.subject_query[2], np.delete(previous.subject_query, 2, 0)
    key = np.linalg.lstsq(np.concatenate([first[None], rest[-3:]]), np.asarray([1.0, 0, 0, 0]), rcond=None)[0]
    bias = -0.5 * (1 + max(0.0, float((rest @ key).max()))) if (rest @ key).max() < 1 else -0.99
    deep = Patch(key[None].astype(np.float32), np.full(1, bias, np.float32), np.full((1, width), 3.0, np.float32))
    touched = find_firing(previous, deep)
    expected = (
        (previous.subject_query @ key + bias > 0)[: len(rows[0])].any(),
        (previous.subject_query @ key + bias > 0)[len(rows[0]) :].any(),
    )
    assert touched[:, 0].tolist() == list(expected)
    assert touched[0, 0]
    model = attach(tiny_model, {1: deep})
    again = refresh_sites(model, previous, touched)
    ends = previous.lengths - previous.starts
    assert not np.allclose(again.sites.query[: ends[0]], previous.sites.query[: ends[0]])
    if not touched[1, 0]:
        np.testing.assert_array_equal(again.sites.query[ends[0] :], previous.sites.query[ends[0] :])
    assert refresh_sites(model, previous, np.zeros_like(touched)) is previous


def test_saved_is_loaded(previous):
    loaded = load_previous(save_previous(previous))
    for name in PreviousEdits._fields:
        for old, new in zip(*(np.atleast_1d(getattr(one, name)) for one in (previous, loaded)), strict=True):
            np.testing.assert_array_equal(old, new)
