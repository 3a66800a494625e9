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
from geostream.layout import Layout
from geostream.layout.zarr_groups import Apply, pick_by_tasks
from geostream.mining.embeddings import Embeddings
from geostream.mining.graph import NeighbourGraph
from geostream.planning.batches import Assembled, LaneTasks, assemble_lane
from geostream.planning.hardness import SAMPLED_BATCHES, HardnessScale, hardness_score, measure_of

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
        seeds: (n,) place ids of random places, at least as many as a batch holds.
        neighbours: (n, K) place ids of their neighbours, hardest first, -1 where there are no more.
        views: Number of pairs of each place id; at a time t, all of v are used with the probability t^v.
        shape: Number of batches, and pairs in a batch.
        rng: Generator of all random choices.

    Returns:
        Place ids of the batches.
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
    layout: Layout,
    graph: NeighbourGraph,
    embeddings: Embeddings | None,
    plans: Sequence[Assembled],
    map_fn: Apply = map,
) -> tuple[HardnessScale, list[tuple[float | None, str]]]:
    """Estimate the scale that :meth:`HardnessScale.of` computes, from some thousand places and one lane.

    The vectors for it and for the plans are read together.

    Args:
        tasks: The lanes of a plan.
        layout: The layout that the pairs and coordinates come from.
        graph: The neighbour graph.
        embeddings: The embeddings that a visual graph came from; without them it gives no score.
        plans: Plans to score.
        map_fn: Applies a function to tasks.

    Returns:
        The scale, and for each plan (score, "") or (None, why there is none).

    Raises:
        StaleArtefact: ``embeddings`` are not those that the graph came from.
    """
    problem, size = tasks.division.problem, tasks.batch_size
    measure = measure_of(problem, layout, graph, embeddings, map_fn)
    if isinstance(measure, str):
        return HardnessScale(measure), [(None, measure)] * len(plans)
    n, rng = len(graph.places), np.random.default_rng(0)
    count = imitated_batches(size)
    seeds = np.sort(rng.choice(n, min(n, max(SEEDS, 2 * size)), replace=False))
    ids = pick_by_tasks(graph.run, graph.name, "indices", seeds, map_fn)
    near = np.where(ids >= 0, np.searchsorted(graph.places, ids), -1).astype(np.int32)
    mixed = rng.permutation(len(seeds))  # their ids may follow the ground
    views = np.bincount(problem.place, minlength=n)
    dataset = np.zeros(n, dtype=np.int32) if problem.dataset is None else problem.dataset
    near = np.where(dataset[near] == dataset[seeds][:, None], near, -1)
    of_pair, places, random = dataset[problem.place], list[Int32](), list[Int32]()
    for number in distinct(dataset[seeds]):  # batches are of one data set each, where these are told apart
        here, pairs = mixed[dataset[seeds[mixed]] == number], np.flatnonzero(of_pair == number)
        some = max(1, round(count * len(pairs) / len(of_pair)))
        if min(len(here), len(pairs)) >= size:
            places.append(imitated(seeds[here].astype(np.int32), near[here], views, (some, size), rng))
            random += [rng.choice(pairs, size, replace=False).astype(np.int32) for _ in range(some)]
    first_pair = np.cumsum(views) - views
    everything = len(tasks.division.shards[0])
    [(_, of_lane)] = map_fn(assemble_lane, [tasks[0]._replace(strategy="sample4geo", resident=everything)])
    ends = [first_pair[np.concatenate(places)].astype(np.int32)]
    if len(of_lane):
        ends.append(tasks.division.pairs(0)[of_lane])
    of_random, *measured = measure(np.stack(random), *ends, *(plan.batches for plan in plans))
    reference = max(measured[: len(ends)])
    scores = [hardness_score(one, reference, of_random) for one in measured[len(ends) :]]
    return HardnessScale(measure, reference, of_random), scores
