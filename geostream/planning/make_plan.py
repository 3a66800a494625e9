"""Make the plan of one epoch from layout, neighbour graph and settings, and measure its quality.

This joins the pure parts: it turns places into dense rows for the assembler, into member rows for the schedule, and
into similarities for the hardness score. A strategy's fallbacks are tried from the most varied to the hardest, and the
first that reaches the target is used. Scoring assembles two more plans, and each fallback one more, which takes a few
seconds for VIGOR.

A graph above WHOLE_GRAPH bytes is not held: each lane gets its rows (:mod:`geostream.planning.graph_rows`), the ends
of the scale come from a sample (:mod:`geostream.planning.imitation`), and fallbacks are tried on some lanes only; lanes
that were tried are not assembled again. This process then holds about 110 bytes a pair: half of them are what excludes
each place (8 bytes a place, 4 an entry), the earlier batches and the index. On a cluster it also holds the problems of
the lanes that are under way, 60 bytes a pair of theirs. Whoever assembles a lane holds what that lane needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from geostream.arrays import Int32, Pairs, begins, restrict
from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Layout
from geostream.layout.zarr_groups import Apply
from geostream.mining.embeddings import Embeddings
from geostream.mining.graph import NeighbourGraph
from geostream.planning.batches import (
    DRIFTING,
    FALLBACKS,
    Assembled,
    Key,
    LaneTasks,
    assemble,
    assemble_lanes,
    fill_lanes,
    joined,
)
from geostream.planning.division import Division
from geostream.planning.earlier import batches_of_pairs, overlap
from geostream.planning.graph_rows import rows_of_lanes
from geostream.planning.hardness import PLAN_MARGIN, HardnessScale, hard_enough, measure_of
from geostream.planning.imitation import sampled_scale
from geostream.planning.lane import SamplingProblem
from geostream.planning.plan import EpochPlan
from geostream.planning.reads import reads_of
from geostream.settings import PlanSettings, TrainSettings

TRIED_PAIRS = 2**16  # of the lanes, two at least, on which the fallbacks are tried where the graph is not held
WHOLE_GRAPH = 2**27  # bytes of a graph up to which it is read as a whole: 262,144 places at K = 128


class _Attempt(NamedTuple):
    """Batches made by one of a strategy's fallbacks, and their hardness score."""

    strategy: str
    assembled: Assembled
    score: float | None
    note: str  # why there is no score

    @property
    def rank(self) -> float:
        """The score, by which attempts are compared; an attempt without one is the only attempt."""
        return np.inf if self.score is None else self.score


def make_plan(
    layout: Layout,
    graph: NeighbourGraph | None,
    settings: TrainSettings,
    epoch: int,
    seed: int,
    previous: Iterable[EpochPlan] = (),
    embeddings: Embeddings | None = None,
    map_fn: Apply = map,
) -> EpochPlan:
    """Make the plan of an epoch for the layout's training pairs.

    Args:
        layout: The layout to plan for.
        graph: Neighbours of the training places; None only with strategy "random".
        settings: Batch size, lanes, strategy, target hardness and how to read.
        epoch: Number of the epoch, from 1.
        seed: The same arguments and seed make the same plan on any machine.
        previous: Earlier plans, newest first, of any generation. The strategy avoids their batches, and the overlap is
            measured against the newest. They are taken one at a time before anything large is made, and not kept.
        embeddings: The embeddings that a visual graph came from; without them there is no hardness score.
        map_fn: Applies a function to tasks, as ``map`` does; the results may come in any order.

    Returns:
        The plan. Its ``quality`` holds pairs, batches, left_out, hardness_score, assembly (the fallback used),
        reachable_score (the best score of those tried that do not drift), overlap, resident_share, amplification and
        requests_per_gib. A score that cannot be measured is None, and hardness_note says why.

    Raises:
        BadInput: There are too few pairs for a batch, no batch can be filled, there are more lanes than shards, or the
            strategy needs a graph.
        StaleArtefact: Graph or embeddings are of other places than the layout's.
    """
    pairs = layout.pairs("train")
    if len(pairs) < settings.optim.batch_size * settings.plan.lanes:
        raise BadInput(
            f"layout {layout.name} has {len(pairs)} training pairs, too few for {settings.plan.lanes} lanes with "
            f"batches of {settings.optim.batch_size}; set a smaller batch_size"
        )
    whole = graph is None or graph.n_bytes <= WHOLE_GRAPH
    history = batches_of_pairs(pairs, previous)
    problem = _problem(layout, pairs, graph, settings.plan, whole=whole)
    division = Division(problem._replace(history=history), settings.plan.lanes, seed, epoch)
    size, resident = settings.optim.batch_size, settings.plan.resident_shards
    name = f"{epoch:04d}-{layout.id[:8]}-{len(division)}"
    with nullcontext() if graph is None or whole else rows_of_lanes(graph, division, name, map_fn) as rows:
        tasks = LaneTasks(division, range(len(division)), rows, settings.plan.strategy, size, resident, (seed, epoch))
        if graph is None or whole:
            scale = HardnessScale.of(problem, layout, graph, embeddings, batch_size=size, seed=seed, epoch=epoch)
            tried = _hard_enough(
                _ways(settings.plan.strategy), settings.plan.hardness, partial(_attempt, layout, tasks, scale, map_fn)
            )
            best = max(tried, key=lambda one: one.rank)
        else:
            best, tried = _tried_on_some(tasks, layout, graph, embeddings, settings.plan.hardness, map_fn)
    reachable = max((one for one in tried if one.strategy not in DRIFTING), key=lambda one: one.rank)
    assembled = best.assembled
    place, view = pairs.place[assembled.batches], pairs.view[assembled.batches]
    with ThreadPoolExecutor(1) as beside:  # while the workers schedule the reads
        repeated = beside.submit(overlap, assembled.batches, history[0]) if history else None
        reads = reads_of(layout, place, view, settings, map_fn)
    return EpochPlan(
        layout_id=layout.id,
        epoch=epoch,
        seed=seed,
        strategy=settings.plan.strategy,
        source=graph.kind if graph is not None and settings.plan.strategy != "random" else "random",
        graph=graph.name if graph is not None and settings.plan.strategy != "random" else "",
        lanes=settings.plan.lanes,
        batch_size=settings.optim.batch_size,
        place=place,
        view=view,
        left_out_place=pairs.place[assembled.left_out],
        left_out_view=pairs.view[assembled.left_out],
        quality={
            "pairs": len(pairs),
            "batches": len(assembled.batches),
            "left_out": len(assembled.left_out),
            "hardness_score": best.score,
            "reachable_score": reachable.score,
            "hardness_note": best.note,
            "assembly": best.strategy,
            "overlap": None if repeated is None else repeated.result(),
            "resident_share": reads.resident_share,
            "amplification": reads.amplification,
            "requests_per_gib": reads.requests_per_gib,
        },
    )


def _hard_enough(ways: Sequence[str], wanted: float, attempt: Callable[[str], _Attempt]) -> list[_Attempt]:
    """Try one fallback after the other until one is hard enough.

    Fallbacks that drift are not tried if another one reaches the target, even without the margin.
    """
    tried: list[_Attempt] = []
    for way in ways:
        if way in DRIFTING and any(hard_enough(one.score, wanted) for one in tried):
            break
        tried.append(attempt(way))
        if hard_enough(tried[-1].score, wanted, PLAN_MARGIN):
            break
    return tried


def _attempt(layout: Layout, tasks: LaneTasks, scale: HardnessScale, map_fn: Apply, way: str) -> _Attempt:
    """Assemble by a fallback, and score."""
    tasks = replace(tasks, strategy=way)
    assembled = _complete(layout, tasks, assemble_lanes(tasks, map_fn))
    return _Attempt(way, assembled, *scale.score(assembled))


def _tried_on_some(
    tasks: LaneTasks,
    layout: Layout,
    graph: NeighbourGraph,
    embeddings: Embeddings | None,
    wanted: float,
    map_fn: Apply,
) -> tuple[_Attempt, list[_Attempt]]:
    """Try the fallbacks on some lanes, and assemble all lanes by the best.

    All are assembled before any is scored, so that no worker waits for a score, and vectors are read once for all: they
    cost more.

    Returns:
        The best with its score on all lanes, and all that count as tried, the best among them.
    """
    enough = max(2, -(-TRIED_PAIRS * len(tasks) // len(tasks.division.problem.place)))
    some = tasks[:: max(1, len(tasks) // enough)]
    by_way = {way: replace(some, strategy=way) for way in _ways(tasks.strategy)}
    reference = replace(tasks[:1], strategy="sample4geo", resident=len(tasks.division.shards[0]))
    measure = measure_of(tasks.division.problem, layout, graph, embeddings, map_fn)
    lanes: dict[Key, Int32] = {}
    fill_lanes([*by_way.values(), *([] if isinstance(measure, str) else [reference])], lanes, map_fn)
    made = [_complete(layout, of_way, joined(of_way, lanes)) for of_way in by_way.values()]
    scale, scores = HardnessScale(measure), list[tuple[float | None, str]]()
    if isinstance(measure, str):
        scores = [(None, measure)] * len(made)
    else:
        of_lane = tasks.division.pairs(0)[lanes[reference.task_keys[0]]]
        scale, scores = sampled_scale(tasks, graph, measure, of_lane, made, map_fn)
    found = {way: _Attempt(way, one, *score) for way, one, score in zip(by_way, made, scores, strict=True)}
    tried = _hard_enough(list(by_way), wanted, found.__getitem__)
    way = max(tried, key=lambda one: one.rank).strategy
    of_way = replace(tasks, strategy=way)
    lanes = {key: batches for key, batches in lanes.items() if key[:2] == (way, tasks.resident)}
    fill_lanes([of_way], lanes, map_fn)
    assembled = _complete(layout, of_way, joined(of_way, lanes))
    best = _Attempt(way, assembled, *scale.score(assembled))
    return best, [best if one.strategy == way else one for one in tried]


def _ways(strategy: str) -> Sequence[str]:
    """Return the fallbacks of a strategy, the strategy itself first."""
    return FALLBACKS.get(strategy, (strategy,))


def _complete(layout: Layout, tasks: LaneTasks, assembled: Assembled) -> Assembled:
    """Raise BadInput if there is no batch, or a data set with batches of its own has none; return the batches."""
    if not len(assembled.batches):
        raise BadInput(f"layout {layout.name}: no batch of {tasks.batch_size} places can be filled; set a smaller one")
    problem = tasks.division.problem
    if problem.dataset is not None:
        used = np.isin(np.arange(len(layout.joined)), problem.dataset[problem.place[assembled.batches]])
        if not used.all():
            left_out = ", ".join(one.dataset for one, there in zip(layout.joined, used, strict=True) if not there)
            raise BadInput(
                f"layout {layout.name}: the pairs of {left_out} do not fill a batch of {tasks.batch_size} in each of "
                f"{len(tasks.division)} lanes; set fewer lanes, a smaller batch_size, or mix=mixed"
            )
    return assembled


def reachable_by_shards(
    layout: Layout, graph: NeighbourGraph, embeddings: Embeddings, settings: TrainSettings
) -> Callable[[Int32], float | None]:
    """Return a function that computes the score that plans would reach if the places were in other shards.

    Args:
        layout: The layout whose training pairs are planned.
        graph: A visual neighbour graph of the layout.
        embeddings: The embeddings that the graph came from.
        settings: Batch size, lanes, strategy and resident shards of the plans.

    Returns:
        A function. It takes (N,) the number of a shard for each of ``graph.places``, and returns the score of the
        hardest fallback that does not drift, or None if there is no score.

    Raises:
        StaleArtefact: Graph or embeddings are of other places than the layout's.
    """
    pairs = layout.pairs("train")
    problem = _problem(layout, pairs, graph, settings.plan)
    common: dict[str, Any] = {"batch_size": settings.optim.batch_size, "seed": settings.seed, "epoch": 1}
    scale = HardnessScale.of(problem, layout, graph, embeddings, **common)
    hardest = [name for name in _ways(settings.plan.strategy) if name not in DRIFTING][-1]

    def reachable(shard: Int32) -> float | None:
        if len(pairs) < settings.optim.batch_size * settings.plan.lanes or len(np.unique(shard)) < settings.plan.lanes:
            return None
        plan = assemble(
            problem._replace(shard=shard),
            strategy=hardest,
            lanes=settings.plan.lanes,
            resident=settings.plan.resident_shards,
            **common,
        )
        return scale.score(plan)[0] if len(plan.batches) else None

    return reachable


def _problem(
    layout: Layout, pairs: Pairs, graph: NeighbourGraph | None, plan: PlanSettings, *, whole: bool = True
) -> SamplingProblem:
    """Return the sampling problem, with the training places as rows in the order of their ids.

    Unless ``whole``, no place has neighbours.
    """
    new = begins(pairs.place)  # pairs are sorted by place
    places, place = pairs.place[new], np.cumsum(new, dtype=np.int32)
    place -= np.int32(1)
    neighbours = np.zeros((len(places), 0), dtype=np.int32)
    if graph is not None:
        if graph.places_id != layout.places_id or not np.array_equal(graph.places, places):
            raise StaleArtefact(f"graph {graph.name}: made from other places than those of {layout.name}; mine again")
        neighbours = graph.rows() if whole else neighbours
    elif plan.strategy != "random":
        raise BadInput(f"strategy {plan.strategy} needs a neighbour graph; mine first, or set strategy=random")
    return SamplingProblem(
        place=place,
        shard=layout.shard_of_place if len(places) == layout.n_places else layout.shard_of_place[places],
        neighbours=neighbours,
        excluded=restrict(layout.excluded("train"), places),
        dataset=layout.part[places] if plan.mix == "own" and len(layout.joined) > 1 else None,
    )
