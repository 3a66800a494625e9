"""Render what a camera sees: the tile from straight above, the panorama from the street.

A panorama is a march over the height field along one ray a column. The steepest slope met so far only rises along a
ray, so the first thing seen at each elevation is found by counting, without a loop over pixels. Surfaces are vertical
or flat (no arches, no tree trunks), and thin things far away may be stepped over.

A panorama's middle lies between its two middle columns and looks north; columns go clockwise, so east is at 3/4 of the
width. Pixels are square in angle: 360/width degrees a pixel both ways, the horizon between the two middle rows. A
panorama half as high as wide is VIGOR's full sphere; 48x192 is the sphere's middle 90 degrees. Other rays give other
windows of the sphere, from other heights: :mod:`sharding.simcity.drone` looks down through one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.simcity.map import Bytes
from sharding.simcity.raster import BUILDING, GROUND, TREE, Raster, hash_noise

Points = NDArray[np.float32] | NDArray[np.float64]  # metres

EYE = 2.5  # metres above the ground
FAR = 100.0  # metres; what is farther is sky
NEAR = 0.3
HAZE_METRES = 200.0
FLOOR = 3.2  # metres from floor to floor
GLASS = np.array([45, 60, 85], np.float32)
HAZE = np.array([205, 215, 225], np.float32)
ZENITH = np.array([95, 150, 215], np.float32)


@dataclass(frozen=True)
class Rays:
    """Hold the directions and distances that panoramas of one kind are marched along.

    Attributes:
        elevation: (H,) radians of the rows, from the bottom row up.
        east: (W,) of the columns' unit vectors.
        north: (W,) likewise.
        distance: (K,) metres of the steps on the ground.
        pixel: radians a pixel.
        below: rows under the horizon, and half a row.
        eye: metres above the ground.
        haze: metres at which things fade.
    """

    elevation: NDArray[np.float32]
    east: NDArray[np.float32]
    north: NDArray[np.float32]
    distance: NDArray[np.float32]
    pixel: float
    below: float
    eye: float = EYE
    haze: float = HAZE_METRES

    @classmethod
    def of(cls, height: int, width: int, metres: float, heading: float = 0.0, field: float = 2 * np.pi) -> Rays:
        """Return the rays of a picture from the street.

        Args:
            height: of the picture in pixels.
            width: likewise.
            metres: side of a pixel of the map.
            heading: where the middle looks, radians clockwise from north.
            field: radians from the left edge to the right.
        """
        pixel = field / width
        azimuth = heading + (np.arange(width) + 0.5 - width / 2) * pixel
        return cls(
            elevation=((np.arange(height) + 0.5 - height / 2) * pixel).astype(np.float32),
            east=np.sin(azimuth).astype(np.float32),
            north=np.cos(azimuth).astype(np.float32),
            distance=steps(NEAR, FAR, pixel, metres),
            pixel=pixel,
            below=height / 2 + 0.5,
        )


def steps(near: float, far: float, pixel: float, metres: float) -> NDArray[np.float32]:
    """Return distances as fine as the map's pixels, or as half of the picture's.

    Args:
        near: metres, the first.
        far: metres, which the last one reaches.
        pixel: radians a pixel of the picture.
        metres: side of a pixel of the map.
    """
    distance = [near]
    while distance[-1] < far:
        distance.append(distance[-1] + max(0.75 * metres, 0.5 * pixel * distance[-1]))
    return np.array(distance, np.float32)


def cut_tile(raster: Raster, x: float, y: float, side: float, size: int) -> Bytes:
    """Return the tile around a point, (size, size, 3) RGB bytes, north up.

    Args:
        raster: its pixels are a whole fraction of the tile's, and the tile's edges lie on theirs.
        x: metres east of the tile's centre.
        y: metres north of it.
        side: of the tile in metres.
        size: of the tile in pixels.
    """
    fine = round(side / raster.metres)
    row = round((raster.north - (y + side / 2)) / raster.metres)
    column = round((x - side / 2 - raster.west) / raster.metres)
    cut = raster.colour[row : row + fine, column : column + fine].astype(np.float32)
    tile: Bytes = (fold_pixels(cut, fine // size) + 0.5).astype(np.uint8)
    return tile


def fold_pixels(picture: NDArray[np.float32], fold: int) -> NDArray[np.float32]:
    """Return the mean of each fold x fold pixels."""
    total = picture[::fold, ::fold].copy()
    for n in range(1, fold * fold):
        total += picture[n // fold :: fold, n % fold :: fold]
    return total / np.float32(fold * fold)


def look_around(raster: Raster, x: float, y: float, rays: Rays, light: float = 1.0, fold: int = 1) -> Bytes:
    """Return the panorama over a point, (H / fold, W / fold, 3) RGB bytes.

    Args:
        raster: the city around the point.
        x: metres east.
        y: metres north.
        rays: H x W of them, from their eye's height.
        light: times as bright as usual.
        fold: each pixel is the mean of fold x fold rays, against flicker in small panoramas.
    """
    columns = len(rays.east)
    first = _first_hits(raster, x, y, rays).ravel()
    hit = np.flatnonzero(first < len(rays.distance))
    row, column = np.divmod(hit, columns)
    distance, before, at = _refine(raster, x, y, rays, row, column, first[hit])
    seen = raster.colour.reshape(-1, 3)[at].astype(np.float32)
    kind = raster.kind.ravel()[at]
    # Under the roof just before the hit: the ray came through the wall.
    under = rays.eye + before * np.tan(rays.elevation)[row] < raster.height.ravel()[at]
    wall = np.flatnonzero((kind >= BUILDING) & under)
    seen[wall] = _walls(raster, x, y, rays, row[wall], column[wall], distance[wall], kind[wall] - BUILDING)
    tree = np.flatnonzero(kind == TREE)
    rise = rays.eye + distance[tree] * np.tan(rays.elevation)[row[tree]]
    top = np.maximum(raster.height.ravel()[at[tree]], np.float32(0.1))
    seen[tree] *= (0.55 + 0.45 * np.clip(rise / top, 0, 1))[:, None]  # darker towards the foot
    clear = np.exp(distance / np.float32(-rays.haze))[:, None]
    colour = _sky(rays)
    colour.reshape(-1, 3)[hit] = HAZE + (seen - HAZE) * clear
    done: Bytes = np.clip(fold_pixels(colour[::-1], fold) * np.float32(light) + 0.5, 0, 255).astype(np.uint8)
    return done


def _pixels(raster: Raster, x: Points, y: Points) -> NDArray[np.int64]:
    """Return flat indices of the raster's pixels that hold the points; points outside take the nearest edge."""
    rows, columns = raster.height.shape
    row = ((raster.north - y) * (1 / raster.metres)).astype(np.int64)
    column = ((x - raster.west) * (1 / raster.metres)).astype(np.int64)
    np.clip(row, 0, rows - 1, out=row)
    np.clip(column, 0, columns - 1, out=column)
    flat: NDArray[np.int64] = row * columns + column
    return flat


def _first_hits(raster: Raster, x: float, y: float, rays: Rays) -> NDArray[np.int64]:
    """Return (H, W): the first step at which the column's ray reaches the row's elevation; len(distance): the sky."""
    rows, columns = len(rays.elevation), len(rays.east)
    px = x + rays.east[:, None] * rays.distance
    py = y + rays.north[:, None] * rays.distance
    height = raster.height.ravel()[_pixels(raster, px, py)]
    slope = np.arctan((height - rays.eye) / rays.distance)
    # how many rows, from the bottom, lie at or under what has been met so far
    covered = np.clip(np.floor(slope / rays.pixel + rays.below), 0, rows).astype(np.int64)
    np.maximum.accumulate(covered, axis=1, out=covered)
    counts = np.bincount((covered + np.arange(columns)[:, None] * (rows + 1)).ravel(), minlength=columns * (rows + 1))
    hits: NDArray[np.int64] = np.cumsum(counts.reshape(columns, rows + 1), axis=1)[:, :rows].T
    return hits


def _refine(
    raster: Raster, x: float, y: float, rays: Rays,
    row: NDArray[np.int64], column: NDArray[np.int64], step: NDArray[np.int64],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:  # fmt: skip
    """Return each hit's distance, one just before it, and its raster pixel.

    Exact where the ray meets the ground, elsewhere by bisecting the step.
    """
    tangent = np.tan(rays.elevation)[row]
    east, north = rays.east[column], rays.north[column]
    near, far = np.where(step > 0, rays.distance[step - 1], np.float32(0)), rays.distance[step]
    ground = np.divide(np.float32(-rays.eye), tangent, out=np.zeros_like(far), where=tangent < 0)
    distance = np.where((ground >= near) & (ground <= far), ground, far)
    at = _pixels(raster, x + distance * east, y + distance * north)
    (rest,) = np.nonzero((distance == far) | (raster.kind.ravel()[at] != GROUND))
    near, far, tangent, east, north = near[rest], far[rest], tangent[rest], east[rest], north[rest]
    for _ in range(3):
        middle = (near + far) / 2
        inside = (
            raster.height.ravel()[_pixels(raster, x + middle * east, y + middle * north)] >= rays.eye + tangent * middle
        )
        near, far = np.where(inside, near, middle), np.where(inside, middle, far)
    before = distance.copy()
    distance[rest], before[rest] = far, near
    at[rest] = _pixels(raster, x + far * east, y + far * north)
    return distance, before, at


def _walls(
    raster: Raster, x: float, y: float, rays: Rays,
    row: NDArray[np.int64], column: NDArray[np.int64], distance: NDArray[np.float32], building: NDArray[np.int32],
) -> NDArray[np.float32]:  # fmt: skip
    """Return colours of points on façades: shaded by side, with windows where a pixel is fine enough to hold them."""
    east, north = rays.east[column], rays.north[column]
    px, py = x + distance * east, y + distance * north
    before = distance - np.float32(1.5 * raster.metres)
    beside = raster.kind.ravel()[_pixels(raster, x + before * east, py)] - BUILDING
    faces_east_west = beside != building  # stepping back along x alone leaves the building
    shade = np.where(
        faces_east_west,
        np.where(east > 0, np.float32(0.95), np.float32(0.84)),  # the sun stands in the south-west
        np.where(north > 0, np.float32(1.0), np.float32(0.80)),
    )
    along = np.where(faces_east_west, py, px)
    rise = rays.eye + distance * np.tan(rays.elevation[row])
    bay = raster.bay[building].astype(np.float32)
    across, up = along / bay, rise / np.float32(FLOOR)
    window = (np.abs(across % 1 - 0.5) < 0.28) & (np.abs(up % 1 - 0.5) < 0.30)
    fine = np.clip(1.5 - 2 * distance * np.float32(rays.pixel), 0, 1)  # a pixel over 0.75 m shows the mean only
    glass = np.where(window, fine, np.float32(0)) * 0.5 + (1 - fine) * np.float32(0.15)
    facade = raster.facade[building].astype(np.float32)
    colour = facade * (1 - glass[:, None]) + GLASS * glass[:, None]
    cell_along = np.floor(along / 0.4).astype(np.int64)
    cell_up = np.floor(rise / 0.4).astype(np.int64)
    grain = 1 + 0.10 * fine * hash_noise(cell_along, cell_up)
    lit: NDArray[np.float32] = colour * (shade * grain)[:, None]
    return lit


def _sky(rays: Rays) -> NDArray[np.float32]:
    """Return the sky, (H, W, 3): haze at the horizon and below, blue above."""
    up = np.clip(rays.elevation / (np.pi / 3), 0, 1)[:, None]
    column = HAZE * (1 - up) + ZENITH * up
    return np.repeat(column[:, None, :], len(rays.east), axis=1).astype(np.float32)
