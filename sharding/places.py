"""Describe a raw data set as places: what every adapter returns, and all that the code behind it knows.

An image is a path below the raw folder, or a URL, with the line of the list that named it. One listing a folder tells
whether it is there; whether it can be decoded shows when it is encoded. A tile may also be a window of imagery, and no
file of its own. All places are held in memory: about 1 kB each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import google_crc32c

from geostream.errors import BadInput
from geostream.images import Pixels
from geostream.layout import Coordinates
from geostream.layout import Protocol as Evaluated
from sharding.raw_path import RawPath
from sharding.sources import Stamp

Size = tuple[int, int]  # height, width in pixels
Box = tuple[float, float, float, float]  # west, south, east, north in degrees
IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)
LONGEST_KEY = 80  # so that "<key>.view-00.jpg" fits the 100 bytes of a plain tar header
SPLIT_ORDER = {"train": 0, "test": 1, "gallery": 2}


@dataclass(frozen=True)
class RawImage:
    """Name a raw image file.

    Attributes:
        path: below the raw folder, with "/" between folders; or an absolute path, or a URL.
        named: the ``file:line`` that named it, for messages.
        present: whether the file was found; a URL of a web server is taken to be there.
        stamp: what the listing of a store has of it; None: it is to be looked at.
    """

    path: str
    named: str
    present: bool = True
    stamp: Stamp | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class KeptImage(RawImage):
    """Name an image whose stored bytes are taken over from an earlier layout, whatever its raw file holds now.

    Attributes:
        shard: path of the shard that holds them, below the data set's ``layouts`` folder.
        offset: bytes from the shard's beginning.
        size: bytes.
        crc32c: their checksum.
        suffix: of the file type that they are.
    """

    shard: str
    offset: int
    size: int
    crc32c: int
    suffix: Literal["jpg", "png"]


@dataclass(frozen=True, kw_only=True)
class Photo(RawImage):
    """Name a picture that a person took; it is stored upright, as its EXIF orientation says.

    Attributes:
        heading: degrees clockwise from north that the middle of a panorama looks to. It is stored with north in the
            middle, as panoramas of all data sets are. None: unknown, or no panorama; it is not turned.
    """

    heading: float | None = None


class Imagery(Protocol):
    """Read windows of imagery, such as GeoTIFFs. It is sent to the processes that encode, so it holds no open file."""

    def read(self, box: Box, height: int, width: int) -> Pixels:
        """Return what lies in a box, north up, as (height, width, 3) RGB pixels.

        Raises:
            Uncovered: there is no imagery in a part of the box.
            GeostreamError: it cannot be read now.
        """
        ...


class Uncovered(Exception):
    """Say why there is no imagery in a part of a tile; the tile is left out, and counted."""


@dataclass(frozen=True, kw_only=True)
class TileImage(RawImage):
    """Name a tile that is cut from imagery when it is encoded; ``path`` is a name for it and no file.

    Attributes:
        box: what it shows.
        imagery: where its pixels come from.
        pixels: its side in the imagery's own pixels; more are not read.
        stamp: the same as before where the imagery under the tile has not changed.
    """

    box: Box
    imagery: Imagery
    pixels: int
    stamp: Stamp

    def size(self, stored: Size | None) -> Size:
        """Return the (height, width) to read, to be stored at a size; None: at the imagery's own."""
        return (
            (self.pixels, self.pixels) if stored is None else (min(stored[0], self.pixels), min(stored[1], self.pixels))
        )


@dataclass(frozen=True)
class Broken:
    """Name an image that is left out, and why.

    Attributes:
        path: below the raw folder.
        named: the ``file:line`` that named it.
        reason: why.
    """

    path: str
    named: str
    reason: str

    def __str__(self) -> str:
        return f"{self.named}: {self.path}: {self.reason}"


@dataclass(frozen=True)
class View:
    """Describe a query image of a place.

    Attributes:
        image: its file.
        split: "train", "test", or "gallery": no query, only a candidate where views are searched.
        north: degrees or metres, as the data set's ``coordinates`` say; NaN: unknown.
        east: likewise.
        semi_positives: keys of other places whose tile shows it, too.
        heading: degrees clockwise from north that the middle of the stored picture looks to; None: unknown.
    """

    image: RawImage
    split: str
    north: float = float("nan")
    east: float = float("nan")
    semi_positives: tuple[str, ...] = ()
    heading: float | None = None


@dataclass(frozen=True)
class Place:
    """Describe a place: a reference tile with its views.

    Attributes:
        key: names the place in the whole data set; from :func:`assign_keys`.
        area: the city or region that it lies in.
        splits: "train" and "test", as far as their gallery holds the tile.
        tile: its file.
        north: of the tile's centre, degrees or metres; NaN: unknown.
        east: likewise.
        views: its query images; none: a distractor.
    """

    key: str
    area: str
    splits: tuple[str, ...]
    tile: RawImage
    north: float = float("nan")
    east: float = float("nan")
    views: tuple[View, ...] = ()

    def images(self) -> list[RawImage]:
        """Return its tile and the images of its views."""
        return [self.tile, *(view.image for view in self.views)]


@dataclass(frozen=True)
class RawDataset:
    """Hold all places of a raw folder.

    Attributes:
        adapter: the data set's name in the registry (:mod:`sharding.adapters`).
        root: the raw folder, on a local disk or a store.
        options: the adapter's, as they were used.
        coordinates: "latlon" (degrees), "utm" (metres) or "none".
        tile_size: (height, width) in pixels that tiles are usually trained with.
        view_size: the same of views.
        places: all of them.
        notes: what a person should know, such as repeated lines.
        protocols: the evaluation protocols, the default one first.
        left_out: images that cannot become part of any place, such as photos without coordinates; they count as broken.
        source: where the tiles come from: their name, licence, attribution and url; None: it is not known.
        tile_metres: side of a tile on the ground; None: it is not known, or differs.
        is_gallery: there are tiles alone, to search in; else there must be pairs to train on.
    """

    adapter: str
    root: RawPath
    options: dict[str, Any]
    coordinates: Coordinates
    tile_size: Size
    view_size: Size
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()
    protocols: tuple[Evaluated, ...] = ("paired",)
    left_out: tuple[Broken, ...] = ()
    source: dict[str, Any] | None = None
    tile_metres: float | None = None
    is_gallery: bool = False

    @property
    def n_listed(self) -> int:
        """Number of images, whole or not, those that no place can be made of included."""
        return sum(len(place.images()) for place in self.places) + len(self.left_out)

    def count(self, split: str) -> int:
        """Return the number of pairs of a split."""
        return sum(view.split == split for place in self.places for view in place.views)


def sorted_places(places: Iterable[Place]) -> tuple[Place, ...]:
    """Return places by area and key, each one's views by split and path: the order of place ids."""
    ordered = []
    for place in sorted(places, key=lambda p: (p.area, p.key)):
        views = tuple(sorted(place.views, key=lambda v: (SPLIT_ORDER[v.split], v.image.path)))
        ordered.append(Place(place.key, place.area, place.splits, place.tile, place.north, place.east, views))
    return tuple(ordered)


def assign_keys(tiles: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Give each tile a key: its area and the stem of its name, with all but ``[A-Za-z0-9_-]`` replaced by hyphens.

    Keys do not depend on the order of the tiles. Where two would be equal, or one too long for a tar header, they end
    in the crc32c of the raw name.

    Args:
        tiles: (area, raw name) of each.

    Returns:
        The key of each (area, raw name).

    Raises:
        BadInput: two tiles still get the same key.
    """
    wanted = set(tiles)
    cleaned = {tile: re.sub(r"[^A-Za-z0-9_-]", "-", f"{tile[0]}_{IMAGE_SUFFIX.sub('', tile[1])}") for tile in wanted}
    shared: dict[str, int] = {}
    for key in cleaned.values():
        shared[key] = shared.get(key, 0) + 1
    keys: dict[tuple[str, str], str] = {}
    owner: dict[str, tuple[str, str]] = {}
    for tile in sorted(wanted):
        key = cleaned[tile]
        if shared[key] > 1 or len(key) > LONGEST_KEY:
            suffix = google_crc32c.value("/".join(tile).encode())
            key = f"{key[: LONGEST_KEY - 9]}_{suffix:08x}"
        if key in owner:
            raise BadInput(f"tiles {'/'.join(owner[key])} and {'/'.join(tile)} get the same key {key}; rename one")
        keys[tile], owner[key] = key, tile
    return keys


def repeats(count: int) -> tuple[str, ...]:
    """Return the note that says that ``count`` lines of a list were there twice; none for 0."""
    return (f"{count} lines repeat an earlier one and were read once",) if count else ()
