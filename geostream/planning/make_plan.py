"""Make the plan of one epoch from layout, neighbour graph and settings, and measure its quality.

This joins the pure parts: it turns places into dense rows for the assembler, into member rows for the schedule, and
into similarities for the hardness score. A strategy's fallbacks are tried from the most varied to the hardest, and the
first that reaches the target is used. Scoring assembles two more plans, and each fallback one more, which takes a few
seconds for VIGOR.

A graph above WHOLE_GRAPH bytes is not held: each lane gets its rows (:mod:`geostream.planning.graph_rows`), the ends
of the scale come from a sample (:mod:`geostream.planning.imitation`), and fallbacks are tried on some lanes only.
This process then holds about 100 bytes a pair, and whoever assembles a lane what that lane needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from geostream.arrays import Int32, Pairs, pair_codes, restrict
from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Layout
from geostream.layout.zarr_groups import Apply
from geostream.mining.embeddings import Embeddings
from geostream.mining.graph import NeighbourGraph
from geostream.planning.batches import DRIFTING, FALLBACKS, Assembled, LaneTasks, assemble, assemble_lanes
from geostream.planning.division import Division
from geostream.planning.graph_rows import rows_of_lanes
from geostream.planning.hardness import PLAN_MARGIN, HardnessScale, hard_enough
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
    previous: Sequence[EpochPlan] = (),
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
            measured against the newest.
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
    problem = _problem(layout, pairs, graph, settings.plan, whole=whole)
    history = tuple(_batch_of_pair(pairs, plan) for plan in previous)
    division = Division(problem._replace(history=history), settings.plan.lanes, seed, epoch)
    size, resident = settings.optim.batch_size, settings.plan.resident_shards
    name = f"{epoch:04d}-{layout.id[:8]}-{len(division)}"
    with nullcontext() if graph is None or whole else rows_of_lanes(graph, division, name, map_fn) as rows:
        tasks = LaneTasks(division, range(len(division)), rows, settings.plan.strategy, size, resident, (seed, epoch))
        ways = FALLBACKS.get(settings.plan.strategy, (settings.plan.strategy,))
        if graph is None or whole:
            scale = HardnessScale.of(problem, layout, graph, embeddings, batch_size=size, seed=seed, epoch=epoch)
            tried = _hard_enough(ways, settings.plan.hardness, partial(_attempt, layout, tasks, scale, map_fn))
            best = max(tried, key=lambda one: one.rank)
        else:
            enough = max(2, -(-TRIED_PAIRS * len(tasks) // len(pairs)))
            some = tasks[:: max(1, len(tasks) // enough)]
            # All are assembled before any is scored, because vectors are then read once for all: they cost more.
            made = [_assembled(layout, some, way, map_fn) for way in ways]
            scale, scores = sampled_scale(tasks, layout, graph, embeddings, made, map_fn)
            found = {way: _Attempt(way, one, *score) for way, one, score in zip(ways, made, scores, strict=True)}
            tried = _hard_enough(ways, settings.plan.hardness, found.__getitem__)
            best = _attempt(layout, tasks, scale, map_fn, max(tried, key=lambda one: one.rank).strategy)
            tried = [best if one.strategy == best.strategy else one for one in tried]
    reachable = max((one for one in tried if one.strategy not in DRIFTING), key=lambda one: one.rank)
    assembled = best.assembled
    place, view = pairs.place[assembled.batches], pairs.view[assembled.batches]
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
            "overlap": overlap(assembled.batches, history[0]) if history else None,
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
    assembled = _assembled(layout, tasks, way, map_fn)
    return _Attempt(way, assembled, *scale.score(assembled))


def _assembled(layout: Layout, tasks: LaneTasks, way: str, map_fn: Apply) -> Assembled:
    """Assemble by a fallback; raise BadInput if there is no batch, or a data set with batches of its own has none."""
    assembled = assemble_lanes(replace(tasks, strategy=way), map_fn)
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
    ways = FALLBACKS.get(settings.plan.strategy, (settings.plan.strategy,))
    hardest = [name for name in ways if name not in DRIFTING][-1]

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
    new = np.diff(pairs.place, prepend=-1) != 0  # pairs are sorted by place
    places, place = pairs.place[new], np.cumsum(new, dtype=np.int32) - np.int32(1)
    neighbours = np.zeros((len(places), 0), dtype=np.int32)
    if graph is not None:
        if graph.places_id != layout.places_id or not np.array_equal(graph.places, places):
            raise StaleArtefact(f"graph {graph.name}: made from other places than those of {layout.name}; mine again")
        neighbours = graph.rows() if whole else neighbours
    elif plan.strategy != "random":
        raise BadInput(f"strategy {plan.strategy} needs a neighbour graph; mine first, or set strategy=random")
    return SamplingProblem(
        place=place,
        shard=layout.shard_of_place[places],
        neighbours=neighbours,
        excluded=restrict(layout.excluded("train"), places),
        dataset=layout.part[places] if plan.mix == "own" and len(layout.joined) > 1 else None,
    )


def _batch_of_pair(pairs: Pairs, plan: EpochPlan) -> Int32:
    """Return (P,) the number of the batch that held each pair in a plan, -1 if none did.

    The plan may be of any layout: place ids are the same in all generations.
    """
    code = pair_codes(*pairs)
    before = pair_codes(plan.place, plan.view).ravel()
    row = np.minimum(np.searchsorted(code, before), len(code) - 1)
    known = code[row] == before
    batch = np.full(len(code), -1, dtype=np.int32)
    batch[row[known]] = np.repeat(np.arange(plan.n_batches, dtype=np.int32), plan.batch_size)[known]
    return batch


def overlap(batches: Int32, previous: Int32) -> float:
    """Return how much a plan repeats the previous one.

    This is the mean over batches of the largest share of a batch that was in a single batch of the previous plan.

    Args:
        batches: (B, batch size) pair ids.
        previous: (P,) number of each pair's batch in the previous plan, -1 where it was left out.
    """
    before = np.sort(previous[batches].astype(np.int64), axis=1)
    size = before.shape[1]
    # Count equal numbers in all rows at once: each row's numbers are shifted, so that no two rows share one.
    spread = (before + 1 + np.arange(len(before))[:, None] * (int(previous.max(initial=0)) + 2)).ravel()
    numbers, counts = np.unique(spread, return_counts=True)
    rows = np.searchsorted(spread, numbers) // size
    counts[before.ravel()[np.searchsorted(spread, numbers)] < 0] = 0  # pairs that the previous plan left out
    largest = np.zeros(len(before))
    np.maximum.at(largest, rows, counts)
    return float(np.mean(largest / size))
