"""The schedule against a simulation that holds shards the plain way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import BadInput
from geostream.layout import Int64
from geostream.streaming.schedule import schedule

Index = tuple[list[Int64], Int64, Int64, Int64]


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    """(member rows of each batch, shard of each member, shard sizes, member sizes)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shards, members = draw(st.integers(1, 8)), draw(st.integers(1, 40))
    member_shard = rng.integers(0, shards, members)
    member_sizes = rng.integers(1, 100, members)
    shard_sizes = np.bincount(member_shard, member_sizes, minlength=shards).astype(np.int64) + 10
    batches = [rng.integers(0, members, rng.integers(0, 6)) for _ in range(draw(st.integers(0, 12)))]
    return batches, member_shard, shard_sizes, member_sizes


@settings(deadline=None, max_examples=200)
@given(index=indexes(), ahead=st.integers(0, 3))
def test_every_shard_is_there_when_needed_and_gone_afterwards(index: Index, ahead: int) -> None:
    batches, member_shard, shard_sizes, member_sizes = index
    made = schedule(batches, member_shard, shard_sizes, member_sizes, ahead=ahead)
    needed = [set(member_shard[batch].tolist()) for batch in batches]
    order = list(dict.fromkeys(shard for step in needed for shard in sorted(step)))
    assert made.shard.tolist() == order  # in order of need, nothing fetched twice
    peak = 0
    for step in range(len(batches)):
        still = set().union(*needed[step:])
        begun = set().union(*needed[: step + 1])
        held = still.intersection(order[: len(begun) + ahead])  # what was needed so far, and the next ``ahead`` reads
        assert set(made.shard[(made.come <= step) & (made.last >= step)].tolist()) == held
        assert needed[step] <= set(made.shard[(made.first <= step) & (made.last >= step)].tolist())
        peak = max(peak, int(shard_sizes[list(held)].sum()))
    assert made.peak_bytes == peak
    used = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *batches]))
    assert made.bytes_used == member_sizes[used].sum()
    assert made.bytes_fetched == shard_sizes[order].sum()
    assert made.requests == len(order)


def test_figures() -> None:
    """Three shards, the first needed again at the end: held throughout."""
    made = schedule(
        [np.array([0, 1]), np.array([2, 3]), np.array([4, 0])],
        np.array([0, 0, 1, 1, 2]),
        np.array([100, 200, 300]),
        np.array([40, 40, 90, 90, 280]),
    )
    assert made.last.tolist() == [2, 1, 2]
    assert made.peak_bytes == 400
    assert made.resident_share == pytest.approx(400 / 600)
    assert made.amplification == pytest.approx(600 / 540)
    assert made.requests_per_gib == pytest.approx(3 * 2**30 / 600)


def test_reading_ahead_is_counted() -> None:
    batches = [np.array([shard]) for shard in range(4)]
    sizes = np.full(4, 100)
    assert schedule(batches, np.arange(4), sizes, sizes).peak_bytes == 100
    ahead = schedule(batches, np.arange(4), sizes, sizes, ahead=2)
    assert ahead.come.tolist() == [0, 0, 0, 1]
    assert ahead.peak_bytes == 300


def test_an_index_that_contradicts_the_plan_is_refused() -> None:
    with pytest.raises(BadInput, match="members that the layout's index does not hold"):
        schedule([np.array([5])], np.array([0]), np.array([10]), np.array([10]))
    with pytest.raises(BadInput, match="names shards that the layout does not have"):
        schedule([np.array([0])], np.array([3]), np.array([10]), np.array([10]))
