"""Decide from the scores of an answer's candidates whether the answer is sure. Pure functions on arrays.

**Confidence.** The confidence of an answer is the score of its best candidate minus that of the best candidate that
lies elsewhere, more than ``SAME_METRES`` away. Neighbouring tiles overlap and score alike, so two of them do not make
an answer doubtful. docs/notes/locating.md compares this with other measures.

**Threshold.** Queries with a known truth are sorted by confidence. For each of ``SHARES`` shares of them, the most
confident first, the precision is the fraction whose best candidate is right. Its lower bound is the one of Clopper and
Pearson (The use of confidence or fiducial limits, Biometrika 26, 1934) at level FAILURE / len(SHARES), so that by
Bonferroni's inequality all bounds hold together with probability 1 - FAILURE. The threshold is the lowest confidence in
the largest share whose bound reaches the wanted precision. No share reaches 0.9 with fewer than 57 queries.

**What is assumed.** Later photos are like these queries: of the same kind of camera and landscape, taken within the
tiles of the index, and independent of one another. A photo from outside the region has no right answer at all, and
nothing here can say how often such a photo looks sure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv

from geostream.arrays import Bools, Float32, Float64, Int64

SAME_METRES = 50.0  # an answer within so many metres is right, and a candidate within them no other place
SEEN = 50  # candidates that are looked at to find the best one elsewhere
PRECISION = 0.9  # of the answers that are called sure, the wanted fraction that is right
FAILURE = 0.05  # largest probability, over the choice of queries, that the true precision is lower
SHARES = tuple(number / 20 for number in range(1, 21))


@dataclass(frozen=True)
class Calibration:
    """How a threshold was found.

    Attributes:
        threshold: Confidence from which on an answer is sure; None: no answer ever is.
        precision: The wanted precision.
        failure: Largest probability that the precision above the threshold is lower.
        queries: How many queries there were.
        right: Fraction of them whose best candidate is right.
        sure: Fraction of them that is sure.
        curve: For each share of the queries, the most confident first: ``share``, ``confidence`` (the lowest in it),
            ``precision`` and ``lower``, its lower bound.
    """

    threshold: float | None
    precision: float
    failure: float
    queries: int
    right: float
    sure: float
    curve: list[dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Return the attributes as plain values."""
        return asdict(self)


def confidence(scores: Float32, elsewhere: Bools) -> Float32:
    """Return how clearly the best candidate of each answer stands out from those elsewhere.

    Where all candidates are at the best one's place, the last of them stands for the best one elsewhere, which has no
    higher score.

    Args:
        scores: (n, k) similarities of the candidates, best first.
        elsewhere: (n, k) whether each candidate is at another place than the first one.

    Returns:
        (n,) differences of similarities, 0 or more.
    """
    first = np.where(elsewhere.any(axis=1), elsewhere.argmax(axis=1), scores.shape[1] - 1)
    gap: Float32 = scores[:, 0] - scores[np.arange(len(scores)), first]
    return gap


def elsewhere(points: Float64 | None, places: Int64) -> Bools:
    """Return whether each candidate lies more than ``SAME_METRES`` from the first one of its row.

    Args:
        points: (P, d) points of all places in metres. None: no two candidates are at the same place.
        places: (n, k) place ids of the candidates.

    Returns:
        (n, k), false in the first column. A candidate without a position lies elsewhere.
    """
    away = np.ones(places.shape, dtype=bool)
    if points is not None:
        at = points[places]
        away = ~(np.linalg.norm(at - at[:, :1], axis=2) <= SAME_METRES)
    away[:, 0] = False
    return away


def lower_bound(right: int, of: int, failure: float) -> float:
    """Return the lower confidence bound of Clopper and Pearson on a proportion.

    Args:
        right: How many were right.
        of: Out of how many.
        failure: Probability that the true proportion is lower.
    """
    return float(betaincinv(right, of - right + 1, failure)) if right else 0.0


def calibrate(
    confidences: Float32 | Float64, right: Bools, precision: float = PRECISION, failure: float = FAILURE
) -> Calibration:
    """Find the lowest confidence from which on answers are right with the wanted precision.

    Args:
        confidences: (n,) confidence of the answer to each query.
        right: (n,) whether its best candidate is right.
        precision: Wanted fraction of the sure answers that is right.
        failure: Largest probability that it is lower.
    """
    order = np.argsort(-confidences, kind="stable")
    ordered, hits = confidences[order], np.cumsum(right[order])
    curve = []
    threshold, sure = None, 0.0
    for share in SHARES if len(order) else ():
        size = max(1, round(share * len(order)))
        lowest, found = float(ordered[size - 1]), int(hits[size - 1])
        above = int(np.searchsorted(-ordered, -lowest, side="right"))  # equal confidences cannot be told apart
        found, size = int(hits[above - 1]), above
        lower = lower_bound(found, size, failure / len(SHARES))
        curve.append({"share": size / len(order), "confidence": lowest, "precision": found / size, "lower": lower})
        if lower >= precision:
            threshold, sure = lowest, size / len(order)
    fraction = float(right.mean()) if len(order) else 0.0
    return Calibration(threshold, precision, failure, len(order), fraction, sure, curve)
