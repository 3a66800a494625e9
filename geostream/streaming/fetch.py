"""Carry out a schedule of reads, and hand over the members of one batch after the other.

The schedule says everything: when each read may start, which batch must wait for it, and when each member is dropped.
It also gives the most bytes that are held at once, ``peak_bytes``, before the first read. ``stats`` has the measured
value.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType

import numpy as np

from geostream.arrays import Int32, Integers, distinct
from geostream.layout.members import MemberTable
from geostream.planning.schedule import schedule
from geostream.streaming.options import ReadOptions
from geostream.streaming.stats import StreamStats
from geostream.streaming.transport import Arrived, Transport

POLL_INTERVAL = 0.2  # seconds between two looks whether to go on waiting


class Fetcher:
    """Context manager that yields, for each batch, its members as {row in the member table: bytes}.

    Iterate over it once. A member that stays bad is missing; :attr:`bad` says why. The bytes of a batch are freed when
    the next one is asked for, if the caller has dropped them by then. Leaving the context ends all requests and frees
    all bytes, however far the iteration came.

    Args:
        members: Where the members lie.
        needed: For each batch, rows of the members that it needs.
        options: What reading may cost.
        lanes: Number of lanes whose batches come in turn.
        stop: When another thread sets it, waiting for bytes ends with CancelledError.

    Raises:
        BadInput: A batch does not fit into the budget.
        StoreError: While iterating: a shard is gone, was replaced, or could not be read for minutes.
        Stalled: While iterating: the thread that reads has ended or is stuck.
    """

    def __init__(
        self,
        members: MemberTable,
        needed: Sequence[Integers],
        options: ReadOptions | None = None,
        lanes: int = 1,
        stop: threading.Event | None = None,
    ) -> None:
        options = options or ReadOptions()
        self.needed = needed
        self.stats = StreamStats(budget_bytes=options.budget_bytes)
        self.bad: dict[int, str] = {}
        self.schedule = schedule(
            needed,
            members.extents,
            members.shard_sizes,
            look_ahead=options.look_ahead,
            prefetch=options.prefetch,
            budget_bytes=options.budget_bytes,
            gap_bytes=options.gap_bytes,
            lanes=lanes,
        )
        self._members, self._stop = members, stop
        self._transport = Transport(members, self.stats)
        self._used = np.zeros(len(members.crc32c), dtype=bool)
        self._asked: dict[int, Future[Arrived]] = {}
        self._views: dict[int, bytes] = {}
        self._leaving: dict[int, list[int]] = {}  # of what is held, by the last step that uses it

    def __enter__(self) -> Fetcher:
        self._transport.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.__exit__(kind, error, trace)
        self._asked.clear()
        self._views.clear()
        self._leaving.clear()
        self.stats.resident_bytes = 0

    def __iter__(self) -> Iterator[dict[int, bytes]]:
        plan = self.schedule
        coming = np.argsort(plan.come, kind="stable")
        asked = arrived = 0
        for step, rows in enumerate(self.needed):
            for row in self._leaving.pop(step - 1, ()):
                self._let_go(row)
            # Reads for later batches wait until the first batch is there: they would share its bandwidth.
            while asked < plan.requests and plan.come[now := int(coming[asked])] <= step:
                if not step and plan.first[now]:
                    break
                self._ask(now)
                asked += 1
            while arrived < plan.requests and plan.first[arrived] <= step:
                self._await(arrived)
                arrived += 1
            self._count_used(rows)
            yield {row: self._views[row] for row in rows.tolist() if row in self._views}

    def _ask(self, read: int) -> None:
        plan, stats = self.schedule, self.stats
        rows, size = self._rows(read), int(plan.size[read])
        self._asked[read] = self._transport.read(int(plan.shard[read]), int(plan.offset[read]), size, rows)
        stats.resident_bytes += size
        stats.peak_resident_bytes = max(stats.peak_resident_bytes, stats.resident_bytes)

    def _await(self, read: int) -> None:
        started = time.perf_counter()
        arrived = self._result(self._transport, self._asked.pop(read))
        self.stats.fetch_wait_seconds += time.perf_counter() - started
        self._views |= arrived.members
        self.bad |= arrived.bad
        rows = self._rows(read)
        for row, last in zip(rows.tolist(), self.schedule.last[self._of(read)].tolist(), strict=True):
            self._leaving.setdefault(last, []).append(row)
        self.stats.resident_bytes -= int(self.schedule.size[read] - self._members.extents.size[rows].sum())

    def _result(self, transport: Transport, asked: Future[Arrived]) -> Arrived:
        while True:
            try:
                return asked.result(timeout=POLL_INTERVAL)
            except TimeoutError:
                if asked.done():  # just now, or it failed with a TimeoutError itself
                    return asked.result()
                if self._stop is not None and self._stop.is_set():
                    raise CancelledError from None
                transport.check(POLL_INTERVAL)

    def _let_go(self, row: int) -> None:
        self._views.pop(row, None)  # a bad member is not there
        self.stats.resident_bytes -= int(self._members.extents.size[row])

    def _rows(self, read: int) -> Int32:
        return self.schedule.row[self._of(read)]

    def _of(self, read: int) -> slice:
        return slice(*self.schedule.bring[read].tolist())

    def _count_used(self, rows: Integers) -> None:
        new = distinct(rows[~self._used[rows]])
        self._used[new] = True
        self.stats.bytes_used += int(self._members.extents.size[new].sum())

    def fetch(self, members: MemberTable, rows: Integers) -> Arrived:
        """Read some images of one place at once, outside the schedule.

        Args:
            members: The table of the images; it may be of shards that are not scheduled.
            rows: Rows of the images in it.

        Raises:
            StoreError: The shard cannot be read.
        """
        rows = distinct(rows)
        shard, offset, size = members.extents.of(rows)
        whole = int(offset[-1] + size[-1] - offset[0])
        with Transport(members, self.stats) as transport:
            arrived = self._result(transport, transport.read(int(shard[0]), int(offset[0]), whole, rows))
        self.stats.bytes_used += int(size.sum())
        return arrived
