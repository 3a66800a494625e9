"""Find the most similar tiles of an index: compare with all where it is small, else look into some inverted lists.

Up to ``EXACT_ROWS`` tiles, FAISS compares a photo with every tile. Above, tiles lie in lists by k-means, and a photo is
compared with those of the lists whose centroids are most similar to it. How many lists that are (nprobe) is measured
when the index is made: the fewest that give a recall@5 of ``RECALL`` on photos with two standard errors to spare.

The store holds the vectors once, in Zarr. What FAISS has learnt, its centroids, is a file of its own, and the number of
each tile's list an array in Zarr; from these the lists are filled when an index is opened. Memory holds 4 × D bytes a
tile, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from geostream.arrays import Float32, Int32, Int64

EXACT_ROWS = 50_000
RECALL, RECALL_AT = 0.99, 5  # wanted of an approximate search
TRAINED_ON = 32  # training vectors for each list
ROUNDS = 8  # iterations of k-means
PROBES = (4, 8, 16, 32, 64, 128, 256, 512)  # numbers of lists that are tried


@dataclass(frozen=True)
class TileSearch:
    """The vectors of an index in memory, and how they are searched.

    Attributes:
        place: (N,) place ids of the tiles.
        tiles: FAISS's index of the N vectors, flat or inverted lists.
    """

    place: Int32
    tiles: Any

    def nearest(self, query: Float32, k: int) -> tuple[Int64, Float32]:
        """Find the most similar tiles.

        Args:
            query: (n, D) vectors of length 1.
            k: How many to find for each.

        Returns:
            (n, min(k, N)) place ids and their similarities, best first. Where the lists that are looked into hold
            fewer, the last found is repeated with the score -1.
        """
        scores, rows = self.tiles.search(np.ascontiguousarray(query, dtype=np.float32), min(k, len(self.place)))
        missing = rows < 0
        if missing.any():
            found = np.maximum((~missing).sum(axis=1) - 1, 0)
            rows = np.where(missing, np.maximum(rows[np.arange(len(rows)), found], 0)[:, None], rows)
            scores = np.where(missing, np.float32(-1), scores)
        return self.place[rows].astype(np.int64), scores


def n_lists(tiles: int) -> int:
    """Return how many lists to make of so many tiles: four times their square root, as FAISS's authors advise."""
    return max(1, round(4 * math.sqrt(tiles)))


def train_lists(sample: Float32, lists: int) -> Any:
    """Train the centroids of inverted lists.

    Args:
        sample: (S, D) vectors to train on, at least ``lists``.
        lists: How many lists to make.

    Returns:
        FAISS's index, without vectors.
    """
    dim = sample.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.spherical = ROUNDS, 1, True
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, TRAINED_ON
    index.train(np.ascontiguousarray(sample))
    return index


def fill_lists(index: Any, blocks: Iterable[tuple[Float32, Int32]]) -> Any:
    """Put vectors into the lists that they were assigned to.

    Args:
        index: A trained index without vectors; it is changed.
        blocks: Consecutive blocks of the (N, D) vectors, with the number of each one's list.

    Returns:
        ``index``. The id of each vector is its row.
    """
    start = 0
    for vectors, lists in blocks:
        vectors, numbers = np.ascontiguousarray(vectors), lists.astype(np.int64)
        ids = np.arange(start, start + len(vectors))
        index.add_core(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(numbers))
        start += len(vectors)
    return index


def flat(vectors: Float32) -> Any:
    """Return FAISS's index that compares with all of the (N, D) vectors."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    return index


def choose_nprobe(index: Any, query: Float32, truth: Int64) -> tuple[int, float]:
    """Choose the fewest lists that give the wanted recall, with two standard errors to spare.

    Args:
        index: The filled index; its nprobe is set.
        query: (n, D) vectors to search for.
        truth: (n, RECALL_AT) rows of the vectors that are truly most similar to each.

    Returns:
        The number of lists and their recall; the largest number of ``PROBES``, where no smaller one suffices.
    """
    recall = 0.0
    for nprobe in PROBES:
        index.nprobe = min(nprobe, index.nlist)
        _, found = index.search(np.ascontiguousarray(query), truth.shape[1])
        of_query = (found[:, :, None] == truth[:, None, :]).any(axis=1).mean(axis=1)
        recall = float(of_query.mean())
        if recall - 2 * float(of_query.std()) / len(query) ** 0.5 >= RECALL or nprobe >= index.nlist:
            break
    return int(index.nprobe), recall
