"""Assembly: which unused pairs share a batch. Pure functions on arrays; whoever makes a plan calls :func:`assemble`.

Decides how shards are dealt to lanes, and nothing of what a batch holds: that is a strategy's, chosen by name.
``patchwork`` is the one to train with, ``sample4geo`` the reference of the hardness score, ``random`` its zero. The
lanes share no shard, so each is a problem of its own, which a Dask worker can solve as well as this process. They have
equally many batches: whole batches of the longer ones are left out, up to a shard's worth of pairs a lane, next to
nothing where equal shards divide evenly among the lanes. Shards are walked in their order on disk, where neighbours are
neighbours, from a random one on and back every other epoch, so that other pairs of shards are together last.
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
#: What a strategy gives way to where its batches are too easy; itself first.
FALLBACKS = {"patchwork": tuple(MIXES)}
#: Ways by which what a network sees drifts along the order of the shards.
DRIFTING = frozenset(name for name, mix in MIXES.items() if mix.tracks is not None)


class Assembled(NamedTuple):
    """Batches in global order: step s is batch s // lanes of lane s % lanes."""

    batches: Int32  # (B, batch size) pair ids
    lane: Int32  # (B,)
    left_out: Int32  # pair ids, sorted


class LaneTask(NamedTuple):
    """A lane to be put together, by whoever is asked."""

    number: int
    problem: SamplingProblem
    shards: Int64  # in the order of the walk
    strategy: str
    batch_size: int
    resident: int
    seed: tuple[int, ...]


def assemble_lane(task: LaneTask) -> tuple[int, Int32]:
    """(number of the lane, (B, batch size) its batches as pair ids of its problem)."""
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
    """Batches of one epoch: each pair at most once, no place and no excluded places twice in a batch, all full.

    ``resident`` is W, in shards of a lane. ``map_fn``: how the lanes' tasks are done, results in any order; here,
    one after the other, if not said otherwise. The same arguments give the same batches on any machine.
    Raises BadInput for an unknown strategy, and for more lanes than there are shards.
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
