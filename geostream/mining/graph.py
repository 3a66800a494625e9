"""Write and read neighbour graphs on the store: for each training place its K hardest others.

Rows are the places with training pairs, in the order of their ids. Entries are place ids, so a graph is valid for every
generation of a layout. Workers write whole Zarr shards in any order. An opened graph holds the ids of its places, 4
bytes a place. The entries stay on the store, 6 bytes each before compression, until rows or all of them are read: 30 MB
for VIGOR at K = 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from geostream.arrays import Int32
from geostream.layout import Layout
from geostream.layout.zarr_groups import array_of, being_replaced, commit, new_group, open_committed
from geostream.store import Store

Kind = Literal["gps", "visual"]
AGAIN = "make it again: geostream mine"
#: Rows of a Zarr shard of a graph. Only whole shards may be written.
SHARD_ROWS = 2048


@dataclass(frozen=True)
class NeighbourGraph:
    """A committed graph, opened."""

    run: Store
    name: str  # its path within the run
    kind: Kind
    layout_id: str  # the generation it was mined on
    places_id: str
    embeddings: str  # path of the embeddings it came from, "" for gps
    # mode: exact or approximate; because: why the search fell back to exact. An approximate search has also recall
    # (measured), wanted (recall), probes, lists, sample (queries measured) and share (of the references, searched).
    # Where likely false negatives were dropped: positive_margin, searched (candidates of each place), dropped
    # (candidates), touched (places that lost any), short (whose list is shorter for it) and empty (whose list is).
    search: dict[str, Any]
    places: Int32  # (N,) place ids, sorted
    stored: Mapping[str, Any]  # the arrays ``indices`` and ``scores``; rows of them can be read alone

    @property
    def k(self) -> int:
        """Number of neighbours of each place, K."""
        return int(self.stored["indices"].shape[1])

    @property
    def n_bytes(self) -> int:
        """Bytes of ``indices`` in memory."""
        return 4 * len(self.places) * self.k

    @cached_property
    def indices(self) -> Int32:
        """(N, K) place ids, hardest first, -1 where there are no more; read as a whole, and kept."""
        return cast("Int32", self.read("indices"))

    @cached_property
    def scores(self) -> npt.NDArray[np.float16]:
        """(N, K) cosine (visual) or minus metres (gps); -inf where there are no more; read as a whole, and kept."""
        return self.read("scores")

    def read(self, array: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Read consecutive rows.

        Args:
            array: "indices" or "scores".
            start: The first row.
            stop: The row behind the last; None reads to the end.

        Returns:
            (n, K) entries.

        Raises:
            NotFound: Another process makes the graph again.
        """
        with being_replaced(f"{self.run.url}/{self.name}", AGAIN):
            return np.asarray(self.stored[array][start:stop])

    def rows(self, nearest: int | None = None) -> Int32:
        """Return the neighbours as rows of ``places``.

        Args:
            nearest: How many neighbours of each place; None returns all K.

        Returns:
            (N, K) rows, -1 where there are no more neighbours.
        """
        row = np.full(int(self.places[-1]) + 2, -1, dtype=np.int32)  # the last entry is for the id -1, no neighbour
        row[self.places] = np.arange(len(self.places), dtype=np.int32)
        return row[self.indices[:, :nearest]]


class GraphWriter:
    """Writer of a graph. Several workers may each have one, for different Zarr shards.

    Args:
        group: The graph's Zarr group, with its arrays.
    """

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self._indices = cast("zarr.Array[Any]", group["indices"])
        self._scores = cast("zarr.Array[Any]", group["scores"])

    @classmethod
    def create(
        cls, run: Store, name: str, *, kind: Kind, layout: Layout, embeddings: str, places: Int32, k: int
    ) -> GraphWriter:
        """Begin a graph. An older one at the same path is removed.

        Args:
            run: The run's folder.
            name: Path of the graph within the run.
            kind: "gps" or "visual".
            layout: The layout whose places are the rows.
            embeddings: Path of the embeddings that the graph comes from, "" for gps.
            places: (N,) place ids, sorted, one for each row.
            k: Neighbours of each place.
        """
        group = new_group(run, name, layout, ("places", "indices", "scores"))
        group.attrs.update({"kind": kind, "embeddings": embeddings})
        group.create_array("places", data=places)
        for array, dtype, nothing in (("indices", "int32", -1), ("scores", "float16", -np.inf)):
            group.create_array(
                array,
                shape=(len(places), k),
                dtype=dtype,
                chunks=(SHARD_ROWS // 4, k),
                shards=(SHARD_ROWS, k),
                fill_value=nothing,
                # Shuffling puts the numbers' upper bytes together, which are nearly all the same.
                compressors=BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
            )
        return cls(group)

    @classmethod
    def reopen(cls, run: Store, name: str) -> GraphWriter:
        """Open a graph that was begun, for another worker.

        Args:
            run: The run's folder.
            name: Path of the graph within the run.
        """
        return cls(zarr.open_group(run.zarr(name), mode="r+"))

    def write(self, start: int, indices: Int32, scores: npt.NDArray[np.floating[Any]]) -> None:
        """Write some rows: whole Zarr shards, of which only the graph's last one may be shorter.

        Args:
            start: First row, at the beginning of a Zarr shard.
            indices: (n, K) place ids, -1 where there are no more.
            scores: (n, K) cosines or minus metres, -inf where there are no more.

        Raises:
            ValueError: The rows are not whole shards.
        """
        stop = start + len(indices)
        if start % SHARD_ROWS or (stop % SHARD_ROWS and stop != self._indices.shape[0]):
            raise ValueError(f"rows {start} to {stop} are not whole Zarr shards of {SHARD_ROWS} rows")
        self._indices[start:stop] = indices
        self._scores[start:stop] = as_scores(scores)

    def commit(self, search: dict[str, Any]) -> None:
        """Commit the graph.

        Args:
            search: How it was searched, as in :class:`NeighbourGraph`.
        """
        self._group.attrs["search"] = search
        commit(self._group)


def as_scores(scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float16]:
    """Return scores as a graph holds them: the least number is -65504, and -inf stays; float16 is held already."""
    if scores.dtype == np.float16:
        return cast("npt.NDArray[np.float16]", scores)
    least: npt.NDArray[Any] = np.maximum(scores, -65504, where=np.isfinite(scores), out=scores.copy())
    return least.astype(np.float16)


def open_graph(run: Store, name: str, layout: Layout | None) -> NeighbourGraph:
    """Open a committed graph.

    Args:
        run: The run's folder.
        name: Path of the graph within the run.
        layout: The layout whose places it must be of; None allows any.

    Raises:
        NotFound: There is none at ``name``, or it was never finished.
        StaleArtefact: It is of other places.
    """
    group = open_committed(run, name, layout, AGAIN)
    with being_replaced(f"{run.url}/{name}", AGAIN):
        return NeighbourGraph(
            run=run,
            name=name,
            kind=cast("Kind", group.attrs["kind"]),
            layout_id=str(group.attrs["layout"]),
            places_id=str(group.attrs["places"]),
            embeddings=str(group.attrs["embeddings"]),
            search=cast("dict[str, Any]", group.attrs.get("search", {"mode": "exact"})),
            places=array_of(group, "places"),
            stored={array: cast("zarr.Array[Any]", group[array]) for array in ("indices", "scores")},
        )
