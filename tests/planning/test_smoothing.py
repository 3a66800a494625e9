"""Smoothing draws what is alike together, by sums that no machine does otherwise."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from geostream.planning.smoothing import BLOCK, NEAR, smoothed
from tests.cities import unit


def nearest(vectors: np.ndarray, k: int) -> np.ndarray:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k].astype(np.int32)


def test_kinds_move_together_and_apart_from_others() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 8, 2 * BLOCK + 7)
    vectors = unit(unit(rng.normal(size=(8, 32)))[kind] + unit(rng.normal(size=(len(kind), 32))))
    after = smoothed(vectors, nearest(vectors, 24))
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, rtol=1e-6)
    same = kind[:, None] == kind[None]
    for vectors_then, least in ((vectors, 0.3), (after, 0.8)):
        similarity = vectors_then @ vectors_then.T
        assert least < similarity[same].mean() - similarity[~same].mean() < least + 0.4


@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 9))
def test_any_graph_and_any_order_of_the_places(n: int, k: int, seed: int) -> None:
    """Missing neighbours are none; and renumbering the places renumbers the result, to the last bit."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(n, 5)))
    neighbours = rng.integers(-1, n, (n, k)).astype(np.int32)
    after = smoothed(vectors, neighbours)
    assert after.shape == vectors.shape and np.isfinite(after).all()
    order = rng.permutation(n)
    renumbered = np.append(np.argsort(order), -1)[neighbours[order]].astype(np.int32)
    assert np.array_equal(smoothed(vectors[order], renumbered), after[order])


def test_only_the_nearest_count() -> None:
    vectors = unit(np.random.default_rng(1).normal(size=(50, 8)))
    neighbours = nearest(vectors, NEAR + 5)
    assert np.array_equal(smoothed(vectors, neighbours), smoothed(vectors, neighbours[:, :NEAR]))
    alone = np.full((50, 3), -1, dtype=np.int32)
    np.testing.assert_allclose(smoothed(vectors, alone), vectors, atol=1e-3)
