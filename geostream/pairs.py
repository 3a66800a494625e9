"""Pairs, and lists of place ids of unequal length, as arrays: what a layout hands out and plans are made of.

Decides that a pair is two small numbers and a ragged list one flat array: a hundred thousand of either is a few hundred
kilobytes, and whole epochs are planned without a Python object for each pair. The cost is that a name is looked up in
the layout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.index import Int32, Int64


class Pairs(NamedTuple):
    """Pairs in the order of (place, view); a *pair id* is a row number here."""

    place: Int32  # (P,)
    view: npt.NDArray[np.int16]  # (P,) number of the view within its place

    def __len__(self) -> int:  # of pairs, not of fields
        return len(self.place)


def pair_codes(place: Int32, view: npt.NDArray[np.int16]) -> Int64:
    """One number a pair, the same in every generation, in the order of (place, view); any shape."""
    return place.astype(np.int64) << 16 | view


class Csr(NamedTuple):
    """Ragged lists of place ids: those of row i are ``indices[indptr[i]:indptr[i + 1]]``, sorted."""

    indptr: Int64
    indices: Int32

    def row(self, i: int) -> Int32:
        return self.indices[self.indptr[i] : self.indptr[i + 1]]
