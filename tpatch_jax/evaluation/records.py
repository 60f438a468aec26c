"""Data sets of edits, each record read into what is edited, what is asked before and after, and what is generated.

Two kinds of prompt occur. Openings of a statement ("The river Aar flows into the") are used as they stand.
Questions ("Who built the bridge?") are put into a template, since a decoder that was not tuned on bare
questions does not answer them; `PLAIN` leaves them bare, as the first zsRE protocols did. A template changes every
figure, so name it beside them. White space around prompts, targets and subjects is dropped: it would be a token of its
own.

A record that cannot be read never costs the others: it is passed over, counted and said, in the log or in the notes
that a caller gives. With ``strict`` it is an error.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.claims import read_fever
from tpatch_jax.evaluation.comparing import plain_words
from tpatch_jax.evaluation.data_files import Entry, read_entries, recognize
from tpatch_jax.evaluation.data_notes import DataNotes, reading_notes
from tpatch_jax.evaluation.knowedit import read_knowedit
from tpatch_jax.evaluation.record import Probe, Record
from tpatch_jax.evaluation.templates import PLAIN, QUESTION, asker
from tpatch_jax.requests import EditRequest, parse_request
from tpatch_jax.storage.json_lines import read_json_lines
from tpatch_jax.storage.reading import read_text

__all__ = [
    "DATA",
    "PLAIN",
    "QUESTION",
    "READINGS",
    "TEMPLATED",
    "DataNotes",
    "Probe",
    "Record",
    "is_paraphrase",
    "read_counterfact",
    "read_knowedit",
    "read_mquake",
    "read_records",
    "read_requests_records",
    "read_zsre",
]

READINGS = ("easyedit", "rome")
"""The two protocols of zsRE."""


def read_records(
    data: str,
    path: str | Path,
    n: int | None = None,
    one_per_subject: bool = False,
    reading: str = "easyedit",
    template: str = QUESTION,
    *,
    strict: bool = False,
    notes: DataNotes | None = None,
) -> list[Record]:
    """Read a data set by its name.

    Args:
        data: one of `DATA`.
        path: the file.
        n: how many records from the start; all when absent.
        one_per_subject: keep each subject's first record, before `n` is counted. zsRE needs it where all edits are
            active at once: its answers contradict each other within a subject.
        reading: the protocol of zsRE, one of `READINGS`; the other data sets have one.
        template: where questions go, with ``{}`` for the question; request files hold prompts that are ready.
        strict: a record that cannot be read is an error; by default it is passed over, and `n` counts the others.
        notes: counts what is passed over and left out; by default the log says it.

    Returns:
        The records in order.

    Raises:
        TPatchError: no such data set, reading or template; the file is missing, cut short or of another data set; no
            record can be read; or there are fewer than `n`. With `strict`: a record lacks a field, has the id of
            another or contradicts itself. Records are counted from 1.

    Example:
        >>> read_records("zsre", "zsre_dev.json", n=200, one_per_subject=True)  # doctest: +SKIP
        [Record(id='zsre-0', ...), ...]
    """
    if data not in DATA:
        raise TPatchError(f"no data set {data!r}; choose one of {', '.join(DATA)}")
    # Checked whatever the data set, so that a slip is not passed over where the option plays no part.
    _check_reading(reading)
    asker(template)
    told = DataNotes() if notes is None else notes
    told.strict = told.strict or strict
    records = _distinct(path, DATA[data](path, reading, template, told), told)
    if notes is None:
        told.tell(path)
    holds = f"{path} holds {len(records)} records"
    if told.passed_over:
        holds += " that can be read"
    if one_per_subject:
        records = _one_per_subject(records)
        holds += f", {len(records)} with one per subject"
    if n is None:
        return records
    if n < 1:
        raise TPatchError(f"{n} records were asked for; ask for 1 or more")
    if n > len(records):
        raise TPatchError(f"{holds}, but {n} were asked for; ask for {len(records)} or fewer")
    return records[:n]


def _distinct(path: str | Path, records: Sequence[Record], notes: DataNotes) -> list[Record]:
    """The records without those that have the id of an earlier one."""
    first: dict[str, int] = {}
    kept = []
    for number, record in enumerate(records, 1):
        if record.id in first:
            earlier = first[record.id]
            notes.pass_over(
                f"{path}, record {number}: the id {record.id!r} is that of record {earlier}; give each its own"
            )
        else:
            first[record.id] = number
            kept.append(record)
    return kept


def read_counterfact(
    path: str | Path, template: str = QUESTION, *, strict: bool = False, notes: DataNotes | None = None
) -> list[Record]:
    """Read CounterFact, in ROME's original record format or in EasyEdit's flattened one, told apart by record 1.

    Original: ``case_id, requested_rewrite {prompt, target_new {str}, target_true {str}, subject}, paraphrase_prompts,
    neighborhood_prompts, generation_prompts?, portability?``. Flattened: ``case_id, prompt, target_new, subject,
    ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth``.

    Most ``rephrase_prompt`` of the flattened file are CounterFact's generation prompts, which ask something else
    ("Apple A5 is sold by" for "was created by"); only the others are paraphrases. `is_paraphrase` tells them apart: the
    former are continued for GE, PS and generalization are of paraphrases alone, and how many there are is said.

    Args:
        path: the file, a JSON list.
        template: where the questions of ``portability`` go.
        strict: a record that cannot be read is an error.
        notes: counts what is passed over and left out; by default the log says it.

    Returns:
        The records; the prompt of a request has its subject filled in.

    Raises:
        TPatchError: the file is missing, damaged or of another data set, or no record can be read.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3.3; EasyEdit.

    Example:
        >>> read_counterfact("counterfact.json")[0].request.prompt  # doctest: +SKIP
        'The river Aar flows into the'
    """
    ask = asker(template)
    with reading_notes(path, strict, notes) as notes:
        entries = read_entries(path, "counterfact", notes)
        whole = any("requested_rewrite" in entry.content for entry in entries)
        parse = _counterfact_full if whole else _counterfact_flat
        return notes.read_each(entries, lambda entry: parse(entry, ask, notes))


def _counterfact_full(row: Entry, ask: Callable[[str], str], notes: DataNotes) -> Record:
    new, true = row.text("requested_rewrite.target_new.str"), row.text("requested_rewrite.target_true.str")
    subject = row.text("requested_rewrite.subject")
    prompt = row.cloze("requested_rewrite.prompt", subject)
    paraphrases, neighbors = row.texts("paraphrase_prompts"), row.texts("neighborhood_prompts")
    name = f"cf-{row.get('case_id')}"
    return Record(
        name,
        (EditRequest(prompt, new, subject, paraphrases, neighbors, name),),
        _contrasts(prompt, paraphrases, neighbors, new, true) | _portability(row, ask, notes),
        generation=row.texts("generation_prompts") if "generation_prompts" in row.content else (),
    )


_ABBREVIATED = r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bProf)"
_SENTENCE_END = re.compile(rf"{_ABBREVIATED}[.!?\u2026][\"\u201d\u2019')\]]*\s|[\u3002\uff01\uff1f]|\n")


def is_paraphrase(text: str, subject: str) -> bool:
    """Whether a ``rephrase_prompt`` of flattened CounterFact is a paraphrase, and no generation prompt.

    Only CounterFact's paraphrases begin with words out of some other text, so a sentence or a line ends before the
    subject.

    Args:
        text: the ``rephrase_prompt``.
        subject: the subject, which stands in it.

    Example:
        >>> is_paraphrase("He left in May. Apple A5 is a product of", "Apple A5")
        True
        >>> is_paraphrase("Apple A5 is sold by", "Apple A5")
        False
    """
    before, _, _ = text.casefold().partition(subject.casefold())
    return _SENTENCE_END.search(text[: len(before)]) is not None


def _counterfact_flat(row: Entry, ask: Callable[[str], str], notes: DataNotes) -> Record:
    new, true, neighbor_true = row.text("target_new"), row.text("ground_truth"), row.text("locality_ground_truth")
    prompt, other, neighbor = row.text("prompt"), row.text("rephrase_prompt"), row.text("locality_prompt")
    name, subject = f"cf-{row.get('case_id')}", row.text("subject")
    portability = _portability(row, ask, notes)
    paraphrases, openings = ((other,), ()) if is_paraphrase(other, subject) else ((), (other,))
    if paraphrases:
        notes.count("rephrase_prompt are paraphrases, of which PS and generalization are")
    else:
        notes.count("rephrase_prompt are generation prompts, which ask something else: for GE, not in PS")
    probes = _contrasts(prompt, paraphrases, (neighbor,), new, true)
    probes["neighborhood_true"] = (Probe(neighbor, neighbor_true),)
    request = EditRequest(prompt, new, subject, paraphrases, (neighbor,), name)
    return Record(name, (request,), probes | portability, generation=openings)


def _contrasts(
    prompt: str, paraphrases: Sequence[str], neighbors: Sequence[str], new: str, true: str
) -> dict[str, tuple[Probe, ...]]:
    parts = {"rewrite": (prompt,), "paraphrase": paraphrases, "neighborhood": neighbors}
    return {
        f"{part}_{which}": tuple(Probe(text, target) for text in prompts)
        for part, prompts in parts.items()
        for which, target in (("new", new), ("true", true))
        if prompts
    }


def read_zsre(
    path: str | Path,
    reading: str = "easyedit",
    template: str = QUESTION,
    *,
    strict: bool = False,
    notes: DataNotes | None = None,
) -> list[Record]:
    """Read zsRE in MEND's schema, in either of its two readings, whose figures cannot be compared.

    Fields: ``subject, src, rephrase, alt, answers, loc, loc_ans, portability?``.

    - ``easyedit``: the target is ``alt``, a wrong answer that is to be learnt; the natural question ``loc`` is a
      ``locality`` probe (its argmaxes must not change); portability is asked.
    - ``rome``: the target is ``answers[0]``, the true answer; ``loc`` is a ``locality_answer`` probe (it must be
      answered right). Portability follows from ``alt`` and is left out.

    ``loc`` reads "nq question: who sang ...". In a template its prefix is dropped and a question mark added; with
    `PLAIN` it stays as each protocol's code has it: ROME's adds the question mark, EasyEdit's nothing.

    Args:
        path: the file, a JSON list.
        reading: one of `READINGS`.
        template: where questions go.
        strict: a record that cannot be read is an error.
        notes: counts what is passed over and left out; by default the log says it.

    Returns:
        The records; ids are ``zsre-<position from 0>``.

    Raises:
        TPatchError: the file is missing, damaged or of another data set, or no record can be read.

    Source: Mitchell et al. 2022 (MEND), section 5; Meng et al. 2022, section 3.2; EasyEdit.

    Example:
        >>> read_zsre("zsre_dev.json")[0].request.prompt  # doctest: +SKIP
        'Question: Who built the bridge?\\nAnswer:'
    """
    _check_reading(reading)
    ask = asker(template)
    with reading_notes(path, strict, notes) as notes:
        entries = read_entries(path, "zsre", notes)
        return notes.read_each(entries, lambda entry: _zsre(entry, reading == "rome", template == PLAIN, ask, notes))


def _zsre(row: Entry, rome: bool, plain: bool, ask: Callable[[str], str], notes: DataNotes) -> Record:
    target = row.answers("answers")[0] if rome else row.text("alt")
    prompt, rephrase = ask(row.text("src")), ask(row.text("rephrase"))
    loc, loc_answer, subject = row.text("loc"), row.text("loc_ans"), row.text("subject")
    if plain:
        loc += "?" if rome else ""
    else:
        loc = ask(loc.removeprefix("nq question: ") + "?")
    probes = {
        "reliability": (Probe(prompt, target),),
        "generalization": (Probe(rephrase, target),),
        "locality_answer" if rome else "locality": (Probe(loc, loc_answer),),
    }
    if not rome:
        probes |= _portability(row, ask, notes)
        if plain_words(target) in map(plain_words, _answers_if_any(row, "answers")):
            notes.count("targets are among the true answers")
    name = f"zsre-{row.position}"
    return Record(name, (EditRequest(prompt, target, subject, (rephrase,), (loc,), name),), probes)


def _answers_if_any(row: Entry, *fields: str) -> tuple[str, ...]:
    """What answers some fields hold; none where one is missing, or of another kind."""
    answers: list[str] = []
    for field in fields:
        try:
            answers += row.answers(field)
        except TPatchError:
            continue
    return tuple(answers)


def read_mquake(
    path: str | Path, template: str = QUESTION, *, strict: bool = False, notes: DataNotes | None = None
) -> list[Record]:
    """Read MQuAKE: several edits a case, and questions whose answer follows from all of them.

    Fields: ``case_id, requested_rewrite [{prompt, target_new {str}, subject}], questions, new_answer,
    new_answer_alias, answer?, answer_alias?``. Aliases that are codes of at most three letters ("ar" for Arabic, "NA"
    for North America) are left out and counted: a text that holds one seldom means it.

    Args:
        path: the file, a JSON list.
        template: where the questions go; the prompts of the edits open a statement.
        strict: a case that cannot be read is an error.
        notes: counts what is passed over and left out; by default the log says it.

    Returns:
        The records; request ids are ``mquake-<case>-<edit from 0>``.

    Raises:
        TPatchError: the file is missing, damaged or of another data set, or no case can be read.

    Source: Zhong et al. 2023, "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions".

    Example:
        >>> len(read_mquake("mquake_hard_dev.json")[0].requests)  # doctest: +SKIP
        4
    """
    ask = asker(template)
    with reading_notes(path, strict, notes) as notes:
        return notes.read_each(read_entries(path, "mquake", notes), lambda entry: _mquake(entry, ask, notes))


def _mquake(row: Entry, ask: Callable[[str], str], notes: DataNotes) -> Record:
    name = f"mquake-{row.get('case_id')}"
    requests = []
    for position, edit in enumerate(row.entries("requested_rewrite")):
        subject = edit.text("subject")
        prompt = edit.cloze("prompt", subject)
        requests.append(EditRequest(prompt, edit.text("target_new.str"), subject, id=f"{name}-{position}"))
    questions, answer = tuple(map(ask, row.texts("questions"))), row.text("new_answer")
    for field, listed in (("requested_rewrite", requests), ("questions", questions)):
        if not listed:
            raise TPatchError(f"{row.where}: {field!r} is empty; a case needs one or more")
    probes = {
        "reliability": tuple(Probe(request.prompt, request.target) for request in requests),
        "multi_hop": tuple(Probe(question, answer) for question in questions),
    }
    aliases = row.get("new_answer_alias")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise row.wrong("new_answer_alias", "a list of texts")
    named = [alias.strip() for alias in aliases if alias.strip()]
    kept = [alias for alias in named if not _is_code(alias)]
    if len(kept) < len(named):
        notes.count('cases have aliases of at most three letters (such as "ar"), left out')
    old = _answers_if_any(row, "answer", "answer_alias")
    return Record(name, tuple(requests), probes, questions=questions, answers=(answer, *kept), old_answers=old)


def _is_code(alias: str) -> bool:
    # Capitals are names that people write, "USA" or "UK"; but "NA" is no answer.
    return len(plain_words(alias)) <= _CODE and (alias == alias.lower() or alias == "NA")


_CODE = 3


def read_requests_records(path: str | Path, *, strict: bool = False, notes: DataNotes | None = None) -> list[Record]:
    """Read a file of edit requests, whose rephrasings and locality prompts become probes.

    Args:
        path: JSON lines as `tpatch_jax.requests.read_requests` takes them.
        strict: a line that is no request is an error.
        notes: counts what is passed over; by default the log says it.

    Returns:
        The records; locality prompts have no known answer, so their probes have no target.

    Raises:
        TPatchError: the file is missing or of a data set, or no line is a request.

    Example:
        >>> sorted(read_requests_records("requests.jsonl")[0].probes)  # doctest: +SKIP
        ['generalization', 'locality', 'reliability']
    """
    if what := _data_set_in_place_of_requests(path):
        raise TPatchError(f"{path}: {what}")
    records: list[Record] = []
    with reading_notes(path, strict, notes) as notes:
        for _, where, value in read_json_lines(path, "request", notes.miss):
            notes.records += 1
            try:
                records.append(_request_record(parse_request(value, where, Path(path).parent), len(records)))
            except TPatchError as error:
                notes.pass_over(str(error))
        notes.check_any(records, f"{path} holds no request; put one JSON object a line, with 'prompt' and 'target'")
    return records


def _data_set_in_place_of_requests(path: str | Path) -> str | None:
    """Which data set a file is of that was given as requests, and how to read it."""
    try:
        text = read_text(path, "utf-8-sig")
        try:
            rows = json.loads(text)
        except ValueError:
            rows = [json.loads(text.lstrip().partition("\n")[0])]
    except (OSError, ValueError, RecursionError):
        return None
    return recognize(rows if isinstance(rows, list) else [rows], "requests")


def _request_record(request: EditRequest, position: int) -> Record:
    probes = {
        "reliability": (Probe(request.prompt, request.target),),
        "generalization": tuple(Probe(rephrase, request.target) for rephrase in request.rephrases),
        "locality": tuple(Probe(prompt, "") for prompt in request.locality),
        "keep": tuple(Probe(prompt, "") for prompt in request.keep),
    }
    probes = {kind: asked for kind, asked in probes.items() if asked}
    # Named here, since its position is no longer the file's once records are left out.
    request = replace(request, id=request.name(position))
    return Record(request.name(position), (request,), probes)


class _Reader(Protocol):
    def __call__(self, path: str | Path, reading: str, template: str, notes: DataNotes | None = None) -> list[Record]:
        """Read a file."""
        ...


DATA: Mapping[str, _Reader] = {
    "counterfact": lambda path, reading, template, notes=None: read_counterfact(path, template, notes=notes),
    "zsre": lambda path, reading, template, notes=None: read_zsre(path, reading, template, notes=notes),
    "knowedit": lambda path, reading, template, notes=None: read_knowedit(path, template, notes=notes),
    "requests": lambda path, reading, template, notes=None: read_requests_records(path, notes=notes),
    "mquake": lambda path, reading, template, notes=None: read_mquake(path, template, notes=notes),
    "fever": lambda path, reading, template, notes=None: read_fever(path, notes=notes),
}
"""The readers by the names of their data sets: ``(path, reading, template, notes) -> records``."""

TEMPLATED = ("counterfact", "zsre", "knowedit", "mquake")
"""Those whose questions are put into a template; request files and claims stand as they are."""


def _one_per_subject(records: Sequence[Record]) -> list[Record]:
    # A record of several edits goes if any of its subjects was taken; requests without a subject never clash.
    taken: set[str] = set()
    kept = []
    for record in records:
        subjects = {request.subject for request in record.requests if request.subject is not None}
        if not subjects & taken:
            taken |= subjects
            kept.append(record)
    return kept


def _check_reading(reading: str) -> None:
    if reading not in READINGS:
        raise TPatchError(f"zsRE has no reading {reading!r}; choose one of {', '.join(READINGS)}")


def _portability(row: Entry, ask: Callable[[str], str], notes: DataNotes) -> dict[str, tuple[Probe, ...]]:
    """EasyEdit's one question a record: ``portability {"New Question", "New Answer"}``."""
    if row.content.get("portability") is None:
        return {}
    try:
        question, answer = row.text("portability.New Question"), row.text("portability.New Answer")
    except TPatchError as error:
        notes.leave_out("portability questions lack a question or an answer, left out", str(error))
        return {}
    return {"portability": (Probe(ask(question), answer),)}
