"""Cut places into blocks that lie close together, and find the nearest places of a block: functions on arrays.

A block of an area ends where its places are halved across their longer side, again and again. Small areas are put into
one block as a whole. There is a box around each block.

The nearest places are first searched in the block itself. A row needs another block only if the box of that block is no
farther away than the K-th nearest that the row has found so far, and of such a block only the places that are as near
are searched. So the finds are those of a search among all places. On the ground, where K is small beside a block, only
rows near the block's border need others.

Distances are rounded to millimetres, and equal ones are ordered by rank. So the order on a regular grid does not depend
on rounding errors. A search holds four times n × K × 8 bytes for n places at most, and about 40 bytes for each of
DISTANCES distances. Where thousands of places share a point, each of them is compared with all the others.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Float32, Float64, Int32, Int64, Integers, distinct, take

#: A training place: its point in metres, its row in the graph, its id, its area, its rank among places at the same
#: distance, and how many places are in its list.
PLACE = np.dtype(
    [("point", "<f8", 3), ("row", "<i4"), ("place", "<i4"), ("area", "<i4"), ("rank", "<i4"), ("n", "<i4")]
)
#: The box around a block, along axes of its own: its least and greatest coordinate on each. ``places`` says how many
#: are in the block, ``area`` of which area they are; -1 stands for several, which are in no other block.
BOX = np.dtype([("places", "<i4"), ("area", "<i4"), ("axes", "<f8", (3, 3)), ("low", "<f8", 3), ("high", "<f8", 3)])

DISTANCES = 200_000  # that a search holds at once, in the processor's cache
SAMPLE = 4096  # places from which the longer side is told
SLACK = 2e-3  # metres; more than rounding to millimetres, and to floating-point numbers, can matter
NOTHING = np.iinfo(np.int64).max  # the distance, in millimetres, of a place that is not there
MISSING = (NOTHING, 0, -1)  # what stands for it in Nearest


class Places(NamedTuple):
    """Some training places, in the order of their ids."""

    facts: npt.NDArray[np.void]  # (n,) of PLACE
    listed: Csr  # for each a list of ids: neither these places nor those whose list it is in are its neighbours

    @classmethod
    def from_bytes(cls, data: bytes, n: int) -> Places:
        """Return the ``n`` places that :meth:`to_bytes` has packed."""
        facts = np.frombuffer(data, PLACE, n)
        indptr = np.concatenate([[0], np.cumsum(facts["n"])]).astype(np.int64)
        return cls(facts, Csr(indptr, np.frombuffer(data, "<i4", offset=facts.nbytes)))

    def to_bytes(self) -> bytes:
        """Pack the places: PLACE.itemsize bytes each, and 4 for each id of the lists."""
        return self.facts.tobytes() + self.listed.indices.astype("<i4", copy=False).tobytes()

    def pick(self, rows: Integers) -> Places:
        """Return the places with these row numbers, sorted."""
        return Places(self.facts[rows], take(self.listed, rows))


class Nearest(NamedTuple):
    """The nearest of n places, nearest first; missing ones have the distance NOTHING and the id -1."""

    millimetres: Int64  # (n, K)
    rank: Int32  # (n, K)
    place: Int32  # (n, K) ids

    @classmethod
    def none(cls, n: int, k: int) -> Nearest:
        """Return finds that are all missing."""
        kinds = (np.int64, np.int32, np.int32)
        return cls(*(np.full((n, k), nothing, kind) for nothing, kind in zip(MISSING, kinds, strict=True)))

    def metres(self, column: int | slice = slice(None)) -> Float64:
        """Return the distances in metres, (n, K) or those of one column; inf for missing ones."""
        of = self.millimetres[:, column]
        return np.where(of < NOTHING, of / 1000.0, np.inf)

    def merge(self, rows: Int64, others: Nearest) -> None:
        """Replace the finds of some rows by the nearest of these and of other finds.

        Args:
            rows: (m,) row numbers.
            others: Finds of these m rows; none of them is among those that the rows have.
        """
        size = max(1, DISTANCES // (2 * others.place.shape[1]))
        ours, theirs = list[npt.NDArray[Any]](self), list[npt.NDArray[Any]](others)
        for start in range(0, len(rows), size):
            here, there = rows[start : start + size], slice(start, start + size)
            both = [np.concatenate([one[here], two[there]], axis=1) for one, two in zip(ours, theirs, strict=True)]
            order = np.lexsort((both[1], both[0]), axis=1)[:, : self.place.shape[1]]
            for mine, found in zip(ours, both, strict=True):
                mine[here] = np.take_along_axis(found, order, axis=1)


def cut(points: Float32, area: Int32, most: int) -> list[Int32]:
    """Cut places into blocks that lie close together.

    This holds 20 bytes a place beside ``points``.

    Args:
        points: (3, N) points in metres; roughly is enough. They are put into another order. NaN is in no block.
        area: (N,) number of each place's area.
        most: The most places of a block.

    Returns:
        The sorted row numbers of each block's places.
    """
    order = np.argsort(area, kind="stable").astype(np.int32)
    known = np.asarray(np.isfinite(points).all(axis=0))
    order = order[known[order]]
    for column in points:
        column[: len(order)] = column[order]
    starts = [0, *(1 + np.flatnonzero(np.diff(area[order]))).tolist(), len(order)]
    blocks, begin = [], 0
    for start, stop in pairwise(starts):
        if stop - begin > most and start > begin:  # the small areas before
            blocks.append(order[begin:start])
            begin = start
        if stop - start > most:
            blocks += _halves(points[:, start:stop], order[start:stop], -(-(stop - start) // most))
            begin = stop
    if begin < len(order):
        blocks.append(order[begin:])
    for rows in blocks:
        rows.sort()
    return blocks


def _halves(points: Float32, rows: Int32, parts: int) -> list[Int32]:
    """Cut the places of an area into so many parts of about equal size; sort points and rows in place."""
    if parts == 1:
        return [rows]
    some = points[:, :: max(1, points.shape[1] // SAMPLE)].astype(np.float64)
    axes = axes_of(some.T)
    longest = axes[np.argmax(np.ptp(axes @ some, axis=1))].astype(np.float32)
    middle = len(rows) * (parts // 2) // parts
    order = np.argpartition(longest @ points, middle)
    for column in (*points, rows):
        column[:] = column[order]
    del order
    left = _halves(points[:, :middle], rows[:middle], parts // 2)
    return left + _halves(points[:, middle:], rows[middle:], parts - parts // 2)


def axes_of(points: Float64) -> Float64:
    """Return three axes for places on the ground: east, north and up, wherever they are on the sphere.

    Boxes along these fit closely, while those along the axes of the earth overlap.

    Args:
        points: (n, 3) points in metres.

    Returns:
        (3, 3) a unit vector a row.
    """
    apart = points - points.mean(axis=0)
    up = np.linalg.eigh(apart.T @ apart)[1][:, 0]  # the direction in which they differ least
    north = np.eye(3)[2 if abs(up[2]) < 0.9 else 1]
    north = north - (north @ up) * up
    north /= np.linalg.norm(north)
    return np.stack([np.cross(north, up), north, up])


def box_of(facts: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return the box around a block's places, (1,) of BOX."""
    box = np.empty(1, dtype=BOX)
    axes = axes_of(facts["point"])
    along = facts["point"] @ axes.T
    box["places"], box["area"] = len(facts), facts["area"][0] if np.ptp(facts["area"]) == 0 else -1
    box["axes"], box["low"], box["high"] = axes, along.min(axis=0), along.max(axis=0)
    return box


def _to_box(along: Float64, low: Float64, high: Float64) -> Float64:
    """Return the distances of points to boxes, by their coordinates along the boxes' axes, (…, 3)."""
    return np.asarray(np.linalg.norm(np.maximum(np.maximum(low - along, along - high), 0), axis=-1))


def nearest_of_block(number: int, boxes: npt.NDArray[np.void], read: Callable[[int], Places], k: int) -> Nearest:
    """Find the nearest other places of the same area, for each place of a block.

    Args:
        number: Number of the block.
        boxes: (blocks,) of BOX.
        read: Reads the places of a block.
        k: How many to find.

    Returns:
        The finds, exact whatever the blocks are.
    """
    own = read(number)
    points = own.facts["point"]
    found = PlaceTree(own).nearest(own, k, np.full(len(points), NOTHING))
    limit = found.metres(-1) + SLACK
    of_area = (boxes["area"] == boxes["area"][number]) & (boxes["area"] >= 0)
    of_area[number] = False
    numbers, others = np.flatnonzero(of_area), boxes[of_area]
    middle = points.mean(axis=0)
    radius = np.linalg.norm(points - middle, axis=1).max()
    away = _to_box(others["axes"] @ middle, others["low"], others["high"]) - radius
    for other in np.argsort(away, kind="stable"):
        if away[other] > limit.max():
            break
        box = others[other]
        along = points @ box["axes"].T
        rows = np.flatnonzero(_to_box(along, box["low"], box["high"]) <= limit)
        if not len(rows):
            continue
        there = read(int(numbers[other]))
        there_along = there.facts["point"] @ box["axes"].T
        low, high = ((along[rows].T + sign * limit[rows]).T for sign in (-1, 1))
        near = np.flatnonzero(((there_along >= low.min(axis=0)) & (there_along <= high.max(axis=0))).all(axis=1))
        if len(near):
            finds = PlaceTree(there.pick(near)).nearest(own.pick(rows), k, found.millimetres[rows, -1])
            found.merge(rows, finds)
            limit = found.metres(-1) + SLACK
    return found


class PlaceTree:
    """Search tree of some places. The number of the area is one more coordinate, so areas lie out of reach.

    Args:
        places: The places.
    """

    def __init__(self, places: Places) -> None:
        from scipy.spatial import cKDTree  # here, because it takes memory that a visual search does not need

        facts = places.facts
        self._places = places
        self._order = np.argsort(facts["rank"])  # a place's number in the tree then orders equal distances
        self._rank, self._place = facts["rank"][self._order], facts["place"][self._order]
        self._first_area = int(facts["area"].min())
        # No two places of an area are as far apart. One area alone has no bound: those who ask may lie outside.
        several = np.ptp(facts["area"]) > 0
        self._reach = 1 + float(np.linalg.norm(np.ptp(facts["point"], axis=0))) if several else np.inf
        self._tree = cKDTree(self._spaced(facts)[self._order], balanced_tree=False, copy_data=False)

    def _spaced(self, facts: npt.NDArray[np.void]) -> Float64:
        apart = 2 * self._reach * (facts["area"] - self._first_area) if np.isfinite(self._reach) else 0 * facts["area"]
        return np.concatenate([facts["point"], apart[:, None]], axis=1)

    def nearest(self, own: Places, k: int, limit: Int64) -> Nearest:
        """Find the nearest other places of some places.

        Args:
            own: The n places. If those of the tree are of one area, these are of the same.
            k: How many to find.
            limit: (n,) millimetres; what is farther may be missing.
        """
        n, size = len(own.facts), len(self._order)
        points, excluded = self._spaced(own.facts), self._excluded(own)
        lengths = np.diff(excluded.indptr)
        bits = size.bit_length()
        none = (1 << (62 - bits)) - 1  # so many millimetres are millions of kilometres
        bound = min(self._reach, float(limit.max()) / 1000 + SLACK)
        found, todo = Nearest.none(n, k), np.arange(n)
        wanted = k + 8 + int(np.quantile(lengths, 0.99))  # 8 more: a tie at the end takes another query
        while len(todo):
            wanted, again = min(wanted, size + 1), []
            step = max(1, DISTANCES // wanted)
            for rows in (todo[start : start + step] for start in range(0, len(todo), step)):
                distance, at = self._tree.query(points[rows], wanted, distance_upper_bound=bound)
                code = np.minimum(np.rint(distance * 1000), none).astype(np.int64)
                seen_to = code[:, -1].copy()
                code = code << bits | at
                for number in range(lengths[rows].max(initial=0)):
                    some = np.flatnonzero(lengths[rows] > number)
                    one = excluded.indices[excluded.indptr[rows[some]] + number]
                    row, column = np.nonzero(at[some] == one[:, None])
                    code[some[row], column] = none << bits
                code.sort(axis=1)
                code = code[:, :k]
                last = code[:, -1] >> bits if code.shape[1] == k else np.full(len(rows), none)
                self._keep(found, rows, code, bits, none)
                again.append(rows[(last >= seen_to) & (seen_to < none) & (seen_to <= limit[rows])])
            todo, wanted = np.concatenate(again), 2 * wanted
        return found

    def _keep(self, found: Nearest, rows: Int64, code: Int64, bits: int, none: int) -> None:
        """Note the finds of some rows, each a number of millimetres and one of the tree."""
        columns, millimetres, at = slice(code.shape[1]), code >> bits, code & ((1 << bits) - 1)
        at[at == len(self._rank)] = 0  # the search's number of a missing one
        for array, values, nothing in zip(
            list[npt.NDArray[Any]](found), (millimetres, self._rank[at], self._place[at]), MISSING, strict=True
        ):
            array[rows, columns] = values
            if (millimetres[:, -1] >= none).any():
                array[rows, columns] = np.where(millimetres >= none, nothing, values)

    def _excluded(self, own: Places) -> Csr:
        """Return which of the tree's numbers are no neighbours of each of some places: itself, and by the lists."""
        ids, others = own.facts["place"], self._places.facts["place"]
        n, size = len(ids), len(others)
        one = [
            np.arange(n),
            np.repeat(np.arange(n), np.diff(own.listed.indptr)),
            _rows(ids, self._places.listed.indices),
        ]
        two = [
            _rows(others, ids),
            _rows(others, own.listed.indices),
            np.repeat(np.arange(size), self._places.facts["n"]),
        ]
        row, other = np.concatenate(one), np.concatenate(two)
        both = (row >= 0) & (other >= 0)
        pairs = distinct(row[both] * size + other[both])
        number = np.empty(size, dtype=np.int32)  # in the tree
        number[self._order] = np.arange(size, dtype=np.int32)
        return Csr(np.searchsorted(pairs, np.arange(n + 1) * size), number[pairs % size])


def _rows(ids: Int32, wanted: Int32) -> Int64:
    """Return where some ids are among sorted ones; -1 for those that are not there."""
    at = np.searchsorted(ids, wanted)
    return np.where(ids[np.minimum(at, len(ids) - 1)] == wanted, at, -1)
