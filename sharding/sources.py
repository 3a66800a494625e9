"""Note what each stored image was made from, so that an append sees what has changed without reading every raw file.

On a local disk a file is the same where size and time of change are; on a server where its ETag is, or size and time
where it gives none. The table ``sources.parquet`` lies beside a layout's index and is named by its hash in
``layout.json``. It is no part of the layout's id, because times of change differ between machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from geostream.layout import Layout
from geostream.layout.files import read_sources
from geostream.store import table_bytes, table_of


class Stamp(NamedTuple):
    """Tell one version of a raw file from another without reading it.

    Attributes:
        bytes: its size.
        mtime_ns: time of its last change, in nanoseconds; 0: a server does not say.
        etag: a server's name for its content; "": it gives none.
    """

    bytes: int
    mtime_ns: int
    etag: str = ""

    def is_same(self, other: Stamp) -> bool:
        """Return whether two stamps are certainly of the same content."""
        if self.bytes != other.bytes:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return self.mtime_ns == other.mtime_ns != 0


class Source(NamedTuple):
    """Describe a raw file as it was read.

    Attributes:
        path: below the raw folder, or a URL.
        bytes: its size.
        mtime_ns: time of its last change, in nanoseconds.
        crc32c: checksum of its bytes.
        broken: why it could not be stored; "": it was.
        etag: a server's name for its content; "" in a local folder.
    """

    path: str
    bytes: int
    mtime_ns: int
    crc32c: int
    broken: str = ""
    etag: str = ""

    @property
    def stamp(self) -> Stamp:
        """What tells this version of the file from another."""
        return Stamp(self.bytes, self.mtime_ns, self.etag)

    def stamped(self, stamp: Stamp) -> Source:
        """Return the same with another stamp, of a file that was found to have the same bytes."""
        return self._replace(**stamp._asdict())


SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("crc32c", pa.uint32()),
        ("broken", pa.string()),
        ("etag", pa.string()),  # not in layouts from before raw files could lie on a server
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
    table = table_of(data)
    columns = [table[name].to_pylist() for name in SCHEMA.names if name in table.column_names]
    return {source.path: source for source in map(Source, *columns)}
