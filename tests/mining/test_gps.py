"""Geographic neighbour graphs against brute force and the haversine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Csr, Float64, Int32, Int64
from geostream.errors import BadInput
from geostream.layout.index import Index
from geostream.mining import exact
from geostream.mining import graph as graphs
from geostream.mining.gps import EARTH_RADIUS, PlaceTree, build_gps_graph, points_in_metres
from geostream.runs.run import GPS_GRAPH
from geostream.store import Store
from tests.cities import city, csr


def nearest(points: Float64, area: Int32, k: int, excluded: Csr, rank: Int64) -> tuple[Int32, Float64]:
    """Search a tree of all places for all of them; ids are row numbers."""
    place = np.arange(len(points), dtype=np.int32)
    tree = PlaceTree(points, area, place, rank.astype(np.int32))
    return tree.nearest(points, area, place, excluded, k)


def plain_nearest(
    distance: npt.NDArray[np.float64], area: npt.NDArray[np.int32], k: int, excluded: Csr, rank: npt.NDArray[np.int64]
) -> list[list[int]]:
    """Sorted by (millimetres, rank)."""
    return [
        sorted(
            (j for j in range(len(area)) if j != i and area[i] == area[j] and j not in excluded.row(i)),
            key=lambda j: (round(distance[i, j], 3), rank[j]),
        )[:k]
        for i in range(len(area))
    ]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 50),
    k=st.sampled_from([1, 4, 60]),
    grid=st.booleans(),
    clashes=st.sampled_from([0, 40]),
)
def test_nearest_is_brute_force(seed: int, n: int, k: int, grid: bool, clashes: int) -> None:
    """On a coarse grid nearly all distances are tied, and many places lie at the same point."""
    rng = np.random.default_rng(seed)
    points: Float64 = rng.integers(0, 4, (n, 2)) * np.float64(35) if grid else rng.random((n, 2)) * 1000
    area = rng.integers(0, 3, n).astype(np.int32)
    lists: list[set[int]] = [set() for _ in range(n)]
    for one, other in rng.integers(0, n, (clashes, 2)).tolist():
        if one != other:
            lists[one].add(other)
            lists[other].add(one)
    excluded = csr([sorted(row) for row in lists])
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    rank = rng.permutation(n)
    indices, metres = nearest(points, area, k, excluded, rank)
    assert [row[row >= 0].tolist() for row in indices] == plain_nearest(distance, area, k, excluded, rank)
    for i, row in enumerate(indices):
        known = row >= 0
        assert metres[i][known] == pytest.approx(distance[i, row[known]], abs=1e-3)
        assert np.isinf(metres[i][~known]).all()


def test_more_ties_than_are_looked_at_first() -> None:
    """Hundreds of places at each of four points: neighbours are those with the smallest ids, not the first ones met."""
    points: Float64 = np.random.default_rng(0).integers(0, 2, (1000, 2)) * np.float64(35)
    indices, _ = nearest(points, np.zeros(1000, dtype=np.int32), 3, csr([[] for _ in range(1000)]), np.arange(1000))
    for row, found in enumerate(indices.tolist()):
        same = np.flatnonzero((points == points[row]).all(axis=1))
        assert found == [other for other in same.tolist() if other != row][:3]


def test_points_of_degrees_are_metres_apart() -> None:
    """One degree of latitude is 111.195 km on the mean sphere, one of longitude half of that at 60° north."""
    points = points_in_metres(np.array([[60.0, 10.0], [60.01, 10.0], [60.0, 10.01]]), "latlon")
    distance = np.linalg.norm(points - points[0], axis=1)
    assert distance == pytest.approx([0, 1111.95, 555.97], abs=0.01)


@pytest.mark.parametrize("coordinates", ["utm", "latlon"])
def test_gps_graph(tmp_path: Path, coordinates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exact, graphs):
        monkeypatch.setattr(module, "SHARD_ROWS", 32)
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


def test_gps_graph_needs_coordinates(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    with pytest.raises(BadInput, match="coordinates.*strategy=random"):
        build_gps_graph(root, GPS_GRAPH, city(root, coordinates="none"), k=4)


def haversine(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    north, east = np.radians(one - other).T
    a = (
        np.sin(north / 2) ** 2
        + np.cos(np.radians(one[..., 0])) * np.cos(np.radians(other[..., 0])) * np.sin(east / 2) ** 2
    )
    return np.asarray(2 * EARTH_RADIUS * np.arcsin(np.sqrt(a)))


@pytest.mark.parametrize("middle", [(0.0, 180.0), (89.9995, 0.0), (-90.0, 17.0), (0.0, 0.0), (60.0, -179.9999)])
def test_great_circles_across_the_antimeridian_and_the_poles(middle: tuple[float, float]) -> None:
    """The nearest lie beyond ±180° of longitude, or over the pole, where degrees of longitude mean nothing."""
    rng = np.random.default_rng(3)
    position = np.array(middle) + rng.uniform(-2e-3, 2e-3, (80, 2)) * [1, 500 if abs(middle[0]) > 89 else 1]
    position[:, 0] = np.clip(position[:, 0], -90, 90)
    position[:, 1] = (position[:, 1] + 180) % 360 - 180
    indices, metres = nearest(
        points_in_metres(position, "latlon"), np.zeros(80, np.int32), 5, csr([[] for _ in range(80)]), np.arange(80)
    )
    for row in range(80):
        distance = haversine(position, position[row])
        distance[row] = np.inf
        assert metres[row] == pytest.approx(np.sort(distance)[:5], abs=2e-3)
        assert distance[indices[row]] == pytest.approx(metres[row], abs=2e-3)


@pytest.mark.parametrize("k", [1, 7, 500])
def test_one_point_an_area_of_one_place_and_a_huge_k(k: int) -> None:
    """Places at one and the same point are each other's neighbours, by rank; who is alone has none."""
    area = np.array([0] * 20 + [1], dtype=np.int32)
    indices, metres = nearest(np.ones((21, 2)), area, k, csr([[] for _ in range(21)]), np.arange(21)[::-1])
    for row in range(20):
        expected = [other for other in range(19, -1, -1) if other != row][:k]
        assert indices[row].tolist() == expected + [-1] * (k - len(expected))
        assert (metres[row, : len(expected)] == 0).all()
    assert (indices[20] == -1).all() and np.isinf(metres[20]).all()


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
