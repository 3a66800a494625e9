"""``python -m tests.benchmarks.plan_speed PAIRS``: one plan of so many pairs, in this process; a line of JSON.

The graph is made up (neighbours lie within a few shards in the clustered order), since mining a million places is not
what is measured. Two plans before are given, as in the middle of a run; of the third, ``make_plan`` alone is timed.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from geostream.layout import Layout
from geostream.mining.graph import SHARD_ROWS, GraphWriter, NeighbourGraph, open_graph
from geostream.planning.make_plan import make_plan
from geostream.runs.run import GPS_GRAPH
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.benchmarks.index_only import commit_index, members_of, places_table

K = 128
PER_SHARD = 480
REACH = 600  # rows either way among which a place's neighbours are drawn


def main() -> None:
    n = int(sys.argv[1])
    rng = np.random.default_rng(0)
    views = np.ones(n, dtype=np.int64)
    side = int(np.ceil(np.sqrt(n)))
    position = np.stack(np.divmod(np.arange(n), side), axis=1) * 35.0
    with tempfile.TemporaryDirectory() as temporary:
        members = members_of(views, 0)
        table = places_table(np.zeros(n, dtype=np.int64), position, views)
        shards = np.split(np.arange(n), range(PER_SHARD, n, PER_SHARD))
        store = Store.open(Path(temporary))
        layout = commit_index(store, "base", table, members, shards, coordinates="utm")
        run = store.child("run")
        writer = GraphWriter.create(
            run, GPS_GRAPH, kind="gps", layout=layout, embeddings="", places=np.arange(n, dtype=np.int32), k=K
        )
        for start in range(0, n, SHARD_ROWS):
            row = np.arange(start, min(start + SHARD_ROWS, n), dtype=np.int32)
            offset = rng.integers(1, REACH, size=(len(row), K)) * rng.choice(np.array([-1, 1]), (len(row), K))
            scores = np.broadcast_to(-np.arange(1, K + 1, dtype=np.float32), offset.shape)
            writer.write(start, np.clip(row[:, None] + offset, 0, n - 1).astype(np.int32), scores)
        writer.commit({})
        measure(layout, open_graph(run, GPS_GRAPH, layout))


def measure(layout: Layout, graph: NeighbourGraph) -> None:
    """Print a line of JSON about one plan."""
    settings = TrainSettings().changed(lanes=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    before = [make_plan(layout, graph, settings, epoch, 0) for epoch in (2, 1)]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started, cpu = time.perf_counter(), time.process_time()
    plan = make_plan(layout, graph, settings, 3, 0, before)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({"seconds": seconds, "cpu_seconds": cpu, "batches": plan.n_batches, "held_bytes": max(held, peak)})
    )


if __name__ == "__main__":
    main()
