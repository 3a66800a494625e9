"""Row groups are read in few ranges, say the same as PyArrow, and no thread but ours reads."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geostream.layout import row_groups
from geostream.layout.row_groups import read_groups, spans_of

COLUMNS = ["number", "text", "noise", "views.list.element.split", "views.list.element.north"]


def file_of(rows: int, group: int) -> bytes:
    """A file with plain, nested and incompressible columns."""
    rng = np.random.default_rng(0)
    views = [[{"split": "train", "north": float(i)}] * (i % 3) for i in range(rows)]
    table = pa.table(
        {
            "number": np.arange(rows),
            "text": [f"{i % 5}" for i in range(rows)],
            "noise": pa.array(list(rng.bytes(40 * rows)[i : i + 40] for i in range(0, 40 * rows, 40))),
            "views": views,
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group, write_page_checksum=True)
    return buffer.getvalue()


class Watched:
    """Reads ranges of a file, and notes them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.ranges = data, list[tuple[int, int]]()

    def __call__(self, offset: int, size: int) -> bytes:
        self.ranges.append((offset, size))
        return self.data[offset : offset + size]


@given(st.sets(st.sampled_from(COLUMNS), min_size=1), st.integers(0, 4), st.integers(0, 5), st.sampled_from([0, 2**16]))
def test_any_columns_of_any_row_groups(columns: set[str], first: int, count: int, gap: int) -> None:
    data = file_of(50, 10)
    metadata, read = pq.read_metadata(io.BytesIO(data)), Watched(data)
    groups = range(first, min(first + count, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_groups, "GAP", gap)
        found = list(read_groups(read, metadata, groups, sorted(columns)))
        assert len(read.ranges) == sum(len(spans_of(metadata, group, columns)) for group in groups)
    whole = pq.ParquetFile(io.BytesIO(data))
    assert found == [whole.read_row_group(group, columns=sorted(columns)) for group in groups]


def test_columns_side_by_side_are_one_read_and_far_ones_are_not() -> None:
    metadata = pq.read_metadata(io.BytesIO(file_of(4_000, 2_000)))
    assert len(spans_of(metadata, 0, ["number", "text"])) == 1
    assert len(spans_of(metadata, 1, ["number", "views"])) == 2  # 80 kB of noise lie between


def test_only_the_calling_thread_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of PyArrow's that holds a Python object when the program ends aborts it."""
    readers: set[int] = set()
    whole = row_groups._Pieces.read

    def watched(self: Any, size: int = -1) -> bytes:
        readers.add(threading.get_ident())
        return whole(self, size)

    monkeypatch.setattr(row_groups._Pieces, "read", watched)
    data = file_of(5000, 500)
    assert len(list(read_groups(Watched(data), pq.read_metadata(io.BytesIO(data)), range(10), COLUMNS))) == 10
    assert readers == {threading.get_ident()}


def test_a_piece_that_is_cut_off_is_an_error() -> None:
    data = file_of(500, 100)
    metadata = pq.read_metadata(io.BytesIO(data))
    with pytest.raises((pa.ArrowException, OSError)):
        list(read_groups(lambda offset, size: data[offset : offset + size // 2], metadata, range(5), COLUMNS))


def test_few_row_groups_are_fetched_ahead() -> None:
    data = file_of(500, 10)
    read = Watched(data)
    tables = read_groups(read, pq.read_metadata(io.BytesIO(data)), range(50), ["number"])
    next(tables)
    tables.close()  # type: ignore[attr-defined]  # a generator
    assert len(read.ranges) <= row_groups.AHEAD
