"""Every example in a docstring works."""

import doctest
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import tpatch_jax

PROMOTION = "standard"
ROOT = Path(tpatch_jax.__file__).parent
MODULES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]


def test_there_are_examples():
    assert {"tpatch_jax.core.fit", "tpatch_jax.models.sharding", "tpatch_jax.editors.rome.rank_one"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_work(name):
    module, skip = import_module(name), doctest.OPTIONFLAGS_BY_NAME["SKIP"]
    examples = [example for test in doctest.DocTestFinder().find(module) for example in test.examples]
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(module, extraglobs={"jax": jax, "jnp": jnp}, optionflags=flags)
    assert examples
    assert results.attempted >= sum(skip not in example.options for example in examples)
    assert results.failed == 0
