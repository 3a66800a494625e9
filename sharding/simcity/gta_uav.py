"""Plan rendered cities as GTA-UAV's raw folder: tiles of two zoom levels, and drone pictures from straight above.

    drone/images/100_0001_0000000001.png       satellite/7_0_8_120.png: level, offset, column, row
    cross-area-drone2sate-train.json           what each picture shows; the cities west of x = 3,375 m
    cross-area-drone2sate-test.json            the others
    same-area-drone2sate-train.json            four fifths of all pictures
    same-area-drone2sate-test.json             the others

Each city lies on the map's grid, so that its south-western corner is one of a level-6 tile. A picture's entry names
the tiles that overlap with what it shows: positives above an intersection over union of 0.39, semi-positives above
0.14. The real drone tilts a little; this one looks straight down. (Read from the code that the authors published.)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geostream.errors import BadInput
from sharding.simcity.map import Bytes
from sharding.simcity.plan import RawPlan, Town
from sharding.simcity.raster import Raster
from sharding.simcity.shots import Look, Scene, Shot
from sharding.simcity.view import fold_pixels

MAP_METRES = 24576 * 0.45
LEVELS = (6, 7)
POSITIVE, SEMI_POSITIVE = 0.39, 0.14  # intersection over union
CORNERS = (4, 24)  # columns of level 6 where the cities of training, and of the test, begin
ROWS = 14  # of level 6, from one city to the next
ABOVE = (60.0, 150.0)  # metres above the ground
FIELD = 2 * math.tan(math.radians(30))  # width of what a picture shows, by the height
SAMPLES = 48  # points a side by which an overlap is measured


@dataclass(frozen=True)
class MapCamera:
    """Take the ground around (x, y), in metres, from straight above, its upper edge ``heading`` radians from north."""

    x: float
    y: float
    width: float
    heading: float = 0.0
    light: float = 1.0
    is_tile: bool = True

    def take(self, raster: Raster, look: Look) -> Bytes:
        """Return the picture, (H, W, 3) RGB bytes."""
        rows, columns = (look.tile_size, look.tile_size) if self.is_tile else look.view_size
        fold = max(1, round(self.width / columns / raster.metres))
        up, right = _grid(rows * fold, columns * fold, self.width)
        east, north = _turned(self.x, self.y, right, up, self.heading)
        row = ((raster.north - north) / raster.metres).astype(np.int64)
        column = ((east - raster.west) / raster.metres).astype(np.int64)
        picture = raster.colour[row, column].astype(np.float32) * self.light
        done: Bytes = np.minimum(fold_pixels(picture, fold) + 0.5, 255).astype(np.uint8)
        return done


@dataclass(frozen=True)
class _Site:
    """Hold a town's tiles, and where the town lies on the map.

    Attributes:
        tiles: by the file's name, each with its centre in the town's own metres, and its side.
        west: metres from the map's western edge to the town's.
        south: metres from the map's northern edge to the town's southern one.
    """

    tiles: dict[str, tuple[float, float, float]]
    west: float
    south: float

    def on_map(self, x: float, y: float) -> list[float]:
        """Return a point as the lists have it: metres east and south of the map's corner."""
        return [self.west + x, self.south - y]


def plan_gta_uav(towns: list[Town], rng: np.random.Generator, *, views_a_tile: float = 2.0) -> RawPlan:
    """Plan the towns as GTA-UAV: the first half of them for training, the others for the cross-area test.

    Args:
        towns: the cities; large enough for a level-6 tile, 173 m.
        rng: draws the same-area lists.
        views_a_tile: drone pictures for each level-7 tile.

    Raises:
        BadInput: there are too few cities, a city is too small, or the option makes no sense.
    """
    if len(towns) < 2 or views_a_tile <= 0:
        raise BadInput(f"{len(towns)} cities, views_a_tile {views_a_tile}: choose two or more, and more than 0")
    half = (len(towns) + 1) // 2
    scenes: list[list[Scene]] = []
    entries: list[tuple[bool, dict[str, Any]]] = []  # whether it is of a test city
    tiles, shown = 0, set[str]()
    for number, town in enumerate(towns):
        site = _site(town, CORNERS[number >= half], ROWS * (number % half + 1))
        of_town = [
            Scene(x, y, (Shot(MapCamera(x, y, side), (f"satellite/{name}",)),))
            for name, (x, y, side) in site.tiles.items()
        ]
        for _ in range(round(views_a_tile * sum(name.startswith("7_") for name in site.tiles))):
            scene, entry = _drone(town, site, len(entries) + 1)
            of_town.append(scene)
            entries.append((number >= half, entry))
            shown |= set(entry["pair_pos_semipos_sate_img_list"])
        scenes.append(of_town)
        tiles += len(site.tiles)
    order = rng.permutation(len(entries))
    cut = len(entries) * 4 // 5
    lists = {
        "cross-area-drone2sate-train": [entry for is_test, entry in entries if not is_test],
        "cross-area-drone2sate-test": [entry for is_test, entry in entries if is_test],
        "same-area-drone2sate-train": [entries[n][1] for n in order[:cut]],
        "same-area-drone2sate-test": [entries[n][1] for n in order[cut:]],
    }
    files = {f"{name}.json": json.dumps(content, indent=1).encode() for name, content in lists.items()}
    return RawPlan(scenes, files, tiles, tiles - len(shown), len(entries))


def _site(town: Town, column: int, row: int) -> _Site:
    """Return a town's tiles, where its south-western corner is that of a level-6 tile.

    Raises BadInput where the town is too small for one.
    """
    tiles = {}
    for level in LEVELS:
        side, fold = MAP_METRES / 2**level, 2 ** (level - LEVELS[0])
        columns, rows = (int(length // side) for length in town.spec.extent)
        if not columns or not rows:
            raise BadInput(f"city {town.spec.name} is too small for a tile of level {level}, {side:.0f} m")
        for j in range(rows):
            for i in range(columns):
                name = f"{level}_0_{column * fold + i}_{(row + 1) * fold - 1 - j}.png"
                tiles[name] = (i + 0.5) * side, (j + 0.5) * side, side
    largest = MAP_METRES / 2 ** LEVELS[0]
    return _Site(tiles, column * largest, (row + 1) * largest)


def _drone(town: Town, site: _Site, number: int) -> tuple[Scene, dict[str, Any]]:
    """Return a drone picture somewhere over a town, and its entry in the lists."""
    rng, (width, height) = town.rng, town.spec.extent
    x, y = float(rng.uniform(0, width)), float(rng.uniform(0, height))
    above, heading = float(rng.uniform(*ABOVE)), float(rng.uniform(0, 2 * math.pi))
    camera = MapCamera(x, y, above * FIELD, heading, float(rng.uniform(0.92, 1.08)), is_tile=False)
    overlap = {name: round(overlap_of(camera, *tile), 4) for name, tile in site.tiles.items()}
    file = f"{100 * math.ceil(above / 100)}_0001_{number:010d}.png"
    entry: dict[str, Any] = {
        "drone_img_dir": "drone/images",
        "drone_img_name": file,
        "drone_loc_x_y": site.on_map(x, y),
        "sate_img_dir": "satellite",
    }
    for kind, least in (("pos", POSITIVE), ("pos_semipos", SEMI_POSITIVE)):
        names = [name for name in site.tiles if overlap[name] > least]
        entry[f"pair_{kind}_sate_img_list"] = names
        entry[f"pair_{kind}_sate_weight_list"] = [overlap[name] for name in names]
        entry[f"pair_{kind}_sate_loc_x_y_list"] = [site.on_map(*site.tiles[name][:2]) for name in names]
    entry["drone_metadata"] = {"height": above, "cam_roll": -90.0, "cam_pitch": 0.0, "cam_yaw": math.degrees(heading)}
    return Scene(x, y, (Shot(camera, (f"drone/images/{file}",)),)), entry


def overlap_of(camera: MapCamera, x: float, y: float, side: float) -> float:
    """Return the intersection over union of what a picture of 4 to 3 shows and a tile, by a grid of points.

    Args:
        camera: of the picture.
        x: metres east of the tile's centre.
        y: metres north of it.
        side: of the tile in metres.
    """
    up, right = _grid(SAMPLES * 3 // 4, SAMPLES, camera.width)
    east, north = _turned(camera.x, camera.y, right, up, camera.heading)
    inside = (np.abs(east - x) < side / 2) & (np.abs(north - y) < side / 2)
    shown = camera.width**2 * 3 / 4
    common = shown * float(inside.mean())
    return common / (shown + side**2 - common)


def _grid(rows: int, columns: int, width: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return metres up and right of the middle, of each pixel of a picture that is ``width`` metres wide."""
    pixel = width / columns
    up: NDArray[np.float64] = ((rows - 1) / 2 - np.arange(rows, dtype=np.float64)) * pixel
    right: NDArray[np.float64] = (np.arange(columns, dtype=np.float64) - (columns - 1) / 2) * pixel
    return up[:, None], right[None, :]


def _turned(
    x: float, y: float, right: NDArray[np.float64], up: NDArray[np.float64], heading: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return metres east and north of points given in a picture's own directions."""
    sine, cosine = math.sin(heading), math.cos(heading)
    east: NDArray[np.float64] = x + right * cosine + up * sine
    north: NDArray[np.float64] = y - right * sine + up * cosine
    return east, north
