"""Read GTA-UAV's raw folder: drone pictures of a game's country, and the tiles of its map at four zoom levels.

::

    drone/images/<height>_<flight>_<number>.png         pictures from 80 to 650 m above the ground
    satellite/<level>_<offset>_<column>_<row>.png       tiles, also without the offset
    cross-area-drone2sate-train.json, …-test.json       which tiles each picture shows, and where it was taken
    same-area-drone2sate-train.json, …-test.json

Source of the layout: Ji, He, Tan, Wu, Game4Loc, AAAI 2025 (code: Yux1angJi/GTA-UAV, its README and
``Game4Loc/game4loc/dataset/gta.py``; sizes from ``Game4Loc/train_gta.py``). The map is a square of 24,576 pixels of
0.45 m. A level has 2^level tiles a side, shifted by offset/256 of a tile. Positions are metres east and south of the
map's corner; here they become metres east and north.

A list names for each picture the tiles that overlap what it shows: *positives* (intersection over union above 0.39)
and *semi-positives* (above 0.14), with that number. A picture's place is the tile that overlaps most, and the others
are its semi-positives. As with the authors, pictures without a positive are trained on, but no test queries; the test
gallery is all tiles. Their R@1 counts any positive as right, while here the place's own tile alone is.

An area is a level: geographic neighbours are tiles of the same size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from geostream.errors import BadInput, MissingRaw
from sharding.adapters.raw_files import FolderIndex, Folders, find_root, located, read_number
from sharding.places import Place, RawDataset, RawImage, View, assign_keys, repeats
from sharding.raw_path import RawPath, stamps

SIZE = (384, 384)
PROTOCOLS = ("cross-area", "same-area")
TILES = "satellite"
TILE = re.compile(r"(\d+)(?:_(\d+))?_(\d+)_(\d+)\.(?:png|jpe?g)", re.IGNORECASE)
MAP_PIXELS, METRES = 24576, 0.45  # pixels of the map's side, and of one of them
OFFSETS = 256  # an offset is in pixels of a tile of so many


def read_places(raw: RawPath, *, protocol: str = "cross-area") -> RawDataset:
    """Read a GTA-UAV folder.

    Args:
        raw: the folder.
        protocol: "cross-area" (another part of the map for training than for testing) or "same-area".

    Returns:
        Its places. Missing images are marked, not refused.

    Raises:
        BadInput: a list is malformed.
        MissingRaw: a list or the folder of tiles is missing.
    """
    raw = find_root(
        raw, "GTA-UAV's lists, drone and satellite", tuple(f"{one}-drone2sate-test.json" for one in PROTOCOLS)
    )
    if protocol not in PROTOCOLS:
        raise BadInput(f"protocol {protocol!r}: GTA-UAV has {' and '.join(PROTOCOLS)}")
    folder = located(raw, TILES)
    if not folder.is_dir():
        raise MissingRaw(f"{raw}: no folder {TILES}; complete the folder.")
    tiles = _Tiles(FolderIndex(raw, folder))
    for name in sorted(stamps(folder)):
        if TILE.fullmatch(name):
            tiles.add(name, f"{TILES}/{name}", "test")
    folders, repeated = Folders(raw), 0
    views: dict[str, list[View]] = {}
    shown: dict[str, tuple[str, ...]] = {}  # of a picture: the tiles that show it, the best first
    for split in ("train", "test"):
        for where, entry in _entries(raw, f"{protocol}-drone2sate-{split}.json"):
            picture, overlapping, at = _read_entry(entry, split, folders, where)
            if not overlapping:
                continue
            before = shown.setdefault(picture.path, overlapping)
            if before is not overlapping:
                if before != overlapping:
                    raise BadInput(f"{where}: {picture.path} is listed before with other tiles; keep one of the two")
                repeated += 1
                continue
            for name in overlapping:
                tiles.add(name, where, split)
            views.setdefault(overlapping[0], []).append(View(picture, split, *at))
    return RawDataset(
        adapter="gta-uav",
        root=raw,
        options={"protocol": protocol},
        coordinates="utm",
        tile_size=SIZE,
        view_size=SIZE,
        places=tuple(tiles.places(views, shown)),
        notes=repeats(repeated),
    )


def _entries(raw: RawPath, name: str) -> Iterator[tuple[str, Any]]:
    """Yield ``file:number`` and each entry of a list, numbered from 1."""
    path = located(raw, name)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise MissingRaw(f"{path}: cannot read it ({error.strerror}); is the raw folder complete?") from error
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(content, list) or not content:
        raise BadInput(f"{path}: not a list of pictures; restore the file")
    yield from ((f"{name}:{number}", entry) for number, entry in enumerate(content, start=1))


def _read_entry(
    entry: Any, split: str, folders: Folders, where: str
) -> tuple[RawImage, tuple[str, ...], tuple[float, float]]:
    """Return an entry's picture, the tiles that show it, the best first, and its position; no tiles: it is left out."""
    try:
        picture = folders.find(f"{entry['drone_img_dir']}/{entry['drone_img_name']}", where)
        names, weights = (entry[f"pair_pos_semipos_sate_{what}_list"] for what in ("img", "weight"))
        positives = entry["pair_pos_sate_img_list"]
        x, y = (read_number(str(one), "a position in metres", where) for one in entry["drone_loc_x_y"])
        weighted = sorted(zip(weights, names, strict=True), key=lambda one: (-float(one[0]), one[1]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: no entry of GTA-UAV's lists ({error!r}); restore the file") from error
    left_out = split == "test" and not positives
    return picture, () if left_out else tuple(str(name) for _, name in weighted), _north_east(x, y)


def _north_east(x: float, y: float) -> tuple[float, float]:
    return MAP_PIXELS * METRES - y, x


class _Tiles:
    """Gather the tiles, each with the splits whose gallery holds it."""

    def __init__(self, index: FolderIndex) -> None:
        self.index = index
        self.splits: dict[str, dict[str, None]] = {}
        self.images: dict[str, RawImage] = {}

    def add(self, name: str, where: str, split: str) -> None:
        """Add a tile to the gallery of a split; raise BadInput where its name is none of a tile."""
        if name not in self.images:
            if not TILE.fullmatch(name):
                raise BadInput(f"{where}: {name!r} is no level_offset_column_row.png; restore GTA-UAV's own file names")
            self.images[name] = self.index.find(name, where)
        self.splits.setdefault(name, {})[split] = None

    def places(self, views: dict[str, list[View]], shown: dict[str, tuple[str, ...]]) -> Iterator[Place]:
        """Yield the places; a view's semi-positives are the other tiles that show it."""
        keys = assign_keys((_area(name), name) for name in self.images)
        for name, image in self.images.items():
            own = tuple(
                View(view.image, view.split, view.north, view.east, _semi(shown[view.image.path], keys))
                for view in views.get(name, ())
            )
            splits = tuple(split for split in ("train", "test") if split in self.splits[name])
            yield Place(keys[_area(name), name], _area(name), splits, image, *_centre(name), own)


def _semi(shown: tuple[str, ...], keys: dict[tuple[str, str], str]) -> tuple[str, ...]:
    return tuple(sorted(keys[_area(name), name] for name in shown[1:]))


def _area(name: str) -> str:
    return f"level-{name.partition('_')[0]}"


def _centre(name: str) -> tuple[float, float]:
    """Return metres north and east of a tile's centre."""
    match = TILE.fullmatch(name)
    assert match is not None, "checked when it was added"
    level, offset, column, row = (int(one or 0) for one in match.groups())
    side = MAP_PIXELS / 2**level * METRES
    x, y = (side * (at + 0.5 + offset / OFFSETS) for at in (column, row))
    return _north_east(x, y)
