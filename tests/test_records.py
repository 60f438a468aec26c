"""Data sets: each schema on a file written here, and what is said of files that cannot be read."""

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.records import (
    DATA,
    PLAIN,
    QUESTION,
    DataNotes,
    Probe,
    is_paraphrase,
    read_counterfact,
    read_knowedit,
    read_mquake,
    read_records,
    read_requests_records,
    read_zsre,
)

COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 70,
    "requested_rewrite": {
        "prompt": "The river {} flows into the",
        "relation_id": "P0",
        "target_new": {"str": "Danube", "id": "Q1"},
        "target_true": {"str": "Rhine", "id": "Q2"},
        "subject": "Aar",
    },
    "paraphrase_prompts": ["Words before. The Aar ends in the", "Aar's mouth is at the"],
    "neighborhood_prompts": ["The river Main flows into the", "The river Ruhr flows into the"],
    "attribute_prompts": ["The river Inn flows into the"],
    "generation_prompts": ["Along the Aar,", "The Aar's towns", "Along the Aar,"],
}
FLAT = {
    "case_id": 3,
    "prompt": "The river Aar flows into the",
    "target_new": "Danube",
    "subject": "Aar",
    "ground_truth": "Rhine",
    "rephrase_prompt": "Words before. The Aar ends in the",
    "locality_prompt": "The river Main flows into the",
    "locality_ground_truth": "Rhine",
}
ZSRE = {
    "subject": "Aar Bridge",
    "src": "Who built Aar Bridge?",
    "pred": "Mr. Roe",
    "rephrase": "Aar Bridge was built by whom?",
    "alt": " Jane Doe",
    "answers": ["Ann Low", "A. Low"],
    "loc": "nq question: who sang the first song",
    "loc_ans": "The Band",
    "cond": "Mr. Roe >> Jane Doe || Who built Aar Bridge?",
    "portability": {"Recalled Relation": "(...)", "New Question": "Where was Doe born?", "New Answer": "Bern"},
}
KNOWEDIT = {
    "subject": "Aar Bridge",
    "target_new": "Jane Doe",
    "prompt": "Who built Aar Bridge?",
    "ground_truth": ["Ann Low"],
    "rephrase_prompt": "Aar Bridge was built by whom?",
    "cond": "...",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The length of Aar Bridge is", "ground_truth": ["90 m", "90 metres"]},
            {"prompt": "Aar Bridge length", "ground_truth": ["90 m"]},
        ],
        "Forgetfulness": [{"prompt": "The Aar Bridge was opened by", "ground_truth": ["Bob"]}],
    },
    "portability": {
        "Subject_Aliasing": [{"prompt": "Who built the bridge over the Aar?", "ground_truth": "Jane Doe"}],
        "Reasoning": [{"prompt": "Where was its builder born?", "ground_truth": ["Bern"]}],
        "Logical_Generalization": [],
    },
}
MQUAKE = {
    "case_id": 5,
    "requested_rewrite": [
        {
            "prompt": "{} was built by",
            "target_new": {"str": "Doe"},
            "target_true": {"str": "Low"},
            "subject": "Aar Bridge",
        },
        {"prompt": "{} was born in", "target_new": {"str": "Rome"}, "target_true": {"str": "Bern"}, "subject": "Doe"},
    ],
    "questions": ["Where was the builder of Aar Bridge born? ", "Birthplace of its builder?", "Born where?"],
    "answer": "Bern",
    "answer_alias": [],
    "new_answer": "Rome",
    "new_answer_alias": ["Roma"],
    "single_hops": [],
    "new_single_hops": [],
}
EXAMPLES = {"counterfact": COUNTERFACT, "zsre": ZSRE, "knowedit": KNOWEDIT, "mquake": MQUAKE}


def write(folder: Path, *records: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def changed(record: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(record), **fields}


def asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def test_counterfact_in_the_original_format(tmp_path: Path) -> None:
    [record] = read_counterfact(write(tmp_path, COUNTERFACT))
    request = record.request
    assert (record.id, request.id, len(record.requests)) == ("cf-7", "cf-7", 1)
    assert (request.prompt, request.target, request.subject) == ("The river Aar flows into the", "Danube", "Aar")
    assert request.rephrases == tuple(COUNTERFACT["paraphrase_prompts"])
    assert request.locality == tuple(COUNTERFACT["neighborhood_prompts"])
    assert record.generation == tuple(COUNTERFACT["generation_prompts"])
    assert record.probes == {
        "rewrite_new": (Probe(request.prompt, "Danube"),),
        "rewrite_true": (Probe(request.prompt, "Rhine"),),
        "paraphrase_new": tuple(Probe(prompt, "Danube") for prompt in request.rephrases),
        "paraphrase_true": tuple(Probe(prompt, "Rhine") for prompt in request.rephrases),
        "neighborhood_new": tuple(Probe(prompt, "Danube") for prompt in request.locality),
        "neighborhood_true": tuple(Probe(prompt, "Rhine") for prompt in request.locality),
    }


def test_counterfact_portability_is_a_question(tmp_path: Path) -> None:
    path = write(tmp_path, changed(COUNTERFACT, portability=ZSRE["portability"]))
    assert read_counterfact(path)[0].probes["portability"] == (Probe(asked("Where was Doe born?"), "Bern"),)
    assert read_counterfact(path, PLAIN)[0].probes["portability"] == (Probe("Where was Doe born?", "Bern"),)


def test_counterfact_without_prompts_of_a_kind_has_no_such_probes(tmp_path: Path) -> None:
    record = changed(COUNTERFACT, paraphrase_prompts=[])
    del record["generation_prompts"]
    [record] = read_counterfact(write(tmp_path, record))
    assert "paraphrase_new" not in record.probes
    assert record.generation == ()


def test_counterfact_flattened(tmp_path: Path) -> None:
    [record] = read_counterfact(write(tmp_path, changed(FLAT, locality_ground_truth="Weser")))
    assert (record.id, record.request.prompt, record.request.target) == ("cf-3", FLAT["prompt"], "Danube")
    assert {kind: probes[0] for kind, probes in record.probes.items()} == {
        "rewrite_new": Probe(FLAT["prompt"], "Danube"),
        "rewrite_true": Probe(FLAT["prompt"], "Rhine"),
        "paraphrase_new": Probe(FLAT["rephrase_prompt"], "Danube"),
        "paraphrase_true": Probe(FLAT["rephrase_prompt"], "Rhine"),
        "neighborhood_new": Probe(FLAT["locality_prompt"], "Danube"),
        "neighborhood_true": Probe(FLAT["locality_prompt"], "Weser"),
    }
    assert record.generation == ()


def test_zsre_as_in_easyedit(tmp_path: Path) -> None:
    [record] = read_zsre(write(tmp_path, ZSRE))
    request = record.request
    assert (record.id, request.target, request.subject) == ("zsre-0", "Jane Doe", "Aar Bridge")
    assert request.prompt == asked("Who built Aar Bridge?")
    assert request.rephrases == (asked("Aar Bridge was built by whom?"),)
    assert request.locality == (asked("who sang the first song?"),)
    assert record.probes == {
        "reliability": (Probe(request.prompt, "Jane Doe"),),
        "generalization": (Probe(request.rephrases[0], "Jane Doe"),),
        "locality": (Probe(request.locality[0], "The Band"),),
        "portability": (Probe(asked("Where was Doe born?"), "Bern"),),
    }


def test_zsre_as_in_rome(tmp_path: Path) -> None:
    record = changed(ZSRE)
    del record["alt"]
    [record] = read_zsre(write(tmp_path, record), "rome")
    assert record.probes == {
        "reliability": (Probe(asked("Who built Aar Bridge?"), "Ann Low"),),
        "generalization": (Probe(asked("Aar Bridge was built by whom?"), "Ann Low"),),
        "locality_answer": (Probe(asked("who sang the first song?"), "The Band"),),
    }


@pytest.mark.parametrize(
    ("reading", "kind", "loc"),
    [
        ("easyedit", "locality", "nq question: who sang the first song"),
        ("rome", "locality_answer", "nq question: who sang the first song?"),
    ],
)
def test_zsre_bare_is_what_each_protocol_asks(tmp_path: Path, reading: str, kind: str, loc: str) -> None:
    [record] = read_zsre(write(tmp_path, ZSRE), reading, PLAIN)
    assert record.request.prompt == "Who built Aar Bridge?"
    assert record.probes[kind] == (Probe(loc, "The Band"),)


def test_zsre_without_portability(tmp_path: Path) -> None:
    record = changed(ZSRE)
    del record["portability"]
    assert "portability" not in read_zsre(write(tmp_path, record))[0].probes


def test_knowedit(tmp_path: Path) -> None:
    [record] = read_knowedit(write(tmp_path, KNOWEDIT))
    assert record.id == "knowedit-0"
    assert record.request.prompt == asked("Who built Aar Bridge?")
    assert record.request.locality == (
        "The length of Aar Bridge is",
        "The Aar Bridge was opened by",
    )
    assert record.probes == {
        "reliability": (Probe(asked("Who built Aar Bridge?"), "Jane Doe"),),
        "generalization": (Probe(asked("Aar Bridge was built by whom?"), "Jane Doe"),),
        "relation_specificity": (Probe("The length of Aar Bridge is", "90 m"),),
        "locality": (Probe("The Aar Bridge was opened by", "Bob"),),
        "portability_subject_aliasing": (Probe(asked("Who built the bridge over the Aar?"), "Jane Doe"),),
        "portability_reasoning": (Probe(asked("Where was its builder born?"), "Bern"),),
    }


def test_mquake_has_several_edits_a_case(tmp_path: Path) -> None:
    [record] = read_mquake(write(tmp_path, MQUAKE))
    assert [(r.id, r.prompt, r.target, r.subject) for r in record.requests] == [
        ("mquake-5-0", "Aar Bridge was built by", "Doe", "Aar Bridge"),
        ("mquake-5-1", "Doe was born in", "Rome", "Doe"),
    ]
    assert record.request is record.requests[0]
    assert record.questions[0] == asked("Where was the builder of Aar Bridge born?")
    assert record.answers == ("Rome", "Roma")
    assert record.probes["reliability"] == (Probe("Aar Bridge was built by", "Doe"), Probe("Doe was born in", "Rome"))
    assert record.probes["multi_hop"] == tuple(Probe(question, "Rome") for question in record.questions)


def test_requests(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    first = {"id": "a", "prompt": "P is", "target": "x", "subject": "P", "rephrases": ["P's"], "locality": ["Q is"]}
    path.write_text("\n".join(map(json.dumps, [first, {"prompt": "R is", "target": "y"}])), encoding="utf-8")
    full, bare = read_requests_records(path)
    assert full.probes == {
        "reliability": (Probe("P is", "x"),),
        "generalization": (Probe("P's", "x"),),
        "locality": (Probe("Q is", ""),),
    }
    assert (bare.id, bare.request.id) == ("edit-1", "edit-1")
    assert set(bare.probes) == {"reliability"}


def test_first_records_and_one_per_subject(tmp_path: Path) -> None:
    records = [changed(ZSRE, subject=subject) for subject in ("A", "B", "A ", "C")]
    path = write(tmp_path, *records)
    assert [record.id for record in read_records("zsre", path, n=3)] == ["zsre-0", "zsre-1", "zsre-2"]
    kept = read_records("zsre", path, n=3, one_per_subject=True)
    assert [record.id for record in kept] == ["zsre-0", "zsre-1", "zsre-3"]
    with pytest.raises(TPatchError, match=r"holds 4 records, 3 with one per subject, but 4 were asked .* 3 or fewer"):
        read_records("zsre", path, n=4, one_per_subject=True)
    with pytest.raises(TPatchError, match="holds 4 records, but 5 were asked"):
        read_records("zsre", path, n=5)
    with pytest.raises(TPatchError, match="0 records were asked"):
        read_records("zsre", path, n=0)


def test_one_per_subject_with_several_edits_a_case(tmp_path: Path) -> None:
    def case(number: int, *subjects: str) -> dict[str, Any]:
        edits = [changed(MQUAKE["requested_rewrite"][0], subject=subject) for subject in subjects]
        return changed(MQUAKE, case_id=number, requested_rewrite=edits)

    # Case 1 goes for B; the subject C of a case that is gone does not hold back case 2.
    path = write(tmp_path, case(0, "A", "B"), case(1, "B", "C"), case(2, "C"))
    assert [record.id for record in read_records("mquake", path, one_per_subject=True)] == ["mquake-0", "mquake-2"]


@pytest.mark.parametrize("data", EXAMPLES)
def test_reading_by_name(tmp_path: Path, data: str) -> None:
    [record] = read_records(data, write(tmp_path, EXAMPLES[data]))
    assert record.probes
    assert all(record.probes.values())


@pytest.mark.parametrize("data", EXAMPLES)
def test_a_file_cut_short_names_the_record(tmp_path: Path, data: str) -> None:
    path = write(tmp_path, EXAMPLES[data], EXAMPLES[data])
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    with pytest.raises(TPatchError, match=r"data.json, record 2: not JSON .* get it again"):
        read_records(data, path)


@pytest.mark.parametrize("content", EXAMPLES)
@pytest.mark.parametrize("data", EXAMPLES)
def test_a_file_of_another_data_set_says_which(tmp_path: Path, data: str, content: str) -> None:
    path = write(tmp_path, EXAMPLES[content])
    if data != content:
        with pytest.raises(TPatchError, match=f"not of {data} but of {content}; read it with --data {content}"):
            read_records(data, path)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ("counterfact", "requested_rewrite.target_new.str"),
        ("counterfact", "requested_rewrite.target_true"),
        ("counterfact", "requested_rewrite.subject"),
        ("counterfact", "paraphrase_prompts"),
        ("counterfact", "neighborhood_prompts"),
        ("counterfact", "case_id"),
        ("zsre", "src"),
        ("zsre", "rephrase"),
        ("zsre", "alt"),
        ("zsre", "loc"),
        ("zsre", "loc_ans"),
        ("zsre", "subject"),
        ("zsre", "portability.New Answer"),
        ("knowedit", "prompt"),
        ("knowedit", "target_new"),
        ("knowedit", "rephrase_prompt"),
        ("mquake", "questions"),
        ("mquake", "new_answer"),
        ("mquake", "new_answer_alias"),
        ("mquake", "requested_rewrite"),
    ],
)
def test_a_missing_field_is_named_with_its_record(tmp_path: Path, data: str, field: str) -> None:
    record = changed(EXAMPLES[data])
    *above, name = field.split(".")
    holder = record
    for step in above:
        holder = holder[step]
    del holder[name]
    path = write(tmp_path, changed(EXAMPLES[data], case_id=99), record)
    with pytest.raises(TPatchError, match=rf"data.json, record 2: no '{field}.*; add it, or take the record out"):
        read_records(data, path, strict=True)


@pytest.mark.parametrize("field", list(FLAT))
def test_a_missing_field_of_the_flattened_file(tmp_path: Path, field: str) -> None:
    record = changed(FLAT)
    del record[field]
    with pytest.raises(TPatchError, match=f"record 2: no '{field}'"):
        read_counterfact(write(tmp_path, FLAT, record), strict=True)


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        ("zsre", {"alt": "  "}, "record 1: 'alt' must be a text that is not empty"),
        ("zsre", {"src": 3}, "'src' must be a text"),
        ("counterfact", {"paraphrase_prompts": "one"}, "'paraphrase_prompts' must be a list of texts"),
        ("counterfact", {"paraphrase_prompts": [""]}, "'paraphrase_prompts' must be a list of texts"),
        (
            "knowedit",
            {"portability": {"Reasoning": [{"prompt": "Why?"}]}},
            "portability.Reasoning 1: no 'ground_truth'",
        ),
        (
            "knowedit",
            {"locality": {"X": [{"prompt": "P", "ground_truth": []}]}},
            "'ground_truth' must be a list of one",
        ),
        ("knowedit", {"locality": []}, "'locality' must be an object"),
        ("mquake", {"questions": []}, "record 1: 'questions' is empty"),
        ("mquake", {"requested_rewrite": []}, "record 1: 'requested_rewrite' is empty"),
        (
            "mquake",
            {"requested_rewrite": [{"subject": "A", "prompt": "is"}]},
            r"requested_rewrite 1: 'prompt' must .* {}",
        ),
        ("mquake", {"requested_rewrite": ["A"]}, "'requested_rewrite' must be a list of objects"),
    ],
)
def test_a_field_of_the_wrong_kind(tmp_path: Path, data: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TPatchError, match=message):
        read_records(data, write(tmp_path, changed(EXAMPLES[data], **fields)), strict=True)


def test_zsre_in_romes_reading_needs_an_answer(tmp_path: Path) -> None:
    with pytest.raises(TPatchError, match="record 1: 'answers' must be a list of one text or more"):
        read_zsre(write(tmp_path, changed(ZSRE, answers=[])), "rome")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JSON list"),
        (b"[]", "is a JSON list of records, and this is not"),
        (b'{"version": 1}', "is a JSON list of records, and this is not"),
        (b'{"a": 1}\n{"a": 2}', "JSON lines go with --data requests"),
        (b"[1]", "record 1: int instead of an object"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
    ],
)
def test_files_that_are_no_data_set(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(TPatchError, match=message):
        read_records("zsre", path)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TPatchError, match="does not exist"):
        read_records("zsre", tmp_path / "none.json")
    with pytest.raises(TPatchError, match="cannot be read"):
        read_records("zsre", tmp_path)


def test_an_id_that_occurs_twice(tmp_path: Path) -> None:
    with pytest.raises(TPatchError, match="record 2: the id 'cf-7' is that of record 1"):
        read_records("counterfact", write(tmp_path, COUNTERFACT, COUNTERFACT), strict=True)


@pytest.mark.parametrize("data", EXAMPLES)
def test_options_are_checked_whatever_the_data_set(tmp_path: Path, data: str) -> None:
    path = write(tmp_path, EXAMPLES[data])
    with pytest.raises(TPatchError, match="no reading 'mend'; choose one of easyedit, rome"):
        read_records(data, path, reading="mend")
    with pytest.raises(TPatchError, match=r"must hold one \{\} for the question"):
        read_records(data, path, template="Question:")
    with pytest.raises(TPatchError, match="no data set 'trivia'; choose one of counterfact"):
        read_records("trivia", path)


def test_a_template_with_braces_in_the_question(tmp_path: Path) -> None:
    [record] = read_zsre(write(tmp_path, changed(ZSRE, src="What is {x}?")), template="Q: {} A:")
    assert record.request.prompt == "Q: What is {x}? A:"
    assert QUESTION.format("x") == asked("x")


BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "counterfact": [
        (changed(FLAT, target_new=""), "'target_new' must be a text that is not empty"),
        (changed(FLAT, rephrase_prompt=None), "'rephrase_prompt' must be a text that is not empty"),
        (changed(FLAT, case_id=3), "the id 'cf-3' is that of record 1"),
    ],
    "zsre": [
        (changed(ZSRE, alt=""), "'alt' must be a text that is not empty"),
        (changed(ZSRE, alt=["x"]), "'alt' must be a text that is not empty"),
        ({}, "no 'alt'"),
    ],
    "knowedit": [
        (changed(KNOWEDIT, target_new=" "), "'target_new' must be a text that is not empty"),
        (changed(KNOWEDIT, locality=3), "'locality' must be an object"),
    ],
    "mquake": [
        (changed(MQUAKE, case_id=6, questions=[""]), "'questions' must be a list of texts"),
        (changed(MQUAKE, case_id=6, new_answer=None), "'new_answer' must be a text"),
        (changed(MQUAKE, case_id=6, new_answer_alias=[3]), "'new_answer_alias' must be a list of texts"),
    ],
}
GOOD = {"counterfact": FLAT, "zsre": ZSRE, "knowedit": KNOWEDIT, "mquake": MQUAKE}


@pytest.mark.parametrize(("data", "bad", "message"), [(data, *one) for data, ones in BAD.items() for one in ones])
def test_a_bad_record_never_costs_the_others(
    tmp_path: Path, data: str, bad: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = GOOD[data]
    path = write(tmp_path, good, bad, changed(good, case_id=99))
    notes = DataNotes()
    with caplog.at_level(logging.WARNING):
        assert len(read_records(data, path, notes=notes)) == 2
        assert not caplog.records
        records = read_records(data, path)
    assert len(records) == 2
    assert records[1].id.endswith("-2" if data in ("zsre", "knowedit") else "-99")
    assert len(notes.passed_over) == 1
    assert notes.summary()["passed_over"] == 1
    assert notes.records == 3
    assert f"record 2: {message}" in notes.passed_over[0]
    said = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert said == [f"{path}: 1 of 3 records passed over: {notes.passed_over[0]}"]
    with pytest.raises(TPatchError, match=f"record 2: {message}"):
        read_records(data, path, strict=True)


def test_an_entry_that_is_no_object_is_passed_over(tmp_path: Path) -> None:
    notes = DataNotes()
    assert len(read_records("zsre", write(tmp_path, 3, ZSRE, None), notes=notes)) == 1
    assert [reason.rpartition("data.json, ")[2] for reason in notes.passed_over] == [
        "record 1: int instead of an object; take it out",
        "record 3: NoneType instead of an object; take it out",
    ]


def test_n_counts_what_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, changed(ZSRE, alt=""), ZSRE, ZSRE)
    assert [record.id for record in read_records("zsre", path, n=1)] == ["zsre-1"]
    with pytest.raises(TPatchError, match="holds 2 records that can be read, but 3 were asked"):
        read_records("zsre", path, n=3)


def test_a_file_without_any_good_record_says_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, changed(ZSRE, alt=""), changed(ZSRE, alt=""))
    with pytest.raises(TPatchError, match=r"record 1: 'alt' must be .* \(2 records, and none can be read\)"):
        read_records("zsre", path)


def test_bad_lines_of_requests_and_claims(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(
        b'{"prompt": "P is", "target": "x"}\n{"prompt": "Q is"}\nnot JSON\n\xff\n\n{"prompt": "R is", "target": "y"}\n'
    )
    notes = DataNotes()
    assert [record.request.prompt for record in read_records("requests", path, notes=notes)] == ["P is", "R is"]
    assert [reason.rpartition("jsonl, ")[2][:15] for reason in notes.passed_over] == [
        "line 2: no 'tar", "line 3: not JSO", "line 4: not UTF"
    ]  # fmt: skip
    assert notes.records == 5
    for line in ("Q is", "not JSON"):
        path.write_text(f'{{"prompt": "P is", "target": "x"}}\n{{"prompt": "{line}"}}\n', "utf-8")
        with pytest.raises(TPatchError, match="line 2: no 'target'"):
            read_records("requests", path, strict=True)
    lines = [{"claim": "A.", "label": "SUPPORTS"}, {"claim": "B."}, {"claim": " ", "label": "REFUTES"}, "x"]
    path.write_text("\n".join(map(json.dumps, [*lines, {"claim": "C.", "label": "NOT ENOUGH INFO"}])), "utf-8")
    notes = DataNotes()
    assert [record.id for record in read_records("fever", path, notes=notes)] == ["fever-1"]
    assert (len(notes.passed_over), notes.counts) == (3, {"claims with another label, left out": 1})
    with pytest.raises(TPatchError, match="line 2: no 'claim' and 'label'"):
        read_records("fever", path, strict=True)


def test_a_portability_question_without_an_answer_is_left_out(tmp_path: Path) -> None:
    bad = changed(ZSRE, portability={"New Question": "Where?", "New Answer": ""})
    notes = DataNotes()
    first, second = read_records("zsre", write(tmp_path, bad, ZSRE), notes=notes)
    assert "portability" not in first.probes
    assert "portability" in second.probes
    assert notes.counts == {"portability questions lack a question or an answer, left out": 1}
    with pytest.raises(TPatchError, match=r"record 1: 'portability.New Answer' must be a text"):
        read_records("zsre", write(tmp_path, bad), strict=True)


@pytest.mark.parametrize(
    ("text", "subject", "paraphrase"),
    [
        ("He left. Aar ends in the", "Aar", True),
        ('He sang "Hey." Aar ends in the', "Aar", True),
        ("References\n\nCategory:Rivers Aar ends in the", "Aar", True),
        ("Why? In Aar, people speak", "Aar", True),
        ("He left. AAR ends in the", "Aar", True),
        ("Aar ends in the", "Aar", False),
        ("Aar, a river. It ends in the", "Aar", False),
        ("Where Aar flows, people speak the language of", "Aar", False),
        ("The mayor of St. Louis is", "Louis", False),
        ("Dr. Low is from", "Low", False),
        ("J. R. Low's home is in", "J. R. Low", False),
    ],
)
def test_a_sentence_end_before_the_subject_makes_a_paraphrase(text: str, subject: str, paraphrase: bool) -> None:
    assert is_paraphrase(text, subject) is paraphrase


def test_generation_prompts_of_the_flattened_file_are_no_paraphrases(tmp_path: Path) -> None:
    other = changed(FLAT, case_id=4, rephrase_prompt="The Aar's towns are")
    notes = DataNotes()
    paraphrase, generation = read_counterfact(write(tmp_path, FLAT, other), notes=notes)
    assert paraphrase.request.rephrases == (FLAT["rephrase_prompt"],)
    assert paraphrase.generation == ()
    assert generation.request.rephrases == ()
    assert generation.generation == ("The Aar's towns are",)
    assert not {"paraphrase_new", "paraphrase_true"} & set(generation.probes)
    assert notes.counts == {
        "rephrase_prompt are paraphrases, of which PS and generalization are": 1,
        "rephrase_prompt are generation prompts, which ask something else: for GE, not in PS": 1,
    }


def knowedit(**fields: Any) -> dict[str, Any]:
    return changed(KNOWEDIT, **fields)


def test_knowedit_leaves_out_what_contradicts_the_edit(tmp_path: Path) -> None:
    length = {"prompt": "The length of Aar Bridge is", "ground_truth": ["90 m"]}
    contradicting = [
        {"prompt": "The architect of Aar Bridge is", "ground_truth": ["Ann Low"]},
        {"prompt": "Aar Bridge architect", "ground_truth": ["Ann  low."]},
    ]
    path = write(
        tmp_path,
        knowedit(locality={"Relation_Specificity": [*contradicting, length]}),
        knowedit(locality={"Relation_Specificity": contradicting}),
        knowedit(target_new="ann low"),
        KNOWEDIT,
    )
    notes = DataNotes()
    mixed, none, whole = read_knowedit(path, notes=notes)
    assert mixed.probes["relation_specificity"] == (Probe("The length of Aar Bridge is", "90 m"),)
    assert mixed.request.locality == ("The length of Aar Bridge is",)
    assert "relation_specificity" not in none.probes
    assert none.request.locality == ()
    assert whole.id == "knowedit-3"
    assert notes.counts == {
        "records in which locality prompts ask for the edited fact and want the old answer; the prompts left out": 2,
        "records whose target is the old answer, left out": 1,
        "locality prompts that ask again what another of their record asks, left out": 2,
    }
    with pytest.raises(TPatchError, match="record 1: the locality prompt 'The architect of Aar Bridge is' asks for"):
        read_knowedit(path, strict=True)
    with pytest.raises(TPatchError, match="record 1: the target 'ann low' is the old answer"):
        read_knowedit(write(tmp_path, knowedit(target_new="ann low", locality={})), strict=True)


WIKIDATA = {
    "subject": "Leo Roe",
    "prompt": "The place of death of Leo Roe is",
    "target_new": "Berlin",
    "ground_truth": "Bern",
    "portability": {
        "Reasoning": [
            {"prompt": "The river in the place of death of Leo Roe is", "ground_truth": [["Spree", "River Spree"]]},
            {"prompt": "Is Leo Roe alive?", "ground_truth": [["no"], ["false"]]},
        ],
        "Subject_Aliasing": [{"prompt": "The place of death of L. Roe is", "ground_truth": [[""]]}],
        "Logical_Generalization": None,
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The place of birth of Leo Roe is", "ground_truth": [["Bern"]]},
            {"prompt": ["The gender of Leo Roe is"], "ground_truth": "male"},
            {"prompt": "The place of death of Leo Roe is", "ground_truth": ["Bern"]},
            {"prompt": "The father of Leo Roe is", "ground_truth": []},
        ],
        "Forgetfulness": [{"prompt": "The place of death of Leo Roe, which is not Berlin, is", "ground_truth": "Bern"}],
    },
}


def test_knowedits_sets_of_wikidata(tmp_path: Path) -> None:
    recent = changed(WIKIDATA, locality={}, portability={})
    del recent["ground_truth"]
    notes = DataNotes()
    first, second = read_records("knowedit", write(tmp_path, WIKIDATA, recent), notes=notes)
    assert first.request.prompt == "The place of death of Leo Roe is"
    assert first.request.rephrases == ()
    # The place of birth may be what the place of death was, and the edited fact itself is left out.
    assert first.probes == {
        "reliability": (Probe("The place of death of Leo Roe is", "Berlin"),),
        "relation_specificity": (
            Probe("The place of birth of Leo Roe is", "Bern"),
            Probe("The gender of Leo Roe is", "male"),
        ),
        "locality": (Probe("The place of death of Leo Roe, which is not Berlin, is", "Bern"),),
        "portability_reasoning": (
            Probe("The river in the place of death of Leo Roe is", "Spree"),
            Probe(asked("Is Leo Roe alive?"), "no"),
        ),
    }
    assert set(second.probes) == {"reliability"}
    assert notes.counts["probes without a prompt or an answer, left out"] == 2
    with pytest.raises(TPatchError, match=r"record 1, locality.Relation_Specificity 4: 'ground_truth' must be a list"):
        read_records("knowedit", write(tmp_path, WIKIDATA), strict=True)


def test_codes_are_no_answers_of_mquake(tmp_path: Path) -> None:
    cases = [
        changed(MQUAKE, case_id=number, new_answer_alias=aliases)
        for number, aliases in enumerate((["ro", "Roma", "eng"], ["NA", "UK"], [" ", "Roma"]))
    ]
    notes = DataNotes()
    records = read_mquake(write(tmp_path, *cases), notes=notes)
    assert [record.answers for record in records] == [("Rome", "Roma"), ("Rome", "UK"), ("Rome", "Roma")]
    assert records[0].old_answers == ("Bern",)
    assert list(notes.counts.values()) == [2]


BIG_EDIT = {"tag": "t", "subject": "A", "update": "Who?", "rephrase": "Who is?", "ans": "B", "loc": "What?",
            "loc_ans": "C", "mhop": None, "mhop_ans": None, "personas": "Aye?"}  # fmt: skip
UNREAD = [
    (BIG_EDIT, "WikiBigEdit, which has no reader; write its records as requests"),
    (
        {"text": "A passage.", "labels": "More.", "concept": "a", "locality": {}},
        "KnowEdit's WikiBio, .*of KnowEdit ZsRE, wiki_counterfact and wiki_recent are read",
    ),
    ({"question": "Who?", "ground_truth": "A", "target_new": "I don't know."}, "KnowEdit's Sanitation"),
]


@pytest.mark.parametrize(("content", "message"), UNREAD)
@pytest.mark.parametrize("data", [data for data in DATA if data != "fever"])
@pytest.mark.parametrize("lines", [False, True])
def test_data_sets_without_a_reader_are_named(
    tmp_path: Path, data: str, content: dict[str, Any], message: str, lines: bool
) -> None:
    path = tmp_path / "data.json"
    text = json.dumps(content)
    path.write_text(f"{text}\n{text}\n" if lines else json.dumps([content, content], indent=1), "utf-8")
    with pytest.raises(TPatchError, match=message):
        read_records(data, path)


def test_sanitation_in_one_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"success": [], "locality": []}), "utf-8")
    with pytest.raises(TPatchError, match="not of knowedit but KnowEdit's Sanitation"):
        read_records("knowedit", path)


@pytest.mark.parametrize("content", EXAMPLES)
def test_a_data_set_given_as_requests_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(TPatchError, match=f"not of requests but of {content}; read it with --data {content}"):
        read_records("requests", write(tmp_path, EXAMPLES[content]))


@pytest.mark.parametrize("data", EXAMPLES)
def test_json_lines_of_a_data_set_are_read_too(tmp_path: Path, data: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(EXAMPLES[data])}\n", "utf-8")
    assert read_records(data, path) == read_records(data, write(tmp_path, EXAMPLES[data]))


@pytest.mark.skipif("TPATCH_DATA" not in os.environ, reason="TPATCH_DATA names no folder of data sets")
def test_real_files() -> None:
    folder = Path(os.environ["TPATCH_DATA"])
    names = {"counterfact_f": "counterfact", "zsre_": "zsre", "knowedit_": "knowedit", "mquake_": "mquake"}
    read = 0
    for path in sorted(folder.rglob("*.json*")):
        data = next((data for start, data in names.items() if path.name.startswith(start)), None)
        data = "requests" if path.parent.name == "requests" else data
        if data is not None:
            assert data in DATA
            assert all(all(record.probes.values()) for record in read_records(data, path))
            read += 1
    assert read, f"{folder} holds no file of a known name"
