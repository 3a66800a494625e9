"""Read ranges of shards, many at once, and repeat each read until its members are complete and correct.

Some failures are temporary: 5xx and 429 answers, reset connections, short bodies, silence, and refused credentials that
may be about to be renewed. After one of these, a read continues where it broke off. The pauses between tries double,
with jitter so that many readers do not return at once. After ``RETRY_DEADLINE`` seconds without a new member the read
fails. It fails at once if the shard is gone, or is not as long as the layout says.

Every member's crc32c is compared with the index. A member that differs is read again ``CHECKSUM_RETRIES`` times and
then reported as bad; the pipeline replaces its pair. One event loop in one thread serves all requests. Members are
copied out of the bytes as these arrive, which is faster than a buffer for the whole read (docs/notes/streaming.md).
"""

from __future__ import annotations

import asyncio
import atexit
import random
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from types import TracebackType

import google_crc32c

from geostream.arrays import Integers
from geostream.errors import NotFound, Refused, Stalled, StoreError, Unanswered
from geostream.layout.members import Extents, MemberTable
from geostream.store.s3 import RETRY_DEADLINE
from geostream.streaming.stats import StreamStats

IN_FLIGHT = 16  # requests
IN_FLIGHT_BYTES = 256 * 2**20  # more would only share the line with what is needed first
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds
MAX_AUTH_RETRIES = 6  # answers of "access refused" that are put down to credentials being renewed
CHECKSUM_RETRIES = 3  # times that a member with a wrong checksum is read again
REQUEST_TIMEOUT = 60.0  # seconds for a request, and one more for each BYTES_PER_SECOND bytes of it
BYTES_PER_SECOND = 2**20
HEARTBEAT_INTERVAL = 1.0  # seconds between two signs of life of the thread
HEARTBEAT_TIMEOUT = 300.0  # seconds without one, after which it is given up
SHUTDOWN_TIMEOUT = 10.0  # seconds that its end is waited for


@dataclass(frozen=True)
class Arrived:
    """The members that one read brought, and for each bad one the reason."""

    members: dict[int, bytes] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


class Incoming:
    """A range that is being read: its members are copied out as the bytes arrive, and gaps are dropped.

    Args:
        offset: First byte of the range in its shard.
        size: Bytes of the range.
        rows: The members in it, sorted by offset.
        extents: Where all members of the layout lie.
    """

    def __init__(self, offset: int, size: int, rows: list[int], extents: Extents) -> None:
        self.at, self.end, self.rows = offset, offset + size, rows  # at: of the next byte
        self.starts, self.sizes = extents.offset[rows].tolist(), extents.size[rows].tolist()
        self.taken: dict[int, bytes] = {}
        self._begun: list[bytes] = []  # of the next member, what came with earlier chunks

    def missing(self) -> tuple[int, int]:
        """Return what is still to be read, beginning with the first member that is incomplete.

        The part of that member that has arrived is dropped.

        Returns:
            (offset, size) in bytes.
        """
        if self._begun:
            self._begun, self.at = [], self.starts[len(self.taken)]
        return self.at, self.end - self.at

    def take(self, chunk: memoryview) -> None:
        """Copy the members out of the next chunk of the range."""
        begin, end = self.at, self.at + len(chunk)
        while (number := len(self.taken)) < len(self.rows):
            start = self.starts[number]
            stop = start + self.sizes[number]
            if start > end:
                break
            piece = chunk[max(start - begin, 0) : max(stop - begin, 0)]
            if stop > end:
                self._begun.append(bytes(piece))
                break
            self.taken[self.rows[number]] = b"".join([*self._begun, piece])
            self._begun = []
        self.at = end


class Transport:
    """Context manager that reads from the store in a thread; leaving it ends all reads and the thread.

    Args:
        members: Where the members lie.
        stats: Where requests, bytes and retries are counted.
    """

    def __init__(self, members: MemberTable, stats: StreamStats) -> None:
        self.members, self.stats = members, stats
        self._loop = asyncio.new_event_loop()
        self._turn, self._room = asyncio.Lock(), asyncio.Condition()
        self._flying: list[int] = []  # bytes of each read under way
        self._random = random.Random()
        self._thread = threading.Thread(target=self._loop.run_forever, name="geostream-fetch", daemon=True)
        self._left, self._leaving = False, threading.Lock()
        self._beats = self._beats_seen = 0
        self._quiet = 0.0  # seconds that :meth:`check` has seen no sign of life

    def __enter__(self) -> Transport:
        _open.add(self)
        self._thread.start()
        self._loop.call_soon_threadsafe(self._beat)
        return self

    def _beat(self) -> None:
        self._beats += 1
        self._loop.call_later(HEARTBEAT_INTERVAL, self._beat)

    def check(self, waited: float) -> None:
        """Check that the reading thread is alive.

        Args:
            waited: Seconds since the last call. They are counted instead of read from the clock, so that time in which
                the process was suspended does not count.

        Raises:
            Stalled: The thread has ended, or has been stuck for ``HEARTBEAT_TIMEOUT`` seconds.
        """
        url = self.members.store.url
        if not self._thread.is_alive():
            raise Stalled(f"{url}: the thread that reads from the store has ended; its error is above")
        if self._beats != self._beats_seen:
            self._beats_seen, self._quiet = self._beats, 0.0
        else:
            self._quiet += waited
        if self._quiet > HEARTBEAT_TIMEOUT:
            raise Stalled(
                f"{url}: the thread that reads from the store has been stuck for {HEARTBEAT_TIMEOUT:.0f} s; "
                "does a program that hands out credentials (credential_process) wait for something?"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.discard(self)
        if sys.is_finalizing():  # the thread was stuck; it no longer runs and cannot be joined
            return
        if self._thread.is_alive():
            with self._leaving:
                self._left = True  # what is started from now on would be pending when the loop is closed
                cancelled = asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)
            with suppress(TimeoutError, CancelledError):
                cancelled.result(SHUTDOWN_TIMEOUT)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(SHUTDOWN_TIMEOUT)
        if not self._thread.is_alive():  # a thread that is stuck is left behind
            self._loop.close()

    def read(self, shard: int, offset: int, size: int, rows: Integers) -> Future[Arrived]:
        """Start to read a range of a shard. Requests start in the order of the calls.

        Args:
            shard: Number of the shard.
            offset: First byte of the range.
            size: Bytes of the range.
            rows: The members in it, sorted by offset.

        Returns:
            A future of the members. It raises StoreError, with the shard's URL and what to do.

        Raises:
            CancelledError: The transport was left, perhaps by another thread at the program's end.
        """
        with self._leaving:
            if self._left:
                raise CancelledError
            return asyncio.run_coroutine_threadsafe(self._read(shard, offset, size, rows.tolist()), self._loop)

    async def _read(self, shard: int, offset: int, size: int, rows: list[int]) -> Arrived:
        async with self._turn, self._room:  # one waits for room, the others for their turn
            while self._flying and (len(self._flying) == IN_FLIGHT or sum(self._flying) + size > IN_FLIGHT_BYTES):
                await self._room.wait()
            self._flying.append(size)
        try:
            return await self._members(shard, offset, size, rows)
        finally:
            async with self._room:
                self._flying.remove(size)
                self._room.notify_all()

    async def _members(self, shard: int, offset: int, size: int, rows: list[int]) -> Arrived:
        """Read the members ``rows``, sorted by offset; read those again whose checksum is wrong."""
        extents, right = self.members.extents, dict[int, bytes]()
        for attempt in range(1 + CHECKSUM_RETRIES):
            incoming = Incoming(offset, size, rows, extents)
            await self._whole(shard, incoming)
            wrong = [
                row for row, data in incoming.taken.items() if google_crc32c.value(data) != self.members.crc32c[row]
            ]
            right |= {row: data for row, data in incoming.taken.items() if row not in wrong}
            if not wrong or attempt == CHECKSUM_RETRIES:
                break
            self.stats.retries["checksum"] += len(wrong)
            await asyncio.sleep(self._pause(attempt))
            rows, offset = wrong, int(extents.offset[wrong[0]])
            size = int(extents.offset[wrong[-1]] + extents.size[wrong[-1]]) - offset
        return Arrived(right, dict.fromkeys(wrong, "its checksum differs from the index"))

    async def _whole(self, shard: int, incoming: Incoming) -> None:
        """Read a range completely, with as many tries as it takes."""
        began, attempt, refused = time.monotonic(), 0, 0
        while True:
            had = len(incoming.taken)
            try:
                return await self._once(shard, incoming)
            except Refused as error:
                refused += 1
                if refused > MAX_AUTH_RETRIES:
                    raise
                self.members.store.renew()
                failure, reason = str(error), "refused"
            except Unanswered as error:
                failure, reason = str(error), error.reason
            self.stats.retries[reason] += 1
            if len(incoming.taken) > had:
                began, attempt, refused = time.monotonic(), 0, 0
            pause = self._pause(attempt)
            if time.monotonic() + pause - began > RETRY_DEADLINE:
                raise StoreError(f"{failure}; given up after {RETRY_DEADLINE:.0f} s and {attempt + 1} tries")
            await asyncio.sleep(pause)
            attempt += 1

    async def _once(self, shard: int, incoming: Incoming) -> None:
        """Read what is missing of a range; raise Refused or Unanswered for a temporary failure, else StoreError."""
        store, name, url = self.members.store, self.members.shard_paths[shard], self.members.shard_url(shard)
        offset, size = incoming.missing()
        deadline = REQUEST_TIMEOUT + size / BYTES_PER_SECOND
        self.stats.requests += 1
        try:
            async with asyncio.timeout(deadline), aclosing(store.stream_range(name, offset, size)) as chunks:
                async for chunk, of in chunks:
                    self._check_size(shard, of)
                    self.stats.bytes_fetched += len(chunk)
                    incoming.take(chunk)
        except NotFound as error:
            raise StoreError(f"{url}: the layout names this shard, but it is gone; shard the dataset again") from error
        except TimeoutError as error:
            raise Unanswered(f"{url}: no whole answer within {deadline:.0f} s", "stalled") from error
        except (Refused, Unanswered):
            raise
        except StoreError:  # perhaps a range that the object does not have
            async for _, of in store.stream_range(name, 0, 0):
                self._check_size(shard, of)
            raise
        if (came := incoming.at - offset) != size:
            raise Unanswered(f"{url}: {came} bytes came of {size}", "short")

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


_open: weakref.WeakSet[Transport] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End the transports that a program left open: stopping their threads inside obstore would abort the process."""
    for transport in list(_open):
        transport.__exit__(None, None, None)


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
