"""A run with every setting of which pairs are negatives: from its start to its report, killed or not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from geostream.errors import BadInput
from geostream.layout import Layout, open_layout
from geostream.mining.false_negatives import LOST
from geostream.report.report import summarise
from geostream.runs.log import RunLog
from geostream.runs.loop import train
from geostream.runs.run import LOG, Run, run_folder
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.helpers import tiny_layout
from tests.training.settings import TINY

NEAR = {"negative_radius": 150.0, "soft_targets": 200.0, "decoupled": True}
SETTINGS = TINY.changed(epochs=2, evaluate_every=4, positive_margin=0.95, recluster_below=0.0, **NEAR)


def layout_in(store: Store) -> Layout:
    return tiny_layout(store, places=24, test_places=4, views=2, view_size=(32, 64))


def losses(store: Store, layout: Layout, name: str, settings: TrainSettings) -> list[float]:
    return [row["loss"] for row in train(store, layout, name, settings).training]


def test_it_trains_mines_and_says_what_was_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.open(tmp_path)
    layout = layout_in(store)
    with caplog.at_level(logging.INFO):
        result = train(store, layout, "one", SETTINGS)
    [mined] = RunLog(run_folder(store, "tiny", "one"), LOG).of("mine")
    assert mined["search"]["positive_margin"] == 0.95
    for name in LOST:
        assert mined[name] == mined["search"][name]
    assert 0 < mined["touched"] <= mined["places"] == 24 and mined["dropped"] >= mined["touched"]
    graph = Run.open(store, layout, "one").graph(1)
    assert graph.search == mined["search"] and graph.k == TINY.plan.neighbours
    [line] = [message for message in caplog.messages if message.startswith("mine: ")]
    assert f"dropped {mined['dropped']:.4g}" in line and "touched" in line
    assert summarise("store", layout, result)["false_negatives"] == [
        {
            "mined after epoch": 1,
            "margin": 0.95,
            "candidates dropped": mined["dropped"],
            "places touched": mined["touched"],
            "of places": 24,
            "lists made shorter": mined["short"],
            "lists left empty": mined["empty"],
        }
    ]


def test_each_setting_of_the_loss_is_used_and_workers_change_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout, one_epoch = (
        layout_in(store),
        SETTINGS.changed(epochs=1, negative_radius=0.0, soft_targets=0.0, decoupled=False),
    )
    found = {"plain": losses(store, layout, "plain", one_epoch)}
    for name, value in NEAR.items():
        found[name] = losses(store, layout, name.replace("_", "-"), one_epoch.changed(**{name: value}))
    assert len({tuple(one) for one in found.values()}) == 4
    again = losses(store, open_layout(store), "again", one_epoch.changed(negative_radius=150.0, decode_threads=2))
    assert again == found["negative_radius"]


def test_without_coordinates_it_ends_before_it_has_begun(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = layout_in(store)
    layout.info["coordinates"] = "none"
    with pytest.raises(BadInput, match="negative_radius and soft_targets"):
        train(store, layout, "one", SETTINGS)
    assert not run_folder(store, "tiny", "one").list()
