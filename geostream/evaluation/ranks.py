"""Rank the positives of each query in the gallery: count the wrong candidates that are at least as similar.

Similarities are dot products in float64. Near-ties count against the model: a positive's similarity is lowered and a
wrong candidate's raised by TIE times the lengths of the two vectors compared. TIE lies far above the rounding of
float64 and below that of the float32 vectors. So a constant embedding scores about zero instead of 100 %, a copy of the
positive counts against the model wherever it stands, and neither the order of the gallery nor the size of the blocks
changes a digit. A positive that is not finite is never found; a wrong candidate that is not finite ranks above all.

At most STRIP similarities are held at a time, whatever the number of queries and candidates. float64 costs twice the
time of float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from geostream.arrays import Bools, Csr, Float32, Float64, Int64, take

STRIP = 2**21  # similarities held at once: 16 MiB
NEVER = 2**40  # "candidates" above a positive that is not finite: more than any rank looks at
#: Near-ties, relative to the vectors' lengths. float64 rounds a product of D numbers by less than D × 1.2e-16, float32
#: numbers are off by 6e-8 from the start.
TIE = 1e-9


class Ranks(NamedTuple):
    """Count the wrong candidates ranked above each of E positives, those of one query after the other.

    Attributes:
        wrong: (E,) all of them.
        not_ignored: (E,) all but the ignored ones.
    """

    wrong: Int64
    not_ignored: Int64


class _Positives(NamedTuple):
    """Hold the positives of all queries, flat: E of them."""

    owner: Int64  # (E,) row of the query
    threshold: Float64  # (E,) similarity from which on a candidate counts as ranked above; NaN: not finite


class _GalleryBlock:
    """Hold consecutive candidates of the gallery, ready to be compared."""

    def __init__(self, first: int, vectors: Float32) -> None:
        self.first, self.stop = first, first + len(vectors)
        self._vectors, self._lengths = _wide(vectors)
        self._unknown = np.flatnonzero(~np.isfinite(self._lengths))
        self._lengths[self._unknown] = 0

    def raised(self, query: Float64, length: Float64) -> Float64:
        """Return (n, R) similarities to the queries (n, D), raised by the tolerance; infinite if not finite."""
        similarity: Float64 = query @ self._vectors.T
        similarity += np.outer(TIE * length, self._lengths)
        similarity[:, self._unknown] = np.inf
        return similarity


def rank_positives(
    query: Float32, positive: Float32, positives: Csr, ignored: Csr, gallery: Iterable[tuple[int, Float32]]
) -> Ranks:
    """Count the wrong candidates of the gallery that are at least as similar to a query as each of its positives.

    Args:
        query: (n, D) vectors of any float type, taken as float32.
        positive: (E, D) vectors of ``positives.indices``.
        positives: n lists of gallery rows, each row once, none empty.
        ignored: n lists of gallery rows that ``not_ignored`` leaves out.
        gallery: (first row, vectors) of consecutive blocks, each held while it is compared.

    Returns:
        Two numbers for each of the E positives; NEVER for one that is not finite.
    """
    wide, lengths = _wide(query)
    found = _positives(wide, lengths, positive, positives)
    lengths[~np.isfinite(lengths)] = 0
    wrong, freed = np.zeros((2, len(found.owner)), dtype=np.int64)
    free = _flat(take(ignored, found.owner))
    for first, vectors in gallery:
        block = _GalleryBlock(first, vectors)
        here = free[(free[:, 1] >= first) & (free[:, 1] < block.stop)]
        height = max(1, STRIP // max(len(vectors), 1))
        for top in range(0, len(wide), height):
            rows = slice(top, min(top + height, len(wide)))
            similarity = block.raised(wide[rows], lengths[rows])
            of_rows = slice(*positives.indptr[[rows.start, rows.stop]].tolist())
            _strike_out(similarity, found.owner[of_rows] - top, positives.indices[of_rows].astype(np.int64) - first)
            for start in range(of_rows.start, of_rows.stop, height):
                some = slice(start, min(start + height, of_rows.stop))
                above: Bools = similarity[found.owner[some] - top] >= found.threshold[some, None]
                wrong[some] += np.count_nonzero(above, axis=1)
                of_some = here[slice(*np.searchsorted(here[:, 0], [some.start, some.stop]).tolist())]
                is_above = above[of_some[:, 0] - some.start, of_some[:, 1] - first]
                freed += np.bincount(of_some[is_above, 0], minlength=len(freed))
    never = np.isnan(found.threshold)
    wrong[never], freed[never] = NEVER, 0
    return Ranks(wrong, wrong - freed)


def _positives(query: Float64, length: Float64, positive: Float32, positives: Csr) -> _Positives:
    owner = np.repeat(np.arange(len(query)), np.diff(positives.indptr))
    threshold = np.empty(len(owner))
    for start in range(0, len(owner), 1024):
        some = slice(start, start + 1024)
        vectors, lengths = _wide(positive[some])
        similarity = np.einsum("ed,ed->e", query[owner[some]], vectors)
        with np.errstate(invalid="ignore"):
            reach = length[owner[some]] * lengths
            threshold[some] = np.where(np.isfinite(reach), similarity - TIE * reach, np.nan)
    return _Positives(owner, threshold)


def _strike_out(similarity: Float64, row: Int64, column: Int64) -> None:
    """Take the positives of the strip's queries out of it: they are not wrong candidates."""
    inside = (column >= 0) & (column < similarity.shape[1])
    similarity[row[inside], column[inside]] = -np.inf


def _wide(vectors: Float32) -> tuple[Float64, Float64]:
    """Return (n, D) float32 numbers as float64 and (n,) lengths; rows that are not finite are zeros of length NaN."""
    wide = np.asarray(vectors, dtype=np.float32).astype(np.float64)
    unknown = ~np.isfinite(wide).all(axis=1)
    wide[unknown] = 0
    lengths: Float64 = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    lengths[unknown] = np.nan
    return wide, lengths


def _flat(lists: Csr) -> Int64:
    """Return (m, 2) distinct (list, member) of ragged lists, sorted."""
    owner = np.repeat(np.arange(len(lists.indptr) - 1), np.diff(lists.indptr))
    return np.unique(np.stack([owner, lists.indices.astype(np.int64)], axis=1), axis=0)
