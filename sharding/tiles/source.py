"""Define what a source of tiles is, and which kinds there are: GeoTIFFs, an XYZ template, a STAC search.

A source says where it has imagery and how fine that is, and gives each tile what reads its pixels later, in a process
that encodes. All sources are read in Web Mercator: it is north up everywhere, keeps the shape of what is small, and is
what XYZ services are made in. A tile's side there is its side on the ground divided by the cosine of its latitude.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geostream.errors import BadInput
from sharding.places import Box, Imagery
from sharding.sources import Stamp

if TYPE_CHECKING:
    from shapely import Geometry

MERCATOR_RADIUS = 6_378_137.0  # metres, of EPSG:3857
SUFFIXES = (".tif", ".tiff", ".gtiff", ".vrt")


@dataclass(frozen=True)
class TileWindow:
    """Say how a tile is to be read.

    Attributes:
        imagery: what reads it.
        pixels: the tile's side in the imagery's own pixels.
        stamp: as :class:`~sharding.places.TileImage` has it.
    """

    imagery: Imagery
    pixels: int
    stamp: Stamp


class TileSource(Protocol):
    """Know where there is imagery, and how to read it.

    Attributes:
        facts: its name, licence, attribution and url; None: unknown.
        notes: what a person should know of it.
    """

    @property
    def facts(self) -> dict[str, str | None]:
        """Return its name, licence, attribution and url; None: unknown."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a person should know of it."""
        ...

    def footprint(self) -> Geometry | None:
        """Return where there is imagery, in degrees; None: everywhere, as far as is known."""
        ...

    def window(self, box: Box) -> TileWindow:
        """Return how to read the tile that shows ``box``, which lies within the footprint."""
        ...


def facts_of(name: str, **others: str | None) -> dict[str, str | None]:
    """Return the facts of a source, in the order in which they are stored."""
    return {"name": name, **{key: others.get(key) for key in ("licence", "attribution", "url")}}


def mercator(longitude: float, latitude: float) -> tuple[float, float]:
    """Return the metres of EPSG:3857, east and north, of a point in degrees."""
    north = math.log(math.tan(math.pi / 4 + math.radians(latitude) / 2))
    return math.radians(longitude) * MERCATOR_RADIUS, north * MERCATOR_RADIUS


def mercator_box(box: Box) -> Box:
    """Return a box in degrees in the metres of EPSG:3857."""
    return (*mercator(box[0], box[1]), *mercator(box[2], box[3]))


def without_secrets(url: str) -> str:
    """Return what may be stored and shown of a URL: its scheme, its host and the file's name.

    Services take keys as user and password, in the query, and anywhere in the path. No rule tells a key from a folder's
    name, so the path is left out. Its last part stays where it ends like a file's name. Local paths hold no keys.
    """
    match = re.match(r"([\w+.-]+)://(?:[^/?#]*@)?([^/?#]*)([^?#]*)", url)
    if match is None or match[1].lower() == "file":
        return url
    folders, _, last = match[3].rpartition("/")
    name = re.fullmatch(r"([^/;]+\.[a-zA-Z]{2,5})(;.*)?", last)
    return f"{match[1]}://{match[2]}" + (f"{'/…' if folders else ''}/{name[1]}" if name else "")


def said_of(error: Exception, url: str) -> str:
    """Return what an error says, in one line, without what it quotes of a URL that may not be shown."""
    text = " ".join(str(error).split()).replace(url, without_secrets(url))
    if (match := re.match(r"[\w+.-]+://[^/?#]*(/[^?#]+)", url)) and not url.startswith("file:"):
        text = text.replace(match[1], "/…")
    return text[:300] or type(error).__name__


def open_source(text: str, box: Box, metres: float, work: Path) -> TileSource:
    """Open a source of tiles, and check that it can be read.

    Args:
        text: a GeoTIFF, a folder of them, or the URL of one; an XYZ template with {z}, {x} and {y}; or a STAC search,
            ``stac+https://HOST/PATH?collections=NAME``.
        box: the region that is wanted.
        metres: side of a tile on the ground.
        work: folder for what is downloaded.

    Raises:
        BadInput: it is nothing of the kind, or cannot be read.
        StoreError: a server refuses or does not answer.
    """
    if text.startswith("stac+"):
        from sharding.tiles.stac import search_stac

        return search_stac(text, box)
    if re.search(r"\{-?[zxyq]\}", text, re.IGNORECASE):
        from sharding.tiles.xyz import open_xyz

        return open_xyz(text, box, metres, work)
    from sharding.tiles.geotiff import open_rasters

    path = Path(text)
    if path.is_dir():
        paths = sorted(str(one) for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and not _hidden(one, path))
        if not paths:
            raise BadInput(f"{text}: no GeoTIFF ({', '.join(SUFFIXES)}) in this folder; name one that holds some")
        return open_rasters(paths, facts_of(path.name))
    if re.match(r"https?://", text):
        shown = without_secrets(text)
        return open_rasters([text], facts_of(shown.rpartition("/")[2], url=shown))
    if not path.is_file():
        raise BadInput(
            f"{without_secrets(text)}: no source of tiles; name a GeoTIFF, a folder of them, a template with {{z}}, "
            "{x} and {y}, or stac+https://HOST/PATH?collections=NAME"
        )
    return open_rasters([text], facts_of(path.name))


def _hidden(path: Path, folder: Path) -> bool:
    """Return whether a file, or a folder that it lies in, has a name that begins with a dot, as leftovers have."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def describe(box: Any) -> str:
    """Return a box as people write it, for messages: latitudes, then longitudes."""
    west, south, east, north = (float(edge) for edge in box)
    return f"latitude {south:.5f} to {north:.5f}, longitude {west:.5f} to {east:.5f}"
