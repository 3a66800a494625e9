"""Make inverted lists of vectors, and choose how many of them a query searches. Pure functions on arrays.

References are cut into partitions, and each partition into lists, both by spherical k-means with a fixed seed. With N
they grow in number, not in size, so the work of a query stays the same. Partitions, and the lists of each, are ordered
so that neighbours are similar.

All queries of one list search the same lists, those of the most similar centroids. So the queries of a list and their
references make one dense matrix product, whereas FAISS's own inverted file searches one query at a time. The number of
lists to search (nprobe) follows from the exact neighbours of a sample of queries: a neighbour is found if and only if
its list is searched, so one pass gives the recall at every nprobe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Float32, Int32, Int64
from geostream.mining.topk import References, most_similar, nearest_of

LIST = 256  # references of a list, about
PARTITION = 16_384  # references of a partition, about; a large one holds a few times as many
TRAINED_ON = 32  # training vectors for each list
PARTITION_TRAINED_ON = 256  # training vectors for each partition
MOST_TRAINED_ON = 65_536  # training vectors at most: 256 MiB at 1024 dimensions
MOST_PROBES = 512  # lists that a query may search
ROUNDS = 8  # iterations of k-means


def n_partitions(references: int) -> int:
    """Return how many partitions to make of so many references."""
    return max(1, round(references / PARTITION))


def n_lists(references: int) -> int:
    """Return how many lists to make of a partition of so many references."""
    return int(np.clip(references // LIST, 1, MOST_TRAINED_ON // TRAINED_ON))


def train(sample: Float32, lists: int, threads: int = 1) -> Float32:
    """Train the centroids of lists or partitions by k-means.

    Args:
        sample: (S, D) vectors to train on.
        lists: How many to make; S at most.
        threads: How many threads work on it.

    Returns:
        (L, D) centroids of length 1, similar ones next to one another.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
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


def nearest_lists(centroids: Float32, start: int, stop: int) -> Int32:
    """Find the lists with the most similar centroids, for some lists.

    Args:
        centroids: (L, D) centroids of length 1.
        start: First of the lists.
        stop: List behind the last.

    Returns:
        (stop - start, M) list numbers, M at most MOST_PROBES; each row begins with the list itself.
    """
    most, own = min(MOST_PROBES, len(centroids)), np.arange(start, stop, dtype=np.int32)
    everything = References(np.arange(len(centroids), dtype=np.int32), centroids)
    nothing = Csr(np.zeros(len(own) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    others = nearest_of(centroids[start:stop], own, nothing, everything, most - 1).other
    return np.concatenate([own[:, None], others], axis=1)


class Nprobe(NamedTuple):
    """The number of lists that a query searches, and its recall on the sample."""

    probes: int
    recall: float
    enough: bool  # whether the recall is the wanted one


def choose_nprobe(near: Int32, own: Int32, lists: Int32, wanted: float) -> Nprobe:
    """Choose the fewest lists whose recall on a sample exceeds the wanted recall by two standard errors.

    Args:
        near: (L, M) as :func:`nearest_lists` returns it.
        own: (S,) list of each sampled query.
        lists: (S, K) list of each of its true neighbours, -1 for none.
        wanted: Recall, 0 to 1.

    Returns:
        The number and its recall; all M lists where fewer do not suffice.
    """
    most, known = near.shape[1], lists >= 0
    place = np.full(lists.shape, most)  # how many lists must be searched before a neighbour's list
    rank = np.empty(len(near), dtype=np.int64)
    for row, number in enumerate(own):
        rank[:] = most
        rank[near[number]] = np.arange(most)
        place[row, known[row]] = rank[lists[row, known[row]]]
    asked = np.maximum(known.sum(axis=1), 1)
    recall = 1.0
    for probes in range(1, most + 1):
        of_query = np.where(known.any(axis=1), (place < probes).sum(axis=1) / asked, 1.0)
        recall = float(of_query.mean())
        if recall - 2 * float(of_query.std()) / np.sqrt(len(own)) >= wanted:
            return Nprobe(probes, recall, True)
    return Nprobe(most, recall, most == len(near))


class Spans(NamedTuple):
    """Rows of several objects, and the lists that they belong to."""

    spans: list[tuple[int, int, int]]  # number of the object, first row in it, row behind the last
    lists: Int32  # numbers of the lists, in the order of the spans
    sizes: Int64  # rows of each of them


@dataclass
class SortedObjects:
    """Where on the store the vectors of each list are: in objects whose rows are sorted by list.

    An object holds lists of one partition. A large partition has several objects, each with a part of every list.

    Attributes:
        first_list: For each object, the number of its first list.
        sizes: For each object, the rows of each of its lists.
    """

    first_list: list[int] = field(default_factory=list)
    sizes: list[Int64] = field(default_factory=list)

    def list_sizes(self, n_lists: int) -> Int64:
        """Return the rows of each of all lists, (n_lists,)."""
        total = np.zeros(n_lists, dtype=np.int64)
        for first, sizes in zip(self.first_list, self.sizes, strict=True):
            total[first : first + len(sizes)] += sizes
        return total

    def parts(self, number: int, most: int) -> list[Spans]:
        """Cut an object into ranges of consecutive lists with at most ``most`` rows, or of one list."""
        ends = np.concatenate([[0], np.cumsum(self.sizes[number])])
        return [
            Spans(
                [(number, int(ends[some[0]]), int(ends[some[-1] + 1]))],
                (self.first_list[number] + some).astype(np.int32),
                self.sizes[number][some],
            )
            for some in split_by_size(self.sizes[number], most)
            if ends[some[0]] < ends[some[-1] + 1]
        ]

    def slices_of(self, wanted: npt.NDArray[np.integer], most: int) -> list[Spans]:
        """Return where the vectors of some lists are, in slices of at most ``most`` rows.

        A single list of one object may have more rows than that.

        Args:
            wanted: Numbers of the lists, sorted.
            most: Rows of a slice.
        """
        slices: list[Spans] = []
        room = 0  # in the last slice
        firsts = np.array(self.first_list, dtype=np.int64)
        begins = np.searchsorted(wanted, firsts)
        stops = np.searchsorted(wanted, firsts + [len(sizes) for sizes in self.sizes])
        for number in np.flatnonzero(begins < stops).tolist():
            first, sizes = self.first_list[number], self.sizes[number]
            ends = np.concatenate([[0], np.cumsum(sizes)])
            here = wanted[begins[number] : stops[number]] - first
            for consecutive in np.split(here, np.flatnonzero(np.diff(here) != 1) + 1):
                for some in split_by_size(sizes[consecutive], most):
                    lists = consecutive[some]
                    span = (number, int(ends[lists[0]]), int(ends[lists[-1] + 1]))
                    rows = span[2] - span[1]
                    if not rows:
                        continue
                    if rows > room or not slices:
                        slices.append(Spans([], np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)))
                        room = most
                    spans, numbers, counts = slices[-1]
                    numbers = np.concatenate([numbers, (first + lists).astype(np.int32)])
                    slices[-1] = Spans([*spans, span], numbers, np.concatenate([counts, sizes[lists]]))
                    room -= rows
        return slices


def pieces_of(
    counts: npt.NDArray[np.integer], starts: npt.NDArray[np.integer], most: int
) -> list[list[tuple[int, int, int]]]:
    """Cut the rows of one partition, which are spread over several objects, into pieces of at most ``most`` rows.

    Args:
        counts: (n,) rows of the partition in each object.
        starts: (n,) the first of them in each object.
        most: Rows of a piece.

    Returns:
        For each piece its spans: number of the object, first row in it, row behind the last.
    """
    pieces: list[list[tuple[int, int, int]]] = []
    room = 0
    for number, (count, start) in enumerate(zip(counts.tolist(), starts.tolist(), strict=True)):
        while count:
            if not room:
                pieces.append([])
                room = most
            taken = min(count, room)
            pieces[-1].append((number, start, start + taken))
            start, count, room = start + taken, count - taken, room - taken
    return pieces


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
