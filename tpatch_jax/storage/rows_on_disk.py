"""Rows of an array in a temporary file, for what is looked at only now and then."""

import tempfile
import weakref
from typing import Any

import numpy as np

from tpatch_jax.core.sizes import pieces

__all__ = ["RowsOnDisk", "chosen_rows"]


class RowsOnDisk:
    """An array ``[rows, d]`` of which only the rows that are asked for are ever in memory.

    Rows are read and written like those of a NumPy array, by slices and by arrays of row numbers; what is read is a
    copy. The file has no name and is removed with the object.

    Args:
        rows: how many.
        width: ``d``.
        dtype: of the entries.

    Example:
        >>> rows = RowsOnDisk(3, 2, np.float32)
        >>> rows[np.array([2, 0])] = np.array([[1, 2], [3, 4]], np.float32)
        >>> rows[0:3].tolist()
        [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    """

    ndim: int = 2

    def __init__(self, rows: int, width: int, dtype: Any) -> None:
        self.shape: tuple[int, int] = (rows, width)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._row_bytes = width * self.dtype.itemsize
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._file.truncate(rows * self._row_bytes)

    def __len__(self) -> int:
        """How many rows."""
        return self.shape[0]

    def _numbers(self, rows: Any) -> np.ndarray:
        return np.arange(self.shape[0])[rows]

    def __setitem__(self, rows: Any, values: np.ndarray) -> None:
        """Write rows."""
        numbers = self._numbers(rows)
        values = np.ascontiguousarray(np.broadcast_to(values, (*numbers.shape, self.shape[1])), self.dtype)
        flat = numbers.reshape(-1)
        for first, last in _runs(flat):
            self._file.seek(int(flat[first]) * self._row_bytes)
            self._file.write(values.reshape(-1, self.shape[1])[first:last].tobytes())

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Read rows."""
        numbers = self._numbers(rows)
        flat, values = numbers.reshape(-1), np.empty((numbers.size, self.shape[1]), self.dtype)
        for first, last in _runs(flat):
            self._file.seek(int(flat[first]) * self._row_bytes)
            read = self._file.read((last - first) * self._row_bytes)
            values[first:last] = np.frombuffer(read, self.dtype).reshape(last - first, -1)
        return values.reshape(*numbers.shape, self.shape[1])


def chosen_rows(array: np.ndarray | RowsOnDisk, rows: np.ndarray) -> np.ndarray | RowsOnDisk:
    """Some rows of an array, on disk where it is.

    Args:
        array: ``[rows, …]``.
        rows: which, by number.

    Returns:
        ``[chosen, …]``, a copy.

    Example:
        >>> chosen_rows(np.eye(3), np.array([2])).tolist()
        [[0.0, 0.0, 1.0]]
    """
    if not isinstance(array, RowsOnDisk):
        return array[rows]
    chosen = RowsOnDisk(len(rows), array.shape[1], array.dtype)
    for piece in pieces(len(rows)):
        chosen[piece] = array[rows[piece]]
    return chosen


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Where one number follows the other: each run's first place and the place behind its last."""
    if not numbers.size:
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return list(zip([0, *breaks.tolist()], [*breaks.tolist(), numbers.size], strict=True))
