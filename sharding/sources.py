"""Note what each stored image was made from, so that an append sees what has changed without reading every raw file.

The table ``sources.parquet`` lies beside a layout's index and is named by its hash in ``layout.json``. It is no part of
the layout's id, because times of change differ between machines.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from geostream.layout import Layout
from geostream.layout.files import read_sources
from geostream.store import table_bytes


class Source(NamedTuple):
    """Describe a raw file as it was read.

    Attributes:
        path: below the raw folder.
        bytes: its size.
        mtime_ns: time of its last change, in nanoseconds.
        crc32c: checksum of its bytes.
        broken: why it could not be stored; "": it was.
    """

    path: str
    bytes: int
    mtime_ns: int
    crc32c: int
    broken: str = ""


SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("crc32c", pa.uint32()),
        ("broken", pa.string()),
    ]
)


def sources_file(sources: Iterable[Source]) -> bytes:
    """Return the content of ``sources.parquet``, by path; of two notes of one file the last one stays."""
    rows = sorted({source.path: source for source in sources}.values())
    return table_bytes(pa.Table.from_pylist([source._asdict() for source in rows], schema=SCHEMA))


def sources_of(layout: Layout) -> dict[str, Source] | None:
    """Return what is known of the raw files of a layout, by path; None where nothing is: an older layout."""
    data = read_sources(layout.store, layout.info)
    if data is None:
        return None
    columns = [column.to_pylist() for column in pq.ParquetFile(io.BytesIO(data)).read(SCHEMA.names).columns]
    return {source.path: source for source in map(Source, *columns)}
