"""JSON files of data sets: their entries, and what is said of a file that is of another data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.data_notes import DataNotes
from tpatch_jax.evaluation.record import Probe
from tpatch_jax.storage.reading import read_bytes

__all__ = ["Entry", "read_entries", "recognize"]

LOOKED_AT = 20
"""A file is known by the first of so many objects that are like those of some data set."""


class Entry(NamedTuple):
    """One JSON object of a file, and how to name it in an error; a method reads a field or says what is wrong with it.

    A field is named by its path, ``requested_rewrite.target_new.str``.

    Attributes:
        content: the object.
        where: file and record, as a message begins.
        position: its place in the file, counted from 0.
    """

    content: dict[str, Any]
    where: str
    position: int = 0

    def get(self, field: str) -> Any:
        """What stands in a field."""
        value: Any = self.content
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                raise TPatchError(f"{self.where}: no {field!r}; add it, or take the record out")
            value = value[name]
        return value

    def wrong(self, field: str, wanted: str) -> TPatchError:
        """The error of a field that holds something else."""
        return TPatchError(f"{self.where}: {field!r} must be {wanted}; mend it, or take the record out")

    def text(self, field: str) -> str:
        """A text that is not empty, without white space around it."""
        value = self.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, "a text that is not empty")
        return value.strip()

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of such texts."""
        value = self.get(field)
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise self.wrong(field, "a list of texts that are not empty")
        return tuple(text.strip() for text in value)

    def answers(self, field: str) -> tuple[str, ...]:
        """A text, a list of texts, or a list of such lists, as answers and their aliases are given; one or more."""
        answers, left = [], [self.get(field)]
        while left:
            value = left.pop(0)
            if isinstance(value, list):
                left = [*value, *left]
            elif not isinstance(value, str):
                raise self.wrong(field, "a text, or a list of texts")
            elif value.strip():
                answers.append(value.strip())
        if not answers:
            raise self.wrong(field, "a list of one text or more" if isinstance(self.get(field), list) else _TEXT)
        return tuple(dict.fromkeys(answers))

    def cloze(self, field: str, subject: str) -> str:
        """A prompt with the subject filled in for its ``{}``."""
        prompt = self.text(field)
        if prompt.count("{}") != 1:
            raise self.wrong(field, "a prompt with one {} for the subject")
        return prompt.replace("{}", subject)

    def entries(self, field: str) -> list["Entry"]:
        """A list of objects."""
        value = self.get(field)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.wrong(field, "a list of objects")
        return [Entry(entry, f"{self.where}, {field} {number}") for number, entry in enumerate(value, 1)]

    def kinds(self, field: str, notes: DataNotes) -> list[tuple[str, list[tuple[Probe, tuple[str, ...]]]]]:
        """KnowEdit's ``{kind: [{prompt, ground_truth}]}``: kinds in lower case, each with probes and all their answers.

        A probe without a prompt or an answer is left out and counted. None if the record lacks the field.
        """
        kinds = self.content.get(field)
        if kinds is not None and not isinstance(kinds, dict):
            raise self.wrong(field, "an object from kinds to lists")
        read = []
        for kind, listed in (kinds or {}).items():
            probes = []
            for entry in self.entries(f"{field}.{kind}") if listed is not None else ():
                try:
                    prompt, answers = entry.answers("prompt")[0], entry.answers("ground_truth")
                except TPatchError as error:
                    notes.leave_out("probes without a prompt or an answer, left out", str(error))
                else:
                    probes.append((Probe(prompt, answers[0]), answers))
            if probes:
                read.append((kind.lower(), probes))
        return read


_TEXT = "a text that is not empty"

# Fields by which a record of each data set is known, to tell a foreign file from a record that lacks a field.
_SIGNATURES: Sequence[tuple[str, frozenset[str]]] = (
    ("counterfact", frozenset({"requested_rewrite", "paraphrase_prompts"})),
    ("counterfact", frozenset({"prompt", "target_new", "locality_prompt"})),
    ("zsre", frozenset({"src", "loc"})),
    ("knowedit", frozenset({"prompt", "target_new", "locality"})),
    ("knowedit", frozenset({"subject", "prompt", "target_new", "portability"})),
    ("requests", frozenset({"prompt", "target"})),
    ("choices", frozenset({"prompt", "choices"})),
    ("choices", frozenset({"requested_rewrite", "neighborhood_prompts"})),
    ("mquake", frozenset({"requested_rewrite", "questions"})),
    ("fever", frozenset({"claim", "label"})),
)

_AS_REQUESTS = "write its records as requests, one JSON object a line, and read them with --data requests"
_SANITATION = (
    "KnowEdit's Sanitation, which has no reader; of KnowEdit ZsRE, wiki_counterfact and wiki_recent are read, or "
    + _AS_REQUESTS
)
# Data sets that have no reader, and what to do.
_UNREAD: Sequence[tuple[frozenset[str], str]] = (
    (
        frozenset({"update", "ans"}),
        f"WikiBigEdit, which has no reader; {_AS_REQUESTS}: 'update' is the prompt, 'ans' the target, 'rephrase' goes "
        "into rephrases, 'loc' into locality",
    ),
    (
        frozenset({"text", "labels", "concept"}),
        "KnowEdit's WikiBio, whose targets are passages, and which has no reader; of KnowEdit ZsRE, wiki_counterfact "
        "and wiki_recent are read",
    ),
    (
        frozenset({"success", "locality"}),
        _SANITATION,
    ),
    (
        frozenset({"question", "ground_truth", "target_new"}),
        _SANITATION,
    ),
)


def recognize(objects: Sequence[Any], data: str) -> str | None:
    """What to say of objects that are not of a data set.

    Args:
        objects: what a file holds.
        data: the data set that it was read as.

    Returns:
        Which data set they are of and how to read it, or ``None`` if they may be of ``data``, or nothing is known of
        them.

    Example:
        >>> recognize([{"src": "Who?", "loc": "nq question: who"}], "mquake")
        'not of mquake but of zsre; read it with --data zsre'
    """
    keys = [value.keys() for value in objects[:LOOKED_AT] if isinstance(value, dict)]
    resembled = [name for of_one in keys for name, fields in _SIGNATURES if fields <= of_one]
    if resembled:
        other = resembled[0]
        return None if data in resembled else f"not of {data} but of {other}; read it with --data {other}"
    return next((f"not of {data} but {what}" for of_one in keys for fields, what in _UNREAD if fields <= of_one), None)


def read_entries(path: str | Path, data: str, notes: DataNotes) -> list[Entry]:
    """The objects of a data set's file, a JSON list or JSON lines.

    Args:
        path: the file.
        data: the data set's name.
        notes: counts what is no object.

    Returns:
        An `Entry` each.

    Raises:
        TPatchError: the file cannot be read, is cut short, or is of another data set.
    """
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise TPatchError(f"{path} does not exist; give the data set's JSON file") from None
    except OSError as error:
        raise TPatchError(f"{path} cannot be read ({error.strerror}); give the data set's JSON file") from None
    except UnicodeDecodeError as error:
        raise TPatchError(f"{path}: not UTF-8 at byte {error.start}; give the data set's JSON file") from None
    rows = _rows(path, text, data)
    if isinstance(rows, dict):
        if not _is_of(data, [rows]):
            raise TPatchError(f"{path}: {recognize([rows], data) or _no_list(data)}")
        rows = [rows]
    if not isinstance(rows, list) or not rows:
        raise TPatchError(f"{path}: {_no_list(data)}")
    if what := recognize(rows, data):
        raise TPatchError(f"{path}, record 1: {what}")
    entries = []
    for position, row in enumerate(rows):
        where = f"{path}, record {position + 1}"
        if isinstance(row, dict):
            entries.append(Entry(row, where, position))
        else:
            notes.records += 1
            notes.pass_over(f"{where}: {type(row).__name__} instead of an object; take it out")
    if not entries:
        raise TPatchError(notes.passed_over[0])
    return entries


def _is_of(data: str, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether an object is like those of a data set."""
    signatures = [fields for name, fields in _SIGNATURES if name == data]
    return any(fields <= row.keys() for row in rows[:LOOKED_AT] for fields in signatures)


def _no_list(data: str) -> str:
    return f"{data} is a JSON list of records, and this is not; give the data set's own file"


def _rows(path: Path, text: str, data: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        rows = _lines(text)
        if rows is None:
            raise TPatchError(_not_json(path, text, error)) from None
        if _is_of(data, rows):
            return rows
        what = recognize(rows, data)
        raise TPatchError(f"{path}, record 1: {what}" if what else _not_json(path, text, error)) from None


def _lines(text: str) -> list[dict[str, Any]] | None:
    """The objects of JSON lines, if a text is that."""
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return None
    return rows if all(isinstance(row, dict) for row in rows) else None


def _not_json(path: Path, text: str, error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"{path}: not JSON that can be read ({error}); give the data set's own file"
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
