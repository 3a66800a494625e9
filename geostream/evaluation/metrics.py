"""The field's metrics from what stands before the right answers of each query.

Decides that all of them follow from one number a right answer: how many wrong candidates stand before it. A query is
found at rank k where fewer than k do so before its best right answer. R@1%: k is a hundredth of the gallery, rounded
down, but at least 1; University-1652's script looks it up one rank further than its other recalls, which is not
followed.

Sources: the hit rate of VIGOR (Zhu et al., CVPR 2021, section 5); the average precision of ``evaluate_gpu.py`` of
University-1652 (Zheng et al., ACM MM 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from geostream.arrays import Float64, Int64
from geostream.evaluation.protocols import BOTH_WAYS, PAIRED, TO_TILE, Search
from geostream.evaluation.ranks import Before


def measures(protocol: str, search: Search, before: Before) -> dict[str, Any]:
    """A row of results: shares 0…1, and how many queries and candidates they are over.

    AP where the protocol is "both-ways"; the hit rate, that nothing but allowed tiles stands before the right one (R@1
    where nothing is allowed), elsewhere.
    """
    starts = search.truths.indptr[:-1]
    first = np.minimum.reduceat(before.every, starts)
    ranks = {"r1": 1, "r5": 5, "r10": 10, "r1pct": max(1, search.gallery // 100)}
    row: dict[str, Any] = {"protocol": protocol, "direction": search.direction}
    row |= {name: float((first < k).mean()) for name, k in ranks.items()}
    if protocol == BOTH_WAYS:
        row["ap"] = float(average_precision(before.every, search.truths.indptr).mean())
    else:
        row["hit_rate"] = hit_rate(search, before)
    return row | {"queries": len(search.queries), "gallery": search.gallery}


def hit_rate(search: Search, before: Before) -> float:
    """Share of queries before whose best right answer stands nothing but allowed tiles."""
    return float((np.minimum.reduceat(before.barred, search.truths.indptr[:-1]) == 0).mean())


def average_precision(wrong: Int64, indptr: Int64) -> Float64:
    """(n,) average precision of n queries by the trapezoid rule, from the wrong candidates before each right one.

    The i-th right answer (from 0) stands at p = i + wrong; its share is the mean of (i + 1) / (p + 1), the precision
    there, and i / p, the precision just before it (1 at the top).
    """
    count = np.diff(indptr)
    owner = np.repeat(np.arange(len(count)), count)
    wrong = wrong[np.lexsort((wrong, owner))]
    i = np.arange(len(wrong)) - indptr[owner]
    position = i + wrong
    just_before = np.where(position > 0, i / np.maximum(position, 1), 1.0)
    area = ((i + 1) / (position + 1) + just_before) / 2
    summed: Float64 = np.bincount(owner, area, len(count)) / count
    return summed


def named_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of results in an evaluation's record: the headline under its protocol's name, then the others.

    A headline that stands among the others with more to say (AP) is not told twice.
    """
    names = ("protocol", "direction", "r1", "r5", "r10", "r1pct", "hit_rate", "queries", "gallery")
    head = {"protocol": PAIRED, "direction": TO_TILE} | {n: measured[n] for n in names if n in measured}
    others = [dict(row) for row in measured.get("others", ())]
    told = any((row["protocol"], row["direction"]) == (head["protocol"], head["direction"]) for row in others)
    return others if told else [head, *others]
