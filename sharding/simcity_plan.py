"""Where a rendered city's tiles and panoramas are, and what VIGOR's split files say of them.

A label line has 13 columns: the panorama, then (tile, row offset, column offset) for its positive tile and three
semi-positives, nearest first. Offsets are pixels of VIGOR's 640x640 tiles, whatever size is rendered. Their sign is
VIGOR's: tile minus panorama on the axes (north, east), so a positive row offset says that the panorama stands *south*
of the tile's centre, a positive column offset that it stands *west* of it (checked against the published labels, whose
file names hold both coordinates).

Tiles lie on a grid of half a tile's side, so four tiles hold any panorama: the nearest is its positive, the others its
semi-positives.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharding.simcity_map import City

TILE_METRES = 70.4  # 640 pixels of 0.11 m, about VIGOR's
OFFSET_METRES = TILE_METRES / 640  # one unit of the offsets in the label files
PITCH = TILE_METRES / 2  # from tile centre to tile centre
METRES_PER_DEGREE = 111_320.0  # of latitude; of longitude: times the cosine of the city's latitude
ORIGINS = {  # latitude and longitude of the first tile, where VIGOR has the city
    "Chicago": (41.8510, -87.6500),
    "NewYork": (40.7030, -74.0160),
    "SanFrancisco": (37.7510, -122.4480),
    "Seattle": (47.5583, -122.3385),
}
CLEARANCE = 1.5  # metres between a panorama and any building
TRIES = 24  # places looked at for a tile's panoramas before it goes without


@dataclass(frozen=True)
class CitySpec:
    """A city of `rows` x `columns` tiles, half-overlapping. The four names of VIGOR stand where the cities do."""

    name: str
    rows: int
    columns: int

    @property
    def origin(self) -> tuple[float, float]:
        """Latitude and longitude of the south-western tile's centre."""
        fallback = zlib.crc32(self.name.encode())
        return ORIGINS.get(self.name, (25.0 + fallback % 2000 / 100, -120.0 + fallback // 2000 % 4500 / 100))

    def degrees(self, x: float, y: float) -> tuple[float, float]:
        """Latitude and longitude of a point `x` metres east and `y` metres north of the origin."""
        latitude, longitude = self.origin
        shrink = math.cos(math.radians(latitude))
        return latitude + y / METRES_PER_DEGREE, longitude + x / (METRES_PER_DEGREE * shrink)

    def metres(self, latitude: float, longitude: float) -> tuple[float, float]:
        """The inverse of `degrees`."""
        south, west = self.origin
        shrink = math.cos(math.radians(south))
        return (longitude - west) * METRES_PER_DEGREE * shrink, (latitude - south) * METRES_PER_DEGREE


@dataclass(frozen=True)
class Tile:
    name: str
    x: float
    y: float


@dataclass(frozen=True)
class View:
    name: str
    x: float
    y: float
    light: float
    label: str  # the line in pano_label_balanced.txt


def plan_tiles(spec: CitySpec) -> list[Tile]:
    """All tiles, row by row from the south, each from the west."""
    tiles = []
    for j in range(spec.rows):
        for i in range(spec.columns):
            latitude, longitude = spec.degrees(i * PITCH, j * PITCH)
            tiles.append(Tile(f"satellite_{latitude:.12f}_{longitude:.12f}.png", i * PITCH, j * PITCH))
    return tiles


def plan_views(
    spec: CitySpec, city: City, tiles: list[Tile],
    max_offset: float, empty_share: float, extra_view_share: float, rng: np.random.Generator,
) -> list[list[View]]:  # fmt: skip
    """The views of each tile: none at some, up to three at others."""
    rounded = 0.1  # metres: names hold 6 decimals of a degree, and the panorama stands where its name says
    limit = max_offset * TILE_METRES - rounded
    views: list[list[View]] = []
    for tile in tiles:
        wanted = 0 if rng.random() < empty_share else 1 + int(np.sum(np.cumprod(rng.random(2) < extra_view_share)))
        x = np.clip(tile.x + rng.uniform(-limit, limit, TRIES), rounded, (spec.columns - 1) * PITCH - rounded)
        y = np.clip(tile.y + rng.uniform(-limit, limit, TRIES), rounded, (spec.rows - 1) * PITCH - rounded)
        free = np.flatnonzero(_standing_room(city, x, y))[:wanted]
        views.append([_view(spec, tiles, float(x[n]), float(y[n]), rng) for n in free])
    return views


def _standing_room(city: City, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points lie clear of all buildings and trees."""
    reach = CLEARANCE
    near = city.window((x.min() - reach, y.min() - reach, x.max() + reach, y.max() + reach))
    west, south, east, north = near.buildings.T
    inside = (x[:, None] > west - reach) & (x[:, None] < east + reach)
    inside &= (y[:, None] > south - reach) & (y[:, None] < north + reach)
    tree_x, tree_y, radius = near.trees.T
    under = np.hypot(x[:, None] - tree_x, y[:, None] - tree_y) < radius + 0.5
    room: NDArray[np.bool_] = ~inside.any(axis=1) & ~under.any(axis=1)
    return room


def _view(spec: CitySpec, tiles: list[Tile], x: float, y: float, rng: np.random.Generator) -> View:
    latitude, longitude = (round(degree, 6) for degree in spec.degrees(x, y))
    x, y = spec.metres(latitude, longitude)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    name = f"{''.join(letters[n] for n in rng.integers(len(letters), size=22))},{latitude:.6f},{longitude:.6f},.jpg"
    i = int(np.clip(x // PITCH, 0, spec.columns - 2))
    j = int(np.clip(y // PITCH, 0, spec.rows - 2))
    around = [tiles[(j + dj) * spec.columns + i + di] for dj in (0, 1) for di in (0, 1)]
    around.sort(key=lambda tile: math.hypot(tile.x - x, tile.y - y))
    columns = [name]
    for tile in around:
        row, column = (tile.y - y) / OFFSET_METRES, (tile.x - x) / OFFSET_METRES
        columns += [tile.name, f"{round(row, 2) + 0.0}", f"{round(column, 2) + 0.0}"]  # + 0.0: no "-0.0"
    return View(name, x, y, float(rng.uniform(0.95, 1.05)), " ".join(columns))


def write_splits(folder: Path, tiles: list[Tile], views: list[View], rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    lines = sorted(view.label for view in views)  # by id: in no order of place, like VIGOR's
    train = np.zeros(len(lines), bool)
    train[rng.permutation(len(lines))[: len(lines) // 2]] = True
    for name, chosen in (
        ("satellite_list", [tile.name for tile in tiles]),
        ("pano_label_balanced", lines),
        ("same_area_balanced_train", [line for line, is_train in zip(lines, train, strict=True) if is_train]),
        ("same_area_balanced_test", [line for line, is_train in zip(lines, train, strict=True) if not is_train]),
    ):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in chosen))
