"""Share the batches of a plan or a scan among ranks and loader workers, as a torch IterableDataset.

Step s of a plan belongs to lane s % lanes. Rank r of R takes the steps cursor + r, cursor + r + R, and so on; its
loader workers take turns in these. The number of ranks times workers must divide the lanes. Any such number gives the
same batches in the same global order, and no two workers read the same shard. A position is therefore one number,
whatever the number of ranks and workers.

The order of a scan does not matter, so each rank and worker takes one consecutive part of it. The dataset itself draws
no random numbers; ``change`` draws its own from (seed, epoch, pair).
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from geostream.arrays import Int32, Int64, Pairs, distinct
from geostream.errors import BadInput, GeostreamError, StaleArtefact
from geostream.layout import Layout
from geostream.layout.members import MemberTable
from geostream.planning.plan import EpochPlan
from geostream.store.forks import check_process
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import Batch, Change, Columns, ImageSizes, Pipeline, Replacement, Worker
from geostream.streaming.shared import PlanBatches, SharedRows
from geostream.streaming.workers import enter_worker

State = dict[str, Any]
Batches = Generator[Batch, None, None]  # closed to end early


class Part(NamedTuple):
    """What one reader needs for its steps."""

    members: MemberTable  # of the shards that it reads
    samples: Sequence[list[Columns]]  # of each step
    replacement: Replacement | None  # of pairs with a damaged image; None: such an image is an error


class Steps(Protocol):
    """The steps of a plan or a scan, over all ranks."""

    @property
    def layout(self) -> Layout:
        """The layout to read from."""

    def __len__(self) -> int:
        """Return the number of steps."""

    def part(self, steps: range) -> Part:
        """Open what is needed for some of the steps, in the process that reads them."""


@dataclass(frozen=True)
class PairBatches(Sequence[list[Columns]]):
    """The samples of some batches of pairs, 8 bytes each, as columns that are made when they are asked for."""

    tile: Int32  # (B, batch size) rows of the tiles in the table of members
    view: Int32  # the same of the views
    steps: range  # (B,) of the plan
    pair: SharedRows[np.int32]  # (steps of the plan, batch size) pair ids

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> list[Columns]: ...

    @overload
    def __getitem__(self, index: slice) -> PairBatches: ...

    def __getitem__(self, index: int | slice) -> list[Columns] | PairBatches:
        if isinstance(index, slice):
            return PairBatches(self.tile[index], self.view[index], self.steps[index], self.pair)
        return [{"tile": self.tile[index], "view": self.view[index], "pair": self.pair[self.steps[index]]}]


@dataclass(frozen=True)
class PlanSteps:
    """The steps of a plan. A reader opens the index of its own lanes' shards only.

    A worker gets the plan as a file (:mod:`geostream.streaming.shared`). It reads the index itself, and then holds 48
    bytes for each of its own pairs. While it looks up a lane's images, it takes 40 bytes for each of them.
    """

    layout: Layout
    plan: PlanBatches
    shards: list[Int32]  # of each lane
    replacement: Replacement  # of pairs with a damaged image

    def __len__(self) -> int:
        return len(self.plan)

    def part(self, steps: range) -> Part:
        """Read the index of the steps' lanes, and find the images of each step in it."""
        turn, plan = len(self.shards), self.plan
        own = steps[: turn // math.gcd(steps.step, turn)]  # the first of each lane; then they come in turn again
        shards = [self.shards[step % turn] for step in own]
        members = MemberTable.of(self.layout, np.concatenate([np.zeros(0, np.int32), *shards]))
        tile, view = np.empty((2, len(steps), plan.place.shape[1]), dtype=np.int32)
        for lane, of_lane in enumerate(shards):
            batches, lookup = steps[lane :: len(own)], members.lookup(of_lane)
            place, number = plan.place.take(batches), plan.view.take(batches)
            tile[lane :: len(own)] = lookup.rows(place.ravel()).reshape(place.shape)
            view[lane :: len(own)] = lookup.rows(place.ravel(), number.ravel()).reshape(place.shape)
        return Part(members, PairBatches(tile, view, steps, plan.pair), self.replacement)


@dataclass(frozen=True)
class ScanSteps:
    """The steps of a scan: each image once, in the order in which they lie in the shards.

    A reader opens the index of the shards of its own steps only. Sending it to a worker takes 8 bytes a reference and
    10 a pair.
    """

    layout: Layout
    reference_place: Int32  # (R,) places whose tiles are read
    pairs: Pairs  # the P views that are read
    shard: tuple[Int32, Int32]  # (R,) and (P,) the shards in which they lie
    batch_size: int

    def __len__(self) -> int:
        return -(-int(self._before[-1]) // self.batch_size)

    @cached_property
    def _before(self) -> Int64:
        """(S + 1,) number of images to read that lie in front of each shard, and of all."""
        count = np.bincount(np.concatenate(self.shard), minlength=len(self.layout.shard_names))
        return np.concatenate([[0], np.cumsum(count)])

    def part(self, steps: range) -> Part:
        """Read the index of the shards that the steps begin and end in, and of those between, and find the images."""
        start, stop = (min(step * self.batch_size, int(self._before[-1])) for step in (steps.start, steps.stop))
        low, high = int(np.searchsorted(self._before, start, "right")) - 1, int(np.searchsorted(self._before, stop))
        members = MemberTable.of(self.layout, np.arange(low, high, dtype=np.int32))
        lookup = members.lookup()
        tile, view = (np.flatnonzero((shard >= low) & (shard < high)) for shard in self.shard)
        rows = np.concatenate(
            [
                lookup.rows(self.reference_place[tile]),
                lookup.rows(self.pairs.place[view], self.pairs.view[view]),
            ]
        )
        number, is_tile = np.concatenate([tile, view]), np.arange(len(rows)) < len(tile)
        before = int(self._before[low])
        order = np.argsort(rows)[start - before : stop - before]  # members are sorted by shard and offset
        samples = []
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            tiles, views = batch[is_tile[batch]], batch[~is_tile[batch]]
            kinds: list[Columns] = [
                {"tile": rows[tiles], "reference": number[tiles]},
                {"view": rows[views], "query": number[views]},
            ]
            samples.append([columns for columns in kinds if len(next(iter(columns.values())))])
        return Part(members, samples, None)


class StreamDataset(IterableDataset[Batch]):
    """The batches of one rank; made by :func:`plan_dataset` and :func:`scan_dataset`.

    Args:
        steps: The steps, over all ranks.
        sizes: Height and width of the images that are delivered.
        change: Applied to each decoded sample.
        options: What reading may cost.
        rank: Number of this process, from 0.
        ranks: How many ranks there are.
        plan: Hash of the plan that the steps are from; "" for a scan.
        lanes: Number of the plan's lanes: ranks and workers take steps in turn, and their number must divide it. None
            for a scan, where each worker of each rank takes one consecutive part of the steps.

    Raises:
        BadInput: The ranks cannot share the plan's lanes evenly. While iterating: a batch does not fit into the budget,
            or an image of a scan cannot be decoded.
        StoreError: While iterating: a shard cannot be read, an image is damaged and cannot be replaced, or too many
            are. The message names place, member and shard.
        ForkedProcess: While iterating: this worker was forked from a process that has used the store. A plain
            DataLoader does so on Linux.
    """

    threads = 1  # that decode
    pin = False  # put images into page-locked memory
    stop: threading.Event | None = None  # set by another thread to end a pass; of this process only
    errors_as_items = False  # a worker yields an error as its last item: torch would bury it in a traceback

    def __init__(
        self,
        steps: Steps,
        sizes: ImageSizes,
        *,
        change: Change | None = None,
        options: ReadOptions | None = None,
        rank: int = 0,
        ranks: int = 1,
        plan: str = "",
        lanes: int | None = None,
    ) -> None:
        self.steps, self.sizes, self.change = steps, sizes, change
        self.options = options or ReadOptions()
        self.rank, self.ranks = rank, ranks
        self.plan, self.lanes = plan, lanes
        self.cursor = 0
        self.check_workers(1)

    def check_workers(self, workers: int) -> None:
        """Check that the plan's lanes can be shared evenly.

        Args:
            workers: Loader workers of each rank.

        Raises:
            BadInput: Ranks times workers does not divide the lanes, or the rank does not exist.
        """
        if not 0 <= self.rank < self.ranks:
            raise BadInput(f"rank {self.rank} of {self.ranks}: ranks count from 0")
        if self.lanes is not None and self.lanes % (self.ranks * workers):
            raise BadInput(
                f"{self.ranks} ranks with {workers} loader workers each cannot share {self.lanes} lanes evenly; "
                "choose numbers whose product divides lanes, or plan with more lanes"
            )

    def state_dict(self) -> State:
        """Return the position at which iterating begins.

        Returns:
            ``plan``, the plan's hash, and ``cursor``, the number of its batches that all ranks together have done.
        """
        return {"plan": self.plan, "cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin at a stored position the next time the dataset is iterated.

        Args:
            state: As :meth:`state_dict` returned it.

        Raises:
            StaleArtefact: The position is one in another plan.
            BadInput: The state is no position, or is outside the plan.
        """
        try:
            plan, cursor = str(state["plan"]), operator.index(state["cursor"])
        except (KeyError, TypeError) as error:
            raise BadInput(f"{state!r}: no position in a stream; it has a plan and a cursor") from error
        if plan != self.plan:
            raise StaleArtefact(f"position in plan {plan[:12]}, not in this one ({self.plan[:12]}); load its own plan")
        if not 0 <= cursor <= len(self.steps):
            raise BadInput(f"position {cursor} in a plan of {len(self.steps)} batches")
        self.cursor = cursor

    def __len__(self) -> int:
        """Return how many batches this rank still has to make."""
        return len(self._share(0, 1))

    def __iter__(self) -> Batches:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            enter_worker(self.errors_as_items)
        try:
            check_process(self.steps.layout.store.url)  # before there are threads that would wait
            share = self._share(worker, workers)
            part = self.steps.part(share)
            yield from Pipeline(
                part.members,
                share,
                part.samples,
                self.sizes,
                self.change,
                self.options.share(workers),
                part.replacement,
                Worker(worker, max((self.lanes or 1) // (self.ranks * workers), 1), self.threads, self.pin, self.stop),
            ).batches()
        except GeostreamError as error:
            if info is None or not self.errors_as_items:
                raise
            yield error  # type: ignore[misc]  # raised by the Loader in the trainer's process

    def _share(self, worker: int, workers: int) -> range:
        """Return the steps of one of this rank's ``workers``."""
        if self.lanes is None:
            start, stop = (_cut(len(self.steps), self.rank + part, self.ranks) for part in (0, 1))
            return range(start + _cut(stop - start, worker, workers), start + _cut(stop - start, worker + 1, workers))
        return range(self.cursor + self.rank + self.ranks * worker, len(self.steps), self.ranks * workers)


def _cut(length: int, part: int, parts: int) -> int:
    """Return where part number ``part`` begins when ``length`` is cut into ``parts`` of nearly equal size."""
    return length * part // parts


def plan_dataset(
    layout: Layout,
    plan: EpochPlan,
    sizes: ImageSizes,
    split: str = "train",
    change: Change | None = None,
    *,
    options: ReadOptions | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> StreamDataset:
    """Make the dataset of one rank's batches of a plan.

    Args:
        layout: The layout that the plan was made for.
        plan: The epoch's plan.
        sizes: Height and width of the images that are delivered.
        split: The split whose pairs the plan orders.
        change: Applied to each sample, a dict of ``tile`` and ``view`` (pixels, (H, W, 3)) and ``pair`` (id). It may
            add columns.
        options: What reading may cost.
        rank: Number of this process, from 0.
        ranks: How many ranks there are.

    Returns:
        Batches of ``tile`` and ``view`` images and ``pair`` ids, with rows in the plan's order.

    Raises:
        StaleArtefact: The plan is for another layout.
        BadInput: The ranks cannot share the plan's lanes evenly.
    """
    plan.validate(layout)
    # Of the whole epoch's pairs, wherever it continues and however many share it: bad ones come in clusters.
    limit = max(1, int((options or ReadOptions()).replaced_limit * plan.place.size))
    batches = PlanBatches.of(plan, layout.pairs(split))
    shards = [distinct(layout.shard_of_place[plan.place[lane :: plan.lanes]]) for lane in range(plan.lanes)]
    return StreamDataset(
        PlanSteps(layout, batches, shards, Replacement(layout, split, batches, limit)),
        sizes,
        change=change,
        options=options,
        rank=rank,
        ranks=ranks,
        plan=plan.hash,
        lanes=plan.lanes,
    )


def scan_dataset(
    layout: Layout,
    reference_place: Int32,
    pairs: Pairs,
    sizes: ImageSizes,
    batch_size: int,
    *,
    options: ReadOptions | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> StreamDataset:
    """Make a dataset that reads each given tile and view once, in the order in which they lie in the shards.

    Args:
        layout: The layout to read from.
        reference_place: (R,) places whose tiles are read.
        pairs: The views that are read.
        sizes: Height and width of the images that are delivered.
        batch_size: Images of a batch, tiles and views together.
        options: What reading may cost.
        rank: Number of this process, from 0.
        ranks: How many ranks there are; each reads its part.

    Returns:
        Batches of ``tile`` images with ``reference`` (rows of ``reference_place``) and ``view`` images with ``query``
        (rows of ``pairs``). Either kind may be missing in a batch.

    Raises:
        BadInput: While iterating: the layout lacks one of the images.
    """
    shard = layout.shard_of_place[reference_place], layout.shard_of_place[pairs.place]
    steps = ScanSteps(layout, reference_place, pairs, shard, batch_size)
    return StreamDataset(steps, sizes, options=options, rank=rank, ranks=ranks)
