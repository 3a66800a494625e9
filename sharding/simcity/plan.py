"""Define what the planners of all raw layouts share: where a city lies on Earth, and what is to be written of it.

A planner (in :mod:`sharding.simcity.vigor`, ``pairs``, ``university``) looks at city maps and decides which pictures
are taken where, which files each goes to, and what the data set's own lists say of them. It writes nothing, so errors
show before the first file.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.simcity.map import City
from sharding.simcity.shots import PITCH, Scene

METRES_PER_DEGREE = 111_320.0  # of latitude; of longitude: times the cosine of the city's latitude
ORIGINS = {  # latitude and longitude of the first tile, where VIGOR has the city
    "Chicago": (41.8510, -87.6500),
    "NewYork": (40.7030, -74.0160),
    "SanFrancisco": (37.7510, -122.4480),
    "Seattle": (47.5583, -122.3385),
}
CLEARANCE = 1.5  # metres between a camera on the street and any building
TRIES = 24  # places looked at for a tile's panoramas before it goes without
ID_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@dataclass(frozen=True)
class CitySpec:
    """Describe a city of half-overlapping tiles.

    Attributes:
        name: letters and digits; VIGOR's four cities lie where the real ones do.
        rows: of tiles, from south to north.
        columns: of tiles, from west to east.
        like: name of the city that it looks like, of as many rows and columns; None: of none.
    """

    name: str
    rows: int
    columns: int
    like: str | None = None

    @property
    def origin(self) -> tuple[float, float]:
        """Latitude and longitude of the south-western tile's centre."""
        fallback = zlib.crc32(self.name.encode())
        return ORIGINS.get(self.name, (25.0 + fallback % 2000 / 100, -120.0 + fallback // 2000 % 4500 / 100))

    @property
    def extent(self) -> tuple[float, float]:
        """Metres from the first tile's centre to the last one's, east and north."""
        return (self.columns - 1) * PITCH, (self.rows - 1) * PITCH

    def degrees(self, x: float, y: float) -> tuple[float, float]:
        """Return latitude and longitude of a point ``x`` metres east and ``y`` metres north of the origin."""
        latitude, longitude = self.origin
        shrink = math.cos(math.radians(latitude))
        return latitude + y / METRES_PER_DEGREE, longitude + x / (METRES_PER_DEGREE * shrink)

    def metres(self, latitude: float, longitude: float) -> tuple[float, float]:
        """Return the metres east and north of the origin of a point in degrees: the inverse of :meth:`degrees`."""
        south, west = self.origin
        shrink = math.cos(math.radians(south))
        return (longitude - west) * METRES_PER_DEGREE * shrink, (latitude - south) * METRES_PER_DEGREE


@dataclass(frozen=True)
class Town:
    """Hold a city and its map.

    Attributes:
        spec: its name and size.
        city: its map.
        rng: its own generator, so that nothing depends on other cities.
    """

    spec: CitySpec
    city: City
    rng: np.random.Generator


@dataclass(frozen=True)
class RawPlan:
    """Describe a raw folder that is to be written.

    Attributes:
        scenes: of each town.
        files: content of lists and tables, by their path in the folder.
        tiles: how many places there are.
        empty_tiles: those of them without a view.
        views: how many pictures from the street or the air, not files.
    """

    scenes: list[list[Scene]]
    files: dict[str, bytes]
    tiles: int
    empty_tiles: int
    views: int


def standing_room(city: City, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points lie clear of all buildings and trees.

    Args:
        city: the map.
        x: (n,) metres east.
        y: (n,) metres north.
    """
    reach = CLEARANCE
    near = city.window((x.min() - reach, y.min() - reach, x.max() + reach, y.max() + reach))
    west, south, east, north = near.buildings.T
    inside = (x[:, None] > west - reach) & (x[:, None] < east + reach)
    inside &= (y[:, None] > south - reach) & (y[:, None] < north + reach)
    tree_x, tree_y, radius = near.trees.T
    under = np.hypot(x[:, None] - tree_x, y[:, None] - tree_y) < radius + 0.5
    room: NDArray[np.bool_] = ~inside.any(axis=1) & ~under.any(axis=1)
    return room


def panorama_id(rng: np.random.Generator) -> str:
    """Return 22 characters, as street view services name their panoramas; some begin with a hyphen."""
    return "".join(ID_LETTERS[n] for n in rng.integers(len(ID_LETTERS), size=22))
