"""Read CVUSA's raw folder: one panorama and one tile a place, all over the United States.

::

    splits/train-19zl.csv        tile, panorama[, annotation]: paths below the raw folder, no header
    splits/val-19zl.csv          the same, of the test pairs
    bingmap/19/0000001.jpg       a tile; its number is the row (from 1) of its coordinates
    streetview/panos/0000001.jpg
    split_locations/all.csv      latitude and longitude of the tile, then of the panorama[, …]: no header; in mirrors
                                 beside splits/ or in it

Source of the layout: Zhai et al., Predicting Ground-Level Scene Layout from Aerial Imagery, CVPR 2017, as Sample4Geo
reads it; from there come the sizes, too: panoramas keep their aspect of 224 to 1232.

Where ``all.csv`` is missing, or has no row for an image, there are no coordinates: only GPS sampling needs them. All is
one area. Lines that contradict each other are an error that names file and line.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import PurePosixPath

from geostream.errors import BadInput
from sharding.adapters.raw_files import Folders, find_root, first_located, read_lines, read_position, split_cells
from sharding.places import Place, RawDataset, RawImage, View, assign_keys, repeats
from sharding.raw_path import RawPath

TILE_SIZE = (384, 384)
VIEW_SIZE = (140, 768)
LISTS = {"train": "splits/train-19zl.csv", "test": "splits/val-19zl.csv"}
LOCATIONS = ("split_locations/all.csv", "all.csv", "splits/all.csv")  # as published, and as mirrors have it
AREA = "USA"
Position = tuple[float, float]  # north, east
UNKNOWN: Position = (math.nan, math.nan)


def read_places(raw: RawPath) -> RawDataset:
    """Read a CVUSA folder.

    Args:
        raw: the folder.

    Returns:
        Its places. Missing images are marked, not refused.

    Raises:
        BadInput: a list is malformed.
        MissingRaw: a list is missing.
    """
    raw = find_root(raw, "CVUSA's splits, bingmap and streetview", tuple(LISTS.values()))
    folders = Folders(raw)
    tiles: dict[str, RawImage] = {}  # by path, like all below
    pairs: dict[str, list[tuple[str, RawImage]]] = {}  # of a tile: splits and panoramas
    seen: dict[str, tuple[str, str, str]] = {}  # of a panorama: its split, its tile, where it was named
    repeated = 0
    for split, name in LISTS.items():
        for where, cells in read_lines(raw, raw / name).cells():
            if len(cells) < 2:
                raise BadInput(f"{where}: {len(cells)} columns instead of tile, panorama, annotation; mend the line")
            tile, panorama = (folders.find(cell, where) for cell in cells[:2])
            before = seen.setdefault(panorama.path, (split, tile.path, where))
            if before[:2] != (split, tile.path):
                raise BadInput(f"{where}: {cells[1]} contradicts its other line, {before[2]}; keep one of the two")
            if before[2] != where:
                repeated += 1
                continue
            tiles.setdefault(tile.path, tile)
            pairs.setdefault(tile.path, []).append((split, panorama))
    positions, notes = _locate(raw, tiles)
    keys = assign_keys((AREA, path) for path in tiles)
    places = []
    for path, tile in tiles.items():
        at, panorama_at = positions.get(path, (UNKNOWN, UNKNOWN))
        views = tuple(View(panorama, split, *panorama_at) for split, panorama in pairs[path])
        splits = tuple(split for split in LISTS if any(view.split == split for view in views))
        places.append(Place(keys[AREA, path], AREA, splits, tile, *at, views))
    return RawDataset(
        adapter="cvusa",
        root=raw,
        options={},
        coordinates="latlon" if positions else "none",
        tile_size=TILE_SIZE,
        view_size=VIEW_SIZE,
        places=tuple(places),
        notes=(*repeats(repeated), *notes),
    )


def _locate(raw: RawPath, tiles: Collection[str]) -> tuple[dict[str, tuple[Position, Position]], list[str]]:
    """Return where each tile and its panorama lie, and a note where that is not known of all."""
    there = first_located(raw, LOCATIONS)
    if there is None:
        return {}, [f"no {' nor '.join(LOCATIONS)}: no coordinates, and so no GPS sampling"]
    rows = read_lines(raw, there)
    found = {}
    for path in tiles:
        number = PurePosixPath(path).stem
        if number.isdecimal() and 1 <= int(number) <= len(rows.lines):
            line, text = rows.lines[int(number) - 1]
            cells = split_cells(text, rows.where(line))
            if len(cells) < 4:
                raise BadInput(f"{rows.where(line)}: {len(cells)} columns instead of 4; mend the line")
            of_tile, of_panorama = (read_position(cells[at : at + 2], path, rows.where(line)) for at in (0, 2))
            found[path] = of_tile, of_panorama
    without = len(tiles) - len(found)
    return found, [f"{rows.name} has no row for {without} of {len(tiles)} tiles: no coordinates"] if without else []
