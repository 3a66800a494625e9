"""Rank the positives of each query in the gallery: count the wrong candidates that are at least as similar.

Similarities are dot products in float64. Near-ties count against the model: a positive's similarity is lowered and a
wrong candidate's raised by TIE times the lengths of the two vectors compared. TIE lies far above the rounding of
float64 and below that of the float32 vectors. So a constant embedding scores about zero instead of 100 %, a copy of the
positive counts against the model wherever it stands, and neither the order of the gallery nor the size of the blocks
changes a digit. A positive that is not finite is never found; a wrong candidate that is not finite ranks above all.

**float32 first.** The matrix product is computed in float32, at half the cost or less. Its error has a bound
(:func:`error_bound`). A candidate that is further than that from the positive's threshold is decided. The others, the
*doubtful* ones, are computed again in float64. So the counts are those of float64. With random vectors less than one
candidate in a million is doubtful near a positive that ranks high, and 1.5 in a thousand near one that ranks in the
middle. Where all vectors are alike, all are doubtful, and the float32 product comes on top of the float64 one.

**The bound.** Let u = 2⁻²⁴. Adding D products in float32, in any order, with or without fused multiply-add, is off from
q·c by at most γ |q|ᵀ|c| with γ = D u / (1 - D u) (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1),
and |q|ᵀ|c| is at most the product of the lengths. That holds without overflow and underflow. So each query, and each
block of the gallery, is first multiplied by the power of two that brings its length (of the block: its longest) between
0.7 and 1.5. That is exact but for numbers below 2⁻¹²⁶. What these and products that small lose is, in sum, below
8 D × 2⁻¹²⁶, and far below u times the lengths. Libraries that multiply matrices by Strassen's method or in TF32 do not
keep the bound; NumPy's do neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Bools, Csr, Float32, Float64, Int64, distinct, take

STRIP = 2**21  # similarities held at once: 8 MiB, and half as much again for what is above and what is doubtful
NEVER = 2**40  # "candidates" above a positive that is not finite: more than any rank looks at
#: Near-ties, relative to the vectors' lengths. float64 rounds a product of D numbers by less than D × 1.2e-16, float32
#: numbers are off by 6e-8 from the start.
TIE = 1e-9
#: One doubtful candidate in so many is computed by itself. Where there are more, the matrix product in float64 is
#: cheaper, though it computes the others as well.
SPARSE = 32
TILE = 512  # rows and columns of a float64 product; its parts are at most 4 MiB each
WIDE = 2**19  # float64 numbers converted at once
LARGEST = 3e38  # below the largest float32


class Ranks(NamedTuple):
    """Count the wrong candidates ranked above each of E positives, those of one query after the other.

    Attributes:
        wrong: (E,) all of them.
        not_ignored: (E,) all but the ignored ones.
    """

    wrong: Int64
    not_ignored: Int64


class _Vectors:
    """Hold vectors, and the same in a scale in which float32 products neither overflow nor vanish.

    Attributes:
        exact: (n, D) the vectors; zeros where one is not finite.
        lengths: (n,) their lengths; 0 where one is not finite.
        unknown: Numbers of the vectors that are not finite.
        scaled: (n, D) vectors times a power of two; ``exact`` itself where that is 1 for all.
        exponent: (n,) of that power, negated. One number where all have the same.
        reach: (n,) lengths of ``scaled``. One number, of the longest, where all have the same exponent.
    """

    def __init__(self, vectors: Float32, *, one_scale: bool) -> None:
        self.exact, lengths = _measured(vectors)
        self.unknown = np.flatnonzero(np.isnan(lengths))
        lengths[self.unknown] = 0
        self.lengths = lengths
        scale_of = lengths.max(initial=0, keepdims=True) if one_scale else lengths
        fraction, exponent = np.frexp(scale_of)
        exponent -= fraction < np.sqrt(0.5)
        exponent[scale_of == 0] = 0
        self.exponent, self.reach = exponent, np.ldexp(scale_of, -exponent)
        self.scaled = np.ldexp(self.exact, -exponent[:, None]) if exponent.any() else self.exact


class _Asked(NamedTuple):
    """Hold some positives, and what is computed of their similarities to a block of the gallery."""

    owner: Int64  # (e,) row of each positive's query
    threshold: Float64  # (e,) similarity from which on a candidate counts as ranked above; NaN: not finite
    above: Bools  # (e, R) whether a candidate is surely above
    doubtful: Bools  # (e, R) whether float32 cannot tell


class _Buffers:
    """Keep the large arrays from strip to strip. Fresh memory for each would take longer than counting does."""

    def __init__(self) -> None:
        self._kept: dict[str, npt.NDArray[Any]] = {}

    def get(self, name: str, rows: int, columns: int, kind: type[np.generic]) -> npt.NDArray[Any]:
        """Return an array of any content; the one of the same name before is overwritten."""
        kept = self._kept.get(name)
        if kept is None or kept.size < rows * columns:
            kept = self._kept[name] = np.empty(rows * columns, dtype=kind)
        return kept[: rows * columns].reshape(rows, columns)


def error_bound(dim: int) -> float:
    """Return how far a float32 dot product may be from deciding, relative to the lengths of the two vectors.

    That is the bound on its rounding, with room for the rounding of lengths and underflow, and twice the tolerance for
    near-ties, which covers the tolerance itself and the rounding of float64.

    Args:
        dim: Number of dimensions, D; below 2**23.
    """
    rounding = (dim + 4) * 2.0**-24
    return rounding / (1 - rounding) + 2 * TIE


def rank_positives(
    query: Float32, positive: Float32, positives: Csr, ignored: Csr, gallery: Iterable[tuple[int, Float32]]
) -> Ranks:
    """Count the wrong candidates of the gallery that are at least as similar to a query as each of its positives.

    Beside its arguments and the current block it holds at most

    - 100 bytes for each query, positive, candidate of a block, and ignored candidate of a positive,
    - 4 × D bytes for each query, and for each candidate of a block, if their lengths are not about 1 or they are not
      finite float32 numbers (no copies are made of others),
    - 64 MiB (for D up to 2**19), whatever the sizes.

    Args:
        query: (n, D) vectors of any float type, taken as float32.
        positive: (E, D) vectors of ``positives.indices``.
        positives: n lists of gallery rows, each row once, none empty.
        ignored: n lists of gallery rows that ``not_ignored`` leaves out.
        gallery: (first row, vectors) of consecutive blocks, each held while it is compared.

    Returns:
        Two numbers for each of the E positives; NEVER for one that is not finite.
    """
    queries = _Vectors(query, one_scale=False)
    owner = np.repeat(np.arange(len(query)), np.diff(positives.indptr))
    threshold = _thresholds(queries, owner, positive)
    wrong, freed = np.zeros((2, len(owner)), dtype=np.int64)
    free = _flat(take(ignored, owner))
    buffers = _Buffers()
    for first, vectors in gallery:
        block = _Vectors(vectors, one_scale=True)
        size = len(vectors)
        here = free[(free[:, 1] >= first) & (free[:, 1] < first + size)]
        height = max(1, STRIP // max(size, 1))
        for top in range(0, len(query), height):
            rows = slice(top, min(top + height, len(query)))
            of_rows = slice(*positives.indptr[[rows.start, rows.stop]].tolist())
            similarity = buffers.get("similarity", rows.stop - rows.start, size, np.float32)
            np.matmul(queries.scaled[rows], block.scaled.T, out=similarity)
            similarity[:, block.unknown] = np.inf
            _strike_out(similarity, owner[of_rows] - top, positives.indices[of_rows].astype(np.int64) - first)
            for start in range(of_rows.start, of_rows.stop, height):
                some = slice(start, min(start + height, of_rows.stop))
                above = _above(queries, block, owner[some], threshold[some], similarity, top, buffers)
                wrong[some] += _counts(above)
                of_some = here[slice(*np.searchsorted(here[:, 0], [some.start, some.stop]).tolist())]
                is_above = above[of_some[:, 0] - some.start, of_some[:, 1] - first]
                freed[some] += np.bincount(of_some[is_above, 0] - some.start, minlength=len(above))
    never = np.isnan(threshold)
    wrong[never], freed[never] = NEVER, 0
    return Ranks(wrong, wrong - freed)


def _thresholds(queries: _Vectors, owner: Int64, positive: Float32) -> Float64:
    """Return the (E,) similarities of the positives, lowered by the tolerance; NaN where one is not finite."""
    threshold = np.empty(len(owner))
    known = np.ones(len(queries.lengths), dtype=bool)
    known[queries.unknown] = False
    step = max(1, WIDE // max(1, positive.shape[1]))
    for start in range(0, len(owner), step):
        some = slice(start, start + step)
        vectors, lengths = _measured(positive[some])
        reach = queries.lengths[owner[some]] * lengths
        similarity = _dots(queries.exact, owner[some], vectors, np.arange(len(vectors)))
        threshold[some] = np.where(known[owner[some]], similarity - TIE * reach, np.nan)
    return threshold


def _above(
    queries: _Vectors,
    block: _Vectors,
    owner: Int64,
    threshold: Float64,
    similarity: Float32,
    top: int,
    buffers: _Buffers,
) -> Bools:
    """Return (e, R) whether each candidate of a block counts as ranked above each of e positives.

    Args:
        queries: All queries.
        block: R candidates.
        owner: (e,) row of each positive's query.
        threshold: (e,) of the positives.
        similarity: (m, R) scaled float32 similarities of the queries from row ``top`` on. Those of positives are -inf,
            those of candidates that are not finite inf.
        top: Row of the first of these queries.
        buffers: Hold the result until the next call.
    """
    size = similarity.shape[1]
    if not np.array_equal(owner, np.arange(top, top + len(similarity))):  # one positive each needs no copy
        picked = buffers.get("picked", len(owner), size, np.float32)
        similarity = np.take(similarity, owner - top, axis=0, out=picked, mode="clip")  # "raise" would copy once more
    scaled = np.ldexp(threshold, -(queries.exponent[owner] + block.exponent))
    margin = error_bound(queries.exact.shape[1]) * queries.reach[owner] * block.reach
    low, high = (np.clip(bound, -LARGEST, LARGEST).astype(np.float32) for bound in (scaled - margin, scaled + margin))
    above = buffers.get("above", len(owner), size, np.bool_)
    doubtful = buffers.get("doubtful", len(owner), size, np.bool_)
    np.greater_equal(similarity, np.nextafter(high, np.float32(np.inf))[:, None], out=above)
    np.greater_equal(similarity, np.nextafter(low, np.float32(-np.inf))[:, None], out=doubtful)
    np.logical_xor(doubtful, above, out=doubtful)
    asked = _Asked(owner, threshold, above, doubtful)
    if np.count_nonzero(doubtful) > doubtful.size // SPARSE:
        _decide_rows(queries, block, asked, np.flatnonzero(_counts(doubtful) > size // SPARSE))
    _decide_entries(queries, block, asked)
    return above


def _decide_rows(queries: _Vectors, block: _Vectors, asked: _Asked, rows: Int64) -> None:
    """Decide all doubtful candidates of some positives by matrix products in float64."""
    step = max(1, min(TILE, WIDE // max(1, block.exact.shape[1])))
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        which, place = np.unique(asked.owner[some], return_inverse=True)
        vectors, lengths = queries.exact[which].astype(np.float64), TIE * queries.lengths[which]
        for left in range(0, len(block.exact), step):
            columns = slice(left, left + step)
            similarity = vectors @ block.exact[columns].astype(np.float64).T
            similarity += np.outer(lengths, block.lengths[columns])
            is_above = similarity[place] >= asked.threshold[some, None]
            asked.above[some, columns] |= is_above & asked.doubtful[some, columns]
    asked.doubtful[rows] = False


def _decide_entries(queries: _Vectors, block: _Vectors, asked: _Asked) -> None:
    """Decide the doubtful candidates one by one in float64."""
    at = np.flatnonzero(asked.doubtful)
    step = max(1, WIDE // 8 // max(1, block.exact.shape[1]))  # both sides stay in a core's cache
    for start in range(0, len(at), step):
        row, column = np.divmod(at[start : start + step], asked.above.shape[1])
        owner = asked.owner[row]
        similarity = _dots(queries.exact, owner, block.exact, column)
        similarity += TIE * queries.lengths[owner] * block.lengths[column]
        asked.above[row, column] = similarity >= asked.threshold[row]


def _dots(one: Float32, rows: Int64, other: Float32, columns: Int64) -> Float64:
    """Return (m,) float64 dot products of m rows of ``one`` and m rows of ``other``."""
    dots: Float64 = np.einsum("ed,ed->e", one[rows].astype(np.float64), other[columns].astype(np.float64))
    return dots


def _counts(found: Bools) -> Int64:
    """Return how many of each row are true. Six times as fast as ``count_nonzero`` along an axis."""
    counts: Int64 = np.bitwise_count(np.packbits(found, axis=1)).sum(axis=1, dtype=np.int64)
    return counts


def _strike_out(similarity: Float32, row: Int64, column: Int64) -> None:
    """Take the positives of the strip's queries out of it: they are not wrong candidates."""
    inside = (column >= 0) & (column < similarity.shape[1])
    similarity[row[inside], column[inside]] = -np.inf


def _measured(vectors: Float32) -> tuple[Float32, Float64]:
    """Return (n, D) vectors as float32 and their (n,) lengths; rows that are not finite are zeros of length NaN."""
    with np.errstate(over="ignore"):  # what is too large for float32 is not finite
        narrow = np.asarray(vectors, dtype=np.float32)
    lengths = np.empty(len(narrow))
    step = max(1, WIDE // 8 // max(1, narrow.shape[1]))
    for start in range(0, len(narrow), step):
        wide = narrow[start : start + step].astype(np.float64)
        lengths[start : start + step] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    unknown = ~np.isfinite(lengths)  # squares of float32 numbers do not overflow float64
    if unknown.any():
        narrow = np.where(unknown[:, None], np.float32(0), narrow)
        lengths[unknown] = np.nan
    return narrow, lengths


def _flat(lists: Csr) -> Int64:
    """Return (m, 2) distinct (list, member) of ragged lists, sorted."""
    owner = np.repeat(np.arange(len(lists.indptr) - 1), np.diff(lists.indptr))
    codes = distinct(owner << 32 | lists.indices)  # one number for both is ten times faster
    return np.stack([codes >> 32, codes & 0xFFFFFFFF], axis=1)
