"""Lists of places that are no neighbours, per place: renumbered, cut out and looked up. Pure functions on arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from geostream.layout import Csr, Int32


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
