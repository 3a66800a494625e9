"""Share the batches of a plan or a scan among ranks and loader workers, as a torch IterableDataset.

Step s of a plan belongs to lane s % lanes. Rank r of R takes the steps cursor + r, cursor + r + R, and so on; its
loader workers take turns in these. The number of ranks times workers must divide the lanes. Any such number gives the
same batches in the same global order, and no two workers read the same shard. A position is therefore one number,
whatever the number of ranks and workers.

The order of a scan does not matter, so each rank and worker takes one consecutive part of it. The dataset itself draws
no random numbers; ``change`` draws its own from (seed, epoch, pair).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from geostream.arrays import Int32, Pairs, pair_codes
from geostream.errors import BadInput, GeostreamError, StaleArtefact
from geostream.layout import Layout
from geostream.layout.members import MemberTable
from geostream.planning.plan import EpochPlan
from geostream.store.forks import check_process
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import Batch, Change, Columns, ImageSizes, Pipeline, Replacement, Worker
from geostream.streaming.replace import Substitutes
from geostream.streaming.workers import enter_worker

State = dict[str, Any]
Batches = Generator[Batch, None, None]  # closed to end early


class PlanSource(NamedTuple):
    """The facts about a plan that a dataset of its steps needs."""

    plan: str  # hash
    lanes: int  # ranks and workers take steps in turn, and their number must divide it
    replacement: Replacement  # of pairs with a damaged image


class StreamDataset(IterableDataset[Batch]):
    """The batches of one rank; made by :func:`plan_dataset` and :func:`scan_dataset`.

    Args:
        members: Where the images are.
        steps: The samples of each batch, over all ranks.
        sizes: Height and width of the images that are delivered.
        change: Applied to each decoded sample.
        options: What reading may cost.
        rank: Number of this process, from 0.
        ranks: How many ranks there are.
        source: The plan that the steps are from. With None the order of the batches does not matter: each worker of
            each rank takes one consecutive part of the steps, and a damaged image is an error.

    Raises:
        BadInput: The ranks cannot share the plan's lanes evenly. While iterating: a batch does not fit into the budget,
            or an image cannot be decoded and ``source`` is None.
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
        members: MemberTable,
        steps: Sequence[list[Columns]],
        sizes: ImageSizes,
        *,
        change: Change | None = None,
        options: ReadOptions | None = None,
        rank: int = 0,
        ranks: int = 1,
        source: PlanSource | None = None,
    ) -> None:
        self.members, self.steps, self.sizes, self.change = members, steps, sizes, change
        self.options = options or ReadOptions()
        self.rank, self.ranks = rank, ranks
        self.plan = "" if source is None else source.plan
        self.lanes = None if source is None else source.lanes
        self.replacement = None if source is None else source.replacement
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
            check_process(self.members.store.url)  # before there are threads that would wait
            yield from Pipeline(
                self.members,
                [(step, self.steps[step]) for step in self._share(worker, workers)],
                self.sizes,
                self.change,
                self.options.share(max((self.lanes or 1) // (self.ranks * workers), 1), workers),
                self.replacement,
                Worker(worker, self.threads, self.pin, self.stop),
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
    pairs = layout.pairs(split)
    pair = np.searchsorted(pair_codes(*pairs), pair_codes(plan.place, plan.view))
    tile, view = layout.member_rows(pairs.place), layout.member_rows(pairs.place, pairs.view)
    rule = Substitutes(plan.place, plan.view, plan.left_out_place, plan.left_out_view, layout.excluded(split))
    # Of the whole epoch's pairs, wherever it continues and however many share it: bad ones come in clusters.
    limit = max(1, int((options or ReadOptions()).replaced_limit * plan.place.size))
    return StreamDataset(
        MemberTable.of(layout),
        [[{"tile": tile[ids], "view": view[ids], "pair": ids}] for ids in pair],
        sizes,
        change=change,
        options=options,
        rank=rank,
        ranks=ranks,
        source=PlanSource(plan.hash, plan.lanes, Replacement(rule, tile, view, pairs, limit)),
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
        BadInput: The layout lacks one of the images.
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
    return StreamDataset(MemberTable.of(layout), steps, sizes, options=options, rank=rank, ranks=ranks)
