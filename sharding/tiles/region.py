"""Make the tiles of a region: its grid, cut to where there is imagery, as places without views.

A region is a GeoJSON file of polygons in degrees. A polygon's property ``area`` (or ``name``) names the area that its
tiles belong to; without one it is called as the file is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geostream.arrays import Bools, Float64, Int64
from geostream.errors import BadInput, MissingRaw
from sharding.places import Box, Place, RawDataset, TileImage, assign_keys
from sharding.tiles.grid import Grid, cell_codes
from sharding.tiles.source import TileSource, describe, open_source

if TYPE_CHECKING:
    from shapely import Geometry

TILE_SIZE = (384, 384)
FEWEST_PIXELS = 16  # of the imagery's own, a tile's side: with less there is nothing to recognise
MOST_TILES = 5_000_000  # all of them are held in memory


@dataclass(frozen=True)
class Tiles:
    """Hold the tiles of a region.

    Attributes:
        grid: that they lie on.
        cells: (N, 2) row and column of each, sorted.
        areas: the area of each.
        source: where their pixels come from.
        name: the region's file, for messages.
        notes: what a person should know.
    """

    grid: Grid
    cells: Int64
    areas: tuple[str, ...]
    source: TileSource
    name: str
    notes: tuple[str, ...] = ()

    @property
    def centres(self) -> Float64:
        """(N, 2) latitude and longitude of each tile's centre."""
        return self.grid.centres(self.cells)

    def only(self, kept: Bools) -> Tiles:
        """Return some of the tiles."""
        areas = tuple(area for area, is_kept in zip(self.areas, kept.tolist(), strict=True) if is_kept)
        return Tiles(self.grid, self.cells[kept], areas, self.source, self.name, self.notes)

    def images(self) -> list[TileImage]:
        """Return what each tile is cut from; raise BadInput where the imagery is too coarse."""
        images = []
        for (latitude, longitude), box in zip(self.centres.tolist(), self.boxes(), strict=True):
            window = self.source.window(box)
            if window.pixels < FEWEST_PIXELS:
                raise BadInput(
                    f"{self.source.facts['name']}: a tile of {self.grid.metres:g} m is {window.pixels} pixels of this "
                    f"imagery wide; with less than {FEWEST_PIXELS} there is nothing to recognise: raise --metres, or "
                    "take finer imagery"
                )
            name = f"tile_{latitude:.7f}_{longitude:.7f}"
            images.append(
                TileImage(
                    path=name,
                    named=self.name,
                    box=box,
                    imagery=window.imagery,
                    pixels=window.pixels,
                    stamp=window.stamp,
                )
            )
        return images

    def boxes(self) -> list[Box]:
        """Return what each tile shows."""
        return [(west, south, east, north) for west, south, east, north in self.grid.boxes(self.centres).tolist()]


def read_region(
    source: str, region: Path, *, metres: float, overlap: float = 0.5, area: str | None = None, work: Path
) -> RawDataset:
    """Return the tiles of a region as places without views: a gallery to search in.

    Args:
        source: of the tiles: see :func:`~sharding.tiles.source.open_source`.
        region: a GeoJSON file of polygons.
        metres: side of a tile on the ground.
        overlap: share of its side that a tile has in common with the next one.
        area: name of the area; None: as the file says.
        work: folder for what is downloaded.

    Raises:
        BadInput: the region or the imagery makes no sense, or the imagery does not cover the region.
        StoreError: a server refuses, or does not answer.
    """
    tiles = lay_tiles(source, region, Grid(metres, overlap), area, work)
    images = tiles.images()
    keys = assign_keys((name, image.path) for name, image in zip(tiles.areas, images, strict=True))
    places = [
        Place(keys[name, image.path], name, ("test",), image, latitude, longitude)
        for name, image, (latitude, longitude) in zip(tiles.areas, images, tiles.centres.tolist(), strict=True)
    ]
    return RawDataset(
        adapter="tiles",
        root=region,
        options={"metres": metres, "overlap": overlap},
        coordinates="latlon",
        tile_size=TILE_SIZE,
        view_size=TILE_SIZE,
        places=tuple(sorted(places, key=lambda place: (place.area, place.key))),
        notes=tiles.notes,
        source=tiles.source.facts,
        tile_metres=float(metres),
        is_gallery=True,
    )


def lay_tiles(source: str, region: Path, grid: Grid, area: str | None, work: Path) -> Tiles:
    """Lay the grid over a region, and leave out tiles at its edge that reach beyond the imagery.

    Arguments and errors are those of :func:`read_region`.
    """
    from shapely import GeometryCollection, box, prepare

    shapes = read_shapes(region, area)
    whole = GeometryCollection([shape for _, shape in shapes])
    west, south, east, north = whole.bounds
    if east - west > 180:
        raise BadInput(
            f"{region}: spans {east - west:.1f} degrees of longitude; where it lies on both sides of the 180th "
            "meridian, make a region of each side"
        )
    if (count := grid.count_within(west, south, east, north)) > MOST_TILES:
        raise BadInput(
            f"{region}: {count:,} tiles of {grid.metres:g} m, more than {MOST_TILES:,}; raise --metres, lower "
            "--overlap or cut the region"
        )
    cells = grid.cells_within(west, south, east, north)
    if (np.abs(grid.boxes(grid.centres(cells))[:, [0, 2]]) > 180).any():
        raise BadInput(f"{region}: its tiles cross the 180th meridian; let it end a tile's side before that")
    opened = open_source(source, (west, south, east, north), grid.metres, work)
    near = box(*grid.boxes(grid.centres(cells), 2 * grid.reach).T)
    number = np.full(len(cells), -1)  # of the shape that a tile belongs to: the first that it is near
    for n, (_, shape) in enumerate(shapes):
        prepare(shape)
        number[(number < 0) & _intersects(shape, near)] = n
    cells, number = cells[number >= 0], number[number >= 0]
    covered, notes = _covered(opened, whole, grid, cells, region)
    cells, number = cells[covered], number[covered]
    if not len(cells):
        raise BadInput(f"{region}: no tile of {grid.metres:g} m lies wholly in the imagery; lower --metres")
    order = np.argsort(cell_codes(cells))
    areas = tuple(shapes[n][0] for n in number[order].tolist())
    return Tiles(grid, cells[order], areas, opened, region.name, (*opened.notes, *notes))


def _intersects(shape: Geometry, boxes: Any) -> Bools:
    from shapely import intersects

    found: Bools = intersects(shape, boxes)
    return found


def _covered(
    source: TileSource, region: Geometry, grid: Grid, cells: Int64, path: Path
) -> tuple[Bools, tuple[str, ...]]:
    """Return which tiles have imagery, and a note of the others; raise BadInput where the region itself lacks some."""
    from shapely import box, covers, difference, prepare, union_all

    footprint = source.footprint()
    if footprint is None:
        return np.ones(len(cells), dtype=bool), ()
    land = union_all([part for part in getattr(region, "geoms", [region])])
    lacking = difference(land, footprint.buffer(1e-7))  # a centimetre: edges are rounded
    if not lacking.is_empty:
        if lacking.area > 0.999 * land.area:
            raise BadInput(
                f"{path}: the region lies elsewhere than the imagery ({describe(land.bounds)}; imagery: "
                f"{describe(footprint.bounds)}){_swapped(land.bounds, footprint.bounds)}"
            )
        raise BadInput(
            f"{path}: {lacking.area / land.area:.1%} of the region has no imagery, in {describe(lacking.bounds)}; cut "
            "the region, or add imagery"
        )
    prepare(footprint)
    found: Bools = covers(footprint, box(*grid.boxes(grid.centres(cells)).T))
    out = int((~found).sum())
    return found, (f"{out} tiles at the edge reach beyond the imagery and were left out",) if out else ()


def _swapped(one: Sequence[float], other: Sequence[float]) -> str:
    """Return a hint where a box would meet the other with latitude and longitude exchanged; else ""."""
    south, west, north, east = one
    meets = west <= other[2] and east >= other[0] and south <= other[3] and north >= other[1]
    return "; latitude and longitude are exchanged: GeoJSON has longitude first" if meets else ""


def read_shapes(region: Path, area: str | None = None) -> list[tuple[str, Geometry]]:
    """Read the polygons of a region.

    Args:
        region: a GeoJSON file.
        area: name of the area of all; None: each one's own.

    Returns:
        The area and the shape of each, by area.

    Raises:
        MissingRaw: there is no such file.
        BadInput: it is no GeoJSON of polygons in degrees, or a polygon crosses itself.
    """
    try:
        content = json.loads(region.read_bytes())
    except OSError as error:
        raise MissingRaw(f"{region}: cannot read the region ({error.strerror}); name a GeoJSON file") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{region}: no GeoJSON ({error}); save the region as GeoJSON") from error
    kind = content.get("type") if isinstance(content, dict) else None
    if kind is None:
        raise BadInput(f"{region}: no GeoJSON (it has no type); save the region as GeoJSON")
    _check_system(content, region)
    features = (content.get("features") or []) if kind == "FeatureCollection" else [content]
    if not isinstance(features, list):
        raise BadInput(f"{region}: no GeoJSON (its features are no list); save the region as GeoJSON")
    found = []
    for number, feature in enumerate(features):
        where = f"{region}: feature {number}"
        is_feature = isinstance(feature, dict) and feature.get("type") == "Feature"
        shape = _shape(feature.get("geometry") if is_feature else feature, where)
        said = (feature.get("properties") or {}) if is_feature else {}
        if not isinstance(said, dict):
            raise BadInput(f"{where}: its properties are no object; mend them, or leave them out")
        name = area or said.get("area") or said.get("name") or region.stem
        found.append((str(name), shape))
    if not found:
        raise BadInput(f"{region}: the region is empty; draw one polygon at least")
    return sorted(found, key=lambda one: one[0])


def _check_system(content: dict[str, Any], region: Path) -> None:
    """Raise BadInput where an old GeoJSON says that it is in another system than degrees."""
    crs = content.get("crs")
    properties = crs.get("properties") if isinstance(crs, dict) else crs
    said = str(properties.get("name", "CRS84") if isinstance(properties, dict) else properties or "CRS84")
    if not said.endswith(("CRS84", "4326", "4979")):
        raise BadInput(f"{region}: in {said}, not in degrees; save it in EPSG:4326, for example with: ogr2ogr -t_srs")


def _shape(geometry: Any, where: str) -> Geometry:
    from shapely import GEOSException, get_coordinates, is_valid_reason
    from shapely.geometry import shape

    try:
        made = shape(geometry)
    except (GEOSException, ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise BadInput(f"{where}: no geometry ({' '.join(str(error).split())[:100]}); mend it") from error
    if not made.is_valid:
        raise BadInput(f"{where}: {is_valid_reason(made)}; mend the polygon")
    if made.geom_type not in ("Polygon", "MultiPolygon") or made.is_empty or made.area == 0:
        raise BadInput(f"{where}: {made.geom_type}{' without area' if not made.area else ''}; draw polygons")
    if (np.abs(get_coordinates(made)) > (180.0, 90.0)).any():
        raise BadInput(f"{where}: its coordinates are no degrees, or latitude stands first; save it in EPSG:4326")
    return made


def work_folder() -> Path:
    """Return where images that were fetched are kept: ``geostream`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "geostream"
