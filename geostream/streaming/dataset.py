"""The dataset: which of a plan's batches a reader makes, as torch's IterableDataset.

Decides who makes which batch. Step s of a plan belongs to lane s % lanes; rank r of R takes the steps cursor + r,
cursor + r + R, …, and of those its loader workers take turns. So any number of ranks times workers that divides the
lanes gives the same batches in the same global order, no two of them read the same shard, and a position is one number
that means the same to all of them. A scan has no order to keep: each rank and worker takes one run of it. Randomness is
none of the dataset's: ``change`` draws from (seed, epoch, pair).
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
    """The plan that a dataset's steps are from, as far as the dataset needs to know it."""

    plan: str  # hash
    lanes: int  # ranks and workers take steps in turn, and their number must divide it
    replacement: Replacement  # of pairs with a damaged image


class StreamDataset(IterableDataset[Batch]):
    """Batches of what a list of steps asks for; made by :func:`plan_dataset` and :func:`scan_dataset`.

    Raises what the fetcher raises, and StoreError or BadInput naming place, member and shard where an image is damaged
    and can't be replaced, or too many were; ForkedProcess in a worker that was forked from a process that has used the
    store, as a plain DataLoader does on Linux.
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
        """Make the dataset of this rank.

        Args:
            members: where the images are.
            steps: the samples of each batch, over all ranks.
            sizes: height and width of the images that are delivered.
            change: done to each decoded sample.
            options: what reading may cost.
            rank: of this process, from 0.
            ranks: how many there are.
            source: the plan that the steps are from. None: the order of the batches does not matter, each worker of
                each rank takes one run of steps, so that no two read the same shard, and a damaged image is an error.

        Raises:
            BadInput: the ranks cannot share the lanes of the plan evenly.
        """
        self.members, self.steps, self.sizes, self.change = members, steps, sizes, change
        self.options = options or ReadOptions()
        self.rank, self.ranks = rank, ranks
        self.plan = "" if source is None else source.plan
        self.lanes = None if source is None else source.lanes
        self.replacement = None if source is None else source.replacement
        self.cursor = 0
        self.check_workers(1)

    def check_workers(self, workers: int) -> None:
        """Raise BadInput where ``workers`` on each rank cannot be dealt the lanes evenly."""
        if not 0 <= self.rank < self.ranks:
            raise BadInput(f"rank {self.rank} of {self.ranks}: ranks count from 0")
        if self.lanes is not None and self.lanes % (self.ranks * workers):
            raise BadInput(
                f"{self.ranks} ranks with {workers} loader workers each cannot share {self.lanes} lanes evenly; "
                "choose numbers whose product divides lanes, or plan with more lanes"
            )

    def state_dict(self) -> State:
        """Where iterating begins: the plan's hash, and the number of its batches that all ranks together are past."""
        return {"plan": self.plan, "cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin at a stored position next time. Raises StaleArtefact for another plan's, BadInput for none at all."""
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
        """Batches that this rank has before it."""
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
        """The steps of one of this rank's ``workers``."""
        if self.lanes is None:
            start, stop = (_cut(len(self.steps), self.rank + part, self.ranks) for part in (0, 1))
            return range(start + _cut(stop - start, worker, workers), start + _cut(stop - start, worker + 1, workers))
        return range(self.cursor + self.rank + self.ranks * worker, len(self.steps), self.ranks * workers)


def _cut(length: int, part: int, parts: int) -> int:
    """Where part number ``part`` begins when ``length`` is cut into ``parts`` that differ by one at most."""
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
    """The plan's batches: ``tile`` and ``view`` images and ``pair`` ids, rows as the plan orders them.

    ``change`` is given each sample ({"tile", "view": pixels (H, W, 3), "pair": id}) and may add columns. Raises
    StaleArtefact for a plan of another layout, BadInput where the ranks cannot be dealt the plan's lanes.
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
    """Each tile of ``reference_place`` and each view of ``pairs`` once, in physical order; each rank has its part.

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
    return StreamDataset(MemberTable.of(layout), steps, sizes, options=options, rank=rank, ranks=ranks)
