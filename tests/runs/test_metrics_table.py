"""Which metrics a record of the log becomes."""

from __future__ import annotations

import math
from typing import Any

from geostream.runs.metrics.table import METRICS, Reading, readings
from tests.conftest import ROOT

STREAM = {
    "bytes_fetched": 300,
    "bytes_used": 200,
    "requests": 4,
    "retries": {"timeout": 2, "HTTP 503": 1},
    "replaced": [],
}
NEAR = {"protocol": "within-5m", "direction": "view→tile", "r1": 0.75, "queries": 8, "gallery": 9}


def record(stage: str, **measured: Any) -> dict[str, Any]:
    return {"stage": stage, "epoch": 3, "seconds": 10.0, "started": 1e9} | measured


def values(of: dict[str, Any]) -> dict[tuple[str, ...], float]:
    return {(one.metric.name, *one.attributes.values()): one.value for one in readings(of)}


def test_an_epoch_under_way_and_a_whole_one_give_the_same_metrics() -> None:
    measured = {"loss": 1.5, "pairs": 48, "pairs_per_second": 4.8, "wait_share": 0.25, "step": 12, "stream": STREAM}
    assert values(record("progress", **measured)) == values(record("train", **measured))
    assert values(record("train", **measured)) == {
        ("geostream.stage.duration", "train", "false"): 10.0,
        ("geostream.train.epoch",): 3,
        ("geostream.train.step",): 12,
        ("geostream.train.pairs",): 48,
        ("geostream.train.throughput",): 4.8,
        ("geostream.train.loss",): 1.5,
        ("geostream.train.waiting",): 0.25,
        ("geostream.loader.io",): 300,
        ("geostream.loader.used",): 200,
        ("geostream.loader.reads",): 4,
        ("geostream.loader.retries", "timeout"): 2,
        ("geostream.loader.retries", "HTTP 503"): 1,
    }


def test_each_protocol_has_its_recalls() -> None:
    found = values(record("evaluate", r1=0.5, r5=0.75, hit_rate=0.625, queries=8, gallery=9, others=[NEAR]))
    assert found[("geostream.evaluate.r1", "paired", "view→tile")] == 0.5
    assert found[("geostream.evaluate.hit_rate", "paired", "view→tile")] == 0.625
    assert found[("geostream.evaluate.r1", "within-5m", "view→tile")] == 0.75
    assert ("geostream.evaluate.r5", "within-5m", "view→tile") not in found


def test_what_passes_beside_the_training_is_told_apart() -> None:
    assert values(record("mine", beside=True)) == {("geostream.stage.duration", "mine", "true"): 10.0}


def test_what_is_no_number_is_left_out() -> None:
    found = list(readings(record("plan", hardness_score=None, overlap=math.nan, resident_share="?")))
    assert [one.metric.name for one in found] == ["geostream.stage.duration"]


def test_a_decision_is_a_number() -> None:
    assert values(record("compare", promotes=False, r1=0.5, r1_before=0.75)) == {
        ("geostream.compare.promoted",): 0.0,
        ("geostream.compare.r1",): 0.5,
        ("geostream.compare.r1_before",): 0.75,
    }


def test_names_are_unique_and_in_the_documentation() -> None:
    names = [metric.name for metric in METRICS]
    told = (ROOT / "docs" / "operations.md").read_text()
    assert len(set(names)) == len(names)
    assert not [name for name in names if f"`{name}`" not in told]


def test_a_reading_of_every_metric_is_a_float() -> None:
    assert all(isinstance(one, Reading) and isinstance(one.value, float | int) for one in readings(record("train")))
