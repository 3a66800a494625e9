"""``geostream train --dry-run`` on a real store: what it says is so, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from geostream.layout import Layout
from geostream.runs.run import Run
from geostream.runs.stages import plan_epoch
from geostream.settings import TrainSettings, default_settings
from geostream.store import Store
from geostream.training.model import Encoder
from tests.command import refused, said
from tests.helpers import tiny_layout

SETTINGS = ["model=test_convnext", "tile_size=32", "view_height=32", "view_width=64", "batch_size=4", "neighbours=6"]
SETTINGS += ["epochs=6", "first_mining=2", "mine_every=2", "evaluate_every=4"]
SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return tiny_layout(Store.open(tmp_path), places=24)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_it_says_steps_memory_and_hours_and_writes_nothing(tmp_path: Path, layout: Layout) -> None:
    before = files(tmp_path)
    text = said("train", str(tmp_path), "--dry-run", *SET, "--set", "frozen_stages=2", "--rate", "0.5")
    assert files(tmp_path) == before
    pairs, tests = len(layout.pairs("train")), len(layout.pairs("test"))
    steps = int(re.search(r"up to (\d+) an epoch, (\d+) in 6 epochs", text)[1])  # type: ignore[index]
    assert steps == pairs // 4 and f"{pairs} training pairs" in text
    numbers = sum(one.numel() for one in Encoder("test_convnext").parameters())
    assert f"parameters: {numbers:,}, of which" in text and f"of which {numbers:,}" not in text
    for part in ("weights", "gradients", "moments of AdamW", "EMA", "activations of 4 pairs", "at the most"):
        assert part in text
    assert all(f"{gpu} GB" in text for gpu in (24, 48, 80)) and "none is needed" in text
    hours = float(re.search(r"pairs a second: (\S+):", text)[1])  # type: ignore[index]
    # Mined after epochs 2 and 4, evaluated after 4 and 6; a pass without gradients is a third of a step.
    assert hours == pytest.approx((6 * steps * 4 + (2 * pairs + 2 * tests) / 3) / 0.5 / 3600, rel=0.01)


def test_the_steps_are_those_of_a_plan(tmp_path: Path, layout: Layout) -> None:
    run = Run(Store.open(tmp_path), layout, "some")
    run.settings = TrainSettings().changed(model="test_convnext", strategy="random", batch_size=4)
    plan = plan_epoch(run, 1)
    assert f"up to {plan.n_batches:,} an epoch" in said("train", str(tmp_path), "--dry-run", *SET)


def test_what_a_training_would_refuse_is_refused(tmp_path: Path, layout: Layout) -> None:
    url = str(tmp_path)
    assert "batch_size" in refused("train", url, "--dry-run", *SET, "--set", "batch_size=4000")
    assert "convnext_bass" in refused("train", url, "--dry-run", *SET, "--set", "model=convnext_bass")
    assert "frozen_stages=9" in refused("train", url, "--dry-run", *SET, "--set", "frozen_stages=9")
    patches = ["--set", "model=vit_small_patch14_dinov2", "--set", "tile_size=384"]
    assert "378 or 392" in refused("train", url, "--dry-run", *SET, *patches)
    assert "--rate" in refused("train", url, *SET, "--rate", "3")
    assert not (tmp_path / layout.dataset / "runs").exists()


def test_a_recipe_is_chosen_by_its_name(tmp_path: Path, layout: Layout) -> None:
    line = refused("train", str(tmp_path), "--recipe", "vigr", *SET)
    assert "vigr" in line and "vigor-dinov3" in line
    small = ["--set", "batch_size=4", "--set", "threads=1", "--set", "model=test_convnext", "--set", "epochs=1"]
    said("train", str(tmp_path), "--run", "new", "--recipe", "simcity", *small, "--set", "tile_size=32")
    settings = Run(Store.open(tmp_path), layout, "new").settings
    assert (settings.optim.schedule, settings.model.view_width) == ("one-cycle", 128)
    assert settings.optim.learning_rate == default_settings("simcity").optim.learning_rate
