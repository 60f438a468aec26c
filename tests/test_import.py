"""What importing the package costs, seen in the modules that it brings along, and that it is typed."""

import subprocess
import sys
from pathlib import Path

import pytest

import tpatch_jax

HEAVY = "{'jax', 'flax', 'optax', 'transformers', 'numpy', 'torch', 'matplotlib', 'mkdocs', 'tokenizers'}"


@pytest.mark.parametrize(
    ("code", "brought"),
    [
        ("import tpatch_jax", []),
        ("from tpatch_jax import *", ["flax", "jax", "numpy", "optax"]),
    ],
)
def test_imports_bring_no_more_than_they_need(code, brought):
    script = f"import sys\n{code}\nprint(*sorted({HEAVY} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == brought


def test_the_package_says_that_it_is_typed():
    assert (Path(tpatch_jax.__file__).parent / "py.typed").exists()
