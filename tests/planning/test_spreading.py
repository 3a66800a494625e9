"""Spreading: every row once, shards of one size, pieces from all over the order, and as many as plans allow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Int32, Int64
from geostream.planning.hardness import RECLUSTER_MARGIN
from geostream.planning.spreading import PIECES, deal, shard_of_rows, spread_out, stretches


def runs(n: int, shards: int) -> list[Int64]:
    """Rows 0…n-1 in order, in shards of about equally many."""
    return np.array_split(np.arange(n), shards)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 200),
    shards=st.integers(1, 30),
    pieces=st.integers(1, 9),
    uneven=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_every_row_once_in_as_many_shards_of_the_same_bytes(
    n: int, shards: int, pieces: int, uneven: int, seed: int
) -> None:
    shards = min(shards, n)
    pieces = min(pieces, n // shards)
    sizes = np.random.default_rng(seed).integers(1, uneven + 1, n)
    before = runs(n, shards)
    after = deal(before, sizes, pieces)
    assert sorted(np.concatenate(after).tolist()) == list(range(n))
    assert len(after) == shards and all(len(rows) for rows in after)
    held = [np.array([sizes[rows].sum() for rows in some]) for some in (before, after)]
    # No shard strays from the mean by more than those before did, and a place for each piece.
    stray = np.abs(held[0] - sizes.mean() * n / shards).max()
    assert (np.abs(held[1] - sizes.mean() * n / shards) <= stray + (pieces + 1) * sizes.max()).all()


def test_a_shards_pieces_are_runs_of_the_order_and_equally_far_apart() -> None:
    dealt = deal(runs(240, 10), np.full(240, 7), 4)
    for number, rows in enumerate(dealt):
        starts = 6 * (number + 10 * np.arange(4))
        assert rows.tolist() == (starts[:, None] + np.arange(6)).ravel().tolist()


def test_pieces_are_of_equal_bytes() -> None:
    sizes = np.array([8, 1, 1, 1, 1, 1, 1, 1, 1, 8] * 2)
    first, second = deal([np.arange(10), np.arange(10, 20)], sizes, 2)
    assert first.tolist() == [*range(5), *range(10, 15)] and second.tolist() == [*range(5, 10), *range(15, 20)]
    one, two = deal([np.arange(4), np.arange(4, 8)], np.array([9, 1, 1, 1] * 2), 2)
    assert one.tolist() == [0, 4] and two.tolist() == [1, 2, 3, 5, 6, 7]


def test_one_piece_is_the_order_itself() -> None:
    assert [rows.tolist() for rows in deal(runs(20, 4), np.ones(20, dtype=np.int64), 1)] == [
        rows.tolist() for rows in runs(20, 4)
    ]


@pytest.mark.parametrize("enough", PIECES)
def test_the_most_pieces_are_taken_that_leave_plans_hard_enough(enough: int) -> None:
    before, sizes = runs(160, 5), np.ones(160, dtype=np.int64)
    asked: list[int] = []

    def reachable(shard: Int32) -> float:
        """Falls with the pieces, which are counted here: where the shard changes along the order."""
        pieces = (1 + int(np.count_nonzero(np.diff(shard)))) // 5
        asked.append(pieces)
        return 2 - pieces / 10

    found, pieces = spread_out(before, sizes, reachable, wanted=2 - enough / 10 - RECLUSTER_MARGIN - 1e-9)
    assert pieces == enough
    assert shard_of_rows(found).tolist() == shard_of_rows(deal(before, sizes, enough)).tolist()
    assert asked == [pieces for pieces in PIECES if pieces >= enough]


def test_where_nothing_is_hard_enough_it_is_what_comes_nearest() -> None:
    before, sizes = runs(160, 5), np.ones(160, dtype=np.int64)
    scores = dict(zip(PIECES, [0.4, 0.7, 0.6, 0.5], strict=True))

    def reachable(shard: Int32) -> float:
        return scores[(1 + int(np.count_nonzero(np.diff(shard)))) // 5]

    found, pieces = spread_out(before, sizes, reachable, wanted=0.9)
    assert pieces == PIECES[1]
    assert shard_of_rows(found).tolist() == shard_of_rows(deal(before, sizes, PIECES[1])).tolist()


def test_no_more_pieces_than_the_smallest_shard_has_places() -> None:
    shards, sizes = [np.arange(3), np.arange(3, 20)], np.ones(20, dtype=np.int64)
    found, pieces = spread_out(shards, sizes, lambda shard: 1.0, wanted=0.5)
    assert pieces == 2 and sorted(np.concatenate(found).tolist()) == list(range(20))


def test_without_a_score_nothing_is_spread() -> None:
    before = runs(160, 5)
    found, pieces = spread_out(before, np.ones(160, dtype=np.int64), lambda shard: None, wanted=0)
    assert pieces == 1 and [rows.tolist() for rows in found] == [rows.tolist() for rows in before]


@settings(max_examples=100, deadline=None)
@given(shards=st.integers(1, 300), per_shard=st.integers(1, 9), most=st.integers(1, 3000))
def test_stretches_are_as_many_as_pieces_and_hold_no_more_than_asked(shards: int, per_shard: int, most: int) -> None:
    before = runs(shards * per_shard, shards)
    chosen = stretches(before, most)
    assert chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] == shards - 1
    rows = sum(len(before[number]) for number in chosen)
    if shards * per_shard <= most:
        assert len(chosen) == shards
    else:
        assert rows <= max(most, PIECES[0] * per_shard)


def test_shards_spread_over_stretches_have_a_piece_of_each() -> None:
    """As shards that are spread over the whole order have, and pieces that follow one another are in one stretch."""
    before, sizes = runs(8000, 400), np.ones(8000, dtype=np.int64)
    chosen = stretches(before, 1600)
    assert len(chosen) == 80 and chosen[:10] == list(range(10)) and chosen[-10:] == list(range(390, 400))
    starts = chosen[::10]
    assert np.ptp(np.diff(starts)) <= 1 and [starts[0] + i for i in range(10)] == chosen[:10]
    tried = [before[number] for number in chosen]
    rows = np.concatenate(tried)
    for shard in deal([np.searchsorted(rows, part) for part in tried], sizes[rows], PIECES[0]):
        of_stretch = np.searchsorted(starts, rows[shard] // 20, side="right") - 1
        assert sorted(set(of_stretch.tolist())) == list(range(PIECES[0]))
