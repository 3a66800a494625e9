"""What the process that plans an epoch holds for each pair."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geostream.layout import Layout, open_layout
from geostream.layout import layout as layouts
from geostream.layout.index import Index
from geostream.mining.embeddings import open_embeddings
from geostream.mining.graph import GraphWriter, open_graph
from geostream.planning import earlier, hardness
from geostream.planning.batches import LaneTask
from geostream.planning.plan import EpochPlan
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.benchmarks import scale_places

make_plan_module = import_module("geostream.planning.make_plan")  # the package's own name of it is the function
K, LANES, BATCH = 4, 8, 32
BOUND = 120  # bytes a pair, at the most


def test_the_planner_holds_few_bytes_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lanes that are sent at a time. Blocks are small here, so that they do not count as growth."""
    monkeypatch.setattr(make_plan_module, "WHOLE_GRAPH", 0)
    monkeypatch.setattr(make_plan_module, "TRIED_PAIRS", 0)
    monkeypatch.setattr(earlier, "BLOCK", 16)
    monkeypatch.setattr(Index, "is_whole", False)
    monkeypatch.setattr(layouts, "LISTED", 1024)
    monkeypatch.setattr(hardness, "SAMPLED_BATCHES", 8)
    monkeypatch.setattr(scale_places, "ROW_GROUP", 2048)
    small, large = 10_000, 30_000
    peaks = {n: _peak(tmp_path / str(n), n) for n in (small, large)}
    assert (peaks[large] - peaks[small]) / (large - small) <= BOUND


def _peak(folder: Path, n: int) -> int:
    """Return the most bytes that planning an epoch takes that has two plans before."""
    store, ground = Store.open(folder), scale_places.Ground(n)
    run = store.child("run")
    written = scale_places.commit(store, ground)
    scale_places.write_embeddings(run, written, ground, 4)
    places = np.arange(n, dtype=np.int32)
    writer = GraphWriter.create(
        run,
        "visual.zarr",
        kind="visual",
        layout=written,
        embeddings=scale_places.EMBEDDINGS,
        places=places,
        k=K,
    )
    writer.write(0, ((places[:, None] + np.arange(1, K + 1)) % n).astype(np.int32), np.zeros((n, K), np.float16))
    writer.commit({"mode": "exact"})
    del written, ground
    settings = TrainSettings().changed(batch_size=BATCH, lanes=LANES, neighbours=K)

    tracemalloc.start()
    try:
        layout = open_layout(store)
        graph = open_graph(run, "visual.zarr", layout)
        embeddings = open_embeddings(run, scale_places.EMBEDDINGS, layout)
        before = (_plan(layout, epoch) for epoch in (2, 1))
        plan = make_plan_module.make_plan(layout, graph, settings, 3, 0, before, embeddings, _any_batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.n_batches * BATCH > 0.8 * n and plan.quality["overlap"] is not None
    return peak


def _plan(layout: Layout, epoch: int) -> EpochPlan:
    place, view = layout.pairs("train")
    mixed = np.random.default_rng(epoch).permutation(len(place)).astype(np.int32)
    batches, left = mixed[: len(mixed) // BATCH * BATCH].reshape(-1, BATCH), mixed[len(mixed) // BATCH * BATCH :]
    arrays = (place[batches], view[batches], place[left], view[left])
    return EpochPlan(layout.id, epoch, 0, "random", "random", "", 1, BATCH, *arrays)


def _any_batches(work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """Apply a function as ``map`` does, but leave the lanes' own work out, which workers do."""
    for task in tasks:
        if isinstance(task, LaneTask):
            mixed = np.random.default_rng(task.seed).permutation(len(task.problem.place)).astype(np.int32)
            yield task.key, mixed[: len(mixed) // BATCH * BATCH].reshape(-1, BATCH)
        else:
            yield work(task)
