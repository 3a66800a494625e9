"""Where a layout's members lie, as arrays: all that a reader needs of the index, cheap to send to another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from geostream.arrays import Int32, Int64
from geostream.layout.layout import Layout
from geostream.store import Store


class Extents(NamedTuple):
    """Where the members of a layout lie; rows are those of ``members.parquet``, sorted by shard and offset."""

    shard: Int64  # (M,)
    offset: Int64  # (M,)
    size: Int64  # (M,)


@dataclass(frozen=True)
class MemberTable:
    """A layout's index as arrays; cheap to send to a loader worker. Rows are those of ``members.parquet``."""

    store: Store  # the layout's folder
    shard_names: list[str]
    shard_sizes: Int64  # (S,)
    extents: Extents
    crc32c: Int64  # (M,)
    member: pa.ChunkedArray
    place: Int32
    keys: list[str]  # of the places

    @classmethod
    def of(cls, layout: Layout) -> MemberTable:
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
        return f"{self.store.url}/{self.shard_names[shard]}"

    def key(self, row: int) -> str:
        """Of the member's place."""
        return self.keys[int(self.place[row])]

    def describe(self, row: int) -> str:
        """A member in words, for an error."""
        shard = self.shard_url(int(self.extents.shard[row]))
        return f"{self.member[row]} of place {self.key(row)} in {shard}"
