"""What the table of ``tpatch models`` promises: an edit that holds in every family, and tests behind every column."""

import ast
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from tiny_families import NAMES, tiny_model

from tpatch_jax import cli
from tpatch_jax.configuration import change
from tpatch_jax.editors.tpatcher import PRESETS, edit
from tpatch_jax.models.families import FAMILIES
from tpatch_jax.models.model import Model, attach, merge
from tpatch_jax.models.promises import PROMISES, promised
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps

# one token a letter, so that all rows are of one length and few shapes are compiled
MEMORY = "".join(np.random.default_rng(3).choice(list("abcdfgjklmopqrsuvwxyz0123456789"), 8 * 64))
QUICK = change(
    dataclasses.replace(PRESETS["default"], contexts=1, swaps=0, attempts=2),
    {"key_steps": 8, "value_steps": 8, "lanes": 2},
)
REQUEST = EditRequest("the cat sat in", "ab")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Nearly all the time here is compilation, so these small networks do without most optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "memory.txt"
    path.write_text(MEMORY, "utf-8")
    return path


def loud(model: Model) -> Model:
    """Where a norm follows the FFN it bounds what a neuron can say; its scale is large in trained models' last layers."""
    if not model.config.sandwich:
        return model
    layers = dict(model.params["layers"])
    last = layers[model.layer(None)]
    layers[model.layer(None)] = {**last, "norm_ffn": {"scale": last["norm_ffn"]["scale"] + 4.0}}
    return model.with_params({**model.params, "layers": layers})


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_holds(name, memory):
    """In a random network of the family: before it the target does not come out, after it it does, merged too."""
    model = loud(tiny_model(name))
    prompt, target = model.encode_prompt(REQUEST.prompt), model.encode(" ab")
    tokens = jnp.asarray([[*prompt, *target, *[0] * (8 - len(prompt) - len(target))]])
    span = slice(len(prompt) - 1, len(prompt) + len(target) - 1)
    assert np.asarray(model.apply(tokens))[0, span].argmax(-1).tolist() != target
    patch, info = edit(model, [REQUEST], settings=QUICK, memory=memory, cache=False)
    assert [(result.held, result.reason) for result in info.requests] == [(True, "")]
    attached, merged = (np.asarray(put(model, patch).apply(tokens)) for put in (attach, merge))
    assert merged[0, span].argmax(-1).tolist() == target
    assert relative(merged, attached) < 1e-5


# --- the table ---


def test_its_rows_are_the_families(capsys, monkeypatch):
    assert cli.main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in found["families"]] == [family.name for family in FAMILIES]
    for row, family in zip(found["families"], FAMILIES, strict=True):
        assert row == {"name": family.name, "model_types": list(family.model_types), **promised(family)}
    assert found["tests"] == {promise.name: promise.test for promise in PROMISES}

    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.split("families: any folder", 1)[1].splitlines()
    heading, *rows = [[cell.strip() for cell in line.strip("│┃").split(line[0])] for line in lines if line[:1] in "│┃"]
    columns = [promise.name for promise in PROMISES]
    assert heading == ["family", "model_type in config.json", *columns]
    assert rows == [
        [family.name, ", ".join(family.model_types), *(promised(family)[name] for name in columns)]
        for family in FAMILIES
    ]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.name)
def test_every_column_has_its_test(promise):
    path, _, name = promise.test.partition("::")
    module = ast.parse((Path(__file__).parent.parent / path).read_text("utf-8"))
    assert name in [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
