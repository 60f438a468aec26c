"""The tiny model that other tests edit is a model like any other."""

import numpy as np
from conftest import same

from tpatch_jax.models.model import load_model
from tpatch_jax.models.rows import tokens_array


def test_a_written_model_is_read_back_bit_for_bit(tiny_model, tiny_folder, tmp_path):
    loaded = load_model(tiny_folder(tmp_path))
    assert loaded.config == tiny_model.config
    assert same(loaded.params, tiny_model.params)
    text = "in the naïve — 日本"
    assert loaded.encode(text) == tiny_model.encode(text)
    assert loaded.decode(loaded.encode(text)) == text


def test_resuming_from_the_cut_is_the_whole_network(tiny_model):
    tokens = tokens_array([tiny_model.encode("the cat"), tiny_model.encode("in the hat sat")], 16)
    whole = tiny_model.apply(tokens)
    assert np.ptp(np.asarray(whole)) > 1  # it says something
    for layer in range(tiny_model.config.layers):
        traced = tiny_model.trace(tokens, layer)
        np.testing.assert_allclose(tiny_model.resume(traced, traced.output), whole, rtol=1e-5, atol=1e-5)
