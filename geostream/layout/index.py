"""Read a layout's index: whole and checked where it is small, else only the columns and rows that are asked for.

Opening a layout reads ``layout.json`` alone. The tables are read at their first use. Up to ``WHOLE_ROWS`` rows both are
read and checked as a whole: their hashes, and the invariants of :mod:`geostream.layout.schema`. That takes about 0.3 s
and 100 MB for a million members. A larger index was checked so at its commit, and ``geostream verify`` checks it again.
Of it, columns and row groups are read as they are asked for, with Parquet's checksums of each page, and never more than
the bytes of four row groups are held beside what is returned (:mod:`geostream.layout.row_groups`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geostream.arrays import Int64
from geostream.errors import NotFound, StoreError
from geostream.layout.files import ADVICE, read_tables
from geostream.layout.row_groups import read_groups
from geostream.layout.schema import TABLES
from geostream.store import Store
from geostream.store.errors import explained

WHOLE_ROWS = 2_000_000  # of both tables together, up to which they are read as a whole
#: Columns with few different texts, which are read as numbers and a list of the texts.
FEW_TEXTS = {"places.parquet": ["area"], "members.parquet": ["member"]}


class Index:
    """The index of a committed layout. It can be sent to another process, without what was read.

    Args:
        folder: The layout's folder.
        info: Its checked ``layout.json``.
        tables: The tables of places and members where they are at hand.
    """

    def __init__(self, folder: Store, info: dict[str, Any], tables: tuple[pa.Table, pa.Table] | None = None) -> None:
        self.folder, self.info = folder, info
        if tables is not None:
            self.tables = tables
        self._metadata: dict[str, pq.FileMetaData] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "info": self.info, "_metadata": {}}

    @cached_property
    def tables(self) -> tuple[pa.Table, pa.Table]:
        """The tables of places and of members, read and checked as a whole.

        Raises:
            StoreError: A table is missing, changed or damaged.
        """
        return read_tables(self.folder, self.info)

    @property
    def is_whole(self) -> bool:
        """Whether the tables are read as a whole."""
        return "tables" in self.__dict__ or int(self.first_member[-1]) + int(self.info["places"]) <= WHOLE_ROWS

    @cached_property
    def first_member(self) -> Int64:
        """(S + 1,) row in ``members.parquet`` of each shard's first member, and the number of rows."""
        return np.concatenate([[0], np.cumsum([shard["members"] for shard in self.info["shards"]])]).astype(np.int64)

    def read(self, file: str, columns: Sequence[str], start: int = 0, stop: int | None = None) -> pa.Table:
        """Read some columns, of all rows or of some.

        Args:
            file: "places.parquet" or "members.parquet".
            columns: Names of the columns; a field of the views as "views.list.element.split".
            start: The first row.
            stop: The row behind the last; None reads to the end.

        Raises:
            StoreError: The table is missing, changed or damaged.
        """
        return pa.concat_tables(self.parts(file, columns, start, stop), promote_options="default")

    def parts(self, file: str, columns: Sequence[str], start: int = 0, stop: int | None = None) -> Iterator[pa.Table]:
        """Read some columns, and yield them a row group at a time; arguments and errors are those of :meth:`read`."""
        if self.is_whole:
            table = self.tables[list(TABLES).index(file)].select(list(dict.fromkeys(c.split(".")[0] for c in columns)))
            yield table.slice(start, None if stop is None else stop - start)
            return
        with self._explained(file):
            metadata = self._metadata_of(file)
            ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
            stop = int(ends[-1]) if stop is None else stop
            first = int(np.searchsorted(ends, start, side="right"))
            groups = range(first, int(np.searchsorted(ends, stop, side="left")) + 1)
            read = partial(self.folder.read_range, file)
            for group, table in zip(groups, read_groups(read, metadata, groups, columns, FEW_TEXTS[file]), strict=True):
                begin = int(ends[group]) - len(table)
                yield table.slice(max(start - begin, 0), min(stop, int(ends[group])) - max(start, begin))

    def _metadata_of(self, file: str) -> pq.FileMetaData:
        """Return a table's metadata, which are read once."""
        if file not in self._metadata:
            filesystem, root = self.folder.filesystem()
            with filesystem.open(f"{root}/{file}", "rb", cache_type="none") as source:
                self._metadata[file] = pq.ParquetFile(source, pre_buffer=False).metadata
        return self._metadata[file]

    @contextmanager
    def _explained(self, file: str) -> Iterator[None]:
        """Turn the errors of a table that is gone or damaged into one that says so."""
        with explained(f"{self.folder.url}/{file}"):
            try:
                yield
            except (pa.ArrowException, OSError, NotFound) as error:
                if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
                    raise  # of the store; Arrow's own have no number
                what = f"gone or damaged since the commit ({' '.join(str(error).split())[:200]})"
                raise StoreError(f"{self.folder.url}/{file}: {what}; {ADVICE}") from error
