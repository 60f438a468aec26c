"""FEVER: claims that are supported or refuted, one JSON object a line."""

from pathlib import Path

from tpatch_jax.evaluation.data_notes import DataNotes, reading_notes
from tpatch_jax.evaluation.record import Probe, Record
from tpatch_jax.evaluation.rephrasings import rephrasings
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.json_lines import read_json_lines

__all__ = ["LABELS", "read_fever"]

LABELS = ("SUPPORTS", "REFUTES")
"""T-Patcher's task has these two; claims with another label are passed over."""


def read_fever(path: str | Path, *, strict: bool = False, notes: DataNotes | None = None) -> list[Record]:
    """Read FEVER's claims: the edit gives a claim its true label.

    Fields: ``claim, label``. Every rule of `tpatch_jax.evaluation.rephrasings` makes probes of its own.

    Args:
        path: the file, JSON lines.
        strict: a line that cannot be read is an error.
        notes: counts what is passed over and left out; by default the log says it.

    Returns:
        The records with one of `LABELS`; ids are ``fever-<line from 1>``.

    Raises:
        TPatchError: the file cannot be read, or holds no such claim.

    Source: Thorne et al. 2018, "FEVER: a large-scale dataset for Fact Extraction and VERification"; Huang et al. 2023,
        section 5.1, for the task.

    Example:
        >>> read_fever("fever.jsonl")[0].request.target  # doctest: +SKIP
        'REFUTES'
    """
    records: list[Record] = []
    with reading_notes(path, strict, notes) as notes:
        for number, where, row in read_json_lines(path, "claim", notes.miss):
            notes.records += 1
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("claim", "label")):
                notes.pass_over(f"{where}: no 'claim' and 'label'; FEVER has both in each line")
            elif row["label"] not in LABELS:
                notes.count("claims with another label, left out")
            elif not row["claim"].strip():
                notes.pass_over(f"{where}: 'claim' is empty; take the line out")
            else:
                records.append(_record(f"fever-{number}", row["claim"].strip(), row["label"]))
        nothing = f"{path} holds no claim with a label among {', '.join(LABELS)}; give FEVER's JSON lines"
        notes.check_any(records, nothing)
    return records


def _record(name: str, claim: str, label: str) -> Record:
    probes: dict[str, tuple[Probe, ...]] = {"reliability": (Probe(claim, label),)}
    for rule, texts in rephrasings(claim).items():
        probes[f"rephrasing_{rule}"] = tuple(Probe(text, label) for text in texts)
    return Record(name, (EditRequest(claim, label, id=name),), probes)
