"""Divide an epoch's pairs among lanes that share no shard, and cut out the sampling problem of each lane.

Where batches hold one data set each, a lane has its share of each data set's shards. Where the shards hold places of
several data sets (a reclustering has mixed them), the lanes are cut as if there were one.

Shards are taken in their order on disk, where similar shards lie together. Each epoch begins at a random shard, and
every other one runs backwards, so that the shards that meet at the end of a lane vary. The places and pairs are sorted
by lane once, so cutting out all lanes costs about as much as cutting out one.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Csr, Int32, Int64, Integers, by_group, take
from geostream.errors import BadInput
from geostream.planning.lane import SamplingProblem


class Parts:
    """The parts of a sampling problem, each a problem of its own. It holds 8 bytes a place and 4 a pair.

    Args:
        problem: The whole problem; its neighbours may be left out (K = 0).
        part: (N,) number of the part that each place belongs to; -1 for none.
        count: How many parts there are.
    """

    def __init__(self, problem: SamplingProblem, part: Integers, count: int) -> None:
        self.problem, self._part = problem, part
        self._places = _of_each(part, count)
        self._pairs = _of_each(part[problem.place], count)
        self._row = np.empty(len(part), dtype=np.int32)  # of each place within its part
        for places in self._places:
            self._row[places] = np.arange(len(places), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._places)

    def places(self, number: int) -> Int32:
        """Return the rows of a part's places, sorted."""
        return self._places[number]

    def pairs(self, number: int) -> Int32:
        """Return the ids of a part's pairs, sorted."""
        return self._pairs[number]

    def part(self, number: int) -> SamplingProblem:
        """Return the sampling problem of one part.

        Args:
            number: Number of the part.

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
            neighbours=np.where((near >= 0) & (self._part[near] == number), self._row[near], -1).astype(np.int32),
            excluded=self._within(number, take(whole.excluded, places)),
            history=tuple(batch[pairs] for batch in whole.history),
            dataset=None if whole.dataset is None else whole.dataset[places],
        )

    def _within(self, number: int, lists: Csr) -> Csr:
        """Drop what other parts have, and replace rows of all places by rows of the part's."""
        kept = self._part[lists.indices] == number
        before = np.concatenate([[0], np.cumsum(kept)])
        return Csr(before[lists.indptr], self._row[lists.indices[kept]])


class Division(Parts):
    """The lanes of an epoch.

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
        pairs_of_shard = np.bincount(problem.shard[problem.place])
        self.shards = [np.zeros(0, dtype=np.int64)] * lanes
        for some in _shards_by_dataset(problem, len(pairs_of_shard)):
            rng = np.random.default_rng([seed, epoch, 0])
            shards = np.roll(some, rng.integers(max(len(some), 1)))[:: -1 if epoch % 2 else 1]
            for number, (start, stop) in enumerate(_deal(pairs_of_shard[shards], lanes)):
                self.shards[number] = np.concatenate([self.shards[number], shards[start:stop]])
        kind: type[np.integer] = np.int16 if lanes <= np.iinfo(np.int16).max else np.int32  # 16 bits sort much faster
        lane_of_shard = np.full(len(pairs_of_shard), -1, dtype=kind)
        for number, some in enumerate(self.shards):
            lane_of_shard[some] = number
        self.lane: Integers = lane_of_shard[problem.shard]
        super().__init__(problem, self.lane, lanes)


def _shards_by_dataset(problem: SamplingProblem, shards: int) -> list[Int64]:
    """Return the numbers of the shards with pairs: by data set, if these are told apart and no shard holds two."""
    everything = np.bincount(problem.shard[problem.place], minlength=shards)
    if problem.dataset is not None:
        of_pair, sets = problem.dataset[problem.place], range(int(problem.dataset.max(initial=0)) + 1)
        counts = np.stack([np.bincount(problem.shard[problem.place[of_pair == n]], minlength=shards) for n in sets])
        if ((counts > 0).sum(axis=0) <= 1).all():
            return [np.flatnonzero(count) for count in counts if count.any()]
    return [np.flatnonzero(everything)]


def _of_each(part: Integers, count: int) -> list[Int32]:
    """Return the numbers of the rows that each part has."""
    rows, found = by_group(part)
    of_part = [np.zeros(0, dtype=np.int32)] * count
    for number, start, stop in found:
        of_part[number] = rows[start:stop].astype(np.int32)
    return of_part


def _deal(weights: Int64, lanes: int) -> list[tuple[int, int]]:
    """Cut the shards (``weights``: their pairs) into one run for each lane, the lightest as heavy as possible."""
    if lanes > len(weights):
        raise BadInput(
            f"lanes={lanes}: there are {len(weights)} shards with pairs (with mix=own, of a data set); take fewer "
            "lanes or smaller shards"
        )

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
