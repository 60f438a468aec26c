"""Every example in a docstring works."""

import doctest
from importlib import import_module

import jax
import jax.numpy as jnp
import pytest

PROMOTION = "standard"


@pytest.mark.parametrize(
    "name",
    [
        "bank.journal",
        "editors.inputs",
        "errors",
        "evaluation.rephrasings",
        "finetuning_data",
        "fitting",
        "ffn",
        "memory",
        "models.cut",
        "models.foreign_linen",
        "models.foreign_nnx",
        "models.rows",
        "objective",
        "patch",
        "requests",
        "showing.markup",
        "showing.show",
        "showing.view",
    ],
)
def test_examples_work(name):
    module = import_module(f"tpatch_jax.{name}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(module, extraglobs={"jax": jax, "jnp": jnp}, optionflags=flags)
    assert found.attempted > 0
    assert found.failed == 0
