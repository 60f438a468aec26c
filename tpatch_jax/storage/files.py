"""Writing that a crash cannot tear: a folder or file appears whole or not at all."""

import errno
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tpatch_jax.errors import TPatchError

__all__ = ["check_new_file", "check_vacant", "replace_file", "replace_folder", "sync", "temporary_path", "write_text"]


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """Where a file is written before it takes its name: beside it, by no other process or thread."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never a part.

    Args:
        path: the file.
        text: its whole new content.
    """
    temporary = temporary_path(path)
    try:
        temporary.write_text(text, "utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def check_vacant(folder: Path, *, inside: bool = False) -> None:
    """Make sure that an output folder does not exist yet, or is empty, and can be made, before any work begins.

    Args:
        folder: the folder.
        inside: one that exists is written into; otherwise another folder takes its place.

    Raises:
        TPatchError: it holds something, what is above it is no folder or cannot be written, or another folder cannot
            take its place.
    """
    folder = _followed(folder)
    try:
        taken = any(folder.iterdir()) if folder.is_dir() else folder.exists()
    except OSError as error:
        raise TPatchError(f"cannot read {folder}: {error.strerror}; choose another output folder") from error
    if taken:
        raise TPatchError(f"{folder} already exists; choose another output folder or remove it first")
    here = False
    with suppress(OSError):  # the current folder may have been removed
        here = folder.is_dir() and os.path.samefile(folder, os.curdir)
    if not inside and (here or os.path.ismount(folder)):
        what = "the current folder" if here else "where a disk is mounted"
        raise TPatchError(f"{folder} is {what}, whose place no other can take; choose an output folder inside it")
    places = [folder.absolute(), *folder.absolute().parents][0 if inside else 1 :]
    above = next(place for place in places if place.exists())
    if not above.is_dir():
        raise TPatchError(f"cannot write {folder}: {above} is no folder; choose another output folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise TPatchError(f"cannot write {folder}: no permission to write in {above}; choose another output folder")


def _followed(folder: Path) -> Path:
    """Where a folder really is, links followed."""
    return Path(os.path.realpath(folder))


def _allowed(folder: Path) -> int:
    """The permissions that a new folder gets from what the user has set (``umask``)."""
    probe = folder / ".permissions"
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode) & 0o777
    probe.rmdir()
    return mode


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder that takes its place under its name only when the block ends well.

    Args:
        folder: the name; it must not exist yet, or be an empty folder.

    Yields:
        The folder to fill.

    Raises:
        TPatchError: the name is taken, or the disk is full (what was there before stays as it was).
    """
    folder = _followed(folder)
    check_vacant(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise TPatchError(f"cannot write beside {folder}: {error.strerror}; choose another output folder") from error
    try:
        yield temporary
        allowed = _allowed(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                # safetensors makes files that nobody else may read, whatever the user has set.
                path.chmod(allowed & 0o666)
                sync(path)
        temporary.chmod(allowed)
        os.replace(temporary, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise _unwritten(folder, error, "folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritten(path: Path, error: Exception, kind: str) -> TPatchError:
    """What to say where a file or folder could not be written."""
    # a full disk is an OSError from Python and a SafetensorError from safetensors
    reason, number = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
    if isinstance(error, OSError) and number is None:
        # What NumPy says where a file takes less than it was given.
        reason = f"not all of it fits there ({error})"
    full = number in (None, errno.ENOSPC, errno.EDQUOT)
    mend = "free some room and try again" if full else f"choose another output {kind}"
    return TPatchError(f"cannot write {path}: {reason}; {mend}")


def check_new_file(path: Path) -> None:
    """Make sure that an output file does not exist yet and can be made, before any work begins.

    Args:
        path: the file.

    Raises:
        TPatchError: something is there already, or what is above it is no folder or cannot be written.
    """
    try:
        taken = os.path.lexists(path)
    except OSError as error:
        raise _unwritten(path, error, "file") from error
    if taken:
        raise TPatchError(f"{path} already exists; choose another output file or remove it first")
    above = next(place for place in path.absolute().parents if place.exists())
    if not above.is_dir():
        raise TPatchError(f"cannot write {path}: {above} is no folder; choose another output file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise TPatchError(f"cannot write {path}: no permission to write in {above}; choose another output file")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Write a temporary file that takes its name only when the block ends well.

    Args:
        path: the name; there must be nothing by it yet.

    Yields:
        The file to write; it does not exist yet.

    Raises:
        TPatchError: the name is taken, or the disk is full.
    """
    check_new_file(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        # Another process may have been faster.
        check_new_file(path)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise _unwritten(path, error, "file") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
