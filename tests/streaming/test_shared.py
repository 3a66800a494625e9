"""A plan that loader processes share: the same rows from the file as from memory, and nothing left of it."""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from geostream.errors import GeostreamError
from geostream.streaming import shared
from geostream.streaming.shared import SharedRows
from tests.streaming.plans import as_in_a_worker


@given(arrays.arrays(st.sampled_from([np.int32, np.int16]), st.sampled_from([(0, 3), (1, 1), (7, 2), (9,)])), st.data())
def test_rows_are_the_same_from_the_file(array: Any, data: st.DataObject) -> None:
    rows = range(
        data.draw(st.integers(0, len(array))), data.draw(st.integers(0, len(array))), data.draw(st.integers(1, 4))
    )
    made = SharedRows(array)
    there = as_in_a_worker(made)
    further = as_in_a_worker(there)  # a worker that starts one
    for one in (made, there, further, pickle.loads(pickle.dumps(there))):  # noqa: S301  # our own
        assert len(one) == len(array) and one.shape == array.shape and one.dtype == array.dtype
        taken = one.take(rows)
        assert taken.dtype == array.dtype and np.array_equal(taken, array[rows.start : rows.stop : rows.step])
        for row in rows:
            assert np.array_equal(one[row], array[row])


def test_it_is_written_once_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "WRITTEN", 3)
    made = SharedRows(np.arange(20, dtype=np.int32).reshape(10, 2))
    one, other = as_in_a_worker(made), as_in_a_worker(made)
    assert one.take(range(10)).tolist() == other.take(range(10)).tolist() == made.take(range(10)).tolist()
    files = [os.fstat(one._file.fileno()) for one in (made, one, other) if one._file]
    assert len({file.st_ino for file in files}) == 1 and len(files) == 3


def test_a_worker_is_sent_no_rows_and_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = SharedRows(np.zeros((1000, 128), dtype=np.int32))
    there = as_in_a_worker(made)
    assert there._array is None
    assert not list(tmp_path.iterdir())
    file = made._file
    assert file is not None and os.fstat(file.fileno()).st_nlink == 0


def test_a_full_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shared, "TemporaryFile", full)
    with pytest.raises(GeostreamError, match="No space left.*TMPDIR"):
        as_in_a_worker(SharedRows(np.zeros(3, dtype=np.int32)))
