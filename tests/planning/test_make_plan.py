"""Layout, graph and settings become a valid plan that says how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geostream import dask as dask_module
from geostream.arrays import Int32
from geostream.dask import shared_connection
from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Layout
from geostream.mining.embeddings import read_rows
from geostream.mining.gps import build_gps_graph
from geostream.mining.graph import NeighbourGraph
from geostream.mining.visual import build_visual_graph
from geostream.planning import graph_rows, hardness
from geostream.planning.batches import FALLBACKS, LaneTask
from geostream.planning.graph_rows import LaneRows
from geostream.planning.make_plan import make_plan, reachable_by_shards
from geostream.planning.spreading import shard_of_rows
from geostream.reclustering.order import similarity_order
from geostream.runs.run import GPS_GRAPH
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.cities import city
from tests.mining.test_visual import embed

make_plan_module = import_module("geostream.planning.make_plan")  # the package's own name of it is the function
SETTINGS = TrainSettings().changed(batch_size=16, neighbours=16, resident_shards=4)


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


@pytest.fixture
def layout(root: Store) -> Layout:
    return city(root, side=24, areas=2, views=2, per_shard=24)


def test_gps_plan(root: Store, layout: Layout) -> None:
    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)
    first = make_plan(layout, graph, SETTINGS, 0, seed=3)
    plan = make_plan(layout, graph, SETTINGS, 1, seed=3, previous=[first])
    plan.validate(layout)
    assert (plan.source, plan.graph, plan.strategy) == ("gps", "neighbours/gps.zarr", "patchwork")
    quality = plan.quality
    n = len(layout.pairs("train"))
    assert quality["pairs"] == n
    assert quality["batches"] * 16 + quality["left_out"] == n
    assert quality["left_out"] == n % 16
    assert 0.8 < quality["hardness_score"] < 1.5
    assert first.quality["overlap"] is None
    assert 1 / 16 <= quality["overlap"] < 0.6
    assert 2 / 48 < quality["resident_share"] < 0.2  # of four resident shards, half is used up on average
    # Nearly whole shards: tar headers and the json members between images are fetched, too.
    assert quality["amplification"] == pytest.approx(layout.shard_sizes[:-1].sum() / used_bytes(layout), rel=0.05)
    assert quality["requests_per_gib"] > 0
    again = make_plan(layout, graph, SETTINGS, 1, seed=3, previous=[first])
    assert again.hash == plan.hash
    assert again.quality == plan.quality


def used_bytes(layout: Layout) -> int:
    members = layout.members
    images = np.char.endswith(members["member"].to_numpy(zero_copy_only=False).astype(str), ".jpg")
    return int(members["size"].to_numpy()[images].sum())


def test_random_plan_scores_nothing(root: Store, layout: Layout) -> None:
    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)
    plan = make_plan(layout, graph, SETTINGS.changed(strategy="random"), 0, seed=3)
    assert abs(plan.quality["hardness_score"]) < 0.1
    assert plan.quality["resident_share"] > 0.3  # and says honestly how much it holds
    assert (plan.source, plan.graph) == ("random", "")


def test_random_access_is_the_reference(root: Store, layout: Layout) -> None:
    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)
    plan = make_plan(layout, graph, SETTINGS.changed(resident_shards=1000, strategy="sample4geo"), 0, seed=3)
    assert plan.quality["hardness_score"] == pytest.approx(1, abs=1e-9)


def test_visual_plan(root: Store, layout: Layout) -> None:
    embeddings = embed(root, layout)
    graph = build_visual_graph(root, "neighbours/visual-epoch-0004.zarr", layout, embeddings, 16)
    plan = make_plan(layout, graph, SETTINGS.changed(lanes=3), 5, seed=0, embeddings=embeddings)
    plan.validate(layout)
    assert (plan.source, plan.graph, plan.lanes) == ("visual", graph.name, 3)
    assert plan.lane[:4].tolist() == [0, 1, 2, 0]
    assert 0 < plan.quality["hardness_score"] < 1.2
    without = make_plan(layout, graph, SETTINGS, 5, seed=0)
    assert without.quality["hardness_score"] is None
    assert "embeddings" in without.quality["hardness_note"]
    with pytest.raises(StaleArtefact, match="embeddings/epoch-0004.zarr.* other"):
        make_plan(layout, graph, SETTINGS, 5, seed=0, embeddings=replace(embeddings, name="other"))


def test_as_mixed_as_hardness_allows(root: Store, layout: Layout) -> None:
    """The most mixed way that is hard enough; where none is, the hardest of all."""
    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)

    def planned(hard_enough: float) -> tuple[str, float]:
        quality = make_plan(layout, graph, SETTINGS.changed(hardness=hard_enough), 1, seed=3).quality
        return quality["assembly"], quality["hardness_score"]

    mixed, hardest = planned(0.0), planned(9.0)
    assert mixed[0] == "patchwork" != hardest[0]
    assert 0 < mixed[1] < hardest[1]
    assert planned(mixed[1] - hardness.PLAN_MARGIN - 1e-6) == mixed  # just hard enough
    assert planned(mixed[1] - hardness.PLAN_MARGIN + 1e-6)[0] != "patchwork"


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_score_that_other_shards_would_allow(root: Store, layout: Layout, lanes: int) -> None:
    """In the shards that are there it is the plan's own; in shards of places that are alike, more."""
    embeddings = embed(root, layout)
    graph = build_visual_graph(root, "neighbours/visual-epoch-0004.zarr", layout, embeddings, 16)
    settings = SETTINGS.changed(lanes=lanes, hardness=9.0)
    here = layout.shard_of_place[graph.places]
    reachable = reachable_by_shards(layout, graph, embeddings, settings)
    plan = make_plan(layout, graph, settings, 1, seed=settings.seed, embeddings=embeddings)
    assert reachable(here) == pytest.approx(plan.quality["reachable_score"], abs=1e-9)
    vectors = read_rows(embeddings.reference)[np.searchsorted(embeddings.reference_place, graph.places)]
    order = similarity_order(vectors, np.ones(len(vectors), dtype=np.int64), len(vectors) / len(np.unique(here)))
    alike = reachable(shard_of_rows(order))
    assert alike is not None and alike > 1.1 * plan.quality["reachable_score"]  # these embeddings know of no place
    one = reachable(np.zeros_like(here))
    assert one is None if lanes > 1 else one is not None  # a lane needs a shard of its own
    too_large = settings.changed(batch_size=4096)
    assert reachable_by_shards(layout, graph, embeddings, too_large)(here) is None


def test_ways_that_drift_only_where_no_other_is_hard_enough(
    root: Store, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)

    def planned(hard_enough: float) -> Mapping[str, Any]:
        return make_plan(layout, graph, SETTINGS.changed(hardness=hard_enough), 1, seed=3).quality

    monkeypatch.setitem(FALLBACKS, "patchwork", ("patchwork", "patchwork-unmixed"))  # of which only the second drifts
    drifting = planned(9.0)
    assert drifting["assembly"] == "patchwork-unmixed"
    assert 0 < drifting["reachable_score"] < drifting["hardness_score"]
    spread = planned(drifting["reachable_score"])  # just hard enough, without a margin
    assert spread["assembly"] == "patchwork"
    assert spread["hardness_score"] == spread["reachable_score"] == drifting["reachable_score"]
    assert planned(drifting["reachable_score"] + 1e-6)["assembly"] == "patchwork-unmixed"


def test_each_plan_is_measured_once(root: Store, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two that the others are scored by, and each way that is tried."""
    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)
    measured = []

    def measure(batches: Int32, similarity: hardness.Similarity) -> float:
        measured.append(batches.tobytes())
        return before(batches, similarity)

    before = hardness.batch_hardness
    monkeypatch.setattr(hardness, "batch_hardness", measure)
    plan = make_plan(layout, graph, SETTINGS.changed(hardness=9.0), 1, seed=3)
    assert len(measured) == len(set(measured)) == 2 + len(FALLBACKS["patchwork"]) > 3
    assert plan.quality["hardness_score"] > 0


def test_no_coordinates_no_graph(root: Store) -> None:
    """University-1652 begins so."""
    layout = city(root, side=4, areas=2, views=9, coordinates="none")
    settings = SETTINGS.changed(strategy="random", batch_size=4)
    plan = make_plan(layout, None, settings, 0, seed=0)
    plan.validate(layout)
    assert plan.quality["hardness_score"] is None
    with pytest.raises(BadInput, match="strategy=random"):
        make_plan(layout, None, SETTINGS, 0, seed=0)


def test_refusals(root: Store, layout: Layout) -> None:
    other = city(root, side=5, name="g1")
    with pytest.raises(StaleArtefact, match=r"places .*\bg1\b"):
        make_plan(other, build_gps_graph(root, GPS_GRAPH, layout, 4), SETTINGS, 0, seed=0)
    with pytest.raises(BadInput, match="1 lanes .* 512.* batch_size"):
        make_plan(other, None, SETTINGS.changed(batch_size=512, strategy="random"), 0, seed=0)


@pytest.mark.parametrize("kind", ["gps", "visual"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_large_graph_is_handed_out_by_lanes(
    monkeypatch: pytest.MonkeyPatch, s3_store: Store, kind: str, lanes: int
) -> None:
    """The batches are the same, and nothing is left on the store; the scale of so few places is a rough estimate."""
    layout, run = city(s3_store, side=24, areas=2, views=2, per_shard=24), s3_store.child("run")
    embeddings = embed(run, layout) if kind == "visual" else None
    graph = (
        build_gps_graph(run, GPS_GRAPH, layout, 16)
        if embeddings is None
        else build_visual_graph(run, "neighbours/visual-epoch-0004.zarr", layout, embeddings, 16)
    )
    settings = SETTINGS.changed(lanes=lanes, hardness=0.0)  # so that the first way is taken
    before = make_plan(layout, graph, settings, 0, seed=3)
    arguments: dict[str, Any] = {"seed": 3, "previous": [before], "embeddings": embeddings}
    small = make_plan(layout, graph, settings, 1, **arguments)
    monkeypatch.setattr(make_plan_module, "WHOLE_GRAPH", 0)
    monkeypatch.setattr(graph_rows, "BLOCK_BYTES", 1)  # a Zarr shard each
    monkeypatch.setattr(graph_rows, "SHARD_ROWS", 100)
    monkeypatch.setattr(NeighbourGraph, "rows", None)
    large = make_plan(layout, graph, settings, 1, **arguments)
    assert large.hash == small.hash
    assert large.quality["hardness_score"] == pytest.approx(small.quality["hardness_score"], abs=0.3)
    assert not s3_store.exists(f"run/{graph.name}/scratch/made.json")
    assert not s3_store.child("run", *graph.name.split("/")).folders("scratch")


def test_fallbacks_are_tried_on_some_lanes(monkeypatch: pytest.MonkeyPatch, root: Store, layout: Layout) -> None:
    """The one that is chosen there is used for all, and its own score counts."""
    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)
    settings = SETTINGS.changed(lanes=4, hardness=9.0)
    monkeypatch.setattr(make_plan_module, "WHOLE_GRAPH", 0)
    monkeypatch.setattr(make_plan_module, "TRIED_PAIRS", 0)
    assembled: list[tuple[int, str]] = []

    def noted(work: Any, tasks: Any) -> Any:
        assembled.extend((task.number, task.strategy) for task in tasks if isinstance(task, LaneTask))
        return map(work, tasks)

    plan = make_plan(layout, graph, settings, 1, seed=3, map_fn=noted)
    plan.validate(layout)
    ways = FALLBACKS["patchwork"]
    assert sorted(assembled[:-2]) == sorted([*((lane, way) for way in ways for lane in (0, 2)), (0, "sample4geo")])
    assert sorted(assembled[-2:]) == [(lane, plan.quality["assembly"]) for lane in (1, 3)]  # the others are there
    assert plan.quality["batches"] * 16 + plan.quality["left_out"] == plan.quality["pairs"]


def test_what_a_killed_planning_left_is_removed_by_the_next(
    monkeypatch: pytest.MonkeyPatch, root: Store, layout: Layout
) -> None:
    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)
    monkeypatch.setattr(make_plan_module, "WHOLE_GRAPH", 0)
    scratch = Path(root.url.removeprefix("file://")) / GPS_GRAPH / "scratch"
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(graph_rows, "drop_scratch", lambda *_: None)
        killed.setattr(LaneRows, "read", lambda _: _interrupt())
        make_plan(layout, graph, SETTINGS, 1, seed=3)
    assert len(list(scratch.iterdir())) > 1
    make_plan(layout, graph, SETTINGS, 1, seed=3)
    assert not scratch.exists()


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.server
def test_lanes_on_a_dask_cluster(monkeypatch: pytest.MonkeyPatch, root: Store, layout: Layout) -> None:
    """Each lane is a task of its own, and the plan is the one that this process makes; also of a large graph."""
    from distributed import LocalCluster

    graph = build_gps_graph(root, GPS_GRAPH, layout, 16)
    settings = SETTINGS.changed(lanes=4)
    before = make_plan(layout, graph, settings, 0, seed=1)
    here = make_plan(layout, graph, settings, 1, seed=1, previous=[before])
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        connections: list[str] = []
        connect = dask_module._client

        def noted(url: str) -> Any:
            connections.append(url)
            return connect(url)

        monkeypatch.setattr(dask_module, "_client", noted)
        with shared_connection(cluster.scheduler_address, "plan") as map_fn:
            there = make_plan(layout, graph, settings, 1, seed=1, previous=[before], map_fn=map_fn)
            monkeypatch.setattr(make_plan_module, "WHOLE_GRAPH", 0)
            by_lanes = make_plan(layout, graph, settings, 1, seed=1, previous=[before], map_fn=map_fn)
        assert connections == [cluster.scheduler_address]
    assert by_lanes.hash == here.hash
    assert there.hash == here.hash and there.quality == here.quality
    assert np.bincount(there.lane).tolist() == [there.n_batches // 4] * 4
