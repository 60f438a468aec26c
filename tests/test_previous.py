"""Edits of earlier steps: neurons that give way to later ones, and rows that are collected anew."""

import jax.numpy as jnp
import numpy as np
import pytest

from tpatch_jax.core.patch import Patch, preactivations
from tpatch_jax.editors.reading import read_item
from tpatch_jax.editors.tpatcher.last_site import collect_bare
from tpatch_jax.editors.tpatcher.previous import (
    NO_SUBJECT,
    PreviousEdits,
    broken,
    fires,
    load_earlier,
    nothing,
    raise_thresholds,
    refreshed,
    remember,
    save_earlier,
)
from tpatch_jax.models.collection import collect, predicted
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest

REQUESTS = [EditRequest("the cat sat in", "ab"), EditRequest("who hit the", "q")]


@pytest.fixture
def earlier(tiny_model) -> PreviousEdits:
    """Two edits whose wanted tokens are what the model says anyway."""
    items = [read_item(tiny_model, number, request, [], False) for number, request in enumerate(REQUESTS)]
    heard = collect(tiny_model, [item.rows[0] for item in items], [range(len(i.rows[0])) for i in items], 1).query
    sites = collect_bare(tiny_model, items)
    empty = nothing(tiny_model.config.hidden_size, heard.dtype)
    found = remember(empty, items, [(2, 7), (NO_SUBJECT, NO_SUBJECT)], sites, heard)
    return found._replace(wanted=predicted(tiny_model, sites))


def neuron(query: np.ndarray, other: np.ndarray, response: float) -> Patch:
    """A neuron without an effect whose response is 2 on one query and ``response`` on another."""
    both = np.stack([query, other]).astype(np.float64)
    key = np.linalg.lstsq(both, np.asarray([2.0, response]), rcond=None)[0].astype(np.float32)
    return Patch(*(np.asarray(a, np.float32) for a in (key[None], np.zeros(1), np.zeros_like(key)[None])))


def test_a_neuron_gives_way_and_serves_its_own_edit_as_before(tiny_model, earlier):
    other = np.random.default_rng(0).normal(size=earlier.sites.query.shape[1]).astype(np.float32)
    own = earlier.sites.query[0]
    patch = neuron(own, other, 0.5)
    # responses to the other edits' rows must not be the strongest ones
    assert np.asarray(preactivations(patch, jnp.asarray(earlier.sites.query))).argmax() == 0
    higher = raise_thresholds(tiny_model, earlier, patch, other[None])
    np.testing.assert_allclose(preactivations(higher, jnp.asarray(own)), 2.0, rtol=1e-4)
    assert preactivations(higher, jnp.asarray(other)) < 0 < preactivations(patch, jnp.asarray(other))


@pytest.mark.parametrize("response", [-1.0, 1.9, 4.0])
def test_a_neuron_that_is_silent_or_cannot_part_the_two_stays(tiny_model, earlier, response):
    other = np.random.default_rng(0).normal(size=earlier.sites.query.shape[1]).astype(np.float32)
    patch = neuron(earlier.sites.query[0], other, response)
    assert raise_thresholds(tiny_model, earlier, patch, other[None]) is patch


def test_a_neuron_that_an_edit_needs_stays(tiny_model, earlier):
    other = np.random.default_rng(0).normal(size=earlier.sites.query.shape[1]).astype(np.float32)
    patch = neuron(earlier.sites.query[0], other, 0.5)
    # it fires on the second edit's rows too, weakly, and turns what they say
    weak = np.asarray(preactivations(patch, jnp.asarray(earlier.sites.query)))[1:, 0].max()
    patch = patch._replace(bias=patch.bias + 0.4 - min(weak, 0.0), value=100 * patch.key)
    needed = earlier._replace(wanted=predicted(tiny_model, earlier.sites, patch))
    assert len(broken(tiny_model, needed, patch)) == 0
    assert len(broken(tiny_model, needed, raise_thresholds(tiny_model, needed, patch, other[None]))) == 0


def test_where_a_neuron_of_an_earlier_layer_fires_is_collected_anew(tiny_model, earlier):
    width, rows = tiny_model.config.hidden_size, earlier.rows
    assert [tiny_model.decode(row) for row in rows] == [f"{r.prompt} {r.target}" for r in REQUESTS]
    # fires on the first edit's subject only: it looks along what sets that query apart
    first, rest = earlier.heard[2], np.delete(earlier.heard, 2, 0)
    key = np.linalg.lstsq(np.concatenate([first[None], rest[-3:]]), np.asarray([1.0, 0, 0, 0]), rcond=None)[0]
    bias = -0.5 * (1 + max(0.0, float((rest @ key).max()))) if (rest @ key).max() < 1 else -0.99
    deep = Patch(key[None].astype(np.float32), np.full(1, bias, np.float32), np.full((1, width), 3.0, np.float32))
    touched = fires(earlier, deep)
    expected = (
        (earlier.heard @ key + bias > 0)[: len(rows[0])].any(),
        (earlier.heard @ key + bias > 0)[len(rows[0]) :].any(),
    )
    assert touched[:, 0].tolist() == list(expected)
    assert touched[0, 0]
    model = attach(tiny_model, deep._replace(layer=np.ones(1, np.int32)))
    again = refreshed(model, earlier, touched)
    ends = earlier.lengths - earlier.starts
    assert not np.allclose(again.sites.query[: ends[0]], earlier.sites.query[: ends[0]])
    if not touched[1, 0]:
        np.testing.assert_array_equal(again.sites.query[ends[0] :], earlier.sites.query[ends[0] :])
    assert refreshed(model, earlier, np.zeros_like(touched)) is earlier


def test_saved_is_loaded(earlier):
    loaded = load_earlier(save_earlier(earlier))
    for name in PreviousEdits._fields:
        for old, new in zip(*(np.atleast_1d(getattr(one, name)) for one in (earlier, loaded)), strict=True):
            np.testing.assert_array_equal(old, new)
