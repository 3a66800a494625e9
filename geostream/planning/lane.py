"""Assemble one lane: keep track of its resident shards and unused pairs, and let a strategy fill batch after batch.

This is what all strategies share. A lane makes its shards resident one after the other, and a strategy fills each batch
with unused pairs of resident shards. If it cannot fill a batch, the next shard becomes resident early (the schedule
counts the memory). A place that has as many unused views as there are batches to come enters every batch from then on;
otherwise some of its views would be left out. At the end, pairs that clash too much to fill a batch are swapped with
those of earlier batches (``repair``); the swaps keep the rules of every batch, not what a strategy chose beyond them.

Single numbers are read and written through memoryviews of the arrays (``…_at``), three times as fast as array items.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Int32, Int64
from geostream.planning.repair import Rules, complete


class SamplingProblem(NamedTuple):
    """The input of a strategy. Places are named by rows 0…N-1 here, not by place ids.

    Attributes:
        place: (P,) row of each pair's place.
        shard: (N,) number of the shard that holds each place.
        neighbours: (N, K) rows of each place's neighbours, hardest first, -1 where there is none.
        excluded: For each of the N places, the rows of those that may not share a batch with it; symmetric.
        history: For each earlier plan, newest first: (P,) number of each pair's batch in it, -1 where there is none.
        dataset: (N,) number of each place's data set where a batch may hold places of one data set only; None: of all.
    """

    place: Int32
    shard: Int32
    neighbours: Int32
    excluded: Csr
    history: tuple[Int32, ...] = ()
    dataset: Int32 | None = None


class Lane:
    """A lane that is being assembled; the base class of the strategies.

    A strategy implements :meth:`fill`, which chooses the pairs of the next batch, and :meth:`has_room`, which limits
    what is resident.

    Args:
        problem: The sampling problem; its pairs in other shards than ``shards`` are ignored.
        shards: Numbers of the lane's shards, in the order in which they become resident.
        batch_size: Pairs in a batch.
        rng: Generator of all random choices.
    """

    def __init__(self, problem: SamplingProblem, shards: Int64, batch_size: int, rng: np.random.Generator) -> None:
        self.problem, self.batch_size, self.rng = problem, batch_size, rng
        n_places, n_shards = len(problem.shard), len(shards)
        order = np.full(int(problem.shard.max(initial=0)) + 1, -1, dtype=np.int64)  # -1: not in this lane
        order[shards] = np.arange(n_shards)
        shard = order[problem.shard]
        self.shard, self.shard_at = shard, shard.data
        pairs = np.flatnonzero(shard[problem.place] >= 0)
        pairs = pairs[rng.permutation(len(pairs))]
        place = problem.place[pairs]
        self.left = np.bincount(place, minlength=n_places)  # (N,) unused pairs of each place
        self.left_at = self.left.data
        # Pairs sorted by place, the views of a place in random order; those of a place begin at ``first``.
        self.views = pairs[np.argsort(place, kind="stable")]
        self.views_at = self.views.data
        self.first = np.cumsum(self.left) - self.left
        self.first_at = self.first.data
        self.left_in_shard: list[int] = np.bincount(shard[place], minlength=n_shards).tolist()
        self.places_of_shard = groups(np.arange(n_places), shard, n_shards)
        self.arrival = np.zeros(n_places, dtype=np.int64)  # the first batch that may use the place
        self.last_arrival = 0
        self.to_come = list(range(n_shards))[::-1]
        self.held: list[int] = []  # shards with unused pairs, longest resident first
        self.batches: list[list[int]] = []  # pair ids
        self.batch: list[int] = []  # the batch that is being filled
        self.batch_places: list[int] = []

    def has_room(self) -> bool:
        """Return whether the next shard may become resident."""
        raise NotImplementedError

    def fill(self, urgent: list[int]) -> bool:
        """Fill the open batch by calling :meth:`use`.

        Args:
            urgent: Rows of places that should be in the batch; they come first.

        Returns:
            Whether the batch is full; False if no more pairs fit.
        """
        raise NotImplementedError

    def run(self) -> list[list[int]]:
        """Assemble the lane and return its batches as lists of pair ids."""
        total = sum(self.left_in_shard)
        most_views = int(self.left.max(initial=0))
        while total - len(self.batches) * self.batch_size >= self.batch_size:
            self.held = [s for s in self.held if self.left_in_shard[s]]
            while self.to_come and self.has_room():
                self.bring(self.to_come.pop())
            batches_left = total // self.batch_size - len(self.batches)
            self.batch, self.batch_places = [], []
            spare = total % self.batch_size
            if not self.fill(self.urgent(batches_left, spare) if most_views >= batches_left else []):
                self.put_back()
                break
            self.batches.append(self.batch)
        return self.finish()

    def bring(self, shard: int) -> None:
        """Make a shard (its position in ``shards``) resident."""
        self.held.append(shard)
        self.arrival[self.places_of_shard[shard]] = self.last_arrival = len(self.batches)

    def urgent(self, batches_left: int, spare: int) -> list[int]:
        """Find the places that must be in every batch to come, or some of their views are left out.

        Their shards become resident. As long as no more views would be left out than pairs that are left out anyway,
        no place is urgent.

        Args:
            batches_left: Number of batches to come.
            spare: Number of pairs that are left out anyway.

        Returns:
            Rows of the places, those with the most views first.
        """
        places = np.flatnonzero(self.left >= max(batches_left, 2))
        if (self.left[places] - batches_left + 1).sum() <= spare:
            return []
        places = places[np.lexsort((self.rng.random(len(places)), -self.left[places]))]
        early = {self.shard_at[place] for place in places.tolist()}.intersection(self.to_come)
        for shard in [s for s in reversed(self.to_come) if s in early]:
            self.to_come.remove(shard)
            self.bring(shard)
        return places.tolist()

    def use(self, place: int) -> int:
        """Put one unused pair of a place into the open batch; return how many unused pairs the place has left."""
        left = self.left_at[place] - 1
        self.batch.append(self.views_at[self.first_at[place] + left])
        self.batch_places.append(place)
        self.left_at[place] = left
        self.left_in_shard[self.shard_at[place]] -= 1
        return left

    def put_back(self) -> None:
        """Mark the pairs of the open batch as unused again."""
        for place in self.batch_places:
            self.left_at[place] += 1
            self.left_in_shard[self.shard_at[place]] += 1

    def finish(self) -> list[list[int]]:
        """Make more batches of the unused pairs, by swaps with earlier batches, and return all batches."""
        spare = [
            self.views_at[self.first_at[place] + i]
            for place in np.flatnonzero(self.left).tolist()
            for i in range(self.left_at[place])
        ]
        # Shards are held at the end if their pairs are used after the last shard became resident, or not at all.
        late = [pair for batch in self.batches[self.last_arrival :] for pair in batch] + spare
        held_last = np.isin(self.shard, self.shard[self.problem.place[late]])
        rules = Rules(self.problem.place, self.problem.excluded, self.arrival, held_last)
        return complete(self.batches, spare, rules, self.batch_size)


def groups(values: npt.NDArray[np.integer], group: Int64, n_groups: int) -> list[Int64]:
    """Split values by group.

    Args:
        values: (n,) values.
        group: (n,) group of each value; -1 drops it.
        n_groups: Number of groups.

    Returns:
        For each group its values, in their order.
    """
    by_group = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[by_group], np.arange(n_groups + 1))
    return [values[by_group[start:end]].astype(np.int64) for start, end in pairwise(ends.tolist())]
