"""Do a run's stages other than training: embed, mine, plan an epoch, recluster.

Each stage takes the run and an epoch, reads the results of earlier stages from the store, and writes its own there. So
a stage can run alone, on any machine that reaches the store, and be repeated after a kill. A run on a layout without
coordinates begins with random batches instead of geographic neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress

import numpy as np
import torch

from geostream.arrays import pair_codes
from geostream.dask import shared_connection
from geostream.errors import BadInput, NotFound, StaleArtefact
from geostream.evaluation.embed import Trained, embed, split_references
from geostream.evaluation.protocols import split_pairs
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings
from geostream.mining.gps import build_gps_graph, has_positions
from geostream.mining.graph import NeighbourGraph
from geostream.mining.visual import build_visual_graph
from geostream.planning.hardness import hard_enough
from geostream.planning.make_plan import make_plan
from geostream.planning.plan import EpochPlan, save_plan
from geostream.reclustering.recluster import recluster as recluster_layout
from geostream.runs.run import Run
from geostream.settings import TrainSettings
from geostream.training.checkpoint import load_weights
from geostream.training.checkpoint_files import read_position
from geostream.training.distributed import ProcessGroup
from geostream.training.field_of_view import WHOLE, Narrowing
from geostream.training.model import Encoder
from geostream.training.sizes import check_sizes

BEST = "best"  # stands for the checkpoint of the best evaluation
PLANS_BEFORE = 2  # number of earlier plans whose batches a new plan avoids


def new_encoder(settings: TrainSettings, device: torch.device | None = None) -> Encoder:
    """Build an untrained encoder; the same seed gives the same weights.

    Args:
        settings: The run's settings.
        device: Where the encoder goes; None for the GPU, or the CPU if there is none.

    Raises:
        BadInput: There is no such model, or it cannot take images of the settings' sizes.
    """
    torch.manual_seed(settings.seed)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder.of(settings).to(device)
    check_sizes(encoder.eval(), settings)
    encoder.train()
    return encoder


def load_trained(run: Run, checkpoint: str | None = None, device: torch.device | None = None) -> Trained:
    """Load an encoder with the weights of a checkpoint.

    Args:
        run: The run.
        checkpoint: A checkpoint's name; "best" for that of the best evaluation; None for the newest at an epoch's end.
        device: Where the encoder goes; None for the GPU, or the CPU if there is none.

    Raises:
        BadInput: There is no such run, or no such checkpoint.
        StoreError: The checkpoint is damaged or cannot be read.
        StaleArtefact: The checkpoint does not fit the run's model.
    """
    settings = run.settings
    if checkpoint == BEST:
        checkpoint = run.read_best()
    if checkpoint is None:
        finished = (name for name in reversed(run.checkpoints()) if read_position(run.folder, name).finished)
        checkpoint = next(finished, None)
        if checkpoint is None:
            raise BadInput(f"{run.url}: no checkpoint of a whole epoch yet; train at least one")
    encoder = new_encoder(settings, device)
    position = read_position(run.folder, checkpoint)
    load_weights(run.folder, checkpoint, encoder)
    return Trained(encoder, settings, checkpoint, position.epoch)


def embed_split(
    run: Run,
    trained: Trained,
    split: str,
    group: ProcessGroup | None = None,
    fov: float = WHOLE,
    tiles: Embeddings | None = None,
) -> Embeddings:
    """Embed the images of a split and store the embeddings in the run.

    Args:
        run: The run.
        trained: The encoder to embed with.
        split: "train" or "test".
        group: The ranks that call this together; None for this process alone.
        fov: Degrees that each view is narrowed to; 360 leaves it whole.
        tiles: Embeddings of the split by the same encoder, whose tiles are taken; None: tiles are embedded, too.

    Returns:
        The stored embeddings.

    Raises:
        BadInput: The split has no pairs.
    """
    name = run.embeddings_name(run.named_by_dataset(split), trained.epoch, fov, trained.tta)
    change = Narrowing(fov) if fov < WHOLE else None
    return embed(run.folder, name, run.layout, split, trained, group, change, tiles)


def embedded(run: Run, trained: Trained, split: str, fov: float = WHOLE) -> Embeddings:
    """Return the embeddings of a split by a checkpoint: those in the run if they are complete, else new ones.

    Narrowed views go with the tiles of the whole views' embeddings, which are made first where they are not there.

    Args:
        run: The run.
        trained: Checkpoint to embed with.
        split: Name of the split.
        fov: Degrees that each view is narrowed to; 360 leaves it whole.

    Raises:
        RunHeld: New embeddings are needed, and a training of this run is at work, which may write the same.
    """
    layout = run.layout
    with suppress(NotFound, StaleArtefact):
        found = run.embeddings(split, trained.epoch, fov, trained.tta)
        whole = (
            (found.checkpoint, found.split) == (trained.checkpoint, split)
            and np.array_equal(pair_codes(*found.pairs), pair_codes(*split_pairs(layout, split)))
            and np.array_equal(found.reference_place, split_references(layout, split))
        )
        if whole:
            return found
    tiles = embedded(run, trained, split) if fov < WHOLE else None
    with nullcontext() if run.lease else run.hold():
        return embed_split(run, trained, split, fov=fov, tiles=tiles)


def mine(run: Run, epoch: int) -> NeighbourGraph:
    """Build the neighbour graph of the training set and store it in the run.

    Args:
        run: The run.
        epoch: The epoch whose embeddings are compared; 0 builds the graph from coordinates instead.

    Raises:
        NotFound: The training set was not embedded after that epoch.
        BadInput: ``epoch`` is 0, and the layout has no coordinates.
    """
    name, plan = run.graph_name(epoch), run.settings.plan
    if epoch == 0:
        return build_gps_graph(run.folder, name, run.layout, plan.neighbours, run.cluster)
    embeddings, margin = run.embeddings("train", epoch), plan.positive_margin
    return build_visual_graph(
        run.folder, name, run.layout, embeddings, plan.neighbours, run.cluster, positive_margin=margin
    )


def plan_epoch(run: Run, epoch: int) -> EpochPlan:
    """Make the plan of an epoch from the newest graph that is due by then, and save it in the run.

    Args:
        run: The run.
        epoch: Number of the epoch, from 1.

    Raises:
        NotFound: That graph was not mined yet.
    """
    settings, mining = run.settings, mining_for(epoch, run.settings)
    graph, embeddings = None, None
    if settings.plan.strategy != "random":
        if mining:
            graph, embeddings = run.graph(mining), run.embeddings("train", mining)
        elif has_positions(run.layout):
            graph = _geographic_graph(run)
        else:
            settings = settings.changed(strategy="random")

    # Threads of this process would not assemble faster than one.
    with nullcontext(map) if run.cluster is None else shared_connection(run.cluster, "plan") as apply:
        plan = make_plan(
            run.layout, graph, settings, epoch, settings.seed, _plans_before(run, epoch), embeddings, apply
        )
    save_plan(run.plans, plan)
    return plan


def recluster(run: Run, epoch: int | None = None) -> Layout:
    """Write the next generation of the run's layout, in the order of its embeddings.

    The run itself goes on reading its current generation (:meth:`Run.pin_layout` changes that).

    Args:
        run: The run.
        epoch: The epoch after which the training set was embedded and mined; None for the newest.

    Returns:
        The new layout.

    Raises:
        BadInput: The run has no embeddings.
        NotFound: It has no embeddings of that epoch, or no graph of them.
    """
    epoch = run.newest_embeddings() if epoch is None else epoch
    embeddings, graph = run.embeddings("train", epoch), run.graph(epoch)
    return recluster_layout(run.store, run.layout, run.name, embeddings, graph, run.settings, run.cluster)


def mining_due(epoch: int, settings: TrainSettings) -> bool:
    """Return whether the training set is mined after ``epoch``, for the plans of later epochs."""
    after_first = epoch - settings.plan.first_mining
    in_time = settings.plan.strategy != "random" and first_planned_from(epoch, settings) <= settings.optim.epochs
    return in_time and after_first >= 0 and after_first % settings.plan.mine_every == 0


def first_planned_from(mining: int, settings: TrainSettings) -> int:
    """Return the first epoch that is planned from the mining after epoch ``mining``."""
    return mining + 1 + settings.plan.mining_lag


def mining_for(epoch: int, settings: TrainSettings) -> int:
    """Return the epoch after which the graph for planning ``epoch`` is mined; 0 stands for the geographic graph."""
    since_first = epoch - first_planned_from(settings.plan.first_mining, settings)
    every = settings.plan.mine_every
    return 0 if since_first < 0 else settings.plan.first_mining + since_first // every * every


def recluster_due(plan: EpochPlan, settings: TrainSettings) -> bool:
    """Return whether the shards should be rewritten before the plan's epoch is trained.

    This is so if the plan is the first one from a new graph and too easy. What counts is its ``reachable_score``, the
    hardness without strategies whose batches drift along the order of the shards: those can be hard enough, but a
    network learns less from them (docs/notes/training.md).
    """
    score = plan.quality.get("reachable_score")
    new = plan.source == "visual" and mining_for(plan.epoch, settings) != mining_for(plan.epoch - 1, settings)
    wanted = min(settings.plan.recluster_below, settings.plan.hardness)
    return new and wanted > 0 and not hard_enough(score, wanted)


def _geographic_graph(run: Run) -> NeighbourGraph:
    """Return the run's geographic graph; build it first if there is none."""
    try:
        return run.graph(0)
    except NotFound:
        return mine(run, 0)


def _plans_before(run: Run, epoch: int) -> Iterator[EpochPlan]:
    """Load the plans of the two epochs before, newest first; any generation will do, because only batches matter."""
    for before in range(epoch - 1, max(epoch - 1 - PLANS_BEFORE, 0), -1):
        try:
            yield run.plan(before, None)
        except NotFound:
            return
