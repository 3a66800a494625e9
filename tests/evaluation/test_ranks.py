"""The ranks of positives, against sorted lists and exact fractions, on random and adversarial embeddings."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Csr, Float32
from geostream.evaluation import ranks as ranking
from geostream.evaluation.ranks import NEVER, TIE, Ranks, error_bound, rank_positives
from tests.evaluation.float64_ranks import rank_in_float64
from tests.evaluation.plain_metrics import wrong_before

Lists = list[list[int]]


def csr(lists: Lists) -> Csr:
    indptr = np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int64)
    return Csr(indptr, np.array([row for one in lists for row in one], dtype=np.int32))


def blocks(gallery: Float32, size: int) -> Iterator[tuple[int, Float32]]:
    return ((start, gallery[start : start + size]) for start in range(0, len(gallery), size))


def counted(query: Float32, gallery: Float32, right: Lists, free: Lists, size: int = 4096) -> Ranks:
    positives = csr(right)
    return rank_positives(query, gallery[positives.indices], positives, csr(free), blocks(gallery, size))


def check(query: Float32, gallery: Float32, right: Lists, free: Lists, size: int = 4096) -> None:
    before = counted(query, gallery, right, free, size)
    plain = [n for q, some, harmless in zip(query, right, free, strict=True)
             for n in wrong_before(q, gallery, some, harmless)]  # fmt: skip
    assert [(int(a), int(b)) for a, b in zip(*before, strict=True)] == [n or (NEVER, NEVER) for n in plain]


def unit(vectors: npt.NDArray[np.float64]) -> Float32:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embeddings(kind: str, rng: np.random.Generator, n: int, dim: int) -> Float32:
    """Rows that make trouble in their own way."""
    if kind == "levels":  # few values: ties between different vectors
        return (rng.integers(-2, 3, (n, dim)) / 4).astype(np.float32)
    vectors = unit(rng.normal(size=(n, dim)))
    if kind == "copies":
        return vectors[rng.integers(0, max(1, n // 3), n)]
    if kind == "permuted":  # mathematically equal sums in another order
        return np.stack([rng.permutation(vectors[0]) for _ in range(n)])
    if kind == "last digit":  # copies of one vector, some numbers of which are the next float32
        near = np.repeat(vectors[:1], n, axis=0)
        moved = rng.random((n, dim)) < 0.2
        return np.where(moved, np.nextafter(near, np.float32(2)), near)
    if kind == "constant":
        return np.repeat(unit(np.full((1, dim), 0.1234567)), n, axis=0)
    if kind == "near ties":  # differences about as large as TIE
        near = np.repeat(vectors[:1], n, axis=0)
        near[:, 0] = rng.normal(size=n) * TIE * 3
        return near
    if kind == "odd lengths":
        return vectors * rng.uniform(0.3, 3, (n, 1)).astype(np.float32)
    if kind == "scales":
        return vectors * np.float32(10) ** rng.integers(-30, 30, (n, 1)).astype(np.float32)
    if kind == "ends":  # the least and the largest numbers of float32: products vanish, or are too large for it
        ends = np.array([1e-45, 1e-38, 3e38], dtype=np.float32)
        return np.where(rng.random((n, 1)) < 0.5, vectors, vectors * rng.choice(ends, (n, dim)))
    if kind == "no numbers":
        vectors[rng.random((n, dim)) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    if kind == "zeros":
        vectors[rng.random(n) < 0.3] = 0
    return vectors


KINDS = ["random", "levels", "copies", "permuted", "last digit", "scales", "no numbers", "zeros"]
MORE_KINDS = [*KINDS, "constant", "near ties", "odd lengths", "ends"]


def in_float64(query: Float32, gallery: Float32, right: Lists, free: Lists) -> Ranks:
    positives = csr(right)
    return rank_in_float64(query, gallery[positives.indices], positives, csr(free), [(0, gallery)])


def same(one: Ranks, other: Ranks) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(MORE_KINDS),
    other=st.sampled_from([*MORE_KINDS, "the queries"]),
    seed=st.integers(0, 2**32),
    n=st.integers(1, 20),
    size=st.integers(1, 100),
    dim=st.one_of(st.integers(1, 9), st.sampled_from([33, 128, 700])),
    most_right=st.integers(1, 5),
    sparse=st.sampled_from([1, 4, 32, 10**9]),
)
def test_counts_are_those_of_float64(
    kind: str, other: str, seed: int, n: int, size: int, dim: int, most_right: int, sparse: int
) -> None:
    """Whether doubtful candidates are decided row by row or one by one (``sparse``), in any blocks and strips."""
    rng = np.random.default_rng(seed)
    query = embeddings(kind, rng, n, dim)
    if other == "the queries":  # each several times, some moved by the least that float32 can
        gallery = query[rng.integers(0, n, size)]
        gallery = np.where(rng.random((size, 1)) < 0.3, np.nextafter(gallery, np.float32(1)), gallery)
    else:
        gallery = embeddings(other, rng, size, dim)
    right = [sorted(rng.choice(size, rng.integers(1, min(most_right, size) + 1), False).tolist()) for _ in range(n)]
    free = [sorted(rng.choice(size, rng.integers(0, min(4, size) + 1), False).tolist()) for _ in range(n)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SPARSE", sparse)
        patch.setattr(ranking, "STRIP", int(rng.integers(size, 20 * size)))
        patch.setattr(ranking, "TILE", int(rng.integers(3, 50)))
        patch.setattr(ranking, "WIDE", int(rng.integers(3, 50)) * dim)
        found = counted(query, gallery, right, free, int(rng.integers(size // 4 + 1, size + 2)))
    assert same(found, in_float64(query, gallery, right, free))


@settings(deadline=None, max_examples=50)
@given(
    kind=st.sampled_from(MORE_KINDS),
    other=st.sampled_from(MORE_KINDS),
    seed=st.integers(0, 2**32),
    dim=st.one_of(st.integers(1, 9), st.sampled_from([128, 1000])),
    one_sign=st.booleans(),
)
def test_float32_is_no_further_off_than_its_bound(kind: str, other: str, seed: int, dim: int, one_sign: bool) -> None:
    """Against exact fractions, in the scale in which the product is computed."""
    rng = np.random.default_rng(seed)
    one, two = embeddings(kind, rng, 3, dim), embeddings(other, rng, 3, dim)
    if one_sign:  # errors of sums that only grow are the largest
        one, two = abs(one), abs(two)
    query, block = ranking._Vectors(one, one_scale=False), ranking._Vectors(two, one_scale=True)
    for vectors in (query, block):
        nonzero = vectors.reach[vectors.reach > 0]
        assert ((nonzero > 0.7) & (nonzero < 1.5)).all()
    product = query.scaled @ block.scaled.T
    for i, j in np.ndindex(product.shape):
        exact = sum(
            Fraction(float(a)) * Fraction(float(b)) for a, b in zip(query.exact[i], block.exact[j], strict=True)
        )
        exact *= Fraction(2) ** -int(query.exponent[i] + block.exponent[0])
        bound = (error_bound(dim) - 2 * TIE) * query.reach[i] * block.reach[0]
        assert abs(Fraction(float(product[i, j])) - exact) <= Fraction(float(bound))


def test_few_candidates_are_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random vectors: float64 has next to nothing to do. A constant embedding: float64 does all, by matrix products."""
    rng = np.random.default_rng(7)
    gallery = unit(rng.normal(size=(5000, 256)))
    query = unit(gallery[:200] + rng.normal(size=(200, 256)) / 4)
    right: Lists = [[i] for i in range(200)]
    single: list[int] = []
    by_rows: list[int] = []

    def watch(name: str, seen: list[int], argument: int) -> None:
        work = getattr(ranking, name)

        def watched(*some: Any) -> Any:
            seen.append(len(some[argument]))
            return work(*some)

        monkeypatch.setattr(ranking, name, watched)

    watch("_dots", single, 1)
    watch("_decide_rows", by_rows, 3)
    assert same(counted(query, gallery, right, [[]] * 200), in_float64(query, gallery, right, [[]] * 200))
    assert 200 <= sum(single) < 200 + 200 * 5000 / 1000 and not by_rows
    single.clear()
    constant = np.repeat(gallery[:1], 5000, axis=0)
    assert (counted(constant[:200], constant, right, [[]] * 200).wrong == 4999).all()
    assert sum(single) == 200 and sum(by_rows) == 200 * 2  # of two blocks


@pytest.mark.parametrize("kind", ["random", "constant", "odd lengths"])
@pytest.mark.parametrize("most_right", [1, 6])
def test_memory_is_within_the_bound_that_is_told(kind: str, most_right: int) -> None:
    n, size, dim, block = 1000, 12_000, 64, 4096
    rng = np.random.default_rng(8)
    query, gallery = embeddings(kind, rng, n, dim), embeddings(kind, rng, size, dim)
    right: Lists = [sorted((i + 7 * np.arange(most_right)).tolist()) for i in range(n)]
    free: Lists = [[size - 1, size - 2]] * n
    positives, ignored = csr(right), csr(free)
    positive = gallery[positives.indices]
    tracemalloc.start()
    try:
        rank_positives(query, positive, positives, ignored, blocks(gallery, block))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    copies = 4 * dim * (n + block) if kind == "odd lengths" else 0
    entries = n + len(positive) + block + 2 * len(positive)
    assert peak <= 100 * entries + copies + 64 * 2**20


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(KINDS),
    other=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    n=st.integers(1, 9),
    size=st.integers(1, 30),
    dim=st.integers(1, 9),
    most_right=st.integers(1, 4),
)
def test_counts_are_those_of_exact_arithmetic_whatever_the_blocks(
    kind: str, other: str, seed: int, n: int, size: int, dim: int, most_right: int
) -> None:
    rng = np.random.default_rng(seed)
    query, gallery = embeddings(kind, rng, n, dim), embeddings(other, rng, size, dim)

    def some(least: int, most: int) -> Lists:
        return [sorted(rng.choice(size, rng.integers(least, most + 1), replace=False).tolist()) for _ in range(n)]

    right, free = some(1, min(most_right, size)), some(0, min(3, size))
    check(query, gallery, right, free, size=int(rng.integers(1, size + 2)))
    before, strip = counted(query, gallery, right, free), ranking.STRIP
    try:
        ranking.STRIP = int(rng.integers(1, 3 * size))
        for mine, again in zip(before, counted(query, gallery, right, free, int(rng.integers(1, 8))), strict=True):
            assert np.array_equal(mine, again)
    finally:
        ranking.STRIP = strip
    order = rng.permutation(size)  # new row i is old row order[i]
    new = np.argsort(order)
    moved = counted(query, gallery[order], [new[r].tolist() for r in right], [new[f].tolist() for f in free])
    assert np.array_equal(before.wrong, moved.wrong) and np.array_equal(before.not_ignored, moved.not_ignored)


@pytest.mark.parametrize("dim", [3, 64, 1000])
def test_nothing_ranks_below_in_a_constant_embedding(dim: int) -> None:
    constant = unit(np.full((203, dim), 0.1234567))
    before = counted(constant, constant, [[i] for i in range(203)], [[]] * 203, size=64)
    assert (before.wrong == 202).all() and (before.not_ignored == 202).all()


def test_copies_count_wherever_they_stand() -> None:
    gallery = np.repeat(unit(np.random.default_rng(1).normal(size=(50, 777))), 3, axis=0)
    order = np.random.default_rng(2).permutation(150)
    right = [[int(np.flatnonzero(order == 3 * i)[0])] for i in range(50)]
    before = counted(gallery[::3], gallery[order], right, [[]] * 50, size=31)
    assert (before.wrong == 2).all()


@pytest.mark.parametrize("length", [1e-12, 1.0, 1e12])
def test_near_ties_count_against_the_model_and_real_differences_do_not(length: float) -> None:
    """Relative to the vectors' lengths: at the rounding of float64 they are ties, at that of float32 they are none."""
    rng = np.random.default_rng(3)
    query, right = unit(rng.normal(size=(1, 1024))), unit(rng.normal(size=(1, 1024)))
    right[0, :2] = 1e-9, 0.1
    rounding, less, more = np.repeat(right, 3, axis=0)
    rounding[0] = np.nextafter(right[0, 0], np.float32(-np.sign(query[0, 0])))  # less similar by 1e-18
    less[1] -= np.sign(query[0, 1]) * np.float32(1e-6)
    more[1] += np.sign(query[0, 1]) * np.float32(1e-6)
    assert abs(query[0, 1]) * 1e-6 > 3 * TIE
    gallery = np.concatenate([right, [rounding], [less], [less], [more]]) * np.float32(length)
    assert counted(query, gallery, [[0]], [[]]).wrong.tolist() == [2]


def test_what_is_no_number_is_never_found_even_without_rivals() -> None:
    gallery = np.ones((1, 4), dtype=np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        query = np.full((1, 4), bad, dtype=np.float32)
        assert counted(query, gallery, [[0]], [[]]).not_ignored.tolist() == [NEVER]
        assert counted(gallery, query, [[0]], [[]]).wrong.tolist() == [NEVER]
    assert counted(gallery, gallery, [[0]], [[]]).wrong.tolist() == [0]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_other_floats_are_taken_as_float32(kind: str) -> None:
    rng = np.random.default_rng(4)
    gallery = unit(rng.normal(size=(40, 8))).astype(kind)
    query = (gallery[:10] + rng.normal(size=(10, 8)) / 4).astype(kind)
    check(query.astype(np.float32), gallery.astype(np.float32), [[i] for i in range(10)], [[]] * 10)
    before = counted(query, gallery, [[i] for i in range(10)], [[]] * 10)
    again = counted(query.astype(np.float32), gallery.astype(np.float32), [[i] for i in range(10)], [[]] * 10)
    assert np.array_equal(before.wrong, again.wrong) and before.wrong.any()
