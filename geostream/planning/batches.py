"""Assemble an epoch's pairs into batches: deal the shards to lanes, and let a strategy fill the batches of each lane.

Everything here is pure functions on arrays. A strategy is chosen by name: ``patchwork`` is the one to train with,
``sample4geo`` is the reference of the hardness score (1), ``random`` its zero. Lanes share no shard, so each lane is a
sampling problem of its own, which this process or a Dask worker can solve.

All lanes get the same number of batches. The surplus batches of longer lanes are left out: up to a shard's pairs in
each lane, and almost none if equal shards divide evenly among the lanes. Shards are taken in their order on disk, where
similar shards lie together. Each epoch begins at a random shard, and every other one runs backwards, so that the shards
that meet at the end of a lane vary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from geostream.arrays import Int32, Int64
from geostream.errors import BadInput
from geostream.planning.lane import SamplingProblem
from geostream.planning.patchwork import MIXES, patchwork
from geostream.planning.sample4geo import random, sample4geo

Strategy = Callable[[SamplingProblem, Int64, int, int, np.random.Generator], list[list[int]]]
STRATEGIES: dict[str, Strategy] = {
    **{name: partial(patchwork, mix=mix) for name, mix in MIXES.items()},
    "sample4geo": sample4geo,
    "random": random,
}
#: Fallbacks of a strategy, tried in this order until the target hardness is reached; the first is the strategy itself.
FALLBACKS = {"patchwork": tuple(MIXES)}
#: Fallbacks whose batches drift along the order of the shards, so that a network sees one kind of place for long.
DRIFTING = frozenset(name for name, mix in MIXES.items() if mix.tracks is not None)


class Assembled(NamedTuple):
    """Batches in global order: batch s is batch s // lanes of lane s % lanes.

    Attributes:
        batches: (B, batch size) pair ids.
        lane: (B,) lane of each batch.
        left_out: Ids of the pairs that no batch holds, sorted.
    """

    batches: Int32
    lane: Int32
    left_out: Int32


class LaneTask(NamedTuple):
    """The task of assembling one lane.

    Attributes:
        number: Number of the lane.
        problem: The sampling problem of the lane's pairs.
        shards: Numbers of the lane's shards, in the order in which they are taken.
        strategy: Name of the strategy.
        batch_size: Pairs in a batch.
        resident: Number of shards that are resident at once.
        seed: Seed of the lane's random generator.
    """

    number: int
    problem: SamplingProblem
    shards: Int64
    strategy: str
    batch_size: int
    resident: int
    seed: tuple[int, ...]


def assemble_lane(task: LaneTask) -> tuple[int, Int32]:
    """Assemble one lane.

    Returns:
        The lane's number, and (B, batch size) its batches as pair ids of its own sampling problem.
    """
    strategy, rng = STRATEGIES[task.strategy], np.random.default_rng(task.seed)
    batches = strategy(task.problem, task.shards, task.batch_size, task.resident, rng)
    return task.number, np.array(batches, dtype=np.int32).reshape(len(batches), task.batch_size)


MapFn = Callable[[Callable[[LaneTask], tuple[int, Int32]], Sequence[LaneTask]], Iterable[tuple[int, Int32]]]


def assemble(
    problem: SamplingProblem,
    *,
    strategy: str,
    batch_size: int,
    lanes: int = 1,
    resident: int,
    seed: int,
    epoch: int,
    map_fn: MapFn = map,
) -> Assembled:
    """Assemble the batches of one epoch; the same arguments give the same batches on any machine.

    What every strategy keeps: a batch is full, holds no place twice and no two places that exclude each other. A pair
    is in at most one batch. Lanes share no shard, and have equally many batches. No pair is left out that a swap with
    an earlier batch could place.

    Args:
        problem: The pairs, their places and shards, and the neighbour graph.
        strategy: A name in ``STRATEGIES``.
        batch_size: Pairs in a batch.
        lanes: Number of lanes.
        resident: Number of a lane's shards that are resident at once.
        seed: The run's seed.
        epoch: Number of the epoch.
        map_fn: Applies a function to the lanes' tasks; results may come in any order. The default runs them here, one
            after the other.

    Raises:
        BadInput: The strategy is unknown, or there are more lanes than shards.
    """
    if strategy not in STRATEGIES:
        raise BadInput(f"strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    rng = np.random.default_rng([seed, epoch, 0])
    pairs_of_shard = np.bincount(problem.shard[problem.place])
    shards = np.flatnonzero(pairs_of_shard)
    shards = np.roll(shards, rng.integers(max(len(shards), 1)))[:: -1 if epoch % 2 else 1]
    tasks, pairs_of_lane = [], []
    for number, (start, stop) in enumerate(_deal(pairs_of_shard[shards], lanes)):
        part, pairs = problem.part(shards[start:stop]) if lanes > 1 else (problem, None)
        pairs_of_lane.append(pairs)
        its_seed = (seed, epoch, number + 1)
        tasks.append(LaneTask(number, part, shards[start:stop], strategy, batch_size, resident, its_seed))
    by_lane = [made for _, made in sorted(map_fn(assemble_lane, tasks), key=lambda result: result[0])]
    length = min(len(batches) for batches in by_lane)
    interleaved = np.empty((length, lanes, batch_size), dtype=np.int32)
    for number, (made, pairs) in enumerate(zip(by_lane, pairs_of_lane, strict=True)):
        interleaved[:, number] = made[:length] if pairs is None else pairs[made[:length]]
    batches = interleaved.reshape(length * lanes, batch_size)
    used = np.zeros(len(problem.place), dtype=bool)
    used[batches] = True
    lane_of_batch = np.tile(np.arange(lanes, dtype=np.int32), length)
    return Assembled(batches, lane_of_batch, np.flatnonzero(~used).astype(np.int32))


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
                ends, total = [*ends, i], 0
        return ends

    low, high = 1, int(weights.sum()) // lanes  # every shard weighs at least 1, so 1 can be reached
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(cuts(middle)) >= lanes else (low, middle - 1)
    ends = [*cuts(low)[: lanes - 1], len(weights)]
    return list(zip([0, *ends[:-1]], ends, strict=True))
