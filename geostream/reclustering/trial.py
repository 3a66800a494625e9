"""Try plans on some stretches of a large similarity order, to choose into how many pieces a shard is spread.

The graph of all places is never in memory: tasks read the neighbours and vectors of those that are needed. Plans for
the tried places are assembled as for all, with neighbours that are not tried counted as none, and with fewer lanes, so
that a lane is about as long. A batch comes from few resident shards in any case, so it is as hard as in a plan for all.

The two ends of the scale are not: random batches, and Sample4Geo's with random access, come from all places. Random
batches are therefore drawn from all places. Sample4Geo's are assembled from the tried places, which lack neighbours.
They are also imitated (:mod:`geostream.planning.imitation`), and the harder of the two counts. Where all places are
tried, the ends are exact.

A task holds the neighbours and vectors that it returns, and PIECE rows. The process that tries holds TRIED_BYTES of
vectors at most, 4·K bytes a tried place and about 300 bytes a tried pair: 0.4 GB with 64 neighbours. What the tasks
return is put where it belongs as it comes. Beside that it holds 20 bytes a place for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Bools, Float32, Int32, Int64, Integers, distinct, restrict
from geostream.dask import give_back
from geostream.layout import Layout
from geostream.layout.zarr_groups import open_arrays
from geostream.mining.embeddings import Embeddings
from geostream.planning.batches import DRIFTING, FALLBACKS, assemble
from geostream.planning.hardness import HardnessScale, batch_hardness, sample
from geostream.planning.imitation import SEEDS, imitated, imitated_batches
from geostream.planning.lane import SamplingProblem
from geostream.planning.spreading import Spread, deal, spread_out, stretches
from geostream.reclustering.external import PlaceBlock, place_blocks
from geostream.reclustering.scratch import Apply, Rows, Scratch, by_block
from geostream.settings import TrainSettings

TRIED = 2**18  # about the most pairs that are tried
TRIED_BYTES = 2**28  # most bytes of their vectors
PIECE = 2048  # rows that are read at a time

Half = npt.NDArray[np.float16]


class PlacesOfBlock(NamedTuple):
    """A task: some places of a block.

    Attributes:
        block: All places of the block.
        rows: (n,) positions in the block of those that are wanted, sorted.
    """

    block: PlaceBlock
    rows: Int32


class Vectors(NamedTuple):
    """Embeddings of some places.

    Attributes:
        number: Number of the block that holds them.
        query: (p, D) vectors of their pairs.
        reference: (n, D) vectors of their tiles.
    """

    number: int
    query: Half
    reference: Half


def read_neighbours(scratch: Scratch, some: Rows) -> tuple[int, Int32]:
    """Run as a task: read the neighbours of some places of a block.

    Args:
        scratch: Says where the graph is.
        some: Rows of the places.

    Returns:
        Number of the block, and (n, K) place ids, -1 where there are no more.
    """
    give_back()
    start, stop = scratch.blocks[some.block]
    [indices] = open_arrays(scratch.run, scratch.graph, "indices")
    wanted = np.zeros(stop - start, dtype=bool)
    wanted[some.rows] = True
    return some.block, _picked(indices, start, wanted)


def read_vectors(scratch: Scratch, some: PlacesOfBlock) -> Vectors:
    """Run as a task: read the embeddings of some places of a block.

    Args:
        scratch: Says where the embeddings are.
        some: The places.
    """
    give_back()
    places = some.block.places[some.rows]
    arrays = open_arrays(scratch.run, scratch.embeddings, "query", "reference")
    query, reference = (
        _picked(array, of.start, np.isin(of.place, places)).astype(np.float16)
        for array, of in zip(arrays, (some.block.queries, some.block.references), strict=True)
    )
    return Vectors(some.block.number, query, reference)


def _picked(array: Any, start: int, wanted: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Read the wanted ones of the rows from ``start``."""
    parts = [np.asarray(array[start:start])]
    for at in range(0, len(wanted), PIECE):
        here = wanted[at : at + PIECE]
        if here.any():
            parts.append(np.asarray(array[start + at : start + at + len(here)])[here])
    return np.concatenate(parts)


def _neighbours(scratch: Scratch, rows: Integers, apply: Apply) -> Int32:
    """Return (n, K) place ids of the neighbours of some rows, which are sorted; -1 where there are no more."""
    [indices] = open_arrays(scratch.run, scratch.graph, "indices")
    found = np.empty((len(rows), indices.shape[1]), dtype=np.int32)
    begins = np.searchsorted(rows, [start for start, _ in scratch.blocks])
    for number, part in apply(partial(read_neighbours, scratch), by_block(scratch, rows)):
        found[begins[number] : begins[number] + len(part)] = part
    return found


def _rows_of_neighbours(neighbours: Int32, some: Integers, row: Int32) -> Int32:
    """Replace the neighbours of some places by their rows, and drop those of the other places, all in place.

    Args:
        neighbours: (n, K) place ids; overwritten.
        some: (m,) positions of the places in ``neighbours``, sorted.
        row: The row of each place id; the last entry is that of -1.

    Returns:
        (m, K) rows, a view of ``neighbours``.
    """
    for at in range(0, len(some), PIECE):
        here = some[at : at + PIECE]  # none of them is before ``at``
        neighbours[at : at + len(here)] = row[neighbours[here]]
    return neighbours[: len(some)]


def _views(pair_place: Int32, places: Int32) -> Int32:
    """Return the number of pairs of each place id up to the largest of ``places``; 0 for those not in it, or -1 in it.

    Args:
        pair_place: (P,) place of each pair, sorted.
        places: Ids whose pairs are counted.
    """
    places = distinct(places[places >= 0])
    views = np.zeros(int(places[-1]) + 1, dtype=np.int32)
    views[places] = np.searchsorted(pair_place, places, "right") - np.searchsorted(pair_place, places, "left")
    return views


def _is_in(values: Int32, some: Int32) -> Bools:
    """Return whether each of some place ids is one of ``some``. NumPy's ``isin`` would hold several times as much."""
    inside = np.zeros(int(max(values.max(initial=0), some.max(initial=0))) + 1, dtype=bool)
    inside[some] = True
    return inside[values]


class Trial:
    """The sampling problem of some places, with what it takes to measure plans.

    Args:
        scratch: Says where embeddings and graph are.
        layout: The layout that holds the places.
        embeddings: The embeddings that the graph came from.
        places: (N,) place ids of the graph, sorted.
        rows: (n,) rows of those that are tried, sorted.
        settings: Batch size, lanes, strategy and resident shards of the plans.
        apply: Runs the tasks.
    """

    def __init__(
        self,
        scratch: Scratch,
        layout: Layout,
        embeddings: Embeddings,
        places: Int32,
        rows: Integers,
        settings: TrainSettings,
        apply: Apply,
    ) -> None:
        self._settings, self._share = settings, len(rows) / len(places)
        pair_place, tried, rng = embeddings.pairs.place, places[rows], np.random.default_rng(0)
        whole, size = len(rows) == len(places), settings.optim.batch_size
        excluded = restrict(layout.excluded("train", tried), tried)
        seeds = rng.choice(len(places), min(len(places), 0 if whole else max(SEEDS, 2 * size)), replace=False)
        asked = np.union1d(rows, seeds)
        neighbours = _neighbours(scratch, asked, apply)
        self._ends: list[Int32] = []  # batches like Sample4Geo's and random ones, of all places; none if all are tried
        if not whole:
            count = imitated_batches(size)
            of_seeds = neighbours[np.searchsorted(asked, seeds)]
            views = _views(pair_place, np.append(of_seeds, places[-1:]))
            self._ends = [
                imitated(places[seeds], of_seeds, views, (count, size), rng),
                pair_place[np.stack([rng.choice(len(pair_place), size, replace=False) for _ in range(count)])],
            ]
        row = np.full(int(places[-1]) + 2, -1, dtype=np.int32)  # the last entry is for -1, no neighbour
        row[tried] = np.arange(len(tried), dtype=np.int32)
        near = _rows_of_neighbours(neighbours, np.searchsorted(asked, rows), row)
        known = distinct(np.concatenate([tried, *(end.ravel() for end in self._ends)]))
        pair_place = pair_place[_is_in(pair_place, known)]
        self._place = np.searchsorted(known, pair_place).astype(np.int32)  # of each pair whose vector is known
        first = np.searchsorted(pair_place, known)
        self._ends = [first[np.searchsorted(known, end)].astype(np.int32) for end in self._ends]
        self._pairs = np.flatnonzero(row[pair_place] >= 0).astype(np.int32)  # those that are tried
        self._problem = SamplingProblem(
            place=row[pair_place[self._pairs]],
            shard=np.zeros(len(tried), dtype=np.int32),
            neighbours=near,
            excluded=excluded,
        )
        del row
        self._read_vectors(scratch, embeddings, places, known, apply)

    def _read_vectors(
        self, scratch: Scratch, embeddings: Embeddings, places: Int32, known: Int32, apply: Apply
    ) -> None:
        """Read the vectors of the known places and of all their pairs."""
        blocks = place_blocks(scratch, embeddings, places)
        some = by_block(scratch, np.searchsorted(places, known))
        ends = np.cumsum([0, *(len(one.rows) for one in some)])
        reference = {one.block: slice(*at) for one, at in zip(some, pairwise(ends.tolist()), strict=True)}
        pairs = np.searchsorted(self._place, ends)
        query = {one.block: slice(*at) for one, at in zip(some, pairwise(pairs.tolist()), strict=True)}
        self._query = np.empty((len(self._place), scratch.dim), dtype=np.float16)
        self._reference = np.empty((len(known), scratch.dim), dtype=np.float16)
        tasks = (PlacesOfBlock(blocks[one.block], one.rows) for one in some)
        for found in apply(partial(read_vectors, scratch), tasks):
            self._query[query[found.number]] = found.query
            self._reference[reference[found.number]] = found.reference

    def reachable(self, shards: int) -> Callable[[Int32], float | None]:
        """Return a function that computes the score that plans would reach, as :func:`reachable_by_shards` does.

        Args:
            shards: Number of shards that hold the tried places.
        """
        problem, plan = self._problem, self._settings.plan
        common: dict[str, Any] = {
            "batch_size": self._settings.optim.batch_size,
            "seed": self._settings.seed,
            "epoch": 1,
        }
        lanes = max(1, round(plan.lanes * self._share))
        ways = FALLBACKS.get(plan.strategy, (plan.strategy,))
        hardest = [name for name in ways if name not in DRIFTING][-1]

        def measure(*plans: Int32) -> list[float]:
            return [self._hardness(self._pairs[batches]) for batches in plans]

        ends = [assemble(problem, strategy=end, resident=shards, **common).batches for end in ("sample4geo", "random")]
        if min(map(len, ends)) == 0:
            return lambda shard: None
        reference, random = measure(*ends)
        if self._ends:
            of_all, random = map(self._hardness, self._ends)
            reference = max(reference, of_all)
        scale = HardnessScale(measure, reference, random)

        def reachable(shard: Int32) -> float | None:
            if len(distinct(shard)) < lanes:
                return None
            made = assemble(
                problem._replace(shard=shard), strategy=hardest, lanes=lanes, resident=plan.resident_shards, **common
            )
            return scale.score(made)[0] if len(made.batches) else None

        return reachable

    def _hardness(self, batches: Int32) -> float:
        """Return the hardness of batches of pairs whose vectors are known."""

        def similarity(pairs: Int32) -> Float32:
            query, reference = self._query[pairs], self._reference[self._place[pairs]]
            product: Float32 = query.astype(np.float32) @ reference.astype(np.float32).T
            return product

        return batch_hardness(sample(batches), similarity)


def spread_by_trial(
    scratch: Scratch,
    layout: Layout,
    embeddings: Embeddings,
    places: Int32,
    ordered: Sequence[Integers],
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
    tried = [np.searchsorted(rows, part) for part in chosen]
    trial = Trial(scratch, layout, embeddings, places, rows, settings, apply)
    pieces = spread_out(tried, sizes[rows], trial.reachable(len(chosen)), settings.plan.hardness).pieces
    del trial
    pieces = min(pieces, *(len(part) for part in ordered))
    return Spread(deal(ordered, sizes, pieces), pieces)
