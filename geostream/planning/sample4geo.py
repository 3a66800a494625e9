"""Sample4Geo's assembly and random batches: the two ends of the hardness score.

``sample4geo`` follows Deuser et al. (ICCV 2023, section 3.2, and the authors' code): a seed brings along a quarter of a
batch of its nearest neighbours and as many drawn from its other neighbours, as far as they are resident and unused.
Seeds come from the shard that has been resident longest, so that it empties and makes room for the next. With all
shards resident this *is* Sample4Geo's assembly, the reference of the score; ``random`` is its zero.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Int64
from geostream.planning.lane import Lane, SamplingProblem, groups


def sample4geo(
    problem: SamplingProblem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
) -> list[list[int]]:
    """The batches of one lane: Sample4Geo's neighbourhoods, over ``resident`` of ``shards`` at a time."""
    return _Neighbourhoods(problem, shards, batch_size, resident, rng).run()


def random(
    problem: SamplingProblem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
) -> list[list[int]]:
    """The batches of one lane, drawn from all its shards under the same rules."""
    without = problem._replace(neighbours=problem.neighbours[:, :0])
    return _Neighbourhoods(without, shards, batch_size, len(shards), rng).run()


class _Neighbourhoods(Lane):
    """``resident``: shards with unused pairs that are held at once."""

    def __init__(
        self, problem: SamplingProblem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
    ) -> None:
        if resident >= len(shards):  # random access: no shard need empty before another, so seeds come from all
            problem = problem._replace(shard=np.where(np.isin(problem.shard, shards), 0, 1).astype(np.int32))
            shards = np.zeros(1, dtype=np.int64)
        super().__init__(problem, shards, batch_size, rng)
        self.resident = resident
        pairs = self.views[rng.permutation(len(self.views))]
        place = problem.place[pairs]
        #: (n_shards) places of the unused pairs of each shard, in random order: where seeds come from
        self.waiting = [places.tolist() for places in groups(place, self.shard[place], len(shards))]
        # Resident and unused; the last entry is that of -1, no neighbour.
        self.open = np.zeros(len(self.shard) + 1, dtype=bool)
        self.blocked = np.full(len(self.shard) + 1, -1)  # the last batch that the place may not enter
        self.blocked_at = self.blocked.data

    def has_room(self) -> bool:
        return len(self.held) < self.resident

    def bring(self, shard: int) -> None:
        super().bring(shard)
        places = self.places_of_shard[shard]
        self.open[places] = self.left[places] > 0

    def fill(self, urgent: list[int]) -> bool:
        number, size, quarter = len(self.batches), self.batch_size, self.batch_size // 4
        blocked_at = self.blocked_at
        aside: list[tuple[int, int]] = []  # seeds that clash with this batch, and their shards
        for place in urgent[:size]:
            if blocked_at[place] != number:
                self.add(place, number)
        while len(self.batch) < size:
            seed = self.seed(number, aside)
            if seed is None:
                break
            self.add(seed, number)
            row = self.problem.neighbours[seed]
            near, others = row[:quarter], row[quarter:]
            drawn = others[self.rng.permutation(len(others))[:quarter]]
            candidates = np.concatenate([near, drawn])
            candidates = candidates[self.open[candidates] & (self.blocked[candidates] != number)]
            for place in candidates.tolist():
                if len(self.batch) == size:
                    break
                if blocked_at[place] != number:
                    self.add(place, number)
        for shard, seed in aside:
            self.waiting[shard].append(seed)
        return len(self.batch) == size

    def seed(self, number: int, aside: list[tuple[int, int]]) -> int | None:
        """A place that fits the open batch, of the shard held longest that has one; brings shards in where none has."""
        tried = 0
        while True:
            for shard in self.held[tried:]:
                waiting = self.waiting[shard]
                while waiting:
                    place: int = waiting.pop()
                    if not self.left_at[place]:
                        continue  # its pairs went into batches as somebody's neighbours
                    if self.blocked_at[place] != number:
                        return place
                    aside.append((shard, place))
            if not self.to_come:
                return None
            tried = len(self.held)
            self.bring(self.to_come.pop())

    def add(self, place: int, number: int) -> None:
        """One unused pair of the place enters the open batch."""
        if not self.use(place):
            self.open[place] = False
        self.blocked_at[place] = number
        start, stop = self.problem.excluded.indptr[place], self.problem.excluded.indptr[place + 1]
        if start != stop:
            self.blocked[self.problem.excluded.indices[start:stop]] = number
