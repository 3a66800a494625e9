"""Make a dataset's batches ahead of the training loop, and keep the position in the plan.

Batches come from threads of this process or from loader processes (torch's DataLoader); both make the same batches.
Threads start at once and copy nothing. They are enough as long as decoding is the main cost, because it releases the
GIL. Loader processes take seconds to start and copy each batch through shared memory. They are worth it where Python
code per sample is the limit.

The position counts batches that were taken, not those made ahead. A checkpoint written between two batches therefore
continues with the second of them.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from copy import copy
from functools import partial
from types import TracebackType
from typing import Any

import torch
from joblib import cpu_count
from torch.utils.data import DataLoader

from geostream.errors import GeostreamError, Stalled
from geostream.streaming.dataset import Batches, State, StreamDataset
from geostream.streaming.pipeline import Batch
from geostream.streaming.stats import StreamStats
from geostream.streaming.workers import BatchWait, Watch, begin_worker, start_forkserver

PREFETCHED = 2  # batches made before they are wanted, by the thread or by each worker
MAX_THREADS = 8
POLL_INTERVAL = 1.0  # seconds between two looks at the thread that makes batches
SHUTDOWN_TIMEOUT = 30.0  # seconds that its end is waited for


class Loader:
    """Context manager that yields a dataset's batches, from the dataset's position on.

    Args:
        dataset: Made by :func:`~geostream.streaming.dataset.plan_dataset` or
            :func:`~geostream.streaming.dataset.scan_dataset`. It is copied and keeps its own position.
        workers: Loader processes; 0 makes the batches in this process.
        threads: Decoding threads of each process; None chooses by the number of cores.
        pin: Put tensors into page-locked memory, for copies to a GPU.
        sharing: How many loaders share the cores of this machine.

    Raises:
        BadInput: Ranks and workers cannot share the plan's lanes evenly.
        Stalled: While iterating: a worker or the thread that makes batches has ended or is stuck.
        GeostreamError: While iterating: whatever else the dataset raises.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        workers: int = 0,
        threads: int | None = None,
        pin: bool = False,
        sharing: int = 1,
    ) -> None:
        dataset.check_workers(max(workers, 1))
        self.dataset = dataset = copy(dataset)  # with a position of its own
        self.workers, self.pin = workers, pin
        cores = cpu_count() // (max(workers, 1) * sharing)
        dataset.threads = min(max(cores, 1), MAX_THREADS) if threads is None else threads
        dataset.pin = pin and not workers
        dataset.errors_as_items = True
        self._parts: dict[int, StreamStats] = {}
        self._stall_seconds = 0.0
        self._batches: Batches | None = None

    def state_dict(self) -> State:
        """Return the position after the last batch taken.

        With several ranks, call it when all of them have taken the same number of batches.

        Returns:
            ``plan``, the plan's hash, and ``cursor``, the number of its batches that all ranks together have done.
        """
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a stored position.

        Args:
            state: As :meth:`state_dict` returned it.

        Raises:
            StaleArtefact: The position is one in another plan.
            BadInput: The state is no position, or is outside the plan.
        """
        self.close()
        self.dataset.load_state_dict(state)

    @property
    def stats(self) -> StreamStats:
        """The counts of all workers together, as of the last batch taken from each."""
        stats = StreamStats.total(self._parts.values())
        stats.stall_seconds = self._stall_seconds
        return stats

    def __len__(self) -> int:
        return len(self.dataset)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads or processes that make batches."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        dataset = self.dataset
        if self.workers:
            batches = self._from_workers()
        else:
            dataset.stop = threading.Event()
            batches = _ahead(iter(dataset), dataset.stop)
        self._batches = batches
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._stall_seconds += time.perf_counter() - started
            if batch is None:
                return
            self._parts[batch.worker] = batch.stats
            if dataset.lanes is not None:
                dataset.cursor = min(batch.step - dataset.rank + dataset.ranks, len(dataset.steps))
            yield batch

    def _from_workers(self) -> Batches:
        # forkserver: a fork of this process would copy torch's and obstore's threads in the middle of what they do.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([StreamDataset.__module__])
        start_forkserver()
        with Watch(context, self.workers) as watch:
            watch.start(
                DataLoader(
                    self.dataset,
                    batch_size=None,
                    num_workers=self.workers,
                    prefetch_factor=PREFETCHED,
                    collate_fn=_unchanged,
                    pin_memory=self.pin,
                    multiprocessing_context=context,
                    generator=torch.Generator(),  # else it draws from the one that the training draws from
                    worker_init_fn=partial(begin_worker, dict(os.environ), watch.beat),
                )
            )
            while (item := watch.take()) is not None:
                if isinstance(item, GeostreamError):
                    raise item
                yield item


def _ahead(batches: Batches, stop: threading.Event) -> Batches:
    """Yield ``batches``, which a thread makes up to PREFETCHED ahead; set ``stop`` when no more are wanted.

    The thread also frees them, one batch late. The consumer would lose the GIL to it while freeing a tensor, and wait
    for milliseconds to get it back.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED)
    taken: deque[Batch] = deque()

    def work() -> None:
        try:
            with closing(batches):
                for batch in batches:
                    ready.put(batch)
                    while len(taken) > 1:
                        taken.popleft()
                    if stop.is_set():
                        return
            ready.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            ready.put(error)

    thread = threading.Thread(target=work, name="geostream-load", daemon=True)
    thread.start()
    try:
        while (item := _next(ready, thread)) is not None:
            if isinstance(item, BaseException):
                raise item
            taken.append(item)
            yield item
    finally:
        stop.set()
        until = time.monotonic() + SHUTDOWN_TIMEOUT  # one that is stuck is left behind
        while thread.is_alive() and time.monotonic() < until:  # it may be waiting for room
            while not ready.empty():
                ready.get_nowait()
            thread.join(0.01)


def _next(ready: queue.Queue[Batch | BaseException | None], thread: threading.Thread) -> Batch | BaseException | None:
    """Return the next item that ``thread`` has made; raise Stalled where no more can come."""
    waited = BatchWait()
    while True:
        try:
            return ready.get(timeout=POLL_INTERVAL)
        except queue.Empty:
            reason = waited.ends(POLL_INTERVAL)
            if not thread.is_alive() and ready.empty():
                reason = "the thread that makes batches has ended; its error is above"
            if reason:
                raise Stalled(reason) from None


def _unchanged(batch: Any) -> Any:
    return batch
