"""Recall within metres and the median error, against a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from geostream.evaluation import evaluate as module
from geostream.evaluation.evaluate import evaluate_embeddings
from geostream.evaluation.metres import DEPTHS, WITHIN, distances, metre_figures, recall_name
from geostream.evaluation.protocols import PAIRED, view_positions
from geostream.store import Store
from tests.cities import unit
from tests.evaluation.galleries import Spot, View, embedded_as, gallery_of


def test_by_hand() -> None:
    queries = np.array([[0.0, 0.0], [100.0, 0.0], [0.0, 0.0]])
    tiles = np.array([[[0.0, 25.0], [0.0, 0.0]], [[40.0, 0.0], [100.0, 51.0]], [[np.nan, np.nan], [0.0, 100.0]]])
    metres = distances(queries, tiles)
    assert metres.tolist() == [[25, 0], [60, 51], [np.inf, 100]]
    found = metre_figures(metres)
    assert found["median_metres"] == 60
    assert [found[recall_name(1, limit)] for limit in WITHIN] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert [found[recall_name(5, limit)] for limit in WITHIN] == pytest.approx([1 / 3, 1 / 3, 1])
    assert len(found) == len(DEPTHS) * len(WITHIN) + 1


@pytest.mark.parametrize("coordinates", ["utm", "latlon"])
def test_on_a_store_as_a_plain_loop_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coordinates: str) -> None:
    monkeypatch.setattr(module, "POSITIVES", 16)
    monkeypatch.setattr(module, "SHARD_ROWS", 32)
    rng = np.random.default_rng(8)
    metre = 1.0 if coordinates == "utm" else 1 / 111_195.08
    at = [(number * 30 * metre, 0.0) for number in range(70)]
    spots = [
        Spot(one, (View(at=(one[0] + float(rng.uniform(-15, 15)) * metre, 0.0)),) if number % 3 else ())
        for number, one in enumerate(at)
    ]
    spots[4] = Spot(at[4], (View(at=(math.nan, math.nan)),))  # does not count
    spots[5] = Spot((math.nan, math.nan), spots[5].views)  # is no right answer
    layout = gallery_of(Store.open(tmp_path), spots, (PAIRED,), coordinates)
    reference = unit(rng.normal(size=(70, 8)))
    own = [number for number, spot in enumerate(spots) if spot.views]
    query = unit(reference[own] + 0.2 * rng.normal(size=(len(own), 8)))
    found = evaluate_embeddings(layout, embedded_as(Store.open(tmp_path), layout, query, reference)).metres
    taken = view_positions(layout, "test")
    errors = []
    for vector, (north, _) in zip(query, taken, strict=True):
        if not math.isnan(north):
            best = np.argsort(-(reference @ vector))[:10]
            error = [abs(spots[int(row)].at[0] - north) / metre for row in best]
            errors.append([math.inf if math.isnan(one) else one for one in error])
    assert len(errors) == len(own) - 1
    for depth in DEPTHS:
        for limit in WITHIN:
            plain = np.mean([min(error[:depth]) <= limit for error in errors])
            assert found[recall_name(depth, limit)] == pytest.approx(plain)
    assert found["median_metres"] == pytest.approx(np.median([error[0] for error in errors]), rel=1e-4)
    assert 0.2 < found["r1_within_25m"] < found["r10_within_100m"] <= 1


def test_without_coordinates_nothing_is_measured(tmp_path: Path) -> None:
    unknown = (math.nan, math.nan)
    for coordinates in ("none", "utm"):
        layout = gallery_of(Store.open(tmp_path), [Spot(unknown, (View(at=unknown),))] * 3, (PAIRED,), coordinates)
        vectors = unit(np.eye(3, dtype=np.float32))
        assert evaluate_embeddings(layout, embedded_as(Store.open(tmp_path), layout, vectors, vectors)).metres == {}
