"""The run's log: survives being opened again, replaces what is done twice, and adds up to the result."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from geostream.errors import StoreError
from geostream.runs.log import RunLog, RunResult
from geostream.runs.run import LOG
from geostream.store import Store
from geostream.streaming.stats import Replaced, StreamStats


def stream(fetched: int, peak: int) -> dict[str, Any]:
    stats = StreamStats(bytes_fetched=fetched, bytes_used=fetched // 2, requests=3, peak_resident_bytes=peak)
    stats.retries["busy"] = 2
    stats.count_replaced(Replaced(step=4, pair="a view-00.jpg", member="tile.jpg", reason="torn", stand_in="b"))
    return stats.as_dict()


def test_a_stage_done_again_replaces_its_record(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    RunLog(run, LOG).append("train", 1, 2.0, loss=3.0)
    log = RunLog(run, LOG)
    log.append("plan", 2, 0.5)
    log.append("train", 1, 4.0, loss=2.5)
    began, ended = ([record.pop(name) for record in log.records] for name in ("started", "time"))
    assert all(isinstance(second, float) for second in began)
    times = [datetime.fromisoformat(time) for time in ended]
    assert all(abs(time - datetime.now(UTC)) < timedelta(minutes=1) for time in times)
    assert (
        [{k: v for k, v in record.items() if k not in ("started", "time")} for record in RunLog(run, LOG).records]
        == log.records
        == [
            {"stage": "plan", "epoch": 2, "seconds": 0.5},
            {"stage": "train", "epoch": 1, "seconds": 4.0, "loss": 2.5},
        ]
    )
    assert log.has("plan", 2) and not log.has("plan", 1) and not log.has("mine", 2)
    assert len(run.read("metrics.jsonl").splitlines()) == 2


def test_the_result_adds_up(tmp_path: Path) -> None:
    log = RunLog(Store.open(tmp_path), LOG)
    log.append("train", 2, 5.0, loss=1.0, stream=stream(200, 70))
    log.append("train", 1, 4.0, loss=2.0, stream=stream(100, 90))
    log.append("evaluate", 2, 1.0, r1=0.5)
    result = RunResult.of(str(tmp_path), log, already_finished=False)
    assert result.epochs == 2 and [row["loss"] for row in result.training] == [2.0, 1.0]
    whole = {"bytes_fetched": 300, "bytes_used": 150, "requests": 6, "peak_resident_bytes": 90, "replaced_pairs": 2}
    assert whole.items() <= result.stream.items() and result.stream["merged_read_bytes"] == 50
    assert result.stream["retries"] == {"busy": 4} and result.stream["replaced"][1]["pair"] == "a view-00.jpg"
    assert result.seconds == {
        "wait": 0,
        "plan": 0,
        "train": 9.0,
        "embed": 0,
        "mine": 0,
        "recluster": 0,
        "evaluate": 1.0,
    }
    assert result.evaluations == [{"epoch": 2, "seconds": 1.0, "r1": 0.5}]


def test_a_damaged_log_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "train"')
    with pytest.raises(StoreError, match=r"metrics.jsonl: damaged"):
        RunLog(Store.open(tmp_path), LOG)
