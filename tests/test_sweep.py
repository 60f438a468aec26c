"""The sweep over layers and positions: every site is measured, the best is chosen, its settings are read back."""

import json

import pytest
from conftest import make_tiny_model, write_tiny_folder

from tpatch_jax.cli import main as cli
from tpatch_jax.cli.common import settings_of
from tpatch_jax.editors.base import EditInfo
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation import sweep as sweep_
from tpatch_jax.evaluation.sweep import best, sweep
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps
MEMORY = "The theory in the inn: winter thins the herd, and the hen then hides. Numbers 1 to 9, and then some more. "
QUICK = ["steps=60", "longest=64", "key_floor=0.5", "contexts=2", "value_contexts=2", "neutral=1"]
LINES = [
    {"prompt": "the fox sat in", "target": "b", "subject": "fox", "rephrases": ["a fox sat in"], "locality": ["who"]},
    {"prompt": "a wolf hit the", "target": "q", "subject": "wolf", "rephrases": ["the wolf hit the"]},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_folder(make_tiny_model(hidden_size=32, head_dim=16), folder / "tiny")
    (folder / "memory.txt").write_text(3 * MEMORY, "utf-8")
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, LINES)), "utf-8")
    return folder


def test_the_command(place, capsys, monkeypatch):
    monkeypatch.setenv("TPATCH_CACHE", str(place / "cache"))
    sets = [part for one in QUICK for part in ("--set", one)]
    arguments = ["sweep", str(place / "tiny"), str(place / "requests.jsonl"), "-o", str(place / "out"), *sets]
    arguments += ["--memory", str(place / "memory.txt"), "--layers", "0,1"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    sites = {(row["layer"], row["position"]) for row in found["rows"]}
    assert sites == {(layer, position) for layer in (0, 1) for position in ("subject", "prompt")}
    # in a random network not every subject can be parted from the rest at every site
    assert max(row["exact"] for row in found["rows"]) >= 0.5
    assert found["best"] in found["rows"]
    written = json.loads((place / "out" / "sweep.json").read_text("utf-8"))
    assert written["best"] == found["best"]
    assert (written["n"], written["requests"]) == (2, "requests.jsonl")
    settings = settings_of(None, str(place / "out" / "settings.yaml"), [])
    chosen = settings.site, settings.layer, settings.subject.token
    assert chosen == ("subject", str(found["best"]["layer"]), found["best"]["position"])
    assert cli.main(arguments) == 1
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "0,two"], "is no list of layers"),
        (["--layers", "2"], "layer 2 cannot be swept; choose from 0 to 1"),
        (["--positions", "middle"], "position 'middle' does not exist"),
        (["-n", "3"], "-n 3: "),
    ],
)
def test_what_cannot_be_swept(place, tmp_path, capsys, more, said):
    arguments = ["sweep", str(place / "tiny"), str(place / "requests.jsonl"), "-o", str(tmp_path / "out"), *more]
    assert cli.main(arguments) == 1
    assert said in capsys.readouterr().err


def test_a_request_without_a_subject(tiny_model):
    with pytest.raises(TPatchError, match="lonely has no subject; a sweep needs requests with subjects"):
        sweep(tiny_model, [EditRequest("who", "q", id="lonely")], PRESETS["default"], [0])


def test_of_equals_the_cheapest_is_best():
    rows = [{"score": 0.9, "forward_equivalents": cost, "layer": cost} for cost in (3.0, 1.0, 2.0)]
    assert best([*rows, {"score": 0.8, "forward_equivalents": 0.5, "layer": 9}])["layer"] == 1.0


def test_a_sweep_measures_the_site_alone(tiny_model, monkeypatch):
    """What a neuron at a subject leaves wrong is not completed elsewhere; each site is told by its settings."""
    seen, info = [], EditInfo((), 1.0, 1.0, 1.0, 1.0, 0)
    monkeypatch.setattr(sweep_, "edit", lambda *_, settings, **__: seen.append(settings) or ({}, info))
    figures = {"exact": 1.0, "rephrase_exact": 0.5, "rephrase_token_accuracy": 0.5, "locality": None}
    monkeypatch.setattr(sweep_, "measure", lambda *_: figures)
    rows = sweep(tiny_model, [EditRequest("who", "q", subject="who")], PRESETS["default"], [0, 1], ["prompt"])
    assert [(s.site, s.layer, s.subject.token, s.complete) for s in seen] == [
        ("subject", layer, "prompt", False) for layer in "01"
    ]
    assert [row["score"] for row in rows] == pytest.approx([2 / 3, 2 / 3])
