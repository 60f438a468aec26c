"""Changing a bank: one line at the end of the journal is the one moment at which a change has happened.

Everything that a line needs is on disk before the line is. A crash or a full disk before that leaves the bank as it
was; what it left lying about is swept up by the next writer.
"""

import getpass
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.journal import Line, read_chain, seal
from tpatch_jax.bank.layout import COPY, HEAD, JOURNAL, MANIFEST, SEGMENTS, digest, memory_name, put, sealed_text
from tpatch_jax.bank.segments import Arrays, name_segment, pack, segment_paths, write_segment
from tpatch_jax.bank.state import Bank, step
from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.files import replace_folder, sync

__all__ = ["commit", "commit_line", "open_to_write", "sweep", "write_bank", "write_head"]


def write_bank(folder: Path, manifest: dict[str, Any], memory: bytes | None) -> None:
    """Put an empty bank on disk, whole or not at all."""
    if memory is not None:
        manifest = {**manifest, "memory": digest(memory)}
    with replace_folder(folder) as temporary:
        for place in (temporary, temporary / COPY):
            (place / SEGMENTS).mkdir(parents=True)
            (place / MANIFEST).write_text(sealed_text(manifest), "utf-8")
            (place / JOURNAL).write_bytes(b"")
            if memory is not None:
                (place / memory_name(manifest)).write_bytes(memory)
        (temporary / HEAD).write_text(sealed_text({"lines": 0}), "utf-8")


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _cut(path: Path, size: int) -> None:
    if path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def write_head(folder: Path, lines: int) -> None:
    """Say how many lines the journal has."""
    put(folder / HEAD, sealed_text({"lines": lines}).encode())


def _stamp() -> dict[str, Any]:
    """When, who, and with what."""
    versions = {}
    for name in ("tpatch-jax", "jax"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    try:
        who = getpass.getuser()
    except (OSError, KeyError):
        who = "unknown"
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "who": who, "versions": versions}


def commit(bank: Bank, record: Mapping[str, Any], arrays: Arrays | None = None) -> Bank:
    """Add one line to the journal, with the segment that it names; only the holder of the lock may.

    Args:
        bank: the bank as it is.
        record: what the line says, without its number, who and when, and segment.
        arrays: what goes into the segment, if anything.

    Returns:
        The bank after it.

    Raises:
        TPatchError: the disk is full; nothing has changed.
    """
    content = pack(arrays) if arrays else None
    segment = {"segment": name_segment(bank.next, content)} if content is not None else {}
    return commit_line(bank, seal({"n": bank.next, **_stamp(), **record, **segment}, bank.check), content)


def commit_line(bank: Bank, line: Line, content: bytes | None) -> Bank:
    """Add a sealed line, with the bytes of the segment that it names.

    Args:
        bank: the bank as it is, to whose last line this one is chained.
        line: what `seal` made, here or in another copy of the bank.
        content: its segment's bytes, if it has one.

    Raises:
        TPatchError: the disk is full; nothing has changed.
    """
    folder, number, segment = bank.folder, bank.next, line.record.get("segment")
    journals = folder / COPY / JOURNAL, folder / JOURNAL
    sizes = [path.stat().st_size for path in journals]
    head = folder / f".{HEAD}.next"
    try:
        if segment and content is not None:
            write_segment(folder, segment, content)
        # The head is written beforehand, so that a full disk is noticed while there is still nothing to undo.
        put(head, sealed_text({"lines": number}).encode())
        for path in journals:
            _append(path, line.content)
    except BaseException as error:
        for path, size in zip(reversed(journals), reversed(sizes), strict=True):
            _cut(path, size)
        head.unlink(missing_ok=True)
        for path in segment_paths(folder, segment) if segment else ():
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise TPatchError(
                f"cannot write {folder}: {error.strerror}; nothing was changed, free some room and run again"
            ) from error
        raise
    # The change has happened; a head that stays behind is brought up to date by the next writer.
    with suppress(OSError):
        os.replace(head, folder / HEAD)
        sync(folder)
    return step(bank, line.record, line.check)


def open_to_write(folder: str | Path) -> Bank:
    """Open a bank under its lock, and sweep up what a crash left.

    Raises:
        TPatchError: as `open_bank`.
    """
    bank = open_bank(folder)
    try:
        sweep(bank)
    except OSError as error:
        raise TPatchError(f"cannot write {folder}: {error.strerror}; free some room and run again") from error
    return bank


def sweep(bank: Bank) -> None:
    """Take away whatever is not part of the committed bank: torn lines, segments and files that no line names."""
    folder = bank.folder
    content = (folder / JOURNAL).read_bytes()
    whole = b"".join(line.content for line in read_chain(content, bank.manifest["check"]).lines)
    if content != whole:
        _cut(folder / JOURNAL, len(whole))
    if (folder / COPY / JOURNAL).read_bytes() != whole:
        put(folder / COPY / JOURNAL, whole)
    head = sealed_text({"lines": len(bank.records)}).encode()
    if (folder / HEAD).read_bytes() != head:
        put(folder / HEAD, head)
    named = {record["segment"]["file"] for record in bank.records if "segment" in record}
    for place in (folder / SEGMENTS, folder / COPY / SEGMENTS):
        # A hub keeps no empty folder.
        place.mkdir(exist_ok=True)
        for path in place.iterdir():
            if path.name not in named:
                path.unlink()
    for place in (folder, folder / COPY):
        for path in place.glob(".*"):
            if path.is_file() and path.name.startswith((".head.json", ".bank.json", ".journal.jsonl", ".memory.")):
                path.unlink()
