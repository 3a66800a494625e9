"""What a reader has to know: of the layout, where its members lie; of the user, what reading may cost.

Decides the defaults. 128 batches of look-ahead merge whole shards out of a plan that walks them; eight batches of
prefetch hide the time a shard takes to come; 1 MiB is what a request costs a fast store in bytes not read meanwhile;
one pair in a hundred may be replaced before the epoch is given up. Batches are counted in each lane.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from geostream.layout import Int32, Int64, Layout
from geostream.store import Store
from geostream.streaming.schedule import Extents


@dataclass(frozen=True)
class ReadOptions:
    """What one reader may spend."""

    look_ahead: int = 128  # batches whose needs are merged into one read
    prefetch: int = 8  # batches that a read may start before its need
    budget_bytes: int = 2 * 2**30  # most bytes of shards held at once
    gap_bytes: int = 2**20  # unneeded bytes that are read through rather than skipped by another request
    replaced_limit: float = 0.01  # share of the epoch's pairs that may be replaced; one pair always may

    def share(self, lanes: int, workers: int) -> ReadOptions:
        """Of one of ``workers`` processes, for a reader that serves ``lanes`` in turn."""
        return replace(
            self,
            look_ahead=self.look_ahead * lanes,
            prefetch=self.prefetch * lanes,
            budget_bytes=self.budget_bytes // workers,
        )


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
