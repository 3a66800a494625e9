"""A run changes generation where its plans are too easy, stays on its own, and a kill in between changes nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from geostream.errors import LayoutNotCommitted
from geostream.layout import list_layouts, open_layout
from geostream.planning.plan import load_plan
from geostream.runs import stages
from geostream.runs.log import RunLog
from geostream.runs.loop import train
from geostream.runs.run import Run, run_folder
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints, read_position
from tests.helpers import tiny_layout
from tests.training.settings import TINY

ALWAYS = TINY.changed(recluster_below=100.0, hardness=100.0, epochs=4)


def run_in(folder: Path, settings: TrainSettings = ALWAYS) -> tuple[Store, Store, Any]:
    """(store, the run's folder, result)."""
    store = Store.open(folder)
    layout = tiny_layout(store, name="base", places=24, test_places=8, views=2, view_size=(32, 64))
    result = train(store, layout, "one", settings)
    return store, run_folder(store, "tiny", "one"), result


def weights(run: Store) -> str:
    return hashlib.sha256(run.read(f"checkpoints/{list_checkpoints(run)[-1]}/model.safetensors")).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store, Any]:
    return run_in(tmp_path_factory.mktemp("whole"))


def test_every_mining_may_lead_to_a_generation(whole: tuple[Store, Store, Any]) -> None:
    store, run, result = whole
    assert list_layouts(store, "tiny") == ["base", "base-g1", "base-g2"]
    facts = [(r["epoch"], r["layout"], r["generation"]) for r in result.reclusterings]
    assert facts == [(2, "base-g1", 1), (4, "base-g2", 2)]  # mined after epochs 1 and 3
    layouts = [open_layout(store, "tiny", name) for name in list_layouts(store, "tiny")]
    assert [layout.info["parent"] for layout in layouts] == [None, layouts[0].id, layouts[1].id]
    used = [load_plan(run.child("plans"), epoch, None).layout_id for epoch in (1, 2, 3, 4)]
    assert used == [layouts[0].id, layouts[1].id, layouts[1].id, layouts[2].id]
    for one in result.reclusterings:
        assert one["score_before"] is not None and one["score_after"] is not None
    assert [plan["hardness_score"] for plan in result.plans if plan["epoch"] in (2, 4)] == [
        one["score_after"] for one in result.reclusterings
    ]
    assert read_position(run, list_checkpoints(run)[-1]).layout_id == layouts[2].id
    assert run.read_json("layout.json") == {"layout": "base-g2", "id": layouts[2].id}


def test_a_threshold_of_nothing_is_never_undercut(tmp_path: Path) -> None:
    store, _, result = run_in(tmp_path, ALWAYS.changed(recluster_below=0.0, epochs=2))
    assert list_layouts(store, "tiny") == ["base"] and result.reclusterings == []


@pytest.mark.parametrize(
    "moment",
    [
        "committed",
        pytest.param("written down", marks=pytest.mark.slow),
        pytest.param("planned", marks=pytest.mark.slow),
        pytest.param("moved", marks=pytest.mark.slow),
    ],
)
def test_cut_off_in_between(
    tmp_path: Path, whole: tuple[Store, Store, Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Wherever it ends, the run that goes on is on the same generation, has the same weights, and tells the same."""

    class Killed(BaseException):
        pass

    append, move_to, plan_epoch = RunLog.append, Run.move_to, stages.plan_epoch

    def until(log: RunLog, stage: str, *arguments: Any, **measured: Any) -> Any:
        if stage == "recluster" and moment == "committed":
            raise Killed
        return append(log, stage, *arguments, **measured)

    def planned(run: Run, epoch: int) -> Any:
        if run.layout.generation and moment == "written down":
            raise Killed
        made = plan_epoch(run, epoch)
        if run.layout.generation and moment == "planned":
            raise Killed
        return made

    def moved(run: Run, layout_id: str) -> None:
        move_to(run, layout_id)
        if run.layout.generation and moment == "moved":
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "append", until)
        patched.setattr(stages, "plan_epoch", planned)
        patched.setattr(Run, "move_to", moved)
        with pytest.raises(Killed):
            run_in(tmp_path)
    store = Store.open(tmp_path)
    result = train(store, open_layout(store), "one", ALWAYS)
    assert weights(run_folder(store, "tiny", "one")) == weights(whole[1])
    told, expected = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in one.reclusterings] for one in (result, whole[2])
    )
    assert told == expected
    assert list_layouts(store, "tiny") == ["base", "base-g1", "base-g2"]


def test_a_run_stays_on_its_own_generation(tmp_path: Path) -> None:
    """Whatever generation it is given when it goes on; and says so where that one is gone."""
    store, run, _ = run_in(tmp_path, ALWAYS.changed(epochs=2))
    base = open_layout(store, "tiny", "base")
    assert Run.open(store, base, "one").layout.name == "base-g1"
    assert Run.open(store, base, "another").layout.name == "base"
    train(store, base, "one", ALWAYS.changed(epochs=2))
    assert run.read_json("layout.json")["layout"] == "base-g1"
    store.delete("tiny/layouts/base-g1/layout.json")
    with pytest.raises(LayoutNotCommitted, match="base-g1: "):
        train(store, base, "one", ALWAYS.changed(epochs=2))
