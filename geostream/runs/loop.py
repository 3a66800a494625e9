"""The training run: plan, train, and every few epochs evaluate, embed, mine and recluster, until the epochs are over.

Decides the order of things, and that a run can be cut off anywhere. What an epoch trains on is a plan on the store; a
checkpoint is the weights and a position in that plan, written every so many steps and after the last. Everything else
(evaluation, embeddings, the next graph, the next plan) is derived from checkpoint and layout alone. So a run that is
started again restores the newest checkpoint, goes on with the batch behind it, and ends with the same weights as one
that was never interrupted. What that costs: up to ``checkpoint_every`` steps are trained again.

Several ranks go through this together. They train and embed in common; whatever else there is to do, and every word on
the store, is the first rank's, while the others wait for what it decides. It holds the run: a second trainer of the
same run is refused (:mod:`geostream.runs.lease`).

Where the first plan from a new graph is too easy (``recluster_below``), the shards are too far from the order of
similarity: they are rewritten as the layout's next generation, and the run goes on from there. ``layout.json`` in its
folder says which generation it reads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from geostream.errors import Interrupted, NotFound, StaleArtefact
from geostream.layout import Layout, open_layout
from geostream.mining.embeddings import Embeddings, embeddings_name, open_embeddings
from geostream.mining.graph import open_graph
from geostream.reclustering.recluster import recluster
from geostream.settings import TrainSettings, make_settings
from geostream.store import Store
from geostream.streaming.dataset import State
from geostream.planning.plan import EpochPlan, load_plan
from geostream.runs import stages
from geostream.runs.begin import begin
from geostream.training.checkpoint import (
    Position,
    prune_checkpoints,
    list_checkpoints,
    restore,
    restore_newest,
    save_checkpoint,
)
from geostream.training.epoch import Epoch, measured
from geostream.training.distributed import ProcessGroup
from geostream.training.step import TrainStep
from geostream.runs.lease import Lease
from geostream.runs.log import MetricsLog, Record, RunResult
from geostream.training.steps import EpochOutcome
from geostream.runs.signals import Stop
from geostream.runs.tensorboard import write_events
from geostream.training.weights import begin_with

logger = logging.getLogger(__name__)


def train(
    store: Store,
    layout: Layout,
    run: str,
    settings: TrainSettings,
    *,
    cluster: str | None = None,
    on_record: Callable[[Record], None] | None = None,
    group: ProcessGroup | None = None,
) -> RunResult:
    """Train the run to its last epoch, from where it stands.

    ``store``: where the dataset is. ``cluster``: URL of a Dask scheduler for mining; None: threads of this process.
    ``on_record`` is called with each record of the run's log when it is written. ``group``: the ranks that call this
    together, entered; None: those that torchrun's environment tells of. Raises RunHeld where another process trains the
    run, BadInput where it was begun with other settings, StaleArtefact where with another layout; SIGTERM and SIGINT
    raise SystemExit, see :mod:`geostream.runs.signals`.
    """
    if group is None:
        with ProcessGroup.current() as group:
            return train(store, layout, run, settings, cluster=cluster, on_record=on_record, group=group)
    folder = stages.run_store(store, layout.dataset, run)
    with Stop(group, folder.url) as stop, Lease(folder) if group.is_main else nullcontext() as lease:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        layout = stages.layout_of(store, layout, run)
        encoder = stages.new_encoder(settings, group.device)
        if not list_checkpoints(folder):
            begin_with(encoder, settings.model.weights)
        values = None
        if group.is_main:
            values = begin(folder, settings, group.ranks).model_dump()
            stages.stand_on(folder, layout)
        settings = make_settings(group.broadcast_object(values))
        train_step = TrainStep(encoder, settings, group)
        return _Run(store, run, layout, settings, cluster, on_record, train_step, group, stop, lease).finish()


class _Run:
    """A run in progress on this rank: its weights, its optimizer and what it has done so far."""

    def __init__(
        self,
        store: Store,
        name: str,
        layout: Layout,
        settings: TrainSettings,
        cluster: str | None,
        on_record: Callable[[Record], None] | None,
        train_step: TrainStep,
        group: ProcessGroup,
        stop: Stop,
        lease: Lease | None,
    ) -> None:
        self.store, self.name, self.layout, self.settings = store, name, layout, settings
        self.folder = folder = stages.run_store(store, layout.dataset, name)
        self.cluster, self.on_record, self.train_step, self.group, self.stop = cluster, on_record, train_step, group, stop
        self.lease = lease  # the first rank's, which alone writes
        self.log = MetricsLog(folder)
        self.checkpoint, self.epoch, self.step = "", 0, 0  # epoch: the last one finished
        self.begun: Position | None = None  # where the epoch after it was cut off
        self.restore()

    def restore(self) -> None:
        """Go back to the newest checkpoint that is whole, where there is one."""
        found = None
        if self.group.is_main:
            newest = list_checkpoints(self.folder)
            found = restore_newest(self.folder, self.train_step, self.layout.places_id)
            if found is not None and found[0] == newest[-1]:  # else what is damaged stays until there is a newer one
                self.prune_checkpoints(found[0])
        self.checkpoint = self.group.broadcast_object("" if found is None else found[0])
        if not self.checkpoint:
            return
        if found is None:
            at = restore(self.folder, self.checkpoint, self.train_step, self.layout.places_id)
        else:
            _, at = found
        self.epoch, self.step = at.epoch, at.step
        if not at.finished:
            self.epoch, self.begun = at.epoch - 1, at

    def check_lease(self) -> None:
        """Raise RunHeld where the run is another process's by now. Called before anything is written."""
        if self.lease is not None:
            self.lease.check()

    def finish(self) -> RunResult:
        """Do everything that is still to do."""
        begun_with = list(self.log.records)
        if self.begun is not None:
            self.say("goes on in epoch %d, batch %d", self.begun.epoch, self.begun.cursor)
        elif self.epoch:
            self.say("goes on from epoch %d", self.epoch)
            self.follow_up()
        while self.epoch < self.settings.optim.epochs:
            self.train()
            self.follow_up()
        already_finished = bool(self.group.broadcast_object(self.log.records == begun_with))
        if already_finished:
            self.say("finished before; nothing was left to do")
        if self.group.is_main:
            self.folder.write_json("evaluation.json", self.log.of("evaluate"))
        self.group.barrier()
        return RunResult.of(self.folder, MetricsLog(self.folder), already_finished)

    def train(self) -> None:
        """Train the next epoch, or what is left of it, and write its checkpoint."""
        number = self.epoch + 1
        plan = self.plan_together(number)
        before, state = EpochOutcome(), None
        if self.begun is not None:
            before = EpochOutcome.from_dict(self.begun.outcome or {})
            state = {"plan": self.begun.plan, "cursor": self.begun.cursor}
        epoch = Epoch(self.train_step, self.layout, plan, before, state)
        first_step = self.step - before.steps

        def save(outcome: EpochOutcome, state: State) -> None:
            self.step = first_step + outcome.steps
            self.save(self.position(number, **state, finished=False, outcome=outcome.as_dict()))
            if self.group.is_main:
                self.log.append("progress", number, outcome.seconds, batches=outcome.batches, **measured(outcome))

        with self.stop.held() as asked:
            try:
                outcome = epoch.train(save, asked)
            except Interrupted:
                return
            self.epoch, self.step = number, first_step + outcome.steps
            # The record goes first: a checkpoint without one would be an epoch missing from the run's story.
            self.record(
                "train",
                time.perf_counter() - outcome.seconds,
                step=self.step,
                temperature=float((-self.train_step.encoder.logit_scale.detach()).exp()),
                **measured(outcome),
                curve=outcome.curve,
            )
            self.save(self.position(number, plan=plan.hash, cursor=plan.n_batches, finished=True))

    def save(self, position: Position) -> None:
        """Write a checkpoint, and drop those that are no longer needed then."""
        if self.group.is_main:
            self.check_lease()
            self.checkpoint = save_checkpoint(self.folder, self.train_step, position)
            self.prune_checkpoints(self.checkpoint)
        self.checkpoint = self.group.broadcast_object(self.checkpoint)
        self.begun = None if position.finished else position
        self.stop.saved = f"saved: epoch {position.epoch}, batch {position.cursor}"

    def prune_checkpoints(self, newest: str) -> None:
        best = stages.best_of(self.log)
        prune_checkpoints(self.folder, newest, None if best is None else best["checkpoint"], self.settings.keep_checkpoints)

    def position(self, epoch: int, **where: Any) -> Position:
        return Position(self.layout.id, self.layout.places_id, epoch, step=self.step, **where)

    def plan_together(self, epoch: int) -> EpochPlan:
        """The epoch's plan, which the first rank makes; all are on its layout then."""
        plan = self.plan(epoch) if self.group.is_main else None
        name = self.group.broadcast_object(self.layout.name)
        if plan is None:
            if name != self.layout.name:
                self.layout = open_layout(self.store, self.layout.dataset, name)
            plan = load_plan(self.folder, epoch, self.layout)
        return plan

    def plan(self, epoch: int) -> EpochPlan:
        """The epoch's plan, after the shards were rewritten where it would be too easy otherwise."""
        started = time.perf_counter()
        self.check_lease()
        plan = self.planned(epoch, None)
        moved = plan.layout_id != self.layout.id
        if self.log.has("plan", epoch):
            if moved:  # a damaged checkpoint led back to an epoch on an earlier generation
                self.layout = stages.generation(self.store, self.layout, plan.layout_id)
            return plan
        seconds = time.perf_counter() - started
        # Moved and not recorded: it was cut off in between.
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
        self.check_lease()
        started, score = time.perf_counter(), easy.quality.get("reachable_score")
        if easy.layout_id == self.layout.id:
            logger.info("%s: hardness score %.2f, reclustering %s", self.folder.url, score, self.layout.name)
            embeddings = open_embeddings(self.folder, embeddings_name(easy.epoch - 1), self.layout)
            graph = open_graph(self.folder, easy.graph, self.layout)
            self.layout = recluster(self.store, self.layout, self.name, embeddings, graph, self.settings, self.cluster)
            stages.stand_on(self.folder, self.layout)
        # The score after it is the new plan's. Until there is one, the easy plan tells that this was not recorded.
        facts = {"layout": self.layout.name, "generation": self.layout.generation, "score_before": score}
        self.record("recluster", started, easy.epoch, **facts)
        return self.planned(easy.epoch, self.layout)

    def follow_up(self) -> None:
        """What is due after the epoch just trained, as far as it is not done."""
        self.check_lease()
        if self.to_do("evaluate", self.evaluation_due()):
            started = time.perf_counter()
            embeddings = self.embed("test")
            if self.group.is_main:
                found = stages.evaluate_embeddings(self.layout, embeddings, self.cluster)
                self.record("evaluate", started, **asdict(found))
                stages.write_best(self.folder, self.log)
                self.prune_checkpoints(self.checkpoint)
        due = stages.mining_due(self.epoch, self.settings)
        if self.to_do("embed", due):
            started = time.perf_counter()
            embeddings = self.embed("train")
            self.record("embed", started, queries=len(embeddings.pairs), references=len(embeddings.reference_place))
        if self.group.is_main and due and not self.log.has("mine", self.epoch):
            started = time.perf_counter()
            graph = stages.mine(self.folder, self.layout, self.settings, self.epoch, self.cluster)
            self.record("mine", started, places=len(graph.places), k=graph.k, search=graph.search)

    def to_do(self, stage: str, due: bool) -> bool:
        """Whether a stage that is ``due`` is still to be done, as the first rank has it in its log."""
        return bool(self.group.broadcast_object(due and not self.log.has(stage, self.epoch)))

    def evaluation_due(self) -> bool:
        """Every so many epochs and after the last, where the layout has test pairs."""
        due = self.epoch % self.settings.evaluate_every == 0 or self.epoch == self.settings.optim.epochs
        return due and len(self.layout.pairs("test")) > 0

    def embed(self, split: str) -> Embeddings:
        trained = stages.Trained(self.train_step.ema_encoder, self.settings, self.checkpoint, self.epoch)
        return stages.embed_split(self.folder, self.layout, trained, split, self.group)

    def record(self, stage: str, started: float, epoch: int | None = None, **measured: object) -> None:
        """Add to the run's log what a stage that began at ``started`` came to; the first rank does."""
        if self.group.is_main:
            seconds = time.perf_counter() - started
            self.check_lease()
            record = self.log.append(stage, self.epoch if epoch is None else epoch, seconds, **measured)
            write_events(self.folder, self.log.records)
            if self.on_record is not None:
                self.on_record(record)

    def say(self, text: str, *values: object) -> None:
        if self.group.is_main:
            logger.info(f"%s: {text}", self.folder.url, *values)
