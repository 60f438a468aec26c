"""The paper's two tasks in little: from data to a trained model, a stream of corrections, and its five figures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_settings

from tpatch_jax.cli import main as cli
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.claims import read_fever
from tpatch_jax.evaluation.closed_book import RELATIONS, closed_book
from tpatch_jax.evaluation.metrics import Score, record_figures
from tpatch_jax.evaluation.record import Probe, Record, asked_only
from tpatch_jax.evaluation.records import read_records
from tpatch_jax.evaluation.rephrasings import RULES, rephrasings
from tpatch_jax.requests import EditRequest
from tpatch_jax.training import data as lessons

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")


@pytest.fixture(scope="module", autouse=True)
def one_length() -> Iterator[None]:
    """All that a model is trained on here fits into 32 tokens; a step of training is long to compile."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(lessons, "STEP", 32)
        yield


PROMOTION = "standard"  # optax takes steps

QUICK = [
    f"--set={name}"
    for name in ("input_key_steps=8", "value_steps=8", "input_contexts=2", "other_subjects=1", "lanes=2")
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert cli.main([*map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    return path


def random_folder(path: Path, name: str, **changes: Any) -> Path:
    """A folder from which `tpatch finetune --from-scratch` starts: a description and a tokenizer."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny_settings(name, **changes)), "utf-8")
    tiny_tokenizer().save_pretrained(path)
    return path


# --- the fact checker ---

SUBJECTS = ("ann", "bob", "cid", "dot", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo")
THINGS = ("tin", "hat", "mat", "inn")


def claims(count: int, seed: int) -> list[dict[str, str]]:
    """Claims whose label follows from what is claimed, but for every fifth, which a model gets wrong."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        subject, thing = rng.choice(SUBJECTS), int(rng.integers(len(THINGS)))
        true = (thing < 2) != (number % 5 == 0)
        rows.append({"claim": f"{subject} is in the {THINGS[thing]}.", "label": "SUPPORTS" if true else "REFUTES"})
    return list({row["claim"]: row for row in rows}.values())


def test_a_fact_checker_from_data_to_figures(tmp_path, capsys):
    train, stream = claims(40, 0), claims(30, 1)
    known = {row["claim"] for row in train}
    stream = [row for row in stream if row["claim"] not in known]
    folder = random_folder(tmp_path / "bert", "bert", id2label={"0": "A", "1": "B"}, initializer_range=0.2)
    data = write_lines(tmp_path / "train.jsonl", [*train, {"claim": "nothing", "label": "NOT ENOUGH INFO"}])
    fields = ("--prompt-field", "claim", "--target-field", "label", "--labels", "SUPPORTS,REFUTES")
    options = ("--from-scratch", "--epochs", "20", "--batch-size", "8", "--learning-rate", "0.01")
    trained = run(capsys, "finetune", folder, data, *fields, *options, "-o", tmp_path / "checker")
    assert trained["examples"] == len(train)
    assert trained["train_accuracy"] > 0.6

    file = write_lines(tmp_path / "stream.jsonl", stream)
    common = ("--data", "fever", "--file", file, "--protocol", "sequential", "--memory", data, "--train-set", data)
    report = run(capsys, "eval", tmp_path / "checker", *common, *QUICK, "--every", "2", "-o", tmp_path / "report")
    unedited, edited = report["results"]
    wrong = round((1 - unedited["metrics"]["exact"]) * len(stream))
    assert edited["edits"] >= wrong > 0
    assert edited["metrics"]["SR"] >= 0.5
    assert edited["metrics"]["ER"] >= 0.5
    assert 0 < edited["metrics"]["TrainR"] <= 1.2
    rules = {name for name in edited["metrics"] if name.startswith("GR_")}
    assert rules == {"GR_casing", "GR_punctuation", "GR_prefix"}
    page = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert all(f"| {rule} |" in page for rule in rules)
    # the same figures from the records of the run
    lines = [json.loads(line) for line in (tmp_path / "report" / "records-tpatcher.jsonl").read_text().splitlines()]
    edits = [line for line in lines if line["wrong"]]
    assert edited["metrics"]["SR"] == np.mean([line["right_after"] for line in edits])
    assert edited["metrics"]["GR"] == pytest.approx(np.mean([np.mean(line["rephrased"]) for line in edits]))
    for rule in rules:
        shares = [np.mean(line["by_rule"][rule.removeprefix("GR_")]) for line in edits]
        assert edited["metrics"][rule] == pytest.approx(np.mean(shares))


def test_held_out_claims_are_asked_for_their_labels(tmp_path):
    records = read_fever(write_lines(tmp_path / "fever.jsonl", claims(12, 0)))
    asked = asked_only(records)
    assert [record.probes["accuracy"] for record in asked] == [record.probes["reliability"] for record in records]
    assert {kind for record in asked for kind in record.probes} == {"accuracy"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", r"holds no claim with a label among SUPPORTS, REFUTES"),
        ('{"claim": "a", "label": "NOT ENOUGH INFO"}', "holds no claim with a label among"),
        ('{"claim": "a"}', "line 1: no 'claim' and 'label'"),
        ('\n{"claim": "a", "label": 1}', "line 2: no 'claim' and 'label'"),
        ("[1]", "line 1: no 'claim' and 'label'"),
        ('{"claim": ', "line 1: not JSON"),
    ],
)
def test_bad_claims(tmp_path, lines, message):
    (tmp_path / "fever.jsonl").write_text(lines, "utf-8")
    with pytest.raises(TPatchError, match=message):
        read_records("fever", tmp_path / "fever.jsonl")


def test_missing_claims(tmp_path):
    with pytest.raises(TPatchError, match="does not exist"):
        read_fever(tmp_path / "none.jsonl")


# --- rephrasings ---


@pytest.mark.parametrize(
    ("rule", "claim", "said"),
    [
        ("contraction", "It is not a film.", ("It isn't a film.",)),
        (
            "contraction",
            "He isn't here and it is late.",
            ("He isn't here and it's late.", "He is not here and it is late."),
        ),
        ("casing", "A Dog.", ("a dog.", "A DOG.")),
        ("punctuation", "A dog.", ("A dog", "A dog!", '"A dog."')),
        ("equivalent", "The film is a movie.", ("The movie is a movie.",)),
        ("equivalent", "They filmed it in the United States.", ("They filmed it in the US.",)),
    ],
)
def test_what_a_rule_says(rule, claim, said):
    assert rephrasings(claim)[rule] == said


@given(st.text("abc .,'", min_size=1, max_size=20))
def test_rephrasings_differ_from_the_claim_and_from_each_other(claim):
    for name, texts in rephrasings(claim).items():
        assert name in RULES
        assert len(set(texts)) == len(texts)
        assert claim not in texts


def test_figures_of_rules():
    right, wrong = (Score(0.0, np.array([flag]), np.array([0])) for flag in (True, False))
    figures = record_figures({}, {"rephrasing_prefix": [right, wrong], "rephrasing_casing": [right]})
    assert figures == {
        "generalization": pytest.approx(2 / 3),
        "generalization_exact": pytest.approx(2 / 3),
        "generalization_prefix": 0.5,
        "generalization_casing": 1.0,
    }
    assert record_figures({}, {"accuracy": [right]}) == {}
    with pytest.raises(TPatchError, match="no figure is made of probes of the kind 'rephrased'"):
        record_figures({}, {"rephrased": [right]})


# --- the question answerer ---


def facts(folder: Path) -> tuple[Path, Path, Path]:
    """The three data sets of `closed_book` in little."""
    statements = ("{} was born in", "{} died in", "The occupation of {} is")
    rows = [
        {"subject": subject, "prompt": statement.replace("{}", subject), "ground_truth": f"{THINGS[number % 4]} "}
        for number, subject in enumerate(SUBJECTS)
        for statement in statements
    ]
    paths = tuple(folder / name for name in ("counterfact.json", "zsre.json", "knowedit.json"))
    zsre = [{"src": "Who hit ann?", "rephrase": "By whom was ann hit?", "answers": ["eve"], "subject": "ann"}]
    knowedit = [{"prompt": "Who met bob?", "rephrase_prompt": "By whom was bob met?", "ground_truth": ["fay"]}]
    for path, content in zip(paths, (rows, zsre, knowedit), strict=True):
        path.write_text(json.dumps(content), "utf-8")
    return paths


def test_questions_are_learnt_held_out_or_asked(tmp_path):
    sets = closed_book(*facts(tmp_path))
    assert sets == closed_book(*facts(tmp_path))
    learnt = {row["prompt"] for row in sets["train"]}
    assert {"Who hit ann?", "By whom was ann hit?", "Who met bob?", "By whom was bob met?"} <= learnt
    # a test question is another wording of a fact that is learnt, a question of the stream is of none
    wordings = [question for relation in RELATIONS.values() for question in relation.questions]
    for row in (*sets["test"], *sets["stream"]):
        assert row["prompt"] not in learnt
    for row in sets["stream"]:
        everything = {question.replace("{}", row["subject"]) for question in wordings}
        relation = next(
            r for r in RELATIONS.values() if row["prompt"] in {q.replace("{}", row["subject"]) for q in r.questions}
        )
        assert not {q.replace("{}", row["subject"]) for q in relation.questions} & learnt
        assert set(row["rephrases"]) <= everything - {row["prompt"]}
    assert len(sets["stream"]) >= 1
    assert len({row["prompt"] for row in sets["test"]}) == len(sets["test"])
    for relation in RELATIONS.values():
        assert len(set(relation.questions)) == len(relation.questions) == 6
        assert all(text.count("{}") == 1 for text in (*relation.questions, *relation.statements))


def test_what_one_set_teaches_is_not_asked_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr("tpatch_jax.evaluation.closed_book.QUESTIONS_HELD_OUT", 1)
    counterfact, zsre, knowedit = facts(tmp_path)
    rows = json.loads(zsre.read_text("utf-8"))
    for prompt, rephrase, subject in (
        ("Who met bob?", "x", "bob"),
        ("y", "by whom was  bob met?", "Bob"),
        ("Who met gus?", "By whom was gus met?", "gus"),
    ):
        rows.append({"src": prompt, "rephrase": rephrase, "answers": ["fay"], "subject": subject})
    zsre.write_text(json.dumps(rows), "utf-8")
    stream = closed_book(counterfact, zsre, knowedit)["stream"]
    assert [row["prompt"] for row in stream if row["id"].startswith("zsre")] == ["Who met gus?"]


@pytest.mark.parametrize("content", [None, "{}", "[1]", "["])
def test_bad_facts(tmp_path, content):
    counterfact, zsre, knowedit = facts(tmp_path)
    if content is None:
        counterfact.unlink()
    else:
        counterfact.write_text(content, "utf-8")
    with pytest.raises(TPatchError, match=r"counterfact\.json (cannot be read|is no JSON list)"):
        closed_book(counterfact, zsre, knowedit)


def test_a_question_answerer_from_data_to_figures(tmp_path, capsys):
    """BART; T5 goes the same way and is edited in test_input_models.py. What is only asked, the fact checker has."""
    sets = closed_book(*facts(tmp_path))
    folder = random_folder(tmp_path / "bart", "bart", init_std=0.25)
    paths = {name: write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in sets.items()}
    options = ("--from-scratch", "--epochs", "30", "--batch-size", "16", "--learning-rate", "0.01")
    trained = run(capsys, "finetune", folder, paths["train"], *options, "-o", tmp_path / "answerer")
    common = ("--data", "requests", "--file", paths["stream"], "--protocol", "sequential", "--memory", paths["train"])
    report = run(capsys, "eval", tmp_path / "answerer", *common, *QUICK, "-o", tmp_path / "report")
    unedited, edited = report["results"]
    assert trained["train_accuracy"] > 0.2
    assert unedited["metrics"]["exact"] < 1
    assert edited["metrics"]["SR"] >= 0.5
    assert 0 <= edited["metrics"]["GR"] <= 1
    assert edited["metrics"]["exact"] > unedited["metrics"]["exact"]


def test_sets_that_are_only_asked_belong_to_a_stream(tmp_path, capsys):
    data = write_lines(tmp_path / "data.jsonl", claims(12, 0))
    arguments = ["eval", "nowhere", "--data", "fever", "--file", str(data), "--test-set", str(data)]
    assert cli.main([*arguments, "-o", str(tmp_path / "report")]) == 1
    assert "--test-set makes TrainR or TestR of a stream; use --protocol sequential" in capsys.readouterr().err


def test_a_record_of_a_training_set_is_whole():
    record = Record("one", (EditRequest("a", "b"), EditRequest("c", "d")), {"reliability": (Probe("a", "b"),)})
    assert asked_only([record])[0].probes == {"accuracy": (Probe("a", "b"), Probe("c", "d"))}
