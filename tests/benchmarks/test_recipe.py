"""What the recipe benchmark makes of its measurements, and that a tiny one goes through and is gone on with."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from geostream.errors import BadInput
from tests.benchmarks import recipe, recipe_run
from tests.benchmarks.measure import Failed
from tests.benchmarks.recipe import compare, figures
from tests.benchmarks.recipe_city import SIZES, hard_cities, prepare
from tests.benchmarks.recipe_run import ALL, CHANGES, IMAGENET, PRESENT, Change, Job, change_of


@pytest.fixture(autouse=True)
def a_table_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two changes that are kept, one that is not, and one of the other recipe; what is measured is made up."""
    table = {name: Change({}, "a test") for name in ("one", "other", "dropped")} | {"frozen": Change({}, "", IMAGENET)}
    for name, change in table.items():
        monkeypatch.setitem(CHANGES, name, change)
    for module in (recipe, recipe_run):
        monkeypatch.setattr(module, "KEPT", ("one", "other"))


def runs(**r1: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    """Results with these R@1, one a seed."""
    return {
        name: [
            {"evaluation": {"r1": one, "r1pct": one + 0.1, "hit_rate": one, "metres": {"r1_within_50m": one}}}
            for one in values
        ]
        for name, values in r1.items()
    }


def test_differences_are_within_a_seed_and_their_error_is_pooled() -> None:
    made = compare(runs(present=[0.3, 0.5], one=[0.4, 0.6], other=[0.3, 0.6]))
    assert made["one"]["r1"]["difference"] == pytest.approx(0.1)
    assert made["other"]["r1"]["by_seed_difference"] == pytest.approx([0.0, 0.1])
    pooled = (((0.0 + 0.005) / 2) / 2) ** 0.5  # the variances of both changes, two seeds
    assert made["one"]["r1"]["standard_error"] == made["other"]["r1"]["standard_error"] == pytest.approx(pooled)
    assert made["present"]["r1pct"] == {"by_seed": [0.4, 0.6], "value": 0.5}


def test_changes_of_another_recipe_are_compared_with_that() -> None:
    made = compare(runs(present=[0.3, 0.5], one=[0.4, 0.6], imagenet=[0.1, 0.1], frozen=[0.2, 0.1]))
    assert made["frozen"]["r1"]["by_seed_difference"] == pytest.approx([0.1, 0.0])
    assert made["one"]["r1"]["standard_error"] == pytest.approx(0)
    assert "difference" not in made["imagenet"]["r1"]


def test_one_seed_has_no_error_and_no_verdict() -> None:
    changes = compare(runs(present=[0.3], one=[0.4], all=[0.5]))
    assert changes["one"]["r1"]["standard_error"] is None
    assert figures(changes).keys() == {"r1_present", "r1_one", "r1_all"}


@pytest.mark.parametrize(("gain", "loss", "met"), [(0.05, 0.001, True), (0.02, 0.001, False), (0.05, 0.02, False)])
def test_all_must_gain_three_errors_and_nothing_kept_lose_one(gain: float, loss: float, met: bool) -> None:
    present = [0.40, 0.50, 0.45]
    noise = [0.02, 0.0, -0.02]  # 0.02/√3 as the error of each mean difference
    changed = {
        name: [a + by + b for a, b in zip(present, noise, strict=True)]
        for name, by in (("one", 0.02), ("other", -loss), ("dropped", -0.2), ("all", gain))
    }
    made = figures(compare(runs(present=present, **changed)))
    assert made["all_vs_present"]["value"] == pytest.approx(gain / (0.02 / 3**0.5))
    assert made["worst_kept_vs_present"]["change"] == "other"
    assert (made["all_vs_present"]["met"] and made["worst_kept_vs_present"]["met"]) is met


def job(contestant: str) -> Job:
    return Job(contestant, 3, "full", "weights", "", "")


def test_a_change_differs_from_its_present_recipe_in_what_it_says() -> None:
    assert (job(PRESENT).settings.model.weights, job(IMAGENET).settings.model.weights) == (
        "weights/first.safetensors",
        "weights/efficientnet_lite0.pth",
    )
    for name, change in CHANGES.items():
        made, present = job(name).settings.flat(), job(change.of).settings.flat()
        assert {one for one in made if made[one] != present[one]} == change.settings.keys(), name


def test_all_sets_what_is_kept_of_the_present_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_run, "KEPT", ("ema", "fov", "imagenet_scratch"))
    assert change_of(ALL).settings == CHANGES["ema"].settings | CHANGES["fov"].settings
    assert job(ALL).settings.optim.ema_decay == CHANGES["ema"].settings["ema_decay"]


def test_a_setting_that_there_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHANGES, "ema", CHANGES["ema"]._replace(settings={"telepathy": True}))
    with pytest.raises(BadInput, match="telepathy"):
        _ = job("ema").settings


def test_cities_come_in_pairs_and_only_those_of_training_have_wrong_positions() -> None:
    cities = hard_cities(SIZES["quick"])
    assert [(city.name, city.like) for city in cities.train + cities.test] == [
        ("Train00A", None), ("Train00B", "Train00A"), ("Test00A", None), ("Test00B", "Test00A"),
    ]  # fmt: skip
    assert cities.rendering["misplaced"] == {"Train00A": 0.05, "Train00B": 0.05}
    assert len({city.name for city in hard_cities(SIZES["full"]).train}) == 2 * SIZES["full"].train_pairs


def test_kept_cities_are_taken_only_where_they_are_the_same(tmp_path: Path) -> None:
    kept = json.dumps({"pairs": 7, "of": asdict(hard_cities(SIZES["quick"])) | {"seed": 0}})
    (tmp_path / "city.json").write_text(kept)
    assert prepare(tmp_path, SIZES["quick"], 0, 1) == {"pairs": 7}
    for size, seed in ((SIZES["full"], 0), (SIZES["quick"], 1), (SIZES["quick"], None)):
        with pytest.raises(Failed, match="other cities"):
            prepare(tmp_path, size, seed, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["city.json"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_tiny_measurement_goes_through_and_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, out = tmp_path / "keep", tmp_path / "out" / "recipe.json"
    arguments = ["--json", str(out), "--keep", str(keep), "--quick", "--seeds", "0", "--only", "ema"]
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its handlers
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    assert recipe.main() == 0
    result: Mapping[str, Any] = json.loads(out.read_text())
    assert result["changes"].keys() == {PRESENT, "ema"}
    assert out.with_suffix(".png").stat().st_size > 1000
    for metrics in result["changes"].values():
        assert all(0 <= one["value"] <= 1 for one in metrics.values())
        assert metrics["r1"]["value"] <= min(metrics["r1pct"]["value"], metrics["hit_rate"]["value"])
    of_seed = keep / "quick" / "seed-0"
    assert sorted(path.name for path in of_seed.iterdir()) == ["city.json", "ema.json", "present.json", "store"]
    before = (of_seed / "present.json").stat().st_mtime_ns
    (of_seed / "ema.json").unlink()
    assert recipe.main() == 0
    assert (of_seed / "present.json").stat().st_mtime_ns == before
    again = json.loads(out.read_text())["changes"]["ema"]["r1"]["value"]
    assert again == result["changes"]["ema"]["r1"]["value"]  # the same seed and the same first weights


def test_a_contestant_that_there_is_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", "--json", str(tmp_path / "out.json"), "--only", "telepathy"])
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    assert not any(tmp_path.iterdir())
