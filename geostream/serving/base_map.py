"""Draw the map from the layout's own tiles: where each one lies, and which of them a view of the map needs.

Pure functions on arrays, so a million places cost some milliseconds. A layout with degrees lies where it is on Earth.
One with metres ("utm") does not say in which zone, so its plane is laid around longitude and latitude 0, where a degree
is equally long in both directions: distances on the map are right, and nothing else is claimed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from geostream.arrays import Float64, Int64, distinct
from geostream.layout import Layout

Kind = Literal["earth", "plane", "none"]

DEGREE = 111_319.49  # metres of a degree of the equator (WGS 84), as web maps count
MOST_TILES = 160  # that a view of the map shows: an image each, and a request the first time
CELLS = 48  # along the longer side of a view that is too wide for tiles
CROWD = 16 * MOST_TILES  # more places than this in a view are not worth a choice
SAMPLE = 20_000  # places from which the size of a tile is estimated
MOST_NORTH = 85.0  # degrees; a web map ends there


class Bounds(NamedTuple):
    """A part of the map, in degrees of the map."""

    west: float
    south: float
    east: float
    north: float


class Cells(NamedTuple):
    """The places of a wide view, counted in the squares of a grid."""

    centre: Float64  # (C, 2) mean longitude and latitude of each square's places
    places: Int64  # (C,) how many


@dataclass(frozen=True)
class BaseMap:
    """Know where the N places of a layout lie on the map.

    Attributes:
        kind: "earth" where coordinates are degrees, "plane" where they are metres, "none" where there are none.
        centre: (N, 2) longitude and latitude on the map; NaN for places without coordinates, and for removed ones.
        tile_metres: Side of a tile on the ground.
        is_estimated: Whether ``tile_metres`` was estimated, because the layout does not say it.
    """

    kind: Kind
    centre: Float64
    tile_metres: float
    is_estimated: bool

    @classmethod
    def of(cls, layout: Layout) -> BaseMap:
        """Read the positions of a layout's places, 16 bytes each; the tiles' size is estimated where it is unknown."""
        metres = layout.tile_metres
        centre = on_map(layout.position, layout.coordinates)
        centre[layout.shard_of_place < 0] = np.nan
        known = np.isfinite(centre).all(axis=1)
        if layout.coordinates == "none" or not known.any():
            return cls("none", centre, float(metres or 0), metres is None)
        kind: Kind = "plane" if layout.coordinates == "utm" else "earth"
        if metres is None:
            overlap = any(len(layout.semi_positives(split).indices) for split in ("test", "train"))
            return cls(kind, centre, estimate_tile_metres(centre[known], overlap=overlap), True)
        return cls(kind, centre, float(metres), False)

    @property
    def bounds(self) -> Bounds | None:
        """The smallest part of the map that holds all centres; None without coordinates."""
        if self.kind == "none":
            return None
        low, high = np.nanmin(self.centre, axis=0), np.nanmax(self.centre, axis=0)
        return Bounds(float(low[0]), float(low[1]), float(high[0]), float(high[1]))

    def point(self, place: int) -> tuple[float, float] | None:
        """Return longitude and latitude of a place on the map; None where it has none."""
        longitude, latitude = self.centre[place].tolist()
        return (longitude, latitude) if np.isfinite(longitude + latitude) else None

    def inside(self, view: Bounds) -> Int64:
        """Return the places whose tiles show in a part of the map, sorted."""
        longitude, latitude = self.centre[:, 0], self.centre[:, 1]
        half_north = self.tile_metres / 2 / DEGREE
        half_east = half_north / np.cos(np.radians(min(max(abs(view.south), abs(view.north)), MOST_NORTH)))
        seen = (longitude > view.west - half_east) & (longitude < view.east + half_east)
        seen &= (latitude > view.south - half_north) & (latitude < view.north + half_north)
        return np.flatnonzero(seen)

    def tiles(self, view: Bounds) -> Int64 | None:
        """Choose the places whose tiles cover a part of the map; None where that takes more than ``MOST_TILES``.

        Tiles may overlap, as VIGOR's do by half. Then one in each square of a tile's size is enough.
        """
        seen = self.inside(view)
        if MOST_TILES < len(seen) <= CROWD:
            seen = seen[thin(self.centre[seen], self.tile_metres)]
        return seen if len(seen) <= MOST_TILES else None

    def corners(self, places: Int64) -> Float64:
        """Return (n, 4) west, south, east and north edge of the tiles of some places."""
        longitude, latitude = self.centre[places].T
        north = np.full(len(places), self.tile_metres / 2 / DEGREE)
        east = north / np.cos(np.radians(latitude))
        return np.stack([longitude - east, latitude - north, longitude + east, latitude + north], axis=1)

    def cells(self, view: Bounds) -> Cells:
        """Count the places of a part of the map in at most ``CELLS`` by ``CELLS`` squares."""
        seen = self.inside(view)
        side = max(view.east - view.west, view.north - view.south) / CELLS
        square = _squares(self.centre[seen], (side, side))
        names, group = np.unique(square, return_inverse=True)
        count = np.bincount(group, minlength=len(names))
        sums = [np.bincount(group, self.centre[seen][:, axis], minlength=len(names)) for axis in (0, 1)]
        return Cells(np.stack(sums, axis=1) / np.maximum(count, 1)[:, None], count)


def on_map(position: Float64, coordinates: str) -> Float64:
    """Return longitude and latitude on the map.

    Args:
        position: (N, 2) north and east, in degrees or metres.
        coordinates: "latlon", "utm" or "none".

    Returns:
        (N, 2) a new array; metres are laid around (0, 0).
    """
    centre = position[:, ::-1].copy()
    if coordinates == "utm":
        known = np.isfinite(centre).all(axis=1)
        if known.any():
            low, high = centre[known].min(axis=0), centre[known].max(axis=0)
            centre = (centre - (low + high) / 2) / DEGREE
    return centre


def estimate_tile_metres(centre: Float64, *, overlap: bool) -> float:
    """Estimate the side of a tile from how far apart neighbouring centres are.

    Args:
        centre: (N, 2) longitude and latitude.
        overlap: Whether tiles overlap. Then by half, as VIGOR's do: a tile is twice as long as a step of the grid.

    Returns:
        Metres: the median distance to the nearest other centre, or twice that; 50 where there is only one centre.
    """
    step = max(1, len(centre) // SAMPLE)
    plane = centre * DEGREE
    plane[:, 0] *= np.cos(np.radians(centre[:, 1]))  # exact enough between neighbours
    spots = np.unique(plane, axis=0)
    if len(spots) < 2:
        return 50.0
    distance, _ = cKDTree(spots).query(spots[::step], k=2)
    return float(np.median(distance[:, 1])) * (2 if overlap else 1)


def thin(centre: Float64, metres: float) -> Int64:
    """Choose one centre in each square of a grid.

    Args:
        centre: (n, 2) longitude and latitude.
        metres: Side of a square.

    Returns:
        Rows of the chosen centres, sorted: in each square the nearest to its south-west corner.
    """
    if not len(centre):
        return np.zeros(0, dtype=np.int64)
    # A grid of tiles has its own origin: squares begin outside of its corner, so that rounding is harmless.
    side = np.array([metres / DEGREE / np.cos(np.radians(centre[:, 1].mean())), metres / DEGREE])
    begin = centre.min(axis=0) - side / 4
    square = _squares(centre - begin, (side[0], side[1]))
    offset = np.mod(centre - begin, side).sum(axis=1)
    order = np.lexsort((offset, square))
    first = np.concatenate([[True], np.diff(square[order]) > 0])
    return distinct(order[first])


def _squares(centre: Float64, side: tuple[float, float]) -> Int64:
    """Return one number for the square of a grid that each centre lies in."""
    column = np.floor(centre[:, 0] / side[0]).astype(np.int64)
    row = np.floor(centre[:, 1] / side[1]).astype(np.int64)
    return column << 32 | (row & 0xFFFFFFFF)
