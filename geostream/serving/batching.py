"""Gather what requests ask for at the same time into batches, and compute these one after another in one thread.

A network answers eight images together faster than one by one, and two at the same time would fight for the cores. So
there is one thread that computes. While it is busy, requests wait in a queue; as soon as it is free, it takes the first
ones together. Nothing waits for a batch to fill up: a lone request is computed at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Compute items in batches. It is used from one event loop, within ``async with``.

    Args:
        compute: Returns one result for each item of a batch; called in the one thread.
        largest: Most items of a batch.
    """

    def __init__(self, compute: Callable[[Sequence[Item]], Sequence[Result]], largest: int) -> None:
        self._compute, self._largest = compute, largest
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")

    async def __aenter__(self) -> Batcher[Item, Result]:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop after the batch under way; what still waits is cancelled."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        for _, future in self._queue:
            future.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, item: Item) -> Result:
        """Return the result of an item, computed in some batch.

        The queue has no bound of its own: the caller bounds how many requests there are at the same time.

        Raises:
            Exception: Whatever computing the batch raised.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        self._arrived.set()
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not batch:
                self._arrived.clear()
                continue
            items, futures = zip(*batch, strict=True)
            try:
                results = await loop.run_in_executor(self._thread, self._compute, items)
                answers = list(zip(futures, results, strict=True))
            except asyncio.CancelledError:
                for future in futures:
                    future.cancel()
                raise
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, result in answers:
                if not future.done():
                    future.set_result(result)

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """Take the first items from the queue, without those whose request has gone meanwhile."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._queue and len(batch) < self._largest:
            item, future = self._queue.popleft()
            if not future.cancelled():
                batch.append((item, future))
        return batch
