"""What a reader of a data set passes over, leaves out and sorts apart: counted, and said."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tpatch_jax.errors import TPatchError

__all__ = ["DataNotes", "reading_notes"]

SHOWN = 20
"""So many records that were passed over are named in a report."""

_log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class DataNotes:
    """What became of the records of a file that could not be taken as they stand.

    Attributes:
        strict: a record that cannot be read is an error instead.
        records: how many records the file holds.
        passed_over: for each record that was passed over, which it is and why.
        counts: what else there is to say, and of how many.

    Example:
        >>> notes = DataNotes(records=2, passed_over=["data.json, record 2: no 'alt'"])
        >>> notes.sentences()
        ["1 of 2 records passed over: data.json, record 2: no 'alt'"]
    """

    strict: bool = False
    records: int = 0
    passed_over: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def pass_over(self, reason: str) -> None:
        """Count a record that cannot be read.

        Raises:
            TPatchError: `strict` is set.
        """
        if self.strict:
            raise TPatchError(reason)
        self.passed_over.append(reason)

    def leave_out(self, what: str, reason: str) -> None:
        """Count a part of a record that is wrong and left out, the rest being read.

        Raises:
            TPatchError: `strict` is set.
        """
        if self.strict:
            raise TPatchError(reason)
        self.count(what)

    def count(self, what: str, number: int = 1) -> None:
        """Count what is worth saying and no mistake."""
        self.counts[what] = self.counts.get(what, 0) + number

    def read_each(self, entries: Iterable[T], parse: Callable[[T], R | None]) -> list[R]:
        """Parse every entry, and pass over those that cannot be read; ``None`` was counted by ``parse``.

        Raises:
            TPatchError: `strict` is set and one cannot be read, or none can.
        """
        parsed = []
        for entry in entries:
            self.records += 1
            try:
                record = parse(entry)
            except TPatchError as error:
                self.pass_over(str(error))
            else:
                if record is not None:
                    parsed.append(record)
        self.check_any(parsed, "no record can be read; give the data set's own file")
        return parsed

    def miss(self, reason: str) -> None:
        """Count a line that is not even JSON."""
        self.records += 1
        self.pass_over(reason)

    def check_any(self, records: Sequence[object], nothing: str) -> None:
        """Make sure that something was read.

        Raises:
            TPatchError: nothing was; the message is that of the first record, or ``nothing`` if there is none.
        """
        if not records:
            more = f" ({len(self.passed_over)} records, and none can be read)" * (len(self.passed_over) > 1)
            raise TPatchError(f"{self.passed_over[0]}{more}" if self.passed_over else nothing)

    def sentences(self) -> list[str]:
        """Everything there is to say, for people."""
        said = [f"{number:,} {what}" for what, number in self.counts.items()]
        if self.passed_over:
            more = f"; {len(self.passed_over) - 1:,} more" * (len(self.passed_over) > 1)
            said.insert(
                0, f"{len(self.passed_over):,} of {self.records:,} records passed over: {self.passed_over[0]}{more}"
            )
        return said

    def tell(self, path: str | Path) -> None:
        """Say it in the log."""
        for sentence in self.sentences():
            _log.warning("%s: %s", path, sentence)

    def summary(self) -> dict[str, Any]:
        """The same for a report."""
        return {
            "records": self.records,
            "passed_over": len(self.passed_over),
            "reasons": self.passed_over[:SHOWN],
            "counts": dict(self.counts),
        }


@contextmanager
def reading_notes(path: str | Path, strict: bool, notes: DataNotes | None) -> Iterator[DataNotes]:
    """The notes of one reading: those given, or others that the log tells when all is read.

    Args:
        path: what is read.
        strict: see `DataNotes`.
        notes: whoever gives them says what they hold.
    """
    if notes is not None:
        notes.strict = notes.strict or strict
        yield notes
    else:
        notes = DataNotes(strict)
        yield notes
        notes.tell(path)
