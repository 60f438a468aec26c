"""Where things are in a bank's folder, and its manifest.

BANK/bank.json        the manifest: format, model, settings
BANK/journal.jsonl    one line a change, each sealed with the one before; the state of the bank is its replay
BANK/head.json        how many lines the journal has at least
BANK/segments/        safetensors, one for each line that brought neurons; never changed
BANK/memory.txt       the text on which patches stay silent, if one was given; of pictures memory.safetensors, which
                      holds their queries and no picture
BANK/copy/            all of these but the head once more: what `tpatch bank repair` mends from
BANK/damaged/         what it put aside
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.files import sync, temporary_path
from tpatch_jax.storage.folders import BANK, describe_folder

__all__ = [
    "COPY",
    "DAMAGED",
    "FORMAT",
    "HEAD",
    "JOURNAL",
    "LOCK",
    "MANIFEST",
    "MEMORY",
    "QUERIES",
    "SEGMENTS",
    "check_folder",
    "digest",
    "is_bank",
    "memory_name",
    "mend",
    "put",
    "sealed_text",
    "unsealed",
]

FORMAT = 1
MANIFEST, JOURNAL, HEAD, LOCK = BANK, "journal.jsonl", "head.json", "lock"
SEGMENTS, MEMORY, COPY, DAMAGED = "segments", "memory.txt", "copy", "damaged"
QUERIES = "memory.safetensors"


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def mend(folder: Path) -> str:
    """The command that mends a damaged bank, as messages end with it."""
    return f"run `tpatch bank repair {folder}`"


def memory_name(manifest: Mapping[str, Any]) -> str:
    """The name of the file with what patches stay silent on."""
    return manifest.get("memory_file", MEMORY)


def is_bank(folder: Path) -> bool:
    """Whether a folder is a bank, be it a damaged one."""
    return any((folder / name).exists() for name in (MANIFEST, JOURNAL, COPY))


def check_folder(folder: Path) -> None:
    """Make sure that there is a bank.

    Raises:
        TPatchError: the folder is missing, or holds something else.
    """
    if not folder.is_dir():
        raise TPatchError(f"{folder} does not exist; make a bank with `tpatch bank init {folder} --model MODEL`")
    if not is_bank(folder):
        mend = f"make one with `tpatch bank init FOLDER --model MODEL`{describe_folder(folder)}"
        raise TPatchError(f"{folder} is no bank; {mend}")


def sealed_text(value: dict[str, Any]) -> str:
    """A small JSON file whose last entry is the digest of all before it."""
    body = json.dumps(value, ensure_ascii=False, indent=1)[:-2]
    return f'{body},\n "check": "{digest(body.encode())}"\n}}\n'


def unsealed(content: bytes) -> dict[str, Any]:
    """The inverse of `sealed_text`.

    Raises:
        ValueError: any byte is not what was written.
    """
    body, mark, rest = content.rpartition(b',\n "check": "')
    if not mark or rest != digest(body).encode() + b'"\n}\n':
        raise ValueError("its bytes are not those that were written")
    return json.loads(content)


def put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: the disk is full; nothing is left of it.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
