"""Rows in a file behave like those of an array."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpatch_jax.core import sizes
from tpatch_jax.storage.rows_on_disk import RowsOnDisk, chosen_rows


@given(st.data(), st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_rows_are_those_of_an_array(data, dtype):
    total = data.draw(st.integers(0, 12))
    ours, array = RowsOnDisk(total, 3, dtype), np.zeros((total, 3), dtype)
    numbers = st.lists(st.integers(0, max(0, total - 1)), max_size=8 if total else 0).map(lambda n: np.asarray(n, int))
    for _ in range(3):
        rows = data.draw(numbers.filter(lambda n: len(set(n.tolist())) == len(n)))
        values = np.random.default_rng(len(rows)).normal(size=(len(rows), 3)).astype(dtype)
        ours[rows], array[rows] = values, values
    rows = data.draw(numbers)
    for asked in (rows, rows[: len(rows) // 2 * 2].reshape(-1, 2), slice(None), slice(2, 7)):
        np.testing.assert_array_equal(ours[asked], array[asked])
    assert (ours.shape, ours.ndim, len(ours), ours.dtype) == (array.shape, 2, total, array.dtype)


def test_what_is_read_is_a_copy():
    rows = RowsOnDisk(2, 2, np.float32)
    rows[0:1][:] = 1
    assert not rows[:].any()


def test_rows_outside_are_refused():
    rows = RowsOnDisk(2, 2, np.float32)
    with pytest.raises(IndexError):
        rows[np.array([2])]
    with pytest.raises(IndexError):
        rows[np.array([2])] = np.ones((1, 2), np.float32)


def test_chosen_rows_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(sizes, "PART", 2)
    array, rows = np.arange(14, dtype=np.float32).reshape(7, 2), np.array([6, 0, 3, 3, 1])
    ours = RowsOnDisk(7, 2, np.float32)
    ours[0:7] = array
    kept = chosen_rows(ours, rows)
    assert isinstance(kept, RowsOnDisk)
    np.testing.assert_array_equal(kept[:], array[rows])
    np.testing.assert_array_equal(chosen_rows(array, rows), array[rows])
