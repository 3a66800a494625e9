"""The order with vectors on the store: the same as in memory, whoever does the work and is killed; within its bound."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import NotFound
from geostream.planning.smoothing import NEAR, ROUNDS, smoothed
from geostream.reclustering import external, recluster, scratch, trial
from geostream.reclustering.external import external_order, prepare, unsmoothed
from geostream.reclustering.means import place_vectors
from geostream.reclustering.order import similarity_order
from geostream.reclustering.scratch import Scratch
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.cities import city
from tests.reclustering.places import GRAPH, Placed, placed

SETTINGS = TrainSettings().changed(batch_size=16, resident_shards=4, hardness=0.5)


def small(monkeypatch: pytest.MonkeyPatch, *, dim: int = 16) -> None:
    """Let some hundred places be many blocks, groups of columns and levels of the tree."""
    monkeypatch.setattr(scratch, "BLOCK_BYTES", 2 * dim * 37)
    monkeypatch.setattr(scratch, "WIDTH", 5)
    monkeypatch.setattr(external, "CELL_BYTES", 2 * dim * 60)


def backwards(work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    return map(work, list(tasks)[::-1])


def twice(work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """Every task runs again after all others, as where workers die."""
    tasks = list(tasks)
    found = [work(task) for task in tasks]
    for task in tasks:
        work(task)
    return iter(found)


@pytest.fixture
def some(tmp_path: Path) -> Placed:
    """512 places with up to three views each, one of them for testing: place ids are no rows."""
    root = Store.open(tmp_path)
    return placed(root, city(root, side=16, views=3, per_shard=20))


def in_memory(some: Placed, target: float) -> tuple[np.ndarray, list[list[int]]]:
    vectors = place_vectors(some.embeddings, some.graph.places)
    sizes = np.random.default_rng(5).integers(50, 150, len(vectors))
    return sizes, [rows.tolist() for rows in similarity_order(smoothed(vectors, some.graph.rows(NEAR)), sizes, target)]


@pytest.mark.parametrize("apply", [map, backwards, twice])
@pytest.mark.parametrize("target", [1500.0, 20_000.0])
def test_the_order_is_the_one_found_in_memory(
    some: Placed, monkeypatch: pytest.MonkeyPatch, apply: Any, target: float
) -> None:
    small(monkeypatch)
    sizes, expected = in_memory(some, target)
    made = Scratch.of(some.embeddings.run, some.embeddings.name, GRAPH, len(sizes), 16, ROUNDS)
    assert len(made.blocks) == 14 and len(made.columns(0)) == 4
    prepare(made, some.embeddings, some.graph.places, apply)
    assert [rows.tolist() for rows in external_order(made, sizes, target, apply)] == expected
    rows = np.array([0, 3, 40, 41, 300, 511])
    vectors = place_vectors(some.embeddings, some.graph.places)
    np.testing.assert_allclose(unsmoothed(made, rows, apply), vectors[rows], atol=3e-4)
    made.drop()
    left = {info.path for info in some.embeddings.run.list(GRAPH)}
    assert left and not any("scratch" in path for path in left)


@pytest.mark.parametrize("dim", [1, 3, 7])
def test_few_dimensions_and_a_single_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    root = Store.open(tmp_path)
    some = placed(root, city(root, side=5), dim=dim)
    sizes, expected = in_memory(some, 600)
    monkeypatch.setattr(external, "CELL_BYTES", 2 * dim * 9)
    made = Scratch.of(some.embeddings.run, some.embeddings.name, GRAPH, len(sizes), dim, ROUNDS)
    prepare(made, some.embeddings, some.graph.places, map)
    assert [rows.tolist() for rows in external_order(made, sizes, 600, map)] == expected


def test_a_reclustering_orders_on_the_store_what_does_not_fit(some: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stage: the same shards, pieces and likeness; nothing is left on the store."""
    inside = recluster.order_places(some.layout, some.embeddings, some.graph, SETTINGS)
    small(monkeypatch)
    monkeypatch.setattr(recluster, "VECTOR_BYTES", 1000)
    outside = recluster.order_places(some.layout, some.embeddings, some.graph, SETTINGS)
    assert [rows.tolist() for rows in outside.shards] == [rows.tolist() for rows in inside.shards]
    assert outside.pieces == inside.pieces
    assert outside[2:] == pytest.approx(inside[2:], abs=1e-3)
    assert not any("scratch" in info.path for info in some.embeddings.run.list(GRAPH))


def test_a_part_of_the_order_shows_how_hard_plans_are(some: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all places are tried, the score is that of all; of half of them it is like it, and it falls with pieces."""
    from geostream.planning.make_plan import reachable_by_shards
    from geostream.planning.spreading import deal, shard_of_rows, stretches

    sizes, _ = in_memory(some, 1500)
    vectors = smoothed(place_vectors(some.embeddings, some.graph.places), some.graph.rows(NEAR))
    ordered = similarity_order(vectors, sizes, 1500.0)
    where = Scratch.of(some.embeddings.run, some.embeddings.name, GRAPH, len(sizes), 16, ROUNDS)
    whole = reachable_by_shards(some.layout, some.graph, some.embeddings, SETTINGS)

    def tried(most: int, pieces: int) -> float:
        chosen = [ordered[number] for number in stretches(ordered, most)]
        rows = np.sort(np.concatenate(chosen))
        made = trial.Trial(where, some.layout, some.embeddings, some.graph.places, rows, SETTINGS, map)
        dealt = deal([np.searchsorted(rows, part) for part in chosen], sizes[rows], pieces)
        score = made.reachable(len(chosen))(shard_of_rows(dealt))
        assert score is not None
        return score

    for pieces in (1, 4):
        exact = whole(shard_of_rows(deal(ordered, sizes, pieces)))
        assert tried(10**6, pieces) == pytest.approx(exact, abs=2e-3)  # vectors of two bytes a number
        assert tried(300, pieces) == pytest.approx(exact, abs=0.35)
    assert tried(300, 1) > tried(300, 4)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_what_a_trial_needs_of_all_places_is_picked_out(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random(2 * n) < 0.6).astype(np.int32)
    places = places if len(places) else np.array([3], dtype=np.int32)
    pair_place = np.repeat(places, rng.integers(1, 4, len(places)))
    asked = np.sort(rng.choice(len(places), rng.integers(1, len(places) + 1), replace=False))
    rows = np.sort(rng.choice(asked, rng.integers(1, len(asked) + 1), replace=False))
    neighbours = rng.choice(np.append(places, -1), (len(asked), k)).astype(np.int32)
    row = {int(place): at for at, place in enumerate(places[rows])}
    expected = [[row.get(int(near), -1) for near in neighbours[asked == one][0]] for one in rows]
    counted = trial._views(pair_place, np.append(neighbours, places[-1:]))
    for place in np.append(neighbours[neighbours >= 0], places[-1]):
        assert counted[place] == np.count_nonzero(pair_place == place)
    assert np.array_equal(trial._is_in(pair_place, places[rows]), np.isin(pair_place, places[rows]))
    of_place = np.full(int(places[-1]) + 2, -1, dtype=np.int32)
    of_place[places[rows]] = np.arange(len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "PIECE", 3)
        assert trial._rows_of_neighbours(neighbours, np.searchsorted(asked, rows), of_place).tolist() == expected


def test_what_another_reclustering_has_removed_is_named(some: Placed) -> None:
    made = Scratch.of(some.embeddings.run, some.embeddings.name, GRAPH, len(some.graph.places), 16, ROUNDS)
    prepare(made, some.embeddings, some.graph.places, map)
    made.drop()
    with pytest.raises(NotFound, match=f"{GRAPH}.*run this one again"):
        list(external_order(made, np.full(512, 100), 1500, map))


PROGRAM = """
import os, sys
from geostream.layout import open_layout
from geostream.mining.embeddings import open_embeddings
from geostream.mining.graph import open_graph
from geostream.reclustering import external, recluster, scratch
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.reclustering.places import EMBEDDINGS, GRAPH

def opened(root):
    store = Store.open(root)
    layout = open_layout(store)
    run = store.child("run")
    return layout, open_embeddings(run, EMBEDDINGS, layout), open_graph(run, GRAPH, layout)

def order(root, cluster=None):
    settings = TrainSettings().changed(batch_size=16, resident_shards=4, hardness=0.5)
    return recluster.order_places(*opened(root), settings, cluster)
"""


def program(text: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM + textwrap.dedent(text), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_in_the_middle_it_starts_again_and_leaves_nothing(
    tmp_path: Path, some: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    expected = recluster.order_places(some.layout, some.embeddings, some.graph, SETTINGS)
    text = """
    scratch.BLOCK_BYTES, scratch.WIDTH, external.CELL_BYTES, recluster.VECTOR_BYTES = 32 * 37, 5, 32 * 60, 1000
    print([rows.tolist() for rows in order(sys.argv[1]).shards])
    """
    folder = tmp_path / "run" / GRAPH / "scratch"
    for kind in ("near-", "codes1-", "sample1-", "cells-"):
        process = program(text, str(tmp_path))
        while not list(folder.glob(f"{kind}*")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and list(folder.iterdir())
    again = program(text, str(tmp_path))
    assert again.communicate()[0] == f"{[rows.tolist() for rows in expected.shards]}\n"
    assert not folder.exists()


@pytest.mark.slow
def test_a_worker_killed_in_the_middle(tmp_path: Path, some: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two worker processes; one is killed while the tree is cut. Dask starts another, and the order is the same."""
    from distributed import LocalCluster

    small(monkeypatch)
    inside = recluster.order_places(some.layout, some.embeddings, some.graph, SETTINGS)
    monkeypatch.setattr(recluster, "VECTOR_BYTES", 1000)
    killed: list[int] = []
    project = external._Cuts.project

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as local:

        def killing(self: Any, nodes: Any) -> Any:
            for nanny in list(local.workers.values())[: not killed]:
                killed.append(nanny.pid)
                os.kill(nanny.pid, signal.SIGKILL)
            return project(self, nodes)

        monkeypatch.setattr(external._Cuts, "project", killing)
        found = recluster.order_places(some.layout, some.embeddings, some.graph, SETTINGS, local.scheduler_address)
    assert len(killed) == 1
    assert [rows.tolist() for rows in found.shards] == [rows.tolist() for rows in inside.shards]


@pytest.mark.slow
def test_memory_stays_within_the_bound(tmp_path: Path) -> None:
    """40,000 places of 256 dimensions, 41 MB of vectors, in a process of its own; the tasks run in it one by one.

    With blocks of 1 MB, columns of 2 MB and nodes of 2 MB, a task holds at most 8 MB and the client 60 bytes a place.
    In memory it is four times the vectors, which shows that the test can fail.
    """
    root = Store.open(tmp_path)
    placed(root, city(root, side=200, areas=1, per_shard=400), dim=256)
    text = """
    from geostream.planning.smoothing import NEAR, ROUNDS, smoothed
    from geostream.reclustering.external import external_order, prepare
    from geostream.reclustering.means import place_vectors
    from geostream.reclustering.order import similarity_order
    from geostream.reclustering.scratch import Scratch
    import numpy as np

    def held(name):
        [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
        return int(line.split()[1]) * 1024

    layout, embeddings, graph = opened(sys.argv[1])
    places, sizes = graph.places, np.full(len(graph.places), 100)
    scratch.BLOCK_BYTES, scratch.COLUMNS_BYTES, external.CELL_BYTES = 2**20, 2**21, 2**21
    embeddings.query[:10], similarity_order(np.eye(64, dtype=np.float32), sizes[:64], 800)
    open("/proc/self/clear_refs", "w").write("5")
    before = held("VmRSS")
    if sys.argv[2] == "memory":
        similarity_order(smoothed(place_vectors(embeddings, places), graph.rows(NEAR)), sizes, 40_000)
    else:
        made = Scratch.of(embeddings.run, embeddings.name, graph.name, len(places), 256, ROUNDS)
        prepare(made, embeddings, places, map)
        external_order(made, sizes, 40_000, map)
        made.drop()
    print(held("VmHWM") - before)
    """
    bytes_held = {where: int(program(text, str(tmp_path), where).communicate()[0]) for where in ("memory", "store")}
    assert bytes_held["memory"] > 100e6
    assert bytes_held["store"] < 8 * 2**20 + 60 * 40_000 + 24e6  # and what libraries keep
