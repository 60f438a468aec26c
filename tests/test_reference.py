"""Our Llama says what torch's said (`reference/make_llama.py`), layer by layer; runs without torch."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tpatch_jax.models import checkpoint, decoder

FOLDER = Path(__file__).parent / "reference" / "llama"


@pytest.fixture(scope="module")
def network():
    config, params, _ = checkpoint.read_folder(FOLDER)
    return config, params, load_file(FOLDER.parent / "llama_expected.safetensors")


@pytest.mark.parametrize("layer", range(3))
def test_each_layer_agrees(network, layer):
    config, params, expected = network
    traced = decoder.trace(config, params, jnp.asarray(expected["tokens"]), layer)
    found = traced.context["residual"] + traced.output
    np.testing.assert_allclose(found, expected[f"layer_{layer}"], rtol=0, atol=2e-4)


def test_the_logits_agree(network):
    config, params, expected = network
    found = np.asarray(decoder.apply(config, params, jnp.asarray(expected["tokens"])))
    assert np.ptp(expected["logits"]) > 5
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=2e-4)
