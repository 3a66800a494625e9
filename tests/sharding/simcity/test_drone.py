"""The drone's picture: what stands where on the map is where a perspective camera sees it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sharding.simcity.drone import FIELD, TILT, look_down
from sharding.simcity.map import City
from sharding.simcity.raster import Raster, rasterise

METRES = 0.55
RED, BLUE, GRASS = (220, 20, 20), (20, 20, 220), (60, 160, 60)
SIZE = 96


def scene(*buildings: tuple[tuple[float, float, float, float], float, tuple[int, int, int]]) -> Raster:
    """Grass, and buildings (west, south, east, north), height and colour, around (0, 0)."""
    none = np.zeros((0, 3))
    city = City(
        ground=np.array([[-300.0, -300.0, 300.0, 300.0]]),
        ground_colour=np.array([GRASS], np.uint8),
        buildings=np.array([rect for rect, _, _ in buildings]).reshape(-1, 4),
        building_height=np.array([height for _, height, _ in buildings]),
        facade=np.array([colour for _, _, colour in buildings], np.uint8).reshape(-1, 3),
        roof=np.array([colour for _, _, colour in buildings], np.uint8).reshape(-1, 3),
        bay=np.full(len(buildings), 3.0),
        trees=none,
        tree_height=none[:, 0],
        tree_colour=none.astype(np.uint8),
    )
    return rasterise(city, -500, -500, 1000, 1000, METRES)


def projected(x: float, y: float, rise: float, heading: float, distance: float) -> tuple[float, float]:
    """Row and column where a pinhole camera of the drone's kind sees a point, by the textbook."""
    eye = -distance * np.array(
        [math.sin(heading) * math.cos(TILT), math.cos(heading) * math.cos(TILT), -math.sin(TILT)]
    )
    forward = -eye / distance
    right = np.array([math.cos(heading), -math.sin(heading), 0.0])
    above = np.cross(right, forward)
    ray = np.array([x, y, rise]) - eye
    focal = SIZE / 2 / math.tan(FIELD / 2)
    depth = ray @ forward
    return float(SIZE / 2 - focal * (ray @ above) / depth), float(SIZE / 2 + focal * (ray @ right) / depth)


def shows(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Pixels whose strongest channel is the colour's, clearly."""
    strongest = int(np.argmax(colour))
    others = np.delete(picture.astype(int), strongest, axis=2).max(axis=2)
    return picture[..., strongest] > others + 15


@pytest.mark.parametrize("heading", [0.0, 0.7, math.pi / 2, 3.5, 5.6])
@pytest.mark.parametrize("distance", [55.0, 105.0])
def test_a_flat_mark_on_the_ground_is_where_a_pinhole_camera_has_it(heading: float, distance: float) -> None:
    for x, y in ((0.0, 0.0), (9.0, 4.0), (-6.0, 10.0)):
        raster = scene(((x - 3, y - 3, x + 3, y + 3), 0.01, RED))
        rows, columns = np.nonzero(shows(look_down(raster, 0, 0, heading, distance, (SIZE, SIZE), 1.0, 2), RED))
        row, column = projected(x, y, 0.0, heading, distance)
        assert abs(rows.mean() + 0.5 - row) < 1.5 and abs(columns.mean() + 0.5 - column) < 1.5


@pytest.mark.parametrize("heading", [0.0, 1.2, 4.0])
def test_a_tower_s_roof_and_foot_are_where_a_pinhole_camera_has_them(heading: float) -> None:
    raster = scene(((-4.0, -4.0, 4.0, 4.0), 15.0, RED))
    seen = shows(look_down(raster, 0, 0, heading, 80.0, (SIZE, SIZE), 1.0, 1), RED)
    corners = [(x, y, z) for x in (-4.0, 4.0) for y in (-4.0, 4.0) for z in (0.0, 15.0)]
    points = np.array([projected(*corner, heading, 80.0) for corner in corners])
    rows, columns = np.nonzero(seen)
    np.testing.assert_allclose([rows.min(), columns.min()], points.min(axis=0), atol=1.6)
    np.testing.assert_allclose([rows.max() + 1, columns.max() + 1], points.max(axis=0), atol=1.6)


@pytest.mark.parametrize("size", [(16, 16), (48, 48), (64, 128), (SIZE, SIZE)])
def test_it_sees_the_ground_to_all_its_edges(size: tuple[int, int]) -> None:
    for distance in (55.0, 105.0):
        assert shows(look_down(scene(), 0, 0, 0.3, distance, size, 1.0, 2), GRASS).all()


def test_walls_are_darker_than_roofs_and_carry_windows() -> None:
    raster = scene(((-8.0, -8.0, 8.0, 8.0), 15.0, RED))
    picture = look_down(raster, 0, 0, 0.0, 60.0, (SIZE, SIZE), 1.0, 1).astype(float)
    edge = int(projected(0, -8.0, 15.0, 0.0, 60.0)[0])  # the roof's southern edge: the wall is below it
    roof, wall = picture[edge - 8 : edge - 2, 44:52], picture[edge + 3 : edge + 15, 40:56]
    assert roof[..., 0].mean() > wall[..., 0].mean() + 10
    assert wall[..., 0].std() > 2 * roof[..., 0].std()


def test_a_near_building_hides_what_is_behind_it() -> None:
    behind = ((-3.0, 6.0, 3.0, 12.0), 3.0, BLUE)
    picture = look_down(scene(behind), 0, 0, 0.0, 60.0, (SIZE, SIZE), 1.0, 1)
    assert shows(picture, BLUE).sum() > 30
    hidden = look_down(scene(behind, ((-12.0, -2.0, 12.0, 4.0), 18.0, RED)), 0, 0, 0.0, 60.0, (SIZE, SIZE), 1.0, 1)
    assert shows(hidden, BLUE).sum() == 0


def test_from_every_side_it_is_the_same_place_turned() -> None:
    """A quarter turn of the drone around a scene is a quarter turn of the scene: only light from the side differs."""
    rng = np.random.default_rng(0)
    marks = [(float(a), float(b)) for a, b in rng.uniform(-14, 14, (6, 2))]
    here = scene(*(((x - 2, y - 2, x + 2, y + 2), 0.01, RED) for x, y in marks))
    turned = scene(*(((-y - 2, x - 2, -y + 2, x + 2), 0.01, RED) for x, y in marks))  # counter-clockwise
    one = shows(look_down(here, 0, 0, 0.0, 70.0, (SIZE, SIZE), 1.0, 1), RED)
    other = shows(look_down(turned, 0, 0, -math.pi / 2, 70.0, (SIZE, SIZE), 1.0, 1), RED)
    assert one.sum() > 100
    assert (one & other).sum() > 0.75 * (one | other).sum()
