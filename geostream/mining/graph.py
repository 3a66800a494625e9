"""The neighbour graph as an object on the store: for each training place its K hardest others.

Rows are the places with training pairs, in the order of their ids; entries are place ids, so that a graph says nothing
about where a place lies on disk. It is written in whole Zarr shards by whoever computed them, in any order, and
read whole: 6 bytes an entry, 30 MB for VIGOR at K = 128, half of that on the store.
"""

from __future__ import annotations

from dataclasses import dataclass
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
#: Rows of a Zarr shard of a graph: write regions aligned to these, only.
SHARD_ROWS = 2048


@dataclass(frozen=True)
class NeighbourGraph:
    """A committed graph, in memory."""

    name: str  # its path within the run
    kind: Kind
    layout_id: str  # the generation it was mined on
    places_id: str
    embeddings: str  # path of the embeddings it came from, "" for gps
    search: dict[str, Any]  # mode: exact or approximate; because: why exact was fallen back to; and for approximate
    # the measured recall, wanted (recall), probes, lists, sample (queries measured), share (of all references searched)
    places: Int32  # (N,) place ids, sorted
    indices: Int32  # (N, K) place ids, hardest first, -1 where there are no more
    scores: npt.NDArray[np.float16]  # (N, K) cosine (visual) or minus metres (gps); -inf where there are no more

    @property
    def k(self) -> int:
        return int(self.indices.shape[1])

    def rows(self, nearest: int | None = None) -> Int32:
        """(N, K) neighbours as rows of ``places``, -1 where there are no more; of each the ``nearest``, None: all."""
        row = np.full(int(self.places[-1]) + 2, -1, dtype=np.int32)  # the last entry is that of -1, no neighbour
        row[self.places] = np.arange(len(self.places), dtype=np.int32)
        return row[self.indices[:, :nearest]]


class GraphWriter:
    """A graph being written. Several workers may each hold one of their own, over disjoint Zarr shards."""

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self._indices = cast("zarr.Array[Any]", group["indices"])
        self._scores = cast("zarr.Array[Any]", group["scores"])

    @classmethod
    def create(
        cls, run: Store, name: str, *, kind: Kind, layout: Layout, embeddings: str, places: Int32, k: int
    ) -> GraphWriter:
        """Begin a graph at ``name``; the one that was there is removed."""
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
                # Numbers' upper bytes are nearly all the same: smaller than Zarr's own choice, and twice as fast.
                compressors=BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
            )
        return cls(group)

    @classmethod
    def reopen(cls, run: Store, name: str) -> GraphWriter:
        """The graph being written at ``name``, for another worker."""
        return cls(zarr.open_group(run.zarr(name), mode="r+"))

    def write(self, start: int, indices: Int32, scores: npt.NDArray[np.floating[Any]]) -> None:
        """Rows from ``start``: whole Zarr shards (only the last may be short), or a region of another is lost."""
        stop = start + len(indices)
        if start % SHARD_ROWS or (stop % SHARD_ROWS and stop != self._indices.shape[0]):
            raise ValueError(f"rows {start} to {stop} are not whole Zarr shards of {SHARD_ROWS} rows")
        self._indices[start:stop] = indices
        self._scores[start:stop] = np.maximum(scores, -65504, where=np.isfinite(scores), out=scores.copy())

    def commit(self, search: dict[str, Any]) -> None:
        """``search``: how it was searched, as in :class:`NeighbourGraph`."""
        self._group.attrs["search"] = search
        commit(self._group)


def open_graph(run: Store, name: str, layout: Layout | None) -> NeighbourGraph:
    """The committed graph at ``name`` in the run.

    Raises NotFound where there is none or it was never finished, StaleArtefact where it is of other places than
    those of ``layout`` (None: any).
    """
    again = "make it again: geostream mine"
    group = open_committed(run, name, layout, again)
    with being_replaced(f"{run.url}/{name}", again):
        return NeighbourGraph(
            name=name,
            kind=cast("Kind", group.attrs["kind"]),
            layout_id=str(group.attrs["layout"]),
            places_id=str(group.attrs["places"]),
            embeddings=str(group.attrs["embeddings"]),
            search=cast("dict[str, Any]", group.attrs.get("search", {"mode": "exact"})),
            places=array_of(group, "places"),
            indices=array_of(group, "indices"),
            scores=array_of(group, "scores"),
        )
