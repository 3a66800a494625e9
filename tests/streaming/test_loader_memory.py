"""What a trainer and its loader processes hold of a plan is so many bytes a pair or an image, and not of all lanes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from geostream.layout import Layout, index, open_layout
from geostream.planning.plan import EpochPlan, load_plan, save_plan
from geostream.store import Store
from geostream.streaming.dataset import PlanSteps, plan_dataset
from geostream.streaming.fetch import Fetcher
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import _Needed
from tests.benchmarks import scale_places
from tests.streaming.plans import SIZES, as_in_a_worker

N, LANES, WORKERS, BATCH = 40_000, 16, 2, 10
IMAGES = 2 * N // WORKERS  # of a worker
ROWS = 1000  # in a row group


class InOrder(scale_places.Ground):
    """Places that lie on the ground, and in the shards, in the order of their ids."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.place = self.cell = np.arange(n, dtype=np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a layout whose index has many row groups."""
    made = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_places, "ROW_GROUP", ROWS)
        scale_places.commit(Store.open(made), InOrder(N))
    return made


@pytest.fixture
def layout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr(index, "WHOLE_ROWS", 0)  # read by row groups, as a large index is
    return open_layout(Store.open(folder))


@pytest.fixture
def plan(layout: Layout) -> EpochPlan:
    """In no batch are two neighbours."""
    place = np.arange(N, dtype=np.int32).reshape(LANES, BATCH, -1).transpose(2, 0, 1).reshape(-1, BATCH)
    none = np.zeros(0, np.int32)
    names = (layout.id, 1, 0, "by hand", "random", "")
    return EpochPlan(*names, LANES, BATCH, place, np.zeros(place.shape, np.int16), none, none.astype(np.int16))


@contextmanager
def traced() -> Iterator[Callable[[], tuple[int, int]]]:
    """Yield a function that returns the bytes that are held, and the most that were."""
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()


def test_a_worker_holds_what_its_own_lanes_need(layout: Layout, plan: EpochPlan) -> None:
    """32 bytes an image: 20 for the table, 6 for the schedule, 4 for the batches, 1 for what was used, and some more.

    While they are made, room counts here that the operating system does not give: 10 bytes in the table. The sixteenth
    part of 100 bytes is what a lane takes while it is scheduled.
    """
    steps = plan_dataset(layout, plan, SIZES).steps
    assert isinstance(steps, PlanSteps)
    shards = 1000 * len(layout.shard_names)  # that the layout knows
    with traced() as memory:
        there = as_in_a_worker(steps)
        assert memory()[1] < shards  # nothing of the plan
        part = there.part(range(0, len(steps), WORKERS))
        fetcher = Fetcher(part.members, _Needed(part.samples), ReadOptions(), LANES // WORKERS)
        held, peak = memory()
    assert len(part.members.crc32c) == fetcher.schedule.row.size == IMAGES
    assert held < 43 * IMAGES + shards
    assert peak < 50 * IMAGES + shards


def test_a_trainer_holds_few_bytes_a_pair(layout: Layout, plan: EpochPlan, tmp_path: Path) -> None:
    """22 bytes: 6 of the plan, 4 of pair ids, 4 of the places' shards, 7 of all views; Arrow's are not counted."""
    plans = Store.open(tmp_path)
    save_plan(plans, plan)
    with traced() as memory:
        dataset = plan_dataset(layout, load_plan(plans, 1, layout), SIZES)
        held, peak = memory()
    assert len(dataset) == plan.n_batches
    assert held < 24 * N
    assert peak < 55 * N
