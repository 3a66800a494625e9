"""The K most similar in blocks, merged, against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.mining import exact
from geostream.mining.embeddings import CHUNK_ROWS
from geostream.mining.exact import fold, place_ranges, reference_blocks, row_groups
from geostream.mining.graph import SHARD_ROWS
from geostream.mining.topk import References, TopK, by_place, in_order, merge, nearest_of
from tests.cities import csr, unit


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    places=st.integers(1, 40),
    views=st.integers(1, 3),
    k=st.sampled_from([1, 5, 60]),
    blocks=st.integers(1, 5),
)
def test_blocks_views_and_exclusions_are_brute_force(seed: int, places: int, views: int, k: int, blocks: int) -> None:
    """Of several blocks of references, for places of several views, in any order of the views."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(1000, places, replace=False)).astype(np.int32)
    row = rng.permutation(np.concatenate([np.arange(places), rng.integers(0, places, places * (views - 1))]))
    query, reference = unit(rng.normal(size=(len(row), 8))), unit(rng.normal(size=(places, 8)))
    lists = [ids[rng.random(places) < 0.3].tolist() for _ in range(places)]
    of_query = csr([lists[i] for i in row])
    parts = [
        by_place(row, nearest_of(query, ids[row], of_query, References(ids[block], reference[block]), k), places)
        for block in np.array_split(np.arange(places), min(blocks, places))
    ]
    found = fold(parts, merge)
    assert found.other.shape == (places, k)
    for place in range(places):
        best = (query[row == place] @ reference.T).max(axis=0)
        allowed = [i for i in range(places) if i != place and ids[i] not in lists[place]]
        expected = sorted(allowed, key=lambda i: -best[i])[:k]
        assert found.other[place, : len(expected)].tolist() == ids[expected].tolist()
        assert found.score[place, : len(expected)] == pytest.approx(best[expected], abs=1e-5)
        assert (found.other[place, len(expected) :] == -1).all()
        assert np.isneginf(found.score[place, len(expected) :]).all()


def test_equal_scores_are_ordered_by_id() -> None:
    found = in_order(
        np.array([[7, 3, 5, -1, -1]], dtype=np.int32), np.array([[1, 0.5, 0.5, -np.inf, -np.inf]], np.float32)
    )
    assert found.other.tolist() == [[7, 3, 5, -1, -1]]
    found = in_order(np.array([[7, 9, 5]], dtype=np.int32), np.array([[0.5, 0.5, 0.5]], dtype=np.float32))
    assert found.other.tolist() == [[5, 7, 9]]
    one, two = (TopK(np.array([[i]], np.int32), np.ones((1, 1), np.float32)) for i in (4, 9))
    assert merge(one, two).other.tolist() == [[4]]


def test_few_queries_do_not_leave_the_matrix_product() -> None:
    """FAISS would compare a handful of queries one by one; it must have been told not to."""
    import faiss

    query = unit(np.random.default_rng(0).normal(size=(3, 8)))
    faiss.cvar.distance_compute_blas_threshold = 10_000
    nearest_of(query, np.zeros(3, np.int32), csr([[], [], []]), References(np.arange(3, dtype=np.int32), query), 2)
    assert faiss.cvar.distance_compute_blas_threshold == 20


@settings(deadline=None)
@given(n_places=st.integers(1, 60_000), views=st.integers(1, 60))
def test_groups_are_whole_zarr_shards(n_places: int, views: int) -> None:
    """They tile the graph's rows, and are as small as shards allow."""
    made = row_groups(n_places, n_places * views, exact.QUERIES)
    assert [start for start, _ in made] == [0, *(stop for _, stop in made[:-1])]
    assert made[-1][1] == n_places
    assert all(start % SHARD_ROWS == 0 and start < stop for start, stop in made)
    assert all((stop - start) * views <= exact.QUERIES + SHARD_ROWS * views for start, stop in made)


@settings(deadline=None)
@given(n=st.integers(1, 400_000))
def test_reference_blocks_tile_the_references(n: int) -> None:
    made = reference_blocks(n)
    assert [start for start, _ in made] == [0, *(stop for _, stop in made[:-1])]
    assert made[-1][1] == n
    assert all(0 < stop - start <= exact.BLOCK + CHUNK_ROWS for start, stop in made)


@settings(deadline=None)
@given(views=st.lists(st.integers(1, 9), min_size=1, max_size=40), most=st.integers(1, 20))
def test_pieces_hold_few_queries_and_no_half_place(views: list[int], most: int) -> None:
    places = 3 * np.arange(len(views), dtype=np.int32)
    pair_place = np.repeat(places, views).astype(np.int32)
    made = place_ranges(places, pair_place, most)
    assert np.concatenate([some for some, _, _ in made]).tolist() == places.tolist()
    for some, first, last in made:
        assert np.unique(pair_place[first:last]).tolist() == some.tolist()
        assert last - first <= most or len(some) == 1
    assert sum(last - first for _, first, last in made) == len(pair_place)


@given(n=st.integers(1, 70))
def test_a_fold_is_a_balanced_tree_in_order(n: int) -> None:
    height, text = fold([(0, [i]) for i in range(n)], lambda a, b: (1 + max(a[0], b[0]), a[1] + b[1]))
    assert text == list(range(n))
    assert height <= 2 * np.ceil(np.log2(n)) if n > 1 else height == 0
