"""Compute the field's metrics from the ranks of each query's positives.

All metrics follow from how many wrong candidates rank above each positive (:class:`Ranks`). A query counts for R@k if
fewer than k rank above its best positive. For R@1% k is a hundredth of the gallery, rounded down, but at least 1.
University-1652's script looks R@1% up one rank further than its other recalls, which is not followed here.

Sources: the hit rate of VIGOR (Zhu et al., CVPR 2021, section 5); the average precision of ``evaluate_gpu.py`` of
University-1652 (Zheng et al., ACM MM 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from geostream.arrays import Bools, Float64, Int64
from geostream.evaluation.protocols import BOTH_WAYS, PAIRED, TO_TILE, Search
from geostream.evaluation.ranks import NEVER, Ranks


def measures(protocol: str, search: Search, ranks: Ranks) -> dict[str, Any]:
    """Return a row of results of one protocol and direction.

    Args:
        protocol: Name of the protocol.
        search: The queries and their positives.
        ranks: Ranks of these positives.

    Returns:
        Fractions from 0 to 1 under ``r1``, ``r5``, ``r10`` and ``r1pct``, with "both-ways" also ``ap``, else
        ``hit_rate``; and ``protocol``, ``direction``, ``queries`` and ``gallery``, the number of candidates.
    """
    row: dict[str, Any] = {"protocol": protocol, "direction": search.direction}
    row |= {name: float(values.mean()) for name, values in by_query(protocol, search, ranks).items()}
    return row | {"queries": len(search.queries), "gallery": search.gallery}


def by_query(protocol: str, search: Search, ranks: Ranks) -> dict[str, Bools | Float64]:
    """Return what each query contributes to the metrics of :func:`measures`, which are the means of these.

    Args:
        protocol: Name of the protocol.
        search: The n queries and their positives.
        ranks: Ranks of these positives.

    Returns:
        (n,) arrays by the metric's name: whether the query counts as found, or its average precision under ``ap``.
    """
    first = first_ranks(search, ranks)
    tops = {"r1": 1, "r5": 5, "r10": 10, "r1pct": max(1, search.gallery // 100)}
    values: dict[str, Bools | Float64] = {name: first < k for name, k in tops.items()}
    if protocol == BOTH_WAYS:
        return values | {"ap": average_precision(ranks.wrong, search.positives.indptr)}
    return values | {"hit_rate": _hits(search, ranks)}


def first_ranks(search: Search, ranks: Ranks) -> Int64:
    """Return the (n,) number of wrong candidates above the best positive of each of the n queries."""
    first: Int64 = np.minimum.reduceat(ranks.wrong, search.positives.indptr[:-1])
    return first


def hit_rate(search: Search, ranks: Ranks) -> float:
    """Return VIGOR's hit rate: the fraction of queries with only ignored tiles above the best positive.

    Ignored are the semi-positives; without them the hit rate is R@1.
    """
    return float(_hits(search, ranks).mean())


def _hits(search: Search, ranks: Ranks) -> Bools:
    hits: Bools = np.minimum.reduceat(ranks.not_ignored, search.positives.indptr[:-1]) == 0
    return hits


def average_precision(wrong: Int64, indptr: Int64) -> Float64:
    """Return the (n,) average precision of n queries by the trapezoid rule.

    The i-th positive (from 0) has position p = i + wrong. It contributes the mean of (i + 1) / (p + 1), the precision
    there, and i / p, the precision just before it (1 at the top).

    Args:
        wrong: (E,) wrong candidates above each positive, in any order within a query.
        indptr: (n + 1,) where each query's positives begin.
    """
    count = np.diff(indptr)
    owner = np.repeat(np.arange(len(count)), count)
    wrong = wrong[np.lexsort((wrong, owner))]
    i = np.arange(len(wrong)) - indptr[owner]
    position = i + wrong
    just_before = np.where(position > 0, i / np.maximum(position, 1), 1.0)
    area = np.where(wrong < NEVER, ((i + 1) / (position + 1) + just_before) / 2, 0.0)
    summed: Float64 = np.bincount(owner, area, len(count)) / count
    return summed


def named_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of results in an evaluation's record: the headline under its protocol's name, then the others.

    A headline that is among the others, where it has AP, too, is not repeated. A record of several data sets has the
    rows of each, with its name under ``dataset``, and no row of their means.
    """
    if "datasets" in measured:
        return [{"dataset": one["dataset"]} | row for one in measured["datasets"] for row in named_rows(one)]
    names = ("protocol", "direction", "r1", "r5", "r10", "r1pct", "hit_rate", "queries", "gallery")
    head = {"protocol": PAIRED, "direction": TO_TILE} | {n: measured[n] for n in names if n in measured}
    others = [dict(row) for row in measured.get("others", ())]
    told = any((row["protocol"], row["direction"]) == (head["protocol"], head["direction"]) for row in others)
    return others if told else [head, *others]


def row_name(row: Mapping[str, Any]) -> str:
    """Return what a row of results is called: its protocol, behind its data set where there are several."""
    return f"{row['dataset']} {row['protocol']}" if "dataset" in row else str(row["protocol"])
