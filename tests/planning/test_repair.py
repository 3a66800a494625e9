"""Swaps at a lane's end: they fill batches, keep the rules, and hold no shard longer where they need not."""

from __future__ import annotations

import numpy as np

from geostream.planning.repair import Rules, complete
from tests.cities import csr


def clique(n: int, together: list[int]) -> list[list[int]]:
    """n lists in which each of ``together`` excludes all others of them."""
    return [[other for other in together if other != one] if one in together else [] for one in range(n)]


def test_a_clashing_rest_changes_places_with_earlier_pairs() -> None:
    """Pairs 0…3 exclude one another; batches of the others can take one each."""
    batches = [[4, 5], [6, 7], [8, 9]]
    rules = Rules(
        place=np.arange(10, dtype=np.int32),
        excluded=csr(clique(10, [0, 1, 2, 3])),
        arrival=np.zeros(10, dtype=np.int64),
        held_last=np.ones(10, dtype=bool),
    )
    made = complete(batches, [0, 1, 2, 3], rules, 2)
    assert len(made) == 5
    assert sorted(pair for batch in made for pair in batch) == list(range(10))
    assert all(len({0, 1, 2, 3}.intersection(batch)) <= 1 for batch in made)


def test_swaps_stay_among_shards_that_are_held_at_the_end() -> None:
    """Batch 0 was made before the rest had arrived, and 6, 7 are of a shard that has gone: both stay as they are."""
    rules = Rules(
        place=np.arange(10, dtype=np.int32),
        excluded=csr(clique(10, [0, 1])),
        arrival=np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        held_last=np.array([True] * 6 + [False] * 2 + [True] * 2),
    )
    made = complete([[8, 9], [6, 4], [7, 5]], [0, 1], rules, 2)
    assert made[0] == [8, 9]
    assert 6 in made[1]
    assert 7 in made[2]
    assert len(made) == 4


def test_what_cannot_be_placed_is_left_out_and_nothing_is_lost() -> None:
    """All pairs are views of one place: no batch can hold two of them."""
    rules = Rules(np.zeros(5, dtype=np.int32), csr([[]]), np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool))
    assert complete([], [0, 1, 2, 3, 4], rules, 2) == []
