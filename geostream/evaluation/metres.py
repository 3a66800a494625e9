"""Measure retrieval on the ground: recall within some metres, and the median error. Pure functions on arrays.

The place of an answer is its tile's centre. R@k within d metres is the fraction of queries for which one of the first k
tiles lies within d metres of where the query was taken, the limit included. The median error is that of the first tile.
With overlapping tiles these figures say more than R@1 does, which counts a neighbouring tile as wrong as any other.

Unlike the ranks of :mod:`geostream.evaluation.ranks`, equal similarities do not count against the model: they are
ordered by place.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Float64

DEPTHS = (1, 5, 10)
WITHIN = (25, 50, 100)  # metres
MEDIAN = "median_metres"


def recall_name(depth: int, metres: int) -> str:
    """Return the name of a figure, such as "r1_within_25m"."""
    return f"r{depth}_within_{metres}m"


def distances(queries: Float64, tiles: Float64) -> Float64:
    """Return the distance of each query from each of its tiles.

    Args:
        queries: (n, d) points in metres.
        tiles: (n, k, d) points of the tiles found; NaN where the position is unknown.

    Returns:
        (n, k) metres, infinite where unknown.
    """
    metres: Float64 = np.linalg.norm(tiles - queries[:, None], axis=2)
    return np.where(np.isnan(metres), np.inf, metres)


def metre_figures(metres: Float64) -> dict[str, float]:
    """Return the figures of queries whose position is known.

    Args:
        metres: (n, k) distance of the tiles found, best first; n at least 1.

    Returns:
        ``r1_within_25m`` and so on, from 0 to 1, and ``median_metres``.
    """
    found = {
        recall_name(depth, limit): float((metres[:, :depth] <= limit).any(axis=1).mean())
        for depth in DEPTHS
        for limit in WITHIN
    }
    return found | {MEDIAN: float(np.median(metres[:, 0]))}
