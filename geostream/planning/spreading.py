"""Make each shard of several pieces from all over the similarity order, instead of one run of it.

If each shard were one run of the order, a network would see one part of the data for long, and learn less. With several
pieces, a few resident shards hold places from many parts of the order, at no cost in reads. But if a piece holds fewer
similar places than a batch needs, plans become too easy. This depends on the batch size, the number of resident shards
and the data. So each number of pieces in :data:`PIECES` is tried on the graph, at 15 µs a pair, and the largest whose
plans are hard enough is used. Of a large order only some stretches are tried. Beside what a trial of a plan takes, this
holds about 12 bytes a place. Measurements are in docs/notes/planning.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from geostream.arrays import Int32, Int64, Integers
from geostream.planning.hardness import RECLUSTER_MARGIN, hard_enough

PIECES = (8, 4, 2, 1)  # pieces of a shard, tried in this order


class Spread(NamedTuple):
    """The rows of each shard, and the number of pieces of the order in each."""

    shards: list[Integers]
    pieces: int


def spread_out(
    shards: Sequence[Integers], sizes: Int64, reachable: Callable[[Int32], float | None], wanted: float
) -> Spread:
    """Spread each shard over the order, in as many pieces as the target hardness allows.

    Args:
        shards: Rows of each shard, in the order of similarity.
        sizes: (N,) bytes of each row.
        reachable: Returns the hardness score for (N,) the number of each row's shard, or None if there is none.
        wanted: Target hardness.

    Returns:
        The shards with the most pieces that are hard enough; if none are, the hardest; without scores, the shards as
        they were.
    """
    best, most = Spread(list(shards), 1), -np.inf
    for pieces in PIECES:
        if pieces > min(len(rows) for rows in shards):
            continue
        dealt = deal(shards, sizes, pieces)
        score = reachable(shard_of_rows(dealt))
        if score is None:
            break
        if score > most:
            best, most = Spread(dealt, pieces), score
        if hard_enough(score, wanted, RECLUSTER_MARGIN):
            break
    return best


def stretches(shards: Sequence[Integers], most: int) -> list[int]:
    """Choose shards for a trial: as many stretches of the order as a shard may have pieces, at equal distances.

    In shards that are spread over these stretches, a piece comes from each stretch. So they are like shards that are
    spread over the whole order, in which pieces lie as far apart.

    Args:
        shards: Rows of each shard, in the order of similarity.
        most: About how many rows to choose.

    Returns:
        Numbers of the chosen shards, in order; all shards if there are no more rows.
    """
    rows = sum(len(part) for part in shards)
    if rows <= most:
        return list(range(len(shards)))
    length = max(1, int(len(shards) * most / rows) // PIECES[0])
    starts = np.linspace(0, len(shards) - length, PIECES[0]).astype(int).tolist()
    return sorted({shard for start in starts for shard in range(start, start + length)})


def deal(shards: Sequence[Integers], sizes: Int64, pieces: int) -> list[Integers]:
    """Cut each of S shards into pieces of about equal bytes, and give shard s the pieces s, s + S, s + 2 S, ….

    Args:
        shards: Rows of each shard, at least ``pieces`` of them.
        sizes: (N,) bytes of each row.
        pieces: Number of pieces of a shard.

    Returns:
        Rows of each new shard.
    """
    cut = [part for rows in shards for part in np.split(rows, _cuts(sizes[rows], pieces))]
    return [np.concatenate(cut[number :: len(shards)]) for number in range(len(shards))]


def shard_of_rows(shards: Sequence[Integers]) -> Int32:
    """Return (N,) the number of the shard that holds each of the rows 0…N-1, each of which must be in one shard."""
    shard = np.empty(sum(len(rows) for rows in shards), dtype=np.int32)
    for number, rows in enumerate(shards):
        shard[rows] = number
    return shard


def _cuts(sizes: Int64, pieces: int) -> Int64:
    """Return where to cut rows of these ``sizes`` into pieces of about equal bytes, none of them empty."""
    middle, number = np.cumsum(sizes) - sizes / 2, np.arange(1, pieces)
    at = np.searchsorted(middle, sizes.sum() * number / pieces)
    # Cuts rise strictly and leave at least one row for each later piece.
    return np.minimum(np.maximum.accumulate(np.maximum(at, number) - number) + number, len(sizes) - pieces + number)
