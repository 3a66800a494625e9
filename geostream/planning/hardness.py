"""Measure how hard a plan's batches are, and say whether that is hard enough.

The hardness of a batch is the mean over its queries of a soft maximum of their similarity to the batch's other
references, which is what InfoNCE at that temperature depends on. The hardness score relates it to random batches (0)
and to Sample4Geo's with random access to everything (1), so that plans from different graphs can be compared.

For a visual graph, similarity is the cosine of the embeddings that the graph came from; for a gps graph it is nearness
on the ground. The two plans at the ends of the scale are assembled once, at 20 µs a pair. Hardness is measured on a
sample of batches, so its cost does not grow with the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Int32, Pairs, distinct
from geostream.errors import StaleArtefact
from geostream.layout import Layout
from geostream.layout.zarr_groups import Apply, pick_by_tasks
from geostream.mining.embeddings import Embeddings
from geostream.mining.gps import place_points
from geostream.mining.graph import NeighbourGraph
from geostream.planning.batches import Assembled, assemble
from geostream.planning.lane import SamplingProblem

Float = npt.NDArray[np.floating[Any]]
#: (b,) pair ids → (b, b) similarity of the query of row i to the reference of column j, at most 1
Similarity = Callable[[Int32], Float]
Measure = Callable[..., list[float]]  # the (B, batch size) pair ids of some plans → the hardness of each

TEMPERATURE = 0.05
SAMPLED_BATCHES = 256
MEASURED_PLACES = 2**18  # up to which the distances of all places to their neighbours are read
SAMPLED_PLACES = 2**12  # about the number whose distances are read where there are more
#: Added to the target when a fallback is chosen, because the score is measured on a sample of batches.
PLAN_MARGIN = 0.03
#: Added to the target when shards are rewritten, because bounds on overlap and later graphs cost 0.03 to 0.07.
RECLUSTER_MARGIN = 0.1


def hard_enough(score: float | None, wanted: float, margin: float = 0.0) -> bool:
    """Return whether a hardness score reaches the target and a margin; no score (None) counts as hard enough.

    Args:
        score: Hardness score of a plan; may be negative.
        wanted: Target hardness, 0 for random batches, 1 for Sample4Geo with random access.
        margin: PLAN_MARGIN, RECLUSTER_MARGIN, or 0 for the plain target.
    """
    return score is None or score >= wanted + margin


class HardnessScale(NamedTuple):
    """The scale on which plans are scored: the hardness of random batches and of Sample4Geo's.

    Attributes:
        measure: Function that measures the hardness of batches, or the reason why it cannot be measured.
        reference: Hardness of Sample4Geo's batches with random access.
        random: Hardness of random batches.
    """

    measure: Measure | str
    reference: float = 0
    random: float = 0

    @classmethod
    def of(
        cls,
        problem: SamplingProblem,
        layout: Layout,
        graph: NeighbourGraph | None,
        embeddings: Embeddings | None,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
    ) -> HardnessScale:
        """Assemble and measure the two plans at the ends of the scale.

        Args:
            problem: The layout's training pairs; the scale is the same whichever shards hold them.
            layout: The layout that the pairs and coordinates come from.
            graph: The neighbour graph of the problem; None if there is none, which gives no score.
            embeddings: The embeddings that a visual graph came from; without them it gives no score.
            batch_size: Pairs in a batch.
            seed: The run's seed.
            epoch: The epoch that is planned.

        Raises:
            StaleArtefact: ``embeddings`` are not those that the graph came from.
        """
        measure = measure_of(problem, layout, graph, embeddings)
        if isinstance(measure, str):
            return cls(measure)
        everything = len(layout.shard_sizes)
        ends = [
            assemble(problem, strategy=end, resident=everything, batch_size=batch_size, seed=seed, epoch=epoch)
            for end in ("sample4geo", "random")
        ]
        if min(len(end.batches) for end in ends) == 0:
            return cls("a plan to compare with has no batches")
        return cls(measure, *measure(*(end.batches for end in ends)))

    def score(self, plan: Assembled) -> tuple[float | None, str]:
        """Return (hardness score, "") of a plan, or (None, why there is none)."""
        if isinstance(self.measure, str):
            return None, self.measure
        [measured] = self.measure(plan.batches)
        return hardness_score(measured, self.reference, self.random)


def hardness_score(plan: float, reference: float, random: float) -> tuple[float | None, str]:
    """Return (hardness score, "") or (None, why there is none) from three hardnesses.

    Args:
        plan: Hardness of the plan to score.
        reference: Hardness of Sample4Geo's batches with random access.
        random: Hardness of random batches.
    """
    if not np.isfinite([plan, reference, random]).all():
        return None, "the similarities are not finite numbers"
    if reference - random < 5e-3:
        return None, "Sample4Geo's batches are no harder than random ones on this graph"
    return (plan - random) / (reference - random), ""


def batch_hardness(batches: Int32, similarity: Similarity) -> float:
    """Return the mean over batches and their queries i of τ·log(mean over j≠i of exp(sᵢⱼ/τ)), τ = 0.05.

    Args:
        batches: (B, batch size) pair ids.
        similarity: Returns the similarities within a batch.
    """
    others = ~np.eye(batches.shape[1], dtype=bool)
    means = [
        np.log(np.exp((similarity(batch) - 1) / TEMPERATURE).mean(axis=1, where=others)).mean() for batch in batches
    ]
    return 1 + TEMPERATURE * float(np.mean(means))  # 1 was subtracted to prevent overflow


def sample(batches: Int32, most: int = SAMPLED_BATCHES) -> Int32:
    """Return at most ``most`` of the batches, the same ones each time."""
    if len(batches) <= most:
        return batches
    return batches[np.sort(np.random.default_rng(0).choice(len(batches), most, replace=False))]


def cosine(query: Float, reference: Float, query_row: Int32, reference_row: Int32) -> Similarity:
    """Return the similarity function of a visual graph: the cosine of the embeddings that it came from.

    Args:
        query: (·, D) L2-normalised.
        reference: (·, D) L2-normalised.
        query_row: (P,) row of each pair in ``query``.
        reference_row: (P,) row of each pair in ``reference``.
    """

    def similarity(pairs: Int32) -> Float:
        product: Float = query[query_row[pairs]] @ reference[reference_row[pairs]].T
        return product

    return similarity


def proximity(points: Float, place: Int32, scale: float, part: Int32) -> Similarity:
    """Return the similarity function of a gps graph, which has no embeddings: exp(-distance / ``scale``).

    Args:
        points: (N, 3) positions of the places in metres; NaN where unknown.
        place: (P,) row of each pair's place.
        scale: Metres. If it is the median distance of the K-th neighbour, a place's K nearest mostly have similarities
            between 0.37 and 1, and places far away 0.
        part: (N,) number of each place's data set. Places of two data sets are far away, and so are unknown ones.
    """

    def similarity(pairs: Int32) -> Float:
        here, of = points[place[pairs]], part[place[pairs]]
        near = np.exp(-np.linalg.norm(here[:, None] - here[None], axis=2) / scale)
        return np.where(of[:, None] == of[None], np.nan_to_num(near, copy=False), 0)

    return similarity


def measure_of(
    problem: SamplingProblem,
    layout: Layout,
    graph: NeighbourGraph | None,
    embeddings: Embeddings | None,
    apply: Apply = map,
) -> Measure | str:
    """Return a function that measures the hardness of batches, or why it cannot be measured.

    Args:
        problem: The layout's training pairs.
        layout: The layout that the pairs and coordinates come from.
        graph: The neighbour graph of the problem; None if there is none.
        embeddings: The embeddings that a visual graph came from.
        apply: Applies a function to tasks, which read vectors.

    Raises:
        StaleArtefact: ``embeddings`` are not those that the graph came from.
    """
    if graph is None:
        return "there is no neighbour graph to measure by"
    if graph.kind == "gps":
        n = len(graph.places)
        scores = graph.scores if n <= MEASURED_PLACES else _some_scores(graph, apply)
        farthest = np.where(np.isfinite(scores), -scores.astype(np.float64), 0).max(axis=1)
        placed = farthest[np.isfinite(scores).any(axis=1)]  # the others are of a data set without coordinates
        scale = float(np.median(placed)) if len(placed) else 0.0
        if scale <= 0:
            return "all places are at the same point, or have no neighbours"
        return lambda *plans: [
            _near_hardness(sample(batches), problem.place, layout, graph, scale) for batches in plans
        ]
    if embeddings is None:
        return "the embeddings that the graph came from were not given"
    if embeddings.name != graph.embeddings:
        raise StaleArtefact(f"graph {graph.name} came from {graph.embeddings}, not from {embeddings.name}; mine again")
    pairs = layout.pairs("train")

    def measure(*plans: Int32) -> list[float]:
        sampled = [sample(batches) for batches in plans]
        needed = distinct(np.concatenate([some.ravel() for some in sampled]))
        similarity = _sampled_cosine(needed, pairs, embeddings, apply)  # their vectors are read once for all
        return [batch_hardness(some, similarity) for some in sampled]

    return measure


def _near_hardness(sampled: Int32, place: Int32, layout: Layout, graph: NeighbourGraph, scale: float) -> float:
    """Return the hardness of ``sampled`` batches by :func:`proximity`; only their places get points."""
    rows = distinct(place[sampled])
    places = graph.places[rows]
    at = np.searchsorted(rows, place[sampled]).astype(np.int32)  # pairs have the numbers of their places here
    return batch_hardness(
        at, proximity(place_points(layout, places), np.arange(len(rows), dtype=np.int32), scale, layout.part[places])
    )


def _some_scores(graph: NeighbourGraph, apply: Apply) -> npt.NDArray[np.float16]:
    """Return the scores of some places, spread evenly over the graph."""
    rows = np.arange(0, len(graph.places), len(graph.places) // SAMPLED_PLACES)
    return pick_by_tasks(graph.run, graph.name, "scores", rows, apply)


def _sampled_cosine(sampled: Int32, pairs: Pairs, embeddings: Embeddings, apply: Apply) -> Similarity:
    """Return the similarity function of the ``sampled`` pairs (sorted ids); only their vectors are read."""
    rows = np.searchsorted(embeddings.reference_place, pairs.place[sampled]).astype(np.int64)
    new = np.diff(rows, prepend=-1) != 0  # pairs are sorted by place
    references, reference_row = rows[new], np.cumsum(new, dtype=np.int32) - np.int32(1)
    query, reference = (
        pick_by_tasks(embeddings.run, embeddings.name, side, some, apply)
        for side, some in (("query", sampled.astype(np.int64)), ("reference", references))
    )
    similarity = cosine(query, reference, np.arange(len(sampled), dtype=np.int32), reference_row)
    return lambda batch: similarity(np.searchsorted(sampled, batch).astype(np.int32))
