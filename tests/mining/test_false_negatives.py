"""Likely false negatives are dropped from mined lists: the rule against brute force, in either search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Float32
from geostream.layout import Layout
from geostream.mining import approximate, ivf
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings
from geostream.mining.false_negatives import LOST, depth, drop_above, own_scores
from geostream.mining.graph import NeighbourGraph
from geostream.mining.topk import TopK
from geostream.mining.visual import build_visual_graph
from geostream.planning.make_plan import make_plan
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.cities import city, unit
from tests.mining.test_visual import small_blocks

K = 6
GRAPH = "neighbours/v.zarr"


def embed(run: Store, layout: Layout, tiles: Float32, views: Float32) -> Embeddings:
    """These vectors as embeddings, the test place's tile among them."""
    pairs = layout.pairs("train")
    writer = create_embeddings(
        run, "embeddings/e.zarr", layout=layout, checkpoint="", split="train", pairs=pairs,
        reference_place=np.arange(layout.n_places, dtype=np.int32), dim=tiles.shape[1],
    )  # fmt: skip
    writer.write_query(np.arange(len(pairs)), views)
    writer.write_reference(np.arange(layout.n_places), tiles)
    writer.commit()
    return open_embeddings(run, "embeddings/e.zarr", layout)


def noisy(run: Store, layout: Layout, noise: float) -> Embeddings:
    """Clusters of places; with much noise many a view is nearer to other tiles than to its own."""
    rng, pairs = np.random.default_rng(0), layout.pairs("train")
    centres = 1.5 * rng.normal(size=(layout.n_places // 20 + 1, 16))
    base = centres[rng.integers(0, len(centres), layout.n_places)] + rng.normal(size=(layout.n_places, 16))
    return embed(run, layout, unit(base), unit(base[pairs.place] + noise * rng.normal(size=(len(pairs), 16))))


def check(graph: NeighbourGraph, layout: Layout, embeddings: Embeddings, margin: float) -> None:
    """Lists and counts are those of brute force."""
    cosine = np.asarray(embeddings.query[:]) @ np.asarray(embeddings.reference[:]).T
    excluded, train = layout.excluded("train"), np.unique(embeddings.pairs.place)
    counts = np.zeros(len(LOST), dtype=int)
    for place, row in zip(graph.places.tolist(), graph.indices.tolist(), strict=True):
        best = cosine[embeddings.pairs.place == place].max(axis=0)
        own = best[place]
        others = np.setdiff1d(train, [place, *excluded.row(place)])
        nearest = others[np.lexsort((others, -best[others]))][: 2 * K].tolist()
        left = [one for one in nearest if own <= 0 or best[one] <= np.float32(margin) * own]
        assert row == (left + K * [-1])[:K]
        dropped = len(nearest) - len(left)
        counts += [dropped, dropped > 0, dropped > 0 and len(left) < K, dropped > 0 and not left]
    assert [graph.search[name] for name in LOST] == counts.tolist()
    assert (graph.search["positive_margin"], graph.search["searched"]) == (margin, 2 * K)


@pytest.mark.parametrize(("views", "noise"), [(1, 0.6), (3, 0.6), (1, 3.0)])
def test_what_scores_above_the_margin_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int, noise: float
) -> None:
    """Over several blocks and Zarr shards, and with other blocks the same."""
    root = Store.open(tmp_path)
    layout = city(root, side=6, areas=2, views=views)
    embeddings = noisy(root, layout, noise)
    graphs = []
    for rows in (16, 48):
        small_blocks(monkeypatch, rows)
        graphs.append(build_visual_graph(root, GRAPH, layout, embeddings, K, positive_margin=0.95))
        check(graphs[-1], layout, embeddings, 0.95)
    assert (graphs[0].indices == graphs[1].indices).all() and graphs[0].search == graphs[1].search
    assert 0 < graphs[0].search["touched"] < len(graphs[0].places)
    assert (graphs[0].search["short"] > 0) == (noise > 1)
    plain = build_visual_graph(root, GRAPH, layout, embeddings, K)
    assert plain.search == {"mode": "exact"}


def test_the_approximate_search_drops_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 64)
    monkeypatch.setattr(ivf, "LIST", 20)
    monkeypatch.setattr(ivf, "PARTITION", 100)
    monkeypatch.setattr(approximate, "WORTH", 1.0)
    for name, value in (("WRITTEN", 128), ("CENTROIDS", 8), ("SAMPLE", 150)):
        monkeypatch.setattr(approximate, name, value)
    root = Store.open(tmp_path)
    layout = city(root, side=9, areas=2, views=2)
    embeddings = noisy(root, layout, 0.6)
    exact = build_visual_graph(root, GRAPH, layout, embeddings, K, search="exact", positive_margin=0.9)
    lists, counts = exact.indices, exact.search
    found = build_visual_graph(root, GRAPH, layout, embeddings, K, search="approximate", positive_margin=0.9)
    assert found.search["mode"] == "approximate" and found.search["searched"] == 2 * K
    common = [np.isin(row, other).mean() for row, other in zip(found.indices, lists, strict=True)]
    assert np.mean(common) > 0.95
    assert counts["dropped"] > 20 and found.search["dropped"] == pytest.approx(counts["dropped"], rel=0.05)


def test_where_everything_is_dropped_lists_are_empty_and_a_plan_is_made(tmp_path: Path) -> None:
    """All tiles are alike, as after no training at all."""
    root = Store.open(tmp_path)
    layout = city(root, side=4, areas=2)
    alike = unit(np.ones((layout.n_places, 4)))
    embeddings = embed(root, layout, alike, alike[: len(layout.pairs("train"))])
    graph = build_visual_graph(root, GRAPH, layout, embeddings, K, positive_margin=0.95)
    n = len(graph.places)
    assert (graph.indices == -1).all() and np.isinf(graph.scores).all()
    assert [graph.search[name] for name in LOST] == [2 * K * n, n, n, n]
    for strategy in ("patchwork", "sample4geo"):
        settings = TrainSettings().changed(batch_size=8, neighbours=K, strategy=strategy)
        plan = make_plan(layout, graph, settings, 2, 0, [], embeddings)
        assert plan.n_batches > 0


@pytest.mark.parametrize("own", [-0.5, 0.0])
def test_a_place_that_is_not_like_its_own_tile_keeps_all(tmp_path: Path, own: float) -> None:
    root = Store.open(tmp_path)
    layout = city(root, side=4, areas=1)
    n = len(layout.pairs("train"))
    tiles = unit(np.random.default_rng(0).normal(size=(layout.n_places, 8)))
    tiles[0], views = np.eye(8, dtype=np.float32)[0], tiles[:n].copy()
    views[0] = (1 - own**2) ** 0.5 * unit(np.where(np.arange(8) > 0, tiles[1], 0.0)[None])[0]
    views[0, 0] = own
    embeddings = embed(root, layout, tiles, unit(views))
    assert own_scores(embeddings, 0, n)[0] == pytest.approx(own) and (own_scores(embeddings, 0, n)[1:] > 0.99).all()
    graph = build_visual_graph(root, GRAPH, layout, embeddings, K, positive_margin=0.5)
    check(graph, layout, embeddings, 0.5)


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=0, max_size=8),
    st.floats(-1, 1, width=32) | st.just(float("inf")),
    st.integers(1, 6),
)
@settings(deadline=None)
def test_the_first_are_dropped_and_the_next_kept(scores: list[float], limit: float, k: int) -> None:
    best = sorted(scores, reverse=True)
    row = np.array([[*best, -np.inf]], dtype=np.float32)
    found = TopK(np.array([[*range(len(best)), -1]], dtype=np.int32), row)
    left, dropped = drop_above(found, np.array([limit], dtype=np.float32), k)
    wanted = [number for number, score in enumerate(best) if not score > limit]
    assert left.other[0].tolist() == (wanted + k * [-1])[:k]
    assert left.score[0].tolist() == ([best[number] for number in wanted] + k * [-np.inf])[:k]
    assert dropped[0] == len(best) - len(wanted)


def test_twice_as_many_are_searched_only_on_demand() -> None:
    assert (depth(128, 0.0), depth(128, 0.95)) == (128, 256)
