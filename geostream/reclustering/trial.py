"""Try plans on some stretches of a large similarity order, to choose into how many pieces a shard is spread.

The graph of all places is never in memory. A task for each block of places reads the neighbours and vectors of those
that are tried. Neighbours that are not tried count as none. Plans are assembled and measured as for all places, with a
reference of the same places and with fewer lanes, so that a lane is about as long.

A task holds the neighbours and vectors of its block's tried places, and reads them piece by piece. The process that
tries holds TRIED_BYTES of vectors and about 2 KB a place with 128 neighbours: 1 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Float32, Int32, Int64, restrict
from geostream.dask import give_back
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings
from geostream.planning.batches import DRIFTING, FALLBACKS, assemble
from geostream.planning.hardness import HardnessScale, batch_hardness, sample
from geostream.planning.lane import SamplingProblem
from geostream.planning.spreading import Spread, deal, spread_out, stretches
from geostream.reclustering.external import PlaceBlock, open_arrays, place_blocks
from geostream.reclustering.scratch import Apply, Scratch
from geostream.settings import TrainSettings

TRIED = 2**18  # about the most pairs that are tried
TRIED_BYTES = 2**28  # most bytes of their vectors
PIECE = 4096  # rows that are read at a time

Half = npt.NDArray[np.float16]


class TriedBlock(NamedTuple):
    """A task: places of a block that are tried.

    Attributes:
        block: All places of the block.
        rows: (n,) positions in the block of those that are tried, sorted.
    """

    block: PlaceBlock
    rows: Int32


class TriedPlaces(NamedTuple):
    """What a task has read of the tried places of its block.

    Attributes:
        number: Number of the block.
        neighbours: (n, K) place ids, -1 where there are no more.
        query: (p, D) vectors of their pairs.
        reference: (n, D) vectors of their tiles.
    """

    number: int
    neighbours: Int32
    query: Half
    reference: Half


def read_tried(scratch: Scratch, task: TriedBlock) -> TriedPlaces:
    """Run as a task: read the neighbours and vectors of the tried places of a block.

    Args:
        scratch: Says where embeddings and graph are.
        task: The places.
    """
    give_back()
    start, stop = scratch.blocks[task.block.number]
    places = task.block.places[task.rows]
    [indices] = open_arrays(scratch, scratch.graph, "indices")
    query, reference = open_arrays(scratch, scratch.embeddings, "query", "reference")
    tried = np.zeros(stop - start, dtype=bool)
    tried[task.rows] = True
    return TriedPlaces(
        task.block.number,
        _picked(indices, start, tried),
        *(
            _picked(array, rows.start, np.isin(rows.place, places)).astype(np.float16)
            for array, rows in ((query, task.block.queries), (reference, task.block.references))
        ),
    )


def _picked(array: Any, start: int, wanted: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Read the wanted ones of the rows from ``start``."""
    parts = [np.asarray(array[start:start])]
    for at in range(0, len(wanted), PIECE):
        here = wanted[at : at + PIECE]
        if here.any():
            parts.append(np.asarray(array[start + at : start + at + len(here)])[here])
    return np.concatenate(parts)


class Trial:
    """The sampling problem of some places, with what it takes to measure plans.

    Args:
        scratch: Says where embeddings and graph are.
        layout: The layout that holds the places.
        embeddings: The embeddings that the graph came from.
        places: (N,) place ids of the graph, sorted.
        rows: (n,) rows of those that are tried, sorted.
        apply: Runs the tasks.
    """

    def __init__(
        self, scratch: Scratch, layout: Layout, embeddings: Embeddings, places: Int32, rows: Int64, apply: Apply
    ) -> None:
        tasks = []
        for block in place_blocks(scratch, embeddings, places):
            start, stop = scratch.blocks[block.number]
            here = rows[slice(*np.searchsorted(rows, [start, stop]))] - start
            if len(here):
                tasks.append(TriedBlock(block, here.astype(np.int32)))
        found = sorted(apply(partial(read_tried, scratch), tasks), key=lambda one: int(one.number))
        tried = places[rows]
        row = np.full(int(places[-1]) + 2, -1, dtype=np.int32)  # the last entry is for -1, no neighbour
        row[tried] = np.arange(len(tried), dtype=np.int32)
        self._query, self._reference = (
            np.concatenate([getattr(one, of) for one in found]) for of in ("query", "reference")
        )
        pair_place = embeddings.pairs.place
        place = row[pair_place[row[pair_place] >= 0]]
        self._problem = SamplingProblem(
            place=place,
            shard=np.zeros(len(tried), dtype=np.int32),
            neighbours=np.concatenate([row[one.neighbours] for one in found]),
            excluded=restrict(layout.excluded("train"), tried),
        )
        self._share = len(tried) / len(places)

    def reachable(self, settings: TrainSettings, shards: int) -> Callable[[Int32], float | None]:
        """Return a function that computes the score that plans would reach, as :func:`reachable_by_shards` does.

        Args:
            settings: Batch size, lanes, strategy and resident shards of the plans.
            shards: Number of shards that hold the tried places.
        """
        problem, optim, plan = self._problem, settings.optim, settings.plan
        common: dict[str, Any] = {"batch_size": optim.batch_size, "seed": settings.seed, "epoch": 1}
        lanes = max(1, round(plan.lanes * self._share))
        ways = FALLBACKS.get(plan.strategy, (plan.strategy,))
        hardest = [name for name in ways if name not in DRIFTING][-1]
        ends = [assemble(problem, strategy=end, resident=shards, **common).batches for end in ("sample4geo", "random")]
        if min(map(len, ends)) == 0:
            return lambda shard: None
        scale = HardnessScale(self._measure, *map(self._measure, ends))

        def reachable(shard: Int32) -> float | None:
            if len(np.unique(shard)) < lanes:
                return None
            made = assemble(
                problem._replace(shard=shard), strategy=hardest, lanes=lanes, resident=plan.resident_shards, **common
            )
            return scale.score(made)[0] if len(made.batches) else None

        return reachable

    def _measure(self, batches: Int32) -> float:
        def similarity(pairs: Int32) -> Float32:
            query, reference = self._query[pairs], self._reference[self._problem.place[pairs]]
            product: Float32 = query.astype(np.float32) @ reference.astype(np.float32).T
            return product

        return batch_hardness(sample(batches), similarity)


def spread_by_trial(
    scratch: Scratch,
    layout: Layout,
    embeddings: Embeddings,
    places: Int32,
    ordered: Sequence[Int64],
    sizes: Int64,
    settings: TrainSettings,
    apply: Apply,
) -> Spread:
    """Spread shards over the order, in as many pieces as plans for some stretches of it allow.

    Args:
        scratch: Says where embeddings and graph are.
        layout: The layout that holds the places.
        embeddings: The embeddings that the graph came from.
        places: (N,) place ids of the graph, sorted.
        ordered: Rows of each shard, in the order of similarity.
        sizes: (N,) bytes of each row.
        settings: Settings of the plans to come.
        apply: Runs the tasks.

    Returns:
        All shards with as many pieces as were chosen.
    """
    n, pairs = len(places), len(embeddings.pairs)
    most = min(TRIED * n // pairs, TRIED_BYTES * n // (2 * embeddings.dim * (n + pairs)))
    chosen = [ordered[number] for number in stretches(ordered, most)]
    rows = np.sort(np.concatenate(chosen))
    trial = Trial(scratch, layout, embeddings, places, rows, apply)
    reachable = trial.reachable(settings, len(chosen))
    tried = [np.searchsorted(rows, part) for part in chosen]
    pieces = spread_out(tried, sizes[rows], reachable, settings.plan.hardness).pieces
    pieces = min(pieces, *(len(part) for part in ordered))
    return Spread(deal(ordered, sizes, pieces), pieces)
