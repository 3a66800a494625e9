"""Write and read the embeddings of one split as a Zarr group on the store: queries by pair, references by place.

Rows may arrive in any order, because a layout's order on disk is not that of its ids. Only whole Zarr shards are
written, because two writers of the same shard would overwrite each other's rows. So rows wait in memory until their
shard is full. That is one shard if rows come in order, and up to the whole array if they come in random order. The mark
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
    """Committed embeddings, opened. The vectors stay on the store until they are read."""

    run: Store
    name: str
    layout_id: str  # the generation whose images were embedded
    places_id: str
    checkpoint: str  # name of the checkpoint that the weights are from
    split: str
    pairs: Pairs  # the P rows of ``query``
    reference_place: Int32  # (R,) place ids of the rows of ``reference``, sorted
    query: zarr.Array[Any]  # (P, D) float32, L2-normalised
    reference: zarr.Array[Any]  # (R, D) float32, L2-normalised

    @property
    def dim(self) -> int:
        """Number of dimensions, D."""
        return int(self.query.shape[1])


def read_rows(array: zarr.Array[Any], start: int = 0, stop: int | None = None) -> Float32:
    """Read consecutive rows of an array of embeddings.

    Args:
        array: ``query`` or ``reference``.
        start: First row.
        stop: Row behind the last; None reads to the end.

    Returns:
        (n, D) vectors.
    """
    return cast("Float32", array[start:stop])


def pick_rows(array: zarr.Array[Any], rows: Int64) -> Float32:
    """Read some rows of an array of embeddings.

    Args:
        array: ``query`` or ``reference``.
        rows: (n,) row numbers, sorted and distinct.

    Returns:
        (n, D) vectors.
    """
    return cast("Float32", array.get_orthogonal_selection((rows, slice(None))))


ARRAYS = ("query", "reference", "pair_place", "pair_view", "reference_place")


class EmbeddingWriter:
    """Writer of embeddings, made by :func:`create_embeddings`. Threads must not share it."""

    def __init__(self, group: zarr.Group, n_pairs: int, n_references: int, dim: int) -> None:
        self._group = group
        self._query = _Rows(group, "query", n_pairs, dim)
        self._reference = _Rows(group, "reference", n_references, dim)

    def write_query(self, rows: npt.NDArray[np.integer], vectors: Float32) -> None:
        """Write the vectors of some queries. Each row is written once.

        Args:
            rows: (n,) pair ids of the split.
            vectors: (n, D) vectors.

        Raises:
            GeostreamError: A vector is not finite or of another length, or a row was written before.
        """
        self._query.write(rows, vectors)

    def write_reference(self, rows: npt.NDArray[np.integer], vectors: Float32) -> None:
        """Write the vectors of some references. Each row is written once.

        Args:
            rows: (n,) rows of ``reference_place``.
            vectors: (n, D) vectors.

        Raises:
            GeostreamError: A vector is not finite or of another length, or a row was written before.
        """
        self._reference.write(rows, vectors)

    def commit(self) -> None:
        """Commit the embeddings.

        Raises:
            GeostreamError: Rows are missing.
        """
        for array in (self._query, self._reference):
            array.check_complete()
        commit(self._group)


class _Rows:
    """Writer of one array, shard by shard."""

    def __init__(self, group: zarr.Group, name: str, n_rows: int, dim: int) -> None:
        self.name, self.n_rows, self.dim = name, n_rows, dim
        self.array = group.create_array(
            name,
            shape=(n_rows, dim),
            dtype="float32",
            chunks=(CHUNK_ROWS, dim),
            shards=(SHARD_ROWS, dim),
            compressors=None,  # the numbers are like noise and do not compress
        )
        self.waiting: dict[int, Float32] = {}  # shards that have some of their rows
        self.missing: dict[int, npt.NDArray[np.bool_]] = {}  # which of their rows are missing
        self.done: set[int] = set()

    def write(self, rows: npt.NDArray[np.integer], vectors: Float32) -> None:
        """Keep the vectors, and write every shard that is complete."""
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
        """Raise GeostreamError if rows are missing."""
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
    """Begin to write embeddings. Older ones at the same path are removed.

    Args:
        run: The run's folder.
        name: Path of the embeddings within the run.
        layout: The layout whose images are embedded.
        checkpoint: Name of the checkpoint that the weights are from.
        split: The split whose pairs are embedded.
        pairs: The queries, sorted by place and view, as :meth:`Layout.pairs` returns them.
        reference_place: (R,) place ids of the references, sorted.
        dim: Number of dimensions, D.

    Raises:
        BadInput: The split has no pairs.
        GeostreamError: Pairs or references are not sorted.
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
    """Open committed embeddings.

    Args:
        run: The run's folder.
        name: Path of the embeddings within the run.
        layout: The layout whose places they must be of; None allows any.

    Raises:
        NotFound: There are none at ``name``, or they were never finished.
        StaleArtefact: They are of other places.
    """
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
