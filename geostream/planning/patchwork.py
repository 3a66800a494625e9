"""``patchwork``: batches harder than random access allows, out of few resident shards, and new in every epoch.

A batch grows by affinity: the next place is the one that those in the batch name most often and nearest in their lists
of neighbours (place j of rank r in the list of a place of the batch counts 1 / (8 + r)). So a batch becomes a community
of the neighbour graph (compare GCBS, Sachidananda et al. 2022, and B3, Thirukovalluru et al. 2025), where Sample4Geo
joins the neighbourhoods of seeds that have nothing in common. Left to itself that repeats the same batches in every
epoch. Therefore a batch is made a patchwork of earlier ones: of any batch of the two epochs before it takes a tenth of
its size at most. The *overlap* is bounded by that, not hoped for. From one shard a batch takes a sixth, so that the
shard's places part and can meet others next time. Bounds are costs, not rules: a place beyond one is taken when
nothing else is left, the bound on the newest epoch last of all.

What an order of the shards allows in hardness beyond what is wanted is given for variety, in two ways (:class:`Mix`): a
batch consists of several patches, each grown around a seed of its own, and of each list only a random share counts. The
tour interleaves as many tracks through the order of the shards as shards are resident, with random phases, so that
shards of all corners meet, and others in each epoch. Fewer tracks reach harder batches, but then what the network sees
drifts from one corner to the next, and it learns less; so that comes last. (What a shard is made of does as much
against it: :mod:`geostream.planning.spreading`.) Where few batches fit into what is resident, there are more tracks in
any case. What is resident is bounded by *unused pairs*, ``resident`` shards' worth of them: a nearly empty shard takes
next to no room. The oldest shard breaks ties, gives the first seed, and so empties.

Measured in the plan benchmark (the README has its table). Tried, on 48,000 synthetic places (batch 128, 4.5 % resident)
and on 5,965 of a trained rendered city (batches 32 and 128): no bounds at all, score 1.32 to 1.44, overlap 0.35 and
more; only the epoch before bounded: the epoch before that comes back (0.2 to 0.35); numbers times random ones: neither
less overlap nor harder; 1 / (1 + r) and equal weights: less hard by up to 0.05; seeds with the fewest unused
neighbours: no difference; one track at batch 128 of the city (2.4 batches resident): overlap 0.15 to 0.20.
What a network learns, R@1 on 5,319 views of unseen cities after 9 epochs on 10,145 places of 20 rendered cities, batch
32, 5 % resident, one seed; in brackets the score, and how far the mean embedding of 8 batches in a row
wanders, as variance in units of that of random pairs: random access 0.612 (1.0, 4). In the order of similarity, 4
patches and 0.4 of each list: 4 tracks 0.590 (1.0, 20), the very same batches shuffled over the epoch 0.620; 12 tracks
0.613 (0.9, 11); with four pieces to a shard, 2 patches and half of each list 0.624 (1.0, 5), one patch 0.625 (1.2, 6).
In the first order, 12 tracks: one patch 0.628 (1.0, 4), 4 patches and 0.4 of each list 0.604 (0.6, 2).
Batches that grow easier within an epoch, as random access's do: no better (0.761 and 0.767 after 12 epochs elsewhere).
The cost: about 15 µs a pair, nearly independent of the number of pairs; memory is the problem's own arrays.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from geostream.arrays import Float64, Int64
from geostream.planning.lane import Lane, SamplingProblem

OLD_SHARE = 10  # of an earlier batch a new one takes a tenth of its size
SHARD_SHARE = 6  # and of a shard a sixth
CHOICE = 1.5  # times a batch's size: places that it can choose from, at least
MIXED = 16  # earlier batches that should be met in what is resident
#: What a place beyond a bound costs, in affinity (a place's is below 16): of the newest epoch, the one before; a shard.
OLD_COSTS, SHARD_COST = (1e6, 1e3), 30.0
AGE, CHANCE = 1e-3, 1e-4  # order of places without affinity: by age of their shard, then by chance
NEVER = -np.inf


class Mix(NamedTuple):
    """How much a batch mixes: less is harder."""

    tracks: int | None  # along the order of the shards at once; None: as many as shards are resident
    patches: int  # of a batch, each grown around a seed of its own
    share: float  # of a place's neighbours that count, others each time


MIXES = {
    "patchwork": Mix(None, 4, 0.4),
    "patchwork-less-mixed": Mix(None, 1, 1.0),
    "patchwork-little-mixed": Mix(2, 1, 0.5),
    "patchwork-unmixed": Mix(1, 1, 1.0),
}


def patchwork(
    problem: SamplingProblem, shards: Int64, batch_size: int, resident: int, rng: np.random.Generator, *, mix: Mix
) -> list[list[int]]:
    """The batches of one lane: communities of the graph that were none before, ``resident`` shards' worth at a time."""
    pairs = np.bincount(problem.shard[problem.place], minlength=int(problem.shard.max(initial=0)) + 1)[shards]
    room = max(resident * float(pairs.mean()), CHOICE * batch_size) if len(shards) else 0.0
    needed = -(-MIXED * batch_size // int(2 * room)) if room else 1
    tracks = max(needed, resident if mix.tracks is None else min(mix.tracks, resident))
    return _Patchwork(problem, interleaved(shards, tracks, rng), batch_size, room, mix, rng).run()


def interleaved(shards: Int64, tracks: int, rng: np.random.Generator) -> Int64:
    """The shards in the order of a tour along ``tracks`` equal parts of them at once, each begun at a random place.

    With fewer than two shards a part, parts are fewer.
    """
    tracks = min(tracks, len(shards) // 2)
    if tracks <= 1:
        return shards
    parts = [np.roll(part, rng.integers(len(part))) for part in np.array_split(shards, tracks)]
    parts = [part[:: rng.choice([-1, 1])] for part in parts]
    step = np.concatenate([np.arange(len(part)) for part in parts])
    return np.concatenate(parts)[np.argsort(step, kind="stable")]


class _Patchwork(Lane):
    """``room``: unused pairs that are resident at once."""

    def __init__(
        self, problem: SamplingProblem, shards: Int64, batch_size: int, room: float, mix: Mix, rng: np.random.Generator
    ) -> None:
        super().__init__(problem, shards, batch_size, rng)
        self.room, self.patch, self.share = room, -(-batch_size // mix.patches), mix.share
        # The lists are walked again and again for the nearest few: 1 / (8 + r) prefers them without cutting off.
        self.weight = 1 / (8 + np.arange(problem.neighbours.shape[1], dtype=np.float64))
        self.most_old, self.most_shard = max(1, batch_size // OLD_SHARE), max(1, batch_size // SHARD_SHARE)
        #: (N + 1,) slot of each resident, unused place, from 1 on; all others, and -1 (no neighbour), share slot 0
        self.slot = np.zeros(len(self.shard) + 1, dtype=np.int64)
        self.places = np.zeros(0, dtype=np.int64)  # of the slots
        self.arrived = np.zeros(len(shards))  # number of each shard in the order of arrival
        self.n_arrived = 0

    def has_room(self) -> bool:
        unused = sum(self.left_in_shard[shard] for shard in self.held)
        if unused + self.left_in_shard[self.to_come[-1]] <= self.room:
            return True
        # Places with many views: a batch takes one of each, and wants to choose.
        places = sum(int(np.count_nonzero(self.left[self.places_of_shard[shard]])) for shard in self.held)
        return places < CHOICE * self.batch_size

    def bring(self, shard: int) -> None:
        super().bring(shard)
        self.arrived[shard] = self.n_arrived
        self.n_arrived += 1

    def fill(self, urgent: list[int]) -> bool:
        while not self.grow(urgent):
            if not self.to_come:
                return False
            self.put_back()
            self.batch, self.batch_places = [], []
            self.bring(self.to_come.pop())
        return True

    def grow(self, urgent: list[int]) -> bool:
        """Fill the open batch with what is resident; False where that does not suffice."""
        value = self.open_slots()
        shard = self.shard[self.places]
        pair = self.views[self.first[self.places] + self.left[self.places] - 1]  # the one that each would bring
        bounded = [
            (batch[pair], self.most_old, cost) for batch, cost in zip(self.problem.history, OLD_COSTS, strict=False)
        ]
        bounded.append((shard, self.most_shard, SHARD_COST))
        counts = [Counter[int]() for _ in bounded]
        wanted = [at for at in self.slot[urgent[: self.batch_size]].tolist() if at][::-1] if urgent else []
        slot, neighbours, weight = self.slot, self.problem.neighbours, self.weight
        plain = value.copy()  # without affinity
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
            place = int(self.places[best - 1])
            self.use(place)
            start, stop = self.problem.excluded.indptr[place], self.problem.excluded.indptr[place + 1]
            clashes = slot[self.problem.excluded.indices[start:stop]] if start != stop else None
            for values in (value, plain):
                values[best] = NEVER
                if clashes is not None:
                    values[clashes] = NEVER
            for (group, most, cost), count in zip(bounded, counts, strict=True):
                own = int(group[best - 1])
                if own < 0:
                    continue
                count[own] += 1
                if count[own] >= most:
                    beyond = 1 + np.flatnonzero(group == own)
                    value[beyond] -= cost
                    plain[beyond] -= cost
            near = slot[neighbours[place]]
            if self.share < 1:
                counts_now = self.rng.random(len(near)) < self.share
                value[near[counts_now]] += weight[counts_now]
            else:
                value[near] += weight
        return True

    def seed(self, plain: Float64) -> int:
        """Slot of a place, any of those within all bounds; the best of the others where there is none."""
        free = np.flatnonzero(plain > -1)
        return int(free[self.rng.integers(len(free))]) if len(free) else int(plain.argmax())

    def open_slots(self) -> Float64:
        """Give every resident, unused place a slot; (1 + slots,) how much each is wanted before the first is taken."""
        self.slot[self.places] = 0
        held = np.concatenate([self.places_of_shard[shard] for shard in self.held] or [self.places[:0]])
        self.places = held[self.left[held] > 0]
        self.slot[self.places] = np.arange(1, len(self.places) + 1)
        age = self.arrived[self.shard[self.places]] / max(self.n_arrived, 1)
        first = CHANCE * self.rng.random(len(self.places)) - AGE * age
        return np.concatenate([[NEVER], first])
