"""Hold pairs, and lists of place ids of unequal length, as arrays; layouts and plans use them.

A pair is two small numbers, and lists of unequal length are one flat array. A hundred thousand of either take a few
hundred kilobytes, and an epoch is planned without a Python object for each pair. Names of places are only in the
layout.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer]  # of any width
Number = TypeVar("Number", bound=np.integer)
Bools = npt.NDArray[np.bool_]
LISTS = 2**16  # that are restricted at a time


class Pairs(NamedTuple):
    """Pairs in the order of (place, view). The row number of a pair is its *pair id*."""

    place: Int32  # (P,)
    view: Int16  # (P,) number of the view within its place

    def __len__(self) -> int:  # of pairs, not of fields
        return len(self.place)


def pair_codes(place: Int32, view: Int16) -> Int64:
    """Return one number for each pair: the same in every generation, and in the order of (place, view).

    Args:
        place: Place ids, in any shape.
        view: Number of each pair's view within its place, in the same shape.
    """
    codes = place.astype(np.int64)
    codes <<= 16  # in place: a plan's codes are the largest that a trainer holds
    codes |= view
    return codes


class Csr(NamedTuple):
    """Lists of place ids of unequal length: list i is ``indices[indptr[i]:indptr[i + 1]]``, sorted."""

    indptr: Int64  # (lists + 1,)
    indices: Int32  # all lists, one after the other

    def row(self, i: int) -> Int32:
        """Return list number ``i``."""
        return self.indices[self.indptr[i] : self.indptr[i + 1]]


def restrict(lists: Csr, places: Int32) -> Csr:
    """Replace place ids by rows of ``places``, and drop all other places.

    Beside the lists and what is returned, memory holds 4 bytes for every place id.

    Args:
        lists: One list of place ids for every place id.
        places: (N,) sorted place ids.

    Returns:
        N lists of rows of ``places``; the lists themselves if these are all places.
    """
    if len(places) == len(lists.indptr) - 1:
        return lists
    row = np.full(len(lists.indptr) - 1, -1, dtype=np.int32)
    row[places] = np.arange(len(places), dtype=np.int32)
    indptr, indices = np.zeros(len(places) + 1, dtype=np.int64), np.empty_like(lists.indices)
    for start in range(0, len(places), LISTS):
        some = take(lists, places[start : start + LISTS])
        other = row[some.indices]
        before = np.concatenate([[0], np.cumsum(other >= 0)]) + indptr[start]
        indptr[start : start + len(some.indptr)] = before[some.indptr]
        indices[before[0] : before[-1]] = other[other >= 0]
    return Csr(indptr, indices[: indptr[-1]])


def take(lists: Csr, rows: npt.NDArray[np.integer]) -> Csr:
    """Return the lists with the numbers ``rows``, in that order."""
    lengths = lists.indptr[rows + 1] - lists.indptr[rows]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    at = np.arange(indptr[-1]) + np.repeat(lists.indptr[rows] - indptr[:-1], lengths)
    return Csr(indptr, lists.indices[at])


def distinct(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Return the different values of an array of whole numbers, sorted.

    NumPy's ``unique`` hashes them, which takes a hundred times as long for a million.
    """
    values = np.sort(values, axis=None)
    return values[begins(values)]


def begins(values: Integers) -> Bools:
    """Return which elements differ from the one before them; the first one does."""
    new = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return new


def by_group(group: npt.NDArray[np.integer]) -> tuple[Int64, list[tuple[int, int, int]]]:
    """Sort rows by their group.

    Args:
        group: (n,) number of each row's group; -1 drops the row.

    Returns:
        The rows that are kept, those of a group together and in their order. Then the number of each group that has
        rows, and where these begin and end.
    """
    rows = np.argsort(group, kind="stable")
    rows = rows[np.count_nonzero(group < 0) :]
    if not len(rows):
        return rows, []
    of_row = group[rows]
    first = np.flatnonzero(begins(of_row))
    ends = [*first[1:].tolist(), len(rows)]
    return rows, list(zip(of_row[first].tolist(), first.tolist(), ends, strict=True))


def listed(lists: Csr, row: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Return whether ``other`` is in list number ``row``, elementwise.

    Args:
        lists: The lists.
        row: Numbers of lists; broadcast against ``other``.
        other: Ids to look for.
    """
    codes = np.repeat(np.arange(len(lists.indptr) - 1), np.diff(lists.indptr)) << 32 | lists.indices
    if not len(codes):
        return np.zeros(np.broadcast(row, other).shape, dtype=bool)
    wanted = row.astype(np.int64) << 32 | other
    found: npt.NDArray[np.bool_] = codes[np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)] == wanted
    return found
