"""Make inverted lists of vectors, and choose how many of them a query searches. Pure functions on arrays.

Lists are the cells of a spherical k-means with a fixed seed on a sample of the references, ordered so that neighbouring
lists are alike. All queries of one list search the same lists, those of the most similar centroids. So a list of
queries against its references is one dense block for the matrix product; FAISS's own inverted file takes one query at a
time. The number of lists to search (nprobe) follows from the exact neighbours of a sample of queries: a neighbour is
found if and only if its list is searched, so one pass gives the recall at every nprobe.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from joblib import cpu_count

from geostream.arrays import Float32, Int32, Int64
from geostream.mining.topk import References, most_similar

LIST = 256  # references of a list, about; constant, so that the work of a query does not grow with N
MOST_LISTS = 2048  # from half a million references on lists grow instead: k-means would take too long
TRAINED_ON = 32  # vectors a list; 65,536 at most: 256 MiB at 1024 dimensions
ROUNDS = 8  # of k-means


def n_lists(references: int) -> int:
    """Return how many lists to make for so many references."""
    return int(np.clip(references // LIST, 1, MOST_LISTS))


def train(sample: Float32, lists: int) -> Float32:
    """Train (L, D) unit centroids on ``sample`` (S, D), alike ones next to one another, on all cores."""
    import faiss

    faiss.omp_set_num_threads(cpu_count())
    lists = min(lists, len(sample))
    means = faiss.Kmeans(
        sample.shape[1], lists, niter=ROUNDS, seed=1, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )  # fmt: skip
    means.train(np.ascontiguousarray(sample))
    centroids = np.asarray(means.centroids, dtype=np.float32)
    return centroids[chain_order(centroids)]


def chain_order(centroids: Float32) -> Int64:
    """Return an order of the centroids: from the first always on to the most similar one not yet in it."""
    left = np.ones(len(centroids), dtype=bool)
    order = np.zeros(len(centroids), dtype=np.int64)
    for at in range(1, len(centroids)):
        left[order[at - 1]] = False
        order[at] = np.argmax(np.where(left, centroids @ centroids[order[at - 1]], -np.inf))
    return order


def assign(vectors: Float32, centroids: Float32) -> Int32:
    """Return (n,) the number of each vector's list."""
    return most_similar(vectors, References(np.arange(len(centroids), dtype=np.int32), centroids), 1).other[:, 0]


def centroid_order(centroids: Float32) -> Int32:
    """Return (L, L): for each list all lists by the similarity of their centroids, itself first."""
    similar = centroids @ centroids.T
    np.fill_diagonal(similar, np.inf)
    return np.argsort(-similar, axis=1, kind="stable").astype(np.int32)


class Nprobe(NamedTuple):
    """How many lists a query searches, and the recall of that on the sample."""

    probes: int
    recall: float


def choose_nprobe(near: Int32, own: Int32, lists: Int32, wanted: float) -> Nprobe:
    """Return the fewest lists whose recall on a sample is the wanted one, with two standard errors to spare.

    Args:
        near: (L, L) as :func:`centroid_order` gives it.
        own: (S,) list of each sampled query.
        lists: (S, K) list of each of its true neighbours, -1 for none.
        wanted: Recall, 0 to 1.
    """
    rank = np.empty_like(near)
    np.put_along_axis(rank, near, np.broadcast_to(np.arange(len(near), dtype=np.int32), near.shape), axis=1)
    known = lists >= 0
    place = np.where(known, rank[own[:, None], lists], len(near))  # how many lists must be searched before its list
    asked = np.maximum(known.sum(axis=1), 1)
    recall = 1.0
    for probes in range(1, len(near) + 1):
        of_query = np.where(known.any(axis=1), (place < probes).sum(axis=1) / asked, 1.0)
        recall = float(of_query.mean())
        if recall - 2 * float(of_query.std()) / np.sqrt(len(own)) >= wanted:
            return Nprobe(probes, recall)
    return Nprobe(len(near), recall)


@dataclass(frozen=True)
class RunSlice:
    """Some of the vectors of a :class:`SortedRuns`, as spans of its runs."""

    spans: list[tuple[int, int, int]]  # run, first row in it, row behind the last
    rows: Int64  # (n,) which rows of the embeddings these are, in the order of the spans
    lists: Int32  # (n,) their lists


class SortedRuns:
    """Know where vectors lie that were sorted by list, block by block: any lists are few spans of each run.

    A run is one block of vectors in the order of their lists. ``sizes`` (L,) counts the vectors of each list.
    """

    def __init__(self, lists: list[Int32], starts: list[int], n: int) -> None:
        """Index the runs.

        Args:
            lists: For each block the list of every row, -1 for rows that are left out.
            starts: First row of each block.
            n: Number of lists.
        """
        self.lists = np.concatenate(lists)
        self.sizes: npt.NDArray[np.intp] = np.bincount(self.lists[self.lists >= 0], minlength=n)
        self._order = [run_order(of_block) for of_block in lists]
        self._ends = [np.searchsorted(of[at], np.arange(n + 1)) for of, at in zip(lists, self._order, strict=True)]
        self._starts = starts

    def slice_of(self, wanted: npt.NDArray[np.integer]) -> RunSlice:
        """Return where the vectors of the lists ``wanted`` (sorted) lie."""
        gap = np.flatnonzero(np.diff(wanted) != 1) + 1
        spans, rows = [], [np.zeros(0, dtype=np.int64)]
        for run, (order, ends, start) in enumerate(zip(self._order, self._ends, self._starts, strict=True)):
            for consecutive in np.split(wanted, gap):
                first, last = int(ends[consecutive[0]]), int(ends[consecutive[-1] + 1])
                if first < last:
                    spans.append((run, first, last))
                    rows.append(start + order[first:last])
        together = np.concatenate(rows)
        return RunSlice(spans, together, self.lists[together])


def run_order(lists: Int32) -> Int64:
    """Return the rows of a block in the order of their lists, without those of list -1."""
    order = np.argsort(lists, kind="stable")
    return order[np.searchsorted(lists[order], 0) :]


def split_by_size(sizes: npt.NDArray[np.integer], most: int) -> list[npt.NDArray[np.intp]]:
    """Split the numbers 0 … n-1 into ranges whose sizes sum up to at most ``most``, or of one number."""
    total = np.concatenate([[0], np.cumsum(sizes)])
    ends = [0]
    while ends[-1] < len(sizes):
        ends.append(max(ends[-1] + 1, int(np.searchsorted(total, total[ends[-1]] + most, side="right")) - 1))
    return [np.arange(a, b) for a, b in pairwise(ends)]
