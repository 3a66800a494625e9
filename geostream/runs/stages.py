"""The stages of a run beside the training itself: embed, mine, plan an epoch, recluster.

Each takes the run and an epoch, reads what earlier stages left on the store, and leaves its own result there. So each
can be done alone, on any machine that reaches the store, and done again after a kill. A run on a layout without
coordinates begins with random batches instead of geographic neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from geostream.dask import run_tasks
from geostream.errors import BadInput, NotFound
from geostream.evaluation.embed import embed
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings
from geostream.mining.gps import build_gps_graph
from geostream.mining.graph import NeighbourGraph
from geostream.mining.visual import build_visual_graph
from geostream.planning.hardness import hard_enough
from geostream.planning.make_plan import make_plan
from geostream.planning.plan import EpochPlan, save_plan
from geostream.reclustering.recluster import recluster as recluster_layout
from geostream.runs.run import Run
from geostream.settings import TrainSettings
from geostream.training.checkpoint import load_weights, read_position
from geostream.training.distributed import ProcessGroup
from geostream.training.model import Encoder

BEST = "best"  # asks for the checkpoint of the best evaluation
PLANS_BEFORE = 2  # plans of earlier epochs that a new one is not to repeat


@dataclass(frozen=True)
class Trained:
    """An encoder with the weights of a checkpoint, and the settings it was trained with."""

    encoder: Encoder
    settings: TrainSettings
    checkpoint: str
    epoch: int


def new_encoder(settings: TrainSettings, device: torch.device | None = None) -> Encoder:
    """An encoder from scratch on ``device`` (None: the GPU where there is one); the same for the same seed."""
    torch.manual_seed(settings.seed)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder.of(settings).to(device)
    _check_sizes(encoder, settings, device)
    return encoder


def _check_sizes(encoder: Encoder, settings: TrainSettings, device: torch.device) -> None:
    """Raise BadInput where the network cannot take images of the settings' sizes."""
    encoder.eval()
    for height, width in (
        (settings.model.tile_size, settings.model.tile_size),
        (settings.model.view_height, settings.model.view_width),
    ):
        try:
            with torch.inference_mode():
                encoder.encode(torch.zeros(1, 3, height, width, device=device))
        except (RuntimeError, AssertionError) as error:
            raise BadInput(
                f"model {settings.model.name} cannot take images of {height}×{width}: {str(error).splitlines()[0]}; "
                "choose larger tile_size, view_height and view_width, or another model"
            ) from error
    encoder.train()


def load_trained(run: Run, checkpoint: str | None = None) -> Trained:
    """Return the encoder with the weights of a checkpoint.

    Args:
        run: The run.
        checkpoint: A checkpoint's name, "best" for that of the best evaluation, None for the newest at an epoch's end.

    Raises:
        BadInput: There is no such checkpoint.
    """
    settings = run.settings
    if checkpoint == BEST:
        checkpoint = run.read_best()
    if checkpoint is None:
        finished = (name for name in reversed(run.checkpoints()) if read_position(run.folder, name).finished)
        checkpoint = next(finished, None)
        if checkpoint is None:
            raise BadInput(f"{run.url}: no checkpoint of a whole epoch yet; train at least one")
    encoder = new_encoder(settings)
    position = read_position(run.folder, checkpoint)
    load_weights(run.folder, checkpoint, encoder)
    return Trained(encoder, settings, checkpoint, position.epoch)


def embed_split(run: Run, trained: Trained, split: str, group: ProcessGroup | None = None) -> Embeddings:
    """Embed a split into the run. ``group``: the ranks that call this together; None: this one alone."""
    name = run.embeddings_name(split, trained.epoch)
    return embed(run.folder, name, run.layout, split, trained.encoder, trained.checkpoint, trained.settings, group)


def mine(run: Run, epoch: int) -> NeighbourGraph:
    """Build the graph of the training set's embeddings after ``epoch``; epoch 0: the geographic graph."""
    name, neighbours = run.graph_name(epoch), run.settings.plan.neighbours
    if epoch == 0:
        return build_gps_graph(run.folder, name, run.layout, neighbours)
    return build_visual_graph(run.folder, name, run.layout, run.embeddings("train", epoch), neighbours, run.cluster)


def plan_epoch(run: Run, epoch: int) -> EpochPlan:
    """Make the plan of ``epoch`` from the graph that is due, and save it in the run.

    Raises:
        NotFound: That graph was not mined yet.
    """
    settings, mining = run.settings, mining_for(epoch, run.settings)
    graph, embeddings = None, None
    if settings.plan.strategy != "random":
        if mining:
            graph, embeddings = run.graph(mining), run.embeddings("train", mining)
        elif run.layout.coordinates != "none":
            graph = _geographic_graph(run)
        else:
            settings = settings.changed(strategy="random")
    map_fn = map if run.cluster is None else partial(run_tasks, run.cluster)
    plan = make_plan(run.layout, graph, settings, epoch, settings.seed, _plans_before(run, epoch), embeddings, map_fn)
    save_plan(run.plans, plan)
    return plan


def recluster(run: Run, epoch: int | None = None) -> Layout:
    """Write the next generation of the run's layout, in the order of its embeddings, and return it.

    The run goes on reading the generation that it read. ``epoch``: after which the training set was embedded and mined;
    None: the newest.

    Raises:
        BadInput: The run has no embeddings.
        NotFound: It has none of that epoch, or no graph of them.
    """
    epoch = run.newest_embeddings() if epoch is None else epoch
    embeddings, graph = run.embeddings("train", epoch), run.graph(epoch)
    return recluster_layout(run.store, run.layout, run.name, embeddings, graph, run.settings, run.cluster)


def mining_due(epoch: int, settings: TrainSettings) -> bool:
    """Whether the training set is mined after ``epoch``: a later epoch is planned from it."""
    after_first = epoch - settings.plan.first_mining
    in_time = settings.plan.strategy != "random" and epoch < settings.optim.epochs
    return in_time and after_first >= 0 and after_first % settings.plan.mine_every == 0


def mining_for(epoch: int, settings: TrainSettings) -> int:
    """The epoch after which the graph for ``epoch`` was mined; 0: the geographic one."""
    since_first = epoch - 1 - settings.plan.first_mining
    return (
        0
        if since_first < 0
        else settings.plan.first_mining + since_first // settings.plan.mine_every * settings.plan.mine_every
    )


def recluster_due(plan: EpochPlan, settings: TrainSettings) -> bool:
    """Whether a plan is the first from a new graph, and too easy but in ways that drift along the order of the shards.

    These may reach the hardness that is wanted, but a network learns less from them: on rendered cities R@1 was 0.50
    three epochs after such plans, 0.56 where the shards were rewritten instead.
    """
    score = plan.quality.get("reachable_score")
    new = plan.source == "visual" and mining_for(plan.epoch, settings) == plan.epoch - 1
    wanted = min(settings.plan.recluster_below, settings.plan.hardness)
    return new and wanted > 0 and not hard_enough(score, wanted)


def _geographic_graph(run: Run) -> NeighbourGraph:
    """Return the run's geographic graph, made now if this is its first use."""
    try:
        return run.graph(0)
    except NotFound:
        return mine(run, 0)


def _plans_before(run: Run, epoch: int) -> list[EpochPlan]:
    """Return the plans of the two epochs before, newest first; of any generation, because only batches matter."""
    plans = []
    for before in range(epoch - 1, max(epoch - 1 - PLANS_BEFORE, 0), -1):
        try:
            plans.append(run.plan(before, None))
        except NotFound:
            break
    return plans
