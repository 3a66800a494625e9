"""Metrics of a run where they arrive: on an endpoint that is scraped, and at a collector; and what goes wrong there."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flows.shard import write_layout
from geostream.layout import open_layout
from geostream.runs.log import Record, RunLog
from geostream.runs.loop import train
from geostream.runs.metrics import otel
from geostream.runs.metrics.export import exporting, push, wanted
from geostream.runs.promotion import promote_if_no_worse
from geostream.runs.run import LOG, run_folder
from geostream.store import Store
from infra.process import LOOPBACK
from sharding import ShardOptions, read_places
from tests.conftest import ROOT
from tests.helpers import tiny_layout
from tests.runs.collector import Collector, collector
from tests.runs.small_runs import run_with_checkpoint
from tests.training.ranks import RUN_PROGRAM, ended, start_ranks
from tests.training.settings import TINY
from tests.vigor_raw import TWO, write_city

SETTINGS = TINY.changed(epochs=2, checkpoint_every=5, recluster_below=0.0)
WHERE = {"dataset": "tiny", "run": "one", "layout": "base"}


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collector() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        yield running


def free_port() -> int:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return int(free.getsockname()[1])


def endpoint(monkeypatch: pytest.MonkeyPatch, port: int | str) -> str:
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_HOST", LOOPBACK)
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", str(port))
    return f"http://{LOOPBACK}:{port}/metrics"


def scraped(url: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """What Prometheus's own parser finds: by name, the labels and value of each sample."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    with urllib.request.urlopen(url, timeout=10) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def store_in(folder: Path) -> Store:
    store = Store.open(folder)
    tiny_layout(store, name="base", places=24, test_places=8, views=2, view_size=(32, 64))
    return store


def progress(pairs: int, **more: Any) -> Record:
    return {"stage": "progress", "epoch": 1, "seconds": pairs / 10, "pairs": pairs, "loss": 1.5, **more}


def test_a_run_is_scraped_while_it_trains_and_pushed_at_its_end(
    tmp_path: Path, pushed: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp,prometheus")
    url = endpoint(monkeypatch, free_port())
    scrapes = {}

    def scrape(record: Record) -> None:
        if record["stage"] == "train":
            scrapes[record["epoch"]] = scraped(url)

    store = store_in(tmp_path)
    result = train(store, open_layout(store), "one", SETTINGS, on_record=scrape)
    first, second = scrapes[1], scrapes[2]
    assert first["geostream_train_pairs_total"] == [(WHERE, 48)] and second["geostream_train_pairs_total"] == [
        (WHERE, 96)
    ]
    assert first["geostream_train_epoch"] == [(WHERE, 1)] and second["geostream_train_step"] == [(WHERE, 24)]
    assert second["geostream_train_loss"] == [(WHERE, result.training[1]["loss"])]
    assert second["geostream_train_throughput_per_second"] == [(WHERE, result.training[1]["pairs_per_second"])]
    assert second["geostream_train_waiting"] == [(WHERE, result.training[1]["wait_share"])]
    assert second["geostream_plan_hardness"] == [(WHERE, result.plans[1]["hardness_score"])]
    [(labels, seconds)] = [
        one for one in second["geostream_stage_duration_seconds_total"] if one[0]["stage"] == "train"
    ]
    assert seconds == pytest.approx(result.seconds["train"]) and labels == WHERE | {"stage": "train", "beside": "false"}
    assert second["geostream_loader_io_bytes_total"] == [(WHERE, result.stream["bytes_fetched"])]
    with pytest.raises(OSError, match="refused"):
        scraped(url)

    last = pushed.values()
    assert last[("geostream.train.pairs",)] == 96 and last[("geostream.train.epoch",)] == 2
    assert last[("geostream.loader.reads",)] == result.stream["requests"]
    assert last[("geostream.loader.held_peak",)] > 0
    [evaluation] = result.evaluations
    assert last[("geostream.evaluate.r1", "view→tile", "paired")] == evaluation["r1"]
    assert last[("geostream.evaluate.r1pct", "view→tile", "paired")] == evaluation["r1pct"]
    stages = {name[-1] for name in last if name[0] == "geostream.stage.duration"}
    assert stages == {"plan", "train", "embed", "mine", "evaluate"}
    resource = {one.key: one.value.string_value for one in pushed.pushed[-1].resource_metrics[0].resource.attributes}
    assert resource["service.name"] == "geostream" and resource["service.version"]


def test_what_grows_begins_at_zero_in_each_session(pushed: Collector) -> None:
    """A counter that went on from the log would jump when a killed run has gone back to its checkpoint."""
    known = [progress(40), {"stage": "evaluate", "epoch": 0, "seconds": 2.0, "r1": 0.5}]
    layout = "base"
    with exporting(lambda: WHERE | {"layout": layout}, known) as tell:
        for pairs in (60, 60, 90):
            tell(progress(pairs))
        tell(progress(96, stream={"retries": {"timeout": 2}}) | {"stage": "train"})
        layout = "base-g1"
        tell(progress(48) | {"epoch": 2})
    found = pushed.values()
    assert found[("geostream.evaluate.r1", "view→tile", "paired")] == 0.5 and found[("geostream.train.epoch",)] == 2
    assert found[("geostream.loader.retries", "timeout")] == 2
    assert pushed.points("geostream.train.loss") == [(WHERE | {"layout": "base-g1"}, 1.5)]
    by_layout = {where["layout"]: value for where, value in pushed.points("geostream.train.pairs")}
    assert by_layout == {"base": 56, "base-g1": 48}


def test_a_collector_that_is_away_is_one_warning_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://{LOOPBACK}:{free_port()}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    with caplog.at_level(logging.WARNING), exporting(lambda: WHERE) as tell:
        for pairs in range(1, 8):
            tell(progress(pairs))
            time.sleep(0.1)
    [line] = caplog.messages
    assert url in line


def test_a_collector_that_does_not_answer_holds_up_the_end_for_a_short_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otel, "FLUSH_TIMEOUT", 300.0)
    monkeypatch.setattr(otel, "END_TIMEOUT", 0.1)
    with socket.create_server((LOOPBACK, 0)) as silent, caplog.at_level(logging.WARNING):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{LOOPBACK}:{silent.getsockname()[1]}")
        with exporting(lambda: WHERE) as tell:
            tell(progress(1))
            ended = time.monotonic()
        assert time.monotonic() - ended < 2
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("port", ["taken", "none"])
def test_an_endpoint_that_cannot_be_opened_is_one_warning(
    port: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    with socket.create_server((LOOPBACK, 0)) as taken, caplog.at_level(logging.WARNING):
        number = taken.getsockname()[1]
        endpoint(monkeypatch, number if port == "taken" else port)
        with exporting(lambda: WHERE) as tell:
            tell(progress(1))
    [line] = caplog.messages
    assert f"{LOOPBACK}:{number}" in line if port == "taken" else "none" in line


@pytest.mark.parametrize(
    ("variables", "to"),
    [
        ({}, set()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, set()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, {"otlp"}),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_METRICS_EXPORTER": "none"}, set()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, set()),
        ({"OTEL_METRICS_EXPORTER": "prometheus, otlp"}, {"otlp", "prometheus"}),
    ],
)
def test_the_standard_variables_say_where_to(
    variables: dict[str, str], to: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wanted() == to


def test_an_unknown_exporter_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "console,otlp")
    assert wanted() == {"otlp"} and "not to console" in caplog.text


def test_nothing_is_imported_unless_it_is_asked_for() -> None:
    code = "import sys; from geostream.runs.metrics.export import exporting, push; push({'stage': 'shard'})\n"
    code += "with exporting(dict) as tell: tell({'stage': 'plan'})\nsys.exit('opentelemetry' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_decision_is_pushed(tmp_path: Path, pushed: Collector) -> None:
    store = Store.open(tmp_path)
    layout = tiny_layout(store, places=4, test_places=8)
    run, _ = run_with_checkpoint(store, layout, "first", seed=1)
    promote_if_no_worse(run)
    assert pushed.values() == {("geostream.compare.promoted",): 1.0}
    assert pushed.points("geostream.compare.promoted")[0][0]["run"] == "first"


def test_a_sharding_is_pushed(tmp_path: Path, pushed: Collector) -> None:
    for city in ("NewYork", "Chicago"):
        write_city(tmp_path / "raw", city)
    raw = read_places("vigor", tmp_path / "raw", **TWO)
    rules = {"remove_missing": False, "extend_test": False}
    report = write_layout.fn(raw, Store.open(tmp_path / "store"), "two", "base", ShardOptions(), 1, rules)
    found = pushed.values()
    assert found[("geostream.shard.places",)] == report.layout.n_places > 0 and found[("geostream.shard.broken",)] == 0
    assert found[("geostream.shard.written",)] == report.bytes_written > 0
    assert [where for where, _ in pushed.points("geostream.shard.views")] == [{"dataset": "two", "layout": "base"}]


def test_without_a_collector_nothing_is_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    monkeypatch.setattr(otel, "Export", lambda *_: pytest.fail("an endpoint for work that is over"))
    push({"stage": "shard"}, dataset="two")


@pytest.mark.slow
def test_of_two_ranks_the_main_one_exports_what_both_have_done(
    tmp_path: Path, pushed: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp,prometheus")
    endpoint(monkeypatch, free_port())
    store = store_in(tmp_path)
    settings = TINY.changed(epochs=1, step_batches=2, strategy="random").model_dump_json()
    codes, output = ended(start_ranks([RUN_PROGRAM, store.url, settings, "1000", "never"]))
    assert codes == [0, 0] and "metrics" not in "".join(output), output
    [row] = RunLog(run_folder(store, "tiny", "one"), LOG).of("train")
    found = pushed.values()
    assert found[("geostream.train.pairs",)] == 48 == row["pairs"]
    assert found[("geostream.loader.used",)] == row["stream"]["bytes_used"]
    assert len(pushed.pushed) == 1, "more than one rank pushes"


@pytest.mark.slow
def test_the_command_logs_a_line_of_json_a_stage(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    plain = TINY.changed(epochs=1)
    words = [word for name, value in plain.flat().items() for word in ("--set", f"{name}={json.dumps(value)}")]
    done = subprocess.run(
        [sys.executable, "-m", "geostream", "train", store.url, "--run", "one", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "GEOSTREAM_LOG": "json"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    records = {(line["stage"], line["epoch"]): line for line in lines if "stage" in line}
    assert {stage for stage, _ in records} >= {"plan", "train", "evaluate"}
    told = records[("train", 1)]
    [row] = RunLog(run_folder(store, "tiny", "one"), LOG).of("train")
    assert told["loss"] == row["loss"] and told["stream"]["requests"] == row["stream"]["requests"]
    assert "curve" not in told and "replaced" not in told["stream"]
