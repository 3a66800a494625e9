"""Find the K most similar of one block of references, and merge the finds of several blocks and views.

FAISS's flat search does the work. It keeps one part of the matrix product in cache at a time, and only those entries
that are better than a row's K-th best so far. So it costs little more than the product alone. With a GPU the search
runs there, one block at a time. Measurements are in docs/notes/mining.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

from geostream.arrays import Csr, Float32, Int32, Int64, take

GPU_MOST = 2048  # the largest K that FAISS supports on a GPU
SLICE = 2048  # queries that are searched at a time
_gpu_in_use = Lock()


@dataclass(frozen=True)
class TopK:
    """The K best finds of each of n rows, best first; equal scores are ordered by id."""

    other: Int32  # (n, K) ids, -1 where there are no more
    score: Float32  # (n, K) cosines, -inf where there are no more


@cache
def _gpu() -> Any:
    import faiss

    return faiss.StandardGpuResources()


@dataclass(frozen=True)
class References:
    """A block of R references."""

    ids: Int32  # (R,) their place ids
    vectors: Float32  # (R, D) L2-normalised


def most_similar(query: Float32, references: References, k: int) -> TopK:
    """Find the most similar references of each query.

    If several references are exactly as similar as the k-th, any of them may be left out.

    Args:
        query: (Q, D) L2-normalised vectors.
        references: A block of R references.
        k: How many to find.

    Returns:
        (Q, min(k, R)) finds.
    """
    query, ids = np.ascontiguousarray(query), references.ids
    k = min(k, len(ids))
    score, at = _flat(query, references.vectors, k)
    return in_order(ids[at], score)


def _flat(query: Float32, vectors: Float32, k: int) -> tuple[Float32, Int64]:
    """Return (Q, k) scores and rows of the most similar vectors, by FAISS."""
    import faiss

    faiss.omp_set_num_threads(1)  # for this thread; Dask has as many task threads as cores
    faiss.cvar.distance_compute_blas_threshold = 20  # by default, FAISS is slower below about 400 queries
    vectors = np.ascontiguousarray(vectors)
    if faiss.get_num_gpus() > 0 and k <= GPU_MOST:
        with _gpu_in_use:
            return faiss.knn_gpu(_gpu(), query, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    return faiss.knn(query, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)


def nearest_of(query: Float32, own: Int32, excluded: Csr, references: References, k: int) -> TopK:
    """Find the most similar references of each query that may be its neighbours.

    Args:
        query: (Q, D) L2-normalised vectors.
        own: (Q,) place id of each query, which is no neighbour.
        excluded: Q lists of further ids that are no neighbours.
        references: A block of references.
        k: How many to find.

    Returns:
        (Q, k) finds.
    """
    enough = k + 1 + int(np.diff(excluded.indptr).max(initial=0))
    best = no_finds(len(query), k)
    for some in _slices(len(query)):
        found = most_similar(query[some], references, enough)
        found = drop_excluded(found, own[some], take(excluded, np.arange(len(query))[some]), k)
        best.other[some], best.score[some] = found.other, found.score
    return best


def _slices(n: int) -> Iterator[slice]:
    """Yield slices of n rows to work on one after the other, because intermediate results take much memory."""
    return (slice(start, min(start + SLICE, n)) for start in range(0, n, SLICE))


def in_order(other: Int32, score: Float32) -> TopK:
    """Sort finds by id where their scores are equal.

    Args:
        other: (n, K) ids, sorted by score; changed in place.
        score: (n, K) scores, falling; changed in place.
    """
    tied = ((score[:, 1:] == score[:, :-1]) & (other[:, 1:] >= 0)).any(axis=1)
    if tied.any():
        order = np.lexsort((other[tied], -score[tied]), axis=1)
        other[tied] = np.take_along_axis(other[tied], order, axis=1)
        score[tied] = np.take_along_axis(score[tied], order, axis=1)
    return TopK(other, score)


def drop_excluded(found: TopK, own: Int32, excluded: Csr, k: int) -> TopK:
    """Drop the finds that are no neighbours.

    Args:
        found: The finds of n rows.
        own: (n,) place id of each row, which is no neighbour.
        excluded: n lists of further ids that are no neighbours.
        k: How many finds of a row are kept.

    Returns:
        (n, k) finds.
    """
    row = np.broadcast_to(np.arange(len(own))[:, None], found.other.shape)
    valid = found.other != own[:, None]
    lengths = np.diff(excluded.indptr)
    table = np.full((len(own), int(lengths.max(initial=0))), -1, dtype=np.int32)
    table[np.arange(table.shape[1]) < lengths[:, None]] = excluded.indices
    for column in table.T:  # lists are short, so this is ten times faster than searching them
        valid &= found.other != column[:, None]
    rank = np.cumsum(valid, axis=1) - 1
    valid &= rank < k
    left = no_finds(len(own), k)
    left.other[row[valid], rank[valid]] = found.other[valid]
    left.score[row[valid], rank[valid]] = found.score[valid]
    return left


def no_finds(n: int, k: int) -> TopK:
    """Return n rows of k entries without a find."""
    return TopK(np.full((n, k), -1, dtype=np.int32), np.full((n, k), -np.inf, dtype=np.float32))


def merge(one: TopK, two: TopK) -> TopK:
    """Merge the finds of two blocks of references for the same rows.

    Args:
        one: (n, K) finds.
        two: (n, any number) finds of other ids.

    Returns:
        (n, K) best finds of both.
    """
    best = no_finds(*one.other.shape)
    for some in _slices(len(one.other)):
        other = np.concatenate([one.other[some], two.other[some]], axis=1)
        score = np.concatenate([one.score[some], two.score[some]], axis=1)
        order = np.argsort(-score, axis=1, kind="stable")[:, : best.other.shape[1]]
        found = in_order(np.take_along_axis(other, order, axis=1), np.take_along_axis(score, order, axis=1))
        best.other[some], best.score[some] = found.other, found.score
    return best


def by_place(row: Int64, found: TopK, n_rows: int) -> TopK:
    """Merge the finds of views into those of places.

    The similarity of a place to another is that of its most similar view. So its best K finds are among those of its
    views.

    Args:
        row: (V,) row of each view's place, from 0.
        found: (V, K) finds of the views.
        n_rows: How many places there are.

    Returns:
        (n_rows, K) finds of the places.
    """
    k = found.other.shape[1]
    if len(row) == n_rows and (np.bincount(row, minlength=n_rows) == 1).all():
        at = np.argsort(row)
        return found if (np.diff(row) > 0).all() else TopK(found.other[at], found.score[at])
    valid = found.other >= 0
    repeated = np.broadcast_to(row[:, None], valid.shape)
    return TopK(*merge_views(repeated[valid], found.other[valid], found.score[valid], n_rows, k))


def merge_views(row: Int64, other: Int32, score: Float32, n_rows: int, k: int) -> tuple[Int32, Float32]:
    """Collect single finds into rows, hardest first.

    If several views have found the same id, the best score counts. Equal scores are ordered by id.

    Args:
        row: (F,) row of each find.
        other: (F,) id that was found.
        score: (F,) its similarity.
        n_rows: How many rows there are.
        k: How many finds of a row are kept.

    Returns:
        (n_rows, k) ids and (n_rows, k) scores; -1 and -inf where there are no more.
    """
    code = row.astype(np.int64) << 32 | other
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    code = code[order[starts]]
    score = np.maximum.reduceat(score[order], starts) if len(code) else score[:0]
    row, other = code >> 32, (code & 0xFFFFFFFF).astype(np.int32)
    order = np.lexsort((-score, row))  # stable: equal scores stay in the order of ids
    row, other, score = row[order], other[order], score[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < k
    indices = np.full((n_rows, k), -1, dtype=np.int32)
    scores = np.full((n_rows, k), -np.inf, dtype=np.float32)
    indices[row[kept], rank[kept]] = other[kept]
    scores[row[kept], rank[kept]] = score[kept]
    return indices, scores
