"""Batches: every request gets its own result, none waits for others to come, and errors go to those they concern."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from geostream.serving.batching import Batcher


class Network:
    """Doubles numbers, a batch at a time, when it is let; negative ones fail."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.threads: set[str] = set()
        self.may_go = threading.Semaphore(0)

    def compute(self, items: Sequence[int]) -> list[int]:
        assert self.may_go.acquire(timeout=20)
        self.batches.append(tuple(items))
        self.threads.add(threading.current_thread().name)
        if any(item < 0 for item in items):
            raise ValueError(f"batch {items}")
        return [2 * item for item in items]


def test_what_waits_is_computed_together() -> None:
    network = Network()

    async def ask() -> list[int]:
        async with Batcher(network.compute, 4) as batcher:
            first = asyncio.create_task(batcher.submit(0))
            await asyncio.sleep(0.05)  # it is alone, and is computed without waiting for others
            others = [asyncio.create_task(batcher.submit(item)) for item in range(1, 7)]
            await asyncio.sleep(0.05)
            network.may_go.release(3)
            return await asyncio.gather(first, *others)

    assert asyncio.run(ask()) == [2 * item for item in range(7)]
    assert network.batches == [(0,), (1, 2, 3, 4), (5, 6)]
    assert len(network.threads) == 1


def test_an_error_goes_to_its_own_batch_and_the_next_one_is_computed() -> None:
    network = Network()
    network.may_go.release(9)

    async def ask() -> list[int | BaseException]:
        async with Batcher(network.compute, 1) as batcher:
            return await asyncio.gather(*map(batcher.submit, [1, -1, 3]), return_exceptions=True)

    one, failed, three = asyncio.run(ask())
    assert (one, three) == (2, 6) and isinstance(failed, ValueError)


def test_nobody_computes_for_a_request_that_has_gone() -> None:
    network = Network()

    async def ask() -> int:
        async with Batcher(network.compute, 4) as batcher:
            first = asyncio.create_task(batcher.submit(1))
            await asyncio.sleep(0.05)
            gone = asyncio.create_task(batcher.submit(2))
            await asyncio.sleep(0.05)
            gone.cancel()
            last = asyncio.create_task(batcher.submit(3))
            await asyncio.sleep(0.05)
            network.may_go.release(2)
            await first
            return await last

    assert asyncio.run(ask()) == 6
    assert network.batches == [(1,), (3,)]


def test_what_waits_at_the_end_is_cancelled() -> None:
    network = Network()

    async def ask() -> None:
        async with Batcher(network.compute, 1) as batcher:
            tasks = [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
            await asyncio.sleep(0.05)
            network.may_go.release(1)
        for task in tasks[1:]:
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(ask())
    assert network.batches == [(1,)]
