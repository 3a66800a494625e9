"""Order places by similarity and cut the order into shards, so that places that look alike share a shard.

The method is recursive balanced 2-means on the sphere. A set of places is cut across the line between the centres
of its two halves: by bytes down to single shards, then by number down to LEAF places, so that places within a shard are
ordered too. When two halves are joined, each may be reversed, so that the ends that meet are most similar.

The order depends only on the vectors, not on the machine or on how the work was divided, because a reclustering that
was killed must find the same order again. Therefore vectors are rounded to whole numbers, small enough that float32 and
float64 add them exactly in any order. This changes a cosine by about 1e-4, which does not matter for the cuts.

Time is N log N: on one core 2 and 6 s for 50,000 vectors of 128 and 1024 dimensions, 10 and 21 s for 200,000. Here all
vectors are in memory: :func:`similarity_order` takes 2·N·D bytes beside them, and as much again while workers order the
subtrees. :mod:`geostream.reclustering.external` finds the same order with the vectors on the store; the cuts of both
are made by :func:`order_by_cuts`, which holds about 30 bytes a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Float32, Float64, Int16, Int32, Int64
from geostream.errors import BadInput

Codes = npt.NDArray[Any]  # (n, D) whole numbers, int16 or float32

UNIT = 2**11  # length of a vector in whole numbers; a direction has twice this, so no product exceeds 2^23
SAMPLE = 8192  # most vectors that a cut is computed from; their sum stays below 2^24, where float32 is exact
SUBTREE = 16_384  # most places that one task orders
LEAF = 8  # sets of at most so many places are not cut further
ROUNDS = 25  # most rounds of 2-means


class Node(NamedTuple):
    """A set of places in the tree of cuts.

    Attributes:
        number: Its number; the root is 1, the halves of n are 2n and 2n + 1.
        rows: (n,) row numbers.
        shards: Number of shards to cut it into.
    """

    number: int
    rows: Int32
    shards: int


class Subtree(NamedTuple):
    """A task: places to order and to cut into shards.

    Attributes:
        number: Number of the tree's node.
        codes: (n, D) vectors in whole numbers.
        sizes: (n,) bytes of each place.
        shards: Number of shards.
    """

    number: int
    codes: Codes
    sizes: Int64
    shards: int


class Ordered(NamedTuple):
    """Places in order.

    Attributes:
        number: Number of the tree's node.
        rows: (n,) row numbers in order.
        lengths: (shards,) number of rows in each shard.
        first: (D,) centre of the first leaf, in whole numbers.
        last: (D,) centre of the last leaf, in whole numbers.
    """

    number: int
    rows: Int32
    lengths: Int64
    first: Float64
    last: Float64

    def reversed(self) -> Ordered:
        """Return the same places in the opposite order."""
        return Ordered(self.number, self.rows[::-1], self.lengths[::-1], self.last, self.first)


Work = Callable[[Subtree], Ordered]
RunTasks = Callable[[Work, Sequence[Subtree]], Iterable[Ordered]]
#: Nodes that are cut → for each (n,) where its rows lie along the direction in which it is cut
Project = Callable[[Sequence[Node]], Iterable[Float32]]
#: Nodes that are cut no further → each in order, in any sequence; ``rows`` of a result are positions in the node's rows
OrderNodes = Callable[[Sequence[Node]], Iterable[Ordered]]


def similarity_order(vectors: Float32, sizes: Int64, target_bytes: float, map_fn: RunTasks = map) -> list[Int32]:
    """Order places by similarity, and cut the order into shards of about equal bytes.

    Args:
        vectors: (N, D) L2-normalised.
        sizes: (N,) bytes of each place.
        target_bytes: Wanted mean size of a shard. Shards differ by a few places' bytes.
        map_fn: Applies a function to tasks of at most SUBTREE places (or one shard) each; results may come in any
            order.

    Returns:
        Row numbers of each shard, in order. Every row is in exactly one.

    Raises:
        BadInput: There are no vectors, or some are not finite or longer than 1.
    """
    codes = whole_numbers(vectors)

    def project(nodes: Sequence[Node]) -> Iterable[Float32]:
        return (_along(codes, node.rows, _direction_of(codes, *node[1:], sizes)) for node in nodes)

    def order(nodes: Sequence[Node]) -> Iterable[Ordered]:
        return map_fn(order_subtree, [Subtree(n.number, codes[n.rows], sizes[n.rows], n.shards) for n in nodes])

    return order_by_cuts(sizes, target_bytes, SUBTREE, project, order)


def order_by_cuts(
    sizes: Int64, target_bytes: float, most: int, project: Project, order_nodes: OrderNodes
) -> list[Int32]:
    """Order places by a tree of cuts, wherever their vectors are.

    The order does not depend on ``most``, because a node is cut in the same way wherever that is done.

    Args:
        sizes: (N,) bytes of each place.
        target_bytes: Wanted mean size of a shard.
        most: Nodes of more places, and more than one shard, are cut here; the others by ``order_nodes``.
        project: Returns where the rows of each node lie along the direction in which it is cut.
        order_nodes: Orders the nodes that are not cut here.

    Returns:
        Row numbers of each shard, in order. Every row is in exactly one.

    Raises:
        BadInput: There are no places.
    """
    if not len(sizes):
        raise BadInput("nothing to order: no places")
    shards = int(np.clip(round(float(sizes.sum()) / target_bytes), 1, len(sizes)))
    level = [Node(1, np.arange(len(sizes), dtype=np.int32), shards)]
    leaves: list[Node] = []
    cut: list[int] = []
    while level:
        leaves += [node for node in level if len(node.rows) <= most or node.shards == 1]
        level = [node for node in level if len(node.rows) > most and node.shards > 1]
        cut += [node.number for node in level]
        halves: list[Node] = []
        for node, along in zip(level, project(level) if level else (), strict=True):
            low, high = _halves(node.rows, along, sizes, node.shards)
            less = node.shards // 2
            halves += [Node(2 * node.number, low, less), Node(2 * node.number + 1, high, node.shards - less)]
        level = halves
    rows_of = {node.number: node.rows for node in leaves}
    done = {part.number: part._replace(rows=rows_of.pop(part.number)[part.rows]) for part in order_nodes(leaves)}
    del leaves
    for number in sorted(cut, reverse=True):
        done[number] = _join(number, done.pop(2 * number), done.pop(2 * number + 1))
    return np.split(done[1].rows, np.cumsum(done[1].lengths)[:-1])


def order_subtree(task: Subtree) -> Ordered:
    """Order the places of a task; ``rows`` of the result are rows of the task."""
    codes = task.codes.astype(np.float32)
    return _order(codes, np.arange(len(codes), dtype=np.int32), task.sizes, task.shards, task.number)


def _order(codes: Codes, rows: Int32, sizes: Int64, shards: int, number: int) -> Ordered:
    """Order some rows recursively, and cut them into shards."""
    if shards == 1 and len(rows) <= LEAF:
        centre = np.rint(_unit(codes[rows].sum(axis=0)) * UNIT)
        return Ordered(number, rows, np.array([len(rows)]), centre, centre)
    low, high = _cut(codes, rows, sizes, shards)
    ones = (1, 1) if shards == 1 else (shards // 2, shards - shards // 2)
    halves = [
        _order(codes, half, sizes, share, 2 * number + side)
        for side, (half, share) in enumerate(zip((low, high), ones, strict=True))
    ]
    joined = _join(number, *halves)
    return joined._replace(lengths=np.array([len(rows)])) if shards == 1 else joined


def _join(number: int, one: Ordered, other: Ordered) -> Ordered:
    """Join two halves; reverse each if that makes the ends that meet more similar."""
    ways = [(a, b) for a in (one, one.reversed()) for b in (other, other.reversed())]
    a, b = max(ways, key=lambda way: float(way[0].last @ way[1].first))
    return Ordered(number, np.concatenate([a.rows, b.rows]), np.concatenate([a.lengths, b.lengths]), a.first, b.last)


def _cut(codes: Codes, rows: Int32, sizes: Int64, shards: int) -> tuple[Int32, Int32]:
    """Cut rows in two, by bytes in the ratio in which ``shards`` is halved; within one shard, in equal numbers."""
    return _halves(rows, _along(codes, rows, _direction_of(codes, rows, shards, sizes)), sizes, shards)


def sampled(rows: Int32) -> Int32:
    """Return the rows of a node that decide in which direction it is cut: at most SAMPLE, evenly spaced."""
    return rows if len(rows) <= SAMPLE else rows[np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64)]


def cut_direction(codes: Codes, sizes: Int64, shards: int) -> Float32:
    """Compute the direction in which a node is cut.

    Args:
        codes: (n, D) vectors of its sampled rows, in whole numbers.
        sizes: (n,) bytes of these places.
        shards: Number of shards of the node.

    Returns:
        (D,) direction in whole numbers.
    """
    return _two_means(codes.astype(np.float32), np.ones_like(sizes) if shards == 1 else sizes, _share(shards))


def _direction_of(codes: Codes, rows: Int32, shards: int, sizes: Int64) -> Float32:
    some = sampled(rows)
    return cut_direction(codes[some], sizes[some], shards)


def _along(codes: Codes, rows: Int32, direction: Float32) -> Float32:
    """Return (n,) where some rows lie along a direction, in whole numbers."""
    blocks = (codes[rows[at : at + SAMPLE]].astype(np.float32) for at in range(0, len(rows), SAMPLE))
    return np.concatenate([block @ direction for block in blocks])


def _share(shards: int) -> tuple[int, int]:
    """Return the part of a node, as a fraction, that its lower half takes."""
    return (1, 2) if shards == 1 else (shards // 2, shards)


def _halves(rows: Int32, along: Float32, sizes: Int64, shards: int) -> tuple[Int32, Int32]:
    """Sort rows along the direction and cut them in two."""
    rows = rows[np.argsort(along, kind="stable")]
    least, most = (1, len(rows) - 1) if shards == 1 else (shards // 2, len(rows) - (shards - shards // 2))
    weights = np.ones(len(rows), dtype=np.int64) if shards == 1 else sizes[rows]
    at = min(max(_lower(np.cumsum(weights, out=weights), _share(shards)), least), most)
    return rows[:at], rows[at:]


def _lower(total: Int64, share: tuple[int, int]) -> int:
    """Return how many of the first rows weigh about ``share[0] / share[1]`` of all, the fewer of two that are as near.

    Args:
        total: (n,) what each row and all before it weigh.
        share: The part of all, as a fraction.
    """
    wanted = float(total[-1]) * share[0] / share[1]
    above = min(int(np.searchsorted(total, ceil(wanted))), len(total) - 1)
    below = int(np.searchsorted(total, total[max(above - 1, 0)]))  # the first of those that weigh as much
    return 1 + (below if abs(float(total[below]) - wanted) <= abs(float(total[above]) - wanted) else above)


def _two_means(codes: Float32, weights: Int64, share: tuple[int, int]) -> Float32:
    """Return (D,) the direction from the centre of the lower share to that of the rest, with length 2·UNIT."""
    total = codes.sum(axis=0)
    outer = codes[(codes @ _direction(total)).argmin()]
    direction = _direction(_unit(outer) - _unit(codes[(codes @ outer).argmin()]))
    low = np.zeros(0)
    for _ in range(ROUNDS):
        order = np.argsort(codes @ direction, kind="stable")
        before, low = low, np.zeros(len(codes), dtype=np.float32)
        low[order[: _lower(np.cumsum(weights[order]), share)]] = 1
        if np.array_equal(low, before):
            break
        low_sum = low @ codes
        direction = _direction(_unit(total - low_sum) - _unit(low_sum))
    return direction


def _direction(vector: Float32 | Float64) -> Float32:
    """Scale the vector to length 2·UNIT and round it to whole numbers."""
    return np.rint(_unit(vector) * (2 * UNIT)).astype(np.float32)


def _unit(vector: Float32 | Float64) -> Float64:
    """Scale the vector to length 1; zeros stay. It is rounded first, so every machine computes the same length."""
    largest = float(np.abs(vector).max())
    if largest == 0:
        return vector.astype(np.float64)
    whole = np.rint(vector.astype(np.float64) * (2**16 / largest))
    unit: Float64 = whole / np.sqrt(whole @ whole)
    return unit


def whole_numbers(vectors: Float32) -> Int16:
    """Return vectors in units of 1 / UNIT.

    Args:
        vectors: (N, D) L2-normalised.

    Returns:
        (N, D) whole numbers.

    Raises:
        BadInput: Some are not finite or longer than 1.
    """
    codes = np.empty(vectors.shape, dtype=np.int16)
    for at in range(0, len(vectors), SAMPLE):
        block = vectors[at : at + SAMPLE]
        if not (np.einsum("nd,nd->n", block, block) < 1.01).all():  # also catches NaN
            raise BadInput("vectors to order: NaN, infinity, or longer than 1; embed again")
        codes[at : at + len(block)] = np.rint(block * np.float32(UNIT))
    return codes


def shard_similarity(vectors: Float32, shard: Int32) -> float:
    """Return the mean cosine of two places of one shard, over all such couples; 0 if no shard holds two.

    Args:
        vectors: (N, D) L2-normalised.
        shard: (N,) number of each place's shard.
    """
    alike, couples = 0.0, 0
    order = np.argsort(shard, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
        of_shard = vectors[rows].astype(np.float64)
        total, n = of_shard.sum(axis=0), len(rows)
        alike += float(total @ total) - float((of_shard * of_shard).sum())
        couples += n * (n - 1)
    return alike / couples if couples else 0.0
