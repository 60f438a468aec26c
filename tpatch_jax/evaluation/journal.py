"""What a running evaluation leaves on disk, so that an interrupted one goes on where it was.

A report folder holds from the start ``run.json`` (the configuration), from the first record on
``records-METHOD.jsonl``, and until the report is whole a folder ``unfinished`` with finished results and the edits.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.files import check_vacant, write_text
from tpatch_jax.storage.finished_parts import check_same_run, load_arrays, save_arrays
from tpatch_jax.storage.folders import REPORT
from tpatch_jax.storage.lock import hold_lock
from tpatch_jax.typing import Arrays

__all__ = ["Journal", "finish_report", "open_report", "reporting"]

RUN, UNFINISHED, LOCK = "run.json", "unfinished", "lock"


@contextmanager
def reporting(folder: Path | None, config: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """A report folder in which nobody else measures meanwhile: see `open_report`, whose result is given.

    Args:
        folder: the folder; ``None`` keeps nothing, and locks nothing.
        config: what determines the figures.

    Raises:
        TPatchError: as `open_report`, or another process measures in that folder.
    """
    whole = None if folder is None else open_report(folder, config)
    if folder is None or whole is not None:
        yield whole
        return
    with hold_lock(folder / UNFINISHED / LOCK, folder):
        yield None


def open_report(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Begin a report folder, or go on with one of the same configuration.

    Args:
        folder: new, empty, or of an earlier run.
        config: what determines the figures.

    Returns:
        The report if it is already whole, else ``None``.

    Raises:
        TPatchError: the folder holds something else, or a run with another configuration.
    """
    run = folder / RUN
    if not run.exists():
        check_vacant(folder, inside=True)
        try:
            (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
            write_text(run, json.dumps(config, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise TPatchError(f"cannot write {folder}: {error.strerror}; choose another output folder") from None
        return None
    try:
        earlier = json.loads(run.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TPatchError(f"{run} is damaged ({error}); remove {folder} and start again") from None
    wanted = json.loads(json.dumps(config))
    check_same_run(earlier, wanted, folder, "choose another output folder or remove it first")
    try:
        return json.loads((folder / REPORT).read_text("utf-8"))
    except (OSError, ValueError):
        (folder / UNFINISHED).mkdir(exist_ok=True)
        return None


def finish_report(folder: Path) -> None:
    """Remove what only an interrupted run would have needed."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What cannot be written says so, and what was written before stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # A full disk is an OSError from Python and a SafetensorError from safetensors.
        reason = getattr(error, "strerror", None) or error
        raise TPatchError(f"cannot write {path}: {reason}; free some room and run again") from None


class Journal:
    """The records and state of one method's run, in memory or also in a report folder.

    Attributes:
        lines: one object a record, in order.
    """

    def __init__(self, method: str, folder: Path | None = None):
        """Begin, or go on with what a report folder holds of this method."""
        self.lines: list[dict[str, Any]] = []
        self._records = self._result = self._state = None
        if folder is None:
            return
        self._records = folder / f"records-{method}.jsonl"
        self._result = folder / UNFINISHED / f"result-{method}.json"
        self._state = folder / UNFINISHED / f"state-{method}.safetensors"
        if self._records.exists():
            # Bytes, for a run may have stopped within a character; and other breaks than line feeds stand in texts.
            for line in self._records.read_bytes().split(b"\n"):
                try:
                    self.lines.append(json.loads(line))
                except ValueError:
                    break  # The run stopped in the middle of this line.
            self.replace(self.lines)

    def add(self, line: dict[str, Any]) -> None:
        """One more record is done."""
        self.lines.append(line)
        if self._records is not None:
            with _writing(self._records), self._records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def replace(self, lines: list[dict[str, Any]]) -> None:
        """Other records in place of all."""
        self.lines = list(lines)
        if self._records is not None:
            with _writing(self._records):
                write_text(self._records, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def save(self, arrays: Arrays, about: dict[str, Any]) -> None:
        """Keep the edits so far, whole or not at all."""
        if self._state is None:
            return
        with _writing(self._state):
            save_arrays(self._state, arrays, about)

    def load(self) -> tuple[Arrays, dict[str, Any]] | None:
        """The edits so far, if any were kept."""
        return load_arrays(self._state) if self._state is not None else None

    def finish(self, result: dict[str, Any]) -> None:
        """The method is done."""
        if self._result is not None:
            with _writing(self._result):
                write_text(self._result, json.dumps(result, ensure_ascii=False))

    def result(self) -> dict[str, Any] | None:
        """The method's result, if it was done in an earlier run."""
        try:
            return json.loads(self._result.read_text("utf-8")) if self._result is not None else None
        except (OSError, ValueError):
            return None
