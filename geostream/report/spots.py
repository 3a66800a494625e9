"""Compute where in its tile each query was taken, from the coordinates of both: to see wrong ones before a training.

Everything is vectorised, and takes 40 bytes a pair. North is up in a tile. The side of a tile on the ground is known
from the layout (``tile_metres`` in ``layout.json``), and of two data sets by rule: VIGOR's tiles are 640 pixels of a
web map at zoom 20, GTA-UAV's a power of two of the whole map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from geostream.arrays import Float64, Int16, Int32, Int64
from geostream.layout import Coordinates, Layout
from geostream.layout.layout import PLACES_FILE

EARTH = 6_371_008.8  # metres: mean radius
EQUATOR = 40_075_016.7  # metres around the Earth of web maps
VIGOR_PIXELS, VIGOR_ZOOM = 640, 20
GTA_MAP = 24576 * 0.45  # metres
STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Spots:
    """Hold where the queries of a layout were taken.

    Attributes:
        place: (V,) id of each query's place.
        view: (V,) number of the view within it.
        offset: (V, 2) metres east and north of the tile's centre; NaN where one of the two is unknown.
        side: (V,) metres of the tile's side; NaN where it is unknown.
    """

    place: Int32
    view: Int16
    offset: Float64
    side: Float64

    @property
    def distance(self) -> Float64:
        """(V,) metres from the tile's centre; NaN where it is unknown."""
        distance: Float64 = np.hypot(self.offset[:, 0], self.offset[:, 1])
        return distance

    @property
    def outside(self) -> npt.NDArray[np.bool_]:
        """(V,) whether the spot is known to lie outside the tile."""
        outside: npt.NDArray[np.bool_] = np.abs(self.offset).max(axis=1) > self.side / 2
        return outside


def find_spots(layout: Layout) -> Spots:
    """Return where each query of a layout was taken; views that are only candidates are left out."""
    columns = ["north", "east", "area", *(f"views.list.element.{name}" for name in ("split", "north", "east"))]
    places, views, offsets, sides, start = [], [], [], [], 0
    for part in layout.index.parts(PLACES_FILE, columns):
        lists = part["views"].combine_chunks()
        row = pc.list_parent_indices(lists).to_numpy()
        number = np.arange(len(row)) - np.searchsorted(row, row, side="left")
        flat = lists.flatten()
        asked = pc.not_equal(flat.field("split"), "gallery").to_numpy(zero_copy_only=False)
        tile = np.column_stack([part[name].to_numpy() for name in ("north", "east")])
        view = np.column_stack([flat.field(name).to_numpy(zero_copy_only=False) for name in ("north", "east")])
        side = tile_sides(layout, tile[:, 0], part["area"].to_pylist())
        places.append((row + start).astype(np.int32)[asked])
        views.append(number.astype(np.int16)[asked])
        offsets.append(metres_between(tile[row], view, layout.coordinates)[asked])
        sides.append(side[row][asked])
        start += len(part)
    return Spots(*(np.concatenate(column) for column in (places, views, offsets, sides)))


def metres_between(tile: Float64, view: Float64, coordinates: Coordinates) -> Float64:
    """Return how far views lie from the centres of tiles.

    Args:
        tile: (V, 2) north and east of each tile's centre.
        view: (V, 2) the same of each view.
        coordinates: what these are: degrees ("latlon") or metres ("utm").

    Returns:
        (V, 2) metres east and north; NaN where a position is unknown.
    """
    north, east = (view - tile).T
    if coordinates == "latlon":
        degree = EARTH * np.pi / 180
        east = (east + 180) % 360 - 180
        north, east = north * degree, east * degree * np.cos(np.radians(tile[:, 0]))
    offset: Float64 = np.column_stack([east, north])
    return offset


def tile_sides(layout: Layout, north: Float64, areas: list[str]) -> Float64:
    """Return the side of tiles on the ground in metres; NaN where it is unknown.

    Args:
        layout: the layout.
        north: (n,) of each tile's centre.
        areas: of the tiles.
    """
    if layout.tile_metres is not None:
        return np.full(len(north), layout.tile_metres)
    source = layout.info["source"]
    adapter = source.get("first", source).get("adapter")  # a reclustered layout has its first one's there
    if adapter == "vigor":
        sides: Float64 = VIGOR_PIXELS * EQUATOR * np.cos(np.radians(north)) / (256 * 2**VIGOR_ZOOM)
        return sides
    if adapter == "gta-uav":
        return np.array([GTA_MAP / 2 ** int(area.removeprefix("level-")) for area in areas])
    return np.full(len(north), np.nan)


def pick_spots(spots: Spots, farthest: int, spread: int) -> Int64:
    """Return rows to look at: those farthest from their tile's middle, then some that are spread evenly.

    Args:
        spots: of all pairs.
        farthest: how many of the first kind; they lie farthest in shares of the tile's side, where that is known.
        spread: how many of the second kind.

    Returns:
        (n,) distinct rows.
    """
    measure = np.where(np.isnan(spots.side), spots.distance, np.abs(spots.offset).max(axis=1) / spots.side)
    known = np.flatnonzero(~np.isnan(measure))
    far = known[np.argsort(-measure[known], kind="stable")][:farthest]
    some = np.linspace(0, len(spots.place) - 1, spread).round().astype(np.int64) if len(spots.place) else far[:0]
    rows: Int64 = np.array(list(dict.fromkeys([*far.tolist(), *some.tolist()])), dtype=np.int64)
    return rows


def scale_bar(side: float, share: float = 0.4) -> float:
    """Return the length of a scale bar: the longest of 1, 2 or 5 times a power of ten that fits.

    Args:
        side: of the picture, in metres.
        share: of the side that the bar may take.
    """
    most = side * share
    power = 10.0 ** np.floor(np.log10(most))
    return float(max(step * power for step in STEPS if step * power <= most * (1 + 1e-9)))
