"""What the table of ``tpatch models`` promises: an edit that holds in every family, and tests behind every column."""

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from tiny_families import (
    KIN,
    NAMES,
    shallow_model,
    tiny_model,
    tiny_pictures,
    tiny_sound,
    write_pictures,
    write_recordings,
)

from tpatch_jax.audio import AudioPrompt
from tpatch_jax.cli import main as cli
from tpatch_jax.editors.tpatcher.editor import edit
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.images import ImagePrompt
from tpatch_jax.models import networks
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.collection import batches
from tpatch_jax.models.families import registry as families
from tpatch_jax.models.families.promises import PROMISES, promised
from tpatch_jax.models.families.registry import FAMILIES
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach, merge
from tpatch_jax.models.rows import place_in
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.settings import change

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"  # optax takes steps

QUICK = change(
    dataclasses.replace(PRESETS["default"], contexts=1, input_contexts=1, other_subjects=0, attempts=2),
    {"key_steps": 8, "input_key_steps": 8, "value_steps": 8, "lanes": 2},
)
REQUEST = EditRequest("the cat sat in", "ab")


def loud(model: Model) -> Model:
    """A norm behind the FFN bounds what a neuron can say; its scale is large in the last layers of trained models."""
    if not model.config.sandwich:
        return model
    layers = dict(model.params["layers"])
    last = layers[model.layer(None)]
    layers[model.layer(None)] = {**last, "norm_ffn": {"scale": last["norm_ffn"]["scale"] + 4.0}}
    return model.with_params({**model.params, "layers": layers})


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_holds(name, letters, inputs, tmp_path):
    """In a random network of the family: before it the target does not come out, after it it does, merged too."""
    model = loud(shallow_model(name) if name in KIN else tiny_model(name))
    request = REQUEST
    if model.config.image:
        request = EditRequest(ImagePrompt(tiny_pictures(model, 1)[0]), "")
        inputs = write_pictures(tmp_path / "pictures.npz", model)
    if model.audio:
        # With a place, so that the target is taken for the whole transcript.
        request = EditRequest(AudioPrompt(tiny_sound(1)).placed((0, 2)), REQUEST.target)
        inputs = write_recordings(tmp_path / "recordings")
    if model.config.labels:
        (said,) = model.classify([request.prompt])
        request = EditRequest(request.prompt, next(label for label in model.config.labels if label != said))
    prompt, target = model.encode_prompt(request.prompt), model.encode_target(request.prompt, f" {request.target}")
    row = [*prompt, *target]
    ((_, batch),) = batches(model.config, [row])
    places = [place_in(model.config, row, len(prompt) - 1 + number) for number in range(len(target))]

    def logits(model: Model) -> np.ndarray:
        found = np.asarray(model.apply(batch))
        return found if model.config.labels else found[0, places]

    assert logits(model).argmax(-1).tolist() != target
    memory = letters if model.config.architecture == "decoder" else inputs
    patches, info = edit(model, [request], settings=QUICK, memory=memory, cache=False)
    assert [(result.held, result.reason) for result in info.requests] == [(True, "")]
    attached, merged = (logits(put(model, patches)) for put in (attach, merge))
    assert merged.argmax(-1).tolist() == target
    # Random pictures look nearly alike to a random network: a key that parts them is large, and so is what it rounds.
    assert relative(merged, attached) < (1e-4 if model.config.image else 1e-5)


# --- the table ---


def test_its_rows_are_the_families(capsys, monkeypatch):
    assert cli.main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in found["families"]] == [family.name for family in FAMILIES]
    for row, family in zip(found["families"], FAMILIES, strict=True):
        assert row == {"name": family.name, "model_types": list(family.model_types), **promised(family)}
    assert found["tests"] == {promise.name: promise.test for promise in PROMISES}

    # A terminal of the usual width cuts no name short.
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    said = " ".join(out.split("all of them: ", 1)[1].split())
    assert said.startswith(", ".join(f"{promise.name} {promise.claim}" for promise in PROMISES if promise.claim))
    lines = out.split("families: any folder", 1)[1].splitlines()
    heading, *rows = [[cell.strip() for cell in line.strip("│┃").split(line[0])] for line in lines if line[:1] in "│┃"]
    columns = [promise.name for promise in PROMISES if not promise.claim]
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


# --- a new family ---

EXAMPLE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True, "attention_bias": False}])
def test_the_worked_example_agrees_with_torch(changes, tmp_path, monkeypatch):
    """The blocks of CONTRIBUTING.md as they stand there: the family's file, and the row of its reference."""
    torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")
    sys.path.insert(0, str(Path(__file__).parent / "reference"))
    import make_references

    code, row = re.findall(r"```python\n(.*?)```", EXAMPLE, re.DOTALL)
    made: dict[str, Any] = {}
    exec(code, made)
    assert made["SEED_OSS"].name not in [family.name for family in FAMILIES]
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, made["SEED_OSS"]))
    settings = eval(f"{{{row.strip()}}}", vars(make_references))
    monkeypatch.setitem(make_references.SETTINGS, "seed_oss", settings["seed_oss"])
    reference = make_references.randomise(make_references.build("seed_oss", **changes), 0)
    reference.save_pretrained(tmp_path / "saved")
    config, params, _ = checkpoint.read_folder(tmp_path / "saved")
    assert (config.ffn_bias, config.query_bias, config.output_bias) == (bool(changes), not changes, True)
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = make_references.run(reference, tokens)
    for layer, found in enumerate(networks.residuals(config, params, jnp.asarray(tokens.numpy(), jnp.int32))):
        np.testing.assert_allclose(found, expected[f"layer_{layer}"].numpy(), rtol=0, atol=2e-4)
    logits = networks.logits(config, params, found)
    np.testing.assert_allclose(logits, expected["logits"].numpy(), rtol=0, atol=2e-4)
