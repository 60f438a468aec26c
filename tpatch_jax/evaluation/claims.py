"""FEVER: claims that are supported or refuted, one JSON object a line."""

from pathlib import Path

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.record import Probe, Record
from tpatch_jax.evaluation.rephrasings import rephrasings
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.json_lines import read_json_lines

__all__ = ["LABELS", "read_fever"]

LABELS = ("SUPPORTS", "REFUTES")
"""T-Patcher's task has these two; claims with another label are passed over."""


def read_fever(path: str | Path) -> list[Record]:
    """Read FEVER's claims: the edit gives a claim its true label.

    Fields: ``claim, label``. Every rule of `tpatch_jax.evaluation.rephrasings` makes probes of its own.

    Args:
        path: the file, JSON lines.

    Returns:
        The records with one of `LABELS`; ids are ``fever-<line from 1>``.

    Raises:
        TPatchError: the file cannot be read, holds no such claim, or a line lacks a field.

    Source: Thorne et al. 2018, "FEVER: a large-scale dataset for Fact Extraction and VERification"; Huang et al. 2023,
        section 5.1, for the task.

    Example:
        >>> read_fever("fever.jsonl")[0].request.target  # doctest: +SKIP
        'REFUTES'
    """
    records = []
    for number, where, row in read_json_lines(path, "claim"):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("claim", "label")):
            raise TPatchError(f"{where}: no 'claim' and 'label'; FEVER has both in each line")
        if row["label"] in LABELS and row["claim"].strip():
            records.append(_record(f"fever-{number}", row["claim"].strip(), row["label"]))
    if not records:
        raise TPatchError(f"{path} holds no claim with a label among {', '.join(LABELS)}; give FEVER's JSON lines")
    return records


def _record(name: str, claim: str, label: str) -> Record:
    probes: dict[str, tuple[Probe, ...]] = {"reliability": (Probe(claim, label),)}
    for rule, texts in rephrasings(claim).items():
        probes[f"rephrasing_{rule}"] = tuple(Probe(text, label) for text in texts)
    return Record(name, (EditRequest(claim, label, id=name),), probes)
