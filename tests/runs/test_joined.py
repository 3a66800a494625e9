"""A run on two data sets: trained on both, tested on each alone as a run on that data set would be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geostream.errors import BadInput
from geostream.evaluation.evaluate import evaluate_embeddings
from geostream.layout import Layout, open_layout, use_layout
from geostream.layout.join import join_layouts
from geostream.layout.verify import verify_layout
from geostream.mining.gps import build_gps_graph
from geostream.report import report
from geostream.runs import stages
from geostream.runs.begin import begin
from geostream.runs.galleries import galleries, read_tested
from geostream.runs.galleries import tested_on as elsewhere  # pytest would take its own name for a test
from geostream.runs.inventory import OWN
from geostream.runs.log import RunResult
from geostream.runs.loop import train
from geostream.runs.promotion import promote_if_no_worse
from geostream.runs.run import Run
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.command import refused, said
from tests.helpers import child_of, tiny_layout, tiny_places, write_layout
from tests.training.settings import TINY

SETTINGS = TINY.changed(epochs=2, evaluate_every=1, first_mining=1, mine_every=1, mix="own", recluster_below=0.0)


def joined(store: Store) -> Layout:
    """Images of two sizes, one data set with coordinates and semi-positives, the other without either."""
    places = tiny_places(places=16, test_places=3, tile_size=24, view_size=(24, 24), seed=5)
    alone = [type(place)(**{**vars(place), "semi_positives": ()}) for place in places]
    made = [
        tiny_layout(store, dataset="vigor", name="base", places=16, view_size=(32, 64)),
        write_layout(store, alone, dataset="cv-cities", name="base", coordinates="none"),
    ]
    return join_layouts(store, "both", made)[0]


@pytest.fixture(scope="module")
def root(s3: Any) -> Store:
    return Store.open(f"{s3.url}/joined-run")


@pytest.fixture(scope="module")
def trained(root: Store) -> tuple[Run, RunResult]:
    """A run of two epochs on S3, mined between, and tested on a third data set."""
    layout = joined(root)
    tiny_layout(root, dataset="cvact", name="base", places=8, test_places=5, seed=9, view_size=(32, 64))
    result = train(root, layout, "first", SETTINGS.changed(test_on="cvact"))
    return Run.open(root, layout, "first"), result


def of_dataset(run: Run, place: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return run.layout.part[place]


def test_batches_are_of_one_data_set_from_geographic_then_mined_neighbours(trained: tuple[Run, RunResult]) -> None:
    run, result = trained
    assert [plan["source"] for plan in result.plans] == ["gps", "visual"]
    for epoch in (1, 2):
        plan = run.plan(epoch, run.layout)
        plan.validate(run.layout)
        parts = of_dataset(run, plan.place)
        assert (parts == parts[:, :1]).all() and set(parts[:, 0]) == {0, 1}
    gps = run.graph(0)
    rows = of_dataset(run, gps.places)
    assert (gps.indices[rows == 1] == -1).all(), "without coordinates there is nothing near"
    near = gps.indices[rows == 0]
    assert (of_dataset(run, near[near >= 0]) == 0).all() and (near[:, 0] >= 0).all()


def test_each_test_split_is_measured_as_on_its_own_layout(root: Store, trained: tuple[Run, RunResult]) -> None:
    """The same vectors give the same figures as an evaluation of the data set alone, by its own protocol."""
    run, result = trained
    last = result.evaluations[-1]
    assert [one["dataset"] for one in last["datasets"]] == ["vigor", "cv-cities"]
    assert last["r1"] == pytest.approx(np.mean([one["r1"] for one in last["datasets"]]))
    for one, record in zip(galleries(run), last["datasets"], strict=True):
        assert one.layout.id == open_layout(root, record["dataset"]).id
        found = evaluate_embeddings(one.layout, one.embeddings("test", 2))
        assert {name: record[name] for name in ("r1", "r5", "r1pct", "hit_rate", "gallery", "queries")} == {
            name: getattr(found, name) for name in ("r1", "r5", "r1pct", "hit_rate", "gallery", "queries")
        }
        assert record["gallery"] == len(one.layout.references("test")), "no tile of another data set is in the way"
        assert bool(record["metres"]) == (record["dataset"] == "vigor")
    best = run.best()
    assert best is not None and best["r1"] == max(row["r1"] for row in result.evaluations)


def test_the_best_checkpoint_is_tested_elsewhere_once(root: Store, trained: tuple[Run, RunResult]) -> None:
    run, _ = trained
    best = run.best()
    tested = read_tested(run.folder)
    assert best is not None and tested is not None and tested["trained_on"] == ["vigor", "cv-cities"]
    assert set(tested["on"]) == {"vigor", "cv-cities", "cvact"}
    assert {one["checkpoint"] for one in tested["on"].values()} == {best["checkpoint"]}
    assert tested["on"]["cvact"]["gallery"] == open_layout(root, "cvact").gallery
    again = train(root, run.layout, "first", SETTINGS.changed(test_on=["cvact"]))
    assert again.already_finished
    with pytest.raises(BadInput, match="nowhere"):
        train(root, run.layout, "wrong", SETTINGS.changed(test_on="cvact,nowhere"))
    assert not Run(root, run.layout, "wrong").exists, "told before anything is trained"
    unknown = [one.path for one in run.folder.list() if not OWN.fullmatch(one.path) and "checkpoints/" not in one.path]
    assert not unknown, "runs prune knows every name"


def test_its_own_galleries_are_those_that_it_trained_on(root: Store, trained: tuple[Run, RunResult]) -> None:
    """Although a data set has gone on since, and another layout of it is current."""
    run, _ = trained
    before = {one.layout.dataset: one.layout.id for one in galleries(run)}
    newer = child_of(root, open_layout(root, "vigor", "base"), seed=3)
    use_layout(root, "vigor", newer.name)
    try:
        assert {one.layout.dataset: one.layout.id for one in elsewhere(run, ["cv-cities", "vigor"])} == before
        alone = Run(root, open_layout(root, "vigor", "base"), "older")
        alone.settings = SETTINGS
        [one] = elsewhere(alone, ["vigor"])
        assert one.layout.id == before["vigor"] and elsewhere(alone, ["cv-cities"])
    finally:
        use_layout(root, "vigor", "base")


def test_pictures_are_not_taken_for_panoramas(tmp_path: Path) -> None:
    """Neither by a model that is tested on them, nor by a run on data sets of them that were joined."""
    store = Store.open(tmp_path)
    made = [tiny_layout(store, dataset=name, name="base") for name in ("university1652", "gta-uav", "vigor", "own")]
    run = Run(store, made[2], "one")
    with pytest.raises(BadInput, match=r"gta-uav: picture.*view_kind: panorama"):
        train(store, made[2], "one", SETTINGS.changed(test_on="own,gta-uav"))
    assert not run.exists
    run.settings = SETTINGS
    assert len(elsewhere(run, ["own"])) == 1  # of which nothing is known
    pictures = SETTINGS.changed(view_kind="picture")
    assert elsewhere(run, ["gta-uav"], pictures) and elsewhere(run, ["gta-uav"], SETTINGS.changed(fov=(70, 360)))
    with pytest.raises(BadInput, match="vigor: panorama"):
        elsewhere(Run(store, made[0], "two"), ["vigor"], pictures)
    joined = Run(store, join_layouts(store, "drones", made[:2])[0], "one")
    with pytest.raises(BadInput, match=r"university1652, gta-uav.*--set view_kind=picture"):
        begin(joined, SETTINGS, 1)
    assert not joined.exists and begin(joined, pictures, 1).augment.view_kind == "picture"


@pytest.mark.slow
def test_commands_show_each_data_set(root: Store, trained: tuple[Run, RunResult], tmp_path: Path) -> None:
    """Evaluate on each part and on another data set; the report has the table of transfer, also of the other run."""
    run, result = trained
    names = ["--dataset", "both", "--run", "first"]
    out = said("evaluate", root.url, *names, "--json", str(tmp_path / "all.json"))
    assert "vigor base, test after epoch 2" in out and "cv-cities base, test after epoch 2" in out
    records = json.loads((tmp_path / "all.json").read_text())
    assert [one["dataset"] for one in records] == ["vigor", "cv-cities"]
    assert [one["r1"] for one in records] == [one["r1"] for one in result.evaluations[-1]["datasets"]]
    best = run.best()
    assert best is not None
    told = said("evaluate", root.url, *names, "--on", "cvact")
    assert f"evaluation-test_cvact-epoch-{best['epoch']:04d}.html" in told and "first/report.html" in told
    said("evaluate", root.url, *names, "--on", "cvact", "--checkpoint", run.checkpoints()[-1])
    tested = read_tested(run.folder)
    assert tested is not None and tested["on"]["cvact"]["checkpoint"] == best["checkpoint"], "others are not compared"
    assert "vigor, cv-cities" in refused("evaluate", root.url, *names, "--on", "both")
    assert "vigor, cv-cities" in refused("index", root.url, *names)
    assert "/vigor/indexes/tiles" in said("index", root.url, *names, "--of", "vigor", "--name", "tiles")
    assert "joins none" in refused("index", root.url, "--dataset", "cvact", "--run", "new", "--of", "vigor")
    alone = train(root, open_layout(root, "vigor"), "alone", SETTINGS.changed(epochs=1, mix="mixed"))
    said("evaluate", root.url, "--dataset", "vigor", "--run", "alone", "--on", "cv-cities")
    assert alone.epochs == 1
    page = report.publish(run, result, report.summarise(root.url, run.layout, result))
    table = page[page.index("Trained on one") : page.index("Epoch plans")]
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table.replace("\n", ""))][1:]
    assert [row[:2] for row in rows] == [["both (vigor, cv-cities)", "first"], ["vigor", "alone"]]
    assert all("%" in cell for cell in rows[0][2:]) and rows[1][-1] == "–" and "%" in rows[1][2]
    assert re.findall("<h3>(.*?)</h3>", page)[:2] == ["vigor paired, view→tile", "cv-cities paired, view→tile"]
    assert "the mean of the test galleries of" in page
    other = report.publish(
        Run.open(root, open_layout(root, "vigor"), "alone"),
        alone,
        report.summarise("", open_layout(root, "vigor"), alone),
    )
    assert "both (vigor, cv-cities)" in other


@pytest.mark.slow
def test_models_are_compared_on_each_and_promoted_by_the_mean(root: Store, trained: tuple[Run, RunResult]) -> None:
    run, _ = trained
    first, model = promote_if_no_worse(run)
    assert first.promotes and model is not None and first.new.metrics["protocol"] == "mean"
    other = train(root, run.layout, "second", SETTINGS.changed(epochs=1, seed=3))
    decision, _ = promote_if_no_worse(Run.open(root, run.layout, "second"))
    compared = decision.comparison
    assert compared is not None and decision.old is not None and other.epochs == 1
    each = [one for one in compared.metrics if one.metric == "r1" and one.protocol != "mean"]
    assert [one.protocol for one in each] == ["vigor paired", "cv-cities paired"]
    head = compared.metrics[0]
    assert head.difference == pytest.approx(np.mean([one.difference for one in each]))
    assert head.standard_error == pytest.approx(np.hypot(each[0].standard_error, each[1].standard_error) / 2)
    assert head.old == pytest.approx(decision.old.metrics["r1"]) and head.new == pytest.approx(
        decision.new.metrics["r1"]
    )
    for moved in (*compared.won_queries, *compared.lost_queries):
        assert run.layout.key(moved.place) == moved.key


@pytest.mark.slow
def test_cut_off_it_goes_on_with_the_same_weights(tmp_path: Path, trained: tuple[Run, RunResult]) -> None:
    """Stopped within the second epoch by a checkpoint that another process goes on from."""
    run, whole = trained
    store = Store.open(tmp_path)
    layout = joined(store)
    assert layout.id == run.layout.id

    class Cut(BaseException):
        pass

    def cut(record: dict[str, Any]) -> None:
        if record["stage"] == "plan" and record["epoch"] == 2:
            raise Cut

    settings = SETTINGS.changed(checkpoint_every=2)
    with pytest.raises(Cut):
        train(store, layout, "first", settings, on_record=cut)
    again = train(store, layout, "first", settings)
    there = Run.open(store, layout, "first")
    names = run.checkpoints()[-1], there.checkpoints()[-1]
    assert names[0] == names[1]
    weights = [one.folder.read(f"checkpoints/{names[0]}/model.safetensors") for one in (run, there)]
    assert weights[0] == weights[1]
    assert [row["r1"] for row in again.evaluations] == [row["r1"] for row in whole.evaluations]


@pytest.mark.slow
def test_its_next_generation_is_trained_on_as_well(root: Store, trained: tuple[Run, RunResult]) -> None:
    """The similarity order mixes the data sets within a shard; batches of one data set are made of it nonetheless."""
    run, _ = trained
    after = stages.recluster(run, 1)
    assert after.joined == run.layout.joined and verify_layout(after).problems == ()
    mixed = [len(set(after.part[after.shard_of_place == shard])) for shard in range(len(after.shard_names))]
    assert max(mixed) == 2
    other = Run(root, after, "reclustered")
    other.settings = SETTINGS
    plan = stages.plan_epoch(other, 1)
    plan.validate(after)
    parts = after.part[plan.place]
    assert (parts == parts[:, :1]).all() and set(parts[:, 0]) == {0, 1}
    assert [one.layout.dataset for one in galleries(other)] == ["vigor", "cv-cities"]


def test_two_kinds_of_coordinates_are_searched_each_by_its_own(tmp_path: Path) -> None:
    """UTM metres and degrees side by side: each data set's graph is that of its own layout."""
    store = Store.open(tmp_path)
    places = tiny_places(places=12, seed=2)
    utm = [
        type(one)(**{**vars(one), "position": (4e6 + 30.0 * i, 5e5 - 17.0 * (i % 3))}) for i, one in enumerate(places)
    ]
    made = [tiny_layout(store, dataset="vigor"), write_layout(store, utm, dataset="cvact", coordinates="utm")]
    both = join_layouts(store, "both", made)[0]
    assert both.coordinates == "none"
    graph = build_gps_graph(store.child("run"), "both.zarr", both, 4)
    for number, layout in enumerate(made):
        alone = build_gps_graph(store.child("run"), f"{number}.zarr", layout, 4)
        mine = both.part[graph.places] == number
        first = both.joined[number].first
        assert np.array_equal(graph.indices[mine], np.where(alone.indices >= 0, alone.indices + first, -1))
        assert np.array_equal(graph.scores[mine], alone.scores)


@pytest.mark.parametrize("strategy", ["patchwork", "sample4geo", "random"])
@pytest.mark.parametrize("mix", ["mixed", "own"])
def test_every_strategy_plans_both_ways(tmp_path: Path, strategy: str, mix: str) -> None:
    store = Store.open(tmp_path)
    layout = joined(store)
    run = Run(store, layout, "one")
    run.settings = TrainSettings.model_validate(
        TINY.changed(strategy=strategy, mix=mix, lanes=2, batch_size=3).model_dump()
    )
    plan = stages.plan_epoch(run, 1)
    plan.validate(layout)
    parts = layout.part[plan.place]
    pure = (parts == parts[:, :1]).all(axis=1)
    steps = parts[:, 0].reshape(-1, 2)
    if mix == "own":
        assert pure.all() and (steps[:, 0] == steps[:, 1]).all(), "lanes take the same data set at a time"
    else:
        assert not pure.all()


def test_a_data_set_that_fills_no_batch_of_its_own_is_named(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    small = write_layout(store, tiny_places(places=6, test_places=3, seed=5), dataset="cvact", coordinates="none")
    layout = join_layouts(store, "both", [tiny_layout(store, dataset="vigor", places=60), small])[0]
    run = Run(store, layout, "one")
    run.settings = TINY.changed(mix="own", lanes=2, batch_size=4)
    with pytest.raises(BadInput, match="cvact"):
        stages.plan_epoch(run, 1)
