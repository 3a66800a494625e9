"""Take pictures of a rendered city: by which camera, from where, and into which files.

A raw layout is a list of shots, each a camera with the files that get its picture, gathered in scenes. Neighbouring
scenes make a block, which is one task: the map around them is drawn once for all their shots. A task needs nothing but
itself, so any number of processes gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image

from sharding.simcity.drone import look_down
from sharding.simcity.map import Bytes, City
from sharding.simcity.raster import Raster, rasterise
from sharding.simcity.view import FAR, Rays, cut_tile, look_around

TILE_METRES = 70.4  # 640 pixels of 0.11 m, about VIGOR's
PITCH = TILE_METRES / 2  # from tile centre to tile centre on a city's grid
COARSEST = 0.6  # metres a pixel of the map, at most
BLOCK = 12 * PITCH  # metres: side of what one task renders; in smaller ones the edges that they share weigh more
STREET_FIELD = math.radians(90)


@dataclass(frozen=True)
class Look:
    """Set the sizes that every image is rendered at.

    Attributes:
        tile_size: pixels of a tile's side.
        view_size: height and width of a view in pixels.
        jpeg_quality: of JPEG files.
    """

    tile_size: int
    view_size: tuple[int, int]
    jpeg_quality: int

    @property
    def metres(self) -> float:
        """Side of the map's pixels: a whole fraction of the tile's, an even number of them a tile."""
        fold = max(1, math.ceil(TILE_METRES / self.tile_size / COARSEST))
        return TILE_METRES / (self.tile_size * (fold + self.tile_size * fold % 2))

    @property
    def fold(self) -> int:
        """Rays a pixel, each way: small pictures flicker with one."""
        return 2 if self.view_size[0] < 128 else 1

    def rays(self, heading: float, field: float) -> Rays:
        """Return the rays of a view; ``heading`` of its middle and ``field`` from edge to edge, in radians."""
        return _rays(self.view_size[0] * self.fold, self.view_size[1] * self.fold, self.metres, heading, field)


@lru_cache(1)  # the panorama's, again and again
def _rays(height: int, width: int, metres: float, heading: float, field: float) -> Rays:
    return Rays.of(height, width, metres, heading, field)


class Camera(Protocol):
    """Take one picture of a city."""

    def take(self, raster: Raster, look: Look) -> Bytes:
        """Return the picture of what the raster shows, (H, W, 3) RGB bytes."""
        ...


class Writer(Protocol):
    """Make a file of a picture that also says where it was taken."""

    def encode(self, picture: Bytes, quality: int) -> bytes:
        """Return the file's bytes."""
        ...


@dataclass(frozen=True)
class TileCamera:
    """Take the tile around (x, y), in metres, from straight above, north up."""

    x: float
    y: float

    def take(self, raster: Raster, look: Look) -> Bytes:
        """Return the picture, (H, W, 3) RGB bytes."""
        return cut_tile(raster, self.x, self.y, TILE_METRES, look.tile_size)


@dataclass(frozen=True)
class Panorama:
    """Look all around from the street at (x, y), north in the middle, ``light`` times as bright as usual."""

    x: float
    y: float
    light: float

    def take(self, raster: Raster, look: Look) -> Bytes:
        """Return the picture, (H, W, 3) RGB bytes."""
        return look_around(raster, self.x, self.y, look.rays(0.0, 2 * np.pi), self.light, look.fold)


@dataclass(frozen=True)
class StreetCamera:
    """Take a quarter of the panorama at (x, y), its middle ``heading`` radians clockwise from north."""

    x: float
    y: float
    heading: float
    light: float

    def take(self, raster: Raster, look: Look) -> Bytes:
        """Return the picture, (H, W, 3) RGB bytes."""
        return look_around(raster, self.x, self.y, look.rays(self.heading, STREET_FIELD), self.light, look.fold)


@dataclass(frozen=True)
class DroneCamera:
    """Look at the ground at (x, y) from the air, ``distance`` metres away, towards ``heading`` (radians)."""

    x: float
    y: float
    heading: float
    distance: float
    light: float

    def take(self, raster: Raster, look: Look) -> Bytes:
        """Return the picture, (H, W, 3) RGB bytes."""
        return look_down(
            raster, self.x, self.y, self.heading, self.distance, look.view_size, self.light, look.fold
        )  # fmt: skip


@dataclass(frozen=True)
class Shot:
    """Describe a picture to take.

    Attributes:
        camera: that takes it.
        files: below the raw folder, that hold it; PNG or JPEG by their suffix.
        writer: makes the file's bytes; None: they hold the picture and nothing else.
    """

    camera: Camera
    files: tuple[str, ...]
    writer: Writer | None = None


@dataclass(frozen=True)
class Scene:
    """Gather shots within sight of (x, y), in metres; street cameras are within half a tile's side of it."""

    x: float
    y: float
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Block:
    """Hold a task: scenes to render and the map around them.

    Attributes:
        raw: the folder that it writes to.
        city: the map within ``area``.
        area: west, south, east, north in metres.
        scenes: what to render.
        look: at which sizes.
    """

    raw: Path
    city: City
    area: tuple[float, float, float, float]
    scenes: list[Scene]
    look: Look


def blocks(raw: Path, city: City, scenes: list[Scene], look: Look) -> Iterator[Block]:
    """Yield the scenes of one city in squares of ``BLOCK`` metres.

    Args:
        raw: the folder to write to.
        city: the whole map.
        scenes: all of the city's.
        look: the sizes of images.
    """
    squares: dict[tuple[int, int], list[Scene]] = {}
    for scene in scenes:
        square = math.floor((scene.y + PITCH / 2) / BLOCK), math.floor((scene.x + PITCH / 2) / BLOCK)
        squares.setdefault(square, []).append(scene)
    margin = PITCH + FAR + 2
    for members in squares.values():
        xs, ys = [scene.x for scene in members], [scene.y for scene in members]
        area = (min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin)
        yield Block(raw, city.window(area), area, members, look)


def render_block(block: Block) -> int:
    """Take a block's shots and write their files, whose folders are there; return the number of shots."""
    metres = block.look.metres
    west, south = (math.floor(edge / metres) for edge in block.area[:2])
    east, north = (math.ceil(edge / metres) for edge in block.area[2:])
    raster = rasterise(block.city, west, south, north - south, east - west, metres)
    shots = [shot for scene in block.scenes for shot in scene.shots]
    for shot in shots:
        picture = np.ascontiguousarray(shot.camera.take(raster, block.look))
        encoded: dict[str, bytes] = {}
        for file in shot.files:
            suffix = file[file.rindex(".") :]
            if suffix not in encoded:
                quality = block.look.jpeg_quality
                encoded[suffix] = (
                    shot.writer.encode(picture, quality) if shot.writer else _encode(picture, suffix, quality)
                )
            (block.raw / file).write_bytes(encoded[suffix])
    return len(shots)


def _encode(picture: Bytes, suffix: str, quality: int) -> bytes:
    if suffix != ".png":
        return bytes(simplejpeg.encode_jpeg(picture, quality=quality))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
