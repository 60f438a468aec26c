"""Mending a damaged bank from its second copy; what is damaged is put aside, never thrown away."""

import json
import shutil
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tpatch_jax.bank.commit import commit, sweep, write_head
from tpatch_jax.bank.inspection import inspect_bank, read_bytes
from tpatch_jax.bank.layout import COPY, DAMAGED, HEAD, JOURNAL, MANIFEST, SEGMENTS, memory_name, put
from tpatch_jax.bank.lock import writing
from tpatch_jax.bank.segments import segment_paths
from tpatch_jax.bank.state import replay, states
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest, request_line

__all__ = ["RepairInfo", "repair_bank"]


class RepairInfo(NamedTuple):
    """What a repair did.

    Attributes:
        mended: files that are what they were again; those of lost edits are not.
        lost_lines: how many committed lines of the journal neither copy has any more.
        lost_edits: edits whose neurons neither copy has any more.
        lost_requests: a file for `tpatch bank add` with the requests of those that were active, if there were any.
    """

    mended: tuple[str, ...]
    lost_lines: int
    lost_edits: tuple[str, ...]
    lost_requests: str | None


def _aside(folder: Path, path: Path) -> None:
    """Keep a damaged file under a free name."""
    if not path.exists():
        return
    place = folder / DAMAGED
    place.mkdir(exist_ok=True)
    number = 1
    while (target := place / f"{number}-{path.relative_to(folder).as_posix().replace('/', '-')}").exists():
        number += 1
    shutil.copy2(path, target)


def repair_bank(folder: str | Path) -> RepairInfo:
    """Mend a bank: each damaged file from its intact copy.

    Where both copies of a segment are damaged its edits are lost, and every other edit is kept; the journal still has
    their requests, of which those that were active are written to ``BANK/damaged/lost.jsonl``, or to ``lost-2.jsonl``
    where an earlier repair wrote that. Damaged files are kept in ``BANK/damaged``.

    Args:
        folder: the bank.

    Returns:
        What was mended and what was lost.

    Raises:
        TPatchError: both copies of the manifest are damaged, another process is writing, or the disk is full.

    Example:
        >>> repair_bank("banks/facts").mended  # doctest: +SKIP
        ('banks/facts/journal.jsonl',)
    """
    folder = Path(folder)
    with writing(folder):
        try:
            return _repair(folder)
        except OSError as error:
            raise TPatchError(f"cannot write {folder}: {error.strerror}; free some room and run again") from error


def _repair(folder: Path) -> RepairInfo:
    inspection = inspect_bank(folder)
    damaged = {damage.path for damage in inspection.damages}
    for path in damaged:
        _aside(folder, path)
    for place in (folder / SEGMENTS, folder / COPY / SEGMENTS):
        place.mkdir(parents=True, exist_ok=True)
    memory = (memory_name(inspection.manifest),) if inspection.manifest.get("memory") else ()
    names = (MANIFEST, *memory)
    for name in names:
        _restore((folder / name, folder / COPY / name), damaged)
    whole = b"".join(line.content for line in inspection.lines)
    for path in (folder / JOURNAL, folder / COPY / JOURNAL):
        if read_bytes(path) != whole:
            put(path, whole)
    if folder / HEAD in damaged or inspection.least != len(inspection.lines):
        write_head(folder, len(inspection.lines))
    lost, removed = [], set[Path]()
    for line in inspection.lines:
        if segment := line.record.get("segment"):
            paths = segment_paths(folder, segment)
            if all(path in damaged for path in paths):
                lost.append(line.record["n"])
                removed.update(paths)
            else:
                _restore(paths, damaged)
    bank = replay(folder, inspection.manifest, [(line.record, line.check) for line in inspection.lines])
    before = states(bank)
    lost_edits: tuple[str, ...] = ()
    if lost:
        bank = commit(bank, {"op": "repair", "lost": lost})
        after = states(bank)
        lost_edits = tuple(name for name, state in after.items() if state == "lost" and before[name] != "lost")
    # One that was disabled or superseded would be active if it were added again.
    again = [edit.request for edit in bank.edits if edit.id in lost_edits and before[edit.id] == "active"]
    requests = _write_requests(folder, again)
    sweep(bank)
    mended = tuple(sorted(str(path) for path in damaged - removed if path.exists() and path.name))
    return RepairInfo(mended, max(0, inspection.least - len(inspection.lines)), lost_edits, requests)


def _restore(paths: tuple[Path, Path], damaged: set[Path]) -> None:
    good = next((path for path in paths if path not in damaged), None)
    if good is None:
        raise TPatchError(f"{paths[0]} and its copy are both damaged; bring them back from where you keep another copy")
    for path in paths:
        if path in damaged:
            put(path, good.read_bytes())


def _write_requests(folder: Path, requests: list[EditRequest]) -> str | None:
    if not requests:
        return None
    lines = [json.dumps(request_line(request), ensure_ascii=False) + "\n" for request in requests]
    place = folder / DAMAGED
    place.mkdir(exist_ok=True)
    # Those of an earlier repair stay, whether or not they were added again.
    names = (f"lost-{number}.jsonl" if number > 1 else "lost.jsonl" for number in count(1))
    path = next(path for path in map(place.joinpath, names) if not path.exists())
    put(path, "".join(lines).encode())
    return str(path)
