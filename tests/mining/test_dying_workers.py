"""A visual search on a Dask cluster of processes, one of which is killed in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from geostream.errors import NotFound
from geostream.mining import approximate, exact
from geostream.mining.graph import open_graph
from geostream.mining.visual import build_visual_graph
from geostream.store import Store
from tests.cities import city
from tests.mining.test_approximate import K, embed, recall, true_neighbours


@pytest.mark.parametrize("search", ["exact", pytest.param("approximate", marks=pytest.mark.slow)])
def test_a_killed_worker_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str) -> None:
    """The graph is that of a search which nothing befell, and until its end there is none."""
    from distributed import LocalCluster

    for module in (exact, approximate):  # only the client cuts blocks; workers take what they are told
        monkeypatch.setattr(module, "BLOCK", 512)
        monkeypatch.setattr(module, "QUERIES", 256)
    root = Store.open(tmp_path)
    layout = city(root, side=34, areas=2)
    run, name = root.child("run"), "neighbours/v.zarr"
    embeddings = embed(run, layout, clusters=12)
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        killed: list[int] = []

        def kill() -> None:
            """SIGKILL a worker that holds results, once a tenth of the work is done."""
            while not killed:
                time.sleep(0.01)
                done = [task for task in list(cluster.scheduler.tasks.values()) if task.state == "memory"]
                if len(done) >= 8:
                    with pytest.raises(NotFound, match="not committed"):
                        open_graph(run, name, layout)
                    killed.append(cluster.workers[0].pid)
                    os.kill(killed[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        graph = build_visual_graph(run, name, layout, embeddings, K, cluster.scheduler_address, search)  # type: ignore[arg-type]
        killer.join(10)
        assert killed and cluster.workers[0].pid != killed[0]  # its nanny has started another
    lists = true_neighbours(layout, embeddings)
    if search == "exact":
        assert graph.indices.tolist() == lists
    else:
        assert graph.search["mode"] == "approximate" and recall(graph, lists) > 0.98
    calm = build_visual_graph(run, "neighbours/calm.zarr", layout, embeddings, K, search=search)  # type: ignore[arg-type]
    assert np.array_equal(graph.indices, calm.indices) and np.array_equal(graph.scores, calm.scores)
    assert graph.search == calm.search
    assert sorted(info.path.removeprefix(name) for info in run.list(name)) == sorted(
        info.path.removeprefix("neighbours/calm.zarr") for info in run.list("neighbours/calm.zarr")
    )
