"""The metrics from the ranks of the positives, against fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.evaluation.metrics import average_precision, measures, named_rows
from geostream.evaluation.protocols import BOTH_WAYS, NEAR, PAIRED, TO_TILE, TO_VIEW, Search
from geostream.evaluation.ranks import NEVER, Ranks, rank_positives
from tests.evaluation import plain_metrics
from tests.evaluation.test_ranks import KINDS, csr, embeddings

KEYS = {"protocol", "direction", "r1", "r5", "r10", "r1pct", "queries", "gallery"}


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    n=st.integers(1, 6),
    size=st.sampled_from([1, 2, 12, 99, 120, 330]),
    protocol=st.sampled_from([PAIRED, NEAR, BOTH_WAYS]),
)
def test_metrics_are_those_of_the_definitions(kind: str, seed: int, n: int, size: int, protocol: str) -> None:
    rng = np.random.default_rng(seed)
    query, gallery = embeddings(kind, rng, n, 3), embeddings(kind, rng, size, 3)
    right = [rng.choice(size, rng.integers(1, min(5, size) + 1), replace=False).tolist() for _ in range(n)]
    free = [rng.choice(size, rng.integers(0, min(5, size) + 1), replace=False).tolist() for _ in range(n)]
    positives, ignored = csr(right), csr(free)
    ranks = rank_positives(query, gallery[positives.indices], positives, ignored, [(0, gallery)])
    row = measures(protocol, Search(TO_TILE, np.arange(n), positives, ignored, size), ranks)
    plain = plain_metrics.metrics(query, gallery, right, free)
    extra = "ap" if protocol == BOTH_WAYS else "hit_rate"
    assert row.keys() == KEYS | {extra}
    assert (row["protocol"], row["direction"], row["queries"], row["gallery"]) == (protocol, TO_TILE, n, size)
    for name in ("r1", "r5", "r10", "r1pct", "hit_rate"):
        assert name not in row or row[name] == float(plain[name]), name
    assert row.get("ap", 0) == pytest.approx(float(plain["ap"]) if "ap" in row else 0, rel=1e-13)


@pytest.mark.parametrize(
    ("wrong", "precision"),
    [
        ([0], Fraction(1)),
        ([1], Fraction(1, 4)),  # second: ½ there, 0 just before
        ([0, 0, 0], Fraction(1)),
        ([0, 1], (1 + (Fraction(2, 3) + Fraction(1, 2)) / 2) / 2),  # first and third
        ([3, 0], (1 + (Fraction(2, 5) + Fraction(1, 4)) / 2) / 2),  # in any order: first and fifth
        ([NEVER], Fraction(0)),
    ],
)
def test_average_precision_by_hand(wrong: list[int], precision: Fraction) -> None:
    found = average_precision(np.array([*wrong, 7]), np.array([0, len(wrong), len(wrong) + 1]))
    assert found[0] == pytest.approx(float(precision), rel=1e-14, abs=1e-11)
    assert found[1] == pytest.approx(1 / 16)


def test_one_percent_is_rounded_down_but_at_least_one() -> None:
    search = Search(TO_TILE, np.arange(4), csr([[0], [1], [2], [3]]), csr([[]] * 4), 0)
    ranks = Ranks(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 3]))
    for gallery, share in ((1, 0.25), (50, 0.25), (199, 0.25), (200, 0.5), (299, 0.5), (300, 0.75)):
        of_size = Search(search.direction, search.queries, search.positives, search.ignored, gallery)
        assert measures(PAIRED, of_size, ranks)["r1pct"] == share


def test_rows_are_named_and_told_once() -> None:
    head = {"r1": 0.5, "r5": 1.0, "r10": 1.0, "r1pct": 0.5, "hit_rate": 0.5, "queries": 2, "gallery": 9}
    near = {"protocol": NEAR, "direction": TO_TILE, "r1": 1.0}
    assert named_rows({"epoch": 3, **head, "protocol": PAIRED, "others": [near]}) == [
        {"protocol": PAIRED, "direction": TO_TILE} | head,
        near,
    ]
    assert named_rows({"epoch": 3, **head}) == [{"protocol": PAIRED, "direction": TO_TILE} | head]  # of an old run
    both = [{"protocol": BOTH_WAYS, "direction": d, "ap": 0.5} for d in (TO_TILE, TO_VIEW)]
    assert named_rows({**head, "protocol": BOTH_WAYS, "others": both}) == both
