"""Each protocol end to end, from embeddings in Zarr to rows of results, against loops over places and fractions."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Float32, Pairs
from geostream.errors import BadInput, StaleArtefact
from geostream.evaluation import evaluate as module
from geostream.evaluation import protocols
from geostream.evaluation import ranks as ranking
from geostream.evaluation.evaluate import evaluate_embeddings, query_pieces
from geostream.evaluation.protocols import BOTH_WAYS, NEAR, PAIRED, TO_TILE, TO_VIEW, searches, split_pairs
from geostream.layout import Layout
from geostream.mining import embeddings as stored
from geostream.mining.embeddings import open_embeddings
from geostream.store import Store
from tests.benchmarks import evaluate as bench
from tests.evaluation import plain_metrics
from tests.evaluation.galleries import Spot, View, embedded_as, gallery_of
from tests.evaluation.test_ranks import embeddings as awkward

HEADLINE = ("r1", "r5", "r10", "r1pct", "hit_rate")


def plain_rows(
    spots: list[Spot], protocol: str, query: Float32, reference: Float32
) -> list[tuple[str, dict[str, Fraction]]]:
    """(direction, metrics) by the words of a protocol; rows of ``query`` are views, in order, of splits but "train"."""
    views = [(place, view) for place, spot in enumerate(spots) for view in spot.views if view.split != "train"]
    tiles = [place for place, spot in enumerate(spots) if "test" in spot.splits]
    asked = [row for row, (_, view) in enumerate(views) if view.split == "test"]

    def is_right(place: int, view: View, tile: int) -> bool:
        near = math.dist(view.at, spots[tile].at) <= 5
        return tile == place or (protocol == NEAR and near)

    right = [[row for row, tile in enumerate(tiles) if is_right(*views[q], tile)] for q in asked]
    free = [[row for row, tile in enumerate(tiles) if tile in views[q][1].semi] for q in asked]
    rows = [(TO_TILE, plain_metrics.metrics(query[asked], reference, right, free))]
    if protocol == BOTH_WAYS:
        places = sorted({views[q][0] for q in asked})
        right = [[row for row, (of, _) in enumerate(views) if of == place] for place in places]
        own = reference[[tiles.index(place) for place in places]]
        rows.append((TO_VIEW, plain_metrics.metrics(own, query, right, [[]] * len(places))))
    return rows


def some_spots(rng: np.random.Generator, n: int) -> list[Spot]:
    """Places on a grid of whole metres: some at one point, some without a view, one of another split."""

    def at() -> tuple[float, float]:
        return float(rng.integers(6_000_000, 6_000_009)), float(rng.integers(690_000, 690_009))

    def view() -> View:
        split = rng.choice(["test", "test", "gallery", "train"])
        return View(str(split), at(), tuple(sorted(rng.choice(n, rng.integers(0, min(4, n)), replace=False).tolist())))

    spots = [Spot(at(), tuple(view() for _ in range(rng.integers(0, 4)))) for _ in range(n)]
    spots += [Spot(at(), (View("train", at()),), ("train",)), Spot(at(), (View(),))]
    return spots


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 12),
    kind=st.sampled_from(["random", "levels", "copies", "zeros", "last digit"]),
    rules=st.sampled_from([(PAIRED,), (PAIRED, NEAR), (BOTH_WAYS,), (PAIRED, NEAR, BOTH_WAYS)]),
    answers=st.integers(1, 9),
    rows=st.integers(1, 9),
)
def test_every_protocol_is_what_its_words_say(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int, n: int, kind: str, rules: tuple[str, ...], answers: int, rows: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    store = Store.open(tmp_path_factory.mktemp("run"))
    spots = some_spots(rng, n)
    layout = gallery_of(store, spots, rules)
    query = awkward(kind, rng, len(split_pairs(layout, "test")), 4)
    reference = awkward(kind, rng, len(layout.references("test")), 4)
    embedded = embedded_as(store, layout, query, reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POSITIVES", answers)
        patch.setattr(module, "SHARD_ROWS", rows)
        found = evaluate_embeddings(layout, embedded)
    plain = [(p, d, m) for p in rules for d, m in plain_rows(spots, p, query, reference)]
    assert [getattr(found, name) for name in HEADLINE] == [float(plain[0][2][name]) for name in HEADLINE]
    assert (found.protocol, found.gallery) == (rules[0], len(reference))
    expected = plain if rules[0] == BOTH_WAYS else plain[1:]
    assert [(row["protocol"], row["direction"]) for row in found.others] == [(p, d) for p, d, _ in expected]
    for row, (protocol, direction, metrics) in zip(found.others, expected, strict=True):
        for name in (*HEADLINE[:4], *(["hit_rate"] if protocol != BOTH_WAYS else [])):
            assert row[name] == float(metrics[name]), (protocol, direction, name)
        if protocol == BOTH_WAYS:
            assert row["ap"] == pytest.approx(float(metrics["ap"]), rel=1e-13)


def unit(vectors: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Float32:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("dim", [3, 1000])
def test_a_constant_embedding_scores_about_nothing(tmp_path: Path, dim: int) -> None:
    spots = [Spot((i * 100.0, 0), (View(at=(i * 100.0, 0)), View("gallery"))) for i in range(150)]
    layout = gallery_of(Store.open(tmp_path), spots, (PAIRED, NEAR, BOTH_WAYS))
    constant = unit(np.full((300, dim), 0.1234567))
    found = evaluate_embeddings(layout, embedded_as(Store.open(tmp_path), layout, constant, constant[:150]))
    assert [getattr(found, name) for name in HEADLINE] == [0] * 5
    assert len(found.others) == 3
    for row in found.others:
        assert (row["r1"], row["r5"], row["r10"], row["r1pct"], row.get("hit_rate", 0)) == (0, 0, 0, 0, 0)
        assert row.get("ap", 0) < 0.01


def test_five_metres_are_within_five_metres(tmp_path: Path) -> None:
    """Off the query by 3 and 4 metres: 5 exactly. Its own tile is right however far it is."""
    query = (6_093_000.0, 690_000.0)
    offsets = [(3.0, 4.0), (3.0, 4.0001), (0.0, -5.0), (0.0, 0.0), (900.0, 0.0)]
    spots = [Spot((query[0] + north, query[1] + east), ()) for north, east in offsets]
    spots[-1] = Spot(spots[-1].at, (View(at=query),))
    spots.append(Spot((math.nan, math.nan), (View(at=(math.nan, math.nan)),)))
    layout = gallery_of(Store.open(tmp_path), spots, (PAIRED, NEAR))
    pairs, references = split_pairs(layout, "test"), layout.references("test")
    (_, paired), (_, near) = searches(layout, "test", pairs, references)
    assert [paired.positives.row(i).tolist() for i in range(2)] == [[4], [5]]
    assert [near.positives.row(i).tolist() for i in range(2)] == [[0, 2, 3, 4], [5]]


def test_metres_on_the_globe(tmp_path: Path) -> None:
    metre = 1 / 111_195.0
    spots = [Spot((51.0 + d * metre, -1.5), (View(at=(51.0, -1.5)),) if d == 0 else ()) for d in (0, 4.99, 5.01)]
    layout = gallery_of(Store.open(tmp_path), spots, (NEAR,), "latlon")
    [(_, near)] = searches(layout, "test", split_pairs(layout, "test"), layout.references("test"))
    assert near.positives.row(0).tolist() == [0, 1]


def test_candidates_that_are_no_queries(tmp_path: Path) -> None:
    """University-1652: the views of other buildings are in the way of a tile, and ask nothing themselves."""
    spots = [Spot(views=(View("gallery"),)), Spot(views=(View(), View())), Spot(views=(View(), View("gallery")))]
    layout = gallery_of(Store.open(tmp_path), spots, (BOTH_WAYS,))
    assert len(split_pairs(layout, "test")) == 5 and len(split_pairs(layout, "train")) == 0
    (_, to_tile), (_, to_view) = searches(layout, "test", split_pairs(layout, "test"), layout.references("test"))
    assert to_tile.queries.tolist() == [1, 2, 3] and to_tile.gallery == 3
    assert to_view.queries.tolist() == [1, 2] and to_view.gallery == 5
    assert [to_view.positives.row(i).tolist() for i in range(2)] == [[1, 2], [3, 4]]
    axes = np.eye(4, dtype=np.float32)
    query = axes[[1, 1, 1, 2, 3]]  # the distractor looks like the first building
    found = evaluate_embeddings(layout, embedded_as(Store.open(tmp_path), layout, query, axes[:3]))
    assert (found.protocol, found.r1, found.queries, found.gallery) == (BOTH_WAYS, 1, 3, 3)
    forth, back = found.others
    assert (forth["r1"], forth["ap"], forth["queries"]) == (1, 1, 3)
    assert (back["r1"], back["r5"], back["queries"], back["gallery"]) == (0.5, 1, 2, 5)
    # First: 2nd and 3rd. Second: 1st; its other view is behind all, for all but the first are equally far.
    first = (Fraction(1, 2) / 2 + (Fraction(2, 3) + Fraction(1, 2)) / 2) / 2
    second = (1 + (Fraction(2, 5) + Fraction(1, 4)) / 2) / 2
    assert back["ap"] == pytest.approx(float((first + second) / 2))


def test_what_cannot_be_evaluated_is_told(tmp_path: Path) -> None:
    store = Store.open(tmp_path)

    def told(spots: list[Spot], *protocols: str, coordinates: str = "utm") -> None:
        layout = gallery_of(store, spots, protocols, coordinates)
        searches(layout, "test", split_pairs(layout, "test"), layout.references("test"))

    with pytest.raises(BadInput, match="place-0001 .* split test"):
        told([Spot(), Spot(splits=("train",))], PAIRED)
    with pytest.raises(BadInput, match="split test has no pairs"):
        told([Spot(views=()), Spot(views=(View("gallery"),))], PAIRED)
    with pytest.raises(BadInput, match="within-5m"):
        told([Spot()], NEAR, coordinates="none")
    layout = gallery_of(store, [Spot(), Spot()], (PAIRED,))
    pairs = layout.pairs("test")
    with pytest.raises(StaleArtefact, match="test pairs .* g0"):
        searches(layout, "test", Pairs(pairs.place[:1], pairs.view[:1]), layout.references("test"))


def test_pieces_hold_whole_queries_and_no_more_answers_than_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POSITIVES", 5)
    monkeypatch.setattr(module, "THREADS", 1)
    spots = [Spot(views=(View(),) * n) for n in (2, 3, 1, 9, 4, 2)]
    layout = gallery_of(Store.open(tmp_path), spots, (BOTH_WAYS,))
    _, (_, to_view) = searches(layout, "test", split_pairs(layout, "test"), layout.references("test"))
    assert [(piece.first, len(piece.positives.indices), piece.queries.tolist()) for piece in query_pieces(to_view)] == [
        (0, 5, [0, 1]),
        (5, 1, [2]),
        (6, 9, [3]),
        (15, 4, [4]),
        (19, 2, [5]),
    ]


@pytest.mark.parametrize(("threads", "sizes"), [(1, [50, 50]), (2, [50, 50]), (3, [34, 34, 32]), (4, [25] * 4)])
def test_every_thread_gets_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(module, "POSITIVES", 60)
    monkeypatch.setattr(module, "THREADS", threads)
    layout = gallery_of(Store.open(tmp_path), [Spot()] * 100, (PAIRED,))
    [(_, search)] = searches(layout, "test", split_pairs(layout, "test"), layout.references("test"))
    assert [len(piece.queries) for piece in query_pieces(search)] == sizes


def test_near_tiles_are_the_same_whatever_is_looked_up_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = gallery_of(Store.open(tmp_path), some_spots(np.random.default_rng(6), 60), (NEAR,))
    found = []
    for asked in (1, 7, 10_000):
        monkeypatch.setattr(protocols, "ASKED", asked)
        [(_, search)] = searches(layout, "test", split_pairs(layout, "test"), layout.references("test"))
        found.append(search.positives)
    assert len(found[0].indices) > len(found[0].indptr)
    for one in found[1:]:
        assert np.array_equal(one.indptr, found[0].indptr) and np.array_equal(one.indices, found[0].indices)


def test_memory_does_not_grow_with_the_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and strips are small here, so that a gallery of 12 MB is large."""
    case = bench.Case(queries=500, tiles=12_000, dim=256)
    monkeypatch.setattr(stored, "SHARD_ROWS", 512)
    bench.make(tmp_path, case)
    for name, value in {"STRIP": 2**16, "WIDE": 2**14, "TILE": 64}.items():
        monkeypatch.setattr(ranking, name, value)
    monkeypatch.setattr(module, "SHARD_ROWS", 512)
    monkeypatch.setattr(module, "THREADS", 1)
    layout = bench.layout_of(Store.open(tmp_path), case)
    embedded = open_embeddings(Store.open(tmp_path), "all.zarr", layout)
    [(_, search)] = searches(layout, "test", embedded.pairs, embedded.reference_place)
    tracemalloc.start()
    try:
        ranks = module.rank_search(embedded, search)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.2 < (ranks.wrong == 0).mean() < 1
    assert peak < 4 * case.tiles * case.dim / 3


def large(store: Store) -> tuple[Layout, Float32, Float32]:
    rng = np.random.default_rng(5)
    spots = [Spot((i * 3.0, 0), (View(at=(i * 3.0, 0)),) * 2 if i < 1500 else ()) for i in range(6000)]
    layout = gallery_of(store, spots, (PAIRED, NEAR, BOTH_WAYS))
    reference = unit(rng.normal(size=(6000, 32)))
    query = unit(np.repeat(reference[:1500], 2, axis=0) + rng.normal(size=(3000, 32)) / 3)
    return layout, query, reference


@pytest.mark.slow  # worker processes take seconds to start
def test_on_s3_a_cluster_and_threads_say_the_same_as_numpy(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than one Zarr shard and many pieces. Random vectors have no near ties: plain float64 is right."""
    from distributed import LocalCluster

    monkeypatch.setattr(module, "POSITIVES", 1000)
    layout, query, reference = large(s3_store)
    embedded = embedded_as(s3_store.child("run"), layout, query, reference)
    threads = evaluate_embeddings(layout, embedded)
    with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        assert evaluate_embeddings(layout, embedded, cluster.scheduler_address) == threads
    similarity = query.astype(np.float64) @ reference.T.astype(np.float64)
    before = (similarity > similarity[np.arange(3000), np.arange(3000) // 2][:, None]).sum(axis=1)
    assert (threads.r1, threads.r5, threads.r1pct) == tuple((before < k).mean() for k in (1, 5, 60))
    assert 0.1 < threads.r1 < threads.r5 < threads.r10 < threads.r1pct < 1
    near, forth, back = threads.others
    assert near["r1"] > threads.r1 and forth["r1"] == threads.r1 and back["gallery"] == 3000
    best = similarity.T[:1500].argsort(axis=1)[:, -1] // 2
    assert back["r1"] == (best == np.arange(1500)).mean()
