"""Neighbour graphs against brute force, and as objects on the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geostream.errors import GeostreamError, NotFound, StaleArtefact
from geostream.layout import Layout
from geostream.mining import approximate, exact
from geostream.mining import graph as graphs
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings
from geostream.mining.gps import build_gps_graph
from geostream.mining.graph import GraphWriter, open_graph
from geostream.mining.visual import build_visual_graph
from geostream.runs.run import GPS_GRAPH, Run
from geostream.store import Store
from tests.cities import city, unit


def embed(
    run: Store, layout: Layout, *, views_noise: float = 0.3, dim: int = 16, distractors: bool = False
) -> Embeddings:
    """Random embeddings, views near their tile; with ``distractors`` the gallery holds the test place's tile, too."""
    rng = np.random.default_rng(0)
    pairs = layout.pairs("train")
    base = unit(rng.normal(size=(layout.n_places, dim)))
    reference_place = np.arange(layout.n_places, dtype=np.int32) if distractors else np.unique(pairs.place)
    writer = create_embeddings(
        run, "embeddings/epoch-0004.zarr", layout=layout, checkpoint="checkpoints/step-00000001", split="train",
        pairs=pairs, reference_place=reference_place, dim=dim,
    )  # fmt: skip
    views = unit(base[pairs.place] + views_noise * rng.normal(size=(len(pairs), dim)))
    writer.write_query(np.arange(len(pairs)), views)
    writer.write_reference(np.arange(len(reference_place)), base[reference_place])
    writer.commit()
    return open_embeddings(run, "embeddings/epoch-0004.zarr", layout)


def small_blocks(monkeypatch: pytest.MonkeyPatch, rows: int = 16) -> None:
    """So that a small city takes several blocks of queries and of references, and several Zarr shards of ``rows``."""
    for module in (exact, graphs):
        monkeypatch.setattr(module, "SHARD_ROWS", rows)
    monkeypatch.setattr(exact, "CHUNK_ROWS", rows // 2)
    for module in (exact, approximate):
        monkeypatch.setattr(module, "BLOCK", 2 * rows - 2)
        monkeypatch.setattr(module, "QUERIES", rows + 4)


def check_visual(graph: graphs.NeighbourGraph, layout: Layout, embeddings: Embeddings) -> None:
    """Every row is the brute-force list: best view's cosine, no own place, no semi-positive, no test place."""
    query, reference = embeddings.query[:], embeddings.reference[:]
    cosine = np.asarray(query) @ np.asarray(reference).T
    excluded, train = layout.excluded("train"), set(np.unique(embeddings.pairs.place).tolist())
    for place, row, scores in zip(graph.places.tolist(), graph.indices, graph.scores, strict=True):
        best = cosine[embeddings.pairs.place == place].max(axis=0)
        allowed = [
            (float(best[at]), other)
            for at, other in enumerate(embeddings.reference_place.tolist())
            if other in train and other != place and other not in excluded.row(place)
        ]
        expected = sorted(allowed, key=lambda found: (-found[0], found[1]))[: graph.k]
        assert row[: len(expected)].tolist() == [other for _, other in expected]
        assert scores[: len(expected)] == pytest.approx([score for score, _ in expected], abs=2e-3)
        assert (row[len(expected) :] == -1).all()


@pytest.mark.parametrize(("views", "k", "distractors"), [(1, 5, False), (3, 5, True), (3, 200, False)])
def test_visual_graph_is_brute_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int, k: int, distractors: bool
) -> None:
    """Over several blocks of queries and of references; K may exceed what there is."""
    small_blocks(monkeypatch)
    root = Store.open(tmp_path)
    layout = city(root, side=6, areas=2, views=views)
    embeddings = embed(root.child("run"), layout, distractors=distractors)
    graph = build_visual_graph(root.child("run"), Run.graph_name(4), layout, embeddings, k)
    assert (graph.kind, graph.embeddings, graph.search) == ("visual", embeddings.name, {"mode": "exact"})
    check_visual(graph, layout, embeddings)


def test_visual_graph_on_s3_with_a_cluster_of_ones_own(s3_store: Store) -> None:
    """The cluster is a URL: here of a scheduler with a worker in a process of its own."""
    from distributed import LocalCluster

    layout = city(s3_store, side=6, areas=2, views=2)
    run = s3_store.child("city", "runs", "r")
    embeddings = embed(run, layout)
    with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        build_visual_graph(run, Run.graph_name(4), layout, embeddings, 7, cluster.scheduler_address)
    check_visual(open_graph(run, Run.graph_name(4), layout), layout, embeddings)


def test_a_scheduler_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Store.open(tmp_path)
    layout = city(root, side=4)
    embeddings = embed(root, layout)
    monkeypatch.setattr("geostream.dask.CONNECT_SECONDS", 1)
    with pytest.raises(GeostreamError, match="tcp://127.0.0.1:1: "):
        build_visual_graph(root, "neighbours/v.zarr", layout, embeddings, 3, "tcp://127.0.0.1:1")
    with pytest.raises(NotFound, match="not committed"):
        open_graph(root, "neighbours/v.zarr", layout)


def test_artefacts_of_another_layout_or_half_written_are_refused(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    layout, other = city(root, side=5), city(root, side=6, name="g1")
    embeddings = embed(root, layout)
    with pytest.raises(StaleArtefact, match=r"places .*\bg1\b.* embed again"):
        build_visual_graph(root, "neighbours/v.zarr", other, embeddings, 3)
    build_gps_graph(root, GPS_GRAPH, layout, 3)
    with pytest.raises(StaleArtefact, match=r"places .*\bg1\b"):
        open_graph(root, GPS_GRAPH, other)
    with pytest.raises(NotFound, match="visual-epoch-0009.zarr: not there.* geostream mine"):
        open_graph(root, Run.graph_name(9), layout)
    # Begun anew and cut off: the old one is gone, the new one not there.
    GraphWriter.create(
        root, GPS_GRAPH, kind="gps", layout=layout, embeddings="", places=np.arange(50, dtype=np.int32), k=3
    )
    with pytest.raises(NotFound, match="not committed"):
        open_graph(root, GPS_GRAPH, layout)


def test_graph_regions_are_whole_zarr_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SHARD_ROWS", 8)
    layout = city(Store.open(tmp_path), side=3)
    writer = GraphWriter.create(
        Store.open(tmp_path / "run"), "g.zarr", kind="gps", layout=layout, embeddings="",
        places=np.arange(18, dtype=np.int32), k=2,
    )  # fmt: skip
    rows = np.zeros((8, 2), dtype=np.int32)
    for start, stop in ((4, 8), (0, 4)):
        with pytest.raises(ValueError, match="Zarr shards"):
            writer.write(start, rows[: stop - start], rows[: stop - start].astype(np.float32))


def test_distances_beyond_float16_stay_finite(tmp_path: Path) -> None:
    """The place with a place 100 km away has a score of the largest float16, not minus infinity."""
    layout = city(Store.open(tmp_path), side=1)
    writer = GraphWriter.create(
        Store.open(tmp_path / "run"), "g.zarr", kind="gps", layout=layout, embeddings="",
        places=np.arange(2, dtype=np.int32), k=2,
    )  # fmt: skip
    writer.write(0, np.array([[1, -1], [0, -1]], dtype=np.int32), np.array([[-1e5, -np.inf], [-10.0, -np.inf]]))
    writer.commit({"mode": "exact"})
    scores = open_graph(Store.open(tmp_path / "run"), "g.zarr", layout).scores
    assert scores.tolist() == [[-65504, -np.inf], [-10, -np.inf]]


def test_embeddings_of_another_checkpoint_are_named(tmp_path: Path) -> None:
    """A graph says which embeddings it came from; a plan refuses others (see test_planning)."""
    root = Store.open(tmp_path)
    layout = city(root, side=4)
    embeddings = embed(root, layout)
    graph = build_visual_graph(root, "neighbours/v.zarr", layout, replace(embeddings), 3)
    assert graph.embeddings == "embeddings/epoch-0004.zarr"
