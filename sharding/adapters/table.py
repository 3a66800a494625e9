"""Read pairs from a table: any data set, wherever its images lie, without an adapter of its own.

A CSV or TSV file with a head line, a Parquet file, or a GeoJSON file; one row a query::

    query,tile,split,area,lat,lon
    photos/0001.jpg,tiles/a1.png,train,Graz,47.0707,15.4395
    s3://bucket/photos/2.jpg,https://example.org/tiles/b7.jpg,test,Graz,47.0689,15.4410
    ,tiles/c3.png,test,Graz,47.0675,15.4422

=================== ==================================================================================================
``query``, ``tile`` A path below the table's folder, an absolute path, or a URL (s3, http, https). Several rows may name
                    one tile. A row without a query adds its tile to the gallery. One image under several names, such
                    as ``a.jpg`` and ``./a.jpg``, or a link to it, is one.
``split``           ``train`` or ``test``; ``gallery``: no query, only a candidate where views are searched. Without the
                    column every tenth tile, by its key, is for testing.
``key``             Names the tile: letters, digits, ``-`` and ``_``. Without the column, keys are made from ``tile``.
``area``            The city or region; without the column all is one area.
``lat``, ``lon``    Of the tile's centre, in degrees. All tiles have them, or none. Also called ``latitude`` and
                    ``longitude``; in GeoJSON and GeoParquet, the point of a row's geometry.
``query_lat``,      Where the query was taken.
``query_lon``
``semi_positives``  Other tiles that show the query, separated by ``;``: their keys, or without the column ``key`` their
                    images.
=================== ==================================================================================================

Images of a store are found by listing the folders that hold them; those of a web server are taken to be there. The
whole table is held in memory.
"""

from __future__ import annotations

import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import google_crc32c

from geostream.errors import BadInput
from sharding.adapters.raw_files import FolderIndex, Folders, read_position
from sharding.adapters.table_rows import POSITION, Row, read_table
from sharding.places import LONGEST_KEY, Place, RawDataset, RawImage, View, assign_keys, repeats
from sharding.raw_path import RawPath, StorePath, StoreTree, open_store_path
from sharding.raw_reader import WEB

SIZE = (384, 384)
OWN = ("query", "tile", "split", "key", "area", "query_lat", "query_lon", "semi_positives")
COLUMNS: dict[str, Sequence[str]] = {**{name: (name,) for name in OWN}, **POSITION}
SPLITS = ("train", "test", "gallery")
TESTED = 10  # where no split is given, one tile of so many is for testing
KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")
UNKNOWN = (math.nan, math.nan)


def read_places(raw: RawPath) -> RawDataset:
    """Read a table of pairs.

    Args:
        raw: the file; its suffix says what it is.

    Returns:
        Its places. Missing images are marked, not refused.

    Raises:
        BadInput: a column is missing, or a row contradicts itself or another; the message names file:line.
        MissingRaw: there is no such file.
    """
    table = read_table(raw, COLUMNS, ("query", "tile"))
    for pair in (("lat", "lon"), ("query_lat", "query_lon")):
        if len(there := table.columns & set(pair)) == 1:
            raise BadInput(f"{raw.name}: a column {min(there)}, but not both of {' and '.join(pair)}; add the other")
    if not table.rows:
        raise BadInput(f"{raw.name}: no row; a table has a row for each pair of query and tile")
    tiles = _Tiles(_Finder(raw.parent), table.columns)
    for where, row in table.rows:
        tiles.add(where, row | {"split": row["split"].lower()} if "split" in row else row)
    return RawDataset(
        adapter="table",
        root=raw.parent,
        options={},
        coordinates="latlon" if "lat" in table.columns else "none",
        tile_size=SIZE,
        view_size=SIZE,
        places=tuple(tiles.places()),
        notes=(*tiles.notes(), *([f"columns not used: {', '.join(table.unused)}"] if table.unused else [])),
    )


@dataclass
class _Tile:
    """What the rows say of one tile."""

    image: RawImage
    area: str
    key: str  # "" where the table has no keys
    position: tuple[float, float] = UNKNOWN
    splits: dict[str, None] = field(default_factory=dict)
    views: dict[str, tuple[View, tuple[str, ...]]] = field(default_factory=dict)  # and its semi-positives, as written


class _Tiles:
    """Gather the rows of each tile, and check that they agree."""

    def __init__(self, finder: _Finder, columns: frozenset[str]) -> None:
        self.finder, self.columns = finder, columns
        self.by_path: dict[str, _Tile] = {}
        self.paths: dict[str, str] = {}  # key of a tile: path of its image
        self.queries: dict[str, tuple[str, Row]] = {}
        self.repeated = 0

    def add(self, where: str, row: Row) -> None:
        """Take one row in."""
        if not row["tile"]:
            raise BadInput(f"{where}: no tile; each row names one")
        if "split" in self.columns and row["split"] not in SPLITS:
            raise BadInput(f"{where}: split {row['split']!r}; it is one of {', '.join(SPLITS)}")
        tile = self._tile(where, row)
        split = row.get("split", "")
        tile.splits.setdefault("test" if split == "gallery" else split)
        if not row["query"]:
            return
        image = self.finder.find(row["query"], where)
        said = row | {"query": image.path, "tile": tile.image.path}  # however the two are named
        if before := self.queries.get(image.path):
            if before[1] != said:
                raise BadInput(f"{where}: {row['query']} contradicts its other line, {before[0]}; keep one of the two")
            self.repeated += 1
            return
        self.queries[image.path] = where, said
        position = _position(row, "query_lat", "query_lon", where)
        semi = tuple(filter(None, (name.strip() for name in row.get("semi_positives", "").split(";"))))
        tile.views[image.path] = View(image, split, *position), semi

    def _tile(self, where: str, row: Row) -> _Tile:
        """Return the tile that a row names, a new one or one that earlier rows have named alike."""
        image = self.finder.find(row["tile"], where)
        area, key = row.get("area", "all"), row.get("key", "")
        if "area" in self.columns and not area:
            raise BadInput(f"{where}: no area; give one in each row, or leave the column out")
        if "key" in self.columns and not KEY.fullmatch(key):
            raise BadInput(f"{where}: key {key!r}: letters, digits, - and _, no more than {LONGEST_KEY}; rename it")
        tile = self.by_path.setdefault(image.path, _Tile(image, area, key))
        if (tile.area, tile.key) != (area, key):
            raise BadInput(
                f"{where}: {row['tile']} has area {area} {key}, but {tile.area} {tile.key} at {tile.image.named}; "
                "keep one of the two"
            )
        if key and (other := self.paths.setdefault(key, image.path)) != image.path:
            first = self.by_path[other].image.named
            raise BadInput(f"{where}: the key {key} has another tile at {first}; give each tile a key of its own")
        position = _position(row, "lat", "lon", where)
        if not math.isnan(position[0]):
            if not math.isnan(tile.position[0]) and tile.position != position:
                raise BadInput(f"{where}: {row['tile']} lies at {tile.position} in an earlier row; keep one of the two")
            tile.position = position
        return tile

    def places(self) -> Iterator[Place]:
        """Yield the places; raise BadInput where a semi-positive is no tile, or only some tiles have positions."""
        if "lat" in self.columns:
            for tile in self.by_path.values():
                if math.isnan(tile.position[0]):
                    raise BadInput(f"{tile.image.named}: no lat and lon; give them in all rows, or leave them out")
        made = {} if "key" in self.columns else assign_keys((one.area, path) for path, one in self.by_path.items())
        keys = {path: tile.key or made[tile.area, path] for path, tile in self.by_path.items()}
        for path, tile in self.by_path.items():
            drawn = "test" if google_crc32c.value(keys[path].encode()) % TESTED == 0 else "train"
            views = tuple(
                View(view.image, view.split or drawn, view.north, view.east, self._semi(view, semi, keys, path))
                for view, semi in tile.views.values()
            )
            splits = tuple(sorted({split or drawn for split in tile.splits}, reverse=True))
            yield Place(keys[path], tile.area, splits, tile.image, *tile.position, views)

    def _semi(self, view: View, names: Iterable[str], keys: dict[str, str], own: str) -> tuple[str, ...]:
        where, found = view.image.named, set[str]()
        for name in names:
            try:
                path = self.paths[name] if "key" in self.columns else self.finder.find(name, where).path
                key = keys[path]
            except (KeyError, BadInput) as error:
                message = f"{where}: semi-positive {name} is no tile of the table; add it, or mend it"
                raise BadInput(message) from error
            found.add(key)
        return tuple(sorted(found - {keys[own]}))

    def notes(self) -> tuple[str, ...]:
        """Return what a person should know."""
        drawn = (
            () if "split" in self.columns else (f"no column split: one tile of {TESTED}, by its key, is for testing",)
        )
        return (*repeats(self.repeated), *drawn)


def _position(row: Row, north: str, east: str, where: str) -> tuple[float, float]:
    """Return a position that a row may have; NaN where it has none."""
    texts = row.get(north, ""), row.get(east, "")
    return read_position(texts, f"{north}, {east}", where) if any(texts) else UNKNOWN


class _Finder:
    """Find the images that a table names: below its folder, anywhere on the disk, on stores and web servers.

    Of several names of one image the first counts, so that it does not become two tiles or two queries, of which one
    could be for training and the other for testing.
    """

    def __init__(self, folder: RawPath) -> None:
        self.folder, self.below = folder, Folders(folder)
        self.trees: dict[str, StoreTree] = {}  # listed folders of stores, by URL
        self.indexes: dict[str, FolderIndex] = {}  # listed local folders outside the table's own
        self.first: dict[str, str] = {}  # where an image really lies: the path by which it was first named
        self.real: dict[str, str] = {}  # local folder: where it lies without links

    def find(self, location: str, where: str) -> RawImage:
        """Return the image at a location; raise BadInput where that is malformed."""
        image = self._find(location, where)
        return replace(image, path=self.first.setdefault(self._really(image.path), image.path))

    def _find(self, location: str, where: str) -> RawImage:
        if "://" in location:
            return self._by_url(location, where)
        if isinstance(self.folder, StorePath) and self.folder.tree.store.is_web:
            return self._by_url(f"{self.folder}/{posixpath.normpath(location)}", where)
        if not location.startswith("/"):
            return self.below.find(location, where)
        folder, _, name = location.rpartition("/")
        folder = folder or "/"
        if folder not in self.indexes:
            self.indexes[folder] = FolderIndex(Path("/"), Path(folder))
        found = self.indexes[folder].find(name, where)
        return RawImage(f"/{found.path}", where, found.present)

    def _really(self, path: str) -> str:
        """Return the URL of an image, or where a local one lies without links; each folder's links are read once."""
        if "://" in path:
            return path
        if isinstance(self.folder, StorePath) and not path.startswith("/"):
            return f"{self.folder}/{path}"
        folder, _, name = (path if path.startswith("/") else f"{self.folder}/{path}").rpartition("/")
        folder = folder or "/"
        if folder not in self.real:
            self.real[folder] = os.path.realpath(folder)
        file = f"{self.real[folder]}/{name}"
        return os.path.realpath(file) if os.path.islink(file) else file  # noqa: PTH114, a Path costs more than the call

    def _by_url(self, url: str, where: str) -> RawImage:
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise BadInput(f"{where}: {url!r} is no URL ({error}); mend it") from error
        if parts.username or parts.password:
            raise BadInput(f"{where}: a URL with a password; the layout would keep it. Give access in another way")
        _, _, rest = url.partition("://")
        url = f"{parts.scheme}://{rest}"  # in lower case: "HTTP" is "http"
        if url.startswith(WEB):
            if not parts.hostname:
                raise BadInput(f"{where}: {url!r} names no server; mend it")
            return RawImage(f"{parts.scheme}://{parts.netloc.lower()}{rest[len(parts.netloc) :]}", where)
        folder, _, name = url.rpartition("/")
        tree, inside = self._tree(folder)
        stamp = tree.stamp(f"{inside}{name}")
        return RawImage(url, where, present=stamp is not None, stamp=stamp)

    def _tree(self, folder: str) -> tuple[StoreTree, str]:
        """Return a listing that covers a folder of a store, and the folder's path in it."""
        above = folder
        while above.count("/") >= 2:
            if above in self.trees:
                return self.trees[above], f"{folder.removeprefix(above).lstrip('/')}/".lstrip("/")
            above = above.rpartition("/")[0]
        self.trees[folder] = open_store_path(folder).tree
        return self.trees[folder], ""
