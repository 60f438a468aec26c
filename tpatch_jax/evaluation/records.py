"""Data sets of edits, each record read into what is edited, what is asked before and after, and what is generated.

Two kinds of prompt occur. Openings of a statement ("The river Aar flows into the") are used as they stand.
Questions ("Who built the bridge?") are put into a template, since a decoder that was not tuned on bare
questions does not answer them; `PLAIN` leaves them bare, as the first zsRE protocols did. A template changes every
figure, so name it beside them. White space around prompts, targets and subjects is dropped: it would be a token of its
own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.claims import read_fever
from tpatch_jax.evaluation.record import Probe, Record
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.request_file import read_requests

__all__ = [
    "DATA",
    "PLAIN",
    "QUESTION",
    "READINGS",
    "TEMPLATED",
    "Probe",
    "Record",
    "read_counterfact",
    "read_knowedit",
    "read_mquake",
    "read_records",
    "read_requests_records",
    "read_zsre",
]

QUESTION = "Question: {}\nAnswer:"
"""How a question is put to the model."""

PLAIN = "{}"
"""The template that leaves a question bare."""

READINGS = ("easyedit", "rome")
"""The two protocols of zsRE."""


def read_records(
    data: str,
    path: str | Path,
    n: int | None = None,
    one_per_subject: bool = False,
    reading: str = "easyedit",
    template: str = QUESTION,
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

    Returns:
        The records in order.

    Raises:
        TPatchError: no such data set, reading or template; the file is missing, cut short or of another data set; a
            record lacks a field or has the id of another; or there are fewer than `n`. Records are counted from 1.

    Example:
        >>> read_records("zsre", "zsre_dev.json", n=200, one_per_subject=True)  # doctest: +SKIP
        [Record(id='zsre-0', ...), ...]
    """
    if data not in DATA:
        raise TPatchError(f"no data set {data!r}; choose one of {', '.join(DATA)}")
    # Checked whatever the data set, so that a slip is not passed over where the option plays no part.
    _check_reading(reading)
    _asker(template)
    records = DATA[data](path, reading, template)
    seen: dict[str, int] = {}
    for number, record in enumerate(records, 1):
        if seen.setdefault(record.id, number) != number:
            raise TPatchError(
                f"{path}, record {number}: the id {record.id!r} is that of record {seen[record.id]}; give each its own"
            )
    holds = f"{path} holds {len(records)} records"
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


def read_counterfact(path: str | Path, template: str = QUESTION) -> list[Record]:
    """Read CounterFact, in ROME's original record format or in EasyEdit's flattened one, told apart by record 1.

    Original: ``case_id, requested_rewrite {prompt, target_new {str}, target_true {str}, subject}, paraphrase_prompts,
    neighborhood_prompts, generation_prompts?, portability?``. Flattened: ``case_id, prompt, target_new, subject,
    ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth``, which has nothing to generate from.

    Args:
        path: the file, a JSON list.
        template: where the questions of ``portability`` go.

    Returns:
        The records; the prompt of a request has its subject filled in.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3.3; EasyEdit.

    Example:
        >>> read_counterfact("counterfact.json")[0].request.prompt  # doctest: +SKIP
        'The river Aar flows into the'
    """
    rows = _read_rows(path, "counterfact")
    parse = _counterfact_full if "requested_rewrite" in rows[0].content else _counterfact_flat
    return [parse(row, template) for row in rows]


def _counterfact_full(row: "_Row", template: str) -> Record:
    new, true = row.text("requested_rewrite.target_new.str"), row.text("requested_rewrite.target_true.str")
    subject = row.text("requested_rewrite.subject")
    prompt = row.cloze("requested_rewrite.prompt", subject)
    paraphrases, neighbors = row.texts("paraphrase_prompts"), row.texts("neighborhood_prompts")
    name = f"cf-{row.get('case_id')}"
    return Record(
        name,
        (EditRequest(prompt, new, subject, paraphrases, neighbors, name),),
        _contrasts(prompt, paraphrases, neighbors, new, true) | _portability(row, template),
        generation=row.texts("generation_prompts") if "generation_prompts" in row.content else (),
    )


def _counterfact_flat(row: "_Row", template: str) -> Record:
    new, true, neighbor_true = row.text("target_new"), row.text("ground_truth"), row.text("locality_ground_truth")
    prompt, paraphrase, neighbor = row.text("prompt"), row.text("rephrase_prompt"), row.text("locality_prompt")
    name = f"cf-{row.get('case_id')}"
    probes = _contrasts(prompt, (paraphrase,), (neighbor,), new, true)
    probes["neighborhood_true"] = (Probe(neighbor, neighbor_true),)
    request = EditRequest(prompt, new, row.text("subject"), (paraphrase,), (neighbor,), name)
    return Record(name, (request,), probes | _portability(row, template))


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


def read_zsre(path: str | Path, reading: str = "easyedit", template: str = QUESTION) -> list[Record]:
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

    Returns:
        The records; ids are ``zsre-<position from 0>``.

    Source: Mitchell et al. 2022 (MEND), section 5; Meng et al. 2022, section 3.2; EasyEdit.

    Example:
        >>> read_zsre("zsre_dev.json")[0].request.prompt  # doctest: +SKIP
        'Question: Who built the bridge?\\nAnswer:'
    """
    _check_reading(reading)
    ask = _asker(template)
    records = []
    for position, row in enumerate(_read_rows(path, "zsre")):
        rome = reading == "rome"
        target = row.first_text("answers") if rome else row.text("alt")
        prompt, rephrase = ask(row.text("src")), ask(row.text("rephrase"))
        loc, loc_answer = row.text("loc"), row.text("loc_ans")
        if template == PLAIN:
            loc += "?" if rome else ""
        else:
            loc = ask(loc.removeprefix("nq question: ") + "?")
        probes = {
            "reliability": (Probe(prompt, target),),
            "generalization": (Probe(rephrase, target),),
            "locality_answer" if rome else "locality": (Probe(loc, loc_answer),),
        }
        if not rome:
            probes |= _portability(row, template)
        name = f"zsre-{position}"
        request = EditRequest(prompt, target, row.text("subject"), (rephrase,), (loc,), name)
        records.append(Record(name, (request,), probes))
    return records


def read_knowedit(path: str | Path, template: str = QUESTION) -> list[Record]:
    """Read KnowEdit's zsRE rows.

    Fields: ``subject, prompt, target_new, rephrase_prompt, locality? {kind: [{prompt, ground_truth}]}, portability?
    {kind: [{prompt, ground_truth}]}``. ``Relation_Specificity``, other facts about the same subject, becomes
    ``relation_specificity``; any other kind of locality is ``locality``; portability keeps its kinds, as in
    ``portability_subject_aliasing``. Of several ground truths the first is the target.

    Args:
        path: the file, a JSON list.
        template: where questions go: the prompt, its rephrasing and portability. Locality prompts open a statement.

    Returns:
        The records; ids are ``knowedit-<position from 0>``.

    Source: Zhang et al. 2024, "A Comprehensive Study of Knowledge Editing for Large Language Models".

    Example:
        >>> read_knowedit("knowedit_zsre_train.json")[0].request.target  # doctest: +SKIP
        'Jane Doe'
    """
    ask = _asker(template)
    records = []
    for position, row in enumerate(_read_rows(path, "knowedit")):
        prompt, rephrase, target = ask(row.text("prompt")), ask(row.text("rephrase_prompt")), row.text("target_new")
        probes: dict[str, tuple[Probe, ...]] = {
            "reliability": (Probe(prompt, target),),
            "generalization": (Probe(rephrase, target),),
        }
        for kind, asked in row.kinds("locality"):
            kind = "relation_specificity" if kind == "relation_specificity" else "locality"
            probes[kind] = probes.get(kind, ()) + asked
        silent = tuple(probe.prompt for kind in ("relation_specificity", "locality") for probe in probes.get(kind, ()))
        for kind, asked in row.kinds("portability"):
            probes[f"portability_{kind}"] = tuple(Probe(ask(probe.prompt), probe.target) for probe in asked)
        name = f"knowedit-{position}"
        request = EditRequest(prompt, target, row.text("subject"), (rephrase,), silent, name)
        records.append(Record(name, (request,), probes))
    return records


def read_mquake(path: str | Path, template: str = QUESTION) -> list[Record]:
    """Read MQuAKE: several edits a case, and questions whose answer follows from all of them.

    Fields: ``case_id, requested_rewrite [{prompt, target_new {str}, subject}], questions, new_answer,
    new_answer_alias``.

    Args:
        path: the file, a JSON list.
        template: where the questions go; the prompts of the edits open a statement.

    Returns:
        The records; request ids are ``mquake-<case>-<edit from 0>``.

    Source: Zhong et al. 2023, "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions".

    Example:
        >>> len(read_mquake("mquake_hard_dev.json")[0].requests)  # doctest: +SKIP
        4
    """
    ask = _asker(template)
    records = []
    for row in _read_rows(path, "mquake"):
        name = f"mquake-{row.get('case_id')}"
        requests = []
        for position, edit in enumerate(row.rows("requested_rewrite")):
            subject = edit.text("subject")
            prompt = edit.cloze("prompt", subject)
            requests.append(EditRequest(prompt, edit.text("target_new.str"), subject, id=f"{name}-{position}"))
        questions, answer = tuple(map(ask, row.texts("questions"))), row.text("new_answer")
        for field, entries in (("requested_rewrite", requests), ("questions", questions)):
            if not entries:
                raise TPatchError(f"{row.where}: {field!r} is empty; a case needs one or more")
        probes = {
            "reliability": tuple(Probe(request.prompt, request.target) for request in requests),
            "multi_hop": tuple(Probe(question, answer) for question in questions),
        }
        answers = (answer, *row.texts("new_answer_alias"))
        records.append(Record(name, tuple(requests), probes, questions=questions, answers=answers))
    return records


def read_requests_records(path: str | Path) -> list[Record]:
    """Read a file of edit requests, whose rephrasings and locality prompts become probes.

    Args:
        path: JSON lines as `tpatch_jax.requests.read_requests` takes them.

    Returns:
        The records; locality prompts have no known answer, so their probes have no target.

    Example:
        >>> sorted(read_requests_records("requests.jsonl")[0].probes)  # doctest: +SKIP
        ['generalization', 'locality', 'reliability']
    """
    records = []
    for position, request in enumerate(read_requests(path)):
        probes = {
            "reliability": (Probe(request.prompt, request.target),),
            "generalization": tuple(Probe(rephrase, request.target) for rephrase in request.rephrases),
            "locality": tuple(Probe(prompt, "") for prompt in request.locality),
        }
        probes = {kind: asked for kind, asked in probes.items() if asked}
        # Named here, since its position is no longer the file's once records are left out.
        request = replace(request, id=request.name(position))
        records.append(Record(request.name(position), (request,), probes))
    return records


DATA: Mapping[str, Callable[[str | Path, str, str], list[Record]]] = {
    "counterfact": lambda path, reading, template: read_counterfact(path, template),
    "zsre": read_zsre,
    "knowedit": lambda path, reading, template: read_knowedit(path, template),
    "requests": lambda path, reading, template: read_requests_records(path),
    "mquake": lambda path, reading, template: read_mquake(path, template),
    "fever": lambda path, reading, template: read_fever(path),
}
"""The readers by the names of their data sets: ``(path, reading, template) -> records``."""

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


def _asker(template: str) -> Callable[[str], str]:
    if template.count("{}") != 1:
        raise TPatchError(f"the template {template!r} must hold one {{}} for the question, as in {QUESTION!r}")
    return lambda question: template.replace("{}", question)


def _portability(row: "_Row", template: str) -> dict[str, tuple[Probe, ...]]:
    """EasyEdit's one question a record: ``portability {"New Question", "New Answer"}``."""
    if "portability" not in row.content:
        return {}
    question, answer = row.text("portability.New Question"), row.text("portability.New Answer")
    return {"portability": (Probe(_asker(template)(question), answer),)}


class _Row(NamedTuple):
    """One JSON object of a file, and how to name it in an error; a method reads a field or says what is wrong with it.

    A field is named by its path, ``requested_rewrite.target_new.str``.
    """

    content: dict[str, Any]
    where: str

    def get(self, field: str) -> Any:
        value: Any = self.content
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                raise TPatchError(f"{self.where}: no {field!r}; add it, or take the record out")
            value = value[name]
        return value

    def wrong(self, field: str, wanted: str) -> TPatchError:
        return TPatchError(f"{self.where}: {field!r} must be {wanted}; mend it, or take the record out")

    def text(self, field: str) -> str:
        value = self.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, "a text that is not empty")
        return value.strip()

    def texts(self, field: str) -> tuple[str, ...]:
        value = self.get(field)
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise self.wrong(field, "a list of texts that are not empty")
        return tuple(text.strip() for text in value)

    def first_text(self, field: str) -> str:
        """A text, or the first of a list of texts, as answers are given in either way."""
        if isinstance(self.get(field), str):
            return self.text(field)
        texts = self.texts(field)
        if not texts:
            raise self.wrong(field, "a list of one text or more")
        return texts[0]

    def cloze(self, field: str, subject: str) -> str:
        """A prompt with the subject filled in for its ``{}``."""
        prompt = self.text(field)
        if prompt.count("{}") != 1:
            raise self.wrong(field, "a prompt with one {} for the subject")
        return prompt.replace("{}", subject)

    def rows(self, field: str) -> list["_Row"]:
        value = self.get(field)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.wrong(field, "a list of objects")
        return [_Row(entry, f"{self.where}, {field} {number}") for number, entry in enumerate(value, 1)]

    def kinds(self, field: str) -> list[tuple[str, tuple[Probe, ...]]]:
        """KnowEdit's ``{kind: [{prompt, ground_truth}]}``, kinds in lower case; none if the record lacks the field."""
        kinds = self.content.get(field, {})
        if not isinstance(kinds, dict):
            raise self.wrong(field, "an object from kinds to lists")
        asked = [
            (kind.lower(), tuple(Probe(entry.text("prompt"), entry.first_text("ground_truth")) for entry in entries))
            for kind in kinds
            for entries in [self.rows(f"{field}.{kind}")]
        ]
        return [(kind, probes) for kind, probes in asked if probes]


# Fields by which a record of each data set is known, to tell a foreign file from a record that lacks a field.
_SIGNATURES: Sequence[tuple[str, frozenset[str]]] = (
    ("counterfact", frozenset({"requested_rewrite", "paraphrase_prompts"})),
    ("counterfact", frozenset({"prompt", "target_new", "locality_prompt"})),
    ("zsre", frozenset({"src", "loc"})),
    ("knowedit", frozenset({"prompt", "target_new", "locality"})),
    ("requests", frozenset({"prompt", "target"})),
    ("mquake", frozenset({"requested_rewrite", "questions"})),
)


def _read_rows(path: str | Path, data: str) -> list[_Row]:
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise TPatchError(f"{path} does not exist; give the data set's JSON file") from None
    except OSError as error:
        raise TPatchError(f"{path} cannot be read ({error.strerror}); give the data set's JSON file") from None
    except UnicodeDecodeError as error:
        raise TPatchError(f"{path}: not UTF-8 at byte {error.start}; give the data set's JSON file") from None
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise TPatchError(_not_json(path, text, error)) from None
    if not isinstance(rows, list) or not rows:
        raise TPatchError(f"{path}: {data} is a JSON list of records, and this is not; give the data set's own file")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise TPatchError(f"{path}, record {number}: {type(row).__name__} instead of an object; take it out")
    resembled = [name for name, fields in _SIGNATURES if fields <= rows[0].keys()]
    if resembled and data not in resembled:
        raise TPatchError(f"{path}, record 1: not of {data} but of {resembled[0]}; read it with --data {resembled[0]}")
    return [_Row(row, f"{path}, record {number}") for number, row in enumerate(rows, 1)]


def _not_json(path: Path, text: str, error: json.JSONDecodeError) -> str:
    if not text.lstrip().startswith("["):
        return (
            f"{path}: not a JSON list of records ({error.msg}, line {error.lineno}); JSON lines go with --data requests"
        )
    return (
        f"{path}, record {_whole_records(text) + 1}: not JSON ({error.msg}, line {error.lineno}); the "
        "file is cut short or damaged, get it again"
    )


def _whole_records(text: str) -> int:
    """How many records can be read before the place where the list breaks off."""
    decoder, position, count = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        try:
            _, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return count
        count += 1
