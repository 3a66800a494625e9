"""A lane being put together: which shards are resident, which pairs are unused, and what becomes of the rest.

What every strategy shares. A lane brings its shards in one after the other, lets a strategy fill batch after batch with
what is resident and unused, and at its end makes batches of what clashes too much to fill one (``repair``). A batch
that cannot be filled brings the next shard in early (the schedule counts what is then held). Places with as many unused
views as there are batches to come enter every batch from then on, else views would remain at the end.
Single numbers are read and written through memoryviews of the arrays (``…_at``): thrice as fast as array items.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Int32, Int64, restrict
from geostream.planning.repair import Rules, complete


class SamplingProblem(NamedTuple):
    """All an assembler knows. Places are rows 0…N-1 here, not place ids."""

    place: Int32  # (P,) row of each pair's place
    shard: Int32  # (N,) number of the shard that holds each place
    neighbours: Int32  # (N, K) rows, hardest first, -1 where there is none
    excluded: Csr  # N rows: the places that may not share a batch with it; symmetric
    history: tuple[Int32, ...] = ()  # each (P,): number of each pair's batch in an earlier plan, -1: none; newest first

    def part(self, shards: Int64) -> tuple[SamplingProblem, Int32]:
        """The problem of these shards alone, and the pair ids that its pairs have here."""
        places = np.flatnonzero(np.isin(self.shard, shards)).astype(np.int32)
        row = np.full(len(self.shard) + 1, -1, dtype=np.int32)  # the last entry is that of -1, no neighbour
        row[places] = np.arange(len(places), dtype=np.int32)
        pairs = np.flatnonzero(row[self.place] >= 0).astype(np.int32)
        part = SamplingProblem(
            place=row[self.place[pairs]],
            shard=self.shard[places],
            neighbours=row[self.neighbours[places]],
            excluded=restrict(self.excluded, places),
            history=tuple(batch[pairs] for batch in self.history),
        )
        return part, pairs


class Lane:
    """One lane. A strategy says by :meth:`fill` which pairs make the next batch, by :meth:`has_room` what is resident.

    ``shards``: numbers of the lane's shards in the order in which they are walked.
    """

    def __init__(self, problem: SamplingProblem, shards: Int64, batch_size: int, rng: np.random.Generator) -> None:
        self.problem, self.batch_size, self.rng = problem, batch_size, rng
        n_places, n_shards = len(problem.shard), len(shards)
        order = np.full(int(problem.shard.max(initial=0)) + 1, -1, dtype=np.int64)  # -1: outside of the lane
        order[shards] = np.arange(n_shards)
        shard = order[problem.shard]
        self.shard, self.shard_at = shard, shard.data
        pairs = np.flatnonzero(shard[problem.place] >= 0)
        pairs = pairs[rng.permutation(len(pairs))]
        place = problem.place[pairs]
        self.left = np.bincount(place, minlength=n_places)  # (N,) unused pairs of each place
        self.left_at = self.left.data
        # Pairs by place, views in random order; those of a place begin at ``first``.
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
        self.batch: list[int] = []  # the open one
        self.batch_places: list[int] = []

    def has_room(self) -> bool:
        """Whether the next shard may come."""
        raise NotImplementedError

    def fill(self, urgent: list[int]) -> bool:
        """Fill the next batch by :meth:`use`, ``urgent`` places first; False where nothing that fits is left."""
        raise NotImplementedError

    def run(self) -> list[list[int]]:
        """All batches of the lane, as pair ids."""
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
        """The shard arrives."""
        self.held.append(shard)
        self.arrival[self.places_of_shard[shard]] = self.last_arrival = len(self.batches)

    def urgent(self, batches_left: int, spare: int) -> list[int]:
        """Places with a view for every batch still to come, or more; their shards arrive.

        None, as long as the views that would remain without are no more than the pairs that are left out anyway.
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
        """One unused pair of the place enters the open batch; returns how many it has left."""
        left = self.left_at[place] - 1
        self.batch.append(self.views_at[self.first_at[place] + left])
        self.batch_places.append(place)
        self.left_at[place] = left
        self.left_in_shard[self.shard_at[place]] -= 1
        return left

    def put_back(self) -> None:
        """Nothing of the open batch was used."""
        for place in self.batch_places:
            self.left_at[place] += 1
            self.left_in_shard[self.shard_at[place]] += 1

    def finish(self) -> list[list[int]]:
        """Make batches of what is left, by swaps with those there are."""
        spare = [
            self.views_at[self.first_at[place] + i]
            for place in np.flatnonzero(self.left).tolist()
            for i in range(self.left_at[place])
        ]
        # Held at the end are the shards that are used, or still unused, once the last one has come.
        late = [pair for batch in self.batches[self.last_arrival :] for pair in batch] + spare
        held_last = np.isin(self.shard, self.shard[self.problem.place[late]])
        rules = Rules(self.problem.place, self.problem.excluded, self.arrival, held_last)
        return complete(self.batches, spare, rules, self.batch_size)


def groups(values: npt.NDArray[np.integer], group: Int64, n_groups: int) -> list[Int64]:
    """The values of each group 0…n-1, in their order; group -1 is dropped."""
    by_group = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[by_group], np.arange(n_groups + 1))
    return [values[by_group[start:end]].astype(np.int64) for start, end in pairwise(ends.tolist())]
