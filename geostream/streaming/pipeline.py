"""Turn the members of a reader's steps into batches of tensors, as stages of a webdataset pipeline.

Samples are webdataset's dicts. Threads decode the images without the GIL, directly into the batch: uint8 in NHWC memory
order (torch's channels_last), page-locked where a GPU copies them. Colour changes and normalisation happen on the
device. A batch is handed over when its last image is decoded, before the bytes of the next batch are there. A pair with
a damaged image is replaced when its batch is complete, in the batch's order, so that the result does not depend on
which thread was faster.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import Any, NamedTuple, overload

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from geostream.arrays import Integers
from geostream.errors import GeostreamError, StoreError
from geostream.layout import Layout
from geostream.layout.members import MemberTable
from geostream.settings import TrainSettings
from geostream.streaming.decode import decode_image
from geostream.streaming.fetch import Fetcher
from geostream.streaming.options import ReadOptions
from geostream.streaming.replace import Substitutes
from geostream.streaming.shared import PlanBatches
from geostream.streaming.stats import Replaced, StreamStats

KINDS = ("tile", "view")
SHUTDOWN_TIMEOUT = 10.0  # seconds that the end of threads is waited for

Sample = dict[str, Any]  # one pair or one image on its way through the pipeline
Columns = dict[str, Integers]  # samples of one kind: "tile" and/or "view" (rows in members), and numbers to pass on
Change = Callable[[Sample], Sample]


class ImageSizes(NamedTuple):
    """The height and width, in pixels, of the images that are delivered."""

    tile: tuple[int, int]
    view: tuple[int, int]

    @classmethod
    def of(cls, settings: TrainSettings) -> ImageSizes:
        """Return the sizes that a run's settings ask for."""
        sizes = settings.model
        return cls((sizes.tile_size, sizes.tile_size), (sizes.view_height, sizes.view_width))


class Batch(NamedTuple):
    """The tensors of a batch of B samples; images are uint8 (B, 3, H, W) in channels_last memory order."""

    tensors: dict[str, Tensor]
    step: int  # of the plan, over all ranks
    stats: StreamStats  # of the worker that made it, so far
    worker: int


@dataclass(frozen=True)
class Replacement:
    """Find the pairs that replace a plan's damaged ones (:mod:`geostream.streaming.replace`)."""

    layout: Layout
    split: str
    plan: PlanBatches
    limit: int  # pairs that may be replaced in the epoch

    @cached_property
    def _rule(self) -> Substitutes:
        return Substitutes(self.plan, self.layout.excluded(self.split))  # read when a first pair is damaged

    def pairs(self, step: int, batch: set[int]) -> Iterator[tuple[MemberTable, Sample]]:
        """Yield the pairs that may replace one pair of a batch, best first; their images are not yet read.

        Args:
            step: Number of the batch in the plan.
            batch: The places that are in the batch now.

        Yields:
            The table of the images in the pair's shard, and the pair: rows of its tile and view, and its id.
        """
        for place, view, pair in self._rule.candidates(step, batch):
            one, number = np.array([place], np.int32), np.array([view], np.int16)
            members = MemberTable.of(self.layout, self.layout.shard_of_place[one])
            yield members, {"tile": int(members.rows(one)[0]), "view": int(members.rows(one, number)[0]), "pair": pair}


class Worker(NamedTuple):
    """The process that runs a pipeline, and how it does so."""

    number: int = 0
    lanes: int = 1  # whose batches it makes in turn
    threads: int = 1  # that decode
    pin: bool = False  # put images into page-locked memory
    stop: threading.Event | None = None  # set by another thread: end, even where bytes are waited for


@dataclass(frozen=True)
class Pipeline:
    """One reader's pass over its steps of a plan or a scan."""

    members: MemberTable
    steps: Sequence[int]  # number of each batch
    samples: Sequence[list[Columns]]  # of each batch
    sizes: ImageSizes
    change: Change | None  # done to each decoded sample
    options: ReadOptions
    replacement: Replacement | None  # None: a damaged image is an error
    worker: Worker

    @cached_property
    def fetcher(self) -> Fetcher:
        """The fetcher of the members of all steps."""
        return Fetcher(self.members, _Needed(self.samples), self.options, self.worker.lanes, self.worker.stop)

    def batches(self) -> Iterator[Batch]:
        """Read and decode the batches, and yield them in order.

        Raises:
            BadInput: A batch does not fit into the budget, or an image cannot be decoded and ``replacement`` is None.
            StoreError: A shard cannot be read, an image is damaged and cannot be replaced, or too many are.
        """
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
        """Yield samples with their images still encoded, as webdataset has them: dicts with a ``__key__``."""
        for step, columns, images in zip(self.steps, self.samples, self.fetcher, strict=True):
            images_of = self._allocate(columns)
            into = {kind: iter(tensor.numpy()) for kind, tensor in images_of.items()}
            left = n_samples(columns)
            for one in columns:
                for values in zip(*(column.tolist() for column in one.values()), strict=True):
                    left -= 1
                    fields: Sample = dict(zip(one, values, strict=True))
                    rows = {kind: fields.pop(kind) for kind in KINDS if kind in fields}
                    yield fields | {
                        "__key__": str(self.members.place[next(iter(rows.values()))]),
                        "__rows__": rows,
                        "__encoded__": {
                            kind: images[row] if row in images else StoreError(self.fetcher.bad[row])
                            for kind, row in rows.items()
                        },
                        "__into__": {kind: next(into[kind]) for kind in rows},
                        "__batch__": images_of,
                        "__step__": step,
                        "__last__": left == 0,
                    }
            images.clear()  # so that the fetcher can free their bytes

    def _allocate(self, columns: list[Columns]) -> dict[str, Tensor]:
        """Allocate the images of a batch: for each kind (number, height, width, 3)."""
        room = {}
        for kind in KINDS:
            number = sum(len(one[kind]) for one in columns if kind in one)
            shape = (number, *getattr(self.sizes, kind), 3)
            # NumPy asks for huge pages and torch does not, which costs page faults (docs/notes/streaming.md).
            room[kind] = (
                torch.empty(shape, dtype=torch.uint8, pin_memory=True)
                if self.worker.pin
                else torch.from_numpy(np.empty(shape, dtype=np.uint8))
            )
        return room

    def _make(self, sample: Sample) -> Sample:
        """Decode a sample's images into the batch and change them; add ``__bad__`` where an image is damaged."""
        encoded = sample.pop("__encoded__")
        for kind, row in sample["__rows__"].items():
            room = sample["__into__"][kind]
            try:
                if isinstance(encoded[kind], StoreError):
                    raise encoded[kind]
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
        """Return another pair in place of a damaged one; raise where there is none, or where too many are damaged."""
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
        for members, found in self.replacement.pairs(sample["__step__"], {int(one["__key__"]) for one in batch}):
            rows = {kind: found.pop(kind) for kind in KINDS}
            came = self.fetcher.fetch(members, np.array(list(rows.values())))
            encoded = {at: StoreError(reason) for at, reason in came.bad.items()} | came.members
            made = self._make(
                {name: value for name, value in sample.items() if name != "__bad__"}
                | found
                | {"__key__": str(members.place[rows["tile"]]), "__rows__": rows}
                | {"__encoded__": {kind: encoded[at] for kind, at in rows.items()}}
            )
            if "__bad__" not in made:
                view = sample["__rows__"]["view"]
                stats.count_replaced(
                    Replaced(
                        step=sample["__step__"],
                        pair=f"{self.members.key(view)} {self.members.name(view)}",
                        member=self.members.describe(row),
                        reason=str(error),
                        stand_in=f"{members.key(rows['view'])} {members.name(rows['view'])}",
                    )
                )
                return made
        raise StoreError(f"{what}; and no other pair can stand in for it; restore the shard") from error


class _Threads:
    """Context manager for decoding threads. Unlike Python's pool, it does not wait for ever for one that is stuck."""

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
        """Have a thread do ``work`` on the sample."""
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
    """Yield ``work`` done on each sample, in order: ``depth`` samples at once, but never beyond the end of a batch."""
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
    """Return the samples' columns as tensors, each of the samples that have it; images are in their batch already."""
    names = dict.fromkeys(name for sample in samples for name in sample if not name.startswith("__"))
    images = samples[0]["__batch__"]
    return {
        name: images[name].permute(0, 3, 1, 2)
        if name in KINDS
        else torch.from_numpy(np.stack([sample[name] for sample in samples if name in sample]))
        for name in names
    }


def n_samples(step: list[Columns]) -> int:
    """Return the number of samples in a step."""
    return sum(len(next(iter(columns.values()))) for columns in step)


@dataclass(frozen=True)
class _Needed(Sequence[Integers]):
    """The rows of all members that each batch needs, found when they are asked for: they would take 8 bytes a pair."""

    samples: Sequence[list[Columns]]

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Integers: ...

    @overload
    def __getitem__(self, index: slice) -> list[Integers]: ...

    def __getitem__(self, index: int | slice) -> Integers | list[Integers]:
        if isinstance(index, slice):
            return [self[batch] for batch in range(*index.indices(len(self)))]
        return np.concatenate([columns[kind] for columns in self.samples[index] for kind in KINDS if kind in columns])
