"""The plan as an object on the store: whole, of this layout, and unchanged, or refused."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geostream.errors import GeostreamError, NotFound, StaleArtefact
from geostream.layout import Layout
from geostream.planning import plan as module
from geostream.planning.make_plan import make_plan
from geostream.planning.plan import EpochPlan, load_plan, save_plan
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.cities import city

SETTINGS = TrainSettings().changed(batch_size=8, strategy="random", lanes=2)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return city(Store.open(tmp_path / "store"), side=6, views=2)


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store" / "city" / "runs" / "r" / "plans")


def plan_of(layout: Layout, epoch: int = 5) -> EpochPlan:
    return make_plan(layout, None, SETTINGS, epoch, seed=1)


def test_it_comes_back_as_it_was(layout: Layout, run: Store) -> None:
    plan = plan_of(layout)
    save_plan(run, plan)
    loaded = load_plan(run, 5, layout)
    for name in ("place", "view", "left_out_place", "left_out_view", "lane"):
        one, other = getattr(plan, name), getattr(loaded, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert loaded.hash == plan.hash
    assert loaded.quality == plan.quality
    assert (loaded.epoch, loaded.seed, loaded.strategy, loaded.lanes) == (5, 1, "random", 2)
    loaded.validate(layout)
    assert run.read_table("epoch-0005.parquet").column_names == ["batch", "lane", "place", "view"]


def test_there_is_none(layout: Layout, run: Store) -> None:
    with pytest.raises(NotFound, match="epoch 5"):
        load_plan(run, 5, layout)


def test_half_written_is_absent(layout: Layout, run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it was to replace a whole one."""
    plan = plan_of(layout)
    save_plan(run, plan)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_plan(run, plan)
    with pytest.raises(NotFound):
        load_plan(run, 5, layout)


def test_of_another_layout_is_refused(layout: Layout, run: Store, tmp_path: Path) -> None:
    plan = plan_of(layout)
    save_plan(run, plan)
    other = city(Store.open(tmp_path / "store"), side=7, name="g1")
    with pytest.raises(StaleArtefact, match=r"layout than \bg1\b"):
        load_plan(run, 5, other)
    with pytest.raises(StaleArtefact):
        plan.validate(other)
    assert load_plan(run, 5, None).hash == plan.hash


@pytest.mark.parametrize("damage", ["batches", "seed", "number", "key"])
def test_changed_is_refused(layout: Layout, run: Store, damage: str) -> None:
    save_plan(run, plan_of(layout))
    facts = run.read_json("epoch-0005.json")
    if damage == "batches":
        table = run.read_table("epoch-0005.parquet")
        run.write_table("epoch-0005.parquet", table.take(np.arange(table.num_rows)[::-1]))
    elif damage == "seed":
        run.write_json("epoch-0005.json", {**facts, "seed": 2})
    elif damage == "number":
        run.write_json("epoch-0005.json", {**facts, "batch_size": 7})
    else:
        run.write_json("epoch-0005.json", {**facts, "surprise": 1})
    with pytest.raises(GeostreamError, match="damaged"):
        load_plan(run, 5, layout)


def test_validate_finds_broken_rules(layout: Layout) -> None:
    plan = plan_of(layout)
    twice = plan.place.copy()
    twice[0, 0] = twice[1, 0]
    with pytest.raises(GeostreamError, match="training pair"):
        replace(plan, place=twice).validate(layout)
    with pytest.raises(GeostreamError, match="lanes"):
        replace(plan, place=plan.place[1:], view=plan.view[1:]).validate(layout)

    # Swap pairs between batches until a rule of batches is broken: a place twice, or beside its semi-positive.
    def swapped(place: int, wanted: int) -> EpochPlan:
        places, views = plan.place.copy(), plan.view.copy()
        to = np.argwhere(places == place)[0]
        other = next(at for at in np.argwhere(places == wanted) if at[0] != to[0])
        at = (int(to[0]), int((to[1] + 1) % plan.batch_size))
        for array in (places, views):
            array[at], array[tuple(other)] = array[tuple(other)], array[at]
        return replace(plan, place=places, view=views)

    several = int(np.flatnonzero(np.bincount(plan.place.ravel()) > 1)[0])
    with pytest.raises(GeostreamError, match="twice"):
        swapped(several, several).validate(layout)
    excluded = layout.excluded("train")
    lonely = next(
        (place, other)
        for place in np.unique(plan.place).tolist()
        for other in excluded.row(place).tolist()
        if other in plan.place
    )
    with pytest.raises(GeostreamError, match="semi-positive"):
        swapped(*lonely).validate(layout)


def test_validate_says_what_a_look_at_each_batch_says(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs change places with others until a rule is broken, or by chance none is."""
    monkeypatch.setattr(module, "CHECKED", 3)
    plan, excluded, outcomes = plan_of(layout), layout.excluded("train"), set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        place, view = plan.place.copy(), plan.view.copy()
        for _ in range(seed % 4):
            one, other = rng.integers(place.size, size=2)
            for flat in (place.reshape(-1), view.reshape(-1)):
                flat[[one, other]] = flat[[other, one]]
        twice = [step for step, batch in enumerate(place.tolist()) if len(set(batch)) < len(batch)]
        met = [
            step
            for step, batch in enumerate(place.tolist())
            if any(not set(batch).isdisjoint(excluded.row(one).tolist()) for one in batch)
        ]
        wrong = (f"step {twice[0]}: .*twice" if twice else f"step {met[0]}: .*semi-positive") if twice or met else ""
        with pytest.raises(GeostreamError, match=wrong) if wrong else nullcontext():
            replace(plan, place=place, view=view).validate(layout)
        outcomes.add(wrong.rpartition("*")[2])
    assert outcomes == {"", "twice", "semi-positive"}
