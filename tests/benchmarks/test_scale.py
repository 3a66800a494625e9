"""The benchmark of scale: its places are what it says, and a stage that fails takes those with it that need it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geostream.layout import index, open_layout
from geostream.layout.members import MemberTable
from geostream.mining.embeddings import open_embeddings, read_rows
from geostream.reclustering.order import shard_similarity
from geostream.store import Store
from tests.benchmarks import scale, scale_places
from tests.benchmarks.measure import Failed
from tests.benchmarks.scale import Step, exponent, measure, slope, with_needs

N = 4000


def test_places_are_a_layout_in_clustered_order(tmp_path: Path) -> None:
    scale_places.make(tmp_path, N)
    layout = open_layout(Store.open(tmp_path))
    assert (layout.places.num_rows, layout.members.num_rows) == (N, 3 * N)  # read as a whole, so all is checked
    embeddings = open_embeddings(Store.open(tmp_path).child("run"), scale_places.EMBEDDINGS, layout)
    vectors = read_rows(embeddings.reference)
    shuffled = np.random.default_rng(0).permutation(layout.shard_of_place)
    assert shard_similarity(vectors, layout.shard_of_place) > shard_similarity(vectors, shuffled) + 0.1
    semi = layout.semi_positives("train")
    owner = np.repeat(np.arange(N), np.diff(semi.indptr))
    steps = np.round(np.abs(layout.position[owner] - layout.position[semi.indices]) / scale_places.TILE)
    assert steps.max() == 1
    assert np.diff(semi.indptr).max() == 3
    assert np.diff(semi.indptr).mean() > 2.8


def test_members_of_shards_are_read_once_into_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining parts would hold every column's values twice."""
    monkeypatch.setattr(index, "WHOLE_ROWS", 0)
    monkeypatch.setattr(scale_places, "ROW_GROUP", 1000)
    layout = scale_places.commit(Store.open(tmp_path), scale_places.Ground(40_000))
    tracemalloc.start()
    members = MemberTable.of(layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    images = len(members.crc32c)
    assert images == 80_000
    assert peak < 52 * images  # 30 an image, room for half as many facts, and what a row group takes


def test_needs_are_measured_first() -> None:
    assert with_needs(["loader"]) == ["visual", "plan", "loader"]
    assert with_needs(["gps", "open"]) == ["open", "gps"]


def test_growth_is_a_straight_line() -> None:
    assert exponent({1: 5.0, 10: 50.0, 100: 500.0}) == pytest.approx(1)
    assert exponent({1: 1.0, 4: 8.0}) == pytest.approx(1.5)
    assert slope({10: 120.0, 20: 140.0}) == pytest.approx(2)


def test_a_stage_that_fails_takes_those_that_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(home: Path, n: int, step: Step) -> dict[str, Any]:
        if (n, step.job) == (1000, "plan"):
            raise Failed("no room")
        return {"seconds": float(n), "most_bytes": 1e9, "beyond_bytes": 1e8, "cpu_seconds": n / 1e5}

    monkeypatch.setattr(scale, "job", job)
    measured, failed = measure(tmp_path, [1000, 2000], ["visual", "plan", "loader", "order"])
    assert failed == {"1000: plan": "no room"}
    assert set(measured[1000]) == {"make", "visual", "history", "order"}
    assert set(measured[2000]) == {"make", "visual", "history", "plan", "loader", "order"}
    made = scale.figures(measured)
    assert made["order_growth"]["value"] == pytest.approx(1)
    assert "plan_growth" not in made
    assert made["pairs_per_minute_and_core_2k"]["met"]
