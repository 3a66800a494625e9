"""Plan a rendered city as VIGOR's raw folder: where tiles and panoramas are, and what the label files say of them.

    <City>/panorama/<id>,<lat>,<lon>,.jpg      <City>/satellite/satellite_<lat>_<lon>.png
    splits/<City>/satellite_list.txt           all tiles, those without a panorama too
    splits/<City>/pano_label_balanced.txt      and same_area_balanced_train.txt, same_area_balanced_test.txt

That is the arrangement "published". In "arranged", as Sample4Geo's authors keep it, images lie in `ground/<City>` and
`satellite/<City>`, the labels' offsets are a little off, as VIGOR's first were, and the right ones are in
`splits__corrected/<City>/..__corrected.txt`.

A label line has 13 columns: the panorama, then (tile, row offset, column offset) for its positive tile and three
semi-positives, nearest first. Offsets are pixels of VIGOR's 640x640 tiles, whatever size is rendered. Their sign is
VIGOR's: tile minus panorama on the axes (north, east), so a positive row offset says that the panorama stands *south*
of the tile's centre, a positive column offset that it stands *west* of it (checked against the published labels, whose
file names hold both coordinates).

A misplaced panorama has a wrong position in its name, and the labels of that position: so it is with any data whose
tiles were found by the panoramas' GPS. Its picture is that of the place where it was taken.

Tiles lie on a grid of half a tile's side, so four tiles hold any panorama: the nearest is its positive, the others its
semi-positives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from geostream.errors import BadInput
from sharding.simcity.plan import TRIES, CitySpec, RawPlan, Town, panorama_id, standing_room
from sharding.simcity.shots import PITCH, TILE_METRES, Panorama, Scene, Shot, TileCamera

OFFSET_METRES = TILE_METRES / 640  # one unit of the offsets in the label files
MISPLACED_METRES = 50.0  # from where a misplaced panorama was taken to where its name says
FIRST_LABELS = 1.03  # by how much the offsets of labels that were corrected later are too long
FOLDERS = {  # of panoramas, of tiles
    "published": ("{city}/panorama", "{city}/satellite"),
    "arranged": ("ground/{city}", "satellite/{city}"),
}


@dataclass(frozen=True)
class Tile:
    """Hold a tile: its file's name, and its centre in metres."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class View:
    """Describe a panorama.

    Attributes:
        name: of its file, which says its position.
        x: metres east of where it was taken.
        y: metres north.
        light: times as bright as usual.
        shown: the four tiles that show the position in its name, each with its row and column offset.
    """

    name: str
    x: float
    y: float
    light: float
    shown: tuple[tuple[str, float, float], ...]

    def label(self, scale: float = 1.0) -> str:
        """Return the line in a label file, with offsets ``scale`` times as long as they should be."""
        columns = [self.name]
        for tile, row, column in self.shown:  # + 0.0: no "-0.0"
            columns += [tile, f"{round(row * scale, 2) + 0.0}", f"{round(column * scale, 2) + 0.0}"]
        return " ".join(columns)


def plan_vigor(
    towns: list[Town],
    rng: np.random.Generator,
    *,
    max_offset: float = 0.25,
    empty_share: float = 0.15,
    extra_view_share: float = 0.25,
    arrangement: str = "published",
    misplaced: Mapping[str, float] | None = None,
) -> RawPlan:
    """Plan each town as a city of VIGOR.

    Args:
        towns: the cities.
        rng: not used: a city follows from its own.
        max_offset: how far a panorama may stand from its tile's centre, north or east, in shares of the tile's side;
            VIGOR has 0.25, less is easier.
        empty_share: share of tiles that get no panorama on purpose; those that are built over get none, either.
        extra_view_share: probability that a tile with a panorama has a second, and one with two a third.
        arrangement: "published", or "arranged" as Sample4Geo's authors keep it.
        misplaced: by city, the probability that a panorama's position is wrong by MISPLACED_METRES; None: all are
            right.

    Raises:
        BadInput: an option makes no sense, or a city has room for no panorama.
    """
    if not 0 < max_offset <= 0.25:
        raise BadInput(f"max_offset {max_offset}: choose more than 0 and at most 0.25 of the tile's side")
    if not 0 <= empty_share < 1 or not 0 <= extra_view_share < 1:
        raise BadInput(f"empty_share {empty_share}, extra_view_share {extra_view_share}: choose from 0 up to below 1")
    if arrangement not in FOLDERS:
        raise BadInput(f"arrangement {arrangement!r}: choose one of {', '.join(FOLDERS)}")
    misplaced = misplaced or {}
    unknown = sorted(set(misplaced) - {town.spec.name for town in towns})
    if unknown or not all(0 <= share <= 1 for share in misplaced.values()):
        raise BadInput(f"misplaced {dict(misplaced)}: give names of cities that are rendered, and shares from 0 to 1")
    scenes: list[list[Scene]] = []
    files: dict[str, bytes] = {}
    tile_count = view_count = empty = 0
    for town in towns:
        name = town.spec.name
        tiles = plan_tiles(town.spec)
        views = plan_views(town, tiles, max_offset, empty_share, extra_view_share)
        if name in misplaced:
            views = [[misplace(town, tiles, view, misplaced[name]) for view in at_tile] for at_tile in views]
        if not any(views):
            raise BadInput(f"city {name} has room for no panorama: raise rows, columns or max_offset")
        panorama_folder, tile_folder = (folder.format(city=name) for folder in FOLDERS[arrangement])
        scenes.append([])
        for tile, at_tile in zip(tiles, views, strict=True):
            shots = [Shot(TileCamera(tile.x, tile.y), (f"{tile_folder}/{tile.name}",))]
            for view in at_tile:
                shots.append(Shot(Panorama(view.x, view.y, view.light), (f"{panorama_folder}/{view.name}",)))
            scenes[-1].append(Scene(tile.x, tile.y, tuple(shots)))
        listed = [view for at_tile in views for view in at_tile]
        files |= _splits(town, tiles, listed, arrangement)
        tile_count, view_count = tile_count + len(tiles), view_count + len(listed)
        empty += len(tiles) - len({view.shown[0][0] for view in listed})
    return RawPlan(scenes, files, tile_count, empty, view_count)


def plan_tiles(spec: CitySpec) -> list[Tile]:
    """Return all tiles, row by row from the south, each from the west."""
    tiles = []
    for j in range(spec.rows):
        for i in range(spec.columns):
            latitude, longitude = spec.degrees(i * PITCH, j * PITCH)
            tiles.append(Tile(f"satellite_{latitude:.12f}_{longitude:.12f}.png", i * PITCH, j * PITCH))
    return tiles


def plan_views(
    town: Town, tiles: list[Tile], max_offset: float, empty_share: float, extra_view_share: float
) -> list[list[View]]:
    """Return the views of each tile: none at some, up to three at others."""
    rng, (width, height) = town.rng, town.spec.extent
    rounded = 0.1  # metres: names hold 6 decimals of a degree, and the panorama stands where its name says
    limit = max_offset * TILE_METRES - rounded
    views: list[list[View]] = []
    for tile in tiles:
        wanted = 0 if rng.random() < empty_share else 1 + int(np.sum(np.cumprod(rng.random(2) < extra_view_share)))
        x = np.clip(tile.x + rng.uniform(-limit, limit, TRIES), rounded, width - rounded)
        y = np.clip(tile.y + rng.uniform(-limit, limit, TRIES), rounded, height - rounded)
        free = np.flatnonzero(standing_room(town.city, x, y))[:wanted]
        views.append([_view(town.spec, tiles, float(x[n]), float(y[n]), rng) for n in free])
    return views


def misplace(town: Town, tiles: list[Tile], view: View, share: float) -> View:
    """Return the view with a wrong position in its name and labels, with probability ``share``; else as it is.

    The wrong position lies within the city; where none does, the right one stays.
    """
    if town.rng.random() >= share:
        return view
    width, height = town.spec.extent
    for angle in town.rng.uniform(0, 2 * np.pi, TRIES):
        x, y = view.x + MISPLACED_METRES * np.cos(angle), view.y + MISPLACED_METRES * np.sin(angle)
        if 0 <= x <= width and 0 <= y <= height:
            name, _, _, shown = _said(town.spec, tiles, float(x), float(y), view.name.split(",")[0])
            return replace(view, name=name, shown=shown)
    return view


def _view(spec: CitySpec, tiles: list[Tile], x: float, y: float, rng: np.random.Generator) -> View:
    name, x, y, shown = _said(spec, tiles, x, y, panorama_id(rng))
    return View(name, x, y, float(rng.uniform(0.95, 1.05)), shown)


def _said(
    spec: CitySpec, tiles: list[Tile], x: float, y: float, identity: str
) -> tuple[str, float, float, tuple[tuple[str, float, float], ...]]:
    """Return a panorama's file name, the position in it, in metres, and the four tiles that show that position."""
    latitude, longitude = (round(degree, 6) for degree in spec.degrees(x, y))
    x, y = spec.metres(latitude, longitude)
    i = int(np.clip(x // PITCH, 0, spec.columns - 2))
    j = int(np.clip(y // PITCH, 0, spec.rows - 2))
    around = [tiles[(j + dj) * spec.columns + i + di] for dj in (0, 1) for di in (0, 1)]
    around.sort(key=lambda tile: math.hypot(tile.x - x, tile.y - y))
    shown = tuple((tile.name, (tile.y - y) / OFFSET_METRES, (tile.x - x) / OFFSET_METRES) for tile in around)
    return f"{identity},{latitude:.6f},{longitude:.6f},.jpg", x, y, shown


def _splits(town: Town, tiles: list[Tile], views: list[View], arrangement: str) -> dict[str, bytes]:
    """Return the lists of one city by their path."""
    ordered = sorted(views, key=View.label)  # by id: in no order of place, like VIGOR's
    train = np.zeros(len(ordered), bool)
    train[town.rng.permutation(len(ordered))[: len(ordered) // 2]] = True
    labels = {
        "pano_label_balanced": ordered,
        "same_area_balanced_train": [view for view, chosen in zip(ordered, train, strict=True) if chosen],
        "same_area_balanced_test": [view for view, chosen in zip(ordered, train, strict=True) if not chosen],
    }
    city = town.spec.name
    lists = {f"splits/{city}/satellite_list.txt": [tile.name for tile in tiles]}
    for name, chosen in labels.items():
        lists[f"splits/{city}/{name}.txt"] = [
            view.label(1.0 if arrangement == "published" else FIRST_LABELS) for view in chosen
        ]
        if arrangement == "arranged":
            lists[f"splits__corrected/{city}/{name}__corrected.txt"] = [view.label() for view in chosen]
    return {path: "".join(f"{line}\n" for line in lines).encode() for path, lines in lists.items()}
