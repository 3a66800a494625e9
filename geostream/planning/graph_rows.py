"""Hand each lane its rows of a neighbour graph that is too large for memory.

A graph's rows are in the order of place ids, and a lane's places are anywhere among them. So the graph is read once, a
block of rows at a time, and each block is written again with the rows of a lane together. A lane then reads its piece
of each block. That reads and writes 4·K bytes a place twice, about a twentieth of the time of a plan. A task holds two
blocks, 128 MiB; a lane's task holds its rows, 4·K bytes each, and 4 bytes for each place id of the layout.

The blocks are scratch objects of the graph (:mod:`geostream.layout.zarr_groups`). A task may run twice: it writes the
same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, overload

import numpy as np

from geostream.arrays import Int32, by_group
from geostream.dask import give_back
from geostream.errors import NotFound
from geostream.layout.zarr_groups import Apply, claim_scratch, drop_scratch, open_arrays, scratch_object
from geostream.mining.graph import SHARD_ROWS, NeighbourGraph
from geostream.planning.division import Division
from geostream.store import Store

BLOCK_BYTES = 64 * 2**20  # of the rows of a block
READS = 8  # pieces that a lane reads at a time


class BlockRows(NamedTuple):
    """A task: the rows of a block, with those of a lane together.

    Attributes:
        number: Number of the block.
        start: Its first row in the graph.
        rows: (n,) its rows, counted from ``start``, in the order in which they are written.
    """

    number: int
    start: int
    rows: Int32


@dataclass(frozen=True)
class LaneRows:
    """Where a lane's rows of a graph are.

    Attributes:
        run: The run's folder.
        graph: Path of the graph in it.
        kind: The kind of scratch object.
        k: Neighbours of each place, K.
        pieces: Number of each object that has some of the rows, the first of them there, and the one behind the last.
        places: (n,) ids of the lane's places, sorted.
    """

    run: Store
    graph: str
    kind: str
    k: int
    pieces: list[tuple[int, int, int]]
    places: Int32

    def read(self) -> Int32:
        """Read the rows.

        Returns:
            (n, K) neighbours as rows of the lane's places, -1 where the lane does not have them.

        Raises:
            NotFound: Another planning by the same graph has ended, and removed what both used.
        """
        give_back()
        last = int(self.places[-1])
        row = np.full(last + 2, -1, dtype=np.int32)  # the last entry is for -1 and for larger ids
        row[self.places] = np.arange(len(self.places), dtype=np.int32)
        found = np.empty((len(self.places), self.k), dtype=np.int32)
        ends = np.cumsum([stop - start for _, start, stop in self.pieces]).tolist()

        def read(piece: tuple[int, int, int], end: int) -> None:
            number, start, stop = piece
            path = scratch_object(self.graph, self.kind, number)
            data = self.run.read_range(path, 4 * self.k * start, 4 * self.k * (stop - start))
            ids = np.frombuffer(data, dtype=np.int32).reshape(-1, self.k)
            found[end - len(ids) : end] = row[np.minimum(ids, last + 1)]

        try:
            with ThreadPoolExecutor(READS) as threads:
                for _ in threads.map(read, self.pieces, ends):
                    pass
        except NotFound as error:
            where = f"{self.run.url}/{self.graph}"
            raise NotFound(
                f"{where}: another planning by this graph has ended, and removed what both used; plan again"
            ) from error
        return found


class RowsOfLanes(Sequence[LaneRows]):
    """Where the rows of each lane are, told when it is asked for.

    Args:
        graph: The graph.
        division: The lanes; the rows of its problem are those of the graph.
        kind: The kind of scratch object.
        pieces: For each lane, as in :class:`LaneRows`.
    """

    def __init__(
        self, graph: NeighbourGraph, division: Division, kind: str, pieces: list[list[tuple[int, int, int]]]
    ) -> None:
        self.graph, self.division, self.kind, self.pieces = graph, division, kind, pieces

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, at: int) -> LaneRows: ...
    @overload
    def __getitem__(self, at: slice) -> list[LaneRows]: ...
    def __getitem__(self, at: int | slice) -> LaneRows | list[LaneRows]:
        if isinstance(at, slice):
            return [self[lane] for lane in range(len(self))[at]]
        graph, places = self.graph, self.graph.places[self.division.places(at)]
        return LaneRows(graph.run, graph.name, self.kind, graph.k, self.pieces[at], places)


@contextmanager
def rows_of_lanes(graph: NeighbourGraph, division: Division, name: str, apply: Apply) -> Iterator[Sequence[LaneRows]]:
    """Write a graph's rows again, those of a lane together; they are removed when the context ends.

    Args:
        graph: The graph.
        division: The lanes; the rows of its problem are those of the graph.
        name: Tells these lanes from others of the same graph.
        apply: Applies a function to tasks.

    Yields:
        For each lane where its rows are.

    Raises:
        NotFound: The graph is made again by another process.
    """
    size = max(1, BLOCK_BYTES // (4 * graph.k * SHARD_ROWS)) * SHARD_ROWS
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(len(division))]
    tasks = []
    for number, start in enumerate(range(0, len(graph.places), size)):
        rows, lanes = by_group(division.lane[start : start + size])
        for lane, first, stop in lanes:
            pieces[lane].append((number, first, stop))
        tasks.append(BlockRows(number, start, rows.astype(np.int32)))
    kind = f"lanes-{name}"
    claim_scratch(graph.run, graph.name, **{kind: len(tasks)})
    try:
        for _ in apply(partial(write_block, graph.run, graph.name, kind), tasks):
            pass
        del tasks
        yield RowsOfLanes(graph, division, kind, pieces)
    finally:
        drop_scratch(graph.run, graph.name, kind)


def write_block(run: Store, graph: str, kind: str, block: BlockRows) -> None:
    """Run as a task: write the rows of a block again, in another order.

    Args:
        run: The run's folder.
        graph: Path of the graph in it.
        kind: The kind of scratch object.
        block: The rows.
    """
    give_back()
    [indices] = open_arrays(run, graph, "indices")
    ids = np.asarray(indices[block.start : block.start + len(block.rows)])
    run.write(scratch_object(graph, kind, block.number), ids[block.rows].astype(np.int32, copy=False).tobytes())
