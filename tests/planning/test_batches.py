"""The rules of a plan hold for whatever places, views, shards, graph and exclusions there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import BadInput
from geostream.planning.batches import STRATEGIES, Assembled, assemble
from geostream.planning.lane import SamplingProblem
from tests.cities import csr


@st.composite
def problems(draw: st.DrawFn) -> SamplingProblem:
    """Anything that may come: places with 1 to many views, tiny or few shards, padded or empty graphs, clashes."""
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    views = rng.integers(1, draw(st.sampled_from([1, 2, 12])) + 1, n)
    place = np.repeat(np.arange(n, dtype=np.int32), views)
    shard = rng.integers(0, draw(st.integers(1, 12)), n).astype(np.int32)
    k = draw(st.sampled_from([0, 1, 5, 40]))
    neighbours = np.full((n, k), -1, dtype=np.int32)
    for row in range(n):
        others = rng.permutation(np.delete(np.arange(n), row))[: rng.integers(0, k + 1)]
        neighbours[row, : len(others)] = others
    lists: list[set[int]] = [set() for _ in range(n)]
    for one, other in rng.integers(0, n, (draw(st.sampled_from([0, 20, 150])), 2)).tolist():
        if one != other:
            lists[one].add(other)
            lists[other].add(one)
    return SamplingProblem(place, shard, neighbours, csr([sorted(row) for row in lists]))


def grid(side: int, views: int, per_shard: int, seed: int = 0) -> SamplingProblem:
    """Half-overlapping tiles row by row in shards: each view excludes three of the eight tiles around."""
    rng = np.random.default_rng(seed)
    place = np.repeat(np.arange(side * side), rng.integers(1, views + 1, side * side)).astype(np.int32)
    lists: list[set[int]] = [set() for _ in range(side * side)]
    for one in place.tolist():
        i, j = divmod(one, side)
        di, dj = rng.choice([-1, 1], 2).tolist()
        for x, y in ((i + di, j), (i, j + dj), (i + di, j + dj)):
            if 0 <= x < side and 0 <= y < side:
                lists[one].add(x * side + y)
                lists[x * side + y].add(one)
    at = np.array([divmod(one, side) for one in range(side * side)])
    distance = np.abs(at[:, None] - at[None]).sum(axis=2)
    neighbours = np.argsort(distance, axis=1, kind="stable")[:, 9:41].astype(np.int32)
    strip = 8  # shards are runs of a walk through strips, so that they are compact
    walk = np.lexsort((at[:, 1], at[:, 0], at[:, 1] // strip))
    shard = np.empty(side * side, dtype=np.int32)
    shard[walk] = np.arange(side * side) // per_shard
    return SamplingProblem(place, shard, neighbours, csr([sorted(row) for row in lists]))


def check(problem: SamplingProblem, made: Assembled, batch_size: int, lanes: int) -> None:
    """All rules that a plan must keep, checked the slow and plain way."""
    assert made.batches.shape[1] == batch_size
    every = np.concatenate([made.batches.ravel(), made.left_out])
    assert sorted(every.tolist()) == list(range(len(problem.place)))  # each pair once, used or left out
    for batch in made.batches:
        places = problem.place[batch].tolist()
        assert len(set(places)) == batch_size  # no place twice
        for place in places:
            assert set(places).isdisjoint(problem.excluded.row(place).tolist())
    assert np.bincount(made.lane, minlength=lanes).tolist() == [len(made.batches) // lanes] * lanes
    shards = [set(problem.shard[problem.place[made.batches[made.lane == lane]]].ravel()) for lane in range(lanes)]
    assert sum(len(of_lane) for of_lane in shards) == len(set().union(*shards))  # lanes share no shard


@settings(deadline=None, max_examples=150)
@given(
    problem=problems(),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    batch_size=st.sampled_from([2, 3, 8, 16]),
    lanes=st.integers(1, 4),
    resident=st.sampled_from([1, 2, 4, 100]),
    seed=st.integers(0, 5),
)
def test_rules_hold(
    problem: SamplingProblem, strategy: str, batch_size: int, lanes: int, resident: int, seed: int
) -> None:
    lanes = min(lanes, len(np.unique(problem.shard)))
    arguments: dict[str, Any] = {"strategy": strategy, "batch_size": batch_size, "lanes": lanes, "resident": resident}
    made = assemble(problem, **arguments, seed=seed, epoch=3)
    check(problem, made, batch_size, lanes)
    again = assemble(problem, **arguments, seed=seed, epoch=3)
    assert all(np.array_equal(one, other) for one, other in zip(made, again, strict=True))


@settings(deadline=None, max_examples=100)
@given(
    problem=problems(),
    sets=st.integers(1, 3),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    batch_size=st.sampled_from([2, 3, 8]),
    lanes=st.integers(1, 3),
    pure_shards=st.booleans(),
    seed=st.integers(0, 5),
)
def test_batches_of_one_data_set_each(
    problem: SamplingProblem, sets: int, strategy: str, batch_size: int, lanes: int, pure_shards: bool, seed: int
) -> None:
    """Whatever shards hold: the rules of a plan, a batch of one data set, and the lanes at a time of the same one."""
    by = problem.shard if pure_shards else np.arange(len(problem.shard))
    problem = problem._replace(dataset=(by % sets).astype(np.int32))
    shards = [len(np.unique(problem.shard[problem.dataset == one])) for one in range(sets)]
    lanes = min([lanes, *(count for count in shards if count)])
    arguments: dict[str, Any] = {"strategy": strategy, "batch_size": batch_size, "lanes": lanes, "resident": 2}
    made = assemble(problem, **arguments, seed=seed, epoch=3)
    check(problem, made, batch_size, lanes)
    assert problem.dataset is not None
    of_batch = problem.dataset[problem.place[made.batches]]
    assert (of_batch == of_batch[:, :1]).all()
    steps = of_batch[:, 0].reshape(-1, lanes)
    assert (steps == steps[:, :1]).all()
    again = assemble(problem, **arguments, seed=seed, epoch=3)
    assert all(np.array_equal(one, other) for one, other in zip(made, again, strict=True))


def test_data_sets_take_turns_and_leave_out_less_than_a_batch_each() -> None:
    """Two thirds of one data set and a third of the other: so are any few batches; and no neighbour is of the other."""
    problem = grid(side=24, views=1, per_shard=16)
    dataset = (problem.shard % 3 == 0).astype(np.int32)
    problem = problem._replace(dataset=dataset)
    for strategy in STRATEGIES:
        made = assemble(problem, strategy=strategy, batch_size=8, resident=4, seed=0, epoch=1)
        check(problem, made, 8, 1)
        of_batch = dataset[problem.place[made.batches[:, 0]]]
        assert len(made.left_out) < 2 * 8
        assert all(1 <= of_batch[at : at + 6].sum() <= 3 for at in range(len(of_batch) - 5))


@settings(deadline=None, max_examples=60)
@given(problem=problems(), batch_size=st.sampled_from([2, 4, 8]), resident=st.sampled_from([1, 2, 100]))
def test_without_clashes_only_the_last_incomplete_batch_is_left(
    problem: SamplingProblem, batch_size: int, resident: int
) -> None:
    """With one view a place and nothing excluded every pair fits anywhere."""
    n = len(problem.shard)
    problem = problem._replace(place=np.arange(n, dtype=np.int32), excluded=csr([[] for _ in range(n)]))
    for strategy in STRATEGIES:
        made = assemble(problem, strategy=strategy, batch_size=batch_size, resident=resident, seed=0, epoch=0)
        assert len(made.left_out) == n % batch_size


@settings(deadline=None, max_examples=60)
@given(
    views=st.lists(st.integers(1, 9), min_size=2, max_size=40),
    batch_size=st.sampled_from([2, 4, 8]),
    per_shard=st.sampled_from([1, 3, 50]),
)
def test_many_views_leave_out_no_more_than_they_must(views: list[int], batch_size: int, per_shard: int) -> None:
    """b batches can be filled exactly when sum(min(views, b)) ≥ b · batch size; the assembler finds that many."""
    n = len(views)
    place = np.repeat(np.arange(n, dtype=np.int32), views)
    shard = (np.arange(n) // per_shard).astype(np.int32)
    problem = SamplingProblem(place, shard, np.full((n, 2), -1, dtype=np.int32), csr([[] for _ in range(n)]))
    possible = max(
        b for b in range(len(place) // batch_size + 1) if np.minimum(views, b).sum() >= b * batch_size
    )  # Gale and Ryser
    made = assemble(problem, strategy="sample4geo", batch_size=batch_size, resident=2, seed=0, epoch=0)
    check(problem, made, batch_size, 1)
    assert len(made.batches) == possible


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("resident", [1, 4])
def test_a_grid_of_overlapping_tiles_leaves_out_less_than_a_batch(strategy: str, resident: int) -> None:
    """The tail of a lane is compact, and clashes like kings on a board; the repair must fill it up."""
    problem = grid(side=30, views=3, per_shard=60)
    for epoch in range(3):
        made = assemble(problem, strategy=strategy, batch_size=32, resident=resident, seed=1, epoch=epoch)
        check(problem, made, 32, 1)
        assert len(made.left_out) == len(problem.place) % 32


def shards_held(problem: SamplingProblem, made: Assembled) -> int:
    """Most shards between their first and their last use at once."""
    shards = int(problem.shard.max()) + 1
    uses = np.array([np.isin(np.arange(shards), problem.shard[problem.place[batch]]) for batch in made.batches])
    held = np.maximum.accumulate(uses) & np.maximum.accumulate(uses[::-1])[::-1]
    return int(held.sum(axis=1).max())


@pytest.mark.parametrize(("fewest", "most_held"), [(54, 14), (1, 20)])
def test_up_to_fifty_four_views_a_place(fewest: int, most_held: int) -> None:
    """University-1652's kind of data. Places with many views must begin in time, or their shards are held for swaps."""
    n = 200
    views = np.random.default_rng(0).integers(fewest, 55, n)
    place = np.repeat(np.arange(n), views).astype(np.int32)
    neighbours = (np.arange(n)[:, None] + np.arange(1, 21)).astype(np.int32) % n
    problem = SamplingProblem(place, (np.arange(n) // 4).astype(np.int32), neighbours, csr([[] for _ in range(n)]))
    made = assemble(problem, strategy="sample4geo", batch_size=32, resident=4, seed=0, epoch=0)
    check(problem, made, 32, 1)
    assert len(made.left_out) == len(place) % 32
    assert shards_held(problem, made) <= most_held


def test_epochs_and_seeds_differ_and_lanes_too() -> None:
    problem = grid(side=20, views=1, per_shard=40)
    plans = [
        assemble(problem, strategy="sample4geo", batch_size=16, resident=2, seed=seed, epoch=epoch, lanes=lanes).batches
        for seed, epoch, lanes in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2))
    ]
    assert len({plan.tobytes() for plan in plans}) == len(plans)


def test_hard_batches_from_few_shards() -> None:
    """The point of it all: neighbours share a batch, and only the resident shards are touched."""
    problem = grid(side=32, views=1, per_shard=32)
    size = 16

    def neighbours_in_batch(made: Assembled) -> float:
        return float(np.mean([np.isin(problem.neighbours[problem.place[batch]], problem.place[batch]).sum() / size
                              for batch in made.batches]))  # fmt: skip

    streamed = assemble(problem, strategy="sample4geo", batch_size=size, resident=4, seed=0, epoch=0)
    random = assemble(problem, strategy="random", batch_size=size, resident=4, seed=0, epoch=0)
    assert neighbours_in_batch(streamed) > 5 * neighbours_in_batch(random)
    assert len(streamed.batches) == 64
    assert shards_held(problem, streamed) <= 8


def test_wrong_arguments_are_named() -> None:
    problem = grid(side=4, views=1, per_shard=8)
    with pytest.raises(BadInput, match="strategy 'best'.* patchwork-less-mixed"):
        assemble(problem, strategy="best", batch_size=2, resident=1, seed=0, epoch=0)
    with pytest.raises(BadInput, match="lanes=3: .*2 shards"):
        assemble(problem, strategy="random", batch_size=2, resident=1, seed=0, epoch=0, lanes=3)
