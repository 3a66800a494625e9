"""The pipeline: one reader's steps from encoded images to batches of tensors, as stages of webdataset's.

Decides how the work is laid out. Samples are webdataset's dicts; images are decoded, by threads that hold no GIL, into
the batch they end in: uint8 in NHWC memory order (torch's channels_last), page-locked where a GPU is to copy them.
Colour and normalisation happen on the device. A batch is handed over when its last image is there, before the bytes
of the next are waited for. A pair with a damaged image is replaced when its batch is complete, in the batch's order, so
that the threads' luck decides nothing.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from geostream.arrays import Int64, Pairs, pair_codes
from geostream.errors import GeostreamError, StoreError
from geostream.layout.members import MemberTable
from geostream.settings import TrainSettings
from geostream.streaming.decode import decode_image
from geostream.streaming.fetch import Fetcher
from geostream.streaming.options import ReadOptions
from geostream.streaming.replace import Substitutes
from geostream.streaming.stats import Replaced, StreamStats

KINDS = ("tile", "view")
SHUTDOWN_TIMEOUT = 10.0  # seconds that the end of threads is waited for

Sample = dict[str, Any]  # one pair or one image on its way through the pipeline
Columns = dict[str, Int64]  # samples of one kind: "tile" and/or "view" (rows in members), and numbers to pass on
Change = Callable[[Sample], Sample]


class ImageSizes(NamedTuple):
    """Height and width in pixels that images are delivered at."""

    tile: tuple[int, int]
    view: tuple[int, int]

    @classmethod
    def of(cls, settings: TrainSettings) -> ImageSizes:
        """The sizes that a run's settings ask for."""
        sizes = settings.model
        return cls((sizes.tile_size, sizes.tile_size), (sizes.view_height, sizes.view_width))


class Batch(NamedTuple):
    """Tensors of a batch, first axis the samples; images are uint8 (B, 3, H, W) in channels_last memory order."""

    tensors: dict[str, Tensor]
    step: int  # of the plan, over all ranks
    stats: StreamStats  # of the worker that made it, so far
    worker: int


class Replacement(NamedTuple):
    """How a plan's bad pairs are replaced: the rule, and what it needs to make samples of its answers."""

    rule: Substitutes
    tile: Int64  # (P,) member rows by pair id
    view: Int64
    pairs: Pairs
    limit: int  # pairs that may be replaced in the epoch

    def samples(self, step: int, batch: set[int]) -> Iterator[Sample]:
        """Yield the pairs that may replace one of ``batch``, the places now in it; best first, images not yet read."""
        codes = pair_codes(*self.pairs)
        for place, view in self.rule.candidates(step, batch):
            pair = int(np.searchsorted(codes, pair_codes(np.array([place], np.int32), np.array([view], np.int16))[0]))
            yield {"tile": int(self.tile[pair]), "view": int(self.view[pair]), "pair": pair}


class Worker(NamedTuple):
    """The process or thread that runs a pipeline."""

    number: int = 0
    threads: int = 1  # that decode
    pin: bool = False  # put images into page-locked memory
    stop: threading.Event | None = None  # set by another thread: end, even where bytes are waited for


@dataclass(frozen=True)
class Pipeline:
    """One reader's pass over its share of a plan.

    Raises what the fetcher raises, and an error naming place, member and shard where an image is damaged and cannot be
    replaced, or too many were.
    """

    members: MemberTable
    steps: list[tuple[int, list[Columns]]]  # number and samples of each batch
    sizes: ImageSizes
    change: Change | None  # done to each decoded sample
    options: ReadOptions
    replacement: Replacement | None  # None: a damaged image is an error
    worker: Worker

    @cached_property
    def fetcher(self) -> Fetcher:
        return Fetcher(
            self.members, [_member_rows(columns) for _, columns in self.steps], self.options, self.worker.stop
        )

    def batches(self) -> Iterator[Batch]:
        pool = _Threads(self.worker.threads) if self.worker.threads > 1 else nullcontext()
        with self.fetcher, pool as executor:
            decoded = wds.map(self._make)
            if executor is not None:
                decoded = partial(_map_ahead, self._make, executor, 2 * self.worker.threads)
            batch: list[Sample] = []
            # Not wds.batched: it waits for the next batch's bytes before it hands over this batch.
            for sample in wds.DataPipeline(self._samples, decoded):
                batch.append(sample)
                if sample["__last__"]:
                    yield self._finish(batch)
                    batch = []

    def _samples(self) -> Iterator[Sample]:
        """Samples with their images still encoded, in webdataset's manner: dicts with a ``__key__``."""
        for (step, columns), images in zip(self.steps, self.fetcher, strict=True):
            images_of = self._allocate(columns)
            into = {kind: iter(tensor.numpy()) for kind, tensor in images_of.items()}
            left = n_samples(columns)
            for one in columns:
                for values in zip(*(column.tolist() for column in one.values()), strict=True):
                    left -= 1
                    fields: Sample = dict(zip(one, values, strict=True))
                    rows = {kind: fields.pop(kind) for kind in KINDS if kind in fields}
                    yield fields | {
                        "__key__": self.members.key(next(iter(rows.values()))),
                        "__rows__": rows,
                        "__encoded__": {kind: images.get(row) for kind, row in rows.items()},
                        "__into__": {kind: next(into[kind]) for kind in rows},
                        "__batch__": images_of,
                        "__step__": step,
                        "__last__": left == 0,
                    }
            images.clear()  # the fetcher lets go of their bytes next

    def _allocate(self, columns: list[Columns]) -> dict[str, Tensor]:
        """Room for the images of a batch, (number, height, width, 3)."""
        room = {}
        for kind in KINDS:
            number = sum(len(one[kind]) for one in columns if kind in one)
            shape = (number, *getattr(self.sizes, kind), 3)
            # NumPy asks for huge pages, torch does not: a fifth of the decoding went into page faults.
            room[kind] = (
                torch.empty(shape, dtype=torch.uint8, pin_memory=True)
                if self.worker.pin
                else torch.from_numpy(np.empty(shape, dtype=np.uint8))
            )
        return room

    def _make(self, sample: Sample) -> Sample:
        """The sample with its images as pixels, in their places of the batch; ``__bad__`` where that can't be."""
        encoded = sample.pop("__encoded__")
        for kind, row in sample["__rows__"].items():
            room = sample["__into__"][kind]
            try:
                if encoded[kind] is None:
                    raise StoreError(self.fetcher.bad[row])
                sample[kind] = decode_image(encoded[kind], room)
            except GeostreamError as error:
                return sample | {"__bad__": (row, error)}
        if self.change is not None:
            sample = self.change(sample)
        for kind, room in sample["__into__"].items():
            if sample[kind] is not room:
                room[...] = sample[kind]
        return sample

    def _finish(self, batch: list[Sample]) -> Batch:
        for index, sample in enumerate(batch):
            if "__bad__" in sample:
                batch[index] = self._substitute(sample, batch)
        return Batch(_collate(batch), batch[0]["__step__"], self.fetcher.stats.copy(), self.worker.number)

    def _substitute(self, sample: Sample, batch: list[Sample]) -> Sample:
        """Another pair instead of a sample with a bad image. Raises where there is none, or where too many are bad."""
        row, error = sample["__bad__"]
        what = f"{self.members.describe(row)}: {error}"
        stats = self.fetcher.stats
        if self.replacement is None:
            raise type(error)(f"{what}; restore the shard, or shard the dataset again") from error
        if stats.replaced_pairs >= self.replacement.limit:
            raise StoreError(
                f"{what}; {stats.replaced_pairs + 1} pairs are damaged, more than may be replaced "
                f"(replaced_limit {self.options.replaced_limit:g}); see what is wrong with: geostream verify"
            ) from error
        places = {int(self.members.place[next(iter(one["__rows__"].values()))]) for one in batch}
        for found in self.replacement.samples(sample["__step__"], places):
            rows = {kind: found.pop(kind) for kind in KINDS}
            encoded = self.fetcher.fetch(np.array(list(rows.values())))
            made = self._make(
                {name: value for name, value in sample.items() if name != "__bad__"}
                | found
                | {"__key__": self.members.key(rows["tile"]), "__rows__": rows}
                | {"__encoded__": {kind: encoded.get(row) for kind, row in rows.items()}}
            )
            if "__bad__" not in made:
                stats.count_replaced(
                    Replaced(
                        step=sample["__step__"],
                        pair=f"{sample['__key__']} {self.members.member[sample['__rows__']['view']]}",
                        member=self.members.describe(row),
                        reason=str(error),
                        stand_in=f"{made['__key__']} {self.members.member[rows['view']]}",
                    )
                )
                return made
        raise StoreError(f"{what}; and no other pair can stand in for it; restore the shard") from error


class _Threads:
    """Context manager: threads that decode. Python's own pool would wait for one that is stuck, also at its exit."""

    def __init__(self, number: int) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Sample], Callable[[Sample], Sample], Sample] | None]
        self._work = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"geostream-decode-{one}", daemon=True) for one in range(number)
        ]

    def __enter__(self) -> _Threads:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(SHUTDOWN_TIMEOUT)

    def submit(self, work: Callable[[Sample], Sample], sample: Sample) -> Future[Sample]:
        future: Future[Sample] = Future()
        self._work.put((future, work, sample))
        return future

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            future, work, sample = task
            del task  # else the sample would stay until the next one comes
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(sample))
            except BaseException as error:  # for whoever waits
                future.set_exception(error)
            del future, sample


def _map_ahead(
    work: Callable[[Sample], Sample], pool: _Threads, depth: int, samples: Iterable[Sample]
) -> Iterator[Sample]:
    """A stage: ``work`` on each sample, ``depth`` of them at once, in order; never beyond the end of a batch."""
    running: deque[Any] = deque()
    try:
        for sample in samples:
            running.append(pool.submit(work, sample))
            while running and (sample["__last__"] or len(running) >= depth):
                yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Columns of the samples as tensors; a column holds those samples that have it. Images lie where they belong."""
    names = dict.fromkeys(name for sample in samples for name in sample if not name.startswith("__"))
    images = samples[0]["__batch__"]
    return {
        name: images[name].permute(0, 3, 1, 2)
        if name in KINDS
        else torch.from_numpy(np.stack([sample[name] for sample in samples if name in sample]))
        for name in names
    }


def n_samples(step: list[Columns]) -> int:
    return sum(len(next(iter(columns.values()))) for columns in step)


def _member_rows(step: list[Columns]) -> Int64:
    """All rows in members that a step needs."""
    return np.concatenate([columns[kind] for columns in step for kind in KINDS if kind in columns])
