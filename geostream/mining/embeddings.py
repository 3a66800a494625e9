"""Write and read the embeddings of one split as a Zarr group on the store: queries by pair, references by place.

Rows may arrive in any order, because a layout's order on disk is not that of its ids. Only whole Zarr shards are
written, because two writers of the same shard would overwrite each other's rows. So rows wait until their shard is
full, in memory or, where an array takes more than ``HELD_BYTES``, in a temporary file: in the order of a reclustered
layout nearly all rows wait until the end. The mark ``committed`` is set last; without it the group does not exist for a
reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from tempfile import TemporaryFile, gettempdir
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
HELD_BYTES = 256 * 2**20  # of an array, above which rows that wait for their Zarr shard lie in a file


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
        self._query = RowWriter(group, "query", n_pairs, dim)
        self._reference = RowWriter(group, "reference", n_references, dim)

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


class RowWriter:
    """Writer of one array of vectors, Zarr shard by Zarr shard, whose rows may come in any order.

    Args:
        group: The Zarr group that the array is made in.
        name: Name of the array.
        n_rows: Its rows.
        dim: Number of dimensions, D.
    """

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
        self.waiting = _Waiting(n_rows, dim)
        self.missing = np.ones(n_rows, dtype=bool)
        self.left = np.bincount(np.arange(n_rows) // SHARD_ROWS)  # rows that each shard lacks

    def write(self, rows: npt.NDArray[np.integer], vectors: Float32) -> None:
        """Keep the vectors, and write every shard that is complete.

        Args:
            rows: (n,) rows of the array. Each row is written once.
            vectors: (n, D) vectors.

        Raises:
            GeostreamError: A vector is not finite or of another length, or a row was written before.
        """
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.shape != (len(rows), self.dim) or not np.isfinite(vectors).all():
            raise GeostreamError(
                f"{self.name} embeddings: wanted ({len(rows)}, {self.dim}) finite numbers, got {vectors.shape}"
                f"{'' if np.isfinite(vectors).all() else ' with NaN or infinity: the training has diverged'}"
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_rows:
            raise GeostreamError(f"{self.name} embeddings: row {rows.max()} of {self.n_rows}: beyond the last")
        if not self.missing[rows].all() or len(np.unique(rows)) < len(rows):
            raise GeostreamError(f"{self.name} embeddings: rows written twice")
        self.missing[rows] = False
        self.waiting.put(rows, vectors)
        shards, counts = np.unique(rows // SHARD_ROWS, return_counts=True)
        self.left[shards] -= counts
        for shard in shards[self.left[shards] == 0].tolist():
            start = shard * SHARD_ROWS
            block = self.waiting.take(start, min(start + SHARD_ROWS, self.n_rows))
            self.array[start : start + len(block)] = block

    def check_complete(self) -> None:
        """Raise GeostreamError if rows are missing."""
        if missing := np.count_nonzero(self.left):
            raise GeostreamError(f"{self.name} embeddings: rows of {missing} Zarr shards are missing; embed again")


class _Waiting:
    """Rows of an array that wait for the others of their Zarr shard: in memory, or in a file that has no name.

    Args:
        n_rows: Rows of the whole array.
        dim: Its columns.
    """

    def __init__(self, n_rows: int, dim: int) -> None:
        self._row_bytes = 4 * dim
        large = n_rows * self._row_bytes > HELD_BYTES
        self._file = TemporaryFile(prefix="geostream-") if large else None  # noqa: SIM115  # gone with the writer
        self._memory = np.empty((0 if self._file else n_rows, dim), dtype=np.float32)

    def put(self, rows: npt.NDArray[np.integer], vectors: Float32) -> None:
        """Keep some rows."""
        if self._file is None:
            self._memory[rows] = vectors
            return
        order = np.argsort(rows)
        try:
            for run in np.split(order, np.flatnonzero(np.diff(rows[order]) > 1) + 1):
                self._file.seek(int(rows[run[0]]) * self._row_bytes)
                self._file.write(vectors[run].tobytes())
            self._file.flush()
        except OSError as error:
            raise GeostreamError(
                f"{gettempdir()}: cannot keep embeddings until their Zarr shard is full ({error.strerror}); "
                "name a folder with more room: TMPDIR=FOLDER"
            ) from error

    def take(self, start: int, stop: int) -> Float32:
        """Return consecutive rows, all of which were put."""
        if self._file is None:
            return self._memory[start:stop]
        self._file.seek(start * self._row_bytes)
        data = self._file.read((stop - start) * self._row_bytes)
        return np.frombuffer(data, dtype=np.float32).reshape(stop - start, -1)


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
