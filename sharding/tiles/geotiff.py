"""Read tiles from GeoTIFFs and cloud-optimised GeoTIFFs, one or many, local or behind HTTP.

Each process that encodes opens a file once and looks at it through one virtual raster in Web Mercator (GDAL's warped
VRT). GDAL keeps the blocks that it has warped, up to ``CACHE_BYTES`` a process. Tiles come in the order of the layout's
curve, so the next tile finds most of its pixels there: with an overlap of a half each pixel is part of four tiles.
Where a tile is coarser than the imagery, GDAL reads the overviews that a file has.

A tile may lie across files; the first one that has a pixel gives it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from geostream.errors import BadInput, Unanswered
from geostream.images import Pixels
from sharding.places import Box, Uncovered
from sharding.sources import Stamp
from sharding.tiles.source import TileWindow, facts_of, mercator_box, said_of, without_secrets

if TYPE_CHECKING:
    from shapely import Geometry

CACHE_BYTES = 2**28  # of warped and decoded blocks, a process
OPEN_FILES = 32  # that a process keeps open
OPENERS = 8  # files that are looked at at the same time
EDGE_POINTS = 21  # a side: edges of a raster are curves in degrees
RIM = 64  # empty pixels that are added around a raster, so that a tile's pixels on its edge are read, too
COVERED = 0.99  # share of a tile that must have imagery; its edges are blended where files meet
LOCK = threading.Lock()  # a raster is read by one thread at a time
GDAL = {
    "GDAL_CACHEMAX": CACHE_BYTES,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # ask a server for the file alone, not for what may lie beside it
    "GDAL_HTTP_MAX_RETRY": 4,
    "GDAL_HTTP_RETRY_DELAY": 0.5,
    "GDAL_HTTP_TIMEOUT": 60,
    "GDAL_HTTP_CONNECTTIMEOUT": 10,
    "GDAL_HTTP_USERAGENT": "geostream",
}


@dataclass(frozen=True)
class RasterFile:
    """Describe a raster.

    Attributes:
        path: a local path or a URL.
        edge: (n, 2) longitudes and latitudes along its edge.
        pixel: side of a pixel in the metres of EPSG:3857.
        stamp: of its content: its size, and its time of change or a checksum of what a catalogue says of it.
    """

    path: str
    edge: tuple[tuple[float, float], ...]
    pixel: float
    stamp: Stamp


@dataclass(frozen=True)
class RasterImagery:
    """Read windows from some rasters, the first of which has precedence.

    Attributes:
        paths: of the rasters.
        stamps: of each, so that a process that opened an earlier state of a file opens it again.
    """

    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]

    def read(self, box: Box, height: int, width: int) -> Pixels:
        """Return what lies in a box; see :class:`~sharding.places.Imagery`."""
        import rasterio

        picture: npt.NDArray[np.uint8] | None = None
        with rasterio.Env(**GDAL):
            for path, stamp in zip(self.paths, self.stamps, strict=True):
                bands, there = _read((path, stamp), box, height, width)
                if picture is None:
                    picture, filled = bands, there
                else:
                    new = there & ~filled
                    picture[:, new] = bands[:, new]
                    filled = filled | there
                if filled.all():
                    break
        assert picture is not None, "a window needs a raster"
        if (share := float(filled.mean())) < COVERED:
            raise Uncovered(f"{1 - share:.0%} of the tile has no imagery in {without_secrets(self.paths[0])}")
        return np.ascontiguousarray(np.moveaxis(picture, 0, -1))


def _read(
    version: tuple[str, tuple[int, int]], box: Box, height: int, width: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return (3, height, width) colours of a window, and which pixels the raster has."""
    from rasterio.enums import Resampling
    from rasterio.errors import RasterioError
    from rasterio.windows import Window, from_bounds

    try:
        with LOCK:
            opened = _opened(*version)
            wanted = [*_colours(opened.count - 1), opened.count]  # the last band is what the VRT says is there
            bands = np.zeros((len(wanted), height, width), dtype=np.uint8)
            window = from_bounds(*mercator_box(box), transform=opened.transform)
            rows, row_off, row_count = inside(window.row_off, window.height, height, opened.height)
            columns, col_off, col_count = inside(window.col_off, window.width, width, opened.width)
            if rows.start < rows.stop and columns.start < columns.stop:
                bands[:, rows, columns] = opened.read(
                    indexes=wanted,
                    window=Window(col_off, row_off, col_count, row_count),
                    out_shape=(len(wanted), rows.stop - rows.start, columns.stop - columns.start),
                    resampling=Resampling.bilinear,
                )
    except RasterioError as error:
        raise Unanswered(
            f"{without_secrets(version[0])}: a part of it cannot be read ({said_of(error, version[0])}); mend it or "
            "wait for its server, then run again: what is finished is kept"
        ) from error
    return np.broadcast_to(bands[:-1], (3, height, width)).copy(), bands[-1] >= 128


def inside(offset: float, length: float, pixels: int, there: int) -> tuple[slice, float, float]:
    """Cut a window along one axis to where a raster is, at whole pixels of the picture that is made of it.

    Args:
        offset: where the window begins, in the raster's pixels.
        length: of the window, likewise.
        pixels: of the picture.
        there: pixels of the raster.

    Returns:
        The picture's pixels that lie wholly in the raster, and where the window over these begins and how long it is.
    """
    each = length / pixels
    slack = 1e-6 * each  # a window that ends where the raster does is not cut
    first = max(0, math.ceil((-offset - slack) / each))
    last = min(pixels, math.floor((there - offset + slack) / each))
    return slice(first, max(first, last)), max(0.0, offset + first * each), (last - first) * each


@lru_cache(OPEN_FILES)
def _opened(path: str, stamp: tuple[int, int]) -> Any:
    """Return a raster as it looks in Web Mercator, with an alpha band behind its colours; opened once a process.

    Args:
        path: of the raster.
        stamp: of the state that is wanted; each state is opened anew.
    """
    import rasterio
    from rasterio.enums import ColorInterp, Resampling
    from rasterio.vrt import WarpedVRT

    raster = rasterio.open(path)
    with WarpedVRT(raster, crs="EPSG:3857") as bare:
        transform, width, height = bare.transform, bare.width, bare.height
    return WarpedVRT(
        raster,
        crs="EPSG:3857",
        transform=transform @ transform.translation(-RIM, -RIM),
        width=width + 2 * RIM,
        height=height + 2 * RIM,
        resampling=Resampling.bilinear,
        add_alpha=ColorInterp.alpha not in raster.colorinterp,
    )


def _colours(bands: int) -> list[int]:
    return [1, 2, 3] if bands >= 3 else [1]


@dataclass(frozen=True)
class Rasters:
    """Hold the rasters of a source; the first has precedence where several have a spot.

    Attributes:
        files: all of them.
        facts: name, licence, attribution and url.
        notes: none so far.
    """

    files: tuple[RasterFile, ...]
    facts: dict[str, str | None]
    notes: tuple[str, ...] = ()
    _made: dict[tuple[int, ...], RasterImagery] = field(default_factory=dict, repr=False)

    def footprint(self) -> Geometry:
        """Return where there is imagery, in degrees."""
        from shapely import union_all

        return union_all(self._shapes)

    def window(self, box: Box) -> TileWindow:
        """Return how to read a tile: by those files alone that lie under it."""
        from shapely import box as rectangle

        under = tuple(sorted(self._tree.query(rectangle(*box), predicate="intersects").tolist()))
        files = [self.files[number] for number in under]
        imagery = self._made.setdefault(
            under, RasterImagery(tuple(file.path for file in files), tuple(file.stamp for file in files))
        )
        west, _, east, _ = mercator_box(box)
        pixels = max(1, round((east - west) / min(file.pixel for file in files)))
        if len(files) == 1:
            return TileWindow(imagery, pixels, files[0].stamp)
        stamps = repr([file.stamp for file in files]).encode()
        return TileWindow(imagery, pixels, Stamp(sum(file.stamp.bytes for file in files), google_crc32c.value(stamps)))

    @cached_property
    def _shapes(self) -> npt.NDArray[Any]:
        from shapely import polygons

        return np.array([polygons(file.edge) for file in self.files], dtype=object)

    @cached_property
    def _tree(self) -> Any:
        from shapely import STRtree

        return STRtree(self._shapes)


def open_rasters(paths: Sequence[str], facts: dict[str, str | None], stamps: Sequence[Stamp] | None = None) -> Rasters:
    """Look at some rasters: where they lie, how fine they are, whether they are pictures.

    Args:
        paths: local paths or URLs, those that have precedence first.
        facts: name, licence, attribution and url.
        stamps: what each one's content is recognised by; None: by the files' sizes and times of change.

    Raises:
        BadInput: one cannot be read, has no coordinate system, or is no picture of 8 bits a colour.
    """
    with ThreadPoolExecutor(OPENERS) as threads:
        files = list(threads.map(_look_at, paths))
    if stamps is not None:
        files = [RasterFile(one.path, one.edge, one.pixel, stamp) for one, stamp in zip(files, stamps, strict=True)]
    return Rasters(tuple(files), facts or facts_of(os.path.basename(paths[0])))  # noqa: PTH119, perhaps a URL


def _look_at(path: str) -> RasterFile:
    """Return what is known of a raster; raise BadInput where no tiles can be cut from it."""
    import rasterio
    from rasterio._err import CPLE_BaseError  # what a transformation raises that is not possible; it has no other name
    from rasterio.errors import RasterioError
    from rasterio.warp import transform

    shown = without_secrets(path)
    try:
        with rasterio.Env(**GDAL), rasterio.open(path) as raster:
            _check_picture(raster, shown)
            side = np.linspace(0, 1, EDGE_POINTS)[:-1]
            along = np.concatenate([side, np.ones_like(side), 1 - side, np.zeros_like(side)])
            across = np.concatenate([np.zeros_like(side), side, np.ones_like(side), 1 - side])
            xs, ys = raster.transform @ (along * raster.width, across * raster.height)
            longitudes, latitudes = transform(raster.crs, "EPSG:4326", list(xs), list(ys))
            edge = np.array([longitudes, latitudes]).T
            if _jumps(edge[:, 0]) or (raster.crs.is_geographic and 180 < raster.bounds.right <= 540):
                raise BadInput(f"{shown}: lies across the 180th meridian; cut it there into two files")
            if not (np.isfinite(edge).all() and (np.abs(edge) <= (180.0, 90.0)).all()):
                raise BadInput(
                    f"{shown}: its corners are not on Earth ({raster.bounds} in {raster.crs.to_string()}); mend its "
                    "coordinate system, for example with: gdal_edit.py -a_srs EPSG:…"
                )
            with rasterio.vrt.WarpedVRT(raster, crs="EPSG:3857") as seen:
                pixel = min(seen.res)
        found = os.stat(path) if os.path.exists(path) else None  # noqa: PTH110, PTH116, perhaps a URL
    except (RasterioError, CPLE_BaseError, OSError) as error:
        told = said_of(error, path)
        raise BadInput(f"{shown}: no raster that can be read ({told}); mend it, or leave it out") from error
    stamp = Stamp(found.st_size, found.st_mtime_ns) if found else Stamp(0, google_crc32c.value(path.encode()))
    return RasterFile(path, tuple(map(tuple, edge.tolist())), pixel, stamp)


def _jumps(longitude: npt.NDArray[np.float64]) -> bool:
    """Return whether an edge goes from one side of the 180th meridian to the other."""
    return bool((np.abs(np.diff(longitude, append=longitude[:1])) > 180).any())


def _check_picture(raster: Any, shown: str) -> None:
    from rasterio.enums import ColorInterp

    if raster.crs is None:
        raise BadInput(f"{shown}: has no coordinate system; give it one with: gdal_edit.py -a_srs EPSG:…")
    if not (raster.crs.is_geographic or raster.crs.is_projected):
        raise BadInput(
            f"{shown}: its coordinate system is a local one, which says nothing of where on Earth it lies; give it one "
            "that does with: gdal_edit.py -a_srs EPSG:…"
        )
    if ColorInterp.palette in raster.colorinterp:
        raise BadInput(f"{shown}: has a palette; make colours of it with: gdal_translate -expand rgb")
    if set(raster.dtypes) != {"uint8"}:
        raise BadInput(
            f"{shown}: has values of type {raster.dtypes[0]}, not 8 bits a colour; scale it with: gdal_translate -ot "
            "Byte -scale"
        )
