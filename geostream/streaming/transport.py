"""The transport: ranged reads of shards, many in flight, each repeated until it is whole and its members are right.

Decides what counts as failure and how long to be patient. A read that fails for a reason that may pass (5xx, 429, a
reset, a short body, silence beyond its deadline, refused credentials that may just be being renewed) is repeated after
a pause that doubles, with jitter so that many readers don't return at once, until ``PATIENCE`` is over. An object that
is gone, or is not as long as the layout says, is no such reason. Every member's crc32c is compared with the index; one
that differs is read again on its own, ``BAD_READS`` times, and then reported as bad: what to do about it is not decided
here. One event loop in one thread serves all requests.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import google_crc32c

from geostream.errors import NotFound, Refused, StoreError, Unanswered
from geostream.layout import Int64
from geostream.streaming.reading import MemberTable
from geostream.streaming.stats import StreamStats

IN_FLIGHT = 16  # requests
PATIENCE = 120.0  # seconds that one read may go on failing
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds
REFUSALS = 4  # answers of "access refused" that are put down to credentials being renewed
BAD_READS = 3  # times that a member with a wrong checksum is read again
DEADLINE = 60.0  # seconds for a request, and for each so many bytes of it one more:
SLOWEST = 2**20


@dataclass(frozen=True)
class Arrived:
    """What one read brought: the members that are right, and why the others are not."""

    members: dict[int, bytes] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


class Transport:
    """Context manager; leaving it ends whatever is under way, and its thread.

    What a read's future raises: StoreError, with the shard's URL and what to do.
    """

    def __init__(self, members: MemberTable, stats: StreamStats) -> None:
        self.members, self.stats = members, stats
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._random = random.Random()
        self._thread = threading.Thread(target=self._loop.run_forever, name="geostream-fetch", daemon=True)

    def __enter__(self) -> Transport:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._submit(_cancel_all()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def read(self, shard: int, offset: int, size: int, rows: Int64) -> Future[Arrived]:
        """Ask for a range of a shard that holds the members ``rows``. Requests start in the order of the calls."""
        return self._submit(self._read(shard, offset, size, rows.tolist()))

    async def _read(self, shard: int, offset: int, size: int, rows: list[int]) -> Arrived:
        async with self._slots:
            right, wrong = self._take_apart(await self._whole(shard, offset, size), offset, rows)
            for attempt in range(BAD_READS):
                if not wrong:
                    break
                self.stats.retries["checksum"] += len(wrong)
                await asyncio.sleep(self._pause(attempt))
                extents = self.members.extents
                start = int(extents.offset[wrong[0]])
                end = int(extents.offset[wrong[-1]] + extents.size[wrong[-1]])
                mended, wrong = self._take_apart(await self._whole(shard, start, end - start), start, wrong)
                right |= mended
        return Arrived(right, dict.fromkeys(wrong, "its checksum differs from the index"))

    def _take_apart(self, data: memoryview, offset: int, rows: list[int]) -> tuple[dict[int, bytes], list[int]]:
        """The members in ``data``, which begins at ``offset``: those that are right, and rows of those that are not.

        They are copies, so that each can go when it has been used; the copy is made for the checksum anyway.
        """
        right: dict[int, bytes] = {}
        wrong = []
        for row in rows:
            start = int(self.members.extents.offset[row]) - offset
            member = bytes(data[start : start + int(self.members.extents.size[row])])
            if google_crc32c.value(member) == self.members.crc32c[row]:
                right[row] = member
            else:
                wrong.append(row)
        return right, wrong

    async def _whole(self, shard: int, offset: int, size: int) -> memoryview:
        """All bytes of a range, however often that must be tried."""
        began, attempt, refused = time.monotonic(), 0, 0
        while True:
            try:
                return await self._once(shard, offset, size)
            except Refused as error:
                refused += 1
                if refused > REFUSALS:
                    raise
                self.members.store.renew()
                failure, reason = str(error), "refused"
            except Unanswered as error:
                failure, reason = str(error), error.reason
            self.stats.retries[reason] += 1
            pause = self._pause(attempt)
            if time.monotonic() + pause - began > PATIENCE:
                raise StoreError(f"{failure}; given up after {PATIENCE:.0f} s and {attempt + 1} tries")
            await asyncio.sleep(pause)
            attempt += 1

    async def _once(self, shard: int, offset: int, size: int) -> memoryview:
        """All bytes of a range. Raises Refused and Unanswered, which may pass, and StoreError for what will not."""
        store, name, url = self.members.store, self.members.shard_names[shard], self.members.shard_url(shard)
        deadline = DEADLINE + size / SLOWEST
        self.stats.requests += 1
        try:
            async with asyncio.timeout(deadline):
                data, of = await store.read_range_once(name, offset, size)
        except NotFound as error:
            raise StoreError(f"{url}: the layout names this shard, but it is gone; shard the dataset again") from error
        except TimeoutError as error:
            raise Unanswered(f"{url}: no whole answer within {deadline:.0f} s", "stalled") from error
        except (Refused, Unanswered):
            raise
        except StoreError:  # perhaps a range that the object does not have
            self._check_size(shard, (await store.read_range_once(name, 0, 0))[1])
            raise
        self.stats.bytes_fetched += len(data)
        self._check_size(shard, of)
        if len(data) != size:
            raise Unanswered(f"{url}: {len(data)} bytes came of {size}", "short")
        return data

    def _check_size(self, shard: int, size: int) -> None:
        expected = int(self.members.shard_sizes[shard])
        if size != expected:
            raise StoreError(
                f"{self.members.shard_url(shard)}: {size} bytes where the index says {expected}; "
                "it was cut off or replaced after the commit; shard the dataset again"
            )

    def _pause(self, attempt: int) -> float:
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**attempt)
        return self._random.uniform(longest / 2, longest)


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
