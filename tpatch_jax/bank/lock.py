"""One writer at a time."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpatch_jax.bank.layout import LOCK, check_folder
from tpatch_jax.errors import TPatchError

__all__ = ["writing"]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a bank's lock for a block; the system lets go of it if the process dies.

    Args:
        folder: the bank.

    Raises:
        TPatchError: another process holds it, or the folder cannot be written.
    """
    check_folder(folder)
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise TPatchError(f"cannot write {folder}: {error.strerror}; check who owns it") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TPatchError(
                f"{folder} is being written by {_holder(handle)}; wait until it is done, or stop that process"
            ) from None
        # Who holds it is for messages only: a full disk does not matter here.
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 400, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
