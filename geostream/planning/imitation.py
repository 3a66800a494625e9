"""Estimate the hardness of Sample4Geo's batches where assembling them would need the whole neighbour graph in memory.

With random access to everything, Sample4Geo fills a batch with a place, a quarter of it with the place's hardest unused
neighbours and another with some of the others, and goes on with the next place. To imitate batches at times all over an
epoch, the neighbours of some thousand random places suffice. At a time t of the epoch a neighbour is already used with
the probability t. That passes over that alike places are used up together. At 160,000 places it is off by 1 to 4 % of
the scale (docs/notes/planning.md), and the more places, the less.

One lane is assembled by Sample4Geo's method as well. It lacks neighbours, but uses up alike places as the real one
does. The harder of the two counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np

from geostream.arrays import Int32, Int64, distinct
from geostream.layout.zarr_groups import Apply, pick_by_tasks
from geostream.mining.graph import NeighbourGraph
from geostream.planning.batches import Assembled, LaneTasks
from geostream.planning.hardness import SAMPLED_BATCHES, HardnessScale, Measure, hardness_score
from geostream.planning.lane import SamplingProblem

SEEDS = 4096  # places whose neighbours are known
IMITATED = 2**15  # about the most pairs of imitated batches


def imitated_batches(size: int) -> int:
    """Return how many batches of ``size`` pairs are imitated."""
    return int(np.clip(IMITATED // size, 8, SAMPLED_BATCHES))


def imitated(
    seeds: Int32, neighbours: Int32, views: Int32 | Int64, shape: tuple[int, int], rng: np.random.Generator
) -> Int32:
    """Imitate the batches that Sample4Geo makes with random access to all places, at times all over an epoch.

    Args:
        seeds: (n,) numbers of random places, at least as many as a batch holds.
        neighbours: (n, K) numbers of their neighbours, hardest first, -1 where there are no more.
        views: Number of pairs of each place that is named; at a time t, all of v are used with the probability t^v.
        shape: Number of batches, and pairs in a batch.
        rng: Generator of all random choices.

    Returns:
        The places of the batches.
    """
    count, size = shape
    quarter, numbers = size // 4, cycle(range(len(seeds)))
    batches = np.empty(shape, dtype=np.int32)
    for number in range(count):
        time = (number + 0.5) / count
        batch: dict[int, None] = {}  # in order
        while len(batch) < size:
            at = next(numbers)
            row = neighbours[at]
            drawn = row[quarter:][rng.permutation(max(len(row) - quarter, 0))[:quarter]]
            near = np.concatenate([row[:quarter], drawn])
            near = near[near >= 0]
            free = rng.random(len(near)) >= time ** views[near]
            batch.update(dict.fromkeys([int(seeds[at]), *near[free].tolist()]))
        batches[number] = list(batch)[:size]
    return batches


def sampled_scale(
    tasks: LaneTasks,
    graph: NeighbourGraph,
    measure: Measure,
    of_lane: Int32,
    plans: Sequence[Assembled],
    map_fn: Apply = map,
) -> tuple[HardnessScale, list[tuple[float | None, str]]]:
    """Estimate the scale that :meth:`HardnessScale.of` computes, from some thousand places and one lane.

    The vectors for it and for the plans are read together.

    Args:
        tasks: The lanes of a plan.
        graph: The neighbour graph.
        measure: Function that measures the hardness of batches (:func:`~geostream.planning.hardness.measure_of`).
        of_lane: (B, batch size) batches of one lane by Sample4Geo's method with random access to the lane, as pair ids.
        plans: Plans to score.
        map_fn: Applies a function to tasks.

    Returns:
        The scale, and for each plan (score, "") or (None, why there is none).
    """
    problem, size = tasks.division.problem, tasks.batch_size
    n, rng = len(graph.places), np.random.default_rng(0)
    count = imitated_batches(size)
    seeds = np.sort(rng.choice(n, min(n, max(SEEDS, 2 * size)), replace=False))
    ids = pick_by_tasks(graph.run, graph.name, "indices", seeds, map_fn)
    near = np.where(ids >= 0, np.searchsorted(graph.places, ids), -1).astype(np.int32)
    mixed = rng.permutation(len(seeds))  # their ids may follow the ground
    known = distinct(np.concatenate([seeds.astype(np.int32), near[near >= 0]]))  # the others have no numbers below
    first, end = (np.searchsorted(problem.place, known, side) for side in ("left", "right"))
    dataset = np.zeros(len(known), dtype=np.int32) if problem.dataset is None else problem.dataset[known]
    seed, near = np.searchsorted(known, seeds).astype(np.int32), _numbers(known, near)
    near = np.where(dataset[near] == dataset[seed][:, None], near, -1)
    places, random = list[Int32](), list[Int32]()
    for number in distinct(dataset[seed]).tolist():  # batches are of one data set each, where these are told apart
        here, pairs = mixed[dataset[seed[mixed]] == number], _pairs_of(problem, number)
        total = pairs if isinstance(pairs, int) else len(pairs)
        some = max(1, round(count * total / len(problem.place)))
        if min(len(here), total) >= size:
            places.append(imitated(seed[here], near[here], end - first, (some, size), rng))
            random += [rng.choice(pairs, size, replace=False).astype(np.int32) for _ in range(some)]
    ends = [first[np.concatenate(places)].astype(np.int32)]
    if len(of_lane):
        ends.append(of_lane)
    of_random, *measured = measure(np.stack(random), *ends, *(plan.batches for plan in plans))
    reference = max(measured[: len(ends)])
    scores = [hardness_score(one, reference, of_random) for one in measured[len(ends) :]]
    return HardnessScale(measure, reference, of_random), scores


def _numbers(known: Int32, rows: Int32) -> Int32:
    """Return the position of each row in ``known``; -1 stays."""
    return np.where(rows >= 0, np.searchsorted(known, rows), -1).astype(np.int32)


def _pairs_of(problem: SamplingProblem, dataset: int) -> int | Int64:
    """Return the ids of a data set's pairs, or how many pairs there are if there is one data set."""
    if problem.dataset is None:
        return len(problem.place)
    return np.flatnonzero(problem.dataset[problem.place] == dataset)
