"""Ragged lists, renumbered, cut out and looked up."""

from __future__ import annotations

import numpy as np

from geostream.arrays import listed, restrict, take
from tests.cities import csr

LISTS = csr([[1, 3], [0, 2], [], [0]])


def test_restrict_renumbers_places() -> None:
    restricted = restrict(csr([[1, 3], [0, 2], [1], [0]]), np.array([0, 1, 3], dtype=np.int32))
    assert [restricted.row(i).tolist() for i in range(3)] == [[1, 2], [0], [0]]


def test_take_repeats_and_reorders() -> None:
    taken = take(LISTS, np.array([3, 2, 0, 0]))
    assert [taken.row(i).tolist() for i in range(4)] == [[0], [], [1, 3], [1, 3]]
    assert take(LISTS, np.zeros(0, dtype=np.int64)).indptr.tolist() == [0]


def test_listed_is_membership() -> None:
    row, other = np.divmod(np.arange(16), 4)
    expected = [int(o) in LISTS.row(int(r)).tolist() for r, o in zip(row, other, strict=True)]
    assert listed(LISTS, row, other).tolist() == expected
    assert not listed(csr([[], []]), np.array([0, 1]), np.array([1, 0])).any()
