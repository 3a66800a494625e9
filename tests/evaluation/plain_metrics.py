"""The metrics in words: one query at a time, exact fractions, sorted lists. Shares no code with what it checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.floating[Any]]
TIE = 1e-9  # relative to the lengths of the vectors that are compared
NOTHING = None  # the similarity of what is no number


def similarity(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> Fraction | None:
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return NOTHING
    return sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(one, other, strict=True)), Fraction())


def ranking(query: npt.NDArray[Any], gallery: Vectors, right: Sequence[int]) -> list[int]:
    """The gallery's rows, best first: wrong ones get the benefit of near ties, and what is no number is before all."""
    scores = [similarity(query, candidate) for candidate in gallery]

    def order(row: int) -> tuple[Fraction, bool]:
        near = Fraction(TIE * length(query) * length(gallery[row]))
        return -((scores[row] or Fraction()) + (-near if row in right else near)), row in right

    unknown_wrong = [row for row in range(len(gallery)) if scores[row] is NOTHING and row not in right]
    unknown_right = [row for row in range(len(gallery)) if scores[row] is NOTHING and row in right]
    known_rows = sorted((row for row in range(len(gallery)) if scores[row] is not NOTHING), key=order)
    return [*unknown_wrong, *known_rows, *unknown_right]


def length(vector: npt.NDArray[Any]) -> float:
    return math.sqrt(sum(float(number) ** 2 for number in vector)) if np.isfinite(vector).all() else 0.0


def wrong_before(query: npt.NDArray[Any], gallery: Vectors, right: Sequence[int], free: Sequence[int]) -> list[Any]:
    """(all, all but ``free``) wrong candidates before each right one, in the order of ``right``; None: never found."""
    found: list[tuple[int, int] | None] = []
    order = ranking(query, gallery, right)
    for one in right:
        if similarity(query, gallery[one]) is NOTHING:
            found.append(None)
            continue
        before = [row for row in order[: order.index(one)] if row not in right]
        found.append((len(before), len([row for row in before if row not in free])))
    return found


def metrics(
    query: Vectors, gallery: Vectors, right: Sequence[Sequence[int]], free: Sequence[Sequence[int]]
) -> dict[str, Fraction]:
    """R@k, hit rate and AP over all queries."""
    tops = {"r1": 1, "r5": 5, "r10": 10, "r1pct": max(1, len(gallery) // 100)}
    total = dict.fromkeys([*tops, "hit_rate", "ap"], Fraction())
    for one, some, harmless in zip(query, right, free, strict=True):
        found = [pair for pair in wrong_before(one, gallery, some, harmless) if pair is not None]
        for name, top in tops.items():
            total[name] += any(before < top for before, _ in found)
        total["hit_rate"] += any(strict == 0 for _, strict in found)
        total["ap"] += average_precision(one, gallery, some)
    return {name: value / len(query) for name, value in total.items()}


def average_precision(query: npt.NDArray[Any], gallery: Vectors, right: Sequence[int]) -> Fraction:
    """As University-1652's script walks down the ranking."""
    area, hits = Fraction(), 0
    precision = Fraction(1)
    for place, row in enumerate(ranking(query, gallery, right)):
        if row in right and similarity(query, gallery[row]) is not NOTHING:
            hits += 1
            area += (precision + Fraction(hits, place + 1)) / 2
        precision = Fraction(hits, place + 1)
    return area / len(right)
