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
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from copy import copy
from functools import partial
from multiprocessing import forkserver, resource_tracker
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader

from geostream.errors import GeostreamError
from geostream.streaming.dataset import Batches, State, StreamDataset
from geostream.streaming.pipeline import Batch
from geostream.streaming.stats import StreamStats

DEPTH = 2  # batches made before they are wanted, by the thread or by each worker
MOST_THREADS = 8
GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


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
        cores = len(os.sched_getaffinity(0)) // (max(workers, 1) * sharing)
        dataset.threads = min(max(cores, 1), MOST_THREADS) if threads is None else threads
        dataset.pin = pin and not workers
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
        _start_forkserver()
        items: Iterable[Batch | GeostreamError] = DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=DEPTH,
            collate_fn=_unchanged,
            pin_memory=self.pin,
            multiprocessing_context=context,
            generator=torch.Generator(),  # else it draws from the one that the training draws from
            worker_init_fn=partial(_begin_worker, dict(os.environ)),
        )
        for item in items:
            if isinstance(item, GeostreamError):
                raise item
            yield item


def _ahead(batches: Batches, stop: threading.Event) -> Batches:
    """``batches``, made by a thread up to DEPTH before they are wanted. ``stop`` is set when no more are."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(DEPTH)

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
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while thread.is_alive():  # it may be waiting for room
            while not ready.empty():
                ready.get_nowait()
            thread.join(0.01)


def _start_forkserver() -> None:
    """So that it never hears signals to the whole process group: the trainer decides when loading ends."""
    resource_tracker.ensure_running()  # now, because it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(environment: dict[str, str], worker: int) -> None:
    """Give a worker what the fork server does not: the trainer's environment of now, and its end.

    The server keeps the environment it was started with, and as the worker's parent lives as long as the worker does:
    torch's own watchdog would not see that the trainer was killed.
    """
    os.setsid()  # out of the trainer's process group, for the same reason
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    os.environ.clear()
    os.environ.update(environment)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=watch, name="geostream-watch", daemon=True).start()


def _unchanged(batch: Any) -> Any:
    return batch
