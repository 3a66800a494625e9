"""Compare neighbour lists from the vectors that training steps compute with those from a pass over the training set.

A run mines after every epoch with a pass, as before the overlap. Meanwhile the newest vector of each query and each
reference is kept from the steps (harvested). After each epoch both are mined and planned from in the same way. Why the
lists differ so much is told in docs/notes/mining.md.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from geostream.arrays import Float32
from geostream.layout import Layout, open_layout
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings, read_rows
from geostream.mining.graph import NeighbourGraph
from geostream.mining.visual import build_visual_graph
from geostream.planning.make_plan import make_plan
from geostream.runs.log import Record
from geostream.runs.loop import train
from geostream.runs.run import Run
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.step import TrainStep
from tests.benchmarks.overlap import DATASET

NEAREST = 32  # neighbours of each place that are compared
RUN = "harvest"


class Harvest:
    """The newest vectors of the layout's training pairs and their places, from the steps of a run."""

    def __init__(self, layout: Layout, dim: int) -> None:
        self.pairs, self.reference_place = layout.pairs("train"), layout.references("train")
        self.query: Float32 = np.full((len(self.pairs), dim), np.nan, dtype=np.float32)
        self.reference: Float32 = np.full((len(self.reference_place), dim), np.nan, dtype=np.float32)
        self.of_epoch: dict[int, tuple[Float32, Float32]] = {}

    def keep(self, pair: Tensor, embedded: tuple[Tensor, Tensor]) -> None:
        """Keep the vectors of some pairs."""
        query, reference = (vectors.detach().numpy() for vectors in embedded)
        self.query[pair.numpy()] = query
        self.reference[np.searchsorted(self.reference_place, self.pairs.place[pair.numpy()])] = reference

    def record(self, record: Record) -> None:
        """Keep what there is at the end of an epoch."""
        if record["stage"] == "train":
            self.of_epoch[record["epoch"]] = (self.query.copy(), self.reference.copy())


def harvest(store: Store, settings: TrainSettings) -> list[dict[str, float]]:
    """Train, and return for each epoch but the last: lists in common, and the scores of both plans."""
    settings = settings.changed(mining_lag=0, mine_every=1, first_mining=1, recluster_below=0, evaluate_every=1000)
    layout = open_layout(store, DATASET)
    kept: Harvest | None = None
    embed = TrainStep._embed

    def embed_and_keep(self, chunk):  # type: ignore[no-untyped-def]
        nonlocal kept
        embedded = embed(self, chunk)
        kept = kept or Harvest(layout, embedded[0].shape[1])
        kept.keep(chunk.tensors["pair"], embedded)
        return embedded

    TrainStep._embed = embed_and_keep  # type: ignore[method-assign]
    train(store, layout, RUN, settings, on_record=lambda record: kept.record(record) if kept else None)
    assert kept is not None
    run = Run.open(store, layout, RUN)
    return [compare(run, kept, epoch) for epoch in range(1, settings.optim.epochs)]


def compare(run: Run, kept: Harvest, epoch: int) -> dict[str, float]:
    """Mine and plan from an epoch's harvest, and compare with what the run mined."""
    passed, graph = run.embeddings("train", epoch), run.graph(epoch)
    harvested = stored(run, passed, *kept.of_epoch[epoch])
    other = build_visual_graph(run.folder, "harvested.zarr", run.layout, harvested, graph.k)
    scores = [
        make_plan(run.layout, lists, run.settings, epoch + 1, run.settings.seed, embeddings=vectors).quality[
            "hardness_score"
        ]
        for lists, vectors in ((other, harvested), (graph, passed))
    ]
    return {"harvest_in_common": in_common(graph, other), "harvest_score": scores[0], "pass_score": scores[1]}


def stored(run: Run, passed: Embeddings, query: Float32, reference: Float32) -> Embeddings:
    """Write harvested vectors as embeddings; where no step has embedded a pair yet, those of the pass stand in."""
    name = "harvested-vectors.zarr"
    writer = create_embeddings(
        run.folder,
        name,
        layout=run.layout,
        checkpoint=passed.checkpoint,
        split="train",
        pairs=passed.pairs,
        reference_place=passed.reference_place,
        dim=passed.dim,
    )
    for write, vectors, array in (
        (writer.write_query, query, passed.query),
        (writer.write_reference, reference, passed.reference),
    ):
        write(np.arange(len(vectors)), np.where(np.isnan(vectors), read_rows(array), vectors))
    writer.commit()
    return open_embeddings(run.folder, name, run.layout)


def in_common(graph: NeighbourGraph, other: NeighbourGraph) -> float:
    """Return the share of a place's NEAREST neighbours that both graphs name, in the mean over the places."""
    shares = [
        len(np.intersect1d(a, b)) / NEAREST
        for a, b in zip(graph.indices[:, :NEAREST], other.indices[:, :NEAREST], strict=True)
    ]
    return float(np.mean(shares))
