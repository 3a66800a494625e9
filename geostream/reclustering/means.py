"""Average the embeddings of each place: its tile's vector and the mean of its views' vectors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import zarr

from geostream.arrays import Float32, Int32
from geostream.mining.embeddings import SHARD_ROWS, Embeddings, read_rows


class VectorRows(NamedTuple):
    """Consecutive rows of the queries or references.

    Attributes:
        start: The first row.
        place: (n,) place id of each row, sorted.
    """

    start: int
    place: Int32

    @classmethod
    def within(cls, place: Int32, first: int, last: int) -> VectorRows:
        """Return the rows of the places from ``first`` to ``last``; ``place`` has the place ids of all rows, sorted."""
        start, stop = np.searchsorted(place, [first, last + 1]).tolist()
        return cls(start, place[start:stop])


def place_vectors(embeddings: Embeddings, places: Int32) -> Float32:
    """Average the embeddings of each place; parameters and result as of :func:`mean_vectors`.

    Args:
        embeddings: Embeddings of the training set.
        places: (N,) sorted place ids, each with a training pair.

    Returns:
        (N, D) L2-normalised.
    """
    queries, references = VectorRows(0, embeddings.pairs.place), VectorRows(0, embeddings.reference_place)
    return mean_vectors(embeddings.query, embeddings.reference, queries, references, places)


def mean_vectors(
    query: zarr.Array[Any], reference: zarr.Array[Any], queries: VectorRows, references: VectorRows, places: Int32
) -> Float32:
    """Average the embeddings of some places.

    Embeddings are read SHARD_ROWS rows at a time, so memory holds only the result and two such pieces. A place's vector
    does not depend on which others are asked for.

    Args:
        query: The queries' embeddings.
        reference: The references' embeddings.
        queries: The rows of the queries that may be of these places; all of each place.
        references: The rows of the references, in the same way.
        places: (N,) sorted place ids, each with a query.

    Returns:
        (N, D) L2-normalised.
    """
    mean = np.zeros((len(places), query.shape[1]), dtype=np.float32)
    for array, (first, of), is_query in ((query, queries, True), (reference, references, False)):
        row = np.minimum(np.searchsorted(places, of), len(places) - 1)
        wanted = places[row] == of
        share = np.ones(len(places), dtype=np.float32)
        if is_query:
            share /= np.bincount(row[wanted], minlength=len(places)).astype(np.float32)
        # Pieces end where they would if all rows were read, since sums depend on it.
        ends = [first, *range(first - first % SHARD_ROWS + SHARD_ROWS, first + len(of), SHARD_ROWS), first + len(of)]
        for start, stop in pairwise(ends):
            here = wanted[start - first : stop - first]
            if here.any():
                rows, begins = np.unique(row[start - first : stop - first][here], return_index=True)
                total = np.add.reduceat(read_rows(array, start, stop)[here], begins)
                mean[rows] += total * share[rows, None]
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), np.float32(1e-12))
    return mean
