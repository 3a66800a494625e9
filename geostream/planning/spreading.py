"""Spreading: each shard of several pieces, from all over the similarity order, instead of one run of it.

Read shard by shard, one run after the other, a similarity order shows a network one corner of the data for long, and it
learns less. Pieces hold that off, because a few resident shards then come from many corners, and cost nothing in
reads; but where a piece has less of a community than a batch wants, plans become too easy. That hangs on the batch, on
how many shards are resident and on the data, so it is not guessed: of :data:`PIECES` the most are taken by which plans
are still hard enough, each choice tried on the graph that is there, 15 µs a pair.

Measured on 10,145 places of 20 rendered cities, batch 32, 4 % resident, with 1 / 2 / 4 / 6 pieces: score 1.18 / 1.19 /
1.20 / 1.21; how far the mean embedding of 8 batches in a row wanders, as variance in units of that of random
pairs, 13 / 9 / 6 / 5 (random access: 4); of 32 batches 19 / 13 / 7 / 5 (6). With 4 % of 5,965 places resident and batch
128, which are three batches, four pieces took the score from 1.03 to 0.67; with batch 32 from 1.10 to 1.06.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from geostream.arrays import Int32, Int64
from geostream.planning.hardness import RECLUSTER_MARGIN, hard_enough

PIECES = (8, 4, 2, 1)  # of a shard, tried in this order


class Spread(NamedTuple):
    """Rows shard by shard, and in how many pieces of the order each shard is."""

    shards: list[Int64]
    pieces: int


def spread_out(
    shards: Sequence[Int64], sizes: Int64, reachable: Callable[[Int32], float | None], wanted: float
) -> Spread:
    """The rows of ``shards`` dealt to as many anew, in the most pieces by which ``reachable`` is at least ``wanted``.

    ``shards``: rows in the order of similarity, as ``sizes`` (N,) has them in bytes; ``reachable``: score from the
    number of a shard for each row, None where there is none. Where no choice is hard enough, the hardest; without
    scores they stay as they are.
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


def deal(shards: Sequence[Int64], sizes: Int64, pieces: int) -> list[Int64]:
    """Each shard cut into ``pieces`` of equal bytes, and the pieces dealt: of S shards, s gets s, s + S, s + 2 S, ….

    No shard may have fewer rows than pieces.
    """
    cut = [part for rows in shards for part in np.split(rows, _cuts(sizes[rows], pieces))]
    return [np.concatenate(cut[number :: len(shards)]) for number in range(len(shards))]


def shard_of_rows(shards: Sequence[Int32 | Int64]) -> Int32:
    """(N,) number of the shard that holds each of the rows 0…N-1; each is in one."""
    shard = np.empty(sum(len(rows) for rows in shards), dtype=np.int32)
    for number, rows in enumerate(shards):
        shard[rows] = number
    return shard


def _cuts(sizes: Int64, pieces: int) -> Int64:
    """Where to cut rows of these ``sizes``, so that no piece is empty."""
    middle, number = np.cumsum(sizes) - sizes / 2, np.arange(1, pieces)
    at = np.searchsorted(middle, sizes.sum() * number / pieces)
    # Strictly rising, and a row left for each piece behind.
    return np.minimum(np.maximum.accumulate(np.maximum(at, number) - number) + number, len(sizes) - pieces + number)
