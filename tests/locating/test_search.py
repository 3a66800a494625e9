"""The search in inverted lists against comparing with all."""

from __future__ import annotations

import numpy as np

from geostream.arrays import Float32
from geostream.locating.search import (
    RECALL,
    RECALL_AT,
    TileSearch,
    choose_nprobe,
    fill_lists,
    flat,
    n_lists,
    train_lists,
)


def clustered(n: int, queries: int, dim: int = 32) -> tuple[Float32, Float32]:
    """Vectors around some centres, and others near some of them."""
    rng = np.random.default_rng(n)
    centres = rng.normal(size=(n // 100, dim))
    vectors = centres[rng.integers(0, len(centres), n)] + 0.3 * rng.normal(size=(n, dim))
    asked = vectors[rng.integers(0, n, queries)] + 0.2 * rng.normal(size=(queries, dim))
    return tuple((some / np.linalg.norm(some, axis=1, keepdims=True)).astype(np.float32) for some in (vectors, asked))


def lists_of(vectors: Float32) -> TileSearch:
    index = train_lists(vectors, n_lists(len(vectors)))
    number = index.quantizer.search(vectors, 1)[1][:, 0].astype(np.int32)
    halves = ((vectors[some], number[some]) for some in (slice(0, 1500), slice(1500, None)))
    return TileSearch(np.arange(len(vectors), dtype=np.int32)[::-1].copy(), fill_lists(index, halves))


def test_lists_find_what_comparing_with_all_finds() -> None:
    vectors, asked = clustered(4000, 300)
    search = lists_of(vectors)
    everything = TileSearch(search.place, flat(vectors))
    truth, true_scores = everything.nearest(asked, RECALL_AT)
    rows = len(vectors) - 1 - truth
    nprobe, recall = choose_nprobe(search.tiles, asked, rows)
    assert 4 <= nprobe < search.tiles.nlist / 2 and recall >= RECALL
    found, scores = search.nearest(asked, RECALL_AT)
    same = (found[:, :, None] == truth[:, None, :]).any(axis=1).mean(axis=1)
    assert same.mean() >= RECALL
    first = found[:, 0] == truth[:, 0]
    assert np.allclose(scores[first, 0], true_scores[first, 0], atol=1e-5), "scores are exact"
    assert (np.diff(scores, axis=1) <= 0).all()


def test_fewer_finds_than_asked_for_are_filled_up() -> None:
    vectors, asked = clustered(4000, 5)
    search = lists_of(vectors)
    search.tiles.nprobe = 1
    places, scores = search.nearest(asked, 1000)
    assert places.shape == scores.shape == (5, 1000)
    assert (scores[:, -1] == -1).all() and (places >= 0).all() and (places < 4000).all()
    few, _ = TileSearch(np.array([7, 9], dtype=np.int32), flat(vectors[:2])).nearest(asked, 5)
    assert few.shape == (5, 2) and set(few.ravel().tolist()) == {7, 9}
