"""What runs did and take, and that of a run that is removed nothing foreign goes with it."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from geostream.errors import BadInput, StoreError
from geostream.report import report
from geostream.report.evaluation_page import evaluate_checkpoint
from geostream.runs.inventory import list_runs, prune_runs
from geostream.runs.lease import Lease
from geostream.runs.loop import train
from geostream.runs.retention import Rule
from geostream.runs.run import LOG, Run
from geostream.store import Store
from tests.command import refused, said
from tests.helpers import tiny_layout
from tests.runs.small_runs import write_models
from tests.training.settings import TINY

ALL = Rule(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a run that has everything a run can have: graphs, a generation, pages, a report."""
    store = Store.open(tmp_path_factory.mktemp("trained"))
    layout = tiny_layout(store, name="base", places=24, test_places=8, views=2, view_size=(32, 64))
    result = train(store, layout, "one", TINY.changed(recluster_below=100.0, hardness=100.0, epochs=2))
    run = Run.find(store, None, None, "one")
    report.publish(run, result, report.summarise(store.url, run.layout, result))
    evaluate_checkpoint(run, "test", None)
    return store


@pytest.fixture
def root(trained: Store, tmp_path: Path) -> Store:
    """A copy of it that a test may spoil."""
    shutil.copytree(trained.url, tmp_path / "store")
    return Store.open(tmp_path / "store")


def small(root: Store, name: str, days: float = 0) -> Store:
    """The folder of a run that was begun so many days ago, and did nothing more."""
    run = root.child("tiny", "runs", name)
    run.write_json("settings.json", TINY.model_dump())
    when = time.time() - 86400 * days
    os.utime(Path(run.url, "settings.json"), (when, when))
    return run


def test_a_run_is_described(trained: Store) -> None:
    [run] = list_runs(trained, "tiny")
    assert (run.name, run.layout, run.epochs, run.wanted, run.state) == ("one", "base-g1", 2, 2, "finished")
    assert run.r1 is not None and 0 <= run.r1 <= 1 and run.began is not None and run.ended is not None
    now = datetime.now(UTC)
    assert now - timedelta(hours=1) < run.began < run.ended < now
    objects = trained.list("tiny/runs/one")
    assert sum(run.bytes.values()) == sum(one.size for one in objects)
    weights = sum(one.size for one in objects if "/checkpoints/" in one.path)
    assert run.bytes["checkpoints"] == weights and min(run.bytes.values()) > 0


def test_states(root: Store) -> None:
    run = root.child("tiny", "runs", "one")
    small(root, "stopped")
    root.child("tiny", "runs", "parts").write("plans/epoch-0001.json", b"{}")
    with Lease(run):
        states = {one.name: one.state for one in list_runs(root, "tiny")}
    assert states == {"one": "training", "stopped": "stopped", "parts": "not begun"}


def test_a_log_without_times_is_read(root: Store) -> None:
    """As it was written before records had times."""
    run = root.child("tiny", "runs", "one")
    lines = run.read(LOG).decode().replace('"started"', '"x"').replace('"time"', '"y"')
    run.write(LOG, lines.encode())
    [found] = list_runs(root, "tiny")
    assert (found.epochs, found.state, found.began, found.ended) == (2, "finished", None, None)
    assert "finished" in said("runs", "show", root.url, "one")


def test_everything_of_a_run_goes_and_nothing_foreign(root: Store) -> None:
    run = root.child("tiny", "runs", "one")
    foreign = {"notes.txt", "checkpoints/step-00000012-kept/model.safetensors", "checkpoints/step-00000001/state.json"}
    foreign |= {"embeddings/epoch-0001.zarr/query/notes.md", "plans/mine.json"}
    for path in foreign:
        run.write(path, b"not the run's")
    kept = {one.path for one in root.list() if not one.path.startswith("tiny/runs/")}
    assert prune_runs(root, "tiny", ALL, dry_run=True)[0].left == tuple(sorted(foreign))
    size = sum(one.size for one in run.list() if one.path not in foreign)
    [gone] = prune_runs(root, "tiny", ALL)
    assert (gone.keep, gone.bytes, gone.left) == ("", size, tuple(sorted(foreign)))
    assert {one.path for one in run.list()} == foreign
    prune_runs(root, "tiny", ALL)
    assert {one.path for one in run.list()} == foreign
    assert {one.path for one in root.list() if not one.path.startswith("tiny/runs/")} == kept


@pytest.mark.parametrize("deletions", [0, 1, 9, -3, -2, -1])
def test_a_removal_cut_off_anywhere_is_finished_by_the_next(
    root: Store, deletions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a checkpoint stays, too, although what names the run's own may be gone already."""
    run = root.child("tiny", "runs", "one")
    run.write("checkpoints/step-00000001/state.json", b"not the run's")
    own = len(run.list()) - 1
    delete, left = Store.delete, [deletions if deletions >= 0 else own + deletions]

    def cut_off(self: Store, path: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        delete(self, path)

    monkeypatch.setattr(Lease, "__exit__", lambda self, *_: self._done.set())  # only the thread ends
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "delete", cut_off)
        prune_runs(root, "tiny", ALL)
    monkeypatch.undo()
    monkeypatch.setattr("geostream.runs.lease._lives", lambda _: False)  # the process that was killed
    prune_runs(root, "tiny", ALL)
    assert {one.path for one in run.list()} == {"checkpoints/step-00000001/state.json"}


def test_what_is_kept(root: Store) -> None:
    for name, days in (("old", 40), ("older", 50), ("oldest", 60), ("promoted", 70), ("before", 80)):
        small(root, name, days)
    held = small(root, "held", 90)
    models = root.child("tiny", "models")
    write_models(models, [("old", "x"), ("before", "x"), ("promoted", "x")], [1, 2, 3])
    rule = Rule(1, timedelta(days=30), frozenset({"older"}))
    with Lease(held):
        found = {one.name: one.keep for one in prune_runs(root, "tiny", rule)}
    assert "process" in found["held"] and "newest 1" in found["one"] and "named" in found["older"]
    assert "model 3" in found["promoted"] and "model 2" in found["before"]
    assert (found["old"], found["oldest"]) == ("", "")
    assert set(root.folders("tiny/runs")) == {"held", "one", "older", "promoted", "before"}
    with pytest.raises(BadInput, match="'?mistyped"):
        prune_runs(root, "tiny", Rule(0, named=frozenset({"mistyped"})))
    models.write("current.json", b"{")
    with pytest.raises(StoreError, match=r"models/current\.json"):
        prune_runs(root, "tiny", ALL)
    assert set(root.folders("tiny/runs")) == {"held", "one", "older", "promoted", "before"}


def test_the_commands(root: Store) -> None:
    small(root, "old", 40)
    shown = said("runs", "list", root.url)
    assert shown.index("old") < shown.index("base-g1") and "finished" in shown and "stopped" in shown
    shown = said("runs", "show", root.url, "one")
    assert "epochs" in shown and "recluster_below" in shown and "base-g1" in shown and "R@1" in shown
    assert "none" in refused("runs", "show", root.url, "none") and "there: old, one" in refused(
        "runs", "show", root.url, "none"
    )
    assert "old: would be removed" in said("runs", "prune", root.url, "--keep-last", "1", "--dry-run")
    assert "old: kept, named" in said("runs", "prune", root.url, "--keep-last", "1", "--keep", "old")
    assert "old: removed" in said("runs", "prune", root.url, "--keep-last", "1", "--older-than", "30")
    assert root.folders("tiny/runs") == ["one"]
