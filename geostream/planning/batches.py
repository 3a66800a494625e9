"""Assemble an epoch's pairs into batches: a strategy fills those of each lane.

A strategy is chosen by name: ``patchwork`` is the one to train with,
``sample4geo`` is the reference of the hardness score (1), ``random`` its zero. Lanes share no shard, so each lane is a
sampling problem of its own (:mod:`geostream.planning.division`), which this process or a Dask worker can solve.

All lanes get the same number of batches. The surplus batches of longer lanes are left out: up to a shard's pairs in
each lane, and almost none if equal shards divide evenly among the lanes.

Where batches are to hold one data set each (``SamplingProblem.dataset``), a strategy fills the batches of each data set
alone, with its share of the resident shards. They are interleaved evenly over the epoch, in all lanes alike: so the
batches of all lanes at a time, which make a step, are of the same data set.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, overload

import numpy as np

from geostream.arrays import Int32, Int64
from geostream.errors import BadInput
from geostream.planning.division import Division, Parts
from geostream.planning.graph_rows import LaneRows
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
        left_out: Ids of the lanes' pairs that no batch holds, sorted.
    """

    batches: Int32
    lane: Int32
    left_out: Int32


Key = tuple[str, int, int]  # strategy, resident shards and lane


class LaneTask(NamedTuple):
    """The task of assembling one lane.

    Attributes:
        number: Number of the lane.
        problem: The sampling problem of the lane's pairs.
        shards: Numbers of the lane's shards, in the order in which they are taken.
        rows: Where the neighbours are on the store; None if ``problem`` has them.
        strategy: Name of the strategy.
        batch_size: Pairs in a batch.
        resident: Number of shards that are resident at once.
        seed: Seed of the lane's random generator.
    """

    number: int
    problem: SamplingProblem
    shards: Int64
    rows: LaneRows | None
    strategy: str
    batch_size: int
    resident: int
    seed: tuple[int, ...]

    @property
    def key(self) -> Key:
        """What tells the task from the others of a plan; tasks with the same key make the same batches."""
        return self.strategy, self.resident, self.number


def make_lane(task: LaneTask) -> tuple[Key, Int32]:
    """Assemble one lane. It holds the lane's neighbours, 4·K bytes a place, and about 1 KB a pair.

    Returns:
        The task's key, and (B, batch size) its batches as pair ids of its own sampling problem. Batches of one data set
        each come data set by data set.
    """
    strategy = STRATEGIES[task.strategy]
    problem = task.problem if task.rows is None else task.problem._replace(neighbours=task.rows.read())

    def filled(problem: SamplingProblem, shards: Int64, resident: int) -> Int32:
        batches = strategy(problem, shards, task.batch_size, resident, np.random.default_rng(task.seed))
        return np.array(batches, dtype=np.int32).reshape(len(batches), task.batch_size)

    if problem.dataset is None:
        return task.key, filled(problem, task.shards, task.resident)
    sets = Parts(problem, problem.dataset, int(problem.dataset.max(initial=0)) + 1)
    resident = max(1, task.resident // len(sets))
    found = [np.zeros((0, task.batch_size), dtype=np.int32)]
    for number in range(len(sets)):
        own = sets.part(number)
        shards = task.shards[np.isin(task.shards, own.shard)]
        if len(shards):
            found.append(sets.pairs(number)[filled(own, shards, resident)])
    return task.key, np.concatenate(found)


MapFn = Callable[[Callable[[LaneTask], tuple[Key, Int32]], Sequence[LaneTask]], Iterable[tuple[Key, Int32]]]


@dataclass(frozen=True)
class LaneTasks(Sequence[LaneTask]):
    """The tasks of all lanes, or of some, each made when it is asked for, so that not all problems need be held.

    Attributes:
        division: The lanes.
        numbers: Numbers of those that are assembled, rising.
        rows: Where each lane's neighbours are on the store; None if the problem has them.
        strategy: Name of the strategy.
        batch_size: Pairs in a batch.
        resident: Number of a lane's shards that are resident at once.
        seed: The run's seed and the number of the epoch.
    """

    division: Division
    numbers: Sequence[int]
    rows: Sequence[LaneRows] | None
    strategy: str
    batch_size: int
    resident: int
    seed: tuple[int, int]

    @property
    def task_keys(self) -> list[Key]:
        """The key of each task."""
        return [(self.strategy, self.resident, number) for number in self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> LaneTask: ...
    @overload
    def __getitem__(self, at: slice) -> LaneTasks: ...
    def __getitem__(self, at: int | slice) -> LaneTask | LaneTasks:
        if isinstance(at, slice):
            return replace(self, numbers=self.numbers[at])
        number = self.numbers[at]
        return LaneTask(
            number,
            self.division.part(number),
            self.division.shards[number],
            None if self.rows is None else self.rows[number],
            self.strategy,
            self.batch_size,
            self.resident,
            (*self.seed, number + 1),
        )


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
    division = Division(problem, lanes, seed, epoch)
    return assemble_lanes(
        LaneTasks(division, range(lanes), None, strategy, batch_size, resident, (seed, epoch)), map_fn
    )


class _LargestFirst(Sequence[LaneTask]):
    """The tasks of several lists that are not done, those with the most pairs first, so that none of them ends late.

    Args:
        several: The lists.
        done: The keys of tasks that are done.
    """

    def __init__(self, several: Iterable[LaneTasks], done: Collection[Key]) -> None:
        todo = [(tasks, at) for tasks in several for at, key in enumerate(tasks.task_keys) if key not in done]
        self._todo = sorted(todo, key=lambda one: -len(one[0].division.pairs(one[0].numbers[one[1]])))

    def __len__(self) -> int:
        return len(self._todo)

    @overload
    def __getitem__(self, at: int) -> LaneTask: ...
    @overload
    def __getitem__(self, at: slice) -> list[LaneTask]: ...
    def __getitem__(self, at: int | slice) -> LaneTask | list[LaneTask]:
        if isinstance(at, slice):
            return [tasks[which] for tasks, which in self._todo[at]]
        tasks, which = self._todo[at]
        return tasks[which]


def fill_lanes(several: Iterable[LaneTasks], made: dict[Key, Int32], map_fn: MapFn = map) -> None:
    """Assemble the lanes of several lists of tasks together, so that workers need not wait for the end of each list.

    Args:
        several: The lists.
        made: The batches of each task, by its key. Tasks in it are not done again; the others are added.
        map_fn: Applies a function to the tasks.
    """
    todo = _LargestFirst(several, made)
    if len(todo):
        made.update(map_fn(make_lane, todo))


def assemble_lanes(tasks: LaneTasks, map_fn: MapFn = map) -> Assembled:
    """Assemble the batches of some lanes, as :func:`assemble` does those of all.

    Args:
        tasks: The lanes' tasks.
        map_fn: Applies a function to the tasks.
    """
    made: dict[Key, Int32] = {}
    fill_lanes([tasks], made, map_fn)
    return joined(tasks, made)


def joined(tasks: LaneTasks, made: Mapping[Key, Int32]) -> Assembled:
    """Put the batches of some lanes into the global order.

    Args:
        tasks: The lanes' tasks.
        made: The batches of each task, by its key.
    """
    division, lanes = tasks.division, len(tasks)
    by_lane = _in_turn(tasks, [made[key] for key in tasks.task_keys])
    length = min(len(batches) for batches in by_lane)
    interleaved = np.empty((length, lanes, tasks.batch_size), dtype=np.int32)
    for at, (number, batches) in enumerate(zip(tasks.numbers, by_lane, strict=True)):
        interleaved[:, at] = division.pairs(number)[batches[:length]]
    in_order = interleaved.reshape(length * lanes, tasks.batch_size)
    unused = np.zeros(len(division.problem.place), dtype=bool)
    for number in tasks.numbers:
        unused[division.pairs(number)] = True
    unused[in_order] = False
    lane_of_batch = np.tile(np.array(tasks.numbers, dtype=np.int32), length)
    return Assembled(in_order, lane_of_batch, np.flatnonzero(unused).astype(np.int32))


def _in_turn(tasks: LaneTasks, by_lane: list[Int32]) -> list[Int32]:
    """Interleave the batches of each lane's data sets evenly, if they have one each; all lanes alike.

    Args:
        tasks: The lanes' tasks.
        by_lane: The batches of each lane, data set by data set, as pair ids of the lane's sampling problem.

    Returns:
        The same in the new order, with as many batches of each data set as the lane has that has the fewest.
    """
    division = tasks.division
    if division.problem.dataset is None:
        return by_lane
    dataset = division.problem.dataset[division.problem.place]
    of_batch = [
        dataset[division.pairs(number)[made[:, 0]]] for number, made in zip(tasks.numbers, by_lane, strict=True)
    ]
    sets = int(dataset.max(initial=0)) + 1
    counts = np.stack([np.bincount(of, minlength=sets) for of in of_batch])
    fewest = counts.min(axis=0)
    starts = np.cumsum(counts, axis=1) - counts
    within = [np.arange(count) for count in fewest]
    when = np.concatenate([(some + 0.5) / max(len(some), 1) for some in within])
    order = np.argsort(when, kind="stable")
    rows = [np.concatenate([start + some for start, some in zip(begin, within, strict=True)]) for begin in starts]
    return [made[some[order]] for made, some in zip(by_lane, rows, strict=True)]
