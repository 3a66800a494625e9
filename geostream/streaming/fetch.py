"""The fetcher: carries out a schedule, one whole shard a request, and hands over the members of batch after batch.

Decides that a shard is read once, whole, a few shards before it is needed, by a small pool of threads (the store's
reads hold no GIL), and that its bytes stay until the schedule says that no later step needs them. What that costs in
memory is the schedule's ``peak_bytes``, known before the first read; ``stats`` says what it came to. Every member's
checksum is compared with the index before it is handed over: what a store or a network damaged is never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import TracebackType

import google_crc32c
import numpy as np
import pyarrow as pa

from geostream.errors import NotFound, StoreError
from geostream.layout import Int32, Int64, Layout
from geostream.store import Store
from geostream.streaming.schedule import schedule

AHEAD = 2  # shards requested before the one that is needed now
THREADS = 4  # requests in flight


@dataclass(frozen=True)
class MemberTable:
    """What a reader needs of a layout's index, as arrays; cheap to send to a loader worker.

    Rows are those of ``members.parquet``.
    """

    store: Store  # the layout's folder
    shard_names: list[str]
    shard_sizes: Int64  # (S,)
    shard: Int32
    offset: Int64
    size: Int64
    crc32c: Int64
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
            columns["shard"].to_numpy(),
            columns["offset"].to_numpy(),
            columns["size"].to_numpy(),
            columns["crc32c"].to_numpy().astype(np.int64),
            columns["member"],
            columns["place"].to_numpy(),
            layout.keys,
        )

    def shard_url(self, shard: int) -> str:
        return f"{self.store.url}/{self.shard_names[shard]}"

    def describe(self, row: int) -> str:
        """A member in words, for an error."""
        return f"{self.member[row]} of place {self.keys[self.place[row]]} in {self.shard_url(int(self.shard[row]))}"


@dataclass
class StreamStats:
    """What reading cost so far. ``bytes_used`` counts a member once, however often it was used."""

    bytes_fetched: int = 0
    bytes_used: int = 0
    requests: int = 0
    peak_resident_bytes: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Fetcher:
    """Context manager; iterate over it once for the members of each step: {row in members: bytes}.

    Leaving the context ends all threads and frees all shards, however far the iteration came.

    Raises StoreError naming the shard where it is missing or not as long as the index says, and naming the member where
    its bytes are not those that were sharded.
    """

    def __init__(self, members: MemberTable, needed: Sequence[Int64]) -> None:
        """``needed``: rows of the members that each step needs."""
        self.members, self.needed = members, needed
        self.stats = StreamStats()
        self.schedule = schedule(needed, members.shard, members.shard_sizes, members.size, ahead=AHEAD)
        self._used = np.zeros(len(members.shard), dtype=bool)
        self._requested: dict[int, Future[bytes]] = {}
        self._resident: dict[int, bytes] = {}
        self._pool = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="geostream-fetch")

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._requested.clear()
        self._resident.clear()

    def __iter__(self) -> Iterator[dict[int, bytes]]:
        plan = self.schedule
        come, arrive, leave = (_by_step(plan.shard, when) for when in (plan.come, plan.first, plan.last))
        for step, rows in enumerate(self.needed):
            for shard in come.get(step, ()):
                self._requested[shard] = self._pool.submit(self.members.store.read, self.members.shard_names[shard])
            self._watch_memory()
            for shard in arrive.get(step, ()):
                self._arrived(shard)
            yield {row: self._member(row) for row in rows.tolist()}
            for shard in leave.get(step, ()):
                del self._resident[shard]

    def _arrived(self, shard: int) -> None:
        """Wait for a shard that was requested, and keep it."""
        url, expected = self.members.shard_url(shard), int(self.members.shard_sizes[shard])
        try:
            data = self._requested.pop(shard).result()
        except NotFound as error:
            raise StoreError(f"{url}: the layout names this shard, but it is gone; shard the dataset again") from error
        if len(data) != expected:
            raise StoreError(
                f"{url}: {len(data)} bytes where the index says {expected}; "
                "it was cut off or replaced after the commit; shard the dataset again"
            )
        self._resident[shard] = data
        self.stats.requests += 1
        self.stats.bytes_fetched += len(data)

    def _member(self, row: int) -> bytes:
        """One member's bytes out of its resident shard, checked."""
        members = self.members
        offset, size = int(members.offset[row]), int(members.size[row])
        data = self._resident[int(members.shard[row])][offset : offset + size]
        if google_crc32c.value(data) != members.crc32c[row]:
            raise StoreError(
                f"{members.describe(row)}: checksum differs from the index; the shard is damaged: "
                "restore it, or shard the dataset again"
            )
        if not self._used[row]:
            self._used[row] = True
            self.stats.bytes_used += size
        return data

    def _watch_memory(self) -> None:
        """Count what is held now: resident shards, and those on their way at their full size."""
        held = [*self._resident, *self._requested]
        self.stats.peak_resident_bytes = max(self.stats.peak_resident_bytes, int(self.members.shard_sizes[held].sum()))


def _by_step(shards: Int64, when: Int64) -> dict[int, list[int]]:
    """The shards of each step at which something happens, in order of need."""
    found: dict[int, list[int]] = {}
    for shard, step in zip(shards.tolist(), when.tolist(), strict=True):
        found.setdefault(step, []).append(shard)
    return found
