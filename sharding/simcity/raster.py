"""Draw a city's shapes as pixels: what it looks like from above, how high it is, and what stands where.

One window is drawn at a time, on a pixel grid that is the same for the whole city. So windows agree where they overlap,
and can be drawn in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.simcity.map import TALLEST, Bytes, City, Floats

GROUND, TREE, BUILDING = 0, 1, 2  # Raster.kind; a building's row in City.buildings is kind - BUILDING
SUN = (-0.6, -0.8, 1.1)  # towards the sun: east, north, up; the length of (east, north) is 1


@dataclass(frozen=True)
class Raster:
    """Hold a window of the city as H x W pixels; row 0 is the north edge, column 0 the west edge.

    Attributes:
        colour: (H, W, 3) RGB bytes, as seen from above.
        height: (H, W) metres.
        kind: (H, W) GROUND, TREE, or BUILDING plus the building's row.
        west: metres, outer edge of column 0.
        north: metres, outer edge of row 0.
        metres: side of a pixel.
        facade: of the window's buildings, see City.
        bay: likewise.
    """

    colour: Bytes
    height: NDArray[np.float32]
    kind: NDArray[np.int32]
    west: float
    north: float
    metres: float
    facade: Bytes
    bay: Floats


def rasterise(city: City, west: int, south: int, rows: int, columns: int, metres: float) -> Raster:
    """Draw a window of the city.

    Pixel indices are global: pixel i spans i*metres to (i+1)*metres. So windows that overlap agree pixel for pixel.

    Args:
        city: the shapes.
        west: index of the first column.
        south: index of the last row.
        rows: of pixels.
        columns: of pixels.
        metres: side of a pixel.
    """
    north = south + rows
    colour = np.zeros((rows, columns, 3), np.uint8)
    height = np.zeros((rows, columns), np.float32)
    kind = np.zeros((rows, columns), np.int32)

    def spans(rects: Floats) -> NDArray[np.int64]:  # first/last row and column whose pixel centres are inside
        edge = np.ceil(rects / metres - 0.5).astype(np.int64)
        top, bottom = north - edge[:, 3], north - edge[:, 1]
        spans = np.stack([top, bottom, edge[:, 0] - west, edge[:, 2] - west], axis=1)
        return np.clip(spans, 0, [rows, rows, columns, columns])

    for (r0, r1, c0, c1), rgb in zip(spans(city.ground), city.ground_colour, strict=True):
        colour[r0:r1, c0:c1] = rgb
    for n, (r0, r1, c0, c1) in enumerate(spans(city.buildings)):
        colour[r0:r1, c0:c1] = city.roof[n]
        height[r0:r1, c0:c1] = city.building_height[n]
        kind[r0:r1, c0:c1] = BUILDING + n
    x, y, radius = city.trees.T
    boxes = np.stack([x - radius, y - radius, x + radius, y + radius], axis=1)
    for n, (r0, r1, c0, c1) in enumerate(spans(boxes)):
        dx = (west + np.arange(c0, c1) + 0.5) * metres - x[n]
        dy = (north - np.arange(r0, r1) - 0.5) * metres - y[n]
        inside = 1.0 - (dx[None, :] ** 2 + dy[:, None] ** 2) / radius[n] ** 2
        crown = np.where(inside > 0, city.tree_height[n] * (0.5 + 0.5 * np.sqrt(np.maximum(inside, 0))), 0)
        here = crown > height[r0:r1, c0:c1]
        height[r0:r1, c0:c1][here] = crown[here]
        kind[r0:r1, c0:c1][here] = TREE
        colour[r0:r1, c0:c1][here] = city.tree_colour[n]

    light = 1.0 + _grain(west, south, rows, columns, metres)
    light *= np.where(_shadow(height, metres), 0.85, 1.0).astype(np.float32)
    lit = np.clip(colour * light[..., None], 0, 255).astype(np.uint8)
    return Raster(lit, height, kind, west * metres, north * metres, metres, city.facade, city.bay)


def hash_noise(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return a fixed pseudo-random value in [-1, 1) for each pair of integers."""
    h = x.astype(np.uint32) * np.uint32(0x9E3779B1) + y.astype(np.uint32) * np.uint32(0x85EBCA77)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    h = (h ^ (h >> np.uint32(12))) * np.uint32(0x297A2D39)
    noise: NDArray[np.float32] = (h >> np.uint32(8)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    return noise


def _grain(west: int, south: int, rows: int, columns: int, metres: float) -> NDArray[np.float32]:
    """Return the texture of surfaces seen from above: noise in cells of 0.3, 1.2 and 5 m, as shares of brightness."""
    x, y = west + np.arange(columns), south + np.arange(rows)[::-1]
    grain = np.zeros((rows, columns), np.float32)
    for cell, strength in ((0.3, 0.08), (1.2, 0.02), (5.0, 0.01)):
        cx = np.floor(x * metres / cell).astype(np.int64)
        cy = np.floor(y * metres / cell).astype(np.int64)
        grain += strength * hash_noise(cx[None, :], cy[:, None])
    return grain


def _shadow(height: NDArray[np.float32], metres: float) -> NDArray[np.bool_]:
    """Return which pixels lie in the shadow of something."""
    rows, columns = height.shape
    shadow = np.zeros((rows, columns), bool)
    step = max(metres, 1.0)
    for n in range(1, int(TALLEST / SUN[2] / step) + 1):
        dx, dy = round(SUN[0] * n * step / metres), -round(SUN[1] * n * step / metres)
        to_rows, to_columns = slice(max(0, -dy), min(rows, rows - dy)), slice(max(0, -dx), min(columns, columns - dx))
        of_rows, of_columns = slice(max(0, dy), min(rows, rows + dy)), slice(max(0, dx), min(columns, columns + dx))
        rise = np.float32(n * step * SUN[2])
        shadow[to_rows, to_columns] |= height[of_rows, of_columns] > height[to_rows, to_columns] + rise
    return shadow
