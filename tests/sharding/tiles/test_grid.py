"""The grid's promises, by properties: every spot has its tiles, the nearest centre is the positive, keys stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import BadInput
from sharding.tiles.grid import Grid, cell_codes, metres_per_degree, tiles_of

GRIDS = st.builds(Grid, st.floats(20, 500), st.floats(0, 0.75))
# South-western corner, and how many pitches the region is wide and high.
REGIONS = st.tuples(st.floats(-80, 80), st.floats(-179, 178), st.floats(0.1, 6), st.floats(0.1, 6))
Region = tuple[float, float, float, float]


def corners(grid: Grid, region: Region) -> Region:
    """West, south, east, north."""
    south, west, wide, high = region
    north, east = (float(one[0]) for one in metres_per_degree(np.array([south])))
    return west, south, west + wide * grid.pitch / east, south + high * grid.pitch / north


def spots_in(grid: Grid, region: Region, count: int = 40) -> np.ndarray:
    west, south, east, north = corners(grid, region)
    rng = np.random.default_rng(0)
    return np.stack([rng.uniform(south, north, count), rng.uniform(west, east, count)], axis=1)


def by_hand(grid: Grid, cells: np.ndarray, spot: np.ndarray) -> list[int]:
    """All tiles that show a spot, nearest centre first: every tile is looked at."""
    centres = grid.centres(cells)
    north, east = metres_per_degree(centres[:, 0])
    up, right = (spot[0] - centres[:, 0]) * north, (spot[1] - centres[:, 1]) * east
    shown = np.flatnonzero(np.maximum(abs(up), abs(right)) <= grid.metres / 2)
    return [int(n) for n in shown[np.argsort(np.hypot(up, right)[shown], kind="stable")]]


@settings(max_examples=60, deadline=None)
@given(GRIDS, REGIONS)
def test_the_nearest_centre_is_the_positive_and_semi_positives_show_the_spot(grid: Grid, region: Region) -> None:
    cells = grid.cells_within(*corners(grid, region))
    spots = spots_in(grid, region)
    shown = tiles_of(spots, grid, cells)
    for number, spot in enumerate(spots):
        expected = by_hand(grid, cells, spot)
        others = shown.others.indices[shown.others.indptr[number] : shown.others.indptr[number + 1]]
        assert expected, "every spot of the region is in a tile"
        assert shown.nearest[number] == expected[0]
        assert sorted(others.tolist()) == sorted(expected[1:])


@settings(max_examples=40, deadline=None)
@given(GRIDS, REGIONS)
def test_no_tile_beyond_the_regions_own_is_nearer(grid: Grid, region: Region) -> None:
    west, south, east, north = corners(grid, region)
    margin = 3 * grid.metres / 20_000
    wider = grid.cells_within(west - margin, south - margin, east + margin, north + margin)
    cells = grid.cells_within(west, south, east, north)
    spots = spots_in(grid, region)
    inner, outer = tiles_of(spots, grid, cells), tiles_of(spots, grid, wider)
    assert (cells[inner.nearest] == wider[outer.nearest]).all()
    assert np.isin(cell_codes(cells), cell_codes(wider)).all(), "a region that grows keeps its tiles"


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.floats(-80, 80), st.floats(-179, 178))
def test_neighbours_overlap_as_asked_and_no_more_than_a_hundredth_more(grid: Grid, south: float, west: float) -> None:
    row, column = round(south / grid.row_step), 0
    cells = np.array([[row, column], [row, column + 1], [row + 1, column]])
    here, right, up = grid.centres(cells)
    north, east = (float(one[0]) for one in metres_per_degree(np.array([here[0]])))
    assert (right[1] - here[1]) * east == pytest.approx(grid.pitch)
    # A degree of latitude changes from row to row, by far less than a millionth of it.
    assert 0.989 * grid.pitch <= (up[0] - here[0]) * north <= grid.pitch * (1 + 1e-9)


def test_rows_and_columns_are_numbered_from_the_equator_and_greenwich() -> None:
    grid = Grid(100.0, 0.5)
    cells = grid.cells_within(-0.001, -0.001, 0.001, 0.001)
    assert [0, 0] in cells.tolist() and (np.diff(cell_codes(cells)) > 0).all()
    assert np.allclose(grid.centres(np.array([[0, 0]])), 0)


def test_a_spot_outside_all_tiles_has_none() -> None:
    grid = Grid(50.0)
    shown = tiles_of(np.array([[48.0, 11.0], [10.0, 10.0]]), grid, grid.cells_within(11.0, 48.0, 11.0, 48.0))
    assert shown.nearest[0] >= 0 and shown.nearest[1] == -1 and len(shown.others.indptr) == 3
    empty = tiles_of(np.array([[48.0, 11.0]]), grid, np.zeros((0, 2), dtype=np.int64))
    assert empty.nearest.tolist() == [-1]


def test_a_degree_is_as_long_as_the_ellipsoid_says() -> None:
    north, east = metres_per_degree(np.array([0.0, 45.0, 90.0]))
    assert north == pytest.approx([110_574.3, 111_131.8, 111_693.9], abs=0.1)
    assert east == pytest.approx([111_319.5, 78_846.8, 0.0], abs=0.1)


@pytest.mark.parametrize(("metres", "overlap"), [(0.5, 0.5), (60.0, 0.95), (60.0, -0.1), (float("nan"), 0.5)])
def test_sizes_that_make_no_sense_are_refused(metres: float, overlap: float) -> None:
    with pytest.raises(BadInput, match="metres|overlap"):
        Grid(metres, overlap)


def test_the_poles_are_refused() -> None:
    with pytest.raises(BadInput, match="85"):
        Grid(60.0).cells_within(0.0, 84.0, 1.0, 86.0)
