"""Hold the part of a layout's index that loader workers need, as arrays that are cheap to send to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from geostream.arrays import Int32, Int64
from geostream.layout.layout import Layout
from geostream.store import Store


class Extents(NamedTuple):
    """The positions of a layout's M members; rows are those of ``members.parquet``, sorted by shard and offset.

    Attributes:
        shard: (M,) number of the shard.
        offset: (M,) bytes from its beginning to the data.
        size: (M,) bytes of the data.
    """

    shard: Int64
    offset: Int64
    size: Int64


@dataclass(frozen=True)
class MemberTable:
    """A layout's index as arrays; rows are those of ``members.parquet``.

    Attributes:
        store: The layout's folder.
        shard_names: Names of the S shards.
        shard_sizes: (S,) bytes of the shards.
        extents: Positions of the M members.
        crc32c: (M,) checksums of their data.
        member: (M,) their names without the place's key, such as "tile.jpg".
        place: (M,) ids of their places.
        keys: Keys of the N places.
    """

    store: Store
    shard_names: list[str]
    shard_sizes: Int64
    extents: Extents
    crc32c: Int64
    member: pa.ChunkedArray
    place: Int32
    keys: list[str]

    @classmethod
    def of(cls, layout: Layout) -> MemberTable:
        """Return the table of an opened layout."""
        columns = {name: layout.members[name] for name in layout.members.column_names}
        return cls(
            layout.store,
            layout.shard_names,
            layout.shard_sizes,
            Extents(*(columns[name].to_numpy().astype(np.int64) for name in Extents._fields)),
            columns["crc32c"].to_numpy().astype(np.int64),
            columns["member"],
            columns["place"].to_numpy(),
            layout.keys,
        )

    def shard_url(self, shard: int) -> str:
        """Return the URL of the shard with this number."""
        return f"{self.store.url}/{self.shard_names[shard]}"

    def key(self, row: int) -> str:
        """Return the key of the place that the member in this row belongs to."""
        return self.keys[int(self.place[row])]

    def describe(self, row: int) -> str:
        """Return a text for errors that names the member in this row, its place and its shard."""
        shard = self.shard_url(int(self.extents.shard[row]))
        return f"{self.member[row]} of place {self.key(row)} in {shard}"
