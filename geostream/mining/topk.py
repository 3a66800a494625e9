"""The K most similar of one block of references, and how the finds of several blocks and views become one list.

FAISS's flat search does the work. It holds one block of the matrix product at a time in cache and keeps only what beats
a row's K-th best so far, so it costs little more than the product alone. FAISS 1.15 leaves the matrix product below
about 400 queries and is then 2.5 times slower, so it is told not to. With a GPU the search runs there, one block at a
time. Measurements: docs/notes/mining.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

from geostream.arrays import Csr, Float32, Int32, Int64, take

GPU_MOST = 2048  # what FAISS finds at once on a GPU
SLICE = 2048  # queries
_gpu_in_use = Lock()


@dataclass(frozen=True)
class Found:
    """For each of n rows its best so far, best first: equal scores by id, -1 and -inf where there are no more."""

    other: Int32  # (n, K) ids
    score: Float32  # (n, K) cosines


@cache
def _gpu() -> Any:
    import faiss

    return faiss.StandardGpuResources()


@dataclass(frozen=True)
class References:
    """A block of references, with their ids."""

    ids: Int32  # (R,)
    vectors: Float32  # (R, D) L2-normalised


def most_similar(query: Float32, references: References, k: int) -> Found:
    """(Q, min(k, R)) most similar references. ``query`` (Q, D) L2-normalised.

    Where several references are exactly as similar as the k-th, any of them may be left out.
    """
    query, ids = np.ascontiguousarray(query), references.ids
    k = min(k, len(ids))
    score, at = _flat(query, references.vectors, k)
    return in_order(ids[at], score)


def _flat(query: Float32, vectors: Float32, k: int) -> tuple[Float32, Int64]:
    """(Q, k) scores and rows of the most similar vectors, by FAISS."""
    import faiss

    faiss.omp_set_num_threads(1)  # of this thread: Dask has as many task threads as cores
    faiss.cvar.distance_compute_blas_threshold = 20
    vectors = np.ascontiguousarray(vectors)
    if faiss.get_num_gpus() > 0 and k <= GPU_MOST:
        with _gpu_in_use:
            return faiss.knn_gpu(_gpu(), query, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    return faiss.knn(query, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)


def nearest_of(query: Float32, own: Int32, excluded: Csr, references: References, k: int) -> Found:
    """(Q, k) most similar references of each query that are neighbours; arguments as of the functions it joins."""
    enough = k + 1 + int(np.diff(excluded.indptr).max(initial=0))
    best = nothing(len(query), k)
    for some in _slices(len(query)):
        found = most_similar(query[some], references, enough)
        found = strike_out(found, own[some], take(excluded, np.arange(len(query))[some]), k)
        best.other[some], best.score[some] = found.other, found.score
    return best


def _slices(n: int) -> Iterator[slice]:
    """Rows that are worked on at once: what is in between takes several times the memory of the result."""
    return (slice(start, min(start + SLICE, n)) for start in range(0, n, SLICE))


def in_order(other: Int32, score: Float32) -> Found:
    """Rows sorted by score already: where scores are equal, by id, too."""
    tied = ((score[:, 1:] == score[:, :-1]) & (other[:, 1:] >= 0)).any(axis=1)
    if tied.any():
        order = np.lexsort((other[tied], -score[tied]), axis=1)
        other[tied] = np.take_along_axis(other[tied], order, axis=1)
        score[tied] = np.take_along_axis(score[tied], order, axis=1)
    return Found(other, score)


def strike_out(found: Found, own: Int32, excluded: Csr, k: int) -> Found:
    """(n, k): without the ids that are no neighbours of row i: ``own[i]`` (n,) and the i-th list of ``excluded``."""
    row = np.broadcast_to(np.arange(len(own))[:, None], found.other.shape)
    valid = found.other != own[:, None]
    lengths = np.diff(excluded.indptr)
    table = np.full((len(own), int(lengths.max(initial=0))), -1, dtype=np.int32)
    table[np.arange(table.shape[1]) < lengths[:, None]] = excluded.indices
    for column in table.T:  # lists are short: a tenth of the time of a search in them
        valid &= found.other != column[:, None]
    rank = np.cumsum(valid, axis=1) - 1
    valid &= rank < k
    left = nothing(len(own), k)
    left.other[row[valid], rank[valid]] = found.other[valid]
    left.score[row[valid], rank[valid]] = found.score[valid]
    return left


def nothing(n: int, k: int) -> Found:
    """``n`` rows without a find."""
    return Found(np.full((n, k), -1, dtype=np.int32), np.full((n, k), -np.inf, dtype=np.float32))


def merge(one: Found, two: Found) -> Found:
    """(n, K): the best of both. No id is in both."""
    best = nothing(*one.other.shape)
    for some in _slices(len(one.other)):
        other = np.concatenate([one.other[some], two.other[some]], axis=1)
        score = np.concatenate([one.score[some], two.score[some]], axis=1)
        order = np.argsort(-score, axis=1, kind="stable")[:, : best.other.shape[1]]
        found = in_order(np.take_along_axis(other, order, axis=1), np.take_along_axis(score, order, axis=1))
        best.other[some], best.score[some] = found.other, found.score
    return best


def of_places(row: Int64, found: Found, n_rows: int) -> Found:
    """(n_rows, K) from the finds of all views: view i is one of row ``row[i]`` (V,).

    A place's similarity to another is that of its most similar view, so its best K are among its views' best K.
    """
    k = found.other.shape[1]
    if len(row) == n_rows and (np.bincount(row, minlength=n_rows) == 1).all():
        at = np.argsort(row)
        return found if (np.diff(row) > 0).all() else Found(found.other[at], found.score[at])
    valid = found.other >= 0
    repeated = np.broadcast_to(row[:, None], valid.shape)
    return Found(*merge_views(repeated[valid], found.other[valid], found.score[valid], n_rows, k))


def merge_views(row: Int64, other: Int32, score: Float32, n_rows: int, k: int) -> tuple[Int32, Float32]:
    """(n_rows, k) neighbours and (n_rows, k) scores from the finds of all views of each row, hardest first.

    ``row``, ``other``, ``score``: one find each; the same find of several views counts with its best score, equal
    scores are ordered by id.
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
