"""The schedule against a plain simulation of what a reader that follows it holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Int64
from geostream.errors import BadInput
from geostream.layout.members import Extents
from geostream.planning import schedule as module
from geostream.planning.schedule import Schedule, schedule

PLENTY = 10**9


class Index(NamedTuple):
    """Members of several shards with gaps before, between and behind them."""

    extents: Extents
    shard_sizes: Int64


def index(rng: np.random.Generator, shards: int, members: int, largest: int = 100, gap: int = 60) -> Index:
    shard = np.sort(rng.integers(0, shards, members))
    offset, size = np.zeros(members, np.int64), rng.integers(0 if members % 3 == 0 else 1, largest, members)
    ends = np.zeros(shards, np.int64)
    for row in range(members):
        offset[row] = ends[shard[row]] + rng.integers(0, gap)
        ends[shard[row]] = offset[row] + size[row]
    return Index(Extents(shard, offset, size), ends + rng.integers(0, gap, shards))


class Case(NamedTuple):
    batches: list[Int64]
    stored: Index
    look_ahead: int
    prefetch: int
    gap: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = index(rng, draw(st.integers(1, 6)), draw(st.integers(1, 60)))
    members = len(made.extents.shard)
    if draw(st.booleans()):  # in order, as a clustered plan nearly is
        rows = np.argsort(np.arange(members) + rng.uniform(0, 10, members))
        batches = [*np.array_split(rows, draw(st.integers(1, 15))), rng.integers(0, members, 2)]
    else:
        batches = [rng.integers(0, members, rng.integers(0, 8)) for _ in range(draw(st.integers(0, 15)))]
    return Case(batches, made, draw(st.integers(0, 20)), draw(st.integers(0, 5)), draw(st.integers(0, 100)))


def make(case: Case, budget: int) -> Schedule:
    return schedule(
        case.batches,
        *case.stored,
        look_ahead=case.look_ahead,
        prefetch=case.prefetch,
        budget_bytes=budget,
        gap_bytes=case.gap,
    )


def spans_peak(case: Case) -> int:
    """Most bytes held when each member is held from its first use to its last, and nothing else."""
    uses: dict[int, list[int]] = {}
    for step, batch in enumerate(case.batches):
        for row in batch.tolist():
            uses.setdefault(row, []).append(step)
    size = case.stored.extents.size
    held = [sum(int(size[r]) for r, s in uses.items() if s[0] <= t <= s[-1]) for t in range(len(case.batches))]
    return max(held, default=0)


def follow(case: Case, made: Schedule) -> tuple[int, list[int]]:
    """Do what the schedule says, with the checks of a reader; (peak bytes, rows in the order they were brought)."""
    shard, offset, size = case.stored.extents
    held: dict[int, int] = {}  # row: last step
    flying: list[int] = []
    peak, brought = 0, []
    for step, batch in enumerate(case.batches):
        held = {row: last for row, last in held.items() if last >= step}
        flying += np.flatnonzero(made.come == step).tolist()
        now = sum(int(made.size[i]) for i in flying) + sum(int(size[row]) for row in held)
        peak = max(peak, now)
        for read in [i for i in flying if made.first[i] == step]:
            flying.remove(read)
            for at in range(*made.bring[read]):
                row = int(made.row[at])
                assert row not in held, "a member that is there is not fetched again"
                assert shard[row] == made.shard[read]
                assert made.offset[read] <= offset[row]
                assert offset[row] + size[row] <= made.offset[read] + made.size[read]
                held[row] = int(made.last[at])
                brought.append(row)
        assert set(batch.tolist()) <= held.keys(), "every member is there when it is needed"
    assert not flying and all(last < len(case.batches) for last in held.values())
    return peak, brought


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_every_member_comes_before_its_use_and_goes_after_its_last_and_none_twice(case: Case) -> None:
    made = make(case, PLENTY)
    peak, brought = follow(case, made)
    used = np.unique(np.concatenate([np.zeros(0, np.int64), *case.batches]))
    assert sorted(brought) == used.tolist()
    assert peak == made.peak_bytes <= PLENTY
    for row, last in zip(made.row.tolist(), made.last.tolist(), strict=True):
        assert last == max(step for step, batch in enumerate(case.batches) if row in batch)
    assert (np.diff(made.first) >= 0).all() and (made.come <= made.first).all() and (np.diff(made.come) >= 0).all()
    assert (made.first - made.come <= case.prefetch).all()
    assert made.bytes_used == case.stored.extents.size[used].sum()
    assert made.requests == len(made.shard) == len(made.bring)


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_reads_cover_what_is_needed_and_gaps_that_are_worth_it_and_nothing_else(case: Case) -> None:
    made = make(case, PLENTY)
    _, offset, size = case.stored.extents
    used = set(np.concatenate([np.zeros(0, np.int64), *case.batches]).tolist())
    gaps = 0
    for read in range(made.requests):
        rows = made.row[slice(*made.bring[read])]
        assert (
            made.offset[read] == offset[rows[0]]
            and made.offset[read] + made.size[read] == offset[rows[-1]] + size[rows[-1]]
        )
        for one, other in zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True):
            gap = int(offset[other] - offset[one] - size[one])
            assert 0 <= gap <= case.gap
            assert used.isdisjoint(range(one + 1, other)), "what another batch needs is not read through"
            gaps += gap
    assert made.bytes_fetched == made.bytes_used + gaps


@settings(deadline=None, max_examples=400)
@given(case=cases(), share=st.floats(0.2, 3.0))
def test_the_budget_is_never_exceeded_and_only_it_makes_anything_come_twice(case: Case, share: float) -> None:
    least = spans_peak(case)
    budget = int(least * share) + 1
    try:
        made = make(case, budget)
    except BadInput as error:
        batch = max(int(case.stored.extents.size[np.unique(b)].sum()) for b in case.batches)
        assert batch > budget and "buffer_mib" in str(error)
        return
    peak, brought = follow(case, made)
    assert peak == made.peak_bytes <= budget
    if least <= budget:
        assert len(set(brought)) == len(brought), "what fits is fetched once"


@settings(deadline=None, max_examples=150)
@given(lanes=st.lists(cases(), min_size=2, max_size=4), share=st.floats(0.5, 3.0))
def test_lanes_in_turn_keep_the_budget_and_have_all_in_time(lanes: list[Case], share: float) -> None:
    """Each lane is scheduled alone; together they hold at each step what was said, and read no more than alone."""
    steps = min(len(one.batches) for one in lanes)
    lanes = [one._replace(batches=one.batches[:steps], look_ahead=7, prefetch=2, gap=20) for one in lanes]
    rows = np.cumsum([0, *(len(one.stored.extents.shard) for one in lanes)])
    shards = np.cumsum([0, *(len(one.stored.shard_sizes) for one in lanes)])
    extents = [one.stored.extents._replace(shard=one.stored.extents.shard + shards[i]) for i, one in enumerate(lanes)]
    stored = Index(
        Extents(*map(np.concatenate, zip(*extents, strict=True))),
        np.concatenate([one.stored.shard_sizes for one in lanes]),
    )
    batches = [lane.batches[step] + rows[i] for step in range(steps) for i, lane in enumerate(lanes)]
    whole = Case(batches, stored, 7, 2, 20)
    budget = len(lanes) * (int(max(spans_peak(one) for one in lanes) * share) + 1)
    options: dict[str, Any] = {"look_ahead": 7, "prefetch": 2, "gap_bytes": 20, "budget_bytes": budget}
    try:
        made = schedule(batches, *stored, **options, lanes=len(lanes))
    except BadInput as error:
        number = int(str(error).split()[1])
        needed = int(stored.extents.size[np.unique(batches[number])].sum())
        assert needed > budget // len(lanes)
        return
    peak, brought = follow(whole, made)
    assert peak == made.peak_bytes <= budget
    alone = [make(one, budget // len(lanes)) for one in lanes]
    assert sorted(brought) == sorted(row + rows[i] for i, one in enumerate(alone) for row in one.row.tolist())
    assert made.requests == sum(one.requests for one in alone)
    assert made.bytes_used == sum(one.bytes_used for one in alone)


def test_look_ahead_merges_what_several_batches_need() -> None:
    """Eight members of 10 bytes, 2 apart, needed by four batches in turn."""
    made = Index(Extents(np.zeros(8, np.int64), np.arange(8) * 12, np.full(8, 10)), np.array([96]))
    batches = [np.array([i, i + 4]) for i in range(4)]
    options: dict[str, Any] = {"prefetch": 0, "budget_bytes": 1000, "gap_bytes": 2}
    assert schedule(batches, *made, look_ahead=3, **options).size.tolist() == [94]
    two = schedule(batches, *made, look_ahead=1, **options)
    assert (
        two.offset.tolist() == [0, 48, 24, 72] and two.size.tolist() == [22] * 4 and two.first.tolist() == [0, 0, 2, 2]
    )
    assert schedule(batches, *made, look_ahead=0, **options).requests == 8
    assert schedule(batches, *made, look_ahead=3, **{**options, "gap_bytes": 1}).requests == 8
    # Where memory is short, less is merged, and still nothing comes twice.
    short = schedule(batches, *made, look_ahead=3, **{**options, "budget_bytes": 45})
    assert short.requests > 1 and sorted(short.row.tolist()) == list(range(8)) and short.peak_bytes <= 45


def test_figures() -> None:
    extents = Extents(np.array([0, 0, 1]), np.array([0, 60, 20]), np.array([50, 40, 30]))
    made = schedule(
        [np.array([0, 1]), np.array([2])],
        extents,
        np.array([100, 60]),
        look_ahead=5,
        prefetch=1,
        budget_bytes=10_000,
        gap_bytes=10,
    )
    assert made.offset.tolist() == [0, 20] and made.size.tolist() == [100, 30] and made.come.tolist() == [0, 0]
    assert made.peak_bytes == 100 + 30  # both under way
    assert made.layout_bytes == 160 and made.resident_share == pytest.approx(130 / 160)
    assert made.amplification == pytest.approx(130 / 120)
    assert made.requests_per_gib == pytest.approx(2 * 2**30 / 130)


def test_long_runs_are_cut_into_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_READ", 400)
    extents = Extents(np.zeros(100, np.int64), np.arange(100) * 10, np.full(100, 10))
    made = schedule(
        [np.arange(100)], extents, np.array([1000]), look_ahead=0, prefetch=0, budget_bytes=10**6, gap_bytes=0
    )
    assert made.requests == 3 and made.size.max() <= 410 and made.size.min() > 300


def test_a_batch_that_cannot_fit_is_refused_before_anything_is_read() -> None:
    extents = Extents(np.zeros(3, np.int64), np.arange(3) * 2**20, np.full(3, 2**20))
    options = {"look_ahead": 9, "prefetch": 1, "gap_bytes": 0}
    batches = [np.array([0]), np.array([0, 1, 2])]
    with pytest.raises(BadInput, match=r"batch 1 .*3\.0 MiB .*2\.5 MiB.*buffer_mib"):
        schedule(batches, extents, np.array([3 * 2**20]), budget_bytes=5 * 2**19, **options)
    assert schedule(batches, extents, np.array([3 * 2**20]), budget_bytes=3 * 2**20, **options).requests


@pytest.mark.parametrize(
    ("row", "extents", "message"),
    [
        (5, Extents(*np.array([[0], [0], [10]])), "members"),
        (0, Extents(*np.array([[3], [0], [10]])), "shards"),
        (0, Extents(*np.array([[0], [5], [10]])), "past the end"),
        (0, Extents(*np.array([[0], [-5], [10]])), "past the end"),
    ],
)
def test_an_index_that_contradicts_itself_or_the_plan_is_refused(row: int, extents: Extents, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        schedule([np.array([row])], extents, np.array([10]), look_ahead=0, prefetch=0, budget_bytes=PLENTY, gap_bytes=0)
