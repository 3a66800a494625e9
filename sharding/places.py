"""What every adapter yields: a raw dataset as places, each image with the line that named it.

Decides the form between adapters and writer, so that nothing behind an adapter knows which dataset it reads. An
image is known by its path below the raw folder, and whether it is there was learnt from one listing per folder,
never from a look at each file; whether it can be decoded shows only when it is encoded. The whole listing is held
in memory: about 1 kB a place. How raw folders are read is in :mod:`sharding.adapters.raw_files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from geostream.errors import BadInput
from geostream.layout import Coordinates, Protocol

Size = tuple[int, int]  # height, width in pixels
IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)
LONGEST_KEY = 80  # so that "<key>.view-00.jpg" fits the 100 bytes of a plain tar header
SPLIT_ORDER = {"train": 0, "test": 1, "gallery": 2}


@dataclass(frozen=True)
class RawImage:
    """A raw file: its path below the raw folder, the ``file:line`` that named it, and whether it was found."""

    path: str
    named: str
    present: bool = True


@dataclass(frozen=True)
class View:
    """A query image of a place. ``semi_positives``: keys of other places whose tile shows it, too."""

    image: RawImage
    split: str  # "train", "test", or "gallery": no query, only a candidate where views are searched
    north: float = float("nan")
    east: float = float("nan")
    semi_positives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """A reference tile with its views (none: a distractor). ``splits``: those whose gallery holds the tile."""

    key: str
    area: str
    splits: tuple[str, ...]
    tile: RawImage
    north: float = float("nan")
    east: float = float("nan")
    views: tuple[View, ...] = ()

    def images(self) -> list[RawImage]:
        return [self.tile, *(view.image for view in self.views)]


@dataclass(frozen=True)
class RawDataset:
    """All places of a raw folder. ``tile_size`` and ``view_size``: what the field trains with on this dataset."""

    adapter: str
    root: Path
    options: dict[str, Any]  # the adapter's, as they were used
    coordinates: Coordinates
    tile_size: Size
    view_size: Size
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()  # what a person should know, e.g. duplicate lines
    protocols: tuple[Protocol, ...] = ("paired",)  # the rules that results are told by

    def count(self, split: str) -> int:
        """Number of pairs of ``split``."""
        return sum(view.split == split for place in self.places for view in place.views)


def sorted_places(places: Iterable[Place]) -> tuple[Place, ...]:
    """Places by (area, key), each one's views by (split, path): the order of place ids, whatever the lists' order."""
    ordered = []
    for place in sorted(places, key=lambda p: (p.area, p.key)):
        views = tuple(sorted(place.views, key=lambda v: (SPLIT_ORDER[v.split], v.image.path)))
        ordered.append(Place(place.key, place.area, place.splits, place.tile, place.north, place.east, views))
    return tuple(ordered)


def assign_keys(tiles: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A key for each (area, raw tile name): the name's stem, cleaned to ``[A-Za-z0-9_-]``, behind its area.

    Depends on the set of tiles alone, not on its order. Names that clean to the same key, or to one too long for a
    tar header, get a suffix from the crc32c of the raw name. Raises BadInput where even that leaves two alike.
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
    """The note that says that lines of a list were there twice."""
    return (f"{count} lines repeat an earlier one and were read once",) if count else ()
