"""Lay out a city as a map: streets, lots, buildings and trees, as shapes in metres.

Every shape is an axis-aligned rectangle or a round tree on flat ground. So a city is a few arrays, any window of it can
be drawn alone, and a panorama needs only a height field. There are no hills, no diagonal streets, nothing to walk
under. The world is made to be learnt in minutes, not to look like VIGOR: colours are distinct, a roof has its façade's
hue, and low buildings and few trees leave a free view, so that what is seen from above can be found from the street.

Axes: x metres east, y metres north of the city's first (south-western) tile centre.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Rect = tuple[float, float, float, float]  # west, south, east, north
Range = tuple[float, float]
RGB = tuple[int, int, int]

SIDEWALK = 2.5  # metres
LOWEST, TALLEST = 3.5, 18.0  # metres
REPAINTED = 0.5  # share of buildings that differ between two cities that look alike


@dataclass(frozen=True)
class City:
    """Hold G ground rectangles, B buildings and T trees in painting order; lengths in metres, colours RGB bytes.

    Attributes:
        ground: (G, 4) west, south, east, north.
        ground_colour: (G, 3).
        buildings: (B, 4) west, south, east, north.
        building_height: (B,).
        facade: (B, 3) colour of the walls.
        roof: (B, 3) colour.
        bay: (B,) from window to window.
        trees: (T, 3) x, y, radius.
        tree_height: (T,).
        tree_colour: (T, 3).
    """

    ground: Floats
    ground_colour: Bytes
    buildings: Floats
    building_height: Floats
    facade: Bytes
    roof: Bytes
    bay: Floats
    trees: Floats
    tree_height: Floats
    tree_colour: Bytes

    def window(self, area: Rect) -> City:
        """Return the shapes that touch ``area`` (west, south, east, north), in the same order."""
        ground = _touching(self.ground, area)
        buildings = _touching(self.buildings, area)
        x, y, radius = self.trees.T
        trees = _touching(np.stack([x - radius, y - radius, x + radius, y + radius], axis=1), area)
        return replace(
            self,
            ground=self.ground[ground],
            ground_colour=self.ground_colour[ground],
            buildings=self.buildings[buildings],
            building_height=self.building_height[buildings],
            facade=self.facade[buildings],
            roof=self.roof[buildings],
            bay=self.bay[buildings],
            trees=self.trees[trees],
            tree_height=self.tree_height[trees],
            tree_colour=self.tree_colour[trees],
        )


def _touching(rects: Floats, area: Rect) -> NDArray[np.bool_]:
    west, south, east, north = area
    touching: NDArray[np.bool_] = (
        (rects[:, 0] < east) & (rects[:, 2] > west) & (rects[:, 1] < north) & (rects[:, 3] > south)
    )
    return touching


class _Builder:
    """Collect shapes in painting order."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.ground: list[tuple[Rect, RGB]] = []
        self.buildings: list[tuple[Rect, float, RGB, RGB, float]] = []
        self.trees: list[tuple[float, float, float, float, RGB]] = []

    def colour(self, hue: Range, sat: Range, val: Range) -> RGB:
        return _rgb(self.rng.uniform(*hue), self.rng.uniform(*sat), self.rng.uniform(*val))

    def paint(self, rect: Rect, colour: RGB) -> None:
        self.ground.append((rect, colour))

    def tree(self, x: float, y: float) -> None:
        radius, hue = self.rng.uniform(1.5, 4.0), self.rng.uniform(0.22, 0.40)
        if self.rng.random() < 0.25:  # autumn
            hue = self.rng.uniform(-0.04, 0.14)
        colour = _rgb(hue, self.rng.uniform(0.5, 0.9), self.rng.uniform(0.25, 0.6))
        self.trees.append((x, y, radius, radius * self.rng.uniform(1.6, 3.0), colour))

    def building(self, rect: Rect, height: float) -> None:
        facade, roof = _paints(self.rng)
        self.buildings.append((rect, height, facade, roof, self.rng.uniform(2.2, 4.0)))

    def city(self) -> City:
        def shape(rows: list[Rect]) -> Floats:
            return np.array(rows, np.float64).reshape(len(rows), 4)

        def colours(rows: list[RGB]) -> Bytes:
            return np.array(rows, np.uint8).reshape(len(rows), 3)

        return City(
            ground=shape([g[0] for g in self.ground]),
            ground_colour=colours([g[1] for g in self.ground]),
            buildings=shape([b[0] for b in self.buildings]),
            building_height=np.array([b[1] for b in self.buildings]),
            facade=colours([b[2] for b in self.buildings]),
            roof=colours([b[3] for b in self.buildings]),
            bay=np.array([b[4] for b in self.buildings]),
            trees=np.array([t[:3] for t in self.trees]).reshape(len(self.trees), 3),
            tree_height=np.array([t[3] for t in self.trees]),
            tree_colour=colours([t[4] for t in self.trees]),
        )


def _rgb(hue: float, sat: float, val: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, sat, val)
    return round(255 * red), round(255 * green), round(255 * blue)


def plan_city(area: Rect, rng: np.random.Generator) -> City:
    """Lay out a city: a grid of streets with uneven gaps, some blocks merged, blocks cut into lots.

    Args:
        area: west, south, east, north in metres.
        rng: all that is random comes from it.
    """
    build = _Builder(rng)
    build.paint(area, (125, 125, 125))
    across, along = _cuts(area[0], area[2], rng), _cuts(area[1], area[3], rng)
    for x, width in across:
        _street(build, (x - width / 2, area[1], x + width / 2, area[3]))
    for y, width in along:
        _street(build, (area[0], y - width / 2, area[2], y + width / 2))
    taken = np.zeros((len(along), len(across)), bool)
    for j in range(len(along) - 1):
        for i in range(len(across) - 1):
            if taken[j, i]:
                continue
            east, north = i + 1, j + 1
            if rng.random() < 0.15 and i + 2 < len(across):
                taken[j, i + 1], east = True, i + 2
            elif rng.random() < 0.15 and j + 2 < len(along) and not taken[j + 1, i]:
                taken[j + 1, i], north = True, j + 2
            (x0, w0), (x1, w1), (y0, h0), (y1, h1) = across[i], across[east], along[j], along[north]
            _block(build, (x0 + w0 / 2, y0 + h0 / 2, x1 - w1 / 2, y1 - h1 / 2))
    return build.city()


def look_alike(city: City, rng: np.random.Generator, changed: float = REPAINTED) -> City:
    """Return a city with the same streets, lots and trees, in which some buildings have other colours and heights.

    So every spot has a double elsewhere that differs in details, as in districts that were built to one plan.

    Args:
        city: that it looks like.
        rng: all that is random comes from it.
        changed: probability that a building differs.
    """
    (differ,) = np.nonzero(rng.random(len(city.buildings)) < changed)
    facade, roof, height = city.facade.copy(), city.roof.copy(), city.building_height.copy()
    for n in differ:
        facade[n], roof[n] = _paints(rng)
    height[differ] = np.clip(height[differ] * rng.uniform(0.5, 1.5, len(differ)), LOWEST, TALLEST)
    return replace(city, facade=facade, roof=roof, building_height=height)


def _paints(rng: np.random.Generator) -> tuple[RGB, RGB]:
    """Return the colours of a building's walls and of its roof, which has the walls' hue."""
    hue, sat, val = rng.random(), rng.uniform(0.4, 0.85), rng.uniform(0.45, 0.95)
    roof = _rgb(hue + rng.uniform(-0.02, 0.02), 0.9 * sat, val * rng.uniform(0.75, 0.95))
    return _rgb(hue, sat, val), roof


def _cuts(low: float, high: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return street axes and widths from ``low`` to ``high``, both ends included."""
    cuts, at = [], low
    while at < high:
        cuts.append((at, rng.uniform(8.0, 17.0)))
        at += rng.uniform(45.0, 95.0)
    return [*cuts, (at, 10.0)]


def _street(build: _Builder, rect: Rect) -> None:
    grey = int(build.rng.integers(55, 105))
    build.paint(rect, (grey, grey, grey + 6))
    west, south, east, north = rect
    vertical = north - south > east - west
    middle = (west + east) / 2 if vertical else (south + north) / 2
    dash, paint = 0.0, (235, 235, 235) if build.rng.random() < 0.6 else (240, 205, 60)
    start, end = (south, north) if vertical else (west, east)
    while start + dash < end:  # dashes of 4 m every 9 m along the axis
        a, b = start + dash, start + dash + 4.0
        build.paint((middle - 0.4, a, middle + 0.4, b) if vertical else (a, middle - 0.4, b, middle + 0.4), paint)
        dash += 9.0


def _block(build: _Builder, rect: Rect) -> None:
    rng = build.rng
    west, south, east, north = rect
    light = int(rng.integers(165, 205))
    build.paint(rect, (light, light, light - 10))
    for x in np.arange(west + 4, east - 4, 9.0):  # street trees
        for y in (south + 1.2, north - 1.2):
            if rng.random() < 0.08:
                build.tree(float(x), y)
    for y in np.arange(south + 4, north - 4, 9.0):
        for x in (west + 1.2, east - 1.2):
            if rng.random() < 0.08:
                build.tree(x, float(y))
    inner = (west + SIDEWALK, south + SIDEWALK, east - SIDEWALK, north - SIDEWALK)
    if rng.random() < 0.10:
        _lawn(build, inner, trees_per_m2=0.003)
        return
    tall = rng.uniform(4.0, 14.0)
    for lot in _lots(inner, rng):
        _lot(build, lot, tall)


def _lots(rect: Rect, rng: np.random.Generator) -> list[Rect]:
    """Cut the longer side near its middle until lots are 12–28 m."""
    west, south, east, north = rect
    width, height = east - west, north - south
    if max(width, height) < rng.uniform(22.0, 34.0):
        return [rect]
    share = rng.uniform(0.38, 0.62)
    if width > height:
        cut = west + share * width
        return _lots((west, south, cut, north), rng) + _lots((cut, south, east, north), rng)
    cut = south + share * height
    return _lots((west, south, east, cut), rng) + _lots((west, cut, east, north), rng)


def _lot(build: _Builder, lot: Rect, tall: float) -> None:
    rng = build.rng
    kind = rng.random()
    if kind < 0.14:
        _lawn(build, lot, trees_per_m2=0.005)
    elif kind < 0.24:  # parking: marked bays
        grey = int(rng.integers(90, 140))
        build.paint(lot, (grey, grey, grey))
        for x in np.arange(lot[0] + 1.5, lot[2] - 1.0, 3.0):
            build.paint((float(x), lot[1] + 1.0, float(x) + 0.3, lot[1] + 6.0), (230, 230, 230))
    elif kind < 0.34:  # plaza
        build.paint(lot, build.colour((0.0, 1.0), (0.25, 0.7), (0.55, 0.9)))
    else:
        if rng.random() < 0.6:
            build.paint(lot, build.colour((0.20, 0.36), (0.4, 0.8), (0.45, 0.8)))
        else:
            build.paint(lot, build.colour((0.0, 1.0), (0.0, 0.35), (0.5, 0.8)))
        margin = rng.uniform(0.5, 4.5, 4)
        west, south = lot[0] + margin[0], lot[1] + margin[1]
        east, north = lot[2] - margin[2], lot[3] - margin[3]
        height = float(np.clip(tall * rng.uniform(0.5, 1.3), LOWEST, TALLEST))
        build.building((west, south, east, north), height)
        if rng.random() < 0.2:  # a corner of another height and colour
            share_x, share_y = rng.uniform(0.35, 0.65, 2)
            x, y = west + share_x * (east - west), south + share_y * (north - south)
            corners = [(west, south, x, y), (x, south, east, y), (west, y, x, north), (x, y, east, north)]
            build.building(
                corners[int(rng.integers(4))], float(np.clip(height * rng.uniform(0.4, 1.5), LOWEST, TALLEST))
            )


def _lawn(build: _Builder, rect: Rect, trees_per_m2: float) -> None:
    rng = build.rng
    west, south, east, north = rect
    build.paint(rect, build.colour((0.20, 0.36), (0.4, 0.85), (0.45, 0.8)))
    side = min(east - west, north - south)
    if rng.random() < 0.5:  # a path, a pond or a flower bed
        x, y = rng.uniform(west, east - side / 3), rng.uniform(south, north - side / 3)
        hue = rng.choice([0.10, 0.57, rng.random()])
        build.paint((x, y, x + rng.uniform(3.0, side / 3 + 3), y + rng.uniform(3.0, side / 3 + 3)), _rgb(hue, 0.6, 0.8))
    for _ in range(rng.poisson(trees_per_m2 * (east - west) * (north - south))):
        build.tree(rng.uniform(west + 2, east - 2), rng.uniform(south + 2, north - 2))
