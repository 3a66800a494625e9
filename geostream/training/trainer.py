"""The training run: plan, train, and every few epochs evaluate, embed, mine and recluster, until the epochs are over.

Decides the order of things, and that a run can be cut off anywhere. What an epoch trains on is a plan on the store; a
checkpoint is the weights and a position in that plan, written every so many steps and after the last. Everything else
(evaluation, embeddings, the next graph, the next plan) is derived from checkpoint and layout alone. So a run that is
started again restores the newest checkpoint, goes on with the batch behind it, and ends with the same weights as one
that was never interrupted. What that costs: up to ``checkpoint_every`` steps are trained again. Of the checkpoints
within an epoch only the newest is kept.

Where the first plan from a new graph is too easy (``recluster_below``), the shards are too far from the order of
similarity: they are rewritten as the layout's next generation, and the run goes on from there. ``layout.json`` in its
folder says which generation it reads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from geostream.errors import AlreadyExists, BadInput, NotFound, StaleArtefact
from geostream.layout import Layout
from geostream.mining.embeddings import embeddings_name, open_embeddings
from geostream.mining.graph import open_graph
from geostream.recluster import recluster
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.plan import EpochPlan, load_plan
from geostream.training import stages
from geostream.training.augment import Augmentation
from geostream.training.checkpoint import (
    Position,
    drop_checkpoint,
    drop_leftovers,
    list_checkpoints,
    restore,
    save_checkpoint,
)
from geostream.training.embed import image_sizes, read_options
from geostream.training.metrics import MetricsLog, Record, RunResult
from geostream.training.model import device_of
from geostream.training.optimise import EpochOutcome, make_optimizer, train_epoch

logger = logging.getLogger(__name__)

# Settings that do not change what is trained.
READING = {"look_ahead", "prefetch", "buffer_mib", "gap_kib", "replaced_limit"}
MAY_CHANGE = READING | {"workers", "threads", "decode_threads", "checkpoint_every"}


def train(
    store: Store,
    layout: Layout,
    run: str,
    settings: TrainSettings,
    *,
    cluster: str | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> RunResult:
    """Train the run to its last epoch, from where it stands.

    ``store``: where the dataset is. ``cluster``: URL of a Dask scheduler for mining; None: threads of this process.
    ``on_record`` is called with each record of the run's log when it is written. Raises BadInput where the run was
    begun with other settings, StaleArtefact where with another layout.
    """
    folder = stages.run_store(store, layout.dataset, run)
    layout = stages.layout_of(store, layout, run)
    _claim(folder, settings)
    stages.stand_on(folder, layout)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return _Run(store, run, layout, settings, cluster, on_record).finish()


def _claim(run: Store, settings: TrainSettings) -> None:
    """Store the settings with a new run; compare them with those of one that exists."""
    try:
        run.write_json(stages.SETTINGS, settings.model_dump(), if_absent=True)
    except AlreadyExists as error:
        begun, wanted = stages.read_settings(run).model_dump(), settings.model_dump()
        changed = [name for name in begun if begun[name] != wanted[name] and name not in MAY_CHANGE]
        if changed:
            names = ", ".join(f"{name} {begun[name]} → {wanted[name]}" for name in changed)
            raise BadInput(f"{run.url}: begun with other settings ({names}); choose another run name") from error


class _Run:
    """A run in progress: its weights, its optimizer and what it has done so far."""

    def __init__(
        self,
        store: Store,
        name: str,
        layout: Layout,
        settings: TrainSettings,
        cluster: str | None,
        on_record: Callable[[Record], None] | None,
    ) -> None:
        self.store, self.name, self.layout, self.settings = store, name, layout, settings
        self.folder = folder = stages.run_store(store, layout.dataset, name)
        self.cluster, self.on_record = cluster, on_record
        self.log = MetricsLog(folder)
        self.encoder = stages.new_encoder(settings)
        self.optimizer = make_optimizer(self.encoder, settings)
        self.checkpoint, self.epoch, self.step = "", 0, 0  # epoch: the last one finished
        self.begun: Position | None = None  # where the epoch after it was cut off
        if checkpoints := list_checkpoints(folder):
            self.checkpoint = checkpoints[-1]
            position = restore(folder, self.checkpoint, self.encoder, self.optimizer, layout.places_id)
            self.epoch, self.step = position.epoch, position.step
            if not position.finished:
                self.epoch, self.begun = position.epoch - 1, position
        drop_leftovers(folder, self.checkpoint)

    def finish(self) -> RunResult:
        """Do everything that is still to do."""
        begun_with = list(self.log.records)
        if self.begun is not None:
            logger.info("%s: goes on in epoch %d, batch %d", self.folder.url, self.begun.epoch, self.begun.cursor)
        elif self.epoch:
            logger.info("%s: goes on from epoch %d", self.folder.url, self.epoch)
            self.follow_up()
        while self.epoch < self.settings.epochs:
            self.train()
            self.follow_up()
        already_finished = self.log.records == begun_with
        if already_finished:
            logger.info("%s: finished before; nothing was left to do", self.folder.url)
        self.folder.write_json("evaluation.json", self.log.of("evaluate"))
        return RunResult.of(self.folder, self.log, already_finished)

    def train(self) -> None:
        """Train the next epoch, or what is left of it, and write its checkpoint."""
        epoch = self.epoch + 1
        plan = self.plan(epoch)
        change = Augmentation.of(self.settings, epoch, len(self.layout.pairs("train")))
        sizes, options = image_sizes(self.settings), read_options(self.settings)
        dataset = plan_dataset(self.layout, plan, sizes, change=change, options=options)
        pin = device_of(self.encoder).type == "cuda"
        loader = Loader(dataset, self.settings.workers, self.settings.decode_threads, pin)
        before = EpochOutcome()
        if self.begun is not None:
            loader.load_state_dict({"plan": self.begun.plan, "cursor": self.begun.cursor})
            before = EpochOutcome.from_dict(self.begun.outcome or {})
        first_step = self.step - before.batches

        def save(outcome: EpochOutcome) -> None:
            self.step = first_step + outcome.batches
            state = loader.state_dict()
            position = self.position(epoch, **state, finished=False, outcome=outcome.as_dict())
            self.save(position)
            self.log.append("progress", epoch, outcome.seconds, batches=outcome.batches, **_measured(outcome))

        outcome = train_epoch(self.encoder, self.optimizer, loader, self.settings, epoch, before, save)
        self.epoch, self.step = epoch, first_step + outcome.batches
        # The record goes first: a checkpoint without one would be an epoch missing from the run's story.
        self.record(
            "train",
            time.perf_counter() - outcome.seconds,
            step=self.step,
            temperature=float((-self.encoder.logit_scale.detach()).exp()),
            **_measured(outcome),
        )
        self.save(self.position(epoch, plan=plan.hash, cursor=plan.n_batches, finished=True))

    def save(self, position: Position) -> None:
        """Write a checkpoint; one within the same epoch is no longer needed then."""
        earlier = self.checkpoint if self.begun is not None else None
        self.checkpoint = save_checkpoint(self.folder, self.encoder, self.optimizer, position)
        self.begun = None if position.finished else position
        if earlier is not None:
            drop_checkpoint(self.folder, earlier)

    def position(self, epoch: int, **where: Any) -> Position:
        return Position(self.layout.id, self.layout.places_id, epoch, step=self.step, **where)

    def plan(self, epoch: int) -> EpochPlan:
        """The epoch's plan, after the shards were rewritten where it would be too easy otherwise."""
        started = time.perf_counter()
        plan = self.planned(epoch, None)
        if self.log.has("plan", epoch):
            return plan
        seconds = time.perf_counter() - started
        moved = plan.layout_id != self.layout.id  # and cut off before it was recorded
        if moved or (stages.recluster_due(plan, self.settings) and not self.log.has("recluster", epoch)):
            plan = self.recluster(plan)
        self.record("plan", time.perf_counter() - seconds, epoch, source=plan.source, hash=plan.hash, **plan.quality)
        return plan

    def planned(self, epoch: int, layout: Layout | None) -> EpochPlan:
        """The plan that the run holds, where it is of ``layout`` (None: any generation); else a new one."""
        try:
            return load_plan(self.folder, epoch, layout)
        except (NotFound, StaleArtefact):
            return stages.plan_epoch(self.folder, self.layout, self.settings, epoch, self.cluster)

    def recluster(self, easy: EpochPlan) -> EpochPlan:
        """Go on from the next generation of the layout, in the order of the newest embeddings, with a new plan."""
        started, score = time.perf_counter(), easy.quality["hardness_score"]
        if easy.layout_id == self.layout.id:
            logger.info("%s: hardness score %.2f, reclustering %s", self.folder.url, score, self.layout.name)
            embeddings = open_embeddings(self.folder, embeddings_name(easy.epoch - 1), self.layout)
            graph = open_graph(self.folder, easy.graph, self.layout)
            self.layout = recluster(self.store, self.layout, self.name, embeddings, graph, self.cluster)
            stages.stand_on(self.folder, self.layout)
        # The score after it is the new plan's. Until there is one, the easy plan tells that this was not recorded.
        facts = {"layout": self.layout.name, "generation": self.layout.generation, "score_before": score}
        self.record("recluster", started, easy.epoch, **facts)
        return self.planned(easy.epoch, self.layout)

    def follow_up(self) -> None:
        """What is due after the epoch just trained, as far as it is not done."""
        if self.evaluation_due() and not self.log.has("evaluate", self.epoch):
            started = time.perf_counter()
            embeddings = stages.embed_split(self.folder, self.layout, self.trained(), "test")
            self.record("evaluate", started, **asdict(stages.evaluate_embeddings(self.layout, embeddings)))
        if not stages.mining_due(self.epoch, self.settings):
            return
        if not self.log.has("embed", self.epoch):
            started = time.perf_counter()
            embeddings = stages.embed_split(self.folder, self.layout, self.trained(), "train")
            self.record("embed", started, queries=len(embeddings.pairs), references=len(embeddings.reference_place))
        if not self.log.has("mine", self.epoch):
            started = time.perf_counter()
            graph = stages.mine(self.folder, self.layout, self.settings, self.epoch, self.cluster)
            self.record("mine", started, places=len(graph.places), k=graph.k, search=graph.search)

    def evaluation_due(self) -> bool:
        """Every so many epochs and after the last, where the layout has test pairs."""
        due = self.epoch % self.settings.evaluate_every == 0 or self.epoch == self.settings.epochs
        return due and len(self.layout.pairs("test")) > 0

    def trained(self) -> stages.Trained:
        return stages.Trained(self.encoder, self.settings, self.checkpoint, self.epoch)

    def record(self, stage: str, started: float, epoch: int | None = None, **measured: object) -> None:
        """Add to the run's log what a stage that began at ``started`` came to."""
        seconds = time.perf_counter() - started
        record = self.log.append(stage, self.epoch if epoch is None else epoch, seconds, **measured)
        if self.on_record is not None:
            self.on_record(record)


def _measured(outcome: EpochOutcome) -> dict[str, Any]:
    """What the log tells of an epoch, or of the part of it that is trained."""
    return {
        "loss": outcome.loss,
        "pairs": outcome.pairs,
        "pairs_per_second": outcome.pairs / outcome.seconds,
        "wait_share": outcome.stream.stall_seconds / outcome.seconds,
        "stream": outcome.stream.as_dict(),
    }
