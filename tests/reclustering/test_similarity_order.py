"""The similarity order: every place once, shards of one size, the same on any machine, and alike places together."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Float32, Int32
from geostream.errors import BadInput
from geostream.planning.spreading import shard_of_rows
from geostream.reclustering import order as module
from geostream.reclustering.order import Node, Ordered, order_by_cuts, similarity_order
from tests.cities import unit


def blobs(n: int, clusters: int, dim: int, noise: float = 0.5, seed: int = 0) -> tuple[Float32, np.ndarray]:
    """(n, dim) vectors around ``clusters`` centres, and the cluster of each."""
    rng = np.random.default_rng(seed)
    of = rng.permutation(np.arange(n) % clusters)
    centres = unit(rng.standard_normal((clusters, dim)))
    return unit(centres[of] + noise * unit(rng.standard_normal((n, dim)))), of


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 120),
    dim=st.integers(1, 6),
    shards=st.integers(1, 20),
    uneven=st.integers(1, 50),
    distinct=st.integers(1, 120),
    seed=st.integers(0, 2**16),
)
def test_every_place_once_in_shards_of_one_size(
    n: int, dim: int, shards: int, uneven: int, distinct: int, seed: int
) -> None:
    """Also where vectors are equal, and where one place is larger than a shard should be."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.standard_normal((distinct, dim)))[rng.integers(0, distinct, n)]
    sizes = rng.integers(1, uneven + 1, n) * 100
    found = similarity_order(vectors, sizes, sizes.sum() / shards)
    assert sorted(np.concatenate(found).tolist()) == list(range(n))
    assert len(found) == min(shards, n) and all(len(rows) for rows in found)
    held = np.array([sizes[rows].sum() for rows in found])
    if sizes.max() <= sizes.sum() / len(found):
        assert (np.abs(held - sizes.sum() / len(found)) <= 2 * sizes.max()).all()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(30, 300), dim=st.sampled_from([3, 64, 257]), seed=st.integers(0, 2**16))
def test_the_order_hangs_neither_on_how_sums_are_added_nor_on_how_work_is_divided(n: int, dim: int, seed: int) -> None:
    """Turning the dimensions round is what another BLAS, or another number of its threads, does to every sum."""
    vectors, _ = blobs(n, 1 + n // 30, dim, noise=1.0, seed=seed)
    sizes = np.random.default_rng(seed).integers(50, 150, n)
    expected = [rows.tolist() for rows in similarity_order(vectors, sizes, sizes.sum() / 7)]
    turned = np.random.default_rng(seed).permutation(dim)
    assert [rows.tolist() for rows in similarity_order(vectors[:, turned], sizes, sizes.sum() / 7)] == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SUBTREE", 40)
        tasks = []

        def backwards(work, todo):  # type: ignore[no-untyped-def]
            tasks.extend(todo)
            return map(work, todo[::-1])

        assert [r.tolist() for r in similarity_order(vectors, sizes, sizes.sum() / 7, backwards)] == expected
        assert len(tasks) > 1 or n <= 40
        assert all(len(task.codes) <= 40 or task.shards == 1 for task in tasks)


def test_sums_of_large_sets_are_exact() -> None:
    """At the limits that the module counts on: the longest vectors, all alike, in the largest sample."""
    codes = np.zeros((module.SAMPLE, 1024), dtype=np.float32)
    codes[:, 0] = module.UNIT
    assert codes.sum(axis=0)[0] == module.SAMPLE * module.UNIT
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((4000, 1024)))
    whole = np.rint(vectors * module.UNIT)
    direction = module._direction(rng.standard_normal(1024))
    exact = whole.astype(np.int64) @ direction.astype(np.int64)
    assert np.array_equal(whole @ direction, exact.astype(np.float32))
    assert np.abs(exact).max() < 2**24
    for vector in rng.standard_normal((50, 1024)):
        turned = rng.permutation(1024)
        assert np.array_equal(module._unit(vector)[turned], module._unit(vector[turned]))


def test_a_sample_decides_large_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = blobs(3000, 12, 16)
    sizes = np.full(3000, 10)
    whole = module.shard_similarity(vectors, shard_of_rows(similarity_order(vectors, sizes, 2500)))
    monkeypatch.setattr(module, "SAMPLE", 200)
    shards = similarity_order(vectors, sizes, 2500)
    assert {len(rows) for rows in shards} == {250}
    assert module.shard_similarity(vectors, shard_of_rows(shards)) > 0.9 * whole


def test_alike_places_share_a_shard() -> None:
    vectors, of = blobs(1600, 16, 64, noise=0.3)
    shards = similarity_order(vectors, np.full(1600, 7), 700)
    purity = np.mean([np.bincount(of[rows]).max() / len(rows) for rows in shards])
    ideal = module.shard_similarity(vectors, of.astype(np.int32))
    reached = module.shard_similarity(vectors, shard_of_rows(shards))
    assert len(shards) == 16 and purity > 0.85 and reached > 0.8 * ideal
    assert module.shard_similarity(vectors, np.arange(1600, dtype=np.int32) % 16) < 0.15


def test_the_order_follows_an_arc_within_and_across_shards() -> None:
    angle = np.random.default_rng(3).permutation(np.linspace(0, 3, 512))
    shards = similarity_order(unit(np.stack([np.cos(angle), np.sin(angle)], axis=1)), np.full(512, 1), 64)
    order = angle[np.concatenate(shards)]
    steps = np.diff(order if order[0] < order[-1] else order[::-1])
    # Leaves follow one another; in a leaf the order is that of its last cut.
    assert (np.diff(order.reshape(-1, module.LEAF).mean(axis=1)) > 0).all() or (
        np.diff(order.reshape(-1, module.LEAF).mean(axis=1)) < 0
    ).all()
    assert np.abs(steps).max() < 3 * module.LEAF * 3 / 512


def test_equal_vectors_keep_their_order() -> None:
    shards = similarity_order(np.tile(unit(np.ones((1, 4))), (64, 1)), np.full(64, 5), 80)
    assert [sorted(rows.tolist()) for rows in shards] == [list(range(s, s + 16)) for s in range(0, 64, 16)]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1.5])
def test_what_is_no_unit_vector_is_refused(wrong: float) -> None:
    vectors, _ = blobs(20, 2, 4)
    vectors[13, 2] = wrong
    with pytest.raises(BadInput, match="embed again"):
        similarity_order(vectors, np.full(20, 1), 5)


def test_no_places_are_refused() -> None:
    with pytest.raises(BadInput, match="no places"):
        similarity_order(np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64), 5)


def test_likeness_in_a_shard_is_the_mean_over_its_couples() -> None:
    vectors, _ = blobs(30, 3, 8)
    shard = np.random.default_rng(0).integers(0, 4, 30).astype(np.int32)
    cosines = [float(vectors[i] @ vectors[j]) for i in range(30) for j in range(30) if i != j and shard[i] == shard[j]]
    assert module.shard_similarity(vectors, shard) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert module.shard_similarity(vectors[:4], np.arange(4, dtype=np.int32)) == 0


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(0, 5) | st.integers(0, 2**40), min_size=1, max_size=40).filter(any),
    share=st.tuples(st.integers(0, 10**5), st.integers(1, 10**5)).filter(lambda share: share[0] < share[1]),
)
def test_a_cut_is_nearest_to_the_share_the_first_of_several(weights: list[int], share: tuple[int, int]) -> None:
    total = np.cumsum(weights)
    away = np.abs(total - total[-1] * share[0] / share[1])
    assert module._lower(total, share) == int(away.argmin()) + 1


def test_the_cuts_hold_few_bytes_a_place() -> None:
    """Beside the sizes. What the tasks of the largest orders do is done at once here, and held by nobody else."""
    n = 400_000
    sizes, rng = np.random.default_rng(0).integers(50, 150, n), np.random.default_rng(1)

    def project(nodes: Sequence[Node]) -> Iterator[Float32]:
        return (rng.random(len(node.rows), dtype=np.float32) for node in nodes)

    def order(nodes: Sequence[Node]) -> Iterator[Ordered]:
        for node in nodes:
            rows: Int32 = np.arange(len(node.rows), dtype=np.int32)
            ends = np.linspace(0, len(rows), node.shards + 1).astype(np.int64)
            yield Ordered(node.number, rows, ends[1:] - ends[:-1], np.ones(2), np.ones(2))

    tracemalloc.start()
    try:
        shards = order_by_cuts(sizes, sizes.sum() / 800, n // 10, project, order)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(shards) == 800 and np.array_equal(np.sort(np.concatenate(shards)), np.arange(n))
    assert peak < 24 * n
