"""Read some columns of a Parquet file's row groups, in a few range reads each.

PyArrow can fetch by itself, from a Python file in threads of its own. Such a thread may still hold a piece of the file
when the read is done, and if the program ends at that moment, the process aborts (apache/arrow issue 34314). So the
bytes are fetched here, as with everything else on the store, and PyArrow gets what it then reads in this thread.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

GAP = 2**16  # bytes between two columns that are read through
AHEAD = 4  # row groups that are fetched at a time

Span = tuple[int, int]  # first byte, and the one behind the last
ReadRange = Callable[[int, int], bytes]  # of an offset and a size


class _Pieces(io.RawIOBase):
    """Some pieces of a file, as a file that can be read there and nowhere else.

    Args:
        pieces: The first byte and the data of each.
        size: Bytes of the whole file.
    """

    def __init__(self, pieces: Sequence[tuple[int, bytes]], size: int) -> None:
        self._pieces, self._size, self._at = pieces, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        for first, data in self._pieces:
            if first <= self._at < first + len(data):
                found = data[self._at - first : self._at - first + size]
                self._at += len(found)
                return found
        return b""  # which PyArrow says is too short


def spans_of(metadata: pq.FileMetaData, group: int, columns: Iterable[str]) -> list[Span]:
    """Return the bytes of some columns of a row group; those that lie close together are one span.

    Args:
        metadata: The file's metadata.
        group: Number of the row group.
        columns: Names of the columns; of a nested one, its own or that of one of its fields.
    """
    names, row_group = tuple(columns), metadata.row_group(group)
    chunks: list[Span] = []
    for number in range(metadata.num_columns):
        chunk = row_group.column(number)
        if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in names):
            pages = [chunk.data_page_offset, chunk.dictionary_page_offset]
            first = min(page for page in pages if page is not None)
            chunks.append((first, first + chunk.total_compressed_size))
    spans: list[Span] = []
    for first, stop in sorted(chunks):
        if spans and first - spans[-1][1] <= GAP:
            spans[-1] = spans[-1][0], max(stop, spans[-1][1])
        else:
            spans.append((first, stop))
    return spans


def read_groups(
    read: ReadRange, metadata: pq.FileMetaData, groups: range, columns: Sequence[str], few_texts: Sequence[str] = ()
) -> Iterator[pa.Table]:
    """Read some columns of row groups, and yield each group's table.

    Memory holds the bytes of four row groups beside the table, because as many are fetched at a time.

    Args:
        read: Reads a range of the file.
        metadata: The file's metadata.
        groups: Numbers of the row groups.
        columns: Names of the columns; a field of a nested one as "views.list.element.split".
        few_texts: Columns with few different texts, which are read as numbers and a list of the texts.

    Raises:
        pyarrow.ArrowException, OSError: What was read is damaged.
    """
    spans = {group: spans_of(metadata, group, columns) for group in groups}
    size = max((stop for of_group in spans.values() for _, stop in of_group), default=0)

    def fetch(group: int) -> list[tuple[int, bytes]]:
        return [(first, read(first, stop - first)) for first, stop in spans[group]]

    coming: deque[tuple[int, Future[list[tuple[int, bytes]]]]] = deque()
    with ThreadPoolExecutor(AHEAD) as threads:
        try:
            for asked in range(len(groups) + AHEAD):
                if asked < len(groups):
                    coming.append((groups[asked], threads.submit(fetch, groups[asked])))
                if asked >= AHEAD - 1 and coming:
                    group, fetched = coming.popleft()
                    file = pq.ParquetFile(
                        _Pieces(fetched.result(), size),
                        metadata=metadata,
                        read_dictionary=list(few_texts),
                        pre_buffer=False,
                        page_checksum_verification=True,
                    )
                    yield file.read_row_group(group, columns=list(columns), use_threads=False)
        finally:
            for _, fetched in coming:
                fetched.cancel()
