"""The ranks of positives, against sorted lists and exact fractions, on random and adversarial embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Csr, Float32
from geostream.evaluation import ranks as ranking
from geostream.evaluation.ranks import NEVER, TIE, Ranks, rank_positives
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
    if kind == "scales":
        return vectors * np.float32(10) ** rng.integers(-30, 30, (n, 1)).astype(np.float32)
    if kind == "no numbers":
        vectors[rng.random((n, dim)) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    if kind == "zeros":
        vectors[rng.random(n) < 0.3] = 0
    return vectors


KINDS = ["random", "levels", "copies", "permuted", "last digit", "scales", "no numbers", "zeros"]


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
