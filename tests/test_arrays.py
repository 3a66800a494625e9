"""Ragged lists, renumbered, cut out and looked up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream import arrays
from geostream.arrays import by_group, listed, restrict, take
from tests.cities import csr

LISTS = csr([[1, 3], [0, 2], [], [0]])


def test_restrict_renumbers_places() -> None:
    restricted = restrict(csr([[1, 3], [0, 2], [1], [0]]), np.array([0, 1, 3], dtype=np.int32))
    assert [restricted.row(i).tolist() for i in range(3)] == [[1, 2], [0], [0]]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), block=st.integers(1, 5))
def test_restrict_keeps_what_is_between_the_places(seed: int, n: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    lists = [np.flatnonzero(rng.random(n) < 0.4).tolist() for _ in range(n)]
    places = np.flatnonzero(rng.random(n) < 0.6).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "LISTS", block)
        restricted = restrict(csr(lists), places)
    rows = {place: row for row, place in enumerate(places.tolist())}
    expected = [[rows[other] for other in lists[place] if other in rows] for place in places.tolist()]
    assert [restricted.row(i).tolist() for i in range(len(places))] == expected
    assert len(restricted.indptr) == len(places) + 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-1, 4), max_size=20), st.sampled_from([np.int16, np.int32]))
def test_rows_by_group(group: list[int], kind: type[np.integer]) -> None:
    rows, found = by_group(np.array(group, dtype=kind))
    assert {number: rows[start:stop].tolist() for number, start, stop in found} == {
        number: [row for row, own in enumerate(group) if own == number] for number in set(group) - {-1}
    }
    assert [number for number, _, _ in found] == sorted(set(group) - {-1})


def test_take_repeats_and_reorders() -> None:
    taken = take(LISTS, np.array([3, 2, 0, 0]))
    assert [taken.row(i).tolist() for i in range(4)] == [[0], [], [1, 3], [1, 3]]
    assert take(LISTS, np.zeros(0, dtype=np.int64)).indptr.tolist() == [0]


def test_listed_is_membership() -> None:
    row, other = np.divmod(np.arange(16), 4)
    expected = [int(o) in LISTS.row(int(r)).tolist() for r, o in zip(row, other, strict=True)]
    assert listed(LISTS, row, other).tolist() == expected
    assert not listed(csr([[], []]), np.array([0, 1]), np.array([1, 0])).any()
