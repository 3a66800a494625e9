"""The exact search on vectors that are hard for it, and the blocks of references that its threads share."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Float32, Int32
from geostream.mining import exact
from geostream.mining.embeddings import create_embeddings, open_embeddings
from geostream.mining.topk import References, most_similar
from geostream.mining.visual import build_visual_graph
from geostream.store import Store
from tests.cities import city, unit

DIM, K = 256, 3
ROUNDING = 4e-6  # of a float32 product of two unit vectors of DIM numbers
KINDS = ["few directions", "clusters", "twins", "near twins", "spikes", "noise"]


def vectors(kind: str, n: int, rng: np.random.Generator) -> Float32:
    """Return (n, DIM) unit vectors; ``n`` is a multiple of 8."""
    noise = rng.standard_normal((n, DIM)).astype(np.float32)
    if kind == "few directions":  # similarities of all sizes
        return unit(rng.standard_normal((n, 6)) @ rng.standard_normal((6, DIM)) + 0.3 * noise)
    if kind == "clusters":
        return unit(rng.standard_normal((8, DIM))[np.arange(n) % 8] + 0.5 * noise)
    if kind == "twins":  # exactly as similar as one another
        return unit(noise[rng.integers(0, n // 2, n)])
    if kind == "near twins":
        return unit(noise[rng.integers(0, 8, n)] + 1e-3 * noise)
    if kind == "spikes":  # one number holds nearly everything
        noise[np.arange(n), rng.integers(0, DIM, n)] = 1000
    return unit(noise)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    queries=st.sampled_from(KINDS),
    references=st.sampled_from(KINDS),
    n=st.sampled_from([8, 152, 1000]),
)
def test_nothing_is_missed(seed: int, queries: str, references: str, n: int) -> None:
    """The found are the K most similar of a float64 brute force, up to float32 rounding."""
    rng = np.random.default_rng(seed)
    reference = vectors(references, n, rng)
    query = np.concatenate([vectors(queries, 32, rng), reference[:8]])
    ids = np.arange(7, 7 + n, dtype=np.int32)
    found = most_similar(query, References(ids, reference), K)
    true = query.astype(np.float64) @ reference.T.astype(np.float64)
    best = -np.sort(-true, axis=1)[:, :K]
    assert np.abs(found.score - best).max() < ROUNDING
    assert np.abs(np.take_along_axis(true, found.other - 7, axis=1) - found.score).max() < ROUNDING
    assert all(len(set(row)) == K for row in found.other.tolist())


@pytest.mark.parametrize("kind", ["few directions", "near twins"])
def test_the_graph_is_the_same_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    root = Store.open(tmp_path)
    layout = city(root, side=36, areas=2)
    pairs = layout.pairs("train")
    places, rng = np.unique(pairs.place), np.random.default_rng(2)
    writer = create_embeddings(
        root, "embeddings/e.zarr", layout=layout, checkpoint="", split="train", pairs=pairs, reference_place=places,
        dim=DIM,
    )  # fmt: skip
    reference = vectors(kind, 8 * len(places), rng)[: len(places)]
    writer.write_reference(np.arange(len(places)), reference)
    writer.write_query(np.arange(len(pairs)), unit(reference + 0.05 * rng.standard_normal(reference.shape)))
    writer.commit()
    embeddings = open_embeddings(root, "embeddings/e.zarr", layout)
    graphs = []
    monkeypatch.setattr(exact, "CHUNK_ROWS", 64)
    for block in (10_000, 1500, 300):
        monkeypatch.setattr(exact, "BLOCK", block)
        graphs.append(build_visual_graph(root, f"neighbours/{block}.zarr", layout, embeddings, 4))
    assert len(exact.SharedBlock._all) == 0  # nor does a search leave vectors in memory
    for graph in graphs[1:]:
        assert np.abs(graph.scores.astype(float) - graphs[0].scores).max() < 1e-3  # a step of float16
        assert (graph.indices == graphs[0].indices).mean() > 0.99  # others are as similar, up to float32 rounding


def test_threads_share_a_block_until_they_need_another(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    meet = threading.Barrier(4)
    shared = []

    def read(embeddings: str, start: int, stop: int) -> tuple[Int32, Float32]:
        reads.append(start)
        return np.arange(start, stop, dtype=np.int32), np.zeros((stop - start, 2), dtype=np.float32)

    def search(job: exact.SearchJob) -> None:
        meet.wait()
        held = exact.SharedBlock.of(job, 0, 9)
        shared.append(held.references("", 0, 9))  # type: ignore[arg-type]
        meet.wait()

    monkeypatch.setattr(exact, "read_references", read)
    for job in (exact.SearchJob(None, "", "", 1), exact.SearchJob(None, "", "", 1)):  # type: ignore[arg-type]
        threads = [threading.Thread(target=search, args=(job,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert reads == [0, 0]  # once a search, whatever is at the same paths
    assert shared[0] is shared[3] is not shared[4] is shared[7]
    assert len(exact.SharedBlock._all) > 0
    exact.SharedBlock.release_all()
    assert len(exact.SharedBlock._all) == 0
