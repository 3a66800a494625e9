"""The search by int8 and float32 against float32 alone, on vectors that are hard for it."""

from __future__ import annotations

import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Float32, Int32
from geostream.mining import exact, int8, sieve, topk
from geostream.mining.embeddings import create_embeddings, open_embeddings
from geostream.mining.int8 import Int8
from geostream.mining.sieve import Sieve, in_steps, pack, unpack
from geostream.mining.topk import References, most_similar, with_sieve
from geostream.mining.visual import build_visual_graph
from geostream.store import Store
from tests.cities import city, unit

DIM, K = 256, 3
KINDS = ["few directions", "clusters", "twins", "near twins", "spikes", "long", "noise"]


def plain(a: Int8, b: Int8, out: Int32) -> None:
    """The product on any processor."""
    out[:] = a.astype(np.float32) @ b.T.astype(np.float32)


def product() -> int8.Product:
    return int8.load() or plain  # type: ignore[return-value]


def vectors(kind: str, n: int, rng: np.random.Generator) -> Float32:
    """``n`` (a multiple of 8) of them."""
    noise = rng.standard_normal((n, DIM)).astype(np.float32)
    if kind == "few directions":  # similarities of all sizes
        return unit(rng.standard_normal((n, 6)) @ rng.standard_normal((6, DIM)) + 0.3 * noise)
    if kind == "clusters":
        return unit(rng.standard_normal((8, DIM))[np.arange(n) % 8] + 0.5 * noise)
    if kind == "twins":  # exactly as similar as one another
        return unit(noise[rng.integers(0, n // 2, n)])
    if kind == "near twins":  # told apart by less than a step of int8
        return unit(noise[rng.integers(0, 8, n)] + 1e-3 * noise)
    if kind == "spikes":  # a few numbers hold nearly everything: the others are less than a step
        noise[np.arange(n), rng.integers(0, DIM, n)] = 1000
        return unit(noise)
    if kind == "long":  # of any length, some of none
        return noise * rng.choice([0, 1e-30, 1, 50], n)[:, None].astype(np.float32)
    return unit(noise)


def brute_force(query: Float32, reference: Float32, k: int) -> tuple[Int32, Float32]:
    row, column = (part.ravel().astype(np.int64) for part in np.indices((len(query), len(reference))))
    score = np.empty(len(row), dtype=np.float32)
    pointers = [faiss.swig_ptr(array) for array in (query, row, reference, column, score)]
    faiss.pairwise_indexed_inner_product(DIM, len(row), *pointers)
    score = score.reshape(len(query), -1)
    order = np.argsort(-score, axis=1, kind="stable")[:, :k].astype(np.int32)
    return order, np.take_along_axis(score, order, axis=1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    queries=st.sampled_from(KINDS),
    references=st.sampled_from(KINDS),
    n=st.sampled_from([152, 400, 1000]),
)
def test_nothing_is_missed(seed: int, queries: str, references: str, n: int) -> None:
    """What the sieve answers is exactly right, equal scores by row; what it cannot tell it leaves."""
    rng = np.random.default_rng(seed)
    reference = vectors(references, n, rng)
    query = np.concatenate([vectors(queries, 32, rng), reference[:8]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sieve, "CHUNK", 70)
        patch.setattr(sieve, "TRIED", 8)
        patch.setattr(sieve, "SLICE", 16)
        at, score = Sieve(product(), reference).nearest(query, K)
    answered = at[:, 0] >= 0
    expected, scores = brute_force(query, reference, K)
    assert at[answered].tolist() == expected[answered].tolist()
    assert score[answered].tolist() == scores[answered].tolist()
    assert (at[~answered] == -1).all()


def test_places_are_answered_and_twins_are_left() -> None:
    """Where int8 alone would err, too; where all are alike the sieve gives up soon."""
    rng = np.random.default_rng(0)
    reference = vectors("few directions", 4000, rng)
    query = unit(reference[:400] + 0.02 * rng.standard_normal((400, DIM)))
    at, _ = Sieve(product(), reference).nearest(query, K)
    answered = at[:, 0] >= 0
    assert answered.mean() > 0.9
    whole = [in_steps(side, np.abs(side).max(axis=1)) for side in (query, reference)]
    coarse = (whole[0].numbers.astype(np.float32) @ whole[1].numbers.T.astype(np.float32)) * whole[1].step
    assert (np.argsort(-coarse, axis=1)[:, :K] != at).any(axis=1)[answered].mean() > 0.02
    alike = np.repeat(reference[:1], 1000, axis=0)
    calls: list[int] = []

    def counted(a: Int8, b: Int8, out: Int32) -> None:
        calls.append(len(a))
        plain(a, b, out)

    at, _ = Sieve(counted, alike).nearest(np.repeat(query, 5, axis=0), K)  # type: ignore[arg-type]
    assert (at == -1).all() and sum(calls) == sieve.TRIED


@pytest.mark.parametrize("kind", ["few directions", "near twins", "noise"])
def test_with_and_without(kind: str) -> None:
    """The full search answers what the sieve leaves: some of these queries, or all, or none."""
    rng = np.random.default_rng(1)
    reference = np.concatenate([vectors(kind, 2000, rng), vectors("noise", 2000, rng)])
    query = unit(reference[::9] + 0.01 * rng.standard_normal((445, DIM)))
    ids = np.arange(7, 4007, dtype=np.int32)
    through = most_similar(query, References(ids, reference, Sieve(product(), reference)), K)
    without = most_similar(query, References(ids, reference), K)
    assert through.score == pytest.approx(without.score, abs=1e-6)
    clear = np.diff(without.score, axis=1).max(axis=1) < -1e-5
    assert (through.other == without.other)[clear].all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_keys_are_in_the_order_of_scores(scores: list[float]) -> None:
    score, at = np.array(scores, dtype=np.float32), np.arange(len(scores))[::-1].astype(np.int64)
    order = np.lexsort((at, -score))
    key = np.sort(pack(score, at))
    assert unpack(key)[0].tolist() == score[order].tolist()
    assert unpack(key)[1].tolist() == at[order].tolist()


def test_the_graph_is_the_same_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins at the end of a list, too: the lower id stays."""
    root = Store.open(tmp_path)
    layout = city(root, side=36, areas=2)
    pairs = layout.pairs("train")
    places, rng = np.unique(pairs.place), np.random.default_rng(2)
    writer = create_embeddings(
        root, "embeddings/e.zarr", layout=layout, checkpoint="", split="train", pairs=pairs, reference_place=places,
        dim=DIM,
    )  # fmt: skip
    reference = vectors("few directions", len(places), rng)[rng.integers(0, len(places) // 2, len(places))]
    writer.write_reference(np.arange(len(places)), reference)
    writer.write_query(np.arange(len(pairs)), unit(reference + 0.05 * rng.standard_normal(reference.shape)))
    writer.commit()
    embeddings = open_embeddings(root, "embeddings/e.zarr", layout)
    graphs = []
    monkeypatch.setattr(exact, "CHUNK_ROWS", 64)
    monkeypatch.setattr(Sieve, "of", lambda vectors: Sieve(product(), vectors))
    monkeypatch.setattr(topk, "_flat", None)  # it would choose another twin
    for block in (10_000, 1500):
        monkeypatch.setattr(exact, "BLOCK", block)
        graphs.append(build_visual_graph(root, f"neighbours/{block}.zarr", layout, embeddings, 4))
    assert len(exact.Held._all) == 0  # nor does a search leave vectors in memory
    for graph in graphs[1:]:
        assert np.array_equal(graph.indices, graphs[0].indices)
        assert np.array_equal(graph.scores, graphs[0].scores)


def test_threads_share_a_block_until_they_need_another(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    meet = threading.Barrier(4)
    shared = []

    def read(embeddings: str, start: int, stop: int) -> tuple[Int32, Float32]:
        reads.append(start)
        return np.arange(start, stop, dtype=np.int32), np.zeros((stop - start, 2), dtype=np.float32)

    def search(job: exact.Job) -> None:
        meet.wait()
        held = exact.Held.of(job, 0, 9)
        shared.append(held.references("", 0, 9))  # type: ignore[arg-type]
        meet.wait()

    monkeypatch.setattr(exact, "read_references", read)
    for job in (exact.Job(None, "", "", 1), exact.Job(None, "", "", 1)):  # type: ignore[arg-type]
        threads = [threading.Thread(target=search, args=(job,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert reads == [0, 0]  # once a search, whatever is at the same paths
    assert shared[0] is shared[3] is not shared[4] is shared[7]
    assert len(exact.Held._all) > 0
    exact.Held.let_go()
    assert len(exact.Held._all) == 0


def test_few_dimensions_have_no_sieve() -> None:
    assert with_sieve(np.arange(9, dtype=np.int32), np.zeros((9, sieve.DIMENSIONS - 1), dtype=np.float32)).sieve is None
