"""A long edit: its bar, the time that is left, and going on after an interruption."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import make_tiny_model, write_tiny_folder

from tpatch_jax.cli import main as cli
from tpatch_jax.display.progress import Estimate, Phase, edit_phases, edit_progress, format_seconds
from tpatch_jax.editors.tpatcher import rounds, subject_site
from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.finished_parts import FinishedParts

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "restored")

MEMORY = (
    "The theory in the inn: winter thins the herd, and the hen then hides. Numbers 1 to 9, and then some more. " * 3
)
QUICK = ("key_steps=16", "rounds=1", "negatives=32", "lanes=4", "steps=10", "longest=16", "shorter=0")
SUBJECTS = ("neutral=1", "value_lanes=2", "contexts=2", "other_subjects=1", "key_floor=0.5", "many_from=1000")
LINES = (
    {
        "id": "fox",
        "prompt": "the fox sat in",
        "target": "ab",
        "subject": "fox",
        "rephrases": ["a fox sat in"],
        "locality": ["the inn", "the herd"],
    },
    {"prompt": "a wolf hit the", "target": "q", "subject": "wolf"},
    {"prompt": "the hen ran to", "target": "z", "subject": "hen"},
    {"prompt": "my cat is in the", "target": "k", "subject": "cat"},
    {"prompt": "one pig may", "target": "jj", "subject": "pig"},
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("interrupted")
    write_tiny_folder(make_tiny_model(hidden_size=32, head_dim=16), folder / "tiny")
    (folder / "memory.txt").write_text(MEMORY, "utf-8")
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n", "utf-8")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        yield folder


def arguments(place: Path, out: str, *more: str, requests: str = "requests.jsonl", site: str = "subject") -> list[str]:
    changes = [text for change in (*QUICK, *SUBJECTS, f"site={site}") for text in ("--set", change)]
    source = [str(place / "tiny"), str(place / requests), "-o", str(place / out)]
    return ["edit", *source, "--memory", str(place / "memory.txt"), *changes, "--json", *more]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "patches.safetensors")


def interrupted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int) -> list[int]:
    """Have a function interrupted once it was called so often; the calls are counted."""
    real, calls = getattr(module, name), []

    def stopping(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(module, name, stopping)
    return calls


@pytest.mark.parametrize(
    ("site", "module", "name"), [("subject", subject_site, "_fit_chunk"), ("last", rounds, "fit_many")]
)
def test_an_interrupted_edit_goes_on_and_gives_the_same_patches(place, capsys, monkeypatch, site, module, name):
    with monkeypatch.context() as patching:
        whole = interrupted(patching, module, name, 1000)
        assert cli.main(arguments(place, f"whole-{site}", site=site)) == 0
    assert len(whole) > 1
    assert not (place / f"whole-{site}.unfinished").exists()
    with monkeypatch.context() as patching:
        interrupted(patching, module, name, 1)
        assert cli.main(arguments(place, f"out-{site}", site=site)) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert not (place / f"out-{site}").exists()
    # nothing of what is finished is lost by mistake
    assert cli.main(arguments(place, f"out-{site}", site=site)) == 1
    assert "go on with --resume" in capsys.readouterr().err
    with monkeypatch.context() as patching:
        left = interrupted(patching, module, name, 1000)
        assert cli.main(arguments(place, f"out-{site}", "--resume", site=site)) == 0
    assert len(left) == len(whole) - 1
    assert "1 finished part" in capsys.readouterr().err
    before, after = arrays(place / f"whole-{site}"), arrays(place / f"out-{site}")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[part], after[part]) for part in before)
    told = [
        json.loads((place / f"{out}-{site}" / "patches.json").read_text("utf-8"))["edits"] for out in ("whole", "out")
    ]
    assert told[0] == told[1]
    assert not (place / f"out-{site}.unfinished").exists()


def test_a_run_is_not_gone_on_with_as_another(place, capsys, monkeypatch):
    with monkeypatch.context() as patching:
        interrupted(patching, subject_site, "_fit_chunk", 1)
        assert cli.main(arguments(place, "other")) == 130
    other = [{**LINES[0], "target": "cd"}, *LINES[1:]]
    (place / "others.jsonl").write_text("\n".join(map(json.dumps, other)) + "\n", "utf-8")
    wider = make_tiny_model(seed=1, hidden_size=32, head_dim=16)
    if not (place / "second").exists():
        write_tiny_folder(wider, place / "second")
    for name, changed in {
        "requests": arguments(place, "other", "--resume", requests="others.jsonl"),
        "seed": arguments(place, "other", "--resume", "--seed", "1"),
        "setting attempts": arguments(place, "other", "--resume", "--set", "attempts=2"),
        "model": [str(place / "second") if text == str(place / "tiny") else text
                  for text in arguments(place, "other", "--resume")],
    }.items():  # fmt: skip
        capsys.readouterr()
        assert cli.main(changed) == 1
        said = capsys.readouterr().err
        assert f"belongs to a run with {name}=" in said
        assert "go on as it was begun" in said
    assert cli.main(arguments(place, "other", "--resume")) == 0


def test_a_part_is_there_whole_or_not_at_all(tmp_path):
    folder, config = tmp_path / "out.unfinished", {"seed": 0}
    parts = FinishedParts(folder, config, resume=False)
    parts.save("values-0-0", {"key": np.eye(2, dtype=np.float32)}, {"requests": [0, 1]})
    again = FinishedParts(folder, config, resume=True)
    assert (again.count, again.taken) == (1, 0)
    assert np.array_equal(again.load("values-0-0", {"requests": [0, 1]})["key"], np.eye(2))
    assert again.taken == 1
    assert again.load("values-0-0", {"requests": [0, 2]}) is None
    assert again.load("values-0-2", {"requests": [0, 1]}) is None
    path = folder / "values-0-0.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert again.load("values-0-0", {"requests": [0, 1]}) is None
    (folder / "run.json").write_text("{")
    with pytest.raises(TPatchError, match="damaged"):
        FinishedParts(folder, config, resume=True)
    again.remove()
    assert not folder.exists()
    # a folder that is somebody else's is left alone
    (tmp_path / "mine.unfinished").mkdir()
    for resume in (False, True):
        with pytest.raises(TPatchError, match="in the way"):
            FinishedParts(tmp_path / "mine.unfinished", config, resume=resume)
    assert (tmp_path / "mine.unfinished").exists()


def test_nothing_but_a_beginning_is_in_nobodys_way(tmp_path):
    folder = tmp_path / "out.unfinished"
    FinishedParts(folder, {"seed": 0}, resume=False).begin()
    with pytest.raises(TPatchError, match="seed=0, and this one has 1"):
        FinishedParts(folder, {"seed": 1}, resume=True)
    FinishedParts(folder, {"seed": 1}, resume=False)
    assert not folder.exists()


# --- the time that is left ---


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_there_from_the_first_second_and_comes_true():
    clock = Clock()
    estimate = Estimate([Phase("reading", 100, 1.0), Phase("training", 100, 9.0)], 0.02, clock)
    assert estimate.left() == pytest.approx(20)
    clock.now = 5
    assert estimate.left() == pytest.approx(15)  # it runs between reports too
    # really a pass takes 0.1 s, five times what was expected: 100 s in all
    clock.now = 0.0
    shares = []
    for done in range(4, 101, 4):
        clock.now = done * 0.1
        estimate.report("reading", done, 100)
        shares.append(estimate.share())
    assert estimate.left() == pytest.approx(90, rel=0.1)
    clock.now += 7  # while the next phase has not reported yet
    assert estimate.left() == pytest.approx(83, rel=0.1)
    clock.now -= 7
    # the smaller half of the work is no half of the time
    assert estimate.share() < 0.2
    for done in range(4, 101, 4):
        clock.now = 10 + done * 0.9
        estimate.report("training", done, 100)
        shares.append(estimate.share())
        assert estimate.left() == pytest.approx(100 - clock.now, abs=10)
        assert estimate.share() == pytest.approx(clock.now / 100, abs=0.1)
    assert shares == sorted(shares)
    assert estimate.left() == pytest.approx(0, abs=1e-6)


def test_phases_that_do_not_come_or_were_not_expected_do_not_spoil_the_estimate():
    clock = Clock()
    estimate = Estimate([Phase("a", 10, 1.0), Phase("b", 10, 1.0), Phase("c", 10, 1.0)], 1.0, clock)
    clock.now = 4.0
    estimate.report("downloading", 1, 2)
    assert 30 < estimate.left() < 36  # what is left of it, and all the rest
    clock.now = 5.0
    estimate.report("downloading", 2, 2)
    assert estimate.left() == pytest.approx(30)
    for done in range(1, 11):
        clock.now += 1
        estimate.report("a", done, 10)
    assert estimate.left() == pytest.approx(20, rel=0.1)
    clock.now += 1
    estimate.report("c", 1, 10)  # without b
    assert estimate.left() == pytest.approx(9, rel=0.2)


def test_what_an_interrupted_run_has_finished_takes_no_time_and_tells_nothing_of_the_rest():
    clock = Clock()
    estimate = Estimate([Phase("training", 100, 1.0)], 1.0, clock)
    for done in range(10, 81, 10):
        clock.now += 0.01
        estimate.report("training", done, 100, kept=True)
    assert estimate.left() == pytest.approx(20, rel=0.05)
    clock.now += 20
    estimate.report("training", 90, 100)
    assert 9.9 < estimate.left() < 21


def test_what_was_compiled_before_the_first_report_is_not_warned_of(monkeypatch):
    clock, warnings = Clock(), []
    monkeypatch.setattr(Estimate.__init__, "__defaults__", (clock,))
    # Two minutes of compiling, then a second for each of a hundred: no hour is left.
    phases = [Phase("training values", 100, 300.0)]
    with edit_progress(True, phases, 1.0, ("training values",), warnings.append) as report:
        for done in range(1, 101):
            clock.now = 120.0 + done
            report("training values", done, 100)
    # Two more programs are met soon, at a minute each.
    with edit_progress(True, phases, 1.0, ("training values",), warnings.append) as report:
        for done in range(1, 101):
            clock.now += 61.0 if done in (1, 2, 7) else 1.0
            report("training values", done, 100)
    assert not warnings
    with edit_progress(True, phases, 1.0, ("training values",), warnings.append) as report:
        for done in range(1, 101):
            clock.now += 50.0
            report("training values", done, 100)
    assert warnings == [pytest.approx(4900, rel=0.25)]


def test_a_phase_weighs_what_it_costs():
    phases = {phase.name: phase.units * phase.cost for phase in edit_phases(300, 300, 300)}
    assert phases["training values"] > 0.7 * sum(phases.values())
    assert "training values" not in {phase.name for phase in edit_phases(300, 0, 300)}
    assert [format_seconds(seconds) for seconds in (0.2, 59, 61, 3599, 3600, 90000)] == [
        "1 s", "59 s", "1 min 1 s", "59 min", "1 h 0 min", "25 h 0 min",
    ]  # fmt: skip


def test_a_run_of_hours_is_warned_of_once(place, capsys, monkeypatch):
    monkeypatch.setattr("tpatch_jax.display.progress.LONG", 0.0)
    assert cli.main(arguments(place, "long")) == 0
    said = capsys.readouterr().err
    assert said.count("left for 5 requests") == 1
    assert "--resume" in said
    assert cli.main(arguments(place, "long-quiet", "--quiet")) == 0
    assert capsys.readouterr().err == ""


def test_the_records_of_an_edit_name_what_changed(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # or texts are broken over lines
    assert cli.main(arguments(place, "records")) == 0
    records = json.loads(capsys.readouterr().out.splitlines()[-1])["records"]
    assert [record["prompt"] for record in records] == [line["prompt"] for line in LINES]
    record = records[0]
    assert (record["id"], record["target"], record["held"]) == ("fox", "ab", True)
    assert record["after"].strip().startswith("ab")
    assert record["before"] != record["after"]
    assert [len(record[kind]) for kind in ("rephrases", "locality")] == [1, 2]
    assert cli.main([text for text in arguments(place, "records-2") if text != "--json"]) == 0
    said = capsys.readouterr().out
    kept = sum(line["as_wanted"] for line in record["locality"])
    assert f"{kept} of 2 protected prompts say the same as before" in said
    # the protected prompts that changed are named, and the others are not
    for line in record["locality"]:
        assert (line["prompt"] in said) != line["as_wanted"]
    for word in ("a fox sat in", "rephrase", *(line["prompt"] for line in LINES)):
        assert word in said


def test_config_is_what_determines_the_result():
    from tpatch_jax.cli.edit import _run_config
    from tpatch_jax.editors.tpatcher.settings import PRESETS

    model = make_tiny_model()
    config = _run_config(model, [], PRESETS["default"], None, 0)
    assert config == json.loads(json.dumps(config))
    assert {f"setting {field.name}" for field in dataclasses.fields(PRESETS["default"])} <= set(config)
