"""The loader: from a plan to batches of tensors, by a webdataset pipeline inside torch's IterableDataset.

Decides who makes which batch: step s of a plan belongs to lane s % lanes, lanes are dealt to loader workers, and
torch's DataLoader takes the workers' batches in turn, so the global order is the plan's whatever the number of
workers. Without workers one thread loads ahead of the trainer, which costs no copies and no start-up; workers cost
seconds to start, and pay when decoding is what limits. Batches travel as uint8 in NHWC memory order (torch's
channels_last), which is how images come out of the decoder; colour and normalisation happen on the device.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from geostream.errors import BadInput, GeostreamError
from geostream.layout import Int32, Int64, Layout, Pairs, pair_codes
from geostream.streaming.decode import Pixels, decode_image
from geostream.streaming.fetch import Fetcher, MemberTable, StreamStats
from geostream.streaming.plan import EpochPlan

DEPTH = 2  # batches made before they are wanted, by the thread or by each worker

Sample = dict[str, Any]  # one pair or one image on its way through the pipeline
Columns = dict[str, Int64]  # samples of one kind: "tile" and/or "view" (rows in members), and numbers to pass on
Change = Callable[[Sample], Sample]


class ImageSizes(NamedTuple):
    """Height and width in pixels that images are delivered at."""

    tile: tuple[int, int]
    view: tuple[int, int]


class Batch(NamedTuple):
    """Tensors of a batch, first axis the samples; images are uint8 (B, 3, H, W) in channels_last memory order."""

    tensors: dict[str, Tensor]
    stats: StreamStats  # of the worker that made it, so far
    worker: int


Batches = Generator[Batch, None, None]  # closed to end early


class StreamDataset(IterableDataset[Batch]):
    """Batches of what a list of steps asks for; made by :func:`plan_dataset` and :func:`scan_dataset`.

    Raises BadInput naming place, member and shard for an image that cannot be decoded, and what the fetcher raises.
    In a loader worker the error is yielded instead, as the last item: torch would bury it in a traceback.
    """

    def __init__(
        self,
        members: MemberTable,
        steps: Sequence[list[Columns]],
        sizes: ImageSizes,
        change: Change | None = None,
        lanes: int | None = None,
    ) -> None:
        """``steps``: the samples of each batch; ``change``: done to each decoded sample.

        ``lanes``: workers take steps in turn, and their number must divide it. None: the order of the batches does not
        matter, and each worker takes one run of steps, so that no two read the same shard.
        """
        self.members, self.steps, self.sizes, self.change, self.lanes = members, steps, sizes, change, lanes

    def __iter__(self) -> Batches:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        try:
            yield from self._batches(worker, self._share(worker, workers))
        except GeostreamError as error:
            if info is None:
                raise
            yield error  # type: ignore[misc]  # raised by load() in the trainer's process

    def _share(self, worker: int, workers: int) -> range:
        """The steps of one of ``workers``."""
        if self.lanes is None:
            bounds = [round(len(self.steps) * part / workers) for part in (worker, worker + 1)]
            return range(*bounds)
        return range(worker, len(self.steps), workers)

    def _batches(self, worker: int, share: range) -> Iterator[Batch]:
        needed = [_member_rows(self.steps[step]) for step in share]
        with Fetcher(self.members, needed) as fetcher:
            stages = [partial(self._samples, share, fetcher), wds.map(self._decode)]
            if self.change is not None:
                stages.append(wds.map(self.change))
            batch: list[Sample] = []
            # Not wds.batched: it waits for the next batch's shards before it hands over this batch.
            for sample in wds.DataPipeline(*stages):
                batch.append(sample)
                if sample["__last__"]:
                    yield Batch(_collate(batch), StreamStats(**fetcher.stats.as_dict()), worker)
                    batch = []

    def _samples(self, share: range, fetcher: Fetcher) -> Iterator[Sample]:
        """Samples with their images still encoded, in webdataset's manner: dicts with a ``__key__``."""
        for step, images in zip(share, fetcher, strict=True):
            left = sum(len(next(iter(columns.values()))) for columns in self.steps[step])
            for columns in self.steps[step]:
                for values in zip(*(column.tolist() for column in columns.values()), strict=True):
                    left -= 1
                    sample: Sample = dict(zip(columns, values, strict=True))
                    rows = {kind: sample[kind] for kind in ("tile", "view") if kind in sample}
                    key = self.members.keys[self.members.place[next(iter(rows.values()))]]
                    encoded = {kind: images[row] for kind, row in rows.items()}
                    yield sample | encoded | {"__key__": key, "__rows__": rows, "__last__": left == 0}

    def _decode(self, sample: Sample) -> Sample:
        """The sample with ``tile`` and ``view`` as pixels."""
        for kind, row in sample["__rows__"].items():
            height, width = self.sizes.tile if kind == "tile" else self.sizes.view
            try:
                sample[kind] = decode_image(sample[kind], height, width)
            except BadInput as error:
                raise BadInput(
                    f"{self.members.describe(row)}: {error}; replace the raw image and shard the dataset again"
                ) from error
        return sample


def plan_dataset(
    layout: Layout, plan: EpochPlan, sizes: ImageSizes, split: str = "train", change: Change | None = None
) -> StreamDataset:
    """The plan's batches: ``tile``, ``view`` and ``pair`` (the pair's id), and what ``change`` adds."""
    plan.validate(layout)
    pair = _pair_ids(layout.pairs(split), plan)
    tile, view = layout.member_rows(plan.place), layout.member_rows(plan.place, plan.view)
    steps = [[{"tile": tile[s], "view": view[s], "pair": pair[s]}] for s in range(len(plan.place))]
    return StreamDataset(MemberTable.of(layout), steps, sizes, change, plan.lanes)


def scan_dataset(
    layout: Layout, reference_place: Int32, pairs: Pairs, sizes: ImageSizes, batch_size: int
) -> StreamDataset:
    """Each tile of ``reference_place`` and each view of ``pairs`` once, in physical order.

    Batches are ``batch_size`` images and hold ``tile`` with ``reference`` (row in reference_place) and ``view`` with
    ``query`` (row in pairs); either may be missing.
    """
    tile, view = layout.member_rows(reference_place), layout.member_rows(pairs.place, pairs.view)
    rows = np.concatenate([tile, view])
    number = np.concatenate([np.arange(len(tile)), np.arange(len(view))])
    is_tile = np.arange(len(rows)) < len(tile)
    order = np.argsort(rows)  # members are sorted by shard and offset
    steps = []
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        tiles, views = part[is_tile[part]], part[~is_tile[part]]
        kinds: list[Columns] = [
            {"tile": rows[tiles], "reference": number[tiles]},
            {"view": rows[views], "query": number[views]},
        ]
        steps.append([columns for columns in kinds if len(next(iter(columns.values())))])
    return StreamDataset(MemberTable.of(layout), steps, sizes)


def load(dataset: StreamDataset, workers: int = 0, pin: bool = False) -> Batches:
    """The dataset's batches in order, made ahead by ``workers`` processes, or by one thread where there are none.

    Close the iterator to end them early. ``pin``: put tensors into page-locked memory, for copies to a GPU.
    Raises BadInput where the workers cannot be dealt the plan's lanes.
    """
    if workers and dataset.lanes is not None and dataset.lanes % workers:
        raise BadInput(
            f"{workers} loader workers cannot share {dataset.lanes} lanes evenly; "
            "choose a number of workers that divides lanes, or plan with more lanes"
        )
    if not workers:
        return _ahead((_pinned(batch) for batch in dataset) if pin else iter(dataset))
    # forkserver: a fork of this process would copy torch's and obstore's threads in the middle of what they do.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=DEPTH,
        collate_fn=_unchanged,
        pin_memory=pin,
        multiprocessing_context=context,
    )
    return _raised(loader)


def _ahead(batches: Batches) -> Batches:
    """``batches``, made by a thread up to DEPTH before they are wanted."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(DEPTH)
    stop = threading.Event()

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


def _raised(items: Iterable[Batch | GeostreamError]) -> Batches:
    """Batches from workers; an error that one of them yielded is raised."""
    for item in items:
        if isinstance(item, GeostreamError):
            raise item
        yield item


def _unchanged(batch: Any) -> Any:
    return batch


def _pinned(batch: Batch) -> Batch:
    return batch._replace(tensors={name: tensor.pin_memory() for name, tensor in batch.tensors.items()})


def _collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Columns of the samples as tensors; a column holds those samples that have it."""
    names = dict.fromkeys(name for sample in samples for name in sample if not name.startswith("__"))
    tensors = {}
    for name in names:
        values = np.stack([sample[name] for sample in samples if name in sample])
        tensor = torch.from_numpy(values)
        tensors[name] = tensor.permute(0, 3, 1, 2) if name in ("tile", "view") else tensor
    return tensors


def _member_rows(step: list[Columns]) -> Int64:
    """All rows in members that a step needs."""
    return np.concatenate([columns[kind] for columns in step for kind in ("tile", "view") if kind in columns])


def _pair_ids(pairs: Pairs, plan: EpochPlan) -> Int64:
    """(B, batch) ids of the plan's pairs; pairs are sorted by place and view."""
    return np.searchsorted(pair_codes(*pairs), pair_codes(plan.place, plan.view))


__all__ = ["Batch", "ImageSizes", "Pixels", "StreamDataset", "load", "plan_dataset", "scan_dataset"]
