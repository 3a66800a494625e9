"""The order of places in a layout's first generation, and where it is cut into shards: pure functions on arrays.

Decides that places that are read together lie together. Groups never share a shard: training reads only shards of
places with training pairs, and evaluation only those and the gallery. Within a group an area is contiguous, and
within an area places follow a Hilbert curve, so that a shard is a compact neighbourhood and the neighbours of a
place lie in its own shard or the one before or after. What it costs: where a split cuts through an area (VIGOR's
same-area protocol), a place's test views lie beside its training views, and training reads them, too.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Float64, Int64

BITS = 16  # of the grid that the curve fills: 65,536 cells a side, under a metre for a city


def hilbert_index(cells: Int64, bits: int = BITS) -> Int64:
    """(N,) position on the Hilbert curve of each cell of a 2^bits × 2^bits grid; ``cells`` (N, 2), each < 2^bits.

    Neighbours on the curve are neighbours on the grid. The classic descent through the quadrants (D. Hilbert 1891),
    one bit of both coordinates at a time, over all points at once.
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
    """(N, 2) cells of a square grid that just holds the points ``position`` (N, 2: north, east).

    Both axes have one scale: degrees of longitude are shortened by the cosine of the mean latitude.
    """
    metric = position.copy()
    if latlon:
        metric[:, 1] *= np.cos(np.deg2rad(metric[:, 0].mean()))
    metric -= metric.min(axis=0)
    extent = max(float(metric.max()), 1e-12)
    cells: Int64 = np.minimum(metric / extent * 2**bits, 2**bits - 1).astype(np.int64)
    return cells


def storage_order(group: Int64, area: Int64, position: Float64, *, latlon: bool) -> Int64:
    """(N,) row numbers in the order in which they are stored: by group, area and Hilbert curve.

    Rows without coordinates (NaN) keep their own order, behind those of their group and area that have them; rows
    on one spot keep their order, too. So the result is the same for the same rows.
    """
    on_curve = np.full(len(group), np.iinfo(np.int64).max, dtype=np.int64)
    known = np.isfinite(position).all(axis=1)
    # One grid an area, whatever the group: its groups are then ordered alike.
    for one in np.unique(area[known]):
        rows = np.flatnonzero(known & (area == one))
        on_curve[rows] = hilbert_index(grid(position[rows], latlon=latlon))
    return np.lexsort((np.arange(len(group)), on_curve, area, group)).astype(np.int64)


def cut(size: Float64, group: Int64, target: int) -> list[Int64]:
    """Cut the rows 0…N-1 (in storage order) into runs of about ``target`` bytes or less, none over two groups.

    ``size`` (N,): estimated bytes of each. A group is cut evenly, so that no small remainder makes a last shard.
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
