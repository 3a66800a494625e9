"""Store and load epoch plans: the ordered batches of one epoch for one layout.

The plan alone says what is trained when. Every reader derives its schedule from it, and a checkpoint holds a position
in it. So it is stored whole (12 bytes a pair before compression) instead of being made again from its seed. It names
the layout and the graph that it came from, and a reader refuses a plan that was changed or is for another layout. The
JSON file (``epoch-0005.json``) is written last: without it there is no plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from geostream.arrays import Int32, Int64, Pairs, pair_codes
from geostream.errors import GeostreamError, NotFound, StaleArtefact
from geostream.layout import Layout
from geostream.store import Store

FORMAT = 1
CHECKED = 1024  # batches that are checked at once
STEP = 2**32 - 1  # the bits of a number that hold a step
MET = "a query meets its semi-positive"


@dataclass(frozen=True)
class EpochPlan:
    """The batches of an epoch in global order: batch s is batch s // lanes of lane s % lanes.

    Attributes:
        layout_id: Id of the layout that the plan is for.
        epoch: Number of the epoch, from 1.
        seed: Seed that the plan was made with.
        strategy: Name of the batch strategy.
        source: Kind of graph that the plan came from: "gps", "visual" or "random".
        graph: Path of that graph within the run; "" if there is none.
        lanes: Number of lanes, which all have the same number of batches.
        batch_size: Pairs in a batch.
        place: (B, batch size) place ids.
        view: (B, batch size) numbers of the views within their places.
        left_out_place: Place ids of the pairs that no batch holds.
        left_out_view: Numbers of their views.
        quality: What :func:`geostream.planning.make_plan.make_plan` measured.
    """

    layout_id: str
    epoch: int
    seed: int
    strategy: str
    source: str
    graph: str
    lanes: int
    batch_size: int
    place: Int32
    view: npt.NDArray[np.int16]
    left_out_place: Int32
    left_out_view: npt.NDArray[np.int16]
    quality: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_batches(self) -> int:
        """Number of batches, B."""
        return len(self.place)

    @property
    def lane(self) -> Int32:
        """Lane of each batch, (B,)."""
        return np.arange(self.n_batches, dtype=np.int32) % np.int32(self.lanes)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything but the measured quality."""
        names = [self.layout_id, self.strategy, self.source, self.graph]
        numbers = [int(number) for number in (self.epoch, self.seed, self.lanes, self.batch_size)]
        digest = hashlib.sha256(json.dumps([names, numbers]).encode())
        for array, kind in (
            (self.place, "<i4"),
            (self.view, "<i2"),
            (self.left_out_place, "<i4"),
            (self.left_out_view, "<i2"),
        ):
            digest.update(np.ascontiguousarray(array, dtype=kind).ravel().data)
        return digest.hexdigest()

    def validate(self, layout: Layout) -> None:
        """Check that the plan is for a layout and keeps the rules of a plan.

        Args:
            layout: The layout to read.

        Raises:
            StaleArtefact: The plan is for another layout.
            GeostreamError: Its batches are not full, its lanes not equally long, a training pair is missing or there
                twice, or a batch holds a place twice or two places that exclude each other.
        """
        name = f"plan of epoch {self.epoch}"
        if self.layout_id != layout.id:
            raise StaleArtefact(f"{name} was made for another layout than {layout.name}; plan the epoch again")
        if self.place.shape != (self.n_batches, self.batch_size) or self.n_batches % self.lanes:
            raise GeostreamError(f"{name}: its batches are not full or its lanes not equally long; plan again")
        if not self._holds_each_once(layout.pairs("train")):
            raise GeostreamError(f"{name}: it does not hold every training pair exactly once; plan again")
        where = self._where()
        twice = where[:-1][where[1:] == where[:-1]]
        for wrong, what in ((twice, "a place is twice in the batch"), (_met(where, layout), MET)):
            if len(wrong):
                raise GeostreamError(f"{name}, step {int((wrong & STEP).min())}: {what}; plan again")

    def _holds_each_once(self, pairs: Pairs) -> bool:
        """Return whether the plan holds each of some sorted pairs once; memory holds 8 bytes a pair."""
        n = self.place.size
        if n + len(self.left_out_place) != len(pairs):
            return False
        codes = np.empty(len(pairs), dtype=np.int64)
        for batches in self._blocks():
            some = slice(batches.start * self.batch_size, batches.stop * self.batch_size)
            codes[some] = pair_codes(self.place[batches], self.view[batches]).ravel()
        codes[n:] = pair_codes(self.left_out_place, self.left_out_view)
        codes.sort()
        step = CHECKED * self.batch_size
        return all(
            np.array_equal(codes[some], pair_codes(pairs.place[some], pairs.view[some]))
            for some in (slice(start, start + step) for start in range(0, len(codes), step))
        )

    def _where(self) -> Int64:
        """Return place << 32 | step for each pair in a batch, sorted."""
        where = np.empty(self.place.size, dtype=np.int64)
        for batches in self._blocks():
            some = slice(batches.start * self.batch_size, batches.stop * self.batch_size)
            step = np.arange(batches.start, batches.stop)[:, None]
            where[some] = (self.place[batches].astype(np.int64) << 32 | step).ravel()
        where.sort()
        return where

    def _blocks(self) -> Iterator[slice]:
        for first in range(0, self.n_batches, CHECKED):
            yield slice(first, min(first + CHECKED, self.n_batches))


def _met(where: Int64, layout: Layout) -> Int64:
    """Return those elements of :meth:`EpochPlan._where` that share their step with a semi-positive of their place."""
    met = [where[:0]]
    for place, other in layout.semi_positive_places("train"):
        apart = place != other
        place, other = place[apart].astype(np.int64), other[apart].astype(np.int64)
        first, last = (np.searchsorted(where, place + more << 32) for more in (0, 1))
        steps = last - first  # of the batches that each place is in
        at = np.arange(steps.sum()) + np.repeat(first - np.cumsum(steps) + steps, steps)
        wanted = np.sort(np.repeat(other, steps) << 32 | where[at] & STEP)  # sorted ones are found faster
        found = np.minimum(np.searchsorted(where, wanted), max(len(where) - 1, 0))
        met.append(wanted[where[found] == wanted] if len(where) else wanted[:0])
    return np.concatenate(met)


def plan_name(epoch: int) -> str:
    """Return the name of an epoch's plan within the folder of a run's plans, without the suffix."""
    return f"epoch-{epoch:04d}"


def save_plan(plans: Store, plan: EpochPlan) -> None:
    """Write a plan; an earlier one of the same epoch is replaced.

    Args:
        plans: The folder of a run's plans.
        plan: The plan.
    """
    name = plan_name(plan.epoch)
    plans.delete(f"{name}.json")
    step = np.repeat(np.arange(plan.n_batches, dtype=np.int32), plan.batch_size)
    rows = {
        "batch": _with(step, plan.left_out_place, -1),
        "lane": _with(plan.lane[step], plan.left_out_place, -1),
        "place": np.concatenate([plan.place.ravel(), plan.left_out_place]),
        "view": np.concatenate([plan.view.ravel(), plan.left_out_view]),
    }
    plans.write_table(f"{name}.parquet", pa.table(rows))
    arrays = {"place", "view", "left_out_place", "left_out_view"}
    facts = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in arrays}
    plans.write_json(f"{name}.json", {"format": FORMAT, "hash": plan.hash, **facts, "quality": dict(plan.quality)})


def _with(column: Int32, left_out: Int32, mark: int) -> Int32:
    """Append ``mark`` to a column for each pair left out."""
    return np.concatenate([column, np.full(len(left_out), mark, dtype=np.int32)])


def load_plan(plans: Store, epoch: int, layout: Layout | None) -> EpochPlan:
    """Load the stored plan of an epoch.

    Args:
        plans: The folder of a run's plans.
        epoch: Number of the epoch, from 1.
        layout: The layout that the plan must be for; None allows any.

    Raises:
        NotFound: The epoch has no plan.
        StaleArtefact: The plan is for another layout.
        GeostreamError: The plan was changed or damaged, or has another format.
    """
    name = plan_name(epoch)
    where = f"{plans.url}/{name}"
    try:
        facts = plans.read_json(f"{name}.json")
    except NotFound as error:
        raise NotFound(f"{where}.json: no plan of epoch {epoch}; make it with: geostream plan") from error
    damaged = f"{where}: the plan was changed or damaged since it was made; plan the epoch again"
    try:
        if facts.pop("format") != FORMAT:
            raise GeostreamError(f"{where}.json: a plan of another format than {FORMAT}; plan the epoch again")
        digest = facts.pop("hash")
        table = plans.read_table(f"{name}.parquet")
        in_batch = table["batch"].to_numpy() >= 0
        place, view = (
            table[column].to_numpy().astype(kind) for column, kind in (("place", np.int32), ("view", np.int16))
        )
        del table  # 14 bytes a pair
        n = int(np.count_nonzero(in_batch))
        if not in_batch[:n].all():
            raise ValueError("pairs left out come last")
        shape = (-1, facts["batch_size"])
        plan = EpochPlan(
            **facts,
            place=place[:n].reshape(shape),
            view=view[:n].reshape(shape),
            left_out_place=place[n:],
            left_out_view=view[n:],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GeostreamError(damaged) from error
    if plan.hash != digest:
        raise GeostreamError(damaged)
    if layout is not None and plan.layout_id != layout.id:
        raise StaleArtefact(f"{where}: made for another layout than {layout.name}; plan the epoch again")
    return plan
