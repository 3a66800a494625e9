"""The loader: a dataset's batches made ahead of whoever takes them, and where in the plan that is.

Decides what makes them. Decoding threads in the trainer's own process start at once and copy nothing, and serve as long
as decoding is what costs, because it holds no GIL. Loader processes (torch's DataLoader) take seconds to start and a
copy through shared memory; they pay where Python work per sample is what limits. Both make the same batches. The
position counts batches that were taken, not those made ahead: a checkpoint written between two batches continues with
the second of them.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
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
    """Context manager; iterate over it for the batches from the dataset's position on.

    Raises BadInput where ranks and workers cannot be dealt the plan's lanes, and what the dataset raises.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        workers: int = 0,
        threads: int | None = None,
        pin: bool = False,
        sharing: int = 1,
    ) -> None:
        """``workers``: processes; 0: this one. ``threads``: that decode, in each; None: as the machine has cores.

        ``pin``: put tensors into page-locked memory, for copies to a GPU. ``sharing``: loaders that share the cores.
        """
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
        """The position behind the last batch taken; with several ranks, when all have taken equally many."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored position. Raises StaleArtefact for one in another plan."""
        self.close()
        self.dataset.load_state_dict(state)

    @property
    def stats(self) -> StreamStats:
        """Of all workers together, as of the last batch taken from each."""
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
        """End whatever makes batches."""
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
    """``batches``, made by a thread up to PREFETCHED before they are wanted. ``stop`` is set when no more are."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED)

    def work() -> None:
        try:
            with closing(batches):
                for batch in batches:
                    ready.put(batch)
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
            yield item
    finally:
        stop.set()
        until = time.monotonic() + SHUTDOWN_TIMEOUT  # one that is stuck is left behind
        while thread.is_alive() and time.monotonic() < until:  # it may be waiting for room
            while not ready.empty():
                ready.get_nowait()
            thread.join(0.01)


def _next(ready: queue.Queue[Batch | BaseException | None], thread: threading.Thread) -> Batch | BaseException | None:
    """What ``thread`` has made. Raises Stalled where nothing can come any more."""
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
