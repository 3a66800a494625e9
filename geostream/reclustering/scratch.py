"""Keep the vectors of a reclustering on the store while they are smoothed and ordered.

Vectors are whole numbers of two bytes. A *block* is a range of consecutive rows, of about BLOCK_BYTES. A round of
vectors is kept in objects of a block's rows and a few columns each. So a task can read these columns of all rows, as
smoothing does, or all columns of a block. The objects are in the ``scratch`` folder of the neighbour graph
(:mod:`geostream.layout.zarr_groups`). Each is written once in a reclustering, and again with the same bytes by one that
starts again. So a task may run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from geostream.arrays import Int16, Int32, Integers, by_group
from geostream.dask import give_back
from geostream.errors import NotFound
from geostream.layout.zarr_groups import claim_scratch, drop_scratch, scratch_object
from geostream.store import Store

BLOCK_BYTES = 16 * 2**20  # of the vectors of a block
COLUMNS_BYTES = 384 * 2**20  # most bytes of some columns of all rows, which a task holds
WIDTH = 16  # most columns that are kept together
READS = 8  # objects that a task reads at a time

#: Applies a function to tasks, which are made while earlier ones run; the results may come in any order.
Apply = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
Span = tuple[int, int, int]  # block, first row in the block's object, row behind the last


class Rows(NamedTuple):
    """Some rows of a block.

    Attributes:
        block: Number of the block.
        rows: (n,) rows within the block.
    """

    block: int
    rows: Int32


@dataclass(frozen=True)
class Scratch:
    """The vectors of one reclustering, on the store.

    Attributes:
        run: The run's folder.
        embeddings: Path of the embeddings in it.
        graph: Path of the neighbour graph, in whose scratch folder the objects are.
        n: Number of rows: the places of the graph.
        dim: Number of dimensions, D.
        block: Rows of a block.
        width: Columns that are kept together.
        rounds: Rounds of smoothing. Of the last round's vectors all columns are kept together.
    """

    run: Store
    embeddings: str
    graph: str
    n: int
    dim: int
    block: int
    width: int
    rounds: int

    @classmethod
    def of(cls, run: Store, embeddings: str, graph: str, n: int, dim: int, rounds: int) -> Scratch:
        """Choose the sizes of the objects for ``n`` vectors of ``dim`` dimensions; parameters as the attributes."""
        width = int(np.clip(COLUMNS_BYTES // (2 * n), 1, min(WIDTH, dim)))
        return cls(run, embeddings, graph, n, dim, max(1, BLOCK_BYTES // (2 * dim)), width, rounds)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First row of each block, and the row behind its last."""
        return [(start, min(start + self.block, self.n)) for start in range(0, self.n, self.block)]

    def columns(self, of_round: int) -> list[tuple[int, int]]:
        """Return which columns are kept together: the first, and the one behind the last, of each group.

        Args:
            of_round: Round of smoothing; 0 is before it.
        """
        width = self.dim if of_round == self.rounds else self.width
        return [(start, min(start + width, self.dim)) for start in range(0, self.dim, width)]

    def claim(self, **counts: int) -> None:
        """Record how many objects of each kind will be written, so that they can be removed."""
        claim_scratch(self.run, self.graph, **counts)

    def drop(self) -> None:
        """Remove all objects that were recorded."""
        drop_scratch(self.run, self.graph)

    def drop_kind(self, kind: str, count: int) -> None:
        """Remove the objects of one kind before the others, because nobody needs them any more."""
        self.run.delete_all(scratch_object(self.graph, kind, number) for number in range(count))

    def write(self, kind: str, number: int, values: Any) -> None:
        """Write an object: the bytes of an array."""
        self.run.write(scratch_object(self.graph, kind, number), np.ascontiguousarray(values).tobytes())

    def read(self, kind: str, number: int, dtype: Any) -> Any:
        """Read a whole object as a flat array."""
        with self._explained():
            return np.frombuffer(self.run.read(scratch_object(self.graph, kind, number)), dtype=dtype)

    def read_columns(self, of_round: int, group: int) -> Int16:
        """Read some columns of all rows.

        Args:
            of_round: Round of smoothing.
            group: Number of the group of columns.

        Returns:
            (N, columns) whole numbers.
        """
        first, last = self.columns(of_round)[group]
        found = np.empty((self.n, last - first), dtype=np.int16)

        def read(number: int) -> None:
            start, stop = self.blocks[number]
            values = self.read(codes_kind(of_round), group * len(self.blocks) + number, np.int16)
            found[start:stop] = values.reshape(stop - start, last - first)

        with ThreadPoolExecutor(READS) as threads:
            for _ in threads.map(read, range(len(self.blocks))):
                pass
        return found

    def read_block(self, of_round: int, number: int) -> Int16:
        """Read a block.

        Args:
            of_round: Round of smoothing.
            number: Number of the block.

        Returns:
            (rows, D) whole numbers.
        """
        start, stop = self.blocks[number]
        parts = [
            self.read(codes_kind(of_round), group * len(self.blocks) + number, np.int16).reshape(stop - start, -1)
            for group in range(len(self.columns(of_round)))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def write_block(self, of_round: int, number: int, codes: Int16) -> None:
        """Write a block, as one object for each group of columns.

        Args:
            of_round: Round of smoothing.
            number: Number of the block.
            codes: (rows, D) whole numbers.
        """
        for group, (first, last) in enumerate(self.columns(of_round)):
            self.write(codes_kind(of_round), group * len(self.blocks) + number, codes[:, first:last])

    def read_spans(self, kind: str, spans: Sequence[Span]) -> Int16:
        """Read the rows of one group from the objects that :func:`write_groups` wrote.

        Args:
            kind: The kind of object.
            spans: Where they are.

        Returns:
            (n, D) whole numbers, in the order of the rows' numbers.
        """

        def read(span: Span) -> bytes:
            block, first, last = span
            path = scratch_object(self.graph, kind, block)
            return self.run.read_range(path, 2 * self.dim * first, 2 * self.dim * (last - first))

        with self._explained(), ThreadPoolExecutor(READS) as threads:
            data = b"".join(threads.map(read, spans))
        return np.frombuffer(data, dtype=np.int16).reshape(-1, self.dim)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say why an object can be missing."""
        try:
            yield
        except NotFound as error:
            raise NotFound(
                f"{self.run.url}/{self.graph}: another reclustering by this graph has ended, and removed "
                "what both used; run this one again"
            ) from error


def codes_kind(of_round: int) -> str:
    """Return the kind of the objects that hold the vectors after a round of smoothing."""
    return f"codes{of_round}"


def by_block(scratch: Scratch, rows: Integers) -> list[Rows]:
    """Group rows by their block.

    Args:
        scratch: The vectors on the store.
        rows: (n,) row numbers, sorted.

    Returns:
        The rows of each block that has any.
    """
    ends = np.searchsorted(rows, [start for start, _ in scratch.blocks] + [scratch.n])
    return [
        Rows(number, (rows[first:last] - scratch.blocks[number][0]).astype(np.int32))
        for number, (first, last) in enumerate(pairwise(ends.tolist()))
        if first < last
    ]


def write_by_group(scratch: Scratch, kind: str, group: Int32, groups: int, apply: Apply) -> list[list[Span]]:
    """Write rows again, so that those of a group can be read with one request a block.

    Args:
        scratch: The vectors on the store; those of the last round are written.
        kind: The kind of the new objects, one for each block.
        group: (N,) number of each row's group, -1 for rows that are not written.
        groups: Number of groups.
        apply: Runs the tasks.

    Returns:
        For each group where its rows are, in the order of their numbers.
    """
    scratch.claim(**{kind: len(scratch.blocks)})
    spans: list[list[Span]] = [[] for _ in range(groups)]

    def tasks() -> Iterator[Rows]:
        for number, (start, stop) in enumerate(scratch.blocks):
            rows, groups_here = by_group(group[start:stop])
            for one, begin, end in groups_here:
                spans[one].append((number, begin, end))
            if len(rows):
                yield Rows(number, rows.astype(np.int32))

    for _ in apply(partial(write_rows, scratch, kind), tasks()):
        pass
    return spans


def write_rows(scratch: Scratch, kind: str, some: Rows) -> None:
    """Run as a task: write some rows of a block, as one object; this holds two blocks.

    Args:
        scratch: The vectors on the store.
        kind: The kind of the object.
        some: The rows, in the order in which they are written.
    """
    give_back()
    scratch.write(kind, some.block, scratch.read_block(scratch.rounds, some.block)[some.rows])


def taken(scratch: Scratch, some: Rows) -> tuple[int, Int16]:
    """Run as a task: read some rows of a block as they were before smoothing; this holds two blocks.

    Args:
        scratch: The vectors on the store.
        some: The rows.

    Returns:
        Number of the block, and (n, D) whole numbers.
    """
    give_back()
    return some.block, scratch.read_block(0, some.block)[some.rows]
