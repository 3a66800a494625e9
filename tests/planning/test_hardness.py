"""The figures of a plan against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from geostream.planning import hardness
from tests.cities import unit


def test_hardness_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    query, reference = unit(rng.normal(size=(20, 8))), unit(rng.normal(size=(10, 8)))
    place = np.arange(20) // 2
    batches = np.array([[0, 4, 7], [19, 3, 10]], dtype=np.int32)
    expected = []
    for batch in batches.tolist():
        for i in batch:
            others = [math.exp(float(query[i] @ reference[place[j]]) / 0.05) for j in batch if j != i]
            expected.append(0.05 * math.log(sum(others) / len(others)))
    similarity = hardness.cosine(query, reference, np.arange(20, dtype=np.int32), place.astype(np.int32))
    assert hardness.batch_hardness(batches, similarity) == pytest.approx(np.mean(expected), abs=1e-5)


def test_proximity_falls_with_distance() -> None:
    points = np.array([[0.0, 0.0], [3.0, 4.0], [1e9, 0.0]])
    similarity = hardness.proximity(points, np.array([0, 1, 2, 1], dtype=np.int32), 5.0, np.zeros(3, dtype=np.int32))
    found = similarity(np.array([0, 3, 2], dtype=np.int32))
    assert found[0] == pytest.approx([1, math.exp(-1), 0])


def test_score() -> None:
    score, note = hardness.hardness_score(0.3, 0.4, 0.2)
    assert score == pytest.approx(0.5) and note == ""
    assert hardness.hardness_score(0.3, 0.2, 0.2)[0] is None
    assert "no harder than random" in hardness.hardness_score(0.3, 0.2, 0.2)[1]
    assert hardness.hardness_score(float("nan"), 0.4, 0.2) == (None, "the similarities are not finite numbers")


def test_one_function_says_what_is_hard_enough() -> None:
    assert hardness.hard_enough(0.9, 0.9) and not hardness.hard_enough(0.9, 0.9, hardness.PLAN_MARGIN)
    assert hardness.hard_enough(1.0, 0.9, hardness.RECLUSTER_MARGIN) and not hardness.hard_enough(-0.1, 0.0)
    assert hardness.hard_enough(None, 9.0, 1.0)  # nothing to choose by


def test_a_sample_is_the_same_each_time() -> None:
    batches = np.arange(1000, dtype=np.int32).reshape(500, 2)
    sampled = hardness.sample(batches, 100)
    assert sampled.shape == (100, 2)
    assert np.array_equal(sampled, hardness.sample(batches, 100))
    assert np.array_equal(hardness.sample(batches, 500), batches)
