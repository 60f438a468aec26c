"""Output folders where several processes work together: one of them writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from tpatch_jax.storage.files import check_vacant

__all__ = ["one_process_writes"]


@contextmanager
def one_process_writes(folder: Path) -> Iterator[bool]:
    """Whether this process is the one that writes an output folder; all leave the block when it is written.

    Args:
        folder: where; on a disk that all processes see, so that all of them find it taken if one does.

    Raises:
        TPatchError: the folder holds something already.
    """
    check_vacant(folder)
    if jax.process_count() == 1:
        yield True
        return
    multihost_utils.sync_global_devices(f"before {folder}")
    try:
        yield jax.process_index() == 0
    finally:
        multihost_utils.sync_global_devices(f"after {folder}")
