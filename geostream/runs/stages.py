"""The stages of a run, one function each: what the trainer does in its loop, and a command or a flow does alone.

Decides where in a run's folder each stage finds what it needs and leaves what it made, and which mining an epoch's plan
comes from: the geographic neighbours until ``first_mining`` epochs are over, then the newest visual graph. A layout
without coordinates begins with random batches instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from geostream.errors import BadInput, LayoutNotCommitted, NotFound, StaleArtefact
from geostream.layout import Layout, layout_infos, open_layout
from geostream.dask import run_tasks
from geostream.mining.embeddings import Embeddings, embeddings_name, open_embeddings
from geostream.mining.graph import GPS_GRAPH, NeighbourGraph, open_graph, visual_graph_name
from geostream.mining.gps import build_gps_graph
from geostream.mining.visual import build_visual_graph
from geostream.planning.make_plan import make_plan
from geostream.settings import TrainSettings, default_settings, make_settings
from geostream.store import Store, check_name
from geostream.planning.plan import EpochPlan, load_plan, save_plan
from geostream.training.checkpoint import checkpoint_name, list_checkpoints, load_weights, read_position
from geostream.evaluation.embed import embed
from geostream.evaluation.evaluate import evaluate_embeddings as evaluate_embeddings
from geostream.training.distributed import ProcessGroup
from geostream.runs.log import MetricsLog
from geostream.training.model import Encoder

SETTINGS = "settings.json"
STANDS_ON = "layout.json"
BEST = "best"  # checkpoint of the evaluation with the highest R@1, named in best.json
PLANS_BEFORE = 2  # that a new one is not to repeat


@dataclass(frozen=True)
class Trained:
    """An encoder with the weights of a checkpoint, and the settings it was trained with."""

    encoder: Encoder
    settings: TrainSettings
    checkpoint: str
    epoch: int


def run_store(store: Store, dataset: str, run: str) -> Store:
    """The folder of a run in the store that holds the dataset."""
    return store.child(check_name("dataset", dataset), "runs", check_name("run", run))


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
    for height, width in ((settings.model.tile_size, settings.model.tile_size), (settings.model.view_height, settings.model.view_width)):
        try:
            with torch.inference_mode():
                encoder.encode(torch.zeros(1, 3, height, width, device=device))
        except (RuntimeError, AssertionError) as error:
            raise BadInput(
                f"model {settings.model.name} cannot take images of {height}×{width}: {str(error).splitlines()[0]}; "
                "choose larger tile_size, view_height and view_width, or another model"
            ) from error
    encoder.train()


def best_of(log: MetricsLog) -> dict[str, Any] | None:
    """Checkpoint, epoch and R@1 of the log's best evaluation, the newer of equals; None where there is none."""
    step = {record["epoch"]: record["step"] for record in log.of("train")}
    evaluated = [record for record in log.of("evaluate") if record["epoch"] in step]
    if not evaluated:
        return None
    best = max(evaluated, key=lambda record: (record["r1"], record["epoch"]))
    return {"checkpoint": checkpoint_name(step[best["epoch"]]), "epoch": best["epoch"], "r1": best["r1"]}


def write_best(run: Store, log: MetricsLog) -> None:
    """Name the checkpoint of the best evaluation in ``best.json``, for readers."""
    run.write_json(f"{BEST}.json", best_of(log))


def stand_on(run: Store, layout: Layout) -> None:
    """Write down that from now on the run reads this layout."""
    run.write_json(STANDS_ON, {"layout": layout.name, "id": layout.id})


def layout_of(store: Store, layout: Layout, run: str) -> Layout:
    """The generation that the run reads: its own where it has reclustered, ``layout`` where it says nothing.

    Raises StaleArtefact where the run was begun on other places than those of ``layout``, LayoutNotCommitted where its
    generation is gone.
    """
    folder = run_store(store, layout.dataset, run)
    try:
        own_id, name = (str(folder.read_json(STANDS_ON)[fact]) for fact in ("id", "layout"))
    except NotFound:
        return layout
    if own_id == layout.id:
        return layout
    own = open_layout(store, layout.dataset, name)
    if own.id != own_id or own.places_id != layout.places_id:
        raise StaleArtefact(
            f"{folder.url}: begun on layout {name}, other places than {layout.name}'s; start another run"
        )
    return own


def generation(store: Store, layout: Layout, layout_id: str) -> Layout:
    """The generation of the layout with this id. Raises LayoutNotCommitted where it is gone."""
    for name, info in layout_infos(store, layout.dataset).items():
        if info["id"] == layout_id:
            return open_layout(store, layout.dataset, name)
    raise LayoutNotCommitted(
        f"{store.url}/{layout.dataset}: generation {layout_id[:12]}, which a plan is of, is gone; start another run"
    )


def read_settings(run: Store) -> TrainSettings:
    """The settings that a run was begun with. Raises BadInput where there is no such run."""
    try:
        return make_settings(run.read_json(SETTINGS))
    except NotFound as error:
        raise BadInput(f"{run.url}: no such run; begin it with: geostream train") from error


def settings_of(run: Store, dataset: str) -> TrainSettings:
    """The settings that a run was begun with; where it was not, those to begin with on the dataset."""
    return read_settings(run) if run.exists(SETTINGS) else default_settings(dataset)


def load_trained(run: Store, checkpoint: str | None = None) -> Trained:
    """The encoder of a checkpoint of the run, with the weights to use.

    ``checkpoint``: its name, "best" for that of the best evaluation, None for the newest at an epoch's end.
    """
    settings = read_settings(run)
    if checkpoint == BEST:
        try:
            checkpoint = str(run.read_json(f"{BEST}.json")["checkpoint"])
        except NotFound as error:
            raise BadInput(
                f"{run.url}: no epoch was evaluated yet; name a checkpoint, or none for the newest"
            ) from error
    if checkpoint is None:
        finished = (name for name in reversed(list_checkpoints(run)) if read_position(run, name).finished)
        checkpoint = next(finished, None)
        if checkpoint is None:
            raise BadInput(f"{run.url}: no checkpoint of a whole epoch yet; train at least one")
    encoder = new_encoder(settings)
    position = read_position(run, checkpoint)
    load_weights(run, checkpoint, encoder)
    return Trained(encoder, settings, checkpoint, position.epoch)


def split_embeddings(split: str, epoch: int) -> str:
    """Path within a run of the embeddings of a split after an epoch."""
    return embeddings_name(epoch) if split == "train" else f"embeddings/{split}-epoch-{epoch:04d}.zarr"


def embed_split(run: Store, layout: Layout, trained: Trained, split: str, group: ProcessGroup | None = None) -> Embeddings:
    """Embed a split of the layout into the run; ``group``: ranks that call this together."""
    name = split_embeddings(split, trained.epoch)
    return embed(run, name, layout, split, trained.encoder, trained.checkpoint, trained.settings, group)


def mining_due(epoch: int, settings: TrainSettings) -> bool:
    """Whether the training set is mined after ``epoch``: a later epoch is planned from it."""
    after_first = epoch - settings.plan.first_mining
    in_time = settings.plan.strategy != "random" and epoch < settings.optim.epochs
    return in_time and after_first >= 0 and after_first % settings.plan.mine_every == 0


def mining_for(epoch: int, settings: TrainSettings) -> int:
    """The epoch after which the graph for ``epoch`` was mined; 0: the geographic one."""
    since_first = epoch - 1 - settings.plan.first_mining
    return 0 if since_first < 0 else settings.plan.first_mining + since_first // settings.plan.mine_every * settings.plan.mine_every


def mine(run: Store, layout: Layout, settings: TrainSettings, epoch: int, cluster: str | None = None) -> NeighbourGraph:
    """Build the visual graph from the embeddings of the training set after ``epoch``."""
    embeddings = open_embeddings(run, embeddings_name(epoch), layout)
    return build_visual_graph(run, visual_graph_name(epoch), layout, embeddings, settings.plan.neighbours, cluster)


def plan_epoch(
    run: Store, layout: Layout, settings: TrainSettings, epoch: int, cluster: str | None = None
) -> EpochPlan:
    """Make the plan of ``epoch`` from the graph that is due, and save it in the run.

    ``cluster``: URL of a Dask scheduler whose workers put the lanes together; None: this process. Raises NotFound where
    that graph was not mined yet.
    """
    graph, embeddings = None, None
    mining = mining_for(epoch, settings)
    if settings.plan.strategy != "random":
        if mining:
            graph = open_graph(run, visual_graph_name(mining), layout)
            embeddings = open_embeddings(run, embeddings_name(mining), layout)
        elif layout.coordinates != "none":
            graph = _gps_graph(run, layout, settings)
        else:
            settings = settings.changed(strategy="random")
    plan = make_plan(
        layout,
        graph,
        settings,
        epoch,
        settings.seed,
        _plans_before(run, epoch),
        embeddings,
        map if cluster is None else partial(run_tasks, cluster),
    )
    save_plan(run, plan)
    return plan


def recluster_due(plan: EpochPlan, settings: TrainSettings) -> bool:
    """Whether a plan is the first from a new graph, and too easy but in ways that drift along the order of the shards.

    These may reach the hardness that is wanted, but a network learns less from them: on rendered cities R@1 was 0.50
    three epochs after such plans, 0.56 where the shards were rewritten instead.
    """
    score = plan.quality.get("reachable_score")
    new = plan.source == "visual" and mining_for(plan.epoch, settings) == plan.epoch - 1
    wanted = min(settings.plan.recluster_below, settings.plan.hardness)
    return new and score is not None and wanted > 0 and score < wanted  # a score may be negative


def _gps_graph(run: Store, layout: Layout, settings: TrainSettings) -> NeighbourGraph:
    """The run's geographic graph, made now if this is its first use."""
    try:
        return open_graph(run, GPS_GRAPH, layout)
    except NotFound:
        return build_gps_graph(run, layout, settings.plan.neighbours)


def _plans_before(run: Store, epoch: int) -> list[EpochPlan]:
    """The plans of the two epochs before, newest first; of any generation, because only their batches matter."""
    plans = []
    for before in range(epoch - 1, max(epoch - 1 - PLANS_BEFORE, 0), -1):
        try:
            plans.append(load_plan(run, before, None))
        except NotFound:
            break
    return plans
