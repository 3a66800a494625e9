"""Epochs prepared beside the training: the same batches whatever happens to the process that prepares them."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from geostream.errors import GeostreamError
from geostream.layout import list_layouts, open_layout
from geostream.runs import background, loop
from geostream.runs.background import Background
from geostream.runs.log import RunResult
from geostream.runs.loop import train
from geostream.runs.preparation import prepare, prepared
from geostream.runs.run import Run, run_folder
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints
from infra.process import end, spawn, wait_until
from tests.conftest import ROOT
from tests.helpers import tiny_layout
from tests.training.settings import TINY

SETTINGS = TINY.changed(mining_lag=1, mine_every=1, epochs=4, recluster_below=100.0, hardness=100.0, evaluate_every=4)


def store_in(folder: Path) -> Store:
    store = Store.open(folder)
    tiny_layout(store, name="base", places=24, test_places=8, views=2, view_size=(32, 64))
    return store


def trained(store: Store, settings: TrainSettings = SETTINGS) -> RunResult:
    return train(store, open_layout(store, "tiny", "base"), "one", settings)


def weights(store: Store) -> str:
    run = run_folder(store, "tiny", "one")
    return hashlib.sha256(run.read(f"checkpoints/{list_checkpoints(run)[-1]}/model.safetensors")).hexdigest()


def told(result: RunResult) -> list[Any]:
    """What must be the same however long each stage took, and wherever it was done."""
    return [result.evaluations[-1]["r1"], *[(p["epoch"], p["hash"], p["source"]) for p in result.plans], *[
        (r["epoch"], r["layout"], r["score_before"], r["score_after"]) for r in result.reclusterings
    ]]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, RunResult]:
    """A run that nothing happened to."""
    store = store_in(tmp_path_factory.mktemp("whole"))
    return store, trained(store)


def same(store: Store, result: RunResult, whole: tuple[Store, RunResult]) -> None:
    assert told(result) == told(whole[1])
    assert weights(store) == weights(whole[0])


def test_what_happens_beside_the_training(whole: tuple[Store, RunResult]) -> None:
    store, result = whole
    assert [plan["source"] for plan in result.plans] == ["gps", "gps", "visual", "visual"]
    graphs = [Run.open(store, open_layout(store, "tiny", "base"), "one").plan(epoch, None).graph for epoch in (3, 4)]
    assert graphs == ["neighbours/visual-epoch-0001.zarr", "neighbours/visual-epoch-0002.zarr"]
    assert [row["epoch"] for row in result.reclusterings] == [3, 4]
    assert list_layouts(store, "tiny") == ["base", "base-g1", "base-g2"]
    beside = {stage for stage, seconds in result.beside.items() if seconds}
    assert beside == {"embed", "mine", "plan", "recluster"}
    trainer = {stage for stage, seconds in result.seconds.items() if seconds}
    assert trainer <= {"plan", "wait", "train", "evaluate"} and result.seconds["wait"] > 0


@pytest.mark.slow
def test_no_background_gives_the_same(
    tmp_path: Path, whole: tuple[Store, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared by the trainer itself, one after the other."""
    monkeypatch.setattr(loop.Trainer, "_prepare_beside", lambda *_: None)
    store = store_in(tmp_path)
    same(store, trained(store), whole)


def when_asked(monkeypatch: pytest.MonkeyPatch, epoch: int, do: Callable[[psutil.Process], None]) -> None:
    """Do something to the process when it is first asked for an epoch."""
    start = Background.start
    done: list[int] = []

    def started(self: Background, number: int) -> None:
        start(self, number)
        if number == epoch and not done:
            done.append(number)
            assert self._process is not None
            do(psutil.Process(self._process.pid))

    monkeypatch.setattr(Background, "start", started)


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again(
    tmp_path: Path, whole: tuple[Store, RunResult], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    when_asked(monkeypatch, 3, lambda process: process.kill())
    store = store_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        same(store, trained(store), whole)
    assert "epoch 3" in caplog.text and "signal 9" in caplog.text


@pytest.mark.slow
def test_a_process_that_is_stuck_is_started_again(
    tmp_path: Path, whole: tuple[Store, RunResult], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "SILENT", 15)
    when_asked(monkeypatch, 4, lambda process: process.suspend())
    store = store_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        same(store, trained(store), whole)
    assert "epoch 4" in caplog.text


def test_a_process_that_dies_each_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PROGRAM", ("-c", "import sys; sys.exit('no memory for this')"))
    store = store_in(tmp_path)
    with pytest.raises(GeostreamError, match=r"epoch 2.*exit code 1.*no memory for this"):
        trained(store)


@pytest.mark.slow
def test_an_unreachable_scheduler_is_named(tmp_path: Path) -> None:
    """And the run goes on where it stood, once there is one, or none is asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    store = store_in(tmp_path)
    with pytest.raises(GeostreamError, match=url):
        train(store, open_layout(store, "tiny", "base"), "one", SETTINGS.changed(epochs=3), cluster=url)
    result = trained(store, SETTINGS.changed(epochs=3))
    assert result.epochs == 3 and result.plans[-1]["source"] == "visual"


@pytest.mark.slow
def test_a_graph_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.write("tiny/runs/one/neighbours/visual-epoch-0001.zarr", b"a file where the graph's folder is to be")
    with pytest.raises(GeostreamError, match=r"epoch 3.*visual-epoch-0001"):
        trained(store)


def test_a_run_that_was_taken_over_is_not_written_into(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    run = Run(store, open_layout(store, "tiny", "base"), "one")
    run.settings = SETTINGS
    with run.hold():
        run.hold_by(run.lease + 1)
        with pytest.raises(GeostreamError, match="taken over"):
            prepare(run, 1)
    assert prepared(run, 1) is None and not run.folder.exists("plans/epoch-0001.json")


def test_a_preparation_goes_on_where_it_stood(
    tmp_path: Path, whole: tuple[Store, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(shutil.copytree(whole[0].url, tmp_path / "copy"))
    run = Run(store, open_layout(store, "tiny", "base"), "one")  # on the layout of the epoch before
    log = run.preparation_log(3)
    before = log.records
    log.records = [record for record in before if record["stage"] in ("embed", "mine")]
    log.add(log.records[0])
    monkeypatch.setattr("geostream.runs.stages.mine", lambda *_: pytest.fail("mined twice"))
    prepare(run, 3)
    again = prepared(run, 3)
    assert again is not None and {r["stage"] for r in again} == {r["stage"] for r in before} - {"recluster"}
    assert [r["hash"] for r in again if r["stage"] == "plan"] == [r["hash"] for r in before if r["stage"] == "plan"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [20, 30, 34])  # of 12 an epoch; the last epoch has none after it
def test_a_killed_trainer_takes_its_process_along(tmp_path: Path, whole: tuple[Store, RunResult], step: int) -> None:
    """While it prepares an epoch; and the run goes on to the same weights."""
    store = store_in(tmp_path / "store")
    command = [
        sys.executable,
        "-m",
        "tests.runs.run_program",
        store.url,
        SETTINGS.model_dump_json(),
        str(step),
        "never",
    ]
    trainer = spawn(command, environment=dict(os.environ), log=tmp_path / "log", folder=ROOT)
    log = Run(store, open_layout(store, "tiny", "base"), "one")
    assert wait_until(lambda: log.preparation_log(step // 12 + 2).records != [], trainer, "the background", 60) is None
    [helper] = [p for p in psutil.Process(trainer.pid).children() if "background_process" in " ".join(p.cmdline())]
    os.kill(trainer.pid, signal.SIGKILL)
    end(trainer)
    deadline = time.monotonic() + 20
    while helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it outlives its trainer"
        time.sleep(0.1)
    same(store, trained(store), whole)
