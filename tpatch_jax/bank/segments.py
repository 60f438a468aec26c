"""Segments: the arrays that one line of the journal brought, written once and never changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from tpatch_jax.bank.layout import COPY, SEGMENTS, digest, mend, put
from tpatch_jax.errors import TPatchError

__all__ = ["Arrays", "name_segment", "pack", "read_segment", "segment_paths", "write_segment"]

Arrays = dict[str, np.ndarray]


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as the bytes of a safetensors file."""
    return save({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())})


def name_segment(number: int, content: bytes) -> dict[str, str]:
    """What the journal says about a segment: its file and the digest of its bytes."""
    check = digest(content)
    return {"file": f"{number:06}-{check[:8]}.safetensors", "sha256": check}


def segment_paths(folder: Path, segment: Mapping[str, Any]) -> tuple[Path, Path]:
    """Where a segment and its copy are."""
    name = Path(str(segment["file"])).name
    return folder / SEGMENTS / name, folder / COPY / SEGMENTS / name


def write_segment(folder: Path, segment: Mapping[str, Any], content: bytes) -> None:
    """Put a segment and its copy on disk.

    Raises:
        OSError: the disk is full; nothing is left of either.
    """
    paths = segment_paths(folder, segment)
    try:
        for path in paths:
            put(path, content)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def read_segment(folder: Path, segment: Mapping[str, Any]) -> Arrays:
    """The arrays of a segment, if its bytes are those that were written.

    Raises:
        TPatchError: it is missing or altered.
    """
    path, _ = segment_paths(folder, segment)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TPatchError(f"{path} cannot be read ({error.strerror}); {mend(folder)}") from None
    if digest(content) != segment["sha256"]:
        raise TPatchError(f"{path} is damaged: its bytes are not those that were written; {mend(folder)}")
    return load(content)
