"""Lay a regular grid of overlapping tiles over the Earth, and say which tiles show a spot: pure functions on arrays.

A tile is a square on the ground, north up. Its side is given in metres, and so is the pitch, the way from one centre to
the next: with an overlap of a half, as VIGOR has it, the pitch is half a side. Rows of the grid lie on fixed latitudes,
counted from the equator, and the tiles of a row on fixed longitudes, counted from Greenwich. So two regions that
overlap have the same tiles where they do, and a region that grows keeps those that it had.

Degrees become metres by the radii of curvature of the WGS84 ellipsoid at a tile's own latitude. Rows are a pitch apart
at the poles, and up to 1 % less elsewhere; tiles in a row are exactly a pitch apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geostream.arrays import Csr, Float64, Int64
from geostream.errors import BadInput

RADIUS, FLATTENING = 6_378_137.0, 1 / 298.257223563  # of WGS84, in metres
ECCENTRICITY = FLATTENING * (2 - FLATTENING)  # squared
NORTHERNMOST = 85.0  # degrees: imagery is read in Web Mercator, which ends there
COLUMN_BITS = 32  # of a cell's number


def metres_per_degree(latitude: Float64) -> tuple[Float64, Float64]:
    """Return the metres on the ground of a degree of latitude and of one of longitude.

    Args:
        latitude: (n,) degrees.

    Returns:
        (n,) and (n,) metres.
    """
    phi = np.deg2rad(latitude)
    bent = 1 - ECCENTRICITY * np.sin(phi) ** 2
    north = RADIUS * (1 - ECCENTRICITY) / bent**1.5
    east = RADIUS / np.sqrt(bent) * np.cos(phi)
    return np.deg2rad(north), np.deg2rad(east)


LONGEST_DEGREE = float(metres_per_degree(np.array([90.0]))[0][0])  # metres of latitude, at the poles


@dataclass(frozen=True)
class Grid:
    """Describe a grid of tiles; raise BadInput for sizes that make no sense.

    Attributes:
        metres: side of a tile on the ground.
        overlap: share of a tile's side that it has in common with the next one.
    """

    metres: float
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.metres <= 100_000:
            raise BadInput(f"metres {self.metres:g}: the side of a tile lies between 1 and 100,000 metres")
        if not 0 <= self.overlap <= 0.9:
            raise BadInput(f"overlap {self.overlap:g}: tiles have between 0 and 0.9 of their side in common")

    @property
    def pitch(self) -> float:
        """Metres from one centre to the next."""
        return self.metres * (1 - self.overlap)

    @property
    def reach(self) -> float:
        """Metres, north or east, within which any spot has the centre of a tile."""
        return self.pitch / math.sqrt(2)

    @property
    def row_step(self) -> float:
        """Degrees of latitude from one row to the next."""
        return self.pitch / LONGEST_DEGREE

    def column_step(self, row: Int64) -> Float64:
        """Return the (n,) degrees of longitude from one tile to the next in some rows."""
        step: Float64 = self.pitch / metres_per_degree(row.astype(np.float64) * self.row_step)[1]
        return step

    def centres(self, cells: Int64) -> Float64:
        """Return the (n, 2) latitudes and longitudes of the centres of (n, 2) cells, each a row and a column."""
        return np.stack([cells[:, 0] * self.row_step, cells[:, 1] * self.column_step(cells[:, 0])], axis=1)

    def boxes(self, centres: Float64, side: float | None = None) -> Float64:
        """Return the squares around some centres.

        Args:
            centres: (n, 2) latitudes and longitudes.
            side: metres; None: a tile's.

        Returns:
            (n, 4) west, south, east, north in degrees.
        """
        north, east = metres_per_degree(centres[:, 0])
        half = (self.metres if side is None else side) / 2
        up, right = half / north, half / east
        latitude, longitude = centres.T
        return np.stack([longitude - right, latitude - up, longitude + right, latitude + up], axis=1)

    def cells_within(self, west: float, south: float, east: float, north: float) -> Int64:
        """Return all cells whose tile may be the nearest of a spot in a box: centres in it or within ``reach`` of it.

        Args:
            west: degrees, as the others.
            south: likewise.
            east: likewise.
            north: likewise.

        Returns:
            (n, 2) rows and columns, by row and column.

        Raises:
            BadInput: the box reaches beyond where tiles can be read.
        """
        rows, low, count = self._rows_within(west, south, east, north)
        row = np.repeat(rows, count)
        column = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
        return np.stack([row, column], axis=1)

    def count_within(self, west: float, south: float, east: float, north: float) -> int:
        """Return how many cells :meth:`cells_within` finds, without making them; they may not fit into memory."""
        return int(self._rows_within(west, south, east, north)[2].sum())

    def _rows_within(self, west: float, south: float, east: float, north: float) -> tuple[Int64, Int64, Int64]:
        """Return the rows near a box, and of each the first column and the number of columns."""
        if max(abs(south), abs(north)) > NORTHERNMOST:
            raise BadInput(f"latitudes {south:g} to {north:g}: tiles reach to {NORTHERNMOST:g} degrees north and south")
        margin = self.reach / float(metres_per_degree(np.zeros(1))[0][0])
        first, last = np.ceil((south - margin) / self.row_step), np.floor((north + margin) / self.row_step)
        rows = np.arange(first, last + 1).astype(np.int64)
        step = self.column_step(rows)
        beside = self.reach / self.pitch  # in columns
        low = np.ceil(west / step - beside).astype(np.int64)
        return rows, low, np.floor(east / step + beside).astype(np.int64) - low + 1


def cell_codes(cells: Int64) -> Int64:
    """Return one number for each of (n, 2) cells, in the order of (row, column)."""
    return (cells[:, 0] << COLUMN_BITS) + cells[:, 1]


@dataclass(frozen=True)
class Shown:
    """Say which tiles show some spots.

    Attributes:
        nearest: (S,) number of the tile with the nearest centre among those that show the spot; -1: none does.
        others: the numbers of the other tiles that show it, a list a spot.
    """

    nearest: Int64
    others: Csr


def tiles_of(spots: Float64, grid: Grid, cells: Int64) -> Shown:
    """Find for each spot the tile that has it nearest to its centre, and the others that contain it.

    Args:
        spots: (S, 2) latitudes and longitudes.
        grid: of the tiles.
        cells: (N, 2) the tiles that there are, by row and column.

    Returns:
        The numbers of tiles, as rows of ``cells``.
    """
    codes = cell_codes(cells)
    latitude, longitude = spots.T
    around = int(np.ceil(grid.metres / 2 / grid.pitch)) + 1
    row = np.rint(latitude / grid.row_step).astype(np.int64)
    found: list[tuple[Int64, Int64, Float64]] = []  # spot, tile, distance
    for up in range(-around, around + 1):
        here = row + up
        column = np.rint(longitude / grid.column_step(here)).astype(np.int64)
        for right in range(-around, around + 1):
            some = np.stack([here, column + right], axis=1)
            centre = grid.centres(some)
            north, east = metres_per_degree(centre[:, 0])
            away = np.stack([(latitude - centre[:, 0]) * north, (longitude - centre[:, 1]) * east], axis=1)
            code = cell_codes(some)
            at = np.minimum(np.searchsorted(codes, code), max(len(codes) - 1, 0))
            there = codes[at] == code if len(codes) else np.zeros(len(code), dtype=bool)
            inside = np.flatnonzero(there & (np.abs(away).max(axis=1) <= grid.metres / 2))
            found.append((inside, at[inside], np.hypot(*away[inside].T)))
    spot, tile, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((tile, distance, spot))
    spot, tile = spot[order], tile[order]
    first = np.searchsorted(spot, np.arange(len(spots)))
    is_first = np.zeros(len(spot), dtype=bool)
    has_any = np.diff(np.append(first, len(spot))) > 0
    is_first[first[has_any]] = True
    nearest = np.full(len(spots), -1, dtype=np.int64)
    nearest[spot[is_first]] = tile[is_first]
    counts = np.bincount(spot[~is_first], minlength=len(spots))
    others = Csr(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), tile[~is_first].astype(np.int32))
    return Shown(nearest, others)
