"""The fetcher: carries out a schedule, and hands over the members of batch after batch.

Decides nothing that the schedule has not decided: it asks for reads when they may come, waits for those that a batch
needs, and lets go of those that none needs any more. What that holds at most is the schedule's ``peak_bytes``, known
before the first read; ``stats`` says what it came to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType

import numpy as np

from geostream.arrays import Int64
from geostream.layout.members import MemberTable
from geostream.planning.schedule import schedule
from geostream.streaming.options import ReadOptions
from geostream.streaming.stats import StreamStats
from geostream.streaming.transport import Arrived, Transport

POLL_INTERVAL = 0.2  # seconds between two looks whether to go on waiting


class Fetcher:
    """Context manager; iterate over it once for the members of each batch: {row in members: bytes}.

    A member that stays bad is missing there; :attr:`bad` says why. Leaving the context ends all requests and frees
    all bytes, however far the iteration came. Raises BadInput where a batch does not fit into the budget, StoreError
    where a shard is gone, was replaced, or cannot be had for minutes.
    """

    def __init__(
        self,
        members: MemberTable,
        needed: Sequence[Int64],
        options: ReadOptions | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """``needed``: rows of the members that each batch needs. ``stop``: set by another thread, it ends the waiting
        for bytes by CancelledError.

        Bytes are freed when the next batch is asked for, if whoever got the members has dropped them by then.
        """
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
        )
        self._members, self._stop = members, stop
        self._transport = Transport(members, self.stats)
        self._used = np.zeros(len(members.crc32c), dtype=bool)
        self._asked: dict[int, Future[Arrived]] = {}
        self._views: dict[int, bytes] = {}

    def __enter__(self) -> Fetcher:
        self._transport.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.__exit__(kind, error, trace)
        self._asked.clear()
        self._views.clear()
        self.stats.resident_bytes = 0

    def __iter__(self) -> Iterator[dict[int, bytes]]:
        plan = self.schedule
        leaving = np.argsort(plan.last, kind="stable")
        asked = arrived = left = 0  # reads come and arrive in their order, members leave in the order of ``leaving``
        for step, rows in enumerate(self.needed):
            while left < len(leaving) and plan.last[leaving[left]] < step:
                self._let_go(int(plan.row[leaving[left]]))
                left += 1
            # The first batch is not to share the line, and the processor, with what later ones need.
            while asked < plan.requests and plan.come[asked] <= step and (step or plan.first[asked] == 0):
                self._ask(asked)
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
        arrived = self._result(self._asked.pop(read))
        self.stats.fetch_wait_seconds += time.perf_counter() - started
        self._views |= arrived.members
        self.bad |= arrived.bad
        gaps = self.schedule.size[read] - self._members.extents.size[self._rows(read)].sum()
        self.stats.resident_bytes -= int(gaps)

    def _result(self, asked: Future[Arrived]) -> Arrived:
        while True:
            try:
                return asked.result(timeout=POLL_INTERVAL)
            except TimeoutError:
                if asked.done():  # just now, or it failed with a TimeoutError itself
                    return asked.result()
                if self._stop is not None and self._stop.is_set():
                    raise CancelledError from None
                self._transport.check(POLL_INTERVAL)

    def _let_go(self, row: int) -> None:
        self._views.pop(row, None)  # a bad member is not there
        self.stats.resident_bytes -= int(self._members.extents.size[row])

    def _rows(self, read: int) -> Int64:
        return self.schedule.row[self.schedule.bring[read] : self.schedule.bring[read + 1]]

    def _count_used(self, rows: Int64) -> None:
        new = np.unique(rows[~self._used[rows]])
        self._used[new] = True
        self.stats.bytes_used += int(self._members.extents.size[new].sum())

    def fetch(self, rows: Int64) -> dict[int, bytes]:
        """Some members of one place at once, beside the schedule; those that are bad are missing, see :attr:`bad`."""
        extents = self._members.extents
        rows = np.unique(rows)
        offset = int(extents.offset[rows[0]])
        size = int(extents.offset[rows[-1]] + extents.size[rows[-1]]) - offset
        arrived = self._result(self._transport.read(int(extents.shard[rows[0]]), offset, size, rows))
        self.bad |= arrived.bad
        self._count_used(rows)
        return arrived.members
