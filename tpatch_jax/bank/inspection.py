"""Opening a bank: every byte of it is checked against the digests before anything is believed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.bank.journal import Chain, Line, read_chain
from tpatch_jax.bank.layout import (
    COPY,
    FORMAT,
    HEAD,
    JOURNAL,
    MANIFEST,
    check_folder,
    digest,
    memory_name,
    mend,
    unsealed,
)
from tpatch_jax.bank.segments import segment_paths
from tpatch_jax.bank.state import Bank, replay
from tpatch_jax.core.arguments import as_path
from tpatch_jax.errors import TPatchError

__all__ = ["Damage", "Inspection", "inspect_bank", "open_bank", "read_bytes", "read_manifest"]


class Damage(NamedTuple):
    """One file that is not what was written."""

    path: Path
    reason: str


class Inspection(NamedTuple):
    """What a look at every byte of a bank finds.

    Attributes:
        manifest: what an intact ``bank.json`` says.
        lines: the committed lines of the journal, as far as they can be read from the journal or its copy.
        least: how many there must be.
        damages: what is damaged or missing.
    """

    manifest: dict[str, Any]
    lines: tuple[Line, ...]
    least: int
    damages: tuple[Damage, ...]


def read_bytes(path: Path) -> bytes | None:
    """A file's bytes, ``None`` if it is missing.

    Raises:
        TPatchError: it is there and cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TPatchError(f"{path} cannot be read ({error.strerror}); check the folder and the disk") from None


def _sealed(path: Path, damages: list[Damage]) -> dict[str, Any] | None:
    content = read_bytes(path)
    if content is None:
        damages.append(Damage(path, "is missing"))
        return None
    try:
        return unsealed(content)
    except ValueError as error:
        damages.append(Damage(path, f"is damaged: {str(error).splitlines()[0]}"))
        return None


def read_manifest(folder: Path) -> tuple[dict[str, Any], list[Damage]]:
    """The manifest, from its copy if need be, and what is damaged.

    Raises:
        TPatchError: neither can be read, or a newer version wrote it.
    """
    damages: list[Damage] = []
    copies = [_sealed(folder / place / MANIFEST, damages) for place in ("", COPY)]
    manifest = copies[0] or copies[1]
    if manifest is None:
        raise TPatchError(
            f"{folder / MANIFEST} and its copy are both missing or damaged; bring the bank back from where you keep "
            "another (`tpatch bank pull`)"
        )
    if all(copies) and copies[0] != copies[1]:
        damages.append(Damage(folder / COPY / MANIFEST, "belongs to another bank"))
    if manifest["format"] > FORMAT:
        raise TPatchError(
            f"{folder} was written by a newer version (format {manifest['format']}, this one knows {FORMAT}); "
            "upgrade tpatch-jax"
        )
    return manifest, damages


def _head(folder: Path, damages: list[Damage]) -> int:
    head = _sealed(folder / HEAD, damages)
    return 0 if head is None else int(head["lines"])


def _merged(chains: list[bytes], start: str) -> tuple[Line, ...]:
    """Line after line from whichever copy has it."""
    lines: list[Line] = []
    while True:
        check = lines[-1].check if lines else start
        offset = sum(len(line.content) for line in lines)
        number = len(lines)
        for content in chains:
            parts = content.split(b"\n")
            options = [content[offset:].partition(b"\n")[0], parts[number] if number < len(parts) else b""]
            chain = next((c for o in options if (c := read_chain(o + b"\n", check)).lines), None)
            if chain is not None:
                lines.append(chain.lines[0])
                break
        else:
            return tuple(lines)


def inspect_bank(folder: Path) -> Inspection:
    """Look at every byte of a bank; changes nothing.

    Raises:
        TPatchError: there is no bank, a newer version wrote it, or no copy of its manifest is whole.
    """
    check_folder(folder)
    manifest, damages = read_manifest(folder)
    least = _head(folder, damages)
    contents = [read_bytes(folder / place / JOURNAL) for place in ("", COPY)]
    chains = [read_chain(content or b"", manifest["check"]) for content in contents]
    lines = chains[0].lines
    for place, content, chain in zip(("", COPY), contents, chains, strict=True):
        path = folder / place / JOURNAL
        reason = _wrong(content, chain, least)
        if not reason and place and chain.lines[:least] != lines[:least]:
            reason = "is not the copy of the journal"
        # What a crash leaves in the copy beyond the head is not committed yet.
        if reason and not (place and content is not None and len(chain.lines) >= least):
            damages.append(Damage(path, reason))
    if any(damage.path.name == JOURNAL or damage.path.name == HEAD for damage in damages):
        lines = _merged([content for content in contents if content is not None], manifest["check"])
        if len(lines) < len(chains[0].lines):
            lines = chains[0].lines
    damages += _segment_damages(folder, lines)
    if wanted := manifest.get("memory"):
        name = memory_name(manifest)
        for path in (folder / name, folder / COPY / name):
            content = read_bytes(path)
            if content is None or digest(content) != wanted:
                damages.append(Damage(path, "is missing" if content is None else "is damaged"))
    return Inspection(manifest, lines, least, tuple(damages))


def _wrong(content: bytes | None, chain: Chain, least: int) -> str:
    if content is None:
        return "is missing"
    if len(chain.lines) < least:
        return f"is damaged: {chain.problem or f'it ends after line {len(chain.lines)}'}, and {least} were committed"
    if chain.problem and not chain.torn:
        return f"is damaged: {chain.problem}"
    return ""


def _segment_damages(folder: Path, lines: tuple[Line, ...]) -> list[Damage]:
    lost = {number for line in lines if line.record["op"] == "repair" for number in line.record["lost"]}
    damages = []
    for line in lines:
        if (segment := line.record.get("segment")) and line.record["n"] not in lost:
            for path in segment_paths(folder, segment):
                content = read_bytes(path)
                if content is None or digest(content) != segment["sha256"]:
                    reason = (
                        "is missing" if content is None else "is damaged: its bytes are not those that were written"
                    )
                    damages.append(Damage(path, reason))
    return damages


def open_bank(folder: str | Path) -> Bank:
    """Read a bank, with every byte of it checked.

    Args:
        folder: what `create_bank` made.

    Returns:
        The `Bank`: its edits and guards at the last committed line of its journal.

    Raises:
        TPatchError: there is no bank, a newer version wrote it, or something in it is damaged; the message names the
            file and the command that mends it.

    Example:
        >>> open_bank("banks/facts").edits  # doctest: +SKIP
        (BankEdit(id='lyon', ...),)
    """
    folder = as_path(folder, "open_bank(folder)", "the folder of a bank; give its path")
    inspection = inspect_bank(folder)
    if inspection.damages:
        first = inspection.damages[0]
        more = f" (and {len(inspection.damages) - 1} more)" if len(inspection.damages) > 1 else ""
        raise TPatchError(f"{first.path} {first.reason}{more}; {mend(folder)}")
    try:
        return replay(folder, inspection.manifest, [(line.record, line.check) for line in inspection.lines])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise TPatchError(f"{folder / JOURNAL} cannot be understood ({error!r}); upgrade tpatch-jax") from None
