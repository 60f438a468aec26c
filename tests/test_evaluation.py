"""The evaluation harness on a tiny model: figures against a plain loop, protocols, resuming, reports and errors."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, same

from tpatch_jax import EditRequest, TPatchError, edit, load_model
from tpatch_jax.cli.eval import Eval, _Chosen, _protected
from tpatch_jax.cli.main import main
from tpatch_jax.core.layers import count_neurons
from tpatch_jax.core.patch import Patch, concatenate, create, take
from tpatch_jax.editors import registry
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions, RequestInfo
from tpatch_jax.editors.registry import METHODS, Method, find_method, method_settings, register_editor
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
from tpatch_jax.evaluation import pictures
from tpatch_jax.evaluation.contamination import contaminated_probes, count_probes
from tpatch_jax.evaluation.journal import Journal
from tpatch_jax.evaluation.metrics import certificate
from tpatch_jax.evaluation.pictures import draw_comparison
from tpatch_jax.evaluation.recalled import recall_answers
from tpatch_jax.evaluation.records import DataNotes, Probe, Record, read_counterfact, read_records
from tpatch_jax.evaluation.report import SCHEMA, comparison, data_remarks, read_report, table
from tpatch_jax.evaluation.runner import _content, evaluate
from tpatch_jax.evaluation.running_text import read_windows, text_figures
from tpatch_jax.evaluation.scoring import (
    Base,
    Outcome,
    apply_scores,
    ask,
    base_scores,
    model_scores,
    patched_scores,
    score,
)
from tpatch_jax.evaluation.subject_specificity import FIGURES
from tpatch_jax.models import networks
from tpatch_jax.models.collection import collect
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach, merge
from tpatch_jax.models.sentences import say
from tpatch_jax.requests import join_target

PROMOTION = "standard"
OPTIMISED = False
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

QUICK = {"contexts": 1, "other_subjects": 0, "attempts": 1, "rounds": 1}
# Of few lengths, so that the plain loops compile little.
SUBJECTS = ("Ada", "Bob", "Cyd", "Dot", "Eve")
WORDS = ("red", "sky", "ash", "dog", "cup")
ASKED = ("statements", "questions")
"""The forms of other facts that a model without a chat template is asked."""


def make_records(subjects: Sequence[str] = SUBJECTS, targets: Sequence[str] = WORDS) -> list[Record]:
    """Records as CounterFact has them."""
    records = []
    for number, (subject, new) in enumerate(zip(subjects, targets, strict=True)):
        true = targets[(number + 1) % len(targets)]
        prompt, paraphrases = f"{subject} likes", (f"It is {subject} who likes", f"So, {subject} likes")
        neighbors = (f"{subject[::-1]} likes", "The sun is")
        probes = {
            f"{part}_{which}": tuple(Probe(text, target) for text in texts)
            for part, texts in (("rewrite", (prompt,)), ("paraphrase", paraphrases), ("neighborhood", neighbors))
            for which, target in (("new", new), ("true", true))
        }
        request = EditRequest(prompt, new, subject, paraphrases, neighbors, f"cf-{number}")
        records.append(Record(request.name(0), (request,), probes, generation=(prompt,)))
    return records


def write_counterfact(path: Path, records: Sequence[Record]) -> Path:
    rows = []
    for number, record in enumerate(records):
        request, subject = record.request, record.request.subject or ""
        rewrite = {
            "prompt": request.prompt.replace(subject, "{}"),
            "target_new": {"str": request.target},
            "target_true": {"str": record.probes["rewrite_true"][0].target},
            "subject": subject,
        }
        rows.append(
            {
                "case_id": number,
                "requested_rewrite": rewrite,
                "paraphrase_prompts": list(request.rephrases),
                "neighborhood_prompts": list(request.locality),
            }
        )
    path.write_text(json.dumps(rows), "utf-8")
    return path


class DirectState(NamedTuple):
    model: Model
    patch: Patch


def direct_step(state: DirectState, requests: Sequence[EditRequest], rng: Any) -> tuple[DirectState, EditInfo]:
    """One neuron a target token, its key the token's own query: no fit, so that protocols are tested in no time."""
    model, patches, results, count = state.model, [state.patch], [], state.patch.key.shape[0]
    last = model.layer(None)
    table = np.asarray(networks.unembedding(model.config, model.params))
    for number, request in enumerate(requests):
        prompt, target = model.encode(request.prompt), model.encode(join_target(request.prompt, request.target))
        row, places = prompt + target, range(len(prompt) - 1, len(prompt) + len(target) - 1)
        query = collect(model, [row], [places], last).query
        unit = query / jnp.sum(query**2, -1, keepdims=True)
        value = jnp.asarray(200 * table[target] / np.linalg.norm(table[target], axis=-1, keepdims=True))
        patches.append(Patch(20 * unit, jnp.full(len(target), -19.0), value))
        neurons = {last: tuple(range(count, count + len(target)))}
        results.append(RequestInfo(request.name(number), True, "edited", neurons=neurons))
        count += len(target)
    added = (count - state.patch.key.shape[0]) * (2 * model.config.hidden_size + 1)
    return state._replace(patch=concatenate(patches)), EditInfo(tuple(results), 0.25, 0.125, 2.0, 1.0, added)


DIRECT = Method(
    name="direct",
    presets={"default": TPatcherSettings()},
    build=lambda settings, memory, cache, progress: EditorFunctions(
        lambda model, rng: DirectState(model, create(model.config.hidden_size)),
        direct_step,
        lambda state, tokens: attach(state.model, state.patch, relu=True).apply(tokens),
    ),
    model=lambda state: attach(state.model, state.patch, relu=True),
    save=lambda state: {name: np.asarray(getattr(state.patch, name)) for name in ("key", "bias", "value")},
    restore=lambda state, arrays: state._replace(
        patch=Patch(*(jnp.asarray(arrays[n]) for n in ("key", "bias", "value")))
    ),
    patches=lambda state: {state.model.layer(None): state.patch},
)


def register(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """Make a method known until the test ends, in the place of one of the same name."""
    monkeypatch.setitem(registry._REGISTERED, method.name, method)


@pytest.fixture(autouse=True)
def surroundings(cache_with_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPATCH_CACHE", str(cache_with_models))
    register(monkeypatch, DIRECT)


def run(model: Model, protocol: str = "batch", records: Sequence[Record] | None = None, **options: Any) -> Any:
    options = {"methods": ["direct"], "cache": False, "other_facts": 0, **options}
    return evaluate(model, make_records() if records is None else records, protocol=protocol, **options)


def figures(report: Any) -> list[Any]:
    """A report without what time and memory it took."""
    names = ("method", "protocol", "n", "metrics", "requests", "curves", "edits")
    return [{name: result.get(name) for name in names} for result in report["results"]]


def untimed(folder: Path, method: str) -> list[Any]:
    lines = [json.loads(line) for line in (folder / f"records-{method}.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "cost"} for line in lines]


def plain_nll(model: Model, probe: Probe) -> float:
    """One probe by one unbatched pass of the whole network."""
    prompt, target = model.encode(probe.prompt), model.encode(join_target(probe.prompt, probe.target))
    logits = np.asarray(model.apply(jnp.asarray([prompt + target]))[0], np.float64)
    rows = logits[len(prompt) - 1 : len(prompt) + len(target) - 1]
    top = rows.max(-1, keepdims=True)
    log_p = rows - top - np.log(np.exp(rows - top).sum(-1, keepdims=True))
    return float(-np.mean(log_p[np.arange(len(target)), target]))


def plain_figures(model: Model, records: Sequence[Record]) -> dict[str, float]:
    """ES, PS and NS by their definition."""
    shares_of = {}
    for name, part, wanted, other in (
        ("ES", "rewrite", "new", "true"),
        ("PS", "paraphrase", "new", "true"),
        ("NS", "neighborhood", "true", "new"),
    ):
        shares = []
        for record in records:
            pairs = zip(record.probes[f"{part}_{wanted}"], record.probes[f"{part}_{other}"], strict=True)
            shares.append(np.mean([plain_nll(model, a) < plain_nll(model, b) for a, b in pairs]))
        shares_of[name] = float(np.mean(shares))
    return shares_of


def some_patch(model: Model, base: Base, layer: int | None = None) -> dict[int, Patch]:
    """Neurons of which each fires on some queries, and one that never does."""
    rng = np.random.default_rng(0)
    key = rng.normal(size=(4, model.config.hidden_size)).astype(np.float32)
    at = model.config.layers - 1 if layer is None else layer
    rows = base.asked.rows
    # Every position counts in an earlier layer, so there neurons fire on fewer.
    query = np.asarray(collect(model, rows, [range(len(row)) for row in rows], at).query)
    bias = -np.quantile(query @ key.T, 0.9 if layer is None else 0.995, axis=0).astype(np.float32)
    bias[1::2] = -1e4
    value = rng.normal(size=key.shape).astype(np.float32)
    patch = Patch(jnp.asarray(key), jnp.asarray(bias), jnp.asarray(value))
    last = model.config.layers - 1
    return {last: patch} if layer is None else {last: take(patch, [1, 3]), layer: take(patch, [0, 2])}


def tiny_base(model: Model, **options: Any) -> tuple[list[Probe], Base]:
    probes = [*dict.fromkeys(p for r in make_records() for asked in r.probes.values() for p in asked), Probe("Hi", "")]
    return probes, base_scores(model, ask(model, probes), **options)


def test_figures_equal_a_plain_loop_before_and_after(tiny_model: Model) -> None:
    records = make_records()
    before, after = run(tiny_model)["results"]
    expected = plain_figures(tiny_model, records)
    assert {name: before["metrics"][name] for name in expected} == pytest.approx(expected)
    state, _ = direct_step(DirectState(tiny_model, create(16)), [record.request for record in records], None)
    expected = plain_figures(attach(tiny_model, state.patch, relu=True), records)
    assert {name: after["metrics"][name] for name in expected} == pytest.approx(expected)
    assert after["metrics"] != before["metrics"]


def test_tpatcher_gives_what_it_gives_outside_the_harness(tiny_model: Model) -> None:
    records, settings = make_records()[:2], method_settings(["tpatcher"], changes=QUICK)
    after = run(tiny_model, records=records, methods=["tpatcher"], settings=settings, cache=True)["results"][1]
    patches, _ = edit(tiny_model, [record.request for record in records], settings=settings["tpatcher"])
    assert count_neurons(patches) > 0
    assert after["cost"]["parameters_added"] == count_neurons(patches) * 33
    expected = plain_figures(attach(tiny_model, patches, relu=True), records)
    assert {name: after["metrics"][name] for name in expected} == pytest.approx(expected)


@pytest.mark.real_model
def test_figures_of_a_real_model_equal_a_plain_loop() -> None:
    model = load_model("smollm2-135m")
    data = os.environ.get("TPATCH_DATA")
    if data:
        records = read_records("counterfact", Path(data) / "counterfact" / "counterfact_full_dev.json", n=10)
    else:
        records = make_records(("Paris", "Rome", "Oslo"), ("apples", "French wine", "old books"))
    # These three figures need no text that is generated freely.
    records = [dataclasses.replace(record, generation=()) for record in records]
    report = evaluate(model, records, methods=["unedited"], other_facts=0)
    expected = plain_figures(model, records)
    assert {name: report["results"][0]["metrics"][name] for name in expected} == pytest.approx(expected)


def test_scores_of_patches_equal_the_attached_model(tiny_model: Model) -> None:
    probes, base = tiny_base(tiny_model)
    for layer in (None, 0, 1):
        patch = some_patch(tiny_model, base, layer)
        quick = patched_scores(tiny_model, base, patch)
        plain = apply_scores(tiny_model, base, attach(tiny_model, patch, relu=True).apply)
        whole = model_scores(attach(tiny_model, patch, relu=True), base)
        for one in (quick, whole):
            assert np.allclose(one.log_p, plain.log_p, atol=2e-5, equal_nan=True)
            assert (one.predicted == plain.predicted).all()
        assert whole.fires.all()
        assert quick.fires.any()
        assert not quick.fires.all()
        # Where nothing fires, nothing changes: bit for bit the unedited model's.
        silent = ~quick.fires
        assert same(quick.log_p[silent], base.outcome.log_p[silent])
        assert (plain.predicted[silent] == base.outcome.predicted[silent]).all()
    some = patched_scores(tiny_model, base, some_patch(tiny_model, base), [0, 3])
    untouched = slice(int(base.asked.starts[4]), None)
    assert same(some.log_p[untouched], base.outcome.log_p[untouched])
    assert np.isnan(score(base.asked, base.outcome, len(probes) - 1).nll)


def test_certificate_holds_on_the_actual_outputs(tiny_model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The sun is red and the sky is blue, so Ada likes the tin. " * 8, "utf-8")
    windows = read_windows(tiny_model, tmp_path / "text.txt", 200)
    assert [len(row) for row in windows.rows] == [64, 64, 64, 8]
    base = base_scores(tiny_model, windows)
    for layer in (None, 1):
        patch = some_patch(tiny_model, base, layer)
        outcome = patched_scores(tiny_model, base, patch)
        measured = text_figures(base, outcome)
        assert measured["certificate_tokens"] == 1 - outcome.fires.mean()
        assert 0 < measured["certificate_tokens"] < 1
        assert measured["next_token_agreement"] >= measured["certificate_tokens"]
        start = 0
        edited = attach(tiny_model, patch, relu=True)
        for row, places in zip(windows.rows, windows.positions, strict=True):
            before, after = (np.asarray(m.apply(jnp.asarray([row]))[0])[places] for m in (tiny_model, edited))
            fires = outcome.fires[start : start + len(places)]
            assert np.array_equal(before[~fires], after[~fires])
            start += len(places)
    silent = {layer: p._replace(bias=jnp.full(4, -1e4)) for layer, p in some_patch(tiny_model, base).items()}
    assert text_figures(base, patched_scores(tiny_model, base, silent)) == {
        **text_figures(base, base.outcome),
        **certificate([[False]]),
    }


def test_perplexity_equals_a_plain_loop(tiny_model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Ada likes the sun. " * 9, "utf-8")
    windows = read_windows(tiny_model, tmp_path / "text.txt", 100)
    base = base_scores(tiny_model, windows)
    nlls = []
    for row in windows.rows:
        log_p = np.asarray(jax.nn.log_softmax(tiny_model.apply(jnp.asarray([row]))[0], -1), np.float64)
        nlls.extend(-log_p[np.arange(len(row) - 1), row[1:]])
    assert text_figures(base, base.outcome)["perplexity"] == pytest.approx(float(np.exp(np.mean(nlls))), rel=1e-5)


def test_cached_base_scores_equal_uncached(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fresh = tiny_base(tiny_model)
    _, kept = tiny_base(tiny_model, cache=tmp_path)
    monkeypatch.setattr("tpatch_jax.evaluation.scoring.collect_once", None)  # The model is not run again.
    _, recalled = tiny_base(tiny_model, cache=tmp_path)
    for base in (kept, recalled):
        assert same(base[1:], fresh[1:])
    file = next((tmp_path / "evaluation").glob("*/scores.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    monkeypatch.undo()
    _, again = tiny_base(tiny_model, cache=tmp_path)
    assert same(again[1:], fresh[1:])


def test_what_the_unedited_model_answers_is_asked_once(tiny_model: Model, tmp_path: Path) -> None:
    asked, rows = [], [[1, 2], [3]]

    def answer() -> list[list[int]]:
        asked.append(1)
        return [[7, 8], []]

    for _ in range(2):
        assert recall_answers(tmp_path, tiny_model, "facts", rows, answer) == [[7, 8], []]
    assert len(asked) == 1
    # another way of asking, other prompts, another model, no folder: asked again
    other = make_tiny_model(5)
    for place, model, kind, some in (
        (tmp_path, tiny_model, "questions", rows),
        (tmp_path, tiny_model, "facts", [[1, 2], [4]]),
        (tmp_path, other, "facts", rows),
        (None, tiny_model, "facts", rows),
    ):
        recall_answers(place, model, kind, some, answer)
    assert len(asked) == 5
    # what an edited model says is never kept, and a file that was cut is written anew
    patched = attach(tiny_model, some_patch(tiny_model, tiny_base(tiny_model)[1], 1))
    before = sorted((tmp_path / "answers").iterdir())
    recall_answers(tmp_path, patched, "facts", rows, answer)
    assert sorted((tmp_path / "answers").iterdir()) == before
    for file in before:
        file.write_text(file.read_text("utf-8")[:5], "utf-8")
    assert recall_answers(tmp_path, tiny_model, "facts", rows, answer) == [[7, 8], []]
    assert len(asked) == 7


def check_records(model: Model, folder: Path, records: Sequence[Record], shown: str) -> None:
    """Each record is there with what was asked, said before and after, and with every prompt that it asks."""
    before, after = (
        [json.loads(line) for line in (folder / f"records-{method}.jsonl").read_text("utf-8").splitlines()]
        for method in ("unedited", "direct")
    )
    assert [line["id"] for line in after] == [record.id for record in records]
    for record, old, new in zip(records, before, after, strict=True):
        said = say(model, [request.prompt for request in record.requests], 16)
        for line in (old, new):
            assert [one["prompt"] for one in line["asked"]] == [request.prompt for request in record.requests]
            assert [one["target"] for one in line["asked"]] == [request.target for request in record.requests]
            assert [one["before"] for one in line["asked"]] == said
        assert [one["after"] for one in old["asked"]] == said
        assert not any(probe["changed"] for probe in old["probes"])
        wanted = [(kind, probe.prompt) for kind, probes in record.probes.items() for probe in probes]
        assert [(probe["kind"], probe["prompt"]) for probe in new["probes"]] == wanted
        for one in new["asked"]:
            assert f"| {record.id} | {one['prompt']} | {one['target']} |" in shown
        edits = [probe["after"] for probe in new["probes"] if probe["kind"] in ("reliability", "rewrite_new")]
        assert new["figures"]["exact"] == np.mean(edits)
    assert any(one["after"] != one["before"] for line in after for one in line["asked"])


def check_other_facts(model: Model, folder: Path, records: Sequence[Record], report: Any) -> None:
    """Other facts about each subject are asked; before is what `generate` says, and the figures are their means."""
    for result in report["results"]:
        path = folder / f"records-{result['method']}.jsonl"
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        facts = [fact for line in lines for fact in line["other_facts"]]
        assert [len(line["other_facts"]) for line in lines] == [6] * len(records)
        for form in ASKED:
            of_form = [fact for fact in facts if fact["form"] == form]
            totals = result["subject_specificity"][form]
            assert totals["prompts"] == len(of_form) == 3 * len(records)
            for name in FIGURES:
                assert totals[name] == pytest.approx(np.mean([fact[name] for fact in of_form]))
                assert result["metrics"][f"specificity_{form}_{name}"] == pytest.approx(totals[name])
        if result["method"] == "unedited":
            assert result["metrics"]["subject_specificity"] == 1
    statement = next(fact for fact in facts if fact["form"] == "statements")
    assert statement["before"] == model.generate(statement["prompt"], 12)


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
def test_protocols_report_and_resume(tiny_model: Model, tmp_path: Path, protocol: str) -> None:
    (tmp_path / "text.txt").write_text("The sun is red. Ada likes the sky. " * 5, "utf-8")
    options = {"text": tmp_path / "text.txt", "text_tokens": 100, "every": 2, "held_out": make_records()[4:]}
    options["other_facts"] = 3
    records = make_records()[:4]
    whole = run(tiny_model, protocol, records, output=tmp_path / "whole", **options)
    for name in ("schema", "config", "seed", "versions", "data_sha256", "results"):
        assert name in whole
    assert [result["method"] for result in whole["results"]] == ["unedited", "direct"]
    edited = whole["results"][1]
    names = {"ES", "PS", "NS", "S", "EM", "PM", "NM", "rewrite_acc", "paraphrase_acc", "neighborhood_acc", "exact"}
    names |= {"reliability", "generalization", "locality", "perplexity", "next_token_agreement", "certificate_tokens"}
    names |= {"certificate_prompts", "silent_tokens"}
    names |= {"SR", "GR", "ER"} if protocol == "sequential" else set()
    names |= {"subject_specificity", *(f"specificity_{form}_{name}" for form in ASKED for name in FIGURES)}
    assert names <= edited["metrics"].keys()
    assert edited["protocol"] == protocol
    check_other_facts(tiny_model, tmp_path / "whole", records, whole)
    assert edited["n"] == 4
    assert {"seconds", "forward_equivalents", "peak_memory_mib", "parameters_added"} <= edited["cost"].keys()
    assert edited["cost"]["parameters_added"] > 0
    assert whole["results"][0]["cost"]["token_forward_equivalents"] == 1.0
    assert 1.0 < edited["cost"]["token_forward_equivalents"] < 1.3
    assert 1.0 < edited["cost"]["token_forward_equivalents_elsewhere"] < 1.3
    assert edited["cost"]["token_flops"] > 2 * tiny_model.parameter_count / 2
    assert bool(edited.get("curves")) == (protocol == "sequential")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    pictures = {"activations-direct.png", "before-after.png", "cost.png"}
    pictures |= {"curves.png"} if protocol == "sequential" else set()
    assert names == pictures | {
        "report.json",
        "report.md",
        "run.json",
        "records-unedited.jsonl",
        "records-direct.jsonl",
    }
    shown = (tmp_path / "whole" / "report.md").read_text("utf-8")
    assert protocol in shown
    check_records(tiny_model, tmp_path / "whole", records, shown)
    assert read_report(tmp_path / "whole") == whole

    # Stopped in the middle and started again, the figures are the same.
    def stop(what: str, done: int, total: int) -> None:
        if done >= 2 and what in ("single edits", "measuring", "stream"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, protocol, records, output=tmp_path / "again", progress=stop, **options)
    assert not (tmp_path / "again" / "report.json").exists()
    with (tmp_path / "again" / "records-direct.jsonl").open("a") as file:
        file.write('{"id": "cf-')  # As if the machine had stopped in the middle of a line.
    again = run(tiny_model, protocol, records, output=tmp_path / "again", **options)
    assert figures(again) == figures(whole)
    for method in ("unedited", "direct"):
        assert untimed(tmp_path / "again", method) == untimed(tmp_path / "whole", method)
    assert run(tiny_model, protocol, records, output=tmp_path / "again", **options) == again
    with pytest.raises(TPatchError, match=r"run with other_facts=null.*has 0"):
        run(tiny_model, protocol, records, output=tmp_path / "again", **{**options, "other_facts": 0})
    with pytest.raises(TPatchError, match=r"run with seed=0.*has 1"):
        run(tiny_model, protocol, records, output=tmp_path / "again", seed=1, **options)

    rows, columns = comparison({"whole": whole, "again": again})
    assert len(columns) == 3
    assert rows[0] == ["", "whole: unedited", f"whole: direct, {protocol}", f"again: direct, {protocol}"]


def test_nobody_else_measures_in_a_folder_meanwhile(tiny_model: Model, tmp_path: Path) -> None:
    records, refused = make_records()[:2], []

    def also(what: str, done: int, total: int) -> None:
        if what == "single edits" and not refused:
            with pytest.raises(TPatchError, match=rf"out is being written by process {os.getpid()} on") as error:
                run(tiny_model, "single", records, output=tmp_path / "out")
            refused.append(error)

    report = run(tiny_model, "single", records, output=tmp_path / "out", progress=also)
    assert refused
    assert read_report(tmp_path / "out") == report
    assert len((tmp_path / "out" / "records-direct.jsonl").read_text("utf-8").splitlines()) == 2
    assert run(tiny_model, "single", records, output=tmp_path / "out") == report


def test_a_stream_goes_on_from_its_last_saved_edits(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpatch_jax.evaluation.protocols.SAVE_EVERY", 2)
    records = make_records()
    whole = run(tiny_model, "sequential", records)

    def stop(what: str, done: int, total: int) -> None:
        if what == "stream" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, "sequential", records, output=tmp_path / "out", progress=stop)
    steps = []

    def build(*arguments: Any) -> Editor:
        step = lambda state, asked, rng: steps.append(asked) or direct_step(state, asked, rng)  # noqa: E731
        direct = DIRECT.build(*arguments)
        return EditorFunctions(direct.init, step, direct.apply)

    register(monkeypatch, dataclasses.replace(DIRECT, build=build))
    assert figures(run(tiny_model, "sequential", records, output=tmp_path / "out")) == figures(whole)
    assert len(steps) <= 3  # Records 3 to 5; the first two were saved.


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    journal = Journal("direct", tmp_path)
    lines = [{"id": "a", "text": "one\u2028two\x85three"}, {"id": "é"}]
    for line in lines:
        journal.add(line)
    assert Journal("direct", tmp_path).lines == lines
    path = tmp_path / "records-direct.jsonl"
    # Torn within a character.
    path.write_bytes(path.read_bytes().rstrip(b"\n").removesuffix('é"}'.encode()) + b"\xc3")
    assert Journal("direct", tmp_path).lines == lines[:1]


def test_a_stream_that_lost_lines_begins_anew(tiny_model: Model, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tpatch_jax.evaluation.protocols.SAVE_EVERY", 2)
    records = make_records()

    def stop(what: str, done: int, total: int) -> None:
        if what == "stream" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, "sequential", records, output=tmp_path / "out", progress=stop)
    path = tmp_path / "out" / "records-direct.jsonl"
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:1]), "utf-8")
    report = run(tiny_model, "sequential", records, output=tmp_path / "out")
    assert figures(report) == figures(run(tiny_model, "sequential", records))


def test_a_report_is_of_the_records_beside_the_stream_too(tiny_model: Model, tmp_path: Path) -> None:
    records = make_records()
    for name in ("train", "held_out"):
        options = {"output": tmp_path / name}
        run(tiny_model, "sequential", records[:2], **options, **{name: records[2:4]})
        with pytest.raises(TPatchError, match=f"run with {name}_sha256="):
            run(tiny_model, "sequential", records[:2], **options, **{name: records[4:]})


def test_what_cannot_work_is_said_before_anything_is_measured(tiny_model: Model, tmp_path: Path) -> None:
    for method, name, wrong, message in (
        ("rome", "layer", "9", "layer '9' does not exist"),
        ("memit", "layers", "1,9", "'9' does not exist"),
        ("ft", "scope", "9", "9"),
        ("tpatcher", "site", "first", "site 'first' does not exist"),
        ("tpatcher", "layer", "9", "9"),
    ):
        changes = {name: wrong, **({"site": "subject"} if name == "layer" and method == "tpatcher" else {})}
        settings = method_settings([method], changes=changes)
        with pytest.raises(TPatchError, match=message):
            evaluate(tiny_model, make_records()[:2], [method], "single", settings=settings, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_single_edits_equal_each_edit_alone(tiny_model: Model) -> None:
    records = make_records()
    expected = []
    for record in records:
        state, _ = direct_step(DirectState(tiny_model, create(16)), record.requests, None)
        expected.append(plain_figures(attach(tiny_model, state.patch, relu=True), [record]))
    measured = run(tiny_model, "single", records)["results"][1]["metrics"]
    for name in ("ES", "PS", "NS"):
        assert measured[name] == pytest.approx(np.mean([row[name] for row in expected]))


def test_methods_without_neurons_go_the_plain_way(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, dataclasses.replace(DIRECT, name="plain", patches=lambda state: None))
    quick, plain = run(tiny_model, methods=["direct", "plain"])["results"][1:]
    assert plain["metrics"] == pytest.approx(quick["metrics"], abs=1e-5)


def test_a_method_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._REGISTERED, "direct")
    with pytest.raises(TPatchError, match="did you mean"):
        find_method("tpacher")
    monkeypatch.setitem(registry._REGISTERED, "direct", DIRECT)
    assert register_editor(DIRECT) is DIRECT
    assert find_method("direct") is DIRECT
    with pytest.raises(TPatchError, match="'direct' is registered already"):
        register_editor(dataclasses.replace(DIRECT))
    with pytest.raises(TPatchError, match="has no preset 'default'"):
        register_editor(dataclasses.replace(DIRECT, name="other", presets={}))
    assert "other" not in METHODS


def test_an_editor_is_three_functions() -> None:
    functions = (lambda model, rng: 0, lambda state, requests, rng: (state, None), lambda state, batch: state)
    made: Any = Editor(*functions)  # pyright: ignore[reportAbstractUsage]
    assert isinstance(made, EditorFunctions)
    assert isinstance(made, Editor)
    # Each is wrapped, so that it runs whatever the types of a mesh's axes are.
    assert tuple(function.__wrapped__ for function in (made.init, made.step, made.apply)) == functions
    assert not isinstance(object(), Editor)


def test_a_setting_is_changed_for_the_method_that_is_named() -> None:
    changed = method_settings(["rome", "memit"], changes={"rome.value_steps": 5, "together": 3})
    assert [changed[name].value.value_steps for name in ("rome", "memit")] == [5, 25]
    assert changed["memit"].together == 3
    with pytest.raises(
        TPatchError, match=r"several methods have a setting 'value_rate'; say which: rome\.value\.value_rate"
    ):
        method_settings(["rome", "memit"], changes={"value_rate": 0.25})
    with pytest.raises(TPatchError, match="a setting of memit, which is not used here; leave it out or add memit"):
        method_settings(["rome"], changes={"memit.value_steps": 5})
    with pytest.raises(TPatchError, match="no setting 'together'; known are averaged_key"):
        method_settings(["rome", "memit"], changes={"rome.together": 5})


def test_free_generation_and_questions(tiny_model: Model) -> None:
    records = [
        Record("q", (EditRequest("Ada likes", "red"),), {"reliability": (Probe("Ada likes", "red"),)},
               generation=("Ada likes", "The sun"), questions=("Who likes red?", "Is it Bo?"), answers=("Ada",)),
    ]  # fmt: skip
    report = run(tiny_model, "single", records, generate=True)
    for result in report["results"]:
        assert result["metrics"]["GE"] > 0
        assert result["metrics"]["mquake"] in (0.0, 1.0)
    assert figures(run(tiny_model, "single", records, generate=True)) == figures(report)


def test_contaminated_probes() -> None:
    def record(name: str, **probes: Any) -> Record:
        request = EditRequest(f"{name} likes", "Rome", name, (f"It is {name} who likes",), id=name)
        return Record(name, (request,), {kind: tuple(asked) for kind, asked in probes.items()})

    neighbors = [
        Probe("Bob likes", "x"),
        Probe("It is  Bob who likes?", "x"),
        Probe("Cyd likes", "x"),
        Probe("Ada likes", ""),
    ]
    follows = [Probe("Where in Rome?", "x"), Probe("Is Jerome?", "x")]
    records = [record("Ada", locality=neighbors, portability_reasoning=follows, generalization=follows), record("Bob")]
    first = {"locality": (True, True, False, True), "portability_reasoning": (True, False)}
    assert contaminated_probes(records) == [first, {}]
    # Alone, only what is edited itself.
    assert contaminated_probes(records, together=False)[0]["locality"] == (False, False, False, True)
    assert count_probes(records, contaminated_probes(records)) == {
        "locality": {"all": 4, "contaminated": 3},
        "portability_reasoning": {"all": 2, "contaminated": 1},
        "generalization": {"all": 2, "contaminated": 0},
    }


def with_neighbor(records: list[Record], neighbor: str) -> list[Record]:
    """The first record with another edit's prompt among its neighbours."""
    probes = dict(records[0].probes)
    for which in ("new", "true"):
        kind = f"neighborhood_{which}"
        probes[kind] = (probes[kind][0], Probe(neighbor, probes[kind][0].target))
    return [dataclasses.replace(records[0], probes=probes), *records[1:]]


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
def test_clean_figures_stand_beside_all(tiny_model: Model, tmp_path: Path, protocol: str) -> None:
    records = with_neighbor(make_records(), "Bob likes")
    report = run(tiny_model, protocol, records, output=tmp_path / "out")
    together = protocol != "single"
    assert report["probes"]["neighborhood_true"] == {"all": 10, "contaminated": int(together)}
    for result in report["results"]:
        assert ("NS_clean" in result["metrics"]) is together
        assert ("locality_clean" in result["metrics"]) is together
    page = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "| neighborhood_true | 10 |" in page
    if together:
        dropped = [
            dataclasses.replace(records[0], probes={k: p[:1] for k, p in records[0].probes.items()}),
            *records[1:],
        ]
        clean = run(tiny_model, protocol, dropped)["results"][0]["metrics"]
        assert report["results"][0]["metrics"]["NS_clean"] == pytest.approx(clean["NS"])
        names = [row[0] for row in table([("x", report["results"][0])])]
        assert names[names.index("NS") + 1] == "NS_clean"
        assert names[names.index("locality") + 1] == "locality_clean"
        assert "1 of 10 neighborhood_true probes are contaminated" in page
    page = "".join(str(part) for part in data_remarks(report))
    assert ("contaminated" in page) is together


def test_a_record_that_the_model_cannot_read_never_costs_the_others(
    tiny_model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = Record("long", (EditRequest("x" * 90, "y"),), {"reliability": (Probe("x" * 90, "y"),)})
    records = [*make_records()[:2], long]
    report = run(tiny_model, records=records, output=tmp_path / "out")
    assert report["config"]["n"] == report["results"][0]["n"] == 2
    assert report["data"]["passed_over"] == 1
    assert "the model reads 64" in report["data"]["reasons"][0]
    assert "the model reads 64" in caplog.text
    assert "1 of 3 records passed over" in (tmp_path / "out" / "report.md").read_text("utf-8")
    with pytest.raises(TPatchError, match="the model reads 64"):
        run(tiny_model, records=records, notes=DataNotes(strict=True))
    # What is only asked comes from another file: the report's notes are of the records'.
    caplog.clear()
    stream = run(tiny_model, "sequential", make_records()[:2], held_out=[make_records()[3], long])
    assert (stream["data"]["records"], stream["data"]["passed_over"]) == (2, 0)
    assert "the model reads 64" in caplog.text


def test_the_command_passes_bad_records_over_unless_strict(
    tiny_folder: Any, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = str(tiny_folder(tmp_path)), write_counterfact(tmp_path / "cf.json", make_records())
    rows = json.loads(file.read_text("utf-8"))
    rows[1]["requested_rewrite"]["target_new"]["str"] = ""
    file.write_text(json.dumps(rows), "utf-8")
    base = ["eval", model, "--data", "counterfact", "--file", str(file), "--method", "unedited"]
    assert main([*base, "-o", str(tmp_path / "json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["config"]["n"] == 4
    assert (report["data"]["records"], report["data"]["passed_over"]) == (5, 1)
    assert "record 2: 'requested_rewrite.target_new.str' must be a text" in report["data"]["reasons"][0]
    assert caplog.text.count("1 of 5 records passed over") == 1
    assert json.loads((tmp_path / "json" / "report.json").read_text("utf-8"))["data"] == report["data"]
    assert main([*base, "-o", str(tmp_path / "shown"), "-n", "1"]) == 0
    assert "1 of 5 records passed over" in " ".join(capsys.readouterr().out.split())
    assert main(["report", str(tmp_path / "shown"), "-o", str(tmp_path / "page.html")]) == 0
    assert "1 of 5 records passed over" in (tmp_path / "page.html").read_text("utf-8")
    assert main([*base, "-o", str(tmp_path / "strict"), "-n", "1", "--strict"]) == 1
    assert "record 2: 'requested_rewrite.target_new.str' must be a text" in capsys.readouterr().err


def test_the_command_evaluates_and_compares(tiny_folder: Any, tmp_path: Path, capsys: Any) -> None:
    model, file = str(tiny_folder(tmp_path)), write_counterfact(tmp_path / "cf.json", make_records())
    config = tmp_path / "quick.yaml"
    config.write_text("data: counterfact\nmethod: direct\nprotocol: single\nn: 2\nattempts: 1\n", "utf-8")
    arguments = ["eval", model, "--config", str(config), "--file", str(file), "-o", str(tmp_path / "one"), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["method"] for result in report["results"]] == ["unedited", "direct"]
    assert report["config"]["data"] == "counterfact"
    assert report["config"]["n"] == 2
    (tmp_path / "text.txt").write_text("The sun is red. " * 9, "utf-8")
    text = ["--data", "text", "--file", str(tmp_path / "text.txt"), "-o", str(tmp_path / "text"), "--json"]
    assert main(["eval", model, *text]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["results"][0]["metrics"].keys() >= {"perplexity", "certificate_tokens"}
    assert len(report["results"]) == 1
    folders = [str(tmp_path / "one"), str(tmp_path / "text")]
    assert main(["compare", *folders, "-o", str(tmp_path / "compare.png")]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["compare", folders[0], folders[0]]) == 0
    assert (tmp_path / "compare.png").stat().st_size > 1000
    assert main(["compare", str(tmp_path)]) == 1
    assert "no report.json" in capsys.readouterr().err


def test_mistakes_are_named(tiny_model: Model, tmp_path: Path, capsys: Any) -> None:
    for count in (-1, True, 1.5):
        with pytest.raises(TPatchError, match=f"{count} other facts a subject are impossible; give 0 or more"):
            run(tiny_model, other_facts=count, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    file = write_counterfact(tmp_path / "cf.json", make_records())
    base = ["eval", "nowhere", "--data", "counterfact", "-o", str(tmp_path / "out")]

    def message(*arguments: str) -> str:
        assert main([*base, *arguments]) == 1
        return capsys.readouterr().err

    assert "did you mean 'tpatcher'" in message("--file", str(file), "--method", "tpacher")
    assert "did you mean 'attempts'" in message("--file", str(file), "--set", "atempts=1")
    assert "holds 5 records, but 6 were asked for" in message("--file", str(file), "-n", "6")
    assert "no protocol 'all'" in message("--file", str(file), "--protocol", "all")
    assert "--file is missing" in message()
    cut = tmp_path / "cut.json"
    cut.write_text(file.read_text("utf-8")[:-40], "utf-8")
    assert "record 5: not JSON" in message("--file", str(cut))
    config = tmp_path / "config.yaml"
    config.write_text("protocoll: batch\n", "utf-8")
    assert "did you mean 'protocol'" in message("--config", str(config))
    config.write_text("n: many\n", "utf-8")
    assert "n is 'many'" in message("--config", str(config))
    rows = json.loads(file.read_text("utf-8"))
    del rows[1]["paraphrase_prompts"]
    file.write_text(json.dumps(rows), "utf-8")
    with pytest.raises(TPatchError, match=r"record 2: no 'paraphrase_prompts'"):
        read_counterfact(file, strict=True)
    long = Record("long", (EditRequest("x" * 90, "y"),), {"reliability": (Probe("x" * 90, "y"),)})
    with pytest.raises(TPatchError, match="the model reads 64"):
        run(tiny_model, records=[long])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine", "utf-8")
    with pytest.raises(TPatchError, match="already exists"):
        run(tiny_model, output=tmp_path / "taken")


def test_every_configuration_is_known() -> None:
    folder = Path(__file__).parents[1] / "configs"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        options, changes = Eval("model", output="report", config=str(file)).settle()
        assert options["method"] in METHODS
        assert options["n"]
        assert method_settings([options["method"]], options["preset"], changes)


def test_outcomes_of_an_empty_patch_are_the_base(tiny_model: Model) -> None:
    _, base = tiny_base(tiny_model)
    empty = Patch(jnp.zeros((0, 16)), jnp.zeros(0), jnp.zeros((0, 16)))
    for nothing in (empty, {}, {0: empty, 2: empty}):
        assert same(patched_scores(tiny_model, base, nothing), Outcome(*base.outcome))


def test_a_patch_without_a_sharp_threshold_is_measured_as_it_is_merged(tiny_model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The sun is red. Ada likes the sky. " * 9, "utf-8")
    options: Any = {"text": tmp_path / "text.txt", "text_tokens": 200, "memory": tmp_path / "text.txt"}
    changes = {"least_steps": 150, "most_steps": 300, "lanes": 2}
    request = EditRequest("cat sat in ", "q")
    records = [Record("cat", (request,), {"reliability": (Probe(request.prompt, request.target),)})]
    settings = method_settings(["tpatcher"], "paper", changes)
    report = run(tiny_model, records=records, methods=["tpatcher"], settings=settings, **options)
    assert report["config"]["activation"] == "silu"
    figures = report["results"][1]["metrics"]
    assert "certificate_tokens" not in figures
    editor = METHODS["tpatcher"].build(settings["tpatcher"], options["memory"], None, None)
    with jax.default_matmul_precision("highest"):
        state, _ = editor.step(
            editor.init(tiny_model, jax.random.key(0)), [record.request for record in records], jax.random.key(0)
        )
        assert count_neurons(state.patches)
        windows = read_windows(tiny_model, options["text"], 200)
        merged, relu = (
            text_figures(base, base.outcome, certified=False)["perplexity"]
            for base in (
                base_scores(merge(tiny_model, state.patches), windows),
                base_scores(attach(tiny_model, state.patches, relu=True), windows),
            )
        )
    assert figures["perplexity"] == pytest.approx(merged, rel=1e-4)
    assert merged != pytest.approx(relu, rel=1e-4)
    report = run(tiny_model, records=records, methods=["unedited"], **options)
    assert report["config"]["activation"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_tokens": -5}, "text"),
        ({"seed": 2**40}, "seed 1099511627776 is out of range; give 0 to 4294967295"),
        (
            {"records": [Record("long", (EditRequest("a " * 99, "b"),), {"reliability": (Probe("a " * 99, "b"),)})]},
            "too",
        ),
    ],
)
def test_a_run_that_cannot_be_leaves_no_folder(
    tiny_model: Model, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "text.txt").write_text("The sun is red. " * 9, "utf-8")
    with pytest.raises(TPatchError, match=message):
        run(tiny_model, output=tmp_path / "out", text=tmp_path / "text.txt", **changes)
    assert not (tmp_path / "out").exists()


def test_names_are_no_formulas_in_pictures(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LAYOUT", "constrained")
    records = [dataclasses.replace(record, id=f"cost $5_${number}") for number, record in enumerate(make_records())]
    run(tiny_model, records=records, output=tmp_path / "out")
    assert (tmp_path / "out" / "activations-direct.png").exists()
    assert main(["compare", str(tmp_path / "out"), "-o", str(tmp_path / "compare.png")]) == 0


def test_a_figure_that_a_report_lacks_is_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure))
    columns = [("one", {"metrics": {"ES": 0.5}}), ("other", {"metrics": {"NS": 0.25}})]
    draw_comparison(tmp_path / "compare.png", columns)
    heights = [bar.get_height() for bar in drawn[0].axes[0].patches]
    assert [height for height in heights if height == height] == [0.5, 0.25]


def test_what_is_kept_is_asked_and_locality_may_be_protected(tiny_model: Model, tmp_path: Path) -> None:
    lines = [
        {"prompt": "Ada likes", "target": "red", "locality": ["The sun is", "Bob likes"], "keep": ["The sky is"]},
        {"prompt": "Bob likes", "target": "sky"},
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    records = read_records("requests", tmp_path / "requests.jsonl")
    assert records[0].probes["keep"] == (Probe("The sky is", ""),)
    assert "keep" not in records[1].probes
    report = run(tiny_model, "batch", records)
    assert report["results"][0]["metrics"]["keep"] == 1
    # What another record edits is not kept.
    chosen = _protected(_Chosen(records, [], [], {"data": "requests"}, DataNotes()))
    assert [record.request.keep for record in chosen.records] == [("The sky is", "The sun is"), ()]
    assert [record.probes for record in chosen.records] == [record.probes for record in records]
    assert chosen.about == {"data": "requests", "protect": True}


def test_a_record_that_keeps_nothing_has_the_digest_it_had() -> None:
    """Report folders of versions that did not know ``keep`` can be gone on with."""
    records = make_records()[:1]
    old = dataclasses.asdict(records[0])
    for request in old["requests"]:
        for name in ("keep", "form", "system", "turns", "aliases", "instead_of"):
            del request[name]
    assert _content(records) == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()


def test_options_that_would_do_nothing_are_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("The sun is red. " * 9, "utf-8")
    file = write_counterfact(tmp_path / "cf.json", make_records())
    out = ["-o", str(tmp_path / "out")]
    text = ["--data", "text", "--file", str(tmp_path / "text.txt"), "--text", str(tmp_path / "text.txt")]
    assert main(["eval", "nowhere", *text, *out]) == 1
    assert "with --data text the text is --file" in capsys.readouterr().err
    edits = ["--data", "counterfact", "--file", str(file), "--edits", str(file)]
    assert main(["eval", "nowhere", *edits, *out]) == 1
    assert "--edits belongs to --data text; the edits of counterfact are in --file" in capsys.readouterr().err


def test_a_template_is_told_where_there_is_one(tiny_folder: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "Ada likes", "target": "red"}\n', "utf-8")
    model = str(tiny_folder(tmp_path))
    assert (
        main(["eval", model, "--data", "requests", "--file", str(file), "--method", "direct", "-o", f"{file}.d"]) == 0
    )
    assert "template `" not in (Path(f"{file}.d") / "report.md").read_text("utf-8")
    file = write_counterfact(tmp_path / "cf.json", make_records())
    assert main(["eval", model, "--data", "counterfact", "--file", str(file), "--method", "ft", "-o", f"{file}.d"]) == 0
    page = (Path(f"{file}.d") / "report.md").read_text("utf-8")
    assert "template `Question: {}⏎Answer:`" in page
    assert "attached with" not in page


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unfinished").mkdir()
    journal = Journal("direct", tmp_path)
    (tmp_path / "records-direct.jsonl").mkdir()
    with pytest.raises(TPatchError, match=r"cannot write .*records-direct.jsonl: Is a directory; free some room"):
        journal.add({"id": "one"})
    (tmp_path / "unfinished").rename(tmp_path / "gone")
    with pytest.raises(TPatchError, match=r"cannot write .*state-direct.safetensors"):
        journal.save({"x": np.zeros(2)}, {})
    with pytest.raises(TPatchError, match=r"cannot write .*result-direct.json"):
        journal.finish({})


def small_report(folder: Path, n: int, methods: Any, data: str = "x") -> str:
    folder.mkdir()
    cost: Any = {"seconds": 1234.5}
    results = [
        {"method": name, "protocol": "batch", "moment": "", "n": n, "metrics": {"ES": n / 100, "a_long_figure": 0.1234},
         "cost": cost, "requests": {}}
        for name in methods
    ]  # fmt: skip
    config = {"fingerprint": "f", "data": "counterfact", "model": "tiny"}
    report = {"schema": SCHEMA, "config": config, "data_sha256": data, "results": results}
    (folder / "report.json").write_text(json.dumps(report))
    return str(folder)


def test_comparing_on_a_narrow_terminal_cuts_no_word_and_remarks_on_different_n(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    folders = [
        small_report(tmp_path / f"counterfact-run-{number}", n, ("tpatcher", "rome", "memit"))
        for number, n in enumerate((12, 6, 12))
    ]
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", *folders]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for number in range(3):
        for method in ("tpatcher", "rome", "memit"):
            assert f"counterfact-run-{number}: {method}, batch\n" in shown
    assert shown.count("a_long_figure") == 2  # the table is continued below
    assert "cannot be compared as they are" in shown
    assert main(["compare", *folders, "--json"]) == 0
    (remark,) = json.loads(capsys.readouterr().out.splitlines()[-1])["remarks"]
    assert "n = 6: counterfact-run-1: tpatcher, batch" in remark
    assert main(["compare", folders[0], folders[2], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["remarks"] == []
    other = small_report(tmp_path / "other", 12, ("tpatcher",), "y")
    assert main(["compare", folders[0], other, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["remarks"] == [
        "The data differs from report to report. counterfact-run-0: counterfact; other: counterfact."
    ]
