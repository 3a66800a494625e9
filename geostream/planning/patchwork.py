"""Assemble hard batches from few resident shards, different ones in every epoch: the strategy ``patchwork``.

A batch grows by affinity. Each place in the batch adds 1 / (8 + r) to the affinity of its neighbour of rank r, and the
place with the highest affinity comes next. So a batch becomes a community of the neighbour graph (compare GCBS,
Sachidananda et al. 2022, and B3, Thirukovalluru et al. 2025), and can be harder than Sample4Geo's, which joins the
neighbourhoods of unrelated seeds.

Affinity alone would repeat the same batches in every epoch. Therefore a batch takes at most a tenth of its size from
any one batch of the two epochs before, which bounds the overlap. It takes at most a sixth from one shard, so that the
shard's other places can meet others later. Both bounds are costs, not rules: a place beyond a bound is taken if nothing
else is left, and the bound on the newest epoch gives way last.

Hardness beyond the target is traded for variety (:class:`Mix`). A batch consists of several patches, each grown around
a seed of its own, and only a random share of each list of neighbours counts. The lane follows several tracks through
the order of the shards at once, as many as shards are resident, so that different parts of that order meet in each
epoch. Fewer tracks give harder batches, but the network then sees one part of the order for long and learns less, so
they are the last fallback. Spreading a shard over the order helps as much (:mod:`geostream.planning.spreading`). If
only few batches fit into the resident shards, there are more tracks in any case.

The limit on residence counts unused pairs, so a nearly empty shard takes almost no room. The oldest shard wins ties and
gives the first seed, and so it empties.

Cost: about 15 µs a pair, nearly independent of the number of pairs, and no memory beyond arrays of the problem's size.
Measurements are in docs/notes/planning.md.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from geostream.arrays import Float64, Int64
from geostream.planning.lane import Lane, SamplingProblem

OLD_SHARE = 10  # a batch takes at most 1 / OLD_SHARE of its size from one earlier batch
SHARD_SHARE = 6  # and at most 1 / SHARD_SHARE of its size from one shard
CHOICE = 1.5  # a batch can choose from at least CHOICE times as many places as it takes
MIXED = 16  # the resident pairs should come from at least so many earlier batches
#: Cost in affinity (which is below 16) of a place beyond a bound: on the newest epoch and the one before; on a shard.
OLD_COSTS, SHARD_COST = (1e6, 1e3), 30.0
AGE, CHANCE = 1e-3, 1e-4  # places without affinity are taken by age of their shard, then at random
NEVER = -np.inf


class Mix(NamedTuple):
    """How varied batches are; less variety makes them harder.

    Attributes:
        tracks: Number of tracks through the order of the shards; None for as many as shards are resident.
        patches: Number of patches in a batch, each grown around a seed of its own.
        share: Share of a place's neighbours that count, drawn anew each time.
    """

    tracks: int | None
    patches: int
    share: float


MIXES = {
    "patchwork": Mix(None, 4, 0.4),
    "patchwork-less-mixed": Mix(None, 1, 1.0),
    "patchwork-little-mixed": Mix(2, 1, 0.5),
    "patchwork-unmixed": Mix(1, 1, 1.0),
}


def patchwork(
    problem: SamplingProblem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator, *, mix: Mix
) -> list[list[int]]:
    """Assemble the batches of one lane as communities of the graph that differ from earlier batches.

    Args:
        problem: The lane's sampling problem.
        shards: Numbers of the lane's shards in their order.
        batch_size: Pairs in a batch.
        resident: Limit on the unused pairs that are resident, in average shards.
        rng: Generator of all random choices.
        mix: How varied the batches are.

    Returns:
        The batches, as lists of pair ids.
    """
    pairs = np.bincount(problem.shard[problem.place], minlength=int(problem.shard.max(initial=0)) + 1)[shards]
    room = max(resident * float(pairs.mean()), CHOICE * batch_size) if len(shards) else 0.0
    needed = -(-MIXED * batch_size // int(2 * room)) if room else 1
    tracks = max(needed, resident if mix.tracks is None else min(mix.tracks, resident))
    return _Patchwork(problem, interleaved(shards, tracks, rng), batch_size, room, mix, rng).run()


def interleaved(shards: Int64, tracks: int, rng: np.random.Generator) -> Int64:
    """Order shards so that several equal parts of them are followed at once.

    Each part is begun at a random shard and followed in a random direction.

    Args:
        shards: Numbers of the shards in their order.
        tracks: Number of parts; fewer are used if a part would have fewer than two shards.
        rng: Generator of the random choices.

    Returns:
        The same numbers in the new order.
    """
    tracks = min(tracks, len(shards) // 2)
    if tracks <= 1:
        return shards
    parts = [np.roll(part, rng.integers(len(part))) for part in np.array_split(shards, tracks)]
    parts = [part[:: rng.choice([-1, 1])] for part in parts]
    step = np.concatenate([np.arange(len(part)) for part in parts])
    return np.concatenate(parts)[np.argsort(step, kind="stable")]


class _Patchwork(Lane):
    """A lane of ``patchwork``; ``room`` is the most unused pairs that are resident at once."""

    def __init__(
        self, problem: SamplingProblem, shards: Int64, batch_size: int, room: float, mix: Mix, rng: np.random.Generator
    ) -> None:
        super().__init__(problem, shards, batch_size, rng)
        self.room, self.patch, self.share = room, -(-batch_size // mix.patches), mix.share
        # 1 / (8 + r) prefers the nearest neighbours without cutting off the others.
        self.weight = 1 / (8 + np.arange(problem.neighbours.shape[1], dtype=np.float64))
        self.most_old, self.most_shard = max(1, batch_size // OLD_SHARE), max(1, batch_size // SHARD_SHARE)
        #: (N + 1,) slot of each resident, unused place, from 1; slot 0 is for all others and for -1 (no neighbour)
        self.slot = np.zeros(len(self.shard) + 1, dtype=np.int64)
        self.places = np.zeros(0, dtype=np.int64)  # place of each slot from 1
        self.arrived = np.zeros(len(shards))  # rank of each shard in the order in which they became resident
        self.n_arrived = 0

    def has_room(self) -> bool:
        """Return whether the next shard's unused pairs fit, or the places to choose from are too few."""
        unused = sum(self.left_in_shard[shard] for shard in self.held)
        if unused + self.left_in_shard[self.to_come[-1]] <= self.room:
            return True
        # With many views a place, few places may be resident: a batch takes one view of each and needs a choice.
        places = sum(int(np.count_nonzero(self.left[self.places_of_shard[shard]])) for shard in self.held)
        return places < CHOICE * self.batch_size

    def bring(self, shard: int) -> None:
        """Make a shard resident and record its rank."""
        super().bring(shard)
        self.arrived[shard] = self.n_arrived
        self.n_arrived += 1

    def fill(self, urgent: list[int]) -> bool:
        """Fill the open batch; while the resident shards do not suffice, make the next one resident."""
        while not self.grow(urgent):
            if not self.to_come:
                return False
            self.put_back()
            self.batch, self.batch_places = [], []
            self.bring(self.to_come.pop())
        return True

    def grow(self, urgent: list[int]) -> bool:
        """Fill the open batch from the resident shards; return False if they do not suffice."""
        value = self.open_slots()
        shard = self.shard[self.places]
        pair = self.views[self.first[self.places] + self.left[self.places] - 1]  # the pair that each place would add
        bounded = [
            (batch[pair], self.most_old, cost) for batch, cost in zip(self.problem.history, OLD_COSTS, strict=False)
        ]
        bounded.append((shard, self.most_shard, SHARD_COST))
        groups_at = [group.data for group, _, _ in bounded]
        counts = [Counter[int]() for _ in bounded]
        wanted = [at for at in self.slot[urgent[: self.batch_size]].tolist() if at][::-1] if urgent else []
        slot, neighbours, weight = self.slot, self.problem.neighbours, self.weight
        plain = value.copy()  # the values without affinity
        places_at, first_at, excluded = (
            self.places.data,
            self.problem.excluded.indptr.data,
            self.problem.excluded.indices,
        )
        while len(self.batch) < self.batch_size:
            if wanted:
                best = wanted.pop()
            elif self.batch and len(self.batch) % self.patch == 0:
                value[:] = plain
                best = self.seed(plain)
            else:
                best = int(value.argmax())
            if value[best] == NEVER:
                if wanted:
                    continue
                return False
            place = places_at[best - 1]
            self.use(place)
            start, stop = first_at[place], first_at[place + 1]
            clashes = slot.take(excluded[start:stop]) if start != stop else None
            for values in (value, plain):
                values[best] = NEVER
                if clashes is not None:
                    values[clashes] = NEVER
            for (group, most, cost), group_at, count in zip(bounded, groups_at, counts, strict=True):
                own = group_at[best - 1]
                if own < 0:
                    continue
                count[own] += 1
                if count[own] >= most:
                    beyond = 1 + np.flatnonzero(group == own)
                    value[beyond] -= cost
                    plain[beyond] -= cost
            near = slot.take(neighbours[place], mode="wrap")  # -1, no neighbour, is the last entry
            value[near] += weight * (self.rng.random(len(near)) < self.share) if self.share < 1 else weight
        return True

    def seed(self, plain: Float64) -> int:
        """Return the slot of a random place within all bounds, or of the cheapest place if there is none."""
        free = np.flatnonzero(plain > -1)
        return int(free[self.rng.integers(len(free))]) if len(free) else int(plain.argmax())

    def open_slots(self) -> Float64:
        """Give every resident, unused place a slot; return (1 + slots,) the value of each before any is taken."""
        self.slot[self.places] = 0
        held = np.concatenate([self.places_of_shard[shard] for shard in self.held] or [self.places[:0]])
        self.places = held[self.left[held] > 0]
        self.slot[self.places] = np.arange(1, len(self.places) + 1)
        age = self.arrived[self.shard[self.places]] / max(self.n_arrived, 1)
        first = CHANCE * self.rng.random(len(self.places)) - AGE * age
        return np.concatenate([[NEVER], first])
