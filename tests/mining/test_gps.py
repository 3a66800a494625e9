"""Geographic neighbour graphs of layouts, by one process and by several; also where something goes wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest

from geostream.arrays import Int32
from geostream.errors import BadInput, NotFound
from geostream.layout import Layout
from geostream.layout.index import Index
from geostream.mining import exact, gps
from geostream.mining import graph as graphs
from geostream.mining.gps import build_gps_graph, place_points, points_in_metres
from geostream.mining.graph import open_graph
from geostream.runs.run import GPS_GRAPH
from geostream.store import Store
from tests.cities import city
from tests.mining.places import Places, places


def test_points_of_degrees_are_metres_apart() -> None:
    """One degree of latitude is 111.195 km on the mean sphere, one of longitude half of that at 60° north."""
    points = points_in_metres(np.array([[60.0, 10.0], [60.01, 10.0], [60.0, 10.01]]), "latlon")
    distance = np.linalg.norm(points - points[0], axis=1)
    assert distance == pytest.approx([0, 1111.95, 555.97], abs=0.01)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks have at most 16 places or an eighth of all, and Zarr shards 32 rows."""
    monkeypatch.setattr(gps, "LEAST", 16)
    for module in (exact, graphs):
        monkeypatch.setattr(module, "SHARD_ROWS", 32)


@pytest.mark.parametrize("coordinates", ["utm", "latlon"])
def test_gps_graph(tmp_path: Path, coordinates: str, small: None) -> None:
    root = Store.open(tmp_path)
    layout = city(root, side=6, areas=2, views=2, coordinates=coordinates)  # type: ignore[arg-type]
    graph = build_gps_graph(root.child("run"), GPS_GRAPH, layout, k=8)
    assert graph.places.tolist() == list(range(72))  # the test place is none of them
    assert (graph.kind, graph.layout_id, graph.k) == ("gps", layout.id, 8)
    excluded = layout.excluded("train")
    for place, row, scores in zip(graph.places, graph.indices, graph.scores, strict=True):
        assert place not in row
        assert not np.isin(row, excluded.row(place)).any()
        assert (layout.area[row] == layout.area[place]).all()
        assert (np.diff(scores.astype(np.float64)) <= 0).all()
    assert -60 < graph.scores[:, 0].max() < -29  # a grid of about 35 m


def test_a_graph_by_many_blocks_is_brute_force(tmp_path: Path, small: None) -> None:
    layout = city(Store.open(tmp_path), side=9, areas=2, views=2, coordinates="latlon")
    graph = build_gps_graph(Store.open(tmp_path / "run"), GPS_GRAPH, layout, k=8)
    points, excluded = place_points(layout, graph.places), layout.excluded("train")
    for row, place in enumerate(graph.places.tolist()):
        metres = np.round(np.linalg.norm(points - points[row], axis=1), 3)
        metres[(layout.area[graph.places] != layout.area[place]) | np.isin(graph.places, excluded.row(place))] = np.inf
        metres[row] = np.inf
        keys = [layout.keys[other] for other in graph.places.tolist()]
        first = sorted(np.flatnonzero(np.isfinite(metres)).tolist(), key=lambda other: (metres[other], keys[other]))[:8]
        assert graph.indices[row].tolist() == graph.places[first].tolist()
        assert (graph.scores[row] == -metres[first].astype(np.float16)).all()


def test_places_without_coordinates_have_no_neighbours(tmp_path: Path) -> None:
    """All places are of a data set without coordinates; the other one that is joined has no training places."""
    parts = tuple(SimpleNamespace(coordinates=kind) for kind in ("none", "latlon"))
    layout = replace(cast("Places", places(100)), joined=cast("Any", parts))
    with patch("geostream.mining.gps.open_graph", lambda run, name, layout: open_graph(run, name, None)):
        graph = build_gps_graph(Store.open(tmp_path), GPS_GRAPH, cast("Layout", layout), 4)
    assert (graph.indices == -1).all() and np.isinf(graph.scores).all()


def test_what_a_build_that_was_cut_off_has_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    """The next build has fewer blocks; until it ends there is no graph."""
    root = Store.open(tmp_path)
    layout, run = city(root, side=9, areas=2), root.child("run")
    with monkeypatch.context() as broken:
        broken.setattr(gps, "collect_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_gps_graph(run, GPS_GRAPH, layout, 8)
    assert [info.path for info in run.list() if "scratch/finds" in info.path]
    with pytest.raises(NotFound, match="not committed"):
        open_graph(run, GPS_GRAPH, layout)
    monkeypatch.setattr(gps, "LEAST", 64)
    build_gps_graph(run, GPS_GRAPH, layout, 8)
    assert not [info.path for info in run.list() if "scratch" in info.path]


def test_finds_of_another_build_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Another process makes the same graph of other blocks: what its workers wrote must not get into this graph."""
    root = Store.open(tmp_path)
    layout, run = city(root, side=9, areas=2), root.child("run")
    collect = gps.collect_rows

    def replaced(job: gps.GpsJob, start: int, stop: int, spans: Int32) -> None:
        run.write(job.path("finds", 0), run.read(job.path("finds", 1)))
        collect(job, start, stop, spans)

    monkeypatch.setattr(gps, "collect_rows", replaced)
    with pytest.raises(NotFound, match=GPS_GRAPH):
        build_gps_graph(run, GPS_GRAPH, layout, 8)


def test_gps_graph_needs_coordinates(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    with pytest.raises(BadInput, match="coordinates.*strategy=random"):
        build_gps_graph(root, GPS_GRAPH, city(root, coordinates="none"), k=4)


def test_equal_distances_go_by_key_not_by_id(tmp_path: Path) -> None:
    """On a grid every place has several nearest; ids here run against the keys."""
    layout = city(Store.open(tmp_path), side=4, areas=1)
    backwards = pa.array([f"{layout.n_places - place:03d}" for place in range(layout.n_places)])
    tables = layout.places.set_column(0, "key", backwards), layout.members
    layout = replace(layout, index=Index(layout.store, layout.info, tables))
    graph = build_gps_graph(Store.open(tmp_path / "run"), GPS_GRAPH, layout, 15)
    tied = 0
    for row, scores in zip(graph.indices, graph.scores, strict=True):
        for score in np.unique(scores[np.isfinite(scores)]):
            keys = [layout.keys[place] for place in row[scores == score]]
            tied += len(keys) > 1
            assert keys == sorted(keys)
    assert tied > 10


@pytest.mark.slow
def test_processes_give_the_same_graph_as_threads(tmp_path: Path) -> None:
    """Workers know nothing but the store; afterwards nothing is left there but the graph."""
    from distributed import LocalCluster

    root = Store.open(tmp_path)
    layout = city(root, side=50, areas=2, coordinates="latlon")
    here = build_gps_graph(root.child("run"), "here.zarr", layout, 9)
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        there = build_gps_graph(root.child("run"), "there.zarr", layout, 9, cluster.scheduler_address)
    assert (here.indices == there.indices).all() and (here.scores == there.scores).all()
    assert not [info.path for info in root.child("run").list() if "scratch" in info.path]


@pytest.mark.slow
def test_a_killed_worker_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks run again, and write the same objects."""
    from distributed import LocalCluster

    monkeypatch.setattr(gps, "LEAST", 16)  # only the client cuts blocks
    monkeypatch.setattr(gps, "BLOCK", 64)
    root = Store.open(tmp_path)
    layout, run = city(root, side=40, areas=2), root.child("run")
    calm = build_gps_graph(run, "calm.zarr", layout, 9)
    killed: list[int] = []
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:

        def kill() -> None:
            """SIGKILL a worker once some blocks are done."""
            while not killed:
                time.sleep(0.005)
                done = [task for task in list(cluster.scheduler.tasks.values()) if task.state == "memory"]
                if len(done) >= 3:
                    killed.append(cluster.workers[0].pid)
                    os.kill(killed[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        graph = build_gps_graph(run, GPS_GRAPH, layout, 9, cluster.scheduler_address)
        killer.join(10)
    assert killed
    assert (graph.indices == calm.indices).all() and (graph.scores == calm.scores).all()
    assert not [info.path for info in run.list() if "scratch" in info.path]
