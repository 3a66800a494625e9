"""Make inverted lists of vectors, and choose how many of them a query searches. Pure functions on arrays.

Lists are the cells of a spherical k-means, trained with a fixed seed on a sample of the references. They are ordered so
that neighbouring lists are similar. All queries of one list search the same lists, those of the most similar centroids.
So the queries of a list and their references make one dense matrix product, whereas FAISS's own inverted file searches
one query at a time. The number of lists to search (nprobe) follows from the exact neighbours of a sample of queries: a
neighbour is found if and only if its list is searched, so one pass gives the recall at every nprobe.
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

LIST = 256  # references of a list, about; a constant, so that the work of a query does not grow with N
MOST_LISTS = 2048  # more would make k-means slow; from half a million references on, lists grow instead
TRAINED_ON = 32  # training vectors for each list; 65,536 at most, 256 MiB at 1024 dimensions
ROUNDS = 8  # iterations of k-means


def n_lists(references: int) -> int:
    """Return how many lists to make for so many references."""
    return int(np.clip(references // LIST, 1, MOST_LISTS))


def train(sample: Float32, lists: int) -> Float32:
    """Train the centroids of lists by k-means, on all cores.

    Args:
        sample: (S, D) vectors to train on.
        lists: How many lists to make; S at most.

    Returns:
        (L, D) centroids of length 1, similar ones next to one another.
    """
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
    """Order centroids so that each is followed by the most similar one that is not yet in the order.

    Args:
        centroids: (L, D) centroids of length 1.

    Returns:
        (L,) their numbers, beginning with 0.
    """
    left = np.ones(len(centroids), dtype=bool)
    order = np.zeros(len(centroids), dtype=np.int64)
    for at in range(1, len(centroids)):
        left[order[at - 1]] = False
        order[at] = np.argmax(np.where(left, centroids @ centroids[order[at - 1]], -np.inf))
    return order


def assign(vectors: Float32, centroids: Float32) -> Int32:
    """Assign vectors to lists by their most similar centroid.

    Args:
        vectors: (n, D) vectors.
        centroids: (L, D) centroids.

    Returns:
        (n,) list numbers.
    """
    return most_similar(vectors, References(np.arange(len(centroids), dtype=np.int32), centroids), 1).other[:, 0]


def centroid_order(centroids: Float32) -> Int32:
    """Order all lists, for each list, by the similarity of their centroids.

    Args:
        centroids: (L, D) centroids.

    Returns:
        (L, L) list numbers; each row begins with the list itself.
    """
    similar = centroids @ centroids.T
    np.fill_diagonal(similar, np.inf)
    return np.argsort(-similar, axis=1, kind="stable").astype(np.int32)


class Nprobe(NamedTuple):
    """The number of lists that a query searches, and its recall on the sample."""

    probes: int
    recall: float


def choose_nprobe(near: Int32, own: Int32, lists: Int32, wanted: float) -> Nprobe:
    """Choose the fewest lists whose recall on a sample exceeds the wanted recall by two standard errors.

    Args:
        near: (L, L) as :func:`centroid_order` returns it.
        own: (S,) list of each sampled query.
        lists: (S, K) list of each of its true neighbours, -1 for none.
        wanted: Recall, 0 to 1.

    Returns:
        The number and its recall; all L lists where fewer do not suffice.
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
    """The position of some vectors in the runs of a :class:`SortedRuns`."""

    spans: list[tuple[int, int, int]]  # number of the run, first row in it, row behind the last
    rows: Int64  # (n,) rows of the embeddings, in the order of the spans
    lists: Int32  # (n,) their lists


class SortedRuns:
    """An index of vectors that were sorted by list, block by block.

    A run is one block of vectors in the order of their lists, so some lists are a few spans of each run. ``sizes`` (L,)
    counts the vectors of each list.

    Args:
        lists: For each block, the list of every row; -1 for rows that are left out.
        starts: First row of each block.
        n: Number of lists, L.
    """

    def __init__(self, lists: list[Int32], starts: list[int], n: int) -> None:
        self.lists = np.concatenate(lists)
        self.sizes: npt.NDArray[np.intp] = np.bincount(self.lists[self.lists >= 0], minlength=n)
        self._order = [run_order(of_block) for of_block in lists]
        self._ends = [np.searchsorted(of[at], np.arange(n + 1)) for of, at in zip(lists, self._order, strict=True)]
        self._starts = starts

    def slice_of(self, wanted: npt.NDArray[np.integer]) -> RunSlice:
        """Return the position of the vectors of some lists.

        Args:
            wanted: Numbers of the lists, sorted.
        """
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
    """Sort the rows of a block by list.

    Args:
        lists: (n,) list of each row; -1 for rows that are left out.

    Returns:
        Row numbers in the order of their lists.
    """
    order = np.argsort(lists, kind="stable")
    return order[np.searchsorted(lists[order], 0) :]


def split_by_size(sizes: npt.NDArray[np.integer], most: int) -> list[npt.NDArray[np.intp]]:
    """Split n items into consecutive ranges whose sizes add up to at most ``most``, or that have one item only.

    Args:
        sizes: (n,) size of each item.
        most: Largest size of a range.

    Returns:
        The numbers of the items in each range.
    """
    total = np.concatenate([[0], np.cumsum(sizes)])
    ends = [0]
    while ends[-1] < len(sizes):
        ends.append(max(ends[-1] + 1, int(np.searchsorted(total, total[ends[-1]] + most, side="right")) - 1))
    return [np.arange(a, b) for a, b in pairwise(ends)]
