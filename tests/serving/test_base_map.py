"""Which tiles a view of the map needs: none that shows is missing, and never too many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Float64
from geostream.serving.base_map import (
    CELLS,
    DEGREE,
    MOST_TILES,
    BaseMap,
    Bounds,
    estimate_tile_metres,
    on_map,
    thin,
)
from geostream.store import Store
from tests.cities import SPACING, city
from tests.helpers import tiny_layout

METRES = 70.0


def grid(side: int, step: float, latitude: float = 40.0, longitude: float = -74.0) -> Float64:
    """(side², 2) longitude and latitude of a regular grid with ``step`` metres between its rows and columns."""
    rows, columns = np.divmod(np.arange(side * side), side)
    east = step / DEGREE / np.cos(np.radians(latitude))
    return np.stack([longitude + columns * east, latitude + rows * step / DEGREE], axis=1)


def base_map(centre: Float64) -> BaseMap:
    return BaseMap("earth", centre, METRES, False)


def around(point: Float64, metres: float) -> Bounds:
    north = metres / 2 / DEGREE
    east = north / np.cos(np.radians(point[1]))
    return Bounds(point[0] - east, point[1] - north, point[0] + east, point[1] + north)


def covered(shown: BaseMap, view: Bounds, samples: int = 40) -> float:
    """Share of a view's points that lie on one of the tiles chosen for it."""
    tiles = shown.tiles(view)
    assert tiles is not None
    edges = shown.corners(tiles)
    points = np.stack(
        np.meshgrid(
            np.linspace(view.west, view.east, samples + 2)[1:-1], np.linspace(view.south, view.north, samples + 2)[1:-1]
        ),
        axis=-1,
    ).reshape(-1, 1, 2)
    slack = 0.5 / DEGREE  # half a metre: tiles of one row have edges at slightly different degrees
    inside = np.all((points >= edges[:, :2] - slack) & (points <= edges[:, 2:] + slack), axis=2)
    return float(np.any(inside, axis=1).mean())


@settings(max_examples=40)
@given(
    overlap=st.sampled_from([1.0, 0.5]),
    metres=st.floats(80, 700),
    x=st.floats(0.3, 0.7),
    y=st.floats(0.3, 0.7),
    latitude=st.floats(-60, 60),
)
def test_tiles_cover_the_view_whatever_their_overlap(
    overlap: float, metres: float, x: float, y: float, latitude: float
) -> None:
    shown = base_map(grid(60, METRES * overlap, latitude))
    low, high = shown.centre.min(axis=0), shown.centre.max(axis=0)
    view = around(low + (high - low) * [x, y], metres)
    tiles = shown.tiles(view)
    assert tiles is not None and len(tiles) <= MOST_TILES
    assert covered(shown, view) == 1.0


def test_a_view_too_wide_for_tiles_counts_every_place_once() -> None:
    shown = base_map(grid(90, METRES))
    bounds = shown.bounds
    assert bounds is not None
    assert shown.tiles(bounds) is None
    cells = shown.cells(bounds)
    assert cells.places.sum() == 90 * 90 and len(cells.places) <= (CELLS + 1) ** 2
    assert (cells.centre >= shown.centre.min(axis=0)).all() and (cells.centre <= shown.centre.max(axis=0)).all()
    far = Bounds(10, 10, 11, 11)
    assert len(shown.cells(far).places) == 0 and shown.tiles(far) is not None


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400))
def test_thinning_keeps_one_place_of_each_square(seed: int, n: int) -> None:
    centre = np.random.default_rng(seed).uniform([-74, 40], [-73.99, 40.01], (n, 2))
    rows = thin(centre, 200.0)
    assert len(rows) >= 1 and (np.diff(rows) > 0).all()
    assert len(thin(centre[rows], 200.0)) <= len(rows)  # nothing new comes up
    apart = np.abs(centre[:, None] - centre[rows][None]) * DEGREE * [np.cos(np.radians(40)), 1]
    assert (apart.max(axis=2).min(axis=1) <= 200.0 * 1.01).all()  # every place is within a square of one that is kept


@pytest.mark.parametrize(("overlap", "factor"), [(True, 2.0), (False, 1.0)])
def test_size_of_tiles_is_estimated_from_their_neighbours(overlap: bool, factor: float) -> None:
    assert estimate_tile_metres(grid(20, 35.0), overlap=overlap) == pytest.approx(35.0 * factor, rel=0.01)
    assert estimate_tile_metres(np.array([[1.0, 2.0], [1.0, 2.0]]), overlap=overlap) == 50.0


def test_metres_are_laid_around_zero_at_their_true_distances() -> None:
    centre = on_map(np.array([[6_000_000.0, 700_000.0], [6_000_100.0, 700_000.0], [np.nan, np.nan]]), "utm")
    assert np.abs(centre[:2]).max() < 0.001
    assert (centre[1, 1] - centre[0, 1]) * DEGREE == pytest.approx(100.0)
    assert np.isnan(centre[2]).all()


def test_map_of_a_layout(tmp_path: Path) -> None:
    plane = BaseMap.of(city(Store.open(tmp_path / "utm"), areas=1, side=6))
    assert plane.kind == "plane" and plane.is_estimated
    assert plane.tile_metres == pytest.approx(2 * SPACING, rel=0.01)  # its semi-positives say that tiles overlap
    earth = BaseMap.of(tiny_layout(Store.open(tmp_path / "tiny")))
    assert earth.kind == "earth" and earth.point(0) == (-74.0, 40.0)
    none = BaseMap.of(city(Store.open(tmp_path / "none"), coordinates="none"))
    assert none.kind == "none" and none.bounds is None and none.point(0) is None


def test_a_layout_may_say_how_large_its_tiles_are(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path))
    layout.info["tile_metres"] = 60.0
    shown = BaseMap.of(layout)
    assert shown.tile_metres == 60.0 and not shown.is_estimated
