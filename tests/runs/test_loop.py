"""The run as a whole: its stages, its artefacts, its log; and that a kill changes nothing."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from geostream.errors import BadInput, StaleArtefact
from geostream.evaluation.evaluate import evaluate_embeddings
from geostream.layout import Layout, open_layout
from geostream.planning.plan import load_plan
from geostream.report.evaluation_page import evaluate_checkpoint, look_of
from geostream.runs.log import Record, RunLog
from geostream.runs.loop import train
from geostream.runs.run import LOG, Run, run_folder
from geostream.runs.stages import (
    embed_split,
    load_trained,
    mining_due,
    mining_for,
)
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints
from tests.helpers import tiny_layout
from tests.training.settings import TINY


def layout_in(store: Store) -> Layout:
    return tiny_layout(store, places=24, test_places=8, views=2, view_size=(32, 64))


def weights_hash(run: Store) -> str:
    return hashlib.sha256(run.read(f"checkpoints/{list_checkpoints(run)[-1]}/model.safetensors")).hexdigest()


def test_a_run_on_s3_from_end_to_end(s3_store: Store) -> None:
    layout = layout_in(s3_store)
    seen: list[Record] = []
    settings = TINY.changed(recluster_below=0.0)  # that has its own tests
    result = train(s3_store, layout, "one", settings, on_record=seen.append)
    stages = [(record["stage"], record["epoch"]) for record in seen]
    assert stages == [
        *[("plan", 1), ("train", 1), ("embed", 1), ("mine", 1)],
        *[("plan", 2), ("train", 2), ("evaluate", 2)],
        *[("plan", 3), ("train", 3), ("embed", 3), ("mine", 3)],
        *[("plan", 4), ("train", 4), ("evaluate", 4)],
    ]
    assert [plan["source"] for plan in result.plans] == ["gps", "visual", "visual", "visual"]
    for plan in result.plans:
        assert plan["pairs"] == 48 and plan["left_out"] < TINY.optim.batch_size
        assert {"batches", "hardness_score", "overlap", "resident_share"} <= plan.keys()
    assert [evaluation["epoch"] for evaluation in result.evaluations] == [2, 4]
    assert result.evaluations[-1]["gallery"] == 10 and result.evaluations[-1]["queries"] == 16
    assert result.stream["bytes_fetched"] >= result.stream["bytes_used"] > 0 and result.stream["requests"] >= 4 * 6
    assert result.seconds.pop("recluster") == 0 and result.reclusterings == [] and result.seconds.pop("wait") == 0
    assert set(result.seconds) == {"plan", "train", "embed", "mine", "evaluate"} and min(result.seconds.values()) > 0
    assert result.epochs == 4 and not result.already_finished

    run = run_folder(s3_store, "tiny", "one")
    assert load_plan(run.child("plans"), 3, layout).graph == "neighbours/visual-epoch-0001.zarr"
    again = train(s3_store, layout, "one", settings)
    assert again.already_finished and again.evaluations == result.evaluations
    assert again.seconds == result.seconds | {"recluster": 0, "wait": 0}

    opened = Run.open(s3_store, layout, "one")
    trained = load_trained(opened)
    assert trained.epoch == 4 and trained.settings == settings.changed(step_batches=1)
    found = evaluate_embeddings(layout, embed_split(opened, trained, "test"))
    assert found.r1 == result.evaluations[-1]["r1"]


def test_embeddings_are_those_of_the_encoder_in_the_order_of_ids(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = layout_in(store)
    train(store, layout, "one", TINY.changed(epochs=2))
    run = Run.open(store, layout, "one")
    embeddings = run.embeddings("train", 1)
    assert np.array_equal(embeddings.pairs.place, layout.pairs("train").place)
    trained = load_trained(run, embeddings.checkpoint)
    assert trained.epoch == 1
    for split in ("train", "test"):
        again = embed_split(run, trained, split)
        query, reference = np.asarray(again.query[:]), np.asarray(again.reference[:])
        np.testing.assert_allclose(np.linalg.norm(query, axis=1), 1, rtol=1e-5)
        # Batches of another size meet other neighbours, and must not mix up rows.
        other = type(trained)(trained.encoder, trained.settings.changed(batch_size=7), trained.checkpoint, 99)
        once_more = embed_split(run, other, split)
        np.testing.assert_allclose(np.asarray(once_more.query[:]), query, atol=1e-5)
        np.testing.assert_allclose(np.asarray(once_more.reference[:]), reference, atol=1e-5)


def test_a_run_with_narrowed_views_is_evaluated_with_some_at_its_end(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = layout_in(store)
    settings = TINY.changed(epochs=2, evaluate_every=1, fov=[70, 360], birds_eye=20.0, vertical_degrees=180)
    result = train(store, layout, "one", settings)
    first, last = result.evaluations
    assert "narrowed" not in first and [row["fov"] for row in last["narrowed"]] == [70, 90, 180]
    assert all((row["gallery"], row["queries"]) == (10, 16) and row["metres"] for row in last["narrowed"])
    again = evaluate_checkpoint(Run.open(store, layout, "one"))
    assert [look_of(one) for one in again] == ["70°", "90°", "180°", "360°"], "without being asked"
    assert [row["r1"] for row in again] == [row["r1"] for row in (*last["narrowed"], last)]
    assert train(store, layout, "one", settings).evaluations == result.evaluations


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    hashes = []
    for workers in (0, 2):
        store = Store.open(tmp_path / str(workers))
        settings = TINY.changed(workers=workers, lanes=2, epochs=2)
        train(store, layout_in(store), "one", settings)
        hashes.append(weights_hash(run_folder(store, "tiny", "one")))
    assert hashes[0] == hashes[1]


PROGRAM = """
import sys
from geostream.layout import open_layout
from geostream.settings import make_settings
from geostream.store import Store
from geostream.runs.loop import train
import json
store = Store.open(sys.argv[1])
train(store, open_layout(store), "one", make_settings(json.loads(sys.argv[2])))
"""


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings = TINY.changed(epochs=5)
    store = Store.open(tmp_path / "killed")
    layout_in(store)
    killed_run, whole_run = (run_folder(Store.open(tmp_path / name), "tiny", "one") for name in ("killed", "whole"))
    command = [sys.executable, "-c", PROGRAM, store.url, settings.model_dump_json()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(list_checkpoints(killed_run)) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert 2 <= len(list_checkpoints(killed_run)) < settings.optim.epochs
    result = train(store, open_layout(store), "one", settings)
    whole = Store.open(tmp_path / "whole")
    train(whole, layout_in(whole), "one", settings)
    assert weights_hash(killed_run) == weights_hash(whole_run)
    assert [row["epoch"] for row in result.training] == [1, 2, 3, 4, 5]
    for epoch in range(1, 6):
        assert (
            load_plan(killed_run.child("plans"), epoch, None).hash
            == load_plan(whole_run.child("plans"), epoch, None).hash
        )
    assert killed_run.read_json("evaluation.json")[-1]["r1"] == whole_run.read_json("evaluation.json")[-1]["r1"]


def test_other_settings_or_layout_are_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    settings = TINY.changed(epochs=1)
    train(store, layout_in(store), "one", settings)
    with pytest.raises(BadInput, match=r"\(epochs 1 → 2, seed 0 → 3\)"):
        train(store, open_layout(store), "one", settings.changed(epochs=2, seed=3, threads=2))
    # Recipes have since learnt these two, which nothing needs without birds_eye.
    assert train(
        store, open_layout(store), "one", settings.changed(vertical_degrees=90, camera_height=2)
    ).already_finished
    with pytest.raises(BadInput, match=r"\(birds_eye 0.0 → 20.0, camera_height 1.5 → 2.0\)"):
        train(store, open_layout(store), "one", settings.changed(birds_eye=20, camera_height=2))
    other = tiny_layout(store, name="g1", places=20, view_size=(32, 64))
    with pytest.raises(StaleArtefact, match="layout g0, .*g1"):
        train(store, other, "one", settings)


@pytest.mark.slow
def test_random_batches_need_no_mining_and_no_coordinates(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = layout_in(store)
    settings = TINY.changed(strategy="random", epochs=3)
    result = train(store, layout, "one", settings)
    assert {plan["source"] for plan in result.plans} == {"random"} and result.seconds["mine"] == 0
    layout.info["coordinates"] = "none"
    result = train(store, layout, "two", TINY.changed(epochs=2))
    assert [plan["source"] for plan in result.plans] == ["random", "visual"]


def test_an_epoch_under_way_can_be_watched(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    settings = TINY.changed(epochs=1, checkpoint_every=2)
    layout = layout_in(store)
    train(store, layout, "one", settings)
    log = RunLog(run_folder(store, "tiny", "one"), LOG)
    [progress], [whole] = log.of("progress"), log.of("train")
    assert 0 < progress["batches"] < 48 // settings.optim.batch_size and progress["batches"] % 2 == 0
    assert 0 < progress["pairs"] < whole["pairs"] and progress["stream"].keys() == whole["stream"].keys()
    assert log.records.index(progress) < log.records.index(whole)


@pytest.mark.parametrize(
    ("lag", "due", "served"),
    [(0, [4, 8, 12], [0, 0, 4, 4, 8, 8, 12, 12]), (1, [4, 8, 12], [0, 0, 0, 4, 4, 4, 8, 12])],
)
def test_which_mining_serves_which_epoch(lag: int, due: list[int], served: list[int]) -> None:
    settings = TrainSettings().changed(epochs=14, first_mining=4, mine_every=4, mining_lag=lag)
    assert [epoch for epoch in range(1, 15) if mining_due(epoch, settings)] == due
    assert [mining_for(epoch, settings) for epoch in (1, 4, 5, 8, 9, 10 - lag, 13, 14)] == served
    for epoch in range(1, 15):
        mining = mining_for(epoch, settings)
        assert mining == 0 or mining_due(mining, settings)
