"""How hard a plan's batches are, and how unlike the epoch before: the figures that every plan carries.

The hardness of a batch is the mean over its queries of a soft maximum of their similarity to the batch's other
references: what InfoNCE at that temperature sees of them. The score puts it between random batches (0) and
Sample4Geo's with random access to everything (1), so that plans from different graphs can be compared. Similarities are
computed batch by batch, for a sample of the batches where there are many: the cost does not grow with the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from geostream.arrays import Int32

Float = npt.NDArray[np.floating[Any]]
#: pair ids (b,) → (b, b) similarity of the query of row i to the reference of column j, at most 1
Similarity = Callable[[Int32], Float]

TEMPERATURE = 0.05
SAMPLED_BATCHES = 256


def sample(batches: Int32, most: int = SAMPLED_BATCHES) -> Int32:
    """At most ``most`` of the batches, the same ones each time."""
    if len(batches) <= most:
        return batches
    return batches[np.sort(np.random.default_rng(0).choice(len(batches), most, replace=False))]


def hardness(batches: Int32, similarity: Similarity) -> float:
    """Mean over batches and their queries i of τ·log(mean over j≠i of exp(sᵢⱼ/τ)), τ = 0.05.

    ``batches``: (B, batch size) pair ids.
    """
    others = ~np.eye(batches.shape[1], dtype=bool)
    means = [
        np.log(np.exp((similarity(batch) - 1) / TEMPERATURE).mean(axis=1, where=others)).mean() for batch in batches
    ]
    return 1 + TEMPERATURE * float(np.mean(means))  # 1 was taken off against overflow


def score(plan: float, reference: float, random: float) -> tuple[float | None, str]:
    """(hardness score, "") or (None, why there is none), from the three hardnesses."""
    if not np.isfinite([plan, reference, random]).all():
        return None, "the similarities are not finite numbers"
    if reference - random < 5e-3:
        return None, "Sample4Geo's batches are no harder than random ones on this graph"
    return (plan - random) / (reference - random), ""


def overlap(batches: Int32, previous: Int32) -> float:
    """Mean over batches of the largest share of one that came from a single batch of the previous plan.

    ``previous``: (P,) number of each pair's batch then, -1 where it was left out.
    """
    before = np.sort(previous[batches].astype(np.int64), axis=1)
    size = before.shape[1]
    # Runs of equal numbers, counted over all rows at once: a row's numbers are moved apart from the next row's.
    spread = (before + 1 + np.arange(len(before))[:, None] * (int(previous.max(initial=0)) + 2)).ravel()
    numbers, counts = np.unique(spread, return_counts=True)
    rows = np.searchsorted(spread, numbers) // size
    counts[before.ravel()[np.searchsorted(spread, numbers)] < 0] = 0  # left out then: from no batch at all
    largest = np.zeros(len(before))
    np.maximum.at(largest, rows, counts)
    return float(np.mean(largest / size))


def cosine(query: Float, reference: Float, query_row: Int32, reference_row: Int32) -> Similarity:
    """Similarity of a visual graph: cosine of the embeddings it came from.

    ``query`` (·, D) and ``reference`` (·, D), L2-normalised; (P,) rows of them that each pair has.
    """

    def similarity(pairs: Int32) -> Float:
        product: Float = query[query_row[pairs]] @ reference[reference_row[pairs]].T
        return product

    return similarity


def proximity(points: Float, place: Int32, scale: float) -> Similarity:
    """Similarity of a gps graph, which has no embeddings: exp(-distance / ``scale``).

    ``points`` (N, 2 or 3) places in metres, ``place`` (P,) row of each pair's. With ``scale`` the median distance of
    the K-th neighbour, a graph's K nearest lie between 0.37 and 1 and everything far away at 0.
    """

    def similarity(pairs: Int32) -> Float:
        here = points[place[pairs]]
        near: Float = np.exp(-np.linalg.norm(here[:, None] - here[None], axis=2) / scale)
        return near

    return similarity
