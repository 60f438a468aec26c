"""One writer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpatch_jax.bank.layout import LOCK, check_folder
from tpatch_jax.storage.lock import hold_lock

__all__ = ["writing"]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a bank's lock for a block; see `tpatch_jax.storage.lock.hold_lock`.

    Args:
        folder: the bank.

    Raises:
        TPatchError: another process holds it, or the folder is no bank or cannot be written.
    """
    check_folder(folder)
    with hold_lock(folder / LOCK, folder):
        yield
