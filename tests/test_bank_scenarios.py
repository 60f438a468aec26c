"""The worked scenarios of the README on SmolLM2-135M-Instruct, shortened."""

from pathlib import Path

import pytest
from scenarios import domain_terms, office_holder, private_data

import tpatch_jax as tp
from tpatch_jax.editors import model_memory
from tpatch_jax.models import memory_text

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.real_model
OPTIMISED = False

# English that is at hand, instead of text sampled for a minute from the model.
MEMORY = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(memory_text, "TEXTS", 16)  # a small memory is quick to read
        patching.setattr(model_memory, "SPANS", 8)
        yield tp.load_model("smollm2-135m")


def test_an_office_holder_changes(model, tmp_path):
    *months, undone = office_holder.run(model, tmp_path / "bank", 2, MEMORY)
    assert [line["said"] for line in months] == list(office_holder.HOLDERS[:2])
    assert [line["superseded"] for line in months] == [[], ["month-1"]]
    assert [(line["active"], line["broken"], line["guards_broken"]) for line in months] == [(1, [], [])] * 2
    assert undone["said"] == undone["holder"]
    assert undone["states"] == {"month-1": "active", "month-2": "removed"}


def test_private_data_becomes_a_refusal(model, tmp_path):
    result = private_data.run(model, tmp_path / "bank", MEMORY)
    assert result["failed"] == ()
    for prompt in private_data.PROMPTS:
        assert result["after"][prompt].strip() == private_data.REFUSAL != result["before"][prompt].strip()
    assert [result["after"][prompt] == result["before"][prompt] for prompt in private_data.AROUND] == [True] * 5
    assert result["verified"] == ((), 2, (), 5)


def test_terms_are_taught_and_one_is_withdrawn(model, tmp_path):
    result = domain_terms.run(model, tmp_path / "bank", 6, MEMORY)
    assert (result["added"], result["taught"].broken, result["taught"].checked) == (6, (), 6)
    assert (result["left"].broken, result["left"].checked) == ((), 5)
    assert result["withdrawn"]["meaning"] not in result["withdrawn"]["after"]
