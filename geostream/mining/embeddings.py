"""Embeddings of one split as a Zarr group on the store: queries by pair, references by place.

Rows may arrive in any order (a layout's order on disk is not that of its ids), but two writers of one Zarr shard lose
each other's regions without a word, so nothing smaller than a whole shard is ever written: rows wait in memory until
theirs is full. Rows that come in order cost one shard of memory, rows in no order at all cost the array. The mark
``committed`` is set last; without it the group does not exist for a reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr

from geostream.arrays import Float32, Int32, Int64, Pairs
from geostream.errors import BadInput, GeostreamError
from geostream.layout import Layout
from geostream.layout.zarr_groups import array_of, being_replaced, commit, new_group, open_committed
from geostream.store import Store

SHARD_ROWS = 4096  # rows of a Zarr shard, one object: 16 MiB at 1024 dimensions
CHUNK_ROWS = 512  # rows that can be read alone


@dataclass(frozen=True)
class Embeddings:
    """Committed embeddings, opened. The vectors stay on the store until they are asked for."""

    run: Store
    name: str
    layout_id: str  # the generation they were read from
    places_id: str
    checkpoint: str  # the checkpoint they came from
    split: str
    pairs: Pairs  # rows of ``query``
    reference_place: Int32  # (R,) rows of ``reference``, sorted
    query: zarr.Array[Any]  # (P, D) float32, L2-normalised
    reference: zarr.Array[Any]  # (R, D) float32, L2-normalised

    @property
    def dim(self) -> int:
        return int(self.query.shape[1])


def read_rows(array: zarr.Array[Any], start: int = 0, stop: int | None = None) -> Float32:
    """Rows ``start`` to ``stop`` of an array of embeddings."""
    return cast("Float32", array[start:stop])


def pick_rows(array: zarr.Array[Any], rows: Int64) -> Float32:
    """The rows with these numbers, sorted and distinct."""
    return cast("Float32", array.get_orthogonal_selection((rows, slice(None))))


ARRAYS = ("query", "reference", "pair_place", "pair_view", "reference_place")


class EmbeddingWriter:
    """Embeddings being written; made by :func:`create_embeddings`. Not to be shared between threads."""

    def __init__(self, group: zarr.Group, n_pairs: int, n_references: int, dim: int) -> None:
        self._group = group
        self._query = _Rows(group, "query", n_pairs, dim)
        self._reference = _Rows(group, "reference", n_references, dim)

    def write_query(self, rows: npt.NDArray[np.integer], vectors: Float32) -> None:
        """Vectors (n, D) of the pairs ``rows`` (pair ids of the split), each row once."""
        self._query.write(rows, vectors)

    def write_reference(self, rows: npt.NDArray[np.integer], vectors: Float32) -> None:
        """Vectors (n, D) of the reference rows ``rows``, each row once."""
        self._reference.write(rows, vectors)

    def commit(self) -> None:
        """Set the mark. Raises GeostreamError where rows are missing."""
        for array in (self._query, self._reference):
            array.check_complete()
        commit(self._group)


class _Rows:
    """One array, written shard by shard."""

    def __init__(self, group: zarr.Group, name: str, n_rows: int, dim: int) -> None:
        self.name, self.n_rows, self.dim = name, n_rows, dim
        self.array = group.create_array(
            name,
            shape=(n_rows, dim),
            dtype="float32",
            chunks=(CHUNK_ROWS, dim),
            shards=(SHARD_ROWS, dim),
            compressors=None,  # noise-like numbers: nothing to gain
        )
        self.waiting: dict[int, Float32] = {}  # shards begun
        self.missing: dict[int, npt.NDArray[np.bool_]] = {}  # which of their rows have not come
        self.done: set[int] = set()

    def write(self, rows: npt.NDArray[np.integer], vectors: Float32) -> None:
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.shape != (len(rows), self.dim) or not np.isfinite(vectors).all():
            raise GeostreamError(
                f"{self.name} embeddings: wanted ({len(rows)}, {self.dim}) finite numbers, got {vectors.shape}"
                f"{'' if np.isfinite(vectors).all() else ' with NaN or infinity: the training has diverged'}"
            )
        for shard in np.unique(rows // SHARD_ROWS).tolist():
            here = rows // SHARD_ROWS == shard
            start = shard * SHARD_ROWS
            if shard not in self.waiting:
                size = min(SHARD_ROWS, self.n_rows - start)
                if shard in self.done or size <= 0:
                    raise GeostreamError(f"{self.name} embeddings: rows written twice, or beyond the last")
                self.waiting[shard] = np.empty((size, self.dim), dtype=np.float32)
                self.missing[shard] = np.ones(size, dtype=bool)
            at = rows[here] - start
            if not self.missing[shard][at].all():
                raise GeostreamError(f"{self.name} embeddings: rows written twice")
            self.waiting[shard][at] = vectors[here]
            self.missing[shard][at] = False
            if not self.missing[shard].any():
                block = self.waiting.pop(shard)
                self.array[start : start + len(block)] = block
                self.done.add(shard)

    def check_complete(self) -> None:
        missing = -(-self.n_rows // SHARD_ROWS) - len(self.done)
        if missing:
            raise GeostreamError(f"{self.name} embeddings: rows of {missing} Zarr shards are missing; embed again")


def create_embeddings(
    run: Store,
    name: str,
    *,
    layout: Layout,
    checkpoint: str,
    split: str,
    pairs: Pairs,
    reference_place: Int32,
    dim: int,
) -> EmbeddingWriter:
    """Begin to write embeddings at ``name`` in the run; those that were there are removed.

    Rows of the queries are ``pairs`` (sorted by place and view, as :meth:`Layout.pairs` gives them), rows of the
    references the places ``reference_place``, sorted.
    """
    if len(pairs) == 0 or len(reference_place) == 0:
        raise BadInput(f"nothing to embed: split {split!r} of layout {layout.name} has no pairs")
    if (np.diff(pairs.place) < 0).any() or (np.diff(reference_place) <= 0).any():
        raise GeostreamError("embeddings: pairs and reference places must be sorted")
    group = new_group(run, name, layout, ARRAYS)
    group.attrs.update({"checkpoint": checkpoint, "split": split})
    group.create_array("pair_place", data=pairs.place)
    group.create_array("pair_view", data=pairs.view)
    group.create_array("reference_place", data=reference_place)
    return EmbeddingWriter(group, len(pairs), len(reference_place), dim)


def open_embeddings(run: Store, name: str, layout: Layout | None) -> Embeddings:
    """Committed embeddings of ``layout``; raises as :func:`open_committed` does."""
    again = "embed again: geostream embed"
    group = open_committed(run, name, layout, again)
    with being_replaced(f"{run.url}/{name}", again):
        return Embeddings(
            run=run,
            name=name,
            layout_id=str(group.attrs["layout"]),
            places_id=str(group.attrs["places"]),
            checkpoint=str(group.attrs["checkpoint"]),
            split=str(group.attrs["split"]),
            pairs=Pairs(array_of(group, "pair_place"), array_of(group, "pair_view")),
            reference_place=array_of(group, "reference_place"),
            query=cast("zarr.Array[Any]", group["query"]),
            reference=cast("zarr.Array[Any]", group["reference"]),
        )
