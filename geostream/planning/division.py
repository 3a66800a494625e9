"""Divide an epoch's pairs among lanes that share no shard, and cut out the sampling problem of each lane.

Shards are taken in their order on disk, where similar shards lie together. Each epoch begins at a random shard, and
every other one runs backwards, so that the shards that meet at the end of a lane vary. The places and pairs are sorted
by lane once, so cutting out all lanes costs about as much as cutting out one.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Csr, Int32, Int64, by_group, take
from geostream.errors import BadInput
from geostream.planning.lane import SamplingProblem


class Division:
    """The lanes of an epoch. It holds 16 bytes a place and a pair beside the problem.

    Args:
        problem: The sampling problem of all pairs; its neighbours may be left out (K = 0).
        lanes: Number of lanes.
        seed: The run's seed.
        epoch: Number of the epoch.

    Attributes:
        problem: The sampling problem of all pairs.
        shards: For each lane the numbers of its shards, in the order in which they are taken.
        lane: (N,) number of the lane that has each place.

    Raises:
        BadInput: There are more lanes than shards.
    """

    def __init__(self, problem: SamplingProblem, lanes: int, seed: int, epoch: int) -> None:
        self.problem = problem
        rng = np.random.default_rng([seed, epoch, 0])
        pairs_of_shard = np.bincount(problem.shard[problem.place])
        shards = np.flatnonzero(pairs_of_shard)
        shards = np.roll(shards, rng.integers(max(len(shards), 1)))[:: -1 if epoch % 2 else 1]
        self.shards = [shards[start:stop] for start, stop in _deal(pairs_of_shard[shards], lanes)]
        lane_of_shard = np.full(len(pairs_of_shard), -1, dtype=np.int32)
        for number, some in enumerate(self.shards):
            lane_of_shard[some] = number
        self.lane: Int32 = lane_of_shard[problem.shard]
        self._places = _of_each(self.lane, lanes)
        self._pairs = _of_each(self.lane[problem.place], lanes)
        self._row = np.empty(len(self.lane), dtype=np.int32)  # of each place within its lane
        for places in self._places:
            self._row[places] = np.arange(len(places), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.shards)

    def places(self, number: int) -> Int32:
        """Return the rows of a lane's places, sorted."""
        return self._places[number]

    def pairs(self, number: int) -> Int32:
        """Return the ids of a lane's pairs, sorted."""
        return self._pairs[number]

    def part(self, number: int) -> SamplingProblem:
        """Return the sampling problem of one lane.

        Args:
            number: Number of the lane.

        Returns:
            The problem. Its rows are those of :meth:`places`, and its pairs those of :meth:`pairs`.
        """
        whole, places, pairs = self.problem, self._places[number], self._pairs[number]
        if len(self) == 1:
            return whole
        near = whole.neighbours[places]
        return SamplingProblem(
            place=self._row[whole.place[pairs]],
            shard=whole.shard[places],
            neighbours=np.where((near >= 0) & (self.lane[near] == number), self._row[near], -1).astype(np.int32),
            excluded=self._within(number, take(whole.excluded, places)),
            history=tuple(batch[pairs] for batch in whole.history),
        )

    def _within(self, number: int, lists: Csr) -> Csr:
        """Drop what other lanes have, and replace rows of all places by rows of the lane's."""
        kept = self.lane[lists.indices] == number
        before = np.concatenate([[0], np.cumsum(kept)])
        return Csr(before[lists.indptr], self._row[lists.indices[kept]])


def _of_each(lane: Int32, lanes: int) -> list[Int32]:
    """Return the numbers of the rows that each lane has."""
    rows, found = by_group(lane)
    of_lane = [np.zeros(0, dtype=np.int32)] * lanes
    for number, start, stop in found:
        of_lane[number] = rows[start:stop].astype(np.int32)
    return of_lane


def _deal(weights: Int64, lanes: int) -> list[tuple[int, int]]:
    """Cut the shards (``weights``: their pairs) into one run for each lane, the lightest as heavy as possible."""
    if lanes > len(weights):
        raise BadInput(f"lanes={lanes}: there are {len(weights)} shards with pairs; take fewer lanes or smaller shards")

    def cuts(least: int) -> list[int]:
        """Return the ends of the shortest runs that weigh at least ``least``."""
        ends: list[int] = []
        total = 0
        for i, weight in enumerate(weights.tolist(), start=1):
            total += weight
            if total >= least:
                ends.append(i)
                total = 0
        return ends

    low, high = 1, int(weights.sum()) // lanes  # every shard weighs at least 1, so 1 can be reached
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(cuts(middle)) >= lanes else (low, middle - 1)
    ends = [*cuts(low)[: lanes - 1], len(weights)]
    return list(zip([0, *ends[:-1]], ends, strict=True))
