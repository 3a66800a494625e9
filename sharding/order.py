"""Order the places of a layout's first generation, and cut the order into shards: pure functions on arrays.

Places that are read together lie together. Groups of places (training, gallery, rest) never share a shard, so training
reads only shards of places with training pairs. Within a group an area is contiguous. Within an area places follow a
Hilbert curve, so a shard is a compact neighbourhood. The cost: where both splits are in one area (VIGOR's same-area
protocol), a place's test views lie beside its training views, and training reads them, too.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Float64, Int64

BITS = 16  # of the grid that the curve fills: 65,536 cells a side, under a metre for a city


def hilbert_index(cells: Int64, bits: int = BITS) -> Int64:
    """Return the position of grid cells on the Hilbert curve; neighbours on the curve are neighbours on the grid.

    It descends through the quadrants (D. Hilbert 1891), one bit of both coordinates at a time, for all cells at once.

    Args:
        cells: (N, 2) coordinates, each from 0 to 2^bits - 1.
        bits: the grid has 2^bits × 2^bits cells.

    Returns:
        (N,) positions.
    """
    x, y = cells[:, 0].astype(np.int64), cells[:, 1].astype(np.int64)
    index = np.zeros(len(cells), dtype=np.int64)
    for bit in reversed(range(bits)):
        side = np.int64(1) << bit
        right, upper = (x & side) > 0, (y & side) > 0
        index = (index << 2) | ((3 * right) ^ upper)
        # Turn the quadrant so that the curve enters and leaves it where its neighbours expect it.
        flip = ~upper & right
        x, y = np.where(flip, x ^ (side - 1), x), np.where(flip, y ^ (side - 1), y)
        x, y = np.where(upper, x, y), np.where(upper, y, x)
    return index


def grid(position: Float64, *, latlon: bool, bits: int = BITS) -> Int64:
    """Return the cells of points on a square grid that just holds them, with one scale for both axes.

    Args:
        position: (N, 2) north and east.
        latlon: they are degrees; longitudes are shortened by the cosine of the mean latitude. Else metres.
        bits: the grid has 2^bits × 2^bits cells.

    Returns:
        (N, 2) cells.
    """
    metric = position.copy()
    if latlon:
        metric[:, 1] *= np.cos(np.deg2rad(metric[:, 0].mean()))
    metric -= metric.min(axis=0)
    extent = max(float(metric.max()), 1e-12)
    cells: Int64 = np.minimum(metric / extent * 2**bits, 2**bits - 1).astype(np.int64)
    return cells


def storage_order(group: Int64, area: Int64, position: Float64, *, latlon: bool) -> Int64:
    """Return the order in which rows are stored: by group, area and Hilbert curve.

    Rows without coordinates keep their order, behind those of their group and area that have them. Rows at one point
    keep theirs, too.

    Args:
        group: (N,) number of each row's group.
        area: (N,) number of each row's area.
        position: (N, 2) north and east; NaN: unknown.
        latlon: positions are degrees, not metres.

    Returns:
        (N,) row numbers.
    """
    on_curve = np.full(len(group), np.iinfo(np.int64).max, dtype=np.int64)
    known = np.isfinite(position).all(axis=1)
    # One grid an area, whatever the group: its groups are then ordered alike.
    for one in np.unique(area[known]):
        rows = np.flatnonzero(known & (area == one))
        on_curve[rows] = hilbert_index(grid(position[rows], latlon=latlon))
    return np.lexsort((np.arange(len(group)), on_curve, area, group)).astype(np.int64)


def cut(size: Float64, group: Int64, target: int) -> list[Int64]:
    """Cut rows, in the order they are stored in, into shards; none holds rows of two groups.

    A group is cut evenly, so that its last shard is no small remainder.

    Args:
        size: (N,) estimated bytes of each row.
        group: (N,) number of each row's group.
        target: bytes that a shard should have at most, about.

    Returns:
        The row numbers of each shard.
    """
    shards: list[Int64] = []
    for one in np.unique(group):
        rows = np.flatnonzero(group == one)
        ends = np.cumsum(size[rows])
        count = max(1, int(np.ceil(ends[-1] / target)))
        # A row belongs to the shard in which its middle lies.
        shard = np.minimum((ends - size[rows] / 2) / ends[-1] * count, count - 1).astype(np.int64)
        shards += [rows[shard == number] for number in np.unique(shard)]
    return shards
