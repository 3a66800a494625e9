"""The lanes of an epoch: every shard in one of them, and each lane's problem is the whole one seen from its places."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.planning.division import Division
from tests.planning.test_batches import grid


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 4), st.integers(0, 3), st.integers(0, 3))
def test_each_lane_sees_its_own_part(lanes: int, seed: int, epoch: int) -> None:
    problem = grid(side=16, views=2, per_shard=16, seed=seed)
    problem = problem._replace(history=(np.arange(len(problem.place), dtype=np.int32),))
    division = Division(problem, lanes, seed, epoch)
    assert sorted(np.concatenate(division.shards).tolist()) == np.unique(problem.shard).tolist()
    assert sorted(np.concatenate([division.pairs(lane) for lane in range(lanes)])) == list(range(len(problem.place)))
    for lane, shards in enumerate(division.shards):
        part, places, pairs = division.part(lane), division.places(lane), division.pairs(lane)
        assert np.array_equal(places, np.flatnonzero(np.isin(problem.shard, shards)))
        assert np.array_equal(places[part.place], problem.place[pairs])
        assert np.array_equal(problem.shard[places], part.shard)
        assert np.array_equal(part.history[0], pairs)
        for row, place in enumerate(places.tolist()):
            expected = [other if other in places else -1 for other in problem.neighbours[place].tolist()]
            assert [-1 if other < 0 else places[other] for other in part.neighbours[row]] == expected
            excluded = [other for other in problem.excluded.row(place).tolist() if other in places]
            assert places[part.excluded.row(row)].tolist() == excluded


def test_one_lane_is_the_whole_problem() -> None:
    problem = grid(side=8, views=2, per_shard=16)
    division = Division(problem, 1, 0, 1)
    assert division.part(0) is problem
    assert np.array_equal(division.pairs(0), np.arange(len(problem.place)))
