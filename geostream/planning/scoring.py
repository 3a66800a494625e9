"""What plans are scored by: the hardness of two others on the same graph, random access to everything and chance.

Decides which similarity counts: that of the embeddings which a visual graph came from, or nearness for a gps graph. The
two plans are assembled once, 20 µs a pair, and any number of others measured by them; similarities are computed for a
sample of batches only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from geostream.arrays import Int32, Pairs
from geostream.errors import StaleArtefact
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings, pick_rows
from geostream.mining.gps import points_in_metres
from geostream.mining.graph import NeighbourGraph
from geostream.planning import quality
from geostream.planning.batches import Assembled, assemble
from geostream.planning.lane import Problem

Measure = Callable[[Int32], float]  # (B, batch size) pair ids → hardness


class Scale(NamedTuple):
    """What plans are scored by; or why there is no score."""

    measure: Measure | str
    reference: float = 0
    random: float = 0

    @classmethod
    def of(
        cls,
        problem: Problem,
        layout: Layout,
        graph: NeighbourGraph | None,
        embeddings: Embeddings | None,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
    ) -> Scale:
        """Of plans for the layout's training pairs, ``problem``; the same whichever shards hold them.

        ``embeddings``: those that a visual graph came from; without them it has no score. Raises StaleArtefact for
        others.
        """
        measure = _measure(problem, layout, graph, embeddings)
        if isinstance(measure, str):
            return cls(measure)
        everything = len(layout.shard_sizes)
        ends = [
            assemble(problem, strategy=end, resident=everything, batch_size=batch_size, seed=seed, epoch=epoch)
            for end in ("sample4geo", "random")
        ]
        if min(len(end.batches) for end in ends) == 0:
            return cls("a plan to compare with has no batches")
        return cls(measure, *(measure(end.batches) for end in ends))

    def score(self, plan: Assembled) -> tuple[float | None, str]:
        """(hardness score, why there is none)."""
        if isinstance(self.measure, str):
            return None, self.measure
        return quality.score(self.measure(plan.batches), self.reference, self.random)


def _measure(
    problem: Problem, layout: Layout, graph: NeighbourGraph | None, embeddings: Embeddings | None
) -> Measure | str:
    """How hardness is measured, or why it cannot be."""
    if graph is None:
        return "there is no neighbour graph to measure by"
    if graph.kind == "gps":
        farthest = np.where(np.isfinite(graph.scores), -graph.scores.astype(np.float64), 0).max(axis=1)
        scale = float(np.median(farthest))
        if scale <= 0:
            return "all places are at the same point, or have no neighbours"
        points = points_in_metres(layout.position[graph.places], layout.coordinates)
        near = quality.proximity(points, problem.place, scale)
        return lambda batches: quality.hardness(quality.sample(batches), near)
    if embeddings is None:
        return "the embeddings that the graph came from were not given"
    if embeddings.name != graph.embeddings:
        raise StaleArtefact(f"graph {graph.name} came from {graph.embeddings}, not from {embeddings.name}; mine again")
    pairs = layout.pairs("train")

    def measure(batches: Int32) -> float:
        some = quality.sample(batches)
        return quality.hardness(some, _sampled_cosine(np.unique(some), pairs, embeddings))

    return measure


def _sampled_cosine(sampled: Int32, pairs: Pairs, embeddings: Embeddings) -> quality.Similarity:
    """Similarity of the ``sampled`` pairs (sorted pair ids): only their vectors are read."""
    rows = np.searchsorted(embeddings.reference_place, pairs.place[sampled]).astype(np.int64)
    references, reference_row = np.unique(rows, return_inverse=True)
    query = pick_rows(embeddings.query, sampled.astype(np.int64))
    reference = pick_rows(embeddings.reference, references)
    at = np.zeros((2, len(pairs)), dtype=np.int32)
    at[0, sampled], at[1, sampled] = np.arange(len(sampled)), reference_row
    return quality.cosine(query, reference, at[0], at[1])
