"""``tpatch edit --method``: another method's edits as a saved model; what cannot be one is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import write_tiny_folder

import tpatch_jax as tp
from tpatch_jax.cli import main as cli
from tpatch_jax.editors.registry import METHODS, method_settings
from tpatch_jax.editors.weights import changes_weights, edit_weights
from tpatch_jax.evaluation.answers import compare_answers
from tpatch_jax.evaluation.measure import measure

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("restored")

RECORDS = (
    {"id": "inn", "prompt": "in the inn", "target": "h", "rephrases": ["an inn"], "locality": ["the herd"]},
    {"id": "bad", "prompt": "in the inn", "target": ""},
)
FT = ["--method", "ft", "--set", "adam_rate=0.02"]


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    write_tiny_folder(tiny_model, folder / "tiny")
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n", "utf-8")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        patching.setenv("COLUMNS", "200")
        yield folder


def arguments(place: Path, *more: str, out: str = "out") -> list[str]:
    return ["edit", str(place / "tiny"), str(place / "requests.jsonl"), "-o", str(place / out), *more]


def test_the_edited_model_is_saved_and_measured(place, capsys):
    assert cli.main(arguments(place, *FT, "--json", out="ft")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    said = json.loads(captured.out.splitlines()[-1])
    assert (said["n"], said["method"], said["patches"], said["exact"]) == (2, "ft", 0, 0.5)
    assert [entry["id"] for entry in said["failed"]] == ["bad"]
    base, saved = (tp.load_model(place / name) for name in ("tiny", "ft"))
    requests = [tp.EditRequest(**record) for record in RECORDS]
    figures = measure(base, saved, requests)
    assert {name: said[name] for name in figures} == pytest.approx(figures)
    first = said["records"][0]
    assert first["as_wanted"]
    assert first["after"] == compare_answers(base, saved, requests)[0]["after"] != first["before"]
    # Fine-tuning of the last feed-forward network changes nothing else, and the model that was edited stays.
    leaves = zip(jax.tree_util.tree_leaves_with_path(base.params), jax.tree.leaves(saved.params), strict=True)
    unlike = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, one), other in leaves
        if not np.array_equal(one, other)
    ]
    assert unlike
    assert all(name.startswith(f"layers.{base.config.layers - 1}.ffn") for name in unlike)
    edited, _ = edit_weights(base, requests, "ft", settings=method_settings(["ft"], changes={"adam_rate": 0.02})["ft"])
    jax.tree.map(np.testing.assert_array_equal, edited.params, saved.params)


def test_in_words_it_says_what_was_made(place, capsys):
    single = ["--prompt", "in the inn", "--target", "h"]
    assert cli.main(["edit", str(place / "tiny"), *single, "-o", str(place / "words"), *FT]) == 0
    told = capsys.readouterr().out
    assert "1 request, by ft" in told
    assert "model saved in" in told
    assert f"tpatch generate {place / 'words'} --prompt 'in the inn'" in told


def test_where_nothing_holds_nothing_is_saved(place, capsys):
    (place / "bad.jsonl").write_text(json.dumps(RECORDS[1]) + "\n", "utf-8")
    source = [str(place / "tiny"), str(place / "bad.jsonl")]
    assert cli.main(["edit", *source, "-o", str(place / "none"), *FT]) == 1
    assert "nothing is saved" in capsys.readouterr().err
    assert not (place / "none").exists()


def test_which_methods_change_weights():
    weights = {name for name in METHODS if changes_weights(METHODS[name])}
    assert weights >= {"ft", "ft-all", "rome", "r-rome", "memit", "alphaedit", "ultraedit", "locft"}
    assert not weights & {"tpatcher", "grace", "neuraldb", "wise", "retrieval", "serac"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        *(
            (["--method", name], f"`tpatch eval --method {name}` measures them")
            for name in ("neuraldb", "wise", "retrieval", "serac", "grace")
        ),
        (["--method", "grace"], "`tpatch bank init BANK --model MODEL --method grace` keeps them"),
        (["--method", "rmoe"], "did you mean 'rome'"),
        (["--method", "unedited"], "no method 'unedited'"),
        (["--method", "ft", "--resume"], "--resume is for T-Patcher's edits"),
        (["--method", "ft", "--protect"], "--protect is for T-Patcher's edits"),
        (["--method", "ft", "--train-on-rephrases"], "--train-on-rephrases is for"),
        (["--method", "rome", "--preset", "paper-fever"], "paper-fever"),
        (["--method", "rome", "--set", "key_steps=3"], "key_steps"),
    ],
)
def test_what_makes_no_model_is_refused(place, capsys, more, said):
    assert cli.main(arguments(place, *more, out="refused")) == 1
    assert said in capsys.readouterr().err
    assert not (place / "refused").exists()
