"""The curves for TensorBoard: TensorBoard's own reader finds in them what the log says, once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from geostream.runs.log import RunLog
from geostream.runs.run import LOG
from geostream.runs.tensorboard import EVENTS, curves, event_file, write_events
from geostream.store import Store

NEAR = {"protocol": "within-5m", "direction": "view→tile", "r1": 0.75, "hit_rate": 0.8, "queries": 8, "gallery": 9}


def record(stage: str, epoch: int, **measured: Any) -> dict[str, Any]:
    return {"stage": stage, "epoch": epoch, "seconds": 10.0} | measured


def train(epoch: int, first: int) -> dict[str, Any]:
    return record(
        "train",
        epoch,
        step=first + 4,
        loss=2.0 / epoch,
        temperature=0.05,
        pairs_per_second=100.0,
        wait_share=0.25,
        stream={"bytes_fetched": 300, "bytes_used": 200},
        curve=[[first + 2, 1.5, 1e-3], [first + 4, 1.25, 5e-4, 1024.0]],
    )


RECORDS = [
    record("plan", 1, hardness_score=None, overlap=None, resident_share=0.5),
    record("progress", 1, loss=2.5, curve=[[2, 1.5, 1e-3]]),
    train(1, 0),
    record("evaluate", 1, r1=0.5, r5=0.75, r10=1.0, r1pct=0.5, hit_rate=0.625, queries=8, gallery=9, others=[NEAR]),
    record("plan", 2, hardness_score=0.875, overlap=0.25, resident_share=0.5),
    train(2, 4),
]


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def test_figures_on_the_ground_are_curves() -> None:
    found = curves([record("evaluate", 2, r1=0.5, metres={"r1_within_25m": 0.25, "median_metres": 31.5})])
    assert [point.value for point in found["test on the ground/r1_within_25m"]] == [0.25]
    assert [(point.step, point.value) for point in found["test on the ground/median_metres"]] == [(2, 31.5)]


def test_tensorboard_reads_what_the_log_says(tmp_path: Path) -> None:
    write_events(Store.open(tmp_path), RECORDS)
    found = read_back(tmp_path / "tensorboard")
    assert found["step/loss"] == [(2, 1.5), (4, 1.25), (6, 1.5), (8, 1.25)]
    steps, rates = zip(*found["step/learning rate"], strict=True)
    assert steps == (2, 4, 6, 8) and rates == pytest.approx((1e-3, 5e-4, 1e-3, 5e-4))
    assert found["step/gradient scale"] == [(4, 1024.0), (8, 1024.0)]
    assert found["epoch/loss"] == [(1, 2.0), (2, 1.0)]
    epochs, temperatures = zip(*found["epoch/temperature"], strict=True)
    assert epochs == (1, 2) and temperatures == pytest.approx((0.05, 0.05))
    assert found["reading/pairs per second"] == [(1, 100), (2, 100)]
    assert found["reading/share of time waiting"] == [(1, 0.25), (2, 0.25)]
    assert found["reading/bytes read per byte used"] == [(1, 1.5), (2, 1.5)]
    assert found["plan/hardness score"] == [(2, 0.875)] and found["plan/overlap"] == [(2, 0.25)]
    assert found["plan/resident share"] == [(1, 0.5), (2, 0.5)]
    assert found["test paired view→tile/r1"] == [(1, 0.5)] and found["test paired view→tile/hit_rate"] == [(1, 0.625)]
    assert found["test within-5m view→tile/r1"] == [(1, 0.75)]
    assert "test within-5m view→tile/r5" not in found and len(found) == 11 + 5 + 2


def test_seconds_are_those_of_the_run_and_progress_is_not_counted_twice() -> None:
    found = curves(RECORDS)
    assert [point.seconds for point in found["step/loss"]] == [15.0, 20.0, 45.0, 50.0]
    assert [point.seconds for point in found["plan/resident share"]] == [10.0, 40.0]


def test_an_epoch_done_again_is_in_it_once_and_its_last_word_counts(s3_store: Store, tmp_path: Path) -> None:
    run = s3_store
    log = RunLog(run, LOG)
    for again in (False, True):
        for one in RECORDS:
            measured = {name: value for name, value in one.items() if name not in ("stage", "epoch", "seconds")}
            if again and one["stage"] == "train":
                measured["loss"] = 0.125
            log.append(one["stage"], one["epoch"], one["seconds"], **measured)
            write_events(run, log.records)
    assert [info.path for info in run.child("tensorboard").list()] == [EVENTS.removeprefix("tensorboard/")]
    (tmp_path / "events.out.tfevents.copy").write_bytes(run.read(EVENTS))
    found = read_back(tmp_path)
    assert found["epoch/loss"] == [(1, 0.125), (2, 0.125)] and len(found["step/loss"]) == 4


def test_the_same_log_gives_the_same_bytes_and_an_empty_one_no_file(tmp_path: Path) -> None:
    assert event_file(curves(RECORDS)) == event_file(curves(RECORDS))
    write_events(Store.open(tmp_path), [record("embed", 1, queries=5)])
    assert not (tmp_path / EVENTS).exists()


def test_values_that_are_no_numbers_are_left_out() -> None:
    found = curves([train(1, 0) | {"loss": float("nan"), "temperature": None, "stream": None, "curve": None}])
    assert set(found) == {"reading/pairs per second", "reading/share of time waiting"}


def test_a_log_that_grows_makes_a_file_that_grows_under_its_reader(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    write_events(run, RECORDS[:3])
    begun = (tmp_path / EVENTS).read_bytes()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("epoch/loss")] == [1]
    write_events(run, RECORDS)
    assert (tmp_path / EVENTS).read_bytes().startswith(begun)
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("epoch/loss")] == [1, 2]


def test_importing_it_does_not_import_tensorboard() -> None:
    code = "import sys, geostream.runs.tensorboard; sys.exit('tensorboard.compat' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
