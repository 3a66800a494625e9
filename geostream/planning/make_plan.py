"""Planning: layout, neighbour graph and settings become the plan of one epoch, with its quality measured.

The glue between the pure parts: places as dense rows for the assembler, member rows for the schedule, similarities for
the quality. Decides how much of the hardness that a layout allows is given for variety: of a strategy's ways the one
that mixes most and is still hard enough. Measuring assembles two more plans (the reference and the
random one), and each way that is too easy one more: a few seconds for VIGOR. Similarities are computed for a sample of
batches only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from geostream.arrays import Int32, Int64, Pairs, pair_codes, restrict
from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Layout
from geostream.layout.members import MemberTable
from geostream.mining.embeddings import Embeddings
from geostream.mining.graph import NeighbourGraph
from geostream.planning import quality
from geostream.planning.batches import DRIFTING, HARDER, Assembled, CarryOut, assemble
from geostream.planning.lane import Problem
from geostream.planning.plan import EpochPlan
from geostream.planning.schedule import schedule
from geostream.planning.scoring import Scale
from geostream.settings import TrainSettings

MARGIN = 0.03  # above the hardness that is wanted: the score is that of a sample


def make_plan(
    layout: Layout,
    graph: NeighbourGraph | None,
    settings: TrainSettings,
    epoch: int,
    seed: int,
    previous: Sequence[EpochPlan] = (),
    embeddings: Embeddings | None = None,
    carry_out: CarryOut = map,
) -> EpochPlan:
    """The plan of ``epoch`` for the layout's training pairs.

    ``graph`` may be None with strategy "random" only. ``previous``: the plans of the epochs before, newest first, of
    any generation: what the strategy is not to repeat, and the overlap is measured by. ``embeddings``: those
    that a visual graph came from; without them a visual plan has no hardness score. ``carry_out``: how the lanes are
    put together (:func:`assemble`). ``quality`` holds pairs, batches, left_out, hardness_score, assembly (which of the
    strategy's ways it is), reachable_score (the best of ways that do not drift), overlap, resident_share, amplification
    and requests_per_gib; where a score cannot be had it is None, and hardness_note says why.
    """
    pairs = layout.pairs("train")
    if len(pairs) < settings.optim.batch_size * settings.plan.lanes:
        raise BadInput(
            f"layout {layout.name} has {len(pairs)} training pairs, too few for {settings.plan.lanes} lanes with "
            f"batches of {settings.optim.batch_size}; set a smaller batch_size"
        )
    problem = _problem(layout, pairs, graph, settings.plan.strategy)
    common: dict[str, Any] = {"batch_size": settings.optim.batch_size, "seed": seed, "epoch": epoch}
    scale = Scale.of(problem, layout, graph, embeddings, **common)
    history = tuple(_batch_of_pair(pairs, plan) for plan in previous)
    tried: list[tuple[float, str, Assembled, str]] = []
    for name in HARDER.get(settings.plan.strategy, (settings.plan.strategy,)):
        if name in DRIFTING and max(one[0] for one in tried) >= settings.plan.hardness:
            break  # hard enough, if not by the margin
        assembled = assemble(
            problem._replace(history=history),
            strategy=name,
            lanes=settings.plan.lanes,
            resident=settings.plan.resident_shards,
            carry_out=carry_out,
            **common,
        )
        if not len(assembled.batches):
            raise BadInput(
                f"layout {layout.name}: no batch of {settings.optim.batch_size} places can be filled; set a smaller one"
            )
        score, note = scale.score(assembled)
        tried.append((np.inf if score is None else score, name, assembled, note))
        if score is None or score >= settings.plan.hardness + MARGIN:
            break
    best, assembly, assembled, note = max(tried, key=lambda one: one[0])
    score = best if np.isfinite(best) else None
    reachable = max(one[0] for one in tried if one[1] not in DRIFTING)
    place, view = pairs.place[assembled.batches], pairs.view[assembled.batches]
    members = MemberTable.of(layout)
    reads = schedule(
        list(_members(layout, place, view)),
        members.extents,
        members.shard_sizes,
        look_ahead=settings.read.look_ahead * settings.plan.lanes,
        prefetch=0,  # what the plan needs, not what a reader holds to be quick
        budget_bytes=int(layout.shard_sizes.sum()),
        gap_bytes=settings.read.gap_kib * 2**10,
    )
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
            "hardness_score": score,
            "reachable_score": reachable if np.isfinite(reachable) else None,
            "hardness_note": note,
            "assembly": assembly,
            "overlap": quality.overlap(assembled.batches, history[0]) if history else None,
            "resident_share": reads.resident_share,
            "amplification": reads.amplification,
            "requests_per_gib": reads.requests_per_gib,
        },
    )


def reachable_by_shards(
    layout: Layout, graph: NeighbourGraph, embeddings: Embeddings, settings: TrainSettings
) -> Callable[[Int32], float | None]:
    """A function that says which score plans could reach were the graph's places in other shards, not drifting.

    It takes the number of a shard for each of ``graph.places``. None: there is no score.
    """
    pairs = layout.pairs("train")
    problem = _problem(layout, pairs, graph, settings.plan.strategy)
    common: dict[str, Any] = {"batch_size": settings.optim.batch_size, "seed": settings.seed, "epoch": 1}
    scale = Scale.of(problem, layout, graph, embeddings, **common)
    ways = HARDER.get(settings.plan.strategy, (settings.plan.strategy,))
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


def _problem(layout: Layout, pairs: Pairs, graph: NeighbourGraph | None, strategy: str) -> Problem:
    """What the assembler needs, with the training places as rows in the order of their ids."""
    places, place = np.unique(pairs.place, return_inverse=True)
    neighbours = np.zeros((len(places), 0), dtype=np.int32)
    if graph is not None:
        if graph.places_id != layout.places_id or not np.array_equal(graph.places, places):
            raise StaleArtefact(f"graph {graph.name}: made from other places than those of {layout.name}; mine again")
        neighbours = graph.rows()
    elif strategy != "random":
        raise BadInput(f"strategy {strategy} needs a neighbour graph; mine first, or set strategy=random")
    return Problem(
        place=place.astype(np.int32),
        shard=layout.shard_of_place[places],
        neighbours=neighbours,
        excluded=restrict(layout.excluded("train"), places),
    )


def _members(layout: Layout, place: Int32, view: npt.NDArray[np.int16]) -> Int64:
    """(B, 2 · batch size) member rows that each batch needs: its tiles and its views."""
    tiles = layout.member_rows(place.ravel()).reshape(place.shape)
    views = layout.member_rows(place.ravel(), view.ravel()).reshape(place.shape)
    return np.concatenate([tiles, views], axis=1)


def _batch_of_pair(pairs: Pairs, plan: EpochPlan) -> Int32:
    """(P,) number of the batch that held each pair in a plan, -1 where none did; place ids are those of any layout."""
    code = pair_codes(*pairs)
    before = pair_codes(plan.place, plan.view).ravel()
    row = np.minimum(np.searchsorted(code, before), len(code) - 1)
    known = code[row] == before
    batch = np.full(len(code), -1, dtype=np.int32)
    batch[row[known]] = np.repeat(np.arange(plan.n_batches, dtype=np.int32), plan.batch_size)[known]
    return batch
