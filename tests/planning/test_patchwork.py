"""Patchwork's batches are harder than random access allows, out of few shards, and new in every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Int32
from geostream.planning import hardness
from geostream.planning.batches import Assembled, Key, LaneTask, assemble, make_lane
from geostream.planning.earlier import overlap
from geostream.planning.lane import SamplingProblem
from geostream.planning.patchwork import interleaved
from tests.cities import csr, unit
from tests.planning.test_batches import check, grid

Float32 = np.ndarray


def places(n: int, kinds: int, seed: int, per_shard: int) -> tuple[SamplingProblem, Float32]:
    """Places of a few kinds, each kind a cloud, in shards by kind; and their vectors."""
    rng = np.random.default_rng(seed)
    kind = np.sort(rng.integers(0, kinds, n))
    vectors = unit(unit(rng.normal(size=(kinds, 32)))[kind] + 0.9 * unit(rng.normal(size=(n, 32))))
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    nearest = np.argpartition(-similarity, min(n - 1, 64), axis=1)[:, :64]
    order = np.argsort(-np.take_along_axis(similarity, nearest, axis=1), axis=1, kind="stable")
    neighbours = np.take_along_axis(nearest, order, axis=1).astype(np.int32)
    shard = (np.arange(n) // per_shard).astype(np.int32)
    return SamplingProblem(np.arange(n, dtype=np.int32), shard, neighbours, csr([[] for _ in range(n)])), vectors


def batch_of_pair(made: Assembled, n: int) -> Int32:
    batch = np.full(n, -1, dtype=np.int32)
    batch[made.batches] = np.arange(len(made.batches), dtype=np.int32)[:, None]
    return batch


@pytest.mark.parametrize(
    ("strategy", "batch_size", "resident"),
    [("patchwork-less-mixed", 32, 8), ("patchwork-unmixed", 64, 8), ("patchwork-unmixed", 16, 4)],
)
def test_harder_than_random_access_and_unlike_the_two_epochs_before(
    strategy: str, batch_size: int, resident: int
) -> None:
    """The point of it all; for batches of 64 there is so little room that two tracks are walked."""
    n = 4800
    problem, vectors = places(n, 48, 1, 30)
    rows = np.arange(n, dtype=np.int32)
    similarity = hardness.cosine(vectors, vectors, rows, rows)
    common: dict[str, Any] = {"batch_size": batch_size, "seed": 0}
    ends = [
        hardness.batch_hardness(assemble(problem, strategy=name, resident=10**6, epoch=0, **common).batches, similarity)
        for name in ("sample4geo", "random")
    ]
    history: tuple[Int32, ...] = ()
    for epoch in range(4):
        made = assemble(problem._replace(history=history), strategy=strategy, resident=resident, epoch=epoch, **common)
        check(problem, made, batch_size, 1)
        assert len(made.left_out) == n % batch_size
        score, _ = hardness.hardness_score(hardness.batch_hardness(made.batches, similarity), *ends)
        assert score is not None and score > 1
        most = max(1, batch_size // 10) / batch_size
        for before in history:
            assert overlap(made.batches, before) < 1.15 * most
        assert held(problem, made) < 1.3 * max(resident * 30, 1.5 * batch_size) + batch_size
        history = (batch_of_pair(made, n), *history)[:2]


def held(problem: SamplingProblem, made: Assembled) -> int:
    """Most places that are held at once, each from its shard's first use to its own last."""
    shard = problem.shard[made.batches]
    first = np.full(int(problem.shard.max()) + 1, len(made.batches))
    np.minimum.at(first, shard, np.arange(len(made.batches))[:, None])
    change = np.zeros(len(made.batches) + 1, dtype=int)
    for step, of_batch in enumerate(shard):
        np.add.at(change, first[of_batch], 1)
        change[step + 1] -= len(of_batch)
    return int(np.cumsum(change).max())


def test_without_history_nothing_is_bounded_but_the_shards_share() -> None:
    problem, _ = places(2000, 20, 0, 100)
    made = assemble(problem, strategy="patchwork", batch_size=30, resident=8, seed=0, epoch=0)
    most = [np.bincount(problem.shard[problem.place[batch]]).max() for batch in made.batches]
    assert np.median(most) == 5  # a sixth


def test_bounds_give_way_where_there_is_nothing_else() -> None:
    """All pairs were in one batch before: they must share one again, and the plan is still whole."""
    problem, _ = places(64, 4, 0, 64)
    problem = problem._replace(history=(np.zeros(64, dtype=np.int32),))
    made = assemble(problem, strategy="patchwork", batch_size=32, resident=1, seed=0, epoch=1)
    check(problem, made, 32, 1)
    assert len(made.batches) == 2


@given(st.integers(0, 200), st.integers(1, 20), st.integers(0, 9))
def test_tracks_visit_every_shard_once(shards: int, tracks: int, seed: int) -> None:
    order = interleaved(np.arange(shards), tracks, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(shards))


def test_tracks_bring_other_shards_together_each_time() -> None:
    orders = [interleaved(np.arange(100), 4, np.random.default_rng(seed)) for seed in range(2)]
    assert all(len(np.unique(order[at : at + 4] // 25)) == 4 for order in orders for at in (0, 4, 40))
    meet = [{frozenset(order[at : at + 4].tolist()) for at in range(0, 100, 4)} for order in orders]
    assert not meet[0] & meet[1]


def test_what_a_batch_consists_of_drifts_less_along_more_tracks() -> None:
    """Kinds lie behind one another on disk: with one track a few batches in a row are all of the same ones."""
    n = 4800
    problem, vectors = places(n, 48, 1, 30)
    vectors = vectors - vectors.mean(axis=0)

    def wandering(strategy: str) -> float:
        made = assemble(problem, strategy=strategy, batch_size=16, resident=8, seed=0, epoch=0)
        eight = made.batches[: len(made.batches) // 8 * 8].reshape(-1, 8 * 16)
        return float((vectors[eight].mean(axis=1) ** 2).sum(axis=1).mean() * eight.shape[1])

    assert 2 * wandering("patchwork-less-mixed") < wandering("patchwork-unmixed")


def test_with_few_shards_there_are_fewer_tracks() -> None:
    order = interleaved(np.arange(6), 50, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(6))
    assert all(len(np.unique(order[at : at + 3] // 2)) == 3 for at in (0, 3))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(0, 3))
def test_lanes_are_put_together_anywhere_in_any_order(lanes: int, seed: int) -> None:
    problem = grid(side=16, views=2, per_shard=16, seed=seed)
    arguments = {"strategy": "patchwork", "batch_size": 8, "lanes": lanes, "resident": 3, "seed": seed, "epoch": 1}
    seen: list[LaneTask] = []

    def backwards(work: object, tasks: list[LaneTask]) -> list[tuple[Key, Int32]]:
        seen.extend(tasks)
        return [make_lane(task) for task in reversed(tasks)]

    one, other = assemble(problem, **arguments), assemble(problem, map_fn=backwards, **arguments)  # type: ignore[arg-type]
    assert np.array_equal(one.batches, other.batches)
    assert sum(len(task.problem.place) for task in seen) == len(problem.place)  # each knows of its own places only
    check(problem, one, 8, lanes)
