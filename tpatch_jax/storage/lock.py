"""One writer at a time in a folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tpatch_jax.errors import TPatchError

__all__ = ["hold_lock"]


@contextmanager
def hold_lock(path: Path, folder: Path) -> Iterator[None]:
    """Hold a lock for a block; the system lets go of it if the process dies.

    Args:
        path: the lock's file.
        folder: what it is for, as messages name it.

    Raises:
        TPatchError: another process holds it, or it cannot be written.
    """
    # Read before the attempt, which empties the file in some versions of filelock.
    holder = _holder(path)
    lock = FileLock(path, timeout=0, mode=0o644)
    try:
        lock.acquire()
    except Timeout:
        raise TPatchError(
            f"{folder} is being written by {holder}; wait until it is done, or stop that process"
        ) from None
    except OSError as error:
        raise TPatchError(f"cannot write {folder}: {error.strerror}; check who owns it") from None
    try:
        # Who holds it is for messages only: a full disk, or a system that keeps the file locked, does not matter here.
        with suppress(OSError):
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), "utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """Who wrote their name into the file; one who holds the lock does so at once."""
    try:
        note = json.loads(path.read_text("utf-8"))
        return f"process {note['pid']} on {note['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
