"""The threshold: precise by a lower bound, or none at all. Pure, so by properties and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.locating.threshold import FAILURE, PRECISION, calibrate, confidence, elsewhere, lower_bound


def test_confidence_is_the_gap_to_the_best_candidate_elsewhere() -> None:
    points = np.array([[0.0, 0.0], [30.0, 0.0], [0.0, 51.0], [np.nan, np.nan]])
    places = np.array([[0, 1, 2, 3], [0, 1, 3, 2], [1, 0, 0, 0]])
    scores = np.array([[0.9, 0.8, 0.5, 0.4]] * 3, dtype=np.float32)
    away = elsewhere(points, places)
    assert away.tolist() == [[False, False, True, True], [False, False, True, True], [False] * 4]
    # In the last row nothing lies elsewhere: no place elsewhere can score more than the last one seen.
    assert confidence(scores, away) == pytest.approx([0.4, 0.4, 0.5])
    assert elsewhere(None, places)[0].tolist() == [False, True, True, True]


@settings(deadline=None)
@given(right=st.integers(0, 60), wrong=st.integers(0, 60), failure=st.floats(0.001, 0.2))
def test_the_bound_is_below_the_fraction_and_grows_with_the_sample(right: int, wrong: int, failure: float) -> None:
    of = right + wrong
    if not of:
        return
    bound = lower_bound(right, of, failure)
    assert 0 <= bound <= right / of
    assert lower_bound(4 * right, 4 * of, failure) >= bound


def test_the_bound_of_a_sample_without_errors_is_the_textbook_one() -> None:
    assert lower_bound(29, 29, 0.05) == pytest.approx(0.05 ** (1 / 29))
    assert lower_bound(0, 9, 0.05) == 0


def photos(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and whether each is right: the more confident, the more often."""
    gap = rng.exponential(0.1, n).astype(np.float32)
    return gap, rng.random(n) < 1 - 0.6 * np.exp(-gap / 0.06)


def test_later_photos_are_right_as_often_as_promised() -> None:
    rng = np.random.default_rng(3)
    later, right_later = photos(rng, 200_000)
    precision, shares = [], []
    for _ in range(60):
        found = calibrate(*photos(rng, 600))
        sure = later >= (np.inf if found.threshold is None else found.threshold)
        precision.append(right_later[sure].mean() if sure.any() else 1.0)
        shares.append(sure.mean())
    assert np.mean(np.array(precision) < PRECISION) <= FAILURE
    assert np.mean(shares) > 0.3, "the promise is kept without calling hardly any photo sure"


def test_the_curve_says_how_the_threshold_was_found() -> None:
    gap, right = photos(np.random.default_rng(4), 1000)
    found = calibrate(gap, right)
    assert [point["share"] for point in found.curve] == pytest.approx(np.arange(1, 21) / 20)
    last = found.curve[-1]
    assert last["precision"] == pytest.approx(right.mean()) and last["confidence"] == gap.min()
    chosen = [point for point in found.curve if point["lower"] >= PRECISION][-1]
    assert (found.threshold, found.sure) == (chosen["confidence"], chosen["share"])


@pytest.mark.parametrize("n", [0, 1, 56])
def test_too_few_photos_are_never_enough(n: int) -> None:
    found = calibrate(np.linspace(1, 0, n).astype(np.float32), np.ones(n, dtype=bool))
    assert found.threshold is None and found.sure == 0 and found.queries == n


def test_57_photos_without_an_error_are_just_enough() -> None:
    assert calibrate(np.linspace(1, 0.5, 57).astype(np.float32), np.ones(57, dtype=bool)).threshold == 0.5


def test_a_model_that_gives_all_images_one_vector_is_never_sure() -> None:
    """Its confidences are all equal, so they cannot be told apart, and no part of them is precise."""
    right = np.arange(1000) % 10 == 0
    found = calibrate(np.zeros(1000, dtype=np.float32), right)
    assert found.threshold is None and {point["share"] for point in found.curve} == {1.0}
