"""A run killed within an epoch goes on within it, and ends as one that was never killed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from geostream.errors import BadInput, StaleArtefact, StoreError
from geostream.layout import open_layout
from geostream.runs import loop as trainer
from geostream.runs.log import Record
from geostream.runs.loop import train
from geostream.runs.run import Run, run_folder
from geostream.runs.stages import load_trained
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training import checkpoint_files
from geostream.training.checkpoint import save_checkpoint
from geostream.training.checkpoint_files import FOLDER, Position, drop_checkpoint, list_checkpoints, read_position
from geostream.training.step import TrainStep
from infra.process import end, spawn, wait_until
from tests.conftest import ROOT
from tests.helpers import tiny_layout
from tests.training.settings import TINY

# drop_path: the network draws from torch's generator in every step.
SETTINGS = TINY.changed(epochs=3, checkpoint_every=2, model_options={"drop_path_rate": 0.3})
BATCHES = 12  # of an epoch: 48 pairs, 4 in each


@dataclass(frozen=True)
class Trial:
    """A run on a layout of its own; the layouts of all are equal."""

    store: Store
    settings: TrainSettings = SETTINGS

    @classmethod
    def on(cls, folder: Path, settings: TrainSettings = SETTINGS) -> Trial:
        store = Store.open(folder)
        tiny_layout(store, places=24, test_places=8, views=2, view_size=(32, 64))
        return cls(store, settings)

    @property
    def folder(self) -> Store:
        return run_folder(self.store, "tiny", "one")

    @property
    def opened(self) -> Run:
        return Run.open(self.store, open_layout(self.store), "one")

    def train(self, **settings: Any) -> list[Record]:
        """To the end; the records of the epochs' training."""
        made = self.settings.changed(**settings)
        return train(self.store, open_layout(self.store), "one", made).training

    def checkpoints(self) -> list[tuple[str, Position]]:
        return [(name, read_position(self.folder, name)) for name in list_checkpoints(self.folder)]

    def tensors(self) -> dict[str, str]:
        """sha256 of all that is stored of checkpoints but their positions, which hold times, by path."""
        paths = [info.path for info in self.folder.list(FOLDER) if not info.path.endswith("/state.json")]
        return {path: hashlib.sha256(self.folder.read(path)).hexdigest() for path in paths}

    def r1(self) -> list[float]:
        return [row["r1"] for row in self.folder.read_json("evaluation.json")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, list[Record]]:
    """A run that was never cut off, and its records."""
    run = Trial.on(tmp_path_factory.mktemp("whole"))
    return run, run.train()


def assert_same_end(run: Trial, records: list[Record], whole: tuple[Trial, list[Record]]) -> None:
    """The same weights and optimizer after every epoch, the same losses, every pair counted once, nothing left over."""
    expected, expected_records = whole
    assert [position.finished for _, position in run.checkpoints()] == [True] * SETTINGS.optim.epochs
    assert run.tensors() == expected.tensors()
    for record, expected_record in zip(records, expected_records, strict=True):
        for name in ("epoch", "step", "loss", "pairs", "temperature"):
            assert record[name] == expected_record[name], (record["epoch"], name)
        assert record["pairs"] == BATCHES * SETTINGS.optim.batch_size
    assert run.r1() == expected.r1()


def test_checkpoints_within_an_epoch_change_nothing(whole: tuple[Trial, list[Record]], tmp_path: Path) -> None:
    run = Trial.on(tmp_path)
    assert_same_end(run, run.train(checkpoint_every=250), whole)


@pytest.mark.parametrize(("epoch", "workers", "then"), [(2, 0, 1), pytest.param(1, 1, 0, marks=pytest.mark.slow)])
def test_killed_within_an_epoch(
    whole: tuple[Trial, list[Record]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    epoch: int,
    workers: int,
    then: int,
) -> None:
    """Killed with so many loader workers, it goes on with another number of them."""
    run = Trial.on(tmp_path / "store")
    before = (epoch - 1) * BATCHES
    first = before + random.Random(epoch).choice([2, 4, 6])  # of the epoch's checkpoints
    settings = run.settings.changed(workers=workers)
    program = [sys.executable, str(Path(__file__).with_name("run_program.py"))]
    command = [*program, run.store.url, settings.model_dump_json(), str(first + 3), str(tmp_path / "never")]
    child = spawn(command, environment={**os.environ, "PYTHONPATH": str(ROOT)}, log=tmp_path / "log")
    try:
        newest = f"{FOLDER}/step-{first:08d}/state.json"
        problem = wait_until(lambda: run.folder.exists(newest), child, "the run", timeout=120)
        assert problem is None, f"{problem}: {child.log_tail(40)}"
        killed = psutil.Process(child.pid)
        killed.kill()
        killed.wait(30)  # a process that is ending still counts as the run's holder
    finally:
        end(child)

    name, cut = run.checkpoints()[-1]
    assert first <= cut.step <= first + 3 and (cut.epoch, cut.cursor, cut.finished) == (epoch, cut.step - before, False)
    assert cut.outcome is not None and cut.outcome["pairs"] == cut.cursor * SETTINGS.optim.batch_size
    if epoch == 1:
        with pytest.raises(BadInput, match="checkpoint"):
            load_trained(run.opened)
    else:
        assert load_trained(run.opened).epoch == epoch - 1
    with caplog.at_level(logging.INFO, logger="geostream"):
        records = run.train(workers=then)
    assert f"{run.folder.url}: goes on in epoch {epoch}, batch {cut.cursor}" in caplog.messages
    assert_same_end(run, records, whole)
    streams = [session[epoch - 1]["stream"] for session in (records, whole[1])]
    assert streams[0]["bytes_used"] > streams[1]["bytes_used"]  # of both sessions, which shared members
    assert name not in list_checkpoints(run.folder)


class Killed(BaseException):
    """Instead of SIGKILL, where the place is what matters."""


def kill_at_drop(monkeypatch: pytest.MonkeyPatch, run: Trial, drop: int, half: bool = False) -> None:
    """Train until a checkpoint is dropped for the ``drop``-th time, and end before, or in the midst of it."""
    drops = 0

    def counted(folder: Store, name: str) -> None:
        nonlocal drops
        drops += 1
        if drops == drop:
            if half:
                folder.delete(f"{FOLDER}/{name}/state.json")
                folder.delete(f"{FOLDER}/{name}/optimizer.safetensors")
            raise Killed
        drop_checkpoint(folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "drop_checkpoint", counted)
        with pytest.raises(Killed):
            run.train()


# An epoch of 12 batches has checkpoints at 2, 4, … 10 and at its end: drops 1 to 4 are within it, drop 5 is at its end.
@pytest.mark.parametrize(
    ("drop", "there"),
    [
        (3, ["step-00000006", "step-00000008"]),
        pytest.param(5, ["step-00000010", "step-00000012"], marks=pytest.mark.slow),
        pytest.param(15, ["step-00000012", "step-00000024", "step-00000034", "step-00000036"], marks=pytest.mark.slow),
    ],
    ids=["within an epoch", "at an epoch's end", "at the run's end"],
)
def test_killed_before_the_checkpoint_before_was_dropped(
    whole: tuple[Trial, list[Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: int, there: list[str]
) -> None:
    run = Trial.on(tmp_path)
    kill_at_drop(monkeypatch, run, drop)
    assert list_checkpoints(run.folder) == there
    assert_same_end(run, run.train(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("drop", [3, 5])
def test_killed_while_a_checkpoint_was_dropped(
    whole: tuple[Trial, list[Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: int
) -> None:
    run = Trial.on(tmp_path)
    kill_at_drop(monkeypatch, run, drop, half=True)
    assert run.folder.exists(f"{FOLDER}/step-{2 * drop:08d}/model.safetensors")
    assert_same_end(run, run.train(), whole)


@pytest.mark.slow
def test_killed_while_a_checkpoint_was_written(
    whole: tuple[Trial, list[Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not whole is not there; how often it is written may be another number when it goes on."""
    run = Trial.on(tmp_path)
    write_json = Store.write_json

    def unwritten(store: Store, path: str, value: Any, *, if_absent: bool = False) -> None:
        if store.url.endswith("step-00000016"):
            raise Killed
        write_json(store, path, value, if_absent=if_absent)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_json", unwritten)
        with pytest.raises(Killed):
            run.train()
    assert run.checkpoints()[-1][1].cursor == 2
    assert_same_end(run, run.train(checkpoint_every=3), whole)


def test_a_record_of_an_epoch_without_its_checkpoint_is_replaced(
    whole: tuple[Trial, list[Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between an epoch's record and its last checkpoint: its last batches are trained, and told, again."""
    run = Trial.on(tmp_path)

    def unsaved(folder: Store, train_step: TrainStep, position: Position) -> str:
        if position.epoch == 2 and position.finished:
            raise Killed
        return save_checkpoint(folder, train_step, position)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", unsaved)
        with pytest.raises(Killed):
            run.train()
    assert run.checkpoints()[-1][1].cursor == 10
    lines = [json.loads(line) for line in run.folder.read("metrics.jsonl").splitlines()]
    assert [line["epoch"] for line in lines if line["stage"] == "train"] == [1, 2]
    assert_same_end(run, run.train(), whole)


def test_a_plan_made_anew_in_mid_epoch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trial.on(tmp_path)
    kill_at_drop(monkeypatch, run, 3)
    facts = run.folder.read_json(f"{FOLDER}/step-00000008/state.json")
    facts["position"]["plan"] = "0" * 64
    run.folder.write_json(f"{FOLDER}/step-00000008/state.json", facts)
    with pytest.raises(StaleArtefact, match="plan 000000000000"):
        run.train()


def test_what_is_damaged_is_passed_over(
    whole: tuple[Trial, list[Record]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bit of the newest checkpoint is another, and its predecessor lacks an object; then none is whole."""
    run = Trial.on(tmp_path)
    run.train()
    names = list_checkpoints(run.folder)
    data = bytearray(run.folder.read(f"{FOLDER}/{names[2]}/model.safetensors"))
    data[len(data) // 2] ^= 1
    run.folder.write(f"{FOLDER}/{names[2]}/model.safetensors", bytes(data))
    run.folder.delete(f"{FOLDER}/{names[1]}/optimizer.safetensors")
    with caplog.at_level(logging.INFO, logger="geostream"):
        records = run.train()
    told = [message for message in caplog.messages if "older checkpoint" in message]
    assert [name in message for name, message in zip((names[2], names[1]), told, strict=True)] == [True, True]
    assert f"{run.folder.url}: goes on from epoch 1" in caplog.messages
    assert_same_end(run, records, whole)
    for name in names:
        run.folder.write(f"{FOLDER}/{name}/state.json", b"{")
    with pytest.raises(StoreError, match="all of its checkpoints"):
        run.train()


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    settings = SETTINGS.changed(epochs=5, keep_checkpoints=1, evaluate_every=1, checkpoint_every=5)
    run = Trial.on(tmp_path, settings)
    seen: list[list[str]] = []
    train(
        run.store, open_layout(run.store), "one", settings, on_record=lambda _: seen.append(run.folder.folders(FOLDER))
    )
    best = max(run.folder.read_json("evaluation.json"), key=lambda row: (row["r1"], row["epoch"]))
    name = f"step-{best['epoch'] * BATCHES:08d}"
    assert run.folder.read_json("best.json") == {"checkpoint": name, "epoch": best["epoch"], "r1": best["r1"]}
    assert run.folder.folders(FOLDER) == sorted({name, f"step-{5 * BATCHES:08d}"})
    # The newest, which may be within an epoch, the newest of a whole one, the best; these may be one.
    assert 2 <= max(map(len, seen)) <= 3
    trained = load_trained(run.opened, "best")
    assert (trained.checkpoint, trained.epoch) == (name, best["epoch"])
