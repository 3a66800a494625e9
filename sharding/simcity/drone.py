"""Render what a drone sees: a perspective picture of the ground, roofs and façades below it.

A window of the sphere around the drone is rendered as panoramas are (:mod:`sharding.simcity.view`) and resampled to a
plane, so both show the same walls and windows. A pixel may show what is half a pixel beside it.

The picture's middle looks at a point on the ground, and its upper edge away from the drone: a turned and tilted view
of the tile around that point.
"""

from __future__ import annotations

import math

import numpy as np

from sharding.simcity.map import TALLEST, Bytes
from sharding.simcity.raster import Raster
from sharding.simcity.view import Rays, fold_pixels, look_around, steps

FIELD = math.radians(40)  # from edge to edge of the picture's longer side
TILT = math.radians(45)  # how far the middle looks down
HAZE_METRES = 1000.0


def look_down(
    raster: Raster, x: float, y: float, heading: float, distance: float, size: tuple[int, int], light: float, fold: int
) -> Bytes:
    """Return the picture from a drone.

    Args:
        raster: the city up to about ``distance`` metres around (x, y).
        x: metres east of the point on the ground that it looks at.
        y: metres north of it.
        heading: the way it looks, radians clockwise from north.
        distance: metres from the drone to that point.
        size: H, W in pixels.
        light: times as bright as usual.
        fold: each pixel is the mean of fold x fold.

    Returns:
        (H, W, 3) RGB bytes.
    """
    rows, columns = size[0] * fold, size[1] * fold
    pixel = 2 * math.tan(FIELD / 2) / max(rows, columns)
    up = ((rows / 2 - 0.5 - np.arange(rows)) * pixel)[:, None]
    right = ((np.arange(columns) + 0.5 - columns / 2) * pixel)[None, :]
    ahead, down = math.cos(TILT) + up * math.sin(TILT), math.sin(TILT) - up * math.cos(TILT)
    azimuth = np.arctan2(right, ahead)  # (rows, columns), from the heading
    elevation = -np.arctan2(down, np.hypot(ahead, right))

    lowest, widest = float(elevation.min()), float(azimuth.max())
    row = np.rint((elevation - lowest) / pixel).astype(np.int64)
    column = np.rint((azimuth + widest) / pixel).astype(np.int64)
    rays = _rays(raster, heading - widest, lowest, row.max() + 1, column.max() + 1, pixel, distance * math.sin(TILT))
    back = distance * math.cos(TILT)
    sphere = look_around(raster, x - back * math.sin(heading), y - back * math.cos(heading), rays, light)
    picture = sphere[::-1][row, column].astype(np.float32)
    done: Bytes = (fold_pixels(picture, fold) + 0.5).astype(np.uint8)
    return done


def _rays(raster: Raster, left: float, lowest: float, rows: int, columns: int, pixel: float, eye: float) -> Rays:
    """Return rays of a window of the sphere: rows up from elevation ``lowest``, columns clockwise from ``left``."""
    azimuth = left + np.arange(columns) * pixel
    elevation = lowest + np.arange(rows) * pixel
    near = max(0.5, (eye - TALLEST) / math.tan(-lowest))
    far = 1.02 * eye / math.tan(-elevation[-1])  # so that no rounding leaves a row without ground
    return Rays(
        elevation=elevation.astype(np.float32),
        east=np.sin(azimuth).astype(np.float32),
        north=np.cos(azimuth).astype(np.float32),
        distance=steps(near, far, pixel, raster.metres),
        pixel=pixel,
        below=1 - lowest / pixel,
        eye=eye,
        haze=HAZE_METRES,
    )
