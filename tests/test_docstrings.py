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
        "models.inputs",
        "errors",
        "evaluation.rephrasings",
        "training.data",
        "core.fit",
        "core.ffn",
        "core.memory",
        "models.foreign.cut",
        "models.foreign.linen",
        "models.foreign.nnx",
        "models.rows",
        "core.objective",
        "core.patch",
        "requests",
        "display.markup",
        "display.show",
        "display.view",
    ],
)
def test_examples_work(name):
    module = import_module(f"tpatch_jax.{name}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(module, extraglobs={"jax": jax, "jnp": jnp}, optionflags=flags)
    assert found.attempted > 0
    assert found.failed == 0
