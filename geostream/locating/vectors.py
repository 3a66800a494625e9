"""Read stored vectors one Zarr shard at a time, so that memory does not grow with the gallery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr

from geostream.arrays import Float32, Int64
from geostream.mining.embeddings import SHARD_ROWS, read_rows


def blocks(vectors: zarr.Array[Any]) -> Iterator[tuple[int, Float32]]:
    """Yield consecutive rows of an array, each block with the number of its first row.

    Args:
        vectors: (N, D) stored vectors.
    """
    for start in range(0, vectors.shape[0], SHARD_ROWS):
        yield start, read_rows(vectors, start, start + SHARD_ROWS)


def picked(vectors: zarr.Array[Any], rows: Int64) -> Float32:
    """Read some rows of an array.

    Args:
        vectors: (N, D) stored vectors.
        rows: (n,) row numbers, sorted.

    Returns:
        (n, D) vectors.
    """
    parts = []
    for start, block in blocks(vectors):
        first, last = np.searchsorted(rows, [start, start + len(block)])
        parts.append(block[rows[first:last] - start])
    return np.concatenate(parts)
