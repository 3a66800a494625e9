"""The nearest places against brute force and the haversine, whatever the blocks are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Csr, Float64, Int32, Int64, take
from geostream.mining import place_blocks
from geostream.mining.gps import EARTH_RADIUS, points_in_metres
from geostream.mining.place_blocks import BOX, PLACE, Places, box_of, cut, nearest_of_block
from tests.cities import csr


class Blocks:
    """Places in blocks of at most ``most``; ids are row numbers. ``reads`` notes which blocks are read."""

    def __init__(self, points: Float64, area: Int32, listed: Csr, rank: Int64, most: int) -> None:
        facts = np.zeros(len(points), dtype=PLACE)
        facts["point"] = np.pad(points, ((0, 0), (0, 3 - points.shape[1])))
        facts["row"] = facts["place"] = np.arange(len(points))
        facts["area"], facts["rank"], facts["n"] = area, rank, np.diff(listed.indptr)
        self.rows = cut(facts["point"].T.astype(np.float32), area, most)
        self._places = [Places(facts[rows], take(listed, rows)) for rows in self.rows]
        self.boxes = np.concatenate([box_of(part.facts) for part in self._places] or [np.empty(0, BOX)])
        self.reads: list[int] = []

    def read(self, number: int) -> Places:
        self.reads.append(number)
        return self._places[number]

    def nearest(self, k: int) -> tuple[Int32, Float64]:
        """Return the (N, k) ids and metres of all places."""
        n = sum(map(len, self.rows))
        indices, metres = np.full((n, k), -2, dtype=np.int32), np.full((n, k), np.nan)
        for number, rows in enumerate(self.rows):
            found = nearest_of_block(number, self.boxes, self.read, k)
            indices[rows], metres[rows] = found.place, found.metres()
        return indices, metres


def no_lists(n: int) -> Csr:
    return csr([[] for _ in range(n)])


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


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 50),
    k=st.sampled_from([1, 4, 60]),
    grid=st.booleans(),
    areas=st.integers(1, 4),
    clashes=st.sampled_from([0, 40]),
    most=st.sampled_from([1, 2, 5, 20, 50]),
)
def test_nearest_is_brute_force(seed: int, n: int, k: int, grid: bool, areas: int, clashes: int, most: int) -> None:
    """On a coarse grid nearly all distances are tied, and many places lie at the same point.

    A place is in the list of another on one side only, or on both.
    """
    rng = np.random.default_rng(seed)
    points: Float64 = rng.integers(0, 4, (n, 2)) * np.float64(35) if grid else rng.random((n, 2)) * 1000
    area = rng.integers(0, areas, n).astype(np.int32)
    lists: list[set[int]] = [set() for _ in range(n)]
    both: list[set[int]] = [set() for _ in range(n)]
    for one, other in rng.integers(0, n, (clashes, 2)).tolist():
        lists[one].add(other)
        both[one].add(other)
        both[other].add(one)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    rank = rng.permutation(n)
    blocks = Blocks(points, area, csr([sorted(row) for row in lists]), rank, most)
    indices, metres = blocks.nearest(k)
    excluded = csr([sorted(row) for row in both])
    assert [row[row >= 0].tolist() for row in indices] == plain_nearest(distance, area, k, excluded, rank)
    for i, row in enumerate(indices):
        known = row >= 0
        assert (np.diff(known.astype(int)) <= 0).all()
        assert metres[i][known] == pytest.approx(distance[i, row[known]], abs=1e-3)
        assert np.isinf(metres[i][~known]).all()


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 200), areas=st.sampled_from([1, 3, 100]), most=st.integers(1, 60))
def test_each_place_is_in_one_block_and_a_block_is_of_one_area_or_of_whole_ones(
    seed: int, n: int, areas: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    points, area = rng.random((3, n), dtype=np.float32), rng.integers(0, areas, n).astype(np.int32)
    points[:, rng.random(n) < 0.1] = np.nan
    known = np.flatnonzero(np.isfinite(points).all(axis=0))
    sizes = np.bincount(area[known], minlength=areas)
    blocks = cut(points.copy(), area, most)
    assert sorted(np.concatenate([np.empty(0, np.int32), *blocks]).tolist()) == known.tolist()
    for rows in blocks:
        assert 0 < len(rows) <= most and (np.diff(rows) > 0).all()
        inside = set(area[rows].tolist())
        assert len(inside) == 1 or len(rows) == sum(sizes[one] for one in inside)
    for one, other in pairwise(blocks):  # no needless blocks
        whole = all(sizes[area[rows[0]]] <= most for rows in (one, other))
        assert not whole or len(one) + sizes[area[other].min()] > most


@pytest.mark.parametrize("middle", [(0.0, 0.0), (40.0, -74.0), (60.0, 180.0), (-90.0, 17.0)])
def test_few_blocks_are_read(middle: tuple[float, float]) -> None:
    """Wherever on the sphere a city lies, a block of its grid reads those beside it."""
    north, east = np.stack(np.divmod(np.arange(4096), 64)) - 31.5
    metre = np.degrees(1 / EARTH_RADIUS)
    position = np.stack([np.hypot(north, east), np.degrees(np.arctan2(east, north))], axis=1)
    if middle[0] == -90:  # a grid by distance and direction from the pole
        position = np.stack([-90 + 35 * metre * position[:, 0], position[:, 1]], axis=1)
    else:
        position = np.array(middle) + 35 * metre * np.stack([north, east / np.cos(np.radians(middle[0]))], axis=1)
    points = points_in_metres(position, "latlon")
    blocks = Blocks(points, np.zeros(4096, np.int32), no_lists(4096), np.arange(4096), 256)
    assert len(blocks.rows) == 16
    found, _ = blocks.nearest(8)
    assert len(blocks.reads) <= 16 + 2 * (2 * 3 * 4 + 2 * 9)  # itself; twice the pairs that share a side or a corner
    far = np.append(points, points_in_metres(np.array([[10.0, 10.0]]), "latlon"), axis=0)
    with_one = Blocks(far, np.zeros(4097, np.int32), no_lists(4097), np.arange(4097), 256)
    indices, _ = with_one.nearest(8)
    assert (indices[:-1] == found).all() and (indices[-1] >= 0).all()


def test_more_ties_than_are_looked_at_first() -> None:
    """Hundreds of places at each of four points: neighbours are those with the smallest ids, not the first ones met."""
    points: Float64 = np.random.default_rng(0).integers(0, 2, (1000, 2)) * np.float64(35)
    for most in (100, 1000):
        blocks = Blocks(points, np.zeros(1000, dtype=np.int32), no_lists(1000), np.arange(1000), most)
        for row, found in enumerate(blocks.nearest(3)[0].tolist()):
            same = np.flatnonzero((points == points[row]).all(axis=1))
            assert found == [other for other in same.tolist() if other != row][:3]


def test_little_is_held_at_once_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    points, area = rng.random((300, 2)) * 500, rng.integers(0, 2, 300).astype(np.int32)
    listed = csr([sorted(set(row.tolist())) for row in rng.integers(0, 300, (300, 4))])
    indices, metres = Blocks(points, area, listed, np.arange(300), 40).nearest(20)
    monkeypatch.setattr(place_blocks, "DISTANCES", 90)
    again = Blocks(points, area, listed, np.arange(300), 40).nearest(20)
    assert (again[0] == indices).all() and (again[1] == metres).all()


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
    points = points_in_metres(position, "latlon")
    indices, metres = Blocks(points, np.zeros(80, np.int32), no_lists(80), np.arange(80), 16).nearest(5)
    for row in range(80):
        distance = haversine(position, position[row])
        distance[row] = np.inf
        assert metres[row] == pytest.approx(np.sort(distance)[:5], abs=2e-3)
        assert distance[indices[row]] == pytest.approx(metres[row], abs=2e-3)


@pytest.mark.parametrize("most", [4, 21])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_one_point_an_area_of_one_place_and_a_huge_k(k: int, most: int) -> None:
    """Places at one and the same point are each other's neighbours, by rank; who is alone has none."""
    area = np.array([0] * 20 + [1], dtype=np.int32)
    indices, metres = Blocks(np.ones((21, 2)), area, no_lists(21), np.arange(21)[::-1], most).nearest(k)
    for row in range(20):
        expected = [other for other in range(19, -1, -1) if other != row][:k]
        assert indices[row].tolist() == expected + [-1] * (k - len(expected))
        assert (metres[row, : len(expected)] == 0).all()
    assert (indices[20] == -1).all() and np.isinf(metres[20]).all()
