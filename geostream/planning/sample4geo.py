"""Assemble Sample4Geo's batches and random ones, the two ends of the hardness score.

``sample4geo`` follows Deuser et al. (ICCV 2023, section 3.2, and the authors' code). A seed adds its nearest
neighbours, up to a quarter of a batch, and as many drawn from its other neighbours, as far as they are resident and
unused. Seeds come from the shard that has been resident longest, so that it empties and makes room for the next. With
all shards resident this is exactly Sample4Geo's method, the reference of the score (1); ``random`` is its zero.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Int64
from geostream.planning.lane import Lane, SamplingProblem, groups


def sample4geo(
    problem: SamplingProblem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
) -> list[list[int]]:
    """Assemble the batches of one lane from Sample4Geo's neighbourhoods.

    Args:
        problem: The lane's sampling problem.
        shards: Numbers of the lane's shards in their order.
        batch_size: Pairs in a batch.
        resident: Number of shards with unused pairs that are resident at once; all of them give random access.
        rng: Generator of all random choices.

    Returns:
        The batches, as lists of pair ids.
    """
    return _Neighbourhoods(problem, shards, batch_size, resident, rng).run()


def random(
    problem: SamplingProblem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
) -> list[list[int]]:
    """Assemble the batches of one lane at random from all its shards, under the same rules.

    Args:
        problem: The lane's sampling problem; its neighbours are ignored.
        shards: Numbers of the lane's shards.
        batch_size: Pairs in a batch.
        resident: Ignored; all strategies take the same arguments.
        rng: Generator of all random choices.

    Returns:
        The batches, as lists of pair ids.
    """
    without = problem._replace(neighbours=problem.neighbours[:, :0])
    return _Neighbourhoods(without, shards, batch_size, len(shards), rng).run()


class _Neighbourhoods(Lane):
    """A lane of ``sample4geo``; ``resident`` is the number of shards with unused pairs that are held at once."""

    def __init__(
        self, problem: SamplingProblem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
    ) -> None:
        if resident >= len(shards):  # random access: seeds come from all shards alike
            problem = problem._replace(shard=np.where(np.isin(problem.shard, shards), 0, 1).astype(np.int32))
            shards = np.zeros(1, dtype=np.int64)
        super().__init__(problem, shards, batch_size, rng)
        self.resident = resident
        pairs = self.views[rng.permutation(len(self.views))]
        place = problem.place[pairs]
        #: For each shard the places of its unused pairs, in random order: seeds are taken from these
        self.waiting = [places.tolist() for places in groups(place, self.shard[place], len(shards))]
        # Whether a place is resident and unused; the last entry is for -1, no neighbour.
        self.open = np.zeros(len(self.shard) + 1, dtype=bool)
        self.blocked = np.full(len(self.shard) + 1, -1)  # the last batch that the place may not enter
        self.blocked_at = self.blocked.data

    def has_room(self) -> bool:
        """Return whether fewer than ``resident`` shards are held."""
        return len(self.held) < self.resident

    def bring(self, shard: int) -> None:
        """Make a shard resident and mark its unused places as open."""
        super().bring(shard)
        places = self.places_of_shard[shard]
        self.open[places] = self.left[places] > 0

    def fill(self, urgent: list[int]) -> bool:
        """Fill the open batch with seeds and their neighbours, urgent places first."""
        number, size, quarter = len(self.batches), self.batch_size, self.batch_size // 4
        blocked_at = self.blocked_at
        aside: list[tuple[int, int]] = []  # (shard, seed) of seeds that clash with this batch
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
        """Return a place that fits the open batch, from the longest-held shard that has one; None if there is none.

        Shards become resident until one has such a place.

        Args:
            number: Number of the open batch.
            aside: Collects (shard, place) of seeds that clash with the batch.
        """
        tried = 0
        while True:
            for shard in self.held[tried:]:
                waiting = self.waiting[shard]
                while waiting:
                    place: int = waiting.pop()
                    if not self.left_at[place]:
                        continue  # its pairs were used as neighbours of other seeds
                    if self.blocked_at[place] != number:
                        return place
                    aside.append((shard, place))
            if not self.to_come:
                return None
            tried = len(self.held)
            self.bring(self.to_come.pop())

    def add(self, place: int, number: int) -> None:
        """Put one unused pair of a place into the open batch, whose number is ``number``."""
        if not self.use(place):
            self.open[place] = False
        self.blocked_at[place] = number
        start, stop = self.problem.excluded.indptr[place], self.problem.excluded.indptr[place + 1]
        if start != stop:
            self.blocked[self.problem.excluded.indices[start:stop]] = number
