"""Assembly: which unused pairs share a batch. Pure functions on arrays; whoever makes a plan calls :func:`assemble`.

A lane walks its shards in order with W of them resident and puts each batch together from resident, unused pairs.
Seeds come from the shard that has been resident longest, so that it empties and makes room for the next; a seed
brings along what Sample4Geo (Deuser et al., ICCV 2023, section 3.2, and the authors' code) lets it bring: a quarter of
a batch of its nearest neighbours and as many drawn from its other neighbours, as far as they are resident and unused.
With all shards resident this *is* Sample4Geo's assembly, the reference of the hardness score.

What the rules cost: a batch that cannot be filled from W shards brings the next shard in early (the schedule counts
what is then held); at a lane's end what clashes too much to fill a batch is swapped against pairs of earlier
batches (``repair``). Lanes share no shard and have equally many batches, so whole batches of the longer lanes are left
out: up to a shard's worth of pairs a lane, next to nothing where equal shards divide evenly among the lanes.

Tried on 48,000 synthetic places in clustered shards of 240, batch 128, W = 8 (score, overlap): shards always in the
same order 0.94, 0.19; from a random start 0.94, 0.19; walked back every other epoch 0.94, 0.10, which is what is done;
order jittered by up to 8 shards 0.92, 0.12; choosing nearest neighbours among what is resident instead of keeping
what is resident of the nearest 0.87, 0.21.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.errors import BadInput
from geostream.layout import Csr, Int32, Int64
from geostream.mining.repair import Rules, complete


class Problem(NamedTuple):
    """All an assembler knows. Places are rows 0…N-1 here, not place ids."""

    place: Int32  # (P,) row of each pair's place
    shard: Int32  # (N,) number of the shard that holds each place
    neighbours: Int32  # (N, K) rows, hardest first, -1 where there is none
    excluded: Csr  # N rows: the places that may not share a batch with it; symmetric


class Assembled(NamedTuple):
    """Batches in global order: step s is batch s // lanes of lane s % lanes."""

    batches: Int32  # (B, batch size) pair ids
    lane: Int32  # (B,)
    left_out: Int32  # pair ids, sorted


def assemble(
    problem: Problem, *, strategy: str, batch_size: int, lanes: int = 1, resident: int, seed: int, epoch: int
) -> Assembled:
    """Batches of one epoch: each pair at most once, no place and no excluded places twice in a batch, all full.

    ``resident`` is W, in shards of a lane. The same arguments give the same batches on any machine.
    Raises BadInput for an unknown strategy, and for more lanes than there are shards.
    """
    if strategy not in STRATEGIES:
        raise BadInput(f"strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    rng = np.random.default_rng([seed, epoch, 0])
    pairs_of_shard = np.bincount(problem.shard[problem.place])
    shards = np.flatnonzero(pairs_of_shard)
    # Neighbours on disk stay neighbours; walking back every other epoch brings other pairs of shards together last.
    shards = np.roll(shards, rng.integers(max(len(shards), 1)))[:: -1 if epoch % 2 else 1]
    runs = _deal(pairs_of_shard[shards], lanes)
    by_lane = [
        STRATEGIES[strategy](
            problem, shards[start:stop], batch_size, resident, np.random.default_rng([seed, epoch, lane + 1])
        )
        for lane, (start, stop) in enumerate(runs)
    ]
    length = min(len(batches) for batches in by_lane)
    interleaved = np.array([batches[:length] for batches in by_lane], dtype=np.int32).reshape(lanes, length, batch_size)
    batches = interleaved.swapaxes(0, 1).reshape(length * lanes, batch_size)
    used = np.zeros(len(problem.place), dtype=bool)
    used[batches] = True
    lane_of_batch = np.tile(np.arange(lanes, dtype=np.int32), length)
    return Assembled(batches, lane_of_batch, np.flatnonzero(~used).astype(np.int32))


def _deal(weights: Int64, lanes: int) -> list[tuple[int, int]]:
    """Cut the shards (``weights``: their pairs) into a run per lane, so that the lightest is as heavy as can be."""
    if lanes > len(weights):
        raise BadInput(f"lanes={lanes}: there are {len(weights)} shards with pairs; take fewer lanes or smaller shards")

    def cuts(least: int) -> list[int]:
        """Ends of the shortest runs that weigh at least ``least``."""
        ends: list[int] = []
        total = 0
        for i, weight in enumerate(weights.tolist(), start=1):
            total += weight
            if total >= least:
                ends, total = [*ends, i], 0
        return ends

    low, high = 1, int(weights.sum()) // lanes  # every shard weighs at least 1, so 1 can be reached
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(cuts(middle)) >= lanes else (low, middle - 1)
    ends = [*cuts(low)[: lanes - 1], len(weights)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def sample4geo(
    problem: Problem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
) -> list[list[int]]:
    """The batches of one lane: Sample4Geo's neighbourhoods, over ``resident`` of ``shards`` at a time."""
    return _Lane(problem, shards, batch_size, resident, rng).run()


def random(
    problem: Problem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
) -> list[list[int]]:
    """The batches of one lane, drawn from all its shards under the same rules: the zero of the hardness score."""
    without = problem._replace(neighbours=problem.neighbours[:, :0])
    return _Lane(without, shards, batch_size, len(shards), rng).run()


Strategy = Callable[[Problem, Int64, int, int, np.random.Generator], list[list[int]]]
STRATEGIES: dict[str, Strategy] = {"sample4geo": sample4geo, "random": random}


class _Lane:
    """One lane being put together.

    Single numbers are read and written through memoryviews of the arrays (``…_at``): thrice as fast as array items.
    """

    def __init__(
        self, problem: Problem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator
    ) -> None:
        self.problem, self.batch_size, self.resident, self.rng = problem, batch_size, resident, rng
        # Place of each shard in the lane's order, -1 outside of the lane.
        order = np.full(int(problem.shard.max(initial=0)) + 1, -1, dtype=np.int64)
        order[shards] = np.arange(len(shards))
        if resident >= len(shards):  # random access: no shard need empty before another, so seeds come from all
            order = np.minimum(order, 0)
        n_shards = int(order.max()) + 1
        shard = order[problem.shard]
        pairs = np.flatnonzero(shard[problem.place] >= 0)
        pairs = pairs[rng.permutation(len(pairs))]
        place = problem.place[pairs]
        #: (n_shards) places of the unused pairs of each shard, in random order: where seeds come from
        self.waiting = [places.tolist() for places in _groups(place, shard[place], n_shards)]
        self.left_in_shard = [len(waiting) for waiting in self.waiting]
        self.places_of_shard = _groups(np.arange(len(shard)), shard, n_shards)
        self.shard_at = shard.data
        counts = np.bincount(place, minlength=len(shard))
        self.left, self.left_at = counts, counts.data  # (N,) unused pairs of each place
        # Pairs by place, views in random order; those of a place begin at ``first``.
        self.views_at = pairs[np.argsort(place, kind="stable")].data
        self.first_at = (np.cumsum(counts) - counts).data
        # Resident and unused; the last entry is that of -1, no neighbour.
        self.open = np.zeros(len(shard) + 1, dtype=bool)
        self.blocked = np.full(len(shard) + 1, -1)  # the last batch that the place may not enter
        self.blocked_at = self.blocked.data
        self.arrival = np.zeros(len(shard), dtype=np.int64)  # the first batch that may use the place
        self.last_arrival = 0
        self.to_come = list(range(n_shards))[::-1]
        self.held: list[int] = []  # shards with unused pairs, longest resident first
        self.batches: list[list[int]] = []  # pair ids
        self.batch: list[int] = []  # the open one
        self.batch_places: list[int] = []

    def run(self) -> list[list[int]]:
        total = sum(self.left_in_shard)
        most_views = int(self.left.max(initial=0))
        while total - len(self.batches) * self.batch_size >= self.batch_size:
            self.held = [s for s in self.held if self.left_in_shard[s]]
            while self.to_come and len(self.held) < self.resident:
                self.bring(self.to_come.pop())
            batches_left = total // self.batch_size - len(self.batches)
            if not self.fill(self.urgent(batches_left) if most_views >= batches_left else []):
                break
            self.batches.append(self.batch)
        return self.finish()

    def bring(self, shard: int) -> None:
        """The shard arrives."""
        self.held.append(shard)
        places = self.places_of_shard[shard]
        self.open[places] = self.left[places] > 0
        self.arrival[places] = self.last_arrival = len(self.batches)

    def urgent(self, batches_left: int) -> list[int]:
        """Places with a view for every batch still to come, or more: they enter first, else views remain at the end."""
        places = np.flatnonzero(self.left >= max(batches_left, 2))
        places = places[np.lexsort((self.rng.random(len(places)), -self.left[places]))]
        early = {self.shard_at[place] for place in places.tolist()}.intersection(self.to_come)
        for shard in [s for s in reversed(self.to_come) if s in early]:
            self.to_come.remove(shard)
            self.bring(shard)
        return places.tolist()

    def fill(self, urgent: list[int]) -> bool:
        """Fill the next batch; False, and nothing used, where the lane has nothing that fits any more."""
        number, size, quarter = len(self.batches), self.batch_size, self.batch_size // 4
        blocked_at = self.blocked_at
        self.batch, self.batch_places = [], []
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
        if len(self.batch) == size:
            return True
        for place in self.batch_places:
            self.left_at[place] += 1
            self.left_in_shard[self.shard_at[place]] += 1
        return False

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
        left = self.left_at[place] - 1
        self.batch.append(self.views_at[self.first_at[place] + left])
        self.batch_places.append(place)
        self.left_at[place] = left
        if not left:
            self.open[place] = False
        self.left_in_shard[self.shard_at[place]] -= 1
        self.blocked_at[place] = number
        start, stop = self.problem.excluded.indptr[place], self.problem.excluded.indptr[place + 1]
        if start != stop:
            self.blocked[self.problem.excluded.indices[start:stop]] = number

    def finish(self) -> list[list[int]]:
        """Make batches of what is left, by swaps with those there are."""
        spare = [
            self.views_at[self.first_at[place] + i]
            for place in np.flatnonzero(self.left).tolist()
            for i in range(self.left_at[place])
        ]
        # Held at the end are the shards that are used, or still unused, once the last one has come.
        late = [pair for batch in self.batches[self.last_arrival :] for pair in batch] + spare
        shard, place = np.asarray(self.shard_at), self.problem.place
        held_last = np.isin(shard, shard[place[late]])
        rules = Rules(place, self.problem.excluded, self.arrival, held_last)
        return complete(self.batches, spare, rules, self.batch_size)


def _groups(values: npt.NDArray[np.integer], group: Int64, n_groups: int) -> list[Int64]:
    """The values of each group 0…n-1, in their order; group -1 is dropped."""
    by_group = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[by_group], np.arange(n_groups + 1))
    return [values[by_group[start:end]].astype(np.int64) for start, end in pairwise(ends.tolist())]
