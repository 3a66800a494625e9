"""Read tiles from an XYZ service: a template of URLs with {z}, {x} and {y}, http(s) or file://.

A tile is read at the first zoom whose pixels are no coarser than those that are wanted of it. Where the service has no
images as fine as that, its finest are taken, and a note says so. Each image that is fetched is kept in the work folder,
so a second run asks for nothing twice. We are a polite guest: one connection a process, and the pauses of
:mod:`sharding.web`. An image that the service does not have makes the tiles over it broken; a service that refuses us
or does not answer ends the run, and what is finished is kept.

The stored images count as unchanged as long as the template and the zoom are the same: asking a service for all of them
again, to see what is new, would not be polite. The whole template counts, because its query may name the layer. It may
hold a key as well, so what is stored of it is a hash.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import google_crc32c
import numpy as np
from PIL import Image, UnidentifiedImageError

from geostream.errors import BadInput, Refused
from geostream.images import Pixels
from sharding.places import Box, Uncovered
from sharding.sources import Stamp
from sharding.tiles.source import TileWindow, facts_of, mercator, mercator_box, without_secrets
from sharding.web import ask

if TYPE_CHECKING:
    from shapely import Geometry

SIDE = 256  # pixels of a service's image, as far as is known before one is read
DEEPEST = 22  # zoom
WANTED_PIXELS = 384  # of a tile's side: what layouts are usually stored with; not many more are read
COARSER = 4  # zooms that are tried below that; then a tile has 24 pixels or more, and there is little to recognise
CIRCUMFERENCE = 2 * np.pi * 6_378_137.0  # metres of EPSG:3857, either way


@dataclass(frozen=True)
class XyzImagery:
    """Read windows from an XYZ service.

    Attributes:
        template: of its URLs.
        zoom: of the finest images that are read.
        cache: folder that keeps them.
    """

    template: str
    zoom: int
    cache: str

    def read(self, box: Box, height: int, width: int) -> Pixels:
        """Return what lies in a box; see :class:`~sharding.places.Imagery`."""
        west, south, east, north = mercator_box(box)
        zoom = zoom_for(min((east - west) / width, (north - south) / height))
        if zoom >= self.zoom:
            return self._read(box, height, width)
        try:
            return replace(self, zoom=zoom)._read(box, height, width)
        except Uncovered:  # a folder may have one zoom alone
            return self._read(box, height, width)

    def _read(self, box: Box, height: int, width: int) -> Pixels:
        west, south, east, north = mercator_box(box)
        zoom = self.zoom
        cell = CIRCUMFERENCE / 2**zoom
        left, right = (west / cell + 2**zoom / 2, east / cell + 2**zoom / 2)
        top, bottom = (2**zoom / 2 - north / cell, 2**zoom / 2 - south / cell)
        columns, rows = range(int(left), int(np.ceil(right))), range(int(top), int(np.ceil(bottom)))
        images = [[self.image(x, y) for x in columns] for y in rows]
        side = max(image.shape[0] for row in images for image in row)
        mosaic = Image.new("RGB", (side * len(columns), side * len(rows)))
        for down, row in enumerate(images):
            for across, image in enumerate(row):  # a service may have larger images in some places than in others
                mosaic.paste(Image.fromarray(image).resize((side, side)), (across * side, down * side))
        cut = [
            (left - columns[0]) * side,
            (top - rows[0]) * side,
            (right - columns[0]) * side,
            (bottom - rows[0]) * side,
        ]
        resized = mosaic.resize((width, height), Image.Resampling.LANCZOS, box=tuple(cut))
        return np.asarray(resized)

    def image(self, x: int, y: int) -> Pixels:
        """Return one of the service's images at ``zoom``, (side, side, 3) pixels, from the cache or the service.

        Raises:
            Uncovered: the service has no such image, or what it sends is none.
            Refused: it refuses us.
            Unanswered: it does not answer, after retries.
        """
        kept = Path(self.cache, str(self.zoom), str(x), str(y))
        if kept.is_file():
            try:
                return _decoded(kept.read_bytes(), str(kept))
            except Uncovered:
                kept.unlink(missing_ok=True)  # only images are kept, so the disk has damaged it: it is fetched again
        url = self.template.replace("{z}", str(self.zoom)).replace("{x}", str(x)).replace("{y}", str(y))
        shown = f"{without_secrets(self.template)}: image {self.zoom}/{x}/{y}"
        data = _fetched(url, shown)
        pixels = _decoded(data, shown)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.replace(kept)
        return pixels


def _decoded(data: bytes, shown: str) -> Pixels:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width != image.height:
                raise Uncovered(f"{shown}: an image of {image.width} × {image.height} pixels, which is no XYZ tile")
            if image.mode in ("RGBA", "LA", "PA") and image.getchannel("A").getextrema()[0] == 0:
                raise Uncovered(f"{shown}: transparent, so there is no imagery")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Uncovered(f"{shown}: no image ({' '.join(str(error).split())[:100]})") from error


def _fetched(url: str, shown: str) -> bytes:
    """Return what a URL holds."""
    if url.startswith("file:"):
        path = Path(unquote(urlsplit(url).path))
        try:
            return path.read_bytes()
        except OSError as error:
            raise Uncovered(f"{path}: cannot be read: {error.strerror}") from error
    answer = ask("GET", url, shown, connections=1)
    if answer.status in (401, 402, 403):
        raise Refused(f"{shown}: HTTP {answer.status}; the service refuses it: is a key missing in the template?")
    if answer.status != 200:
        raise Uncovered(f"{shown}: HTTP {answer.status}")
    return bytes(answer.data)


@dataclass(frozen=True)
class Xyz:
    """Describe an XYZ service as a source of tiles.

    Attributes:
        imagery: what reads it.
        facts: name, licence, attribution and url.
        notes: that its images are coarser than wanted, if they are.
    """

    imagery: XyzImagery
    facts: dict[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def footprint(self) -> Geometry | None:
        """Return None: a service does not say where it has imagery."""
        return None

    def window(self, box: Box) -> TileWindow:
        """Return how to read a tile."""
        west, _, east, _ = mercator_box(box)
        pixels = max(1, round((east - west) / (CIRCUMFERENCE / 2**self.imagery.zoom / SIDE)))
        stamp = google_crc32c.value(f"{_hashed(self.imagery.template)} {self.imagery.zoom} {box}".encode())
        return TileWindow(self.imagery, pixels, Stamp(0, stamp))


def _hashed(template: str) -> str:
    """Return what tells one template from another, and cannot be read."""
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def open_xyz(template: str, box: Box, metres: float, work: Path) -> Xyz:
    """Open an XYZ service, and fetch an image of the middle of a region, to see how fine its images are.

    Args:
        template: http(s):// or file://, with {z}, {x} and {y}.
        box: the region.
        metres: side of a tile on the ground.
        work: folder for what is fetched.

    Raises:
        BadInput: the template makes no sense, or there is no image in the middle of the region, nor a coarser one.
        StoreError: the service refuses, or does not answer.
    """
    shown = without_secrets(template)
    marks = set(re.findall(r"\{[^{}]*\}?", template))
    if not re.match(r"(https?|file)://", template) or marks != {"{z}", "{x}", "{y}"}:
        raise BadInput(
            f"{shown}: a template begins with http://, https:// or file://, and has {{z}}, {{x}}, {{y}} in small "
            "letters and nothing else in braces"
        )
    longitude, latitude = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    wanted = zoom_for(metres / WANTED_PIXELS / float(np.cos(np.deg2rad(latitude))))
    cache = str(work.absolute() / f"xyz-{_hashed(template)}")
    lowest = max(0, wanted - COARSER)
    for zoom in range(wanted, lowest - 1, -1):
        imagery = XyzImagery(template, zoom, cache)
        try:
            imagery.image(*_image_at(longitude, latitude, zoom))
            break
        except Uncovered as error:
            if zoom == lowest:
                raise BadInput(
                    f"{error}; there is no imagery in the middle of the region at zoom {wanted}, which tiles of "
                    f"{metres:g} m need, nor coarser down to zoom {lowest}: raise --metres, or take another service"
                ) from error
    notes = () if zoom == wanted else (f"{shown}: has no images at zoom {wanted}; those of zoom {zoom} are taken",)
    is_local = template.startswith("file:")
    name = (
        Path(template.partition("{")[0]).name if is_local else re.sub(r"(:\d+)?(/.*)?$", "", shown.partition("//")[2])
    )
    return Xyz(imagery, facts_of(name, url=shown), notes)


def _image_at(longitude: float, latitude: float, zoom: int) -> tuple[int, int]:
    """Return the column and the row of the image that shows a point."""
    cell = CIRCUMFERENCE / 2**zoom
    east, north = mercator(longitude, latitude)
    return int(east / cell + 2**zoom / 2), int(2**zoom / 2 - north / cell)


def zoom_for(metres: float) -> int:
    """Return the zoom whose pixels are just finer than asked, or as fine.

    Args:
        metres: side of a pixel, in EPSG:3857.
    """
    import morecantile

    grid = morecantile.tms.get("WebMercatorQuad")
    return min(int(grid.zoom_for_res(metres, zoom_level_strategy="upper", max_z=DEEPEST)), DEEPEST)
