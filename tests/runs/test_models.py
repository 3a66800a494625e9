"""The registry of models: promote and go back, two at once, killed anywhere, and runs that are gone."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

import geostream
from geostream.errors import BadInput, Changed, StoreError
from geostream.layout import Layout
from geostream.runs import models
from geostream.runs.models import (
    Model,
    code_version,
    current_model,
    find_model,
    list_models,
    model_checkpoint,
    open_model,
    promote,
    read_current,
    rollback,
)
from geostream.runs.run import Run
from geostream.runs.stages import load_trained
from geostream.store import Store
from geostream.training.checkpoint_files import drop_checkpoint
from tests.helpers import tiny_layout
from tests.runs.small_runs import run_with_checkpoint

METRICS = {"r1": 0.5, "queries": 4}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


@pytest.fixture
def layout(store: Store) -> Layout:
    return tiny_layout(store, places=4)


def put(store: Store, layout: Layout, name: str, over: int | None, **how: Any) -> Model:
    run, checkpoint = run_with_checkpoint(store, layout, name, seed=len(name))
    return promote(run, checkpoint, METRICS, over=over, by="run", **how)


def test_an_entry_says_where_a_model_comes_from(store: Store, layout: Layout) -> None:
    assert current_model(store, "tiny") is None and list_models(store, "tiny") == []
    made = put(store, layout, "one", None)
    assert (made.number, made.run, made.checkpoint, made.epoch) == (1, "one", "step-00000030", 3)
    assert made.layout == {"name": layout.name, "id": layout.id} and made.metrics == METRICS
    assert made.code["version"] == geostream.__version__ and made.by == "run" and made.promoted.endswith("+00:00")
    assert current_model(store, "tiny") == made == find_model(store, "tiny", "current") == find_model(store, "tiny", 1)
    assert list_models(store, "tiny") == [made] and model_checkpoint(store, "tiny", "1") == ("one", "step-00000030")
    folder = store.child("tiny", "models")
    assert folder.read_json("current.json")["number"] == 1
    assert sorted(info.path for info in folder.list()) == [
        "0001.json",
        "0001/checkpoints/step-00000030/model.safetensors",
        "0001/checkpoints/step-00000030/state.json",
        "0001/settings.json",
        "current.json",
    ]


def test_a_model_outlives_its_run(store: Store, layout: Layout) -> None:
    run, checkpoint = run_with_checkpoint(store, layout, "one")
    weights = load_trained(run, checkpoint).encoder.state_dict()
    promote(run, checkpoint, METRICS, over=None, by="run")
    drop_checkpoint(run.folder, checkpoint)
    run.folder.delete("settings.json")
    opened, model = open_model(store, layout, "current")
    trained = load_trained(opened, model.checkpoint)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained.encoder.state_dict().items())
    assert (trained.epoch, trained.settings.flat()) == (3, run.settings.flat())
    assert opened.url == f"{store.url}/tiny/models/0001"


def test_back_twice_and_forward_again(store: Store, layout: Layout) -> None:
    with pytest.raises(BadInput, match="no model"):
        rollback(store, "tiny")
    for number, name in enumerate(("a", "bb", "ccc")):
        put(store, layout, name, number or None)
    assert rollback(store, "tiny").number == 2
    assert rollback(store, "tiny").number == 1
    with pytest.raises(BadInput, match="before model 1"):
        rollback(store, "tiny")
    assert put(store, layout, "dddd", 1).number == 4
    assert rollback(store, "tiny").run == "a", "not to those that were rolled back from"
    again = promote(Run(store, layout, "bb"), "step-00000030", METRICS, over=1, by="by hand")
    assert again.number == 2, "the same weights are the same model"
    current = read_current(store, "tiny")
    assert current is not None and current.before == [1]
    told = [(event["number"], event["what"], event["by"]) for event in current.history]
    forward, back = "promoted", "rolled back"
    assert told == [
        *[(1, forward, "run"), (2, forward, "run"), (3, forward, "run")],
        *[(2, back, "by hand"), (1, back, "by hand"), (4, forward, "run"), (1, back, "by hand")],
        (2, forward, "by hand"),
    ]
    assert [model.number for model in list_models(store, "tiny")] == [1, 2, 3, 4]


def test_what_is_current_stays_so(store: Store, layout: Layout) -> None:
    first = put(store, layout, "one", None)
    run = Run(store, layout, "one")
    assert promote(run, "step-00000030", {}, over=None, by="by hand") == first
    current = read_current(store, "tiny")
    assert current is not None and len(current.history) == 1


@pytest.mark.parametrize("over", [None, 2, 7])
def test_who_compared_with_another_model_is_told(store: Store, layout: Layout, over: int | None) -> None:
    put(store, layout, "one", None)
    with pytest.raises(Changed, match="model 1 "):
        put(store, layout, "other", over)
    assert [model.number for model in list_models(store, "tiny")] == [1], "refused before anything is copied"


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_two_at_once_one_wins(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store = Store.open(tmp_path) if where == "local" else request.getfixturevalue("s3_store")
    layout = tiny_layout(store, places=4)
    put(store, layout, "first", None)
    runs = [run_with_checkpoint(store, layout, f"run{n}", seed=n) for n in range(4)]
    barrier = Barrier(len(runs))

    def race(run: Run, checkpoint: str) -> Model | None:
        barrier.wait()
        try:
            return promote(run, checkpoint, METRICS, over=1, by="run")
        except Changed:
            return None

    with ThreadPoolExecutor(len(runs)) as threads:
        made = list(threads.map(lambda one: race(*one), runs))
    [won] = [model for model in made if model is not None]
    current = read_current(store, "tiny")
    assert current is not None and current.model == won and current.before == [1]
    entries = list_models(store, "tiny")
    assert [model.number for model in entries] == list(range(1, 1 + len(entries))), "each has a number of its own"
    assert won in entries
    assert rollback(store, "tiny").run == "first"


def test_killed_before_it_is_current(store: Store, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    first = put(store, layout, "one", None)
    run, checkpoint = run_with_checkpoint(store, layout, "two", seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "update_json", killed)
        with pytest.raises(KeyboardInterrupt):
            promote(run, checkpoint, METRICS, over=1, by="run")
    assert current_model(store, "tiny") == first
    assert promote(run, checkpoint, METRICS, over=1, by="run").number == 2, "goes on from its entry"
    assert store.child("tiny", "models").folders() == ["0001", "0002"]


def test_killed_while_it_copies(store: Store, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    run, checkpoint = run_with_checkpoint(store, layout, "one")
    with monkeypatch.context() as patch:
        patch.setattr(models, "copy_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            promote(run, checkpoint, METRICS, over=None, by="run")
    assert list_models(store, "tiny") == [] and current_model(store, "tiny") is None
    with pytest.raises(BadInput, match=r"no model 1 \(there: none\)"):
        find_model(store, "tiny", 1)
    assert promote(run, checkpoint, METRICS, over=None, by="run").number == 2


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("which", ["newest", "0", "-1", "", "1.5"])
def test_no_number(store: Store, layout: Layout, which: str) -> None:
    with pytest.raises(BadInput, match="current, or"):
        find_model(store, "tiny", which)


def test_unknown_models(store: Store, layout: Layout) -> None:
    put(store, layout, "one", None)
    with pytest.raises(BadInput, match=r"tiny/models: no model 3 \(there: 1\)"):
        find_model(store, "tiny", "3")
    with pytest.raises(BadInput, match="other/models: no model"):
        find_model(store, "other", "current")
    assert find_model(store, "tiny", "0001").number == 1
    folder = store.child("tiny", "models")
    folder.write_json("0001.json", folder.read_json("0001.json") | {"format": 2})
    with pytest.raises(StoreError, match=r"0001\.json: .*version"):
        find_model(store, "tiny", 1)


def test_a_damaged_checkpoint_is_no_model(store: Store, layout: Layout) -> None:
    run, checkpoint = run_with_checkpoint(store, layout, "one")
    run.folder.write(f"checkpoints/{checkpoint}/model.safetensors", b"half")
    with pytest.raises(StoreError, match="damaged"):
        promote(run, checkpoint, METRICS, over=None, by="run")
    with pytest.raises(BadInput, match="step-00000099"):
        promote(run, "step-00000099", METRICS, over=None, by="run")
    assert current_model(store, "tiny") is None


def test_the_code_is_that_of_this_checkout() -> None:
    root = Path(geostream.__file__).parents[1]
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    assert code_version()["commit"] == (asked.stdout.strip() if (root / ".git").exists() else None)
    assert json.dumps(code_version())
