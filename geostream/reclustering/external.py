"""Order places by similarity with their vectors on the store, by Dask tasks.

The order is, place by place, the one that :func:`geostream.planning.smoothing.smoothed` and
:func:`geostream.reclustering.order.similarity_order` find in memory. All sums are of whole numbers, so it does not
matter who adds what.

1. A task for each block of places averages their embeddings, and writes which rows are their nearest neighbours.
2. Each round of smoothing has two kinds of tasks. One holds a few columns of all vectors, and adds up the neighbours of
   each place. The other scales the sums of a block.
3. The tree of cuts is made level by level, down to nodes of CELL_BYTES. For each level the sampled rows of each node
   are written together, a task for each node finds the direction of the cut, and a task for each block says where its
   rows lie along it.
4. The rows of each node are written together, and a task orders them.

Bounds, with the constants of :mod:`geostream.reclustering.scratch`:

- A task of step 1, of a scaling, or of a level: 5 · BLOCK_BYTES, and in step 1 8 bytes a place for the ids of the
  graph: 164 MB at ten million places.
- A task that adds up columns: COLUMNS_BYTES and 2 · BLOCK_BYTES: 435 MB at most. A place has two bytes in a column, so
  this holds for up to 200 million places.
- A task that orders a node: 4 · CELL_BYTES: 256 MB. The only larger nodes are single shards.
- The process that hands out the tasks: 60 bytes a place, 0.6 GB at ten million, and a few tasks at a time. No vectors
  come to it.
- The store: about 7·D bytes a place while the work goes on.

A worker holds the tasks of all its threads. Time is N log N, apart from the reading of neighbours in step 2, which is
64 bytes a place for each group of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from geostream.arrays import Float32, Int32, Int64, Integers
from geostream.dask import give_back
from geostream.layout.zarr_groups import open_arrays
from geostream.mining.embeddings import Embeddings
from geostream.planning.smoothing import BLOCK, NEAR, UNIT, own_if_missing, unit_sums
from geostream.progress import track
from geostream.reclustering.means import VectorRows, mean_vectors
from geostream.reclustering.order import (
    Node,
    Ordered,
    Subtree,
    cut_direction,
    order_by_cuts,
    order_subtree,
    sampled,
    whole_numbers,
)
from geostream.reclustering.scratch import Apply, Scratch, Span, by_block, codes_kind, taken, write_by_group

CELL_BYTES = 64 * 2**20  # of the vectors of a node that one task orders


class PlaceBlock(NamedTuple):
    """A task: the places of a block.

    Attributes:
        number: Number of the block.
        places: (n,) their ids, sorted.
        queries: The queries of these places.
        references: The references of these places.
    """

    number: int
    places: Int32
    queries: VectorRows
    references: VectorRows


class NodeRows(NamedTuple):
    """A task: a node of the tree of cuts, or the sampled rows of one.

    Attributes:
        number: Its number.
        spans: Where its vectors are.
        position: (n,) position of each row among the vectors, which are in the order of the rows' numbers.
        sizes: (n,) bytes of each place.
        shards: Number of shards.
    """

    number: int
    spans: list[Span]
    position: Int32
    sizes: Int64
    shards: int


class NodesOfBlock(NamedTuple):
    """A task: the rows of a block that are cut.

    Attributes:
        block: Number of the block.
        node: (n,) number among the level's nodes of each row's, -1 for rows that are not cut.
        level: Number of the level.
        nodes: Number of nodes in the level.
    """

    block: int
    node: Int32
    level: int
    nodes: int


def place_blocks(scratch: Scratch, embeddings: Embeddings, places: Int32) -> list[PlaceBlock]:
    """Return the tasks for all blocks of places; their arrays are views of those that are given.

    Args:
        scratch: The vectors on the store.
        embeddings: The places' embeddings.
        places: (N,) sorted place ids.
    """
    made = []
    for number, (start, stop) in enumerate(scratch.blocks):
        ends = int(places[start]), int(places[stop - 1])
        queries = VectorRows.within(embeddings.pairs.place, *ends)
        made.append(
            PlaceBlock(number, places[start:stop], queries, VectorRows.within(embeddings.reference_place, *ends))
        )
    return made


@lru_cache(maxsize=1)
def _row_of_place(scratch: Scratch, of: str) -> Int32:
    """Return for each place id its row in the graph, -1 for others; the last entry is for -1, no neighbour."""
    [array] = open_arrays(scratch.run, scratch.graph, "places")
    places = np.asarray(array[:])
    row = np.full(int(places[-1]) + 2, -1, dtype=np.int32)
    row[places] = np.arange(len(places), dtype=np.int32)
    return row


def prepare_block(scratch: Scratch, of: str, block: PlaceBlock) -> None:
    """Run as a task: write a block's vectors before smoothing, and the rows of its places' nearest neighbours.

    Args:
        scratch: The vectors on the store.
        of: Id of the table of places, which tells graphs at the same path apart.
        block: The places.
    """
    give_back()
    query, reference = open_arrays(scratch.run, scratch.embeddings, "query", "reference")
    vectors = mean_vectors(query, reference, block.queries, block.references, block.places)
    scratch.write_block(0, block.number, whole_numbers(vectors))
    del vectors
    start, stop = scratch.blocks[block.number]
    [indices] = open_arrays(scratch.run, scratch.graph, "indices")
    rows = _row_of_place(scratch, of)
    pieces = range(start, stop, 16 * BLOCK)  # the store has all K neighbours of a place together
    near = [rows[np.asarray(indices[at : min(at + 16 * BLOCK, stop)])[:, :NEAR]] for at in pieces]
    scratch.write("near", block.number, own_if_missing(np.concatenate(near), start))


def add_columns(scratch: Scratch, task: tuple[int, int]) -> None:
    """Run as a task: add up some columns of each place's vector and its neighbours'.

    Args:
        scratch: The vectors on the store.
        task: Round of smoothing whose vectors are added, and number of the group of columns.
    """
    give_back()
    of_round, group = task
    columns = scratch.read_columns(of_round, group)
    for number, (start, stop) in enumerate(scratch.blocks):
        near = scratch.read("near", number, np.int32).reshape(stop - start, -1)
        total = columns[start:stop].astype(np.int32)
        for nth in range(near.shape[1]):
            total += columns[near[:, nth]]
        scratch.write(f"sums{of_round}", group * len(scratch.blocks) + number, total)


def scale_block(scratch: Scratch, task: tuple[int, int]) -> None:
    """Run as a task: scale the sums of a block to vectors of length 1.

    Args:
        scratch: The vectors on the store.
        task: Round of smoothing whose vectors were added, and number of the block.
    """
    give_back()
    of_round, number = task
    start, stop = scratch.blocks[number]
    sums = [
        scratch.read(f"sums{of_round}", group * len(scratch.blocks) + number, np.int32).reshape(stop - start, -1)
        for group in range(len(scratch.columns(of_round)))
    ]
    codes = np.empty((stop - start, scratch.dim), dtype=np.int16)
    for at in range(0, stop - start, BLOCK):
        vectors = unit_sums(np.concatenate([part[at : at + BLOCK] for part in sums], axis=1)).astype(np.float32)
        codes[at : at + BLOCK] = np.rint(vectors * np.float32(UNIT))
    scratch.write_block(of_round + 1, number, codes)


def find_direction(scratch: Scratch, kind: str, task: NodeRows) -> tuple[int, Float32]:
    """Run as a task: compute the direction in which a node is cut; this holds 8 bytes for each number of its sample.

    Args:
        scratch: The vectors on the store.
        kind: The kind of the objects that hold the sample.
        task: The sampled rows of the node.

    Returns:
        The node's number, and (D,) the direction.
    """
    codes = scratch.read_spans(kind, task.spans)[task.position]
    return task.number, cut_direction(codes, task.sizes, task.shards)


def project_block(scratch: Scratch, task: NodesOfBlock) -> tuple[int, Float32]:
    """Run as a task: say where the rows of a block lie along the directions of their nodes.

    Args:
        scratch: The vectors on the store.
        task: The rows.

    Returns:
        Number of the block, and (n,) where each row lies; 0 for rows that are not cut.
    """
    give_back()
    codes = scratch.read_block(scratch.rounds, task.block)
    directions = scratch.read("directions", task.level, np.float32).reshape(task.nodes, -1)
    along = np.zeros(len(codes), dtype=np.float32)
    for at in range(0, len(codes), BLOCK):
        some, node = codes[at : at + BLOCK].astype(np.float32), task.node[at : at + BLOCK]
        for one in np.unique(node[node >= 0]).tolist():
            here = np.flatnonzero(node == one)
            along[at + here] = some[here] @ directions[one]
    return task.block, along


def order_node(scratch: Scratch, task: NodeRows) -> Ordered:
    """Run as a task: order the rows of a node.

    Args:
        scratch: The vectors on the store.
        task: The node.

    Returns:
        The node in order; ``rows`` are positions in its rows, of four bytes.
    """
    give_back()
    codes = scratch.read_spans("cells", task.spans)[task.position]
    ordered = order_subtree(Subtree(task.number, codes, task.sizes, task.shards))
    return ordered._replace(rows=ordered.rows.astype(np.int32))


def prepare(scratch: Scratch, embeddings: Embeddings, places: Int32, apply: Apply) -> None:
    """Average and smooth the vectors of all places; they are written to the store.

    Args:
        scratch: The vectors on the store.
        embeddings: The places' embeddings.
        places: (N,) sorted place ids, the graph's.
        apply: Runs the tasks.
    """
    blocks, groups = len(scratch.blocks), len(scratch.columns(0))
    scratch.claim(codes0=groups * blocks, near=blocks)
    tasks = place_blocks(scratch, embeddings, places)
    _finish(apply(partial(prepare_block, scratch, embeddings.places_id), tasks), "vectors of places", blocks)
    for number in range(scratch.rounds):
        written = len(scratch.columns(number + 1)) * blocks
        scratch.claim(**{f"sums{number}": groups * blocks, codes_kind(number + 1): written})
        each_group = [(number, group) for group in range(groups)]
        _finish(apply(partial(add_columns, scratch), each_group), f"smoothing {number + 1}", groups)
        each_block = [(number, block) for block in range(blocks)]
        _finish(apply(partial(scale_block, scratch), each_block), f"smoothing {number + 1}, scaling", blocks)
        scratch.drop_kind(f"sums{number}", groups * blocks)
        if number:  # those before smoothing are needed for the likeness of a shard's places
            scratch.drop_kind(codes_kind(number), groups * blocks)
    scratch.drop_kind("near", blocks)


def external_order(scratch: Scratch, sizes: Int64, target_bytes: float, apply: Apply) -> list[Int32]:
    """Order the places by their smoothed vectors, which :func:`prepare` has written.

    Args:
        scratch: The vectors on the store.
        sizes: (N,) bytes of each place.
        target_bytes: Wanted mean size of a shard.
        apply: Runs the tasks.

    Returns:
        As :func:`similarity_order`.
    """
    cuts = _Cuts(scratch, sizes, apply)
    return order_by_cuts(sizes, target_bytes, max(1, CELL_BYTES // (2 * scratch.dim)), cuts.project, cuts.order)


class _Cuts:
    """Cut and order nodes of the tree, from the process that hands out the tasks."""

    def __init__(self, scratch: Scratch, sizes: Int64, apply: Apply) -> None:
        self._scratch, self._sizes, self._apply, self._level = scratch, sizes, apply, 0

    def project(self, nodes: Sequence[Node]) -> Iterator[Float32]:
        """Yield for each node where its rows lie along the direction in which it is cut."""
        level = self._level
        self._level += 1
        self._find_directions(level, nodes)
        along = self._along(level, nodes)
        for node in nodes:
            yield along[node.rows]

    def _find_directions(self, level: int, nodes: Sequence[Node]) -> None:
        """Find the direction in which each node is cut, and write them as an object."""
        scratch, kind = self._scratch, f"sample{level}"
        samples = [node._replace(number=i, rows=sampled(node.rows)) for i, node in enumerate(nodes)]
        tasks = self._together(kind, samples)
        directions = np.empty((len(nodes), scratch.dim), dtype=np.float32)
        found = self._apply(partial(find_direction, scratch, kind), tasks)
        for number, direction in track(found, f"cut {level + 1}", len(nodes)):
            directions[number] = direction
        scratch.drop_kind(kind, len(scratch.blocks))
        scratch.claim(directions=level + 1)
        scratch.write("directions", level, directions)

    def _along(self, level: int, nodes: Sequence[Node]) -> Float32:
        """Return (N,) where each row lies along the direction of its node."""
        scratch, group, blocks = self._scratch, self._group(nodes), self._scratch.blocks
        each = (NodesOfBlock(number, group[slice(*rows)], level, len(nodes)) for number, rows in enumerate(blocks))
        along = np.empty(scratch.n, dtype=np.float32)
        found = self._apply(partial(project_block, scratch), each)
        for number, values in track(found, f"cut {level + 1}", len(blocks)):
            along[slice(*blocks[number])] = values
        return along

    def order(self, nodes: Sequence[Node]) -> Iterable[Ordered]:
        """Order the nodes that are not cut further."""
        tasks = self._together("cells", nodes)
        return track(self._apply(partial(order_node, self._scratch), tasks), "similarity order", len(nodes))

    def _together(self, kind: str, nodes: Sequence[Node]) -> Iterator[NodeRows]:
        """Write the rows of each node together; return the task of each node, made when it is asked for."""
        spans = write_by_group(self._scratch, kind, self._group(nodes), len(nodes), self._apply)
        return (self._task(node, where) for node, where in zip(nodes, spans, strict=True))

    def _task(self, node: Node, where: list[Span]) -> NodeRows:
        position = np.empty(len(node.rows), dtype=np.int32)
        position[np.argsort(node.rows)] = np.arange(len(node.rows), dtype=np.int32)
        return NodeRows(node.number, where, position, self._sizes[node.rows], node.shards)

    def _group(self, nodes: Sequence[Node]) -> Int32:
        """Return (N,) the position in ``nodes`` of each row's node, -1 for rows in none."""
        group = np.full(self._scratch.n, -1, dtype=np.int32)
        for number, node in enumerate(nodes):
            group[node.rows] = number
        return group


def unsmoothed(scratch: Scratch, rows: Integers, apply: Apply) -> Float32:
    """Read the vectors of some places as they were before smoothing.

    Args:
        scratch: The vectors on the store.
        rows: (n,) row numbers, sorted.
        apply: Runs the tasks.

    Returns:
        (n, D) vectors, to 1 / UNIT.
    """
    parts = dict(apply(partial(taken, scratch), by_block(scratch, rows)))
    return np.concatenate([parts[number] for number in sorted(parts)]).astype(np.float32) / np.float32(UNIT)


def _finish(results: Iterable[Any], what: str, count: int) -> None:
    for _ in track(results, what, count):
        pass
