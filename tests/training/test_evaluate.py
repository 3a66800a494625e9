"""The metrics against a plain implementation, to the last digit, on random and on adversarial input."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import BadInput
from geostream.layout import Csr, Pairs
from geostream.store import Store
from geostream.training import evaluate as module
from geostream.training.evaluate import Float32, evaluate, score
from tests.helpers import tiny_layout


def plain(query: Float32, reference: Float32, truth: list[int], allowed: list[list[int]]) -> dict[str, float]:
    """The definitions in words, one query at a time, with exact arithmetic."""

    def similarity(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> Fraction:
        return sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)), Fraction())

    before, rivals = [], []
    for q, t, free in zip(query, truth, allowed, strict=True):
        true = similarity(q, reference[t])
        ahead = [j for j in range(len(reference)) if j != t and similarity(q, reference[j]) >= true]
        before.append(len(ahead))
        rivals.append(len([j for j in ahead if j not in free]))
    n, k = len(query), max(1, len(reference) // 100)
    recall = {name: sum(b < top for b in before) / n for name, top in (("r1", 1), ("r5", 5), ("r10", 10), ("r1pct", k))}
    return recall | {"hit_rate": sum(r == 0 for r in rivals) / n}


def csr(rows: list[list[int]]) -> Csr:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Csr(indptr, np.array([x for row in rows for x in row], dtype=np.int32))


def check(query: Float32, reference: Float32, truth: list[int], allowed: list[list[int]]) -> module.Evaluation:
    found = score(query, reference, np.array(truth), csr(allowed))
    for name, value in plain(query, reference, truth, allowed).items():
        assert getattr(found, name) == value, name
    return found


def unit(vectors: npt.NDArray[np.float64]) -> Float32:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32), n=st.integers(1, 25), gallery=st.integers(1, 40), levels=st.sampled_from([0, 2, 3, 10])
)
def test_random_embeddings_with_and_without_ties(seed: int, n: int, gallery: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    draw = rng.normal if not levels else lambda size: rng.integers(0, levels, size) / 4.0
    query, reference = draw(size=(n, 4)).astype(np.float32), draw(size=(gallery, 4)).astype(np.float32)
    truth = rng.integers(0, gallery, n).tolist()
    allowed = [rng.choice(gallery, rng.integers(0, min(4, gallery) + 1), replace=False).tolist() for _ in range(n)]
    check(query, reference, truth, allowed)


def test_a_large_gallery_has_a_larger_one_percent() -> None:
    rng = np.random.default_rng(0)
    reference = unit(rng.normal(size=(350, 6)))
    query = unit(reference[:60] + 0.5 * rng.normal(size=(60, 6)))
    found = check(query, reference, list(range(60)), [list(range(60, 250))] * 60)
    assert 0 < found.r1 < found.r1pct < found.r5 < found.r10 < 1 and found.hit_rate > found.r1


@pytest.mark.parametrize("dim", [3, 64, 1000])
def test_a_constant_embedding_scores_nothing(dim: int) -> None:
    constant = unit(np.full((203, dim), 0.1234567))
    found = score(constant, constant, np.arange(203))
    assert (found.r1, found.r5, found.r10, found.r1pct, found.hit_rate) == (0, 0, 0, 0, 0)


def test_duplicates_of_the_truth_count_against_the_model() -> None:
    rng = np.random.default_rng(1)
    reference = np.repeat(unit(rng.normal(size=(50, 777))), 2, axis=0)
    found = score(reference[::2], reference, np.arange(0, 100, 2))
    assert found.r1 == 0 and found.r5 == 1


def test_nan_never_wins() -> None:
    reference = unit(np.eye(20))
    query = reference.copy()
    query[:5] = np.nan
    reference_with_nan = reference.copy()
    reference_with_nan[7] = np.nan
    assert score(query, reference, np.arange(20)).r1 == 0.75
    assert score(reference, reference_with_nan, np.arange(20)).r1 == 0


def test_perfect_embeddings_score_everything() -> None:
    reference = unit(np.random.default_rng(0).normal(size=(300, 16)))
    found = score(reference, reference, np.arange(300))
    assert (found.r1, found.r1pct, found.hit_rate, found.gallery, found.queries) == (1, 1, 1, 300, 300)


def test_several_queries_of_one_place_count_each() -> None:
    reference = unit(np.eye(4))
    query = reference[[0, 0, 0, 1]]
    assert score(query, reference, np.array([0, 0, 1, 1])).r1 == 0.75


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    query, reference = unit(rng.normal(size=(53, 5))), unit(rng.normal(size=(31, 5)))
    truth, allowed = rng.integers(0, 31, 53), csr([[i % 31] if i % 3 else [] for i in range(53)])
    whole = score(query, reference, truth, allowed)
    for block in (1, 40, 31 * 7):
        monkeypatch.setattr(module, "BLOCK", block)
        assert score(query, reference, truth, allowed) == whole


def test_a_split_of_a_layout(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path), places=5, test_places=4, distractors=2)
    pairs, references = layout.pairs("test"), layout.references("test")
    reference = unit(np.eye(6))
    query = reference[[0, 2, 3, 3]]  # the second falls for the tile behind it, its semi-positive
    found = evaluate(layout, "test", query, reference, pairs, references)
    assert (found.r1, found.hit_rate, found.gallery, found.queries) == (0.5, 0.5, 6, 4)
    query = reference[[0, 2, 2, 3]]
    query[1] = unit(np.array([[0, 1, 1.5, 0, 0, 0.0]]))[0]
    assert evaluate(layout, "test", query, reference, pairs, references).hit_rate == 1
    order = np.array([5, 4, 3, 2, 1, 0])
    assert evaluate(layout, "test", query, reference[order], pairs, references[order]).hit_rate == 1


def test_what_cannot_be_evaluated_is_told(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path))
    pairs, references = layout.pairs("test"), layout.references("test")
    query, reference = np.ones((4, 3), np.float32), np.ones((6, 3), np.float32)
    with pytest.raises(BadInput, match=r"true tile of beta-0012 is not in the gallery"):
        evaluate(layout, "test", query, reference[1:], pairs, references[1:])
    with pytest.raises(BadInput, match="not the train pairs"):
        evaluate(layout, "train", query, reference, pairs, references)
    with pytest.raises(BadInput, match="nothing to evaluate"):
        score(query[:0], reference, np.zeros(0, dtype=np.int64))
    with pytest.raises(BadInput, match="not the test pairs"):
        evaluate(layout, "test", query[:2], reference, Pairs(pairs.place[:2], pairs.view[:2]), references)
