"""Ranks of the positives by float64 alone: the rule that `geostream.evaluation.ranks` keeps, and the way before it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Float32, Float64, Int64, take
from geostream.evaluation.ranks import NEVER, TIE, Ranks

STRIP = 2**21


def rank_in_float64(
    query: Float32, positive: Float32, positives: Csr, ignored: Csr, gallery: Iterable[tuple[int, Float32]]
) -> Ranks:
    """The same as `rank_positives`, with every similarity in float64."""
    wide, length = _wide(query)
    owner = np.repeat(np.arange(len(query)), np.diff(positives.indptr))
    threshold = _thresholds(wide, length, owner, positive)
    length[~np.isfinite(length)] = 0
    wrong, freed = np.zeros((2, len(owner)), dtype=np.int64)
    members = take(ignored, owner)
    free = np.stack([np.repeat(np.arange(len(owner)), np.diff(members.indptr)), members.indices], axis=1)
    free = np.unique(free.astype(np.int64), axis=0)
    for first, vectors in gallery:
        candidates, lengths = _wide(vectors)
        unknown = np.flatnonzero(~np.isfinite(lengths))
        lengths[unknown] = 0
        stop = first + len(vectors)
        here = free[(free[:, 1] >= first) & (free[:, 1] < stop)]
        height = max(1, STRIP // max(len(vectors), 1))
        for top in range(0, len(wide), height):
            rows = slice(top, min(top + height, len(wide)))
            similarity = wide[rows] @ candidates.T
            similarity += np.outer(TIE * length[rows], lengths)
            similarity[:, unknown] = np.inf
            of_rows = slice(*positives.indptr[[rows.start, rows.stop]].tolist())
            _strike_out(similarity, owner[of_rows] - top, positives.indices[of_rows].astype(np.int64) - first)
            for start in range(of_rows.start, of_rows.stop, height):
                some = slice(start, min(start + height, of_rows.stop))
                above = similarity[owner[some] - top] >= threshold[some, None]
                wrong[some] += np.count_nonzero(above, axis=1)
                of_some = here[slice(*np.searchsorted(here[:, 0], [some.start, some.stop]).tolist())]
                is_above = above[of_some[:, 0] - some.start, of_some[:, 1] - first]
                freed += np.bincount(of_some[is_above, 0], minlength=len(freed))
    never = np.isnan(threshold)
    wrong[never], freed[never] = NEVER, 0
    return Ranks(wrong, wrong - freed)


def _thresholds(query: Float64, length: Float64, owner: Int64, positive: Float32) -> Float64:
    threshold = np.empty(len(owner))
    for start in range(0, len(owner), 1024):
        some = slice(start, start + 1024)
        vectors, lengths = _wide(positive[some])
        similarity = np.einsum("ed,ed->e", query[owner[some]], vectors)
        with np.errstate(invalid="ignore"):
            reach = length[owner[some]] * lengths
            threshold[some] = np.where(np.isfinite(reach), similarity - TIE * reach, np.nan)
    return threshold


def _strike_out(similarity: npt.NDArray[np.float64], row: Int64, column: Int64) -> None:
    inside = (column >= 0) & (column < similarity.shape[1])
    similarity[row[inside], column[inside]] = -np.inf


def _wide(vectors: Float32) -> tuple[Float64, Float64]:
    wide = np.asarray(vectors, dtype=np.float32).astype(np.float64)
    unknown = ~np.isfinite(wide).all(axis=1)
    wide[unknown] = 0
    lengths: Float64 = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    lengths[unknown] = np.nan
    return wide, lengths
