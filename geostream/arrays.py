"""Pairs, and lists of place ids of unequal length, as arrays: what a layout hands out and plans are made of.

Decides that a pair is two small numbers and a ragged list one flat array: a hundred thousand of either is a few hundred
kilobytes, and whole epochs are planned without a Python object for each pair. The cost is that a name is looked up in
the layout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Pairs(NamedTuple):
    """Pairs in the order of (place, view); a *pair id* is a row number here."""

    place: Int32  # (P,)
    view: Int16  # (P,) number of the view within its place

    def __len__(self) -> int:  # of pairs, not of fields
        return len(self.place)


def pair_codes(place: Int32, view: Int16) -> Int64:
    """One number a pair, the same in every generation, in the order of (place, view); any shape."""
    return place.astype(np.int64) << 16 | view


class Csr(NamedTuple):
    """Ragged lists of place ids: those of row i are ``indices[indptr[i]:indptr[i + 1]]``, sorted."""

    indptr: Int64
    indices: Int32

    def row(self, i: int) -> Int32:
        return self.indices[self.indptr[i] : self.indptr[i + 1]]


def restrict(lists: Csr, places: Int32) -> Csr:
    """Ragged lists over all place ids as lists over rows of ``places`` (sorted ids); other places fall away."""
    row = np.full(len(lists.indptr) - 1, -1, dtype=np.int32)
    row[places] = np.arange(len(places), dtype=np.int32)
    owner = np.repeat(row, np.diff(lists.indptr))
    other = row[lists.indices]
    keep = (owner >= 0) & (other >= 0)
    counts = np.bincount(owner[keep], minlength=len(places))
    return Csr(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), other[keep])


def take(lists: Csr, rows: npt.NDArray[np.integer]) -> Csr:
    """The lists of ``rows``, in their order."""
    lengths = np.diff(lists.indptr)[rows]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    at = np.arange(indptr[-1]) + np.repeat(lists.indptr[rows] - indptr[:-1], lengths)
    return Csr(indptr, lists.indices[at])


def listed(lists: Csr, row: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Whether ``other`` is in the list of ``row``, elementwise."""
    codes = np.repeat(np.arange(len(lists.indptr) - 1), np.diff(lists.indptr)) << 32 | lists.indices
    if not len(codes):
        return np.zeros(np.broadcast(row, other).shape, dtype=bool)
    wanted = row.astype(np.int64) << 32 | other
    found: npt.NDArray[np.bool_] = codes[np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)] == wanted
    return found
