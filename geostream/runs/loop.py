"""Train a run: for each epoch wait for its plan, train, and evaluate where that is due, until the epochs are over.

A run can be cut off anywhere. An epoch trains on a plan that lies on the store. A checkpoint holds the weights and a
position in that plan; it is written every ``checkpoint_every`` steps and at the end of the epoch. Everything else
(evaluation, embeddings, the next graph, the next plan) follows from the checkpoint and the layout. So a run that is
started again restores the newest checkpoint, continues with the next batch, and ends with the same weights as a run
that was never interrupted. The price: up to ``checkpoint_every`` steps are trained again.

All ranks run this loop together. They share training and embedding. The main rank evaluates and writes to the store,
while the others wait, and has the next epoch prepared beside the training: mined, planned, and reclustered where its
plan would be too easy (:mod:`geostream.runs.background`). It also holds the run, so that a second trainer of the same
run is refused (:mod:`geostream.runs.lease`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from geostream.errors import Interrupted
from geostream.evaluation.embed import Trained
from geostream.evaluation.evaluate import Evaluation, evaluate_embeddings
from geostream.layout import Layout, open_layout
from geostream.planning.plan import EpochPlan
from geostream.runs import stages
from geostream.runs.background import Background
from geostream.runs.begin import begin
from geostream.runs.first_weights import resolve_weights, set_first_weights
from geostream.runs.galleries import galleries, note_tested, summed_up, tested_on
from geostream.runs.log import Record, RunLog, RunResult, log_record, new_record
from geostream.runs.metrics.export import Tell, exporting
from geostream.runs.preparation import checkpoints_to_embed, prepare, prepared
from geostream.runs.run import LOG, Run
from geostream.runs.signals import Stop
from geostream.runs.tensorboard import write_events
from geostream.settings import TrainSettings, make_settings
from geostream.store import Store
from geostream.store.store import patience
from geostream.streaming.dataset import State
from geostream.training.checkpoint import restore, restore_newest, save_checkpoint
from geostream.training.checkpoint_files import Position, prune_checkpoints
from geostream.training.distributed import ProcessGroup
from geostream.training.epoch import Epoch, measured
from geostream.training.field_of_view import EVALUATED, WHOLE
from geostream.training.step import TrainStep
from geostream.training.steps import EpochOutcome

logger = logging.getLogger(__name__)


def train(
    store: Store,
    layout: Layout,
    name: str,
    settings: TrainSettings,
    *,
    cluster: str | None = None,
    on_record: Callable[[Record], None] | None = None,
    group: ProcessGroup | None = None,
) -> RunResult:
    """Start a run or resume it, and train it to its last epoch.

    Args:
        store: The store that holds the dataset.
        layout: The layout to begin on; a run that has reclustered continues on its own generation.
        name: The run's name.
        settings: The settings to train with. They are stored with a new run; a resumed run must get the same ones
            (:mod:`geostream.runs.begin` lists the exceptions).
        cluster: URL of a Dask scheduler for mining; None uses threads of this process.
        on_record: Called with each record of the run's log when it is written.
        group: The ranks that call this together, already entered; None reads them from torchrun's environment.

    Returns:
        The run's result, over all its sessions.

    Raises:
        RunHeld: Another process trains the run.
        BadInput: The run was begun with other settings, or the ranks cannot share its batches evenly.
        StaleArtefact: The run was begun on other places.
        SystemExit: The run was stopped by SIGTERM or SIGINT (:mod:`geostream.runs.signals`).
    """
    if group is None:
        with ProcessGroup.current() as group:
            return train(store, layout, name, settings, cluster=cluster, on_record=on_record, group=group)
    run = Run(store, layout, name, cluster)
    with patience(), Stop(group, run.url) as stop, run.hold() if group.is_main else nullcontext():
        run.layout = run.own_layout()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        weights = resolve_weights(run, settings.model.weights) if group.is_main else None
        settings = settings.changed(weights=group.broadcast_object(weights))
        encoder = stages.new_encoder(settings, group.device)
        if not run.checkpoints():
            set_first_weights(run, encoder, settings.model)
        values = None
        if group.is_main:
            if settings.test_on:
                tested_on(run, settings.test_on, settings)  # a wrong name is told now, not at the end
            values = begin(run, settings, group.ranks).model_dump()
            run.pin_layout(run.layout)
        run.settings = make_settings(group.broadcast_object(values))
        return Trainer(run, TrainStep(encoder, run.settings, group), stop, on_record).finish()


class Trainer:
    """A run in progress on this rank. Making one restores the newest checkpoint that is undamaged, if there is one.

    Args:
        run: The run, with its settings and the layout to read.
        train_step: The encoder and its optimizer; the checkpoint is loaded into them.
        stop: Handler of the signals that stop the run.
        on_record: Called with each record of the run's log when it is written.

    Attributes:
        checkpoint: Name of the newest checkpoint; "" if there is none.
        epoch: The last epoch that was trained to its end.
        step: Number of optimizer steps so far.
        begun: Position in the next epoch, if a checkpoint was written within it; else None.
    """

    def __init__(
        self, run: Run, train_step: TrainStep, stop: Stop, on_record: Callable[[Record], None] | None = None
    ) -> None:
        self.run, self.train_step, self.stop, self.on_record = run, train_step, stop, on_record
        self.settings, self.group = run.settings, train_step.group
        self.checkpoint, self.epoch, self.step = "", 0, 0
        self.begun: Position | None = None
        self.export: Tell = lambda record: None
        beside = self.group.is_main and self.settings.plan.mining_lag > 0
        self.background = Background(run) if beside else None
        self._restore()

    def _restore(self) -> None:
        run, found = self.run, None
        if self.group.is_main:
            newest = run.checkpoints()
            found = restore_newest(run.folder, self.train_step, run.layout.places_id)
            if found is not None and found[0] == newest[-1]:  # a damaged newer one stays until it is replaced
                self._prune_checkpoints(found[0])
        self.checkpoint = self.group.broadcast_object("" if found is None else found[0])
        if not self.checkpoint:
            return
        if found is None:
            at = restore(run.folder, self.checkpoint, self.train_step, run.layout.places_id)
        else:
            _, at = found
        self.epoch, self.step = at.epoch, at.step
        if not at.finished:
            self.epoch, self.begun = at.epoch - 1, at

    def finish(self) -> RunResult:
        """Train the remaining epochs, each with the stages that follow it.

        Returns:
            The run's result, over all its sessions.

        Raises:
            Stopped: A signal stopped the run.
            RunHeld: Another process has taken the run over.
        """
        run, before = self.run, list(self.run.log.records)
        metrics = exporting(self._attributes, before) if self.group.is_main else nullcontext(self.export)
        with metrics as self.export, self.background or nullcontext():
            if self.begun is not None:
                self._say("goes on in epoch %d, batch %d", self.begun.epoch, self.begun.cursor)
            elif self.epoch:
                self._say("goes on from epoch %d", self.epoch)
                self.follow_up()
            while self.epoch < self.settings.optim.epochs:
                self.train_epoch(self.epoch + 1)
                self.follow_up()
            self._test_elsewhere()
        already_finished = bool(self.group.broadcast_object(run.log.records == before))
        if already_finished:
            self._say("finished before; nothing was left to do")
        if self.group.is_main:
            run.write_evaluations(run.log.of("evaluate"))
        self.group.barrier()
        return RunResult.of(run.url, RunLog(run.folder, LOG), already_finished)

    def train_epoch(self, number: int) -> None:
        """Train an epoch, or the rest of one that was cut off, and write its checkpoint.

        Args:
            number: Number of the epoch, from 1.

        Raises:
            Stopped: A signal stopped the run; a checkpoint was written after the current step.
        """
        plan = self.plan(number)
        before, state = EpochOutcome(), None
        if self.begun is not None:
            before = EpochOutcome.from_dict(self.begun.outcome or {})
            state = {"plan": self.begun.plan, "cursor": self.begun.cursor}
        epoch = Epoch(self.train_step, self.run.layout, plan, before, state)
        first_step = self.step - before.steps

        def save(outcome: EpochOutcome, state: State) -> None:
            self.step = first_step + outcome.steps
            self._save(self._position(number, **state, finished=False, outcome=outcome.as_dict()))
            if self.group.is_main:
                counts = {"step": self.step, "batches": outcome.batches}
                record = self.run.log.append("progress", number, outcome.seconds, **counts, **measured(outcome))
                self.export(record)

        def tell(outcome: EpochOutcome) -> None:
            if self.group.is_main:
                known = measured(outcome)
                # What is read is added up over ranks and sessions only with a checkpoint, or at the end of the epoch.
                of_all = {name: known[name] for name in ("loss", "pairs", "pairs_per_second")}
                step = first_step + outcome.steps
                self.export(new_record("progress", number, outcome.seconds, step=step, **of_all))

        with self.stop.held() as asked:
            try:
                outcome = epoch.train(save, asked, tell)
            except Interrupted:
                return
            self.epoch, self.step = number, first_step + outcome.steps
            # The record goes first: after a checkpoint without one, the epoch would be missing from the log for good.
            self._record(
                "train",
                time.perf_counter() - outcome.seconds,
                step=self.step,
                temperature=float((-self.train_step.encoder.logit_scale.detach()).exp()),
                **measured(outcome),
                curve=outcome.curve,
            )
            self._save(self._position(number, plan=plan.hash, cursor=plan.n_batches, finished=True))

    def plan(self, number: int) -> EpochPlan:
        """Return an epoch's plan once it is prepared, and make all ranks read the layout that it is for.

        The main rank waits for the preparation and begins that of the epoch after it; the others load the plan.

        Args:
            number: Number of the epoch, from 1.
        """
        run, plan = self.run, None
        if self.group.is_main:
            run.check_held()
            self._finish_preparation(number)
            plan = run.plan(number, None)
            run.move_to(plan.layout_id)
            self._prepare_beside(number + 1)
        name = self.group.broadcast_object(run.layout.name)
        if plan is None:
            if name != run.layout.name:
                run.layout = open_layout(run.store, run.layout.dataset, name)
            plan = run.plan(number, run.layout)
        return plan

    def _finish_preparation(self, number: int) -> None:
        """Wait until an epoch is prepared, and copy the records of its preparation into the log."""
        run, started = self.run, time.perf_counter()
        if run.log.has("plan", number):
            return
        if self.background is not None and self.background.asked == number:
            self.background.wait()
            self._record("wait", started, number)
        elif prepared(run, number) is None:
            prepare(run, number)
        for record in prepared(run, number) or []:
            self._log(record)

    def _prepare_beside(self, number: int) -> None:
        """Begin to prepare an epoch in the background, unless that is done or there is no such epoch."""
        due = number <= self.settings.optim.epochs and prepared(self.run, number) is None
        if self.background is not None and due:
            self.background.start(number)

    def follow_up(self) -> None:
        """Evaluate and embed after the last trained epoch, where that is due and not done yet."""
        run, epoch = self.run, self.epoch
        run.check_held()
        trained = Trained(self.train_step.ema_encoder, self.settings, self.checkpoint, epoch)
        if self._to_do("evaluate", self._evaluation_due()):
            started = time.perf_counter()
            found, narrowed = self._test(trained, galleries(run)), self._test_narrowed(trained)
            if self.group.is_main:
                self._record("evaluate", started, **summed_up(found) | ({"narrowed": narrowed} if narrowed else {}))
                run.write_best()
                self._prune_checkpoints(self.checkpoint)
        if self._to_do("embed", stages.mining_due(epoch, self.settings) and not self._embeds_beside):
            started = time.perf_counter()
            embeddings = stages.embed_split(run, trained, "train", self.group)
            self._record("embed", started, queries=len(embeddings.pairs), references=len(embeddings.reference_place))

    @property
    def _embeds_beside(self) -> bool:
        """Whether the background embeds the training set: where the trainer is on a CPU, and leaves cores to it."""
        return self.settings.plan.mining_lag > 0 and self.group.device.type == "cpu"

    def _to_do(self, stage: str, due: bool) -> bool:
        """Return whether a stage that is ``due`` is still to be done, by the main rank's log."""
        return bool(self.group.broadcast_object(due and not self.run.log.has(stage, self.epoch)))

    def _evaluation_due(self) -> bool:
        """Return whether the epoch is evaluated: every ``evaluate_every`` epochs and after the last, on test pairs."""
        due = self.epoch % self.settings.evaluate_every == 0 or self.epoch == self.settings.optim.epochs
        return due and len(self.run.layout.pairs("test")) > 0

    def _test(self, trained: Trained, on: Sequence[Run], fov: float = WHOLE) -> list[tuple[Layout, Evaluation]]:
        """Embed the test splits of some layouts, and evaluate on the main rank; the others get an empty list."""
        found = []
        for one in on:
            tiles = one.embeddings("test", trained.epoch) if fov < WHOLE else None
            embeddings = stages.embed_split(one, trained, "test", self.group, fov, tiles)
            if self.group.is_main:
                found.append((one.layout, evaluate_embeddings(one.layout, embeddings, one.cluster)))
        return found

    def _test_narrowed(self, trained: Trained) -> list[dict[str, Any]]:
        """Test narrowed views, too, after the last epoch of a run that trains with them; all ranks embed.

        Returns:
            The metrics of each field of view; of other ranks than the main one nothing.
        """
        if not self.settings.augment.narrows or self.epoch < self.settings.optim.epochs:
            return []
        found = [(fov, self._test(trained, galleries(self.run), fov)) for fov in EVALUATED if fov < WHOLE]
        return [{"fov": fov} | summed_up(of_fov) for fov, of_fov in found] if self.group.is_main else []

    def _test_elsewhere(self) -> None:
        """Test the best checkpoint on other data sets (``test_on``), unless that is done, and note all that it gave."""
        run, best = self.run, self.group.broadcast_object(self.run.best() if self.group.is_main else None)
        if best is None:
            return
        if self.group.is_main:
            [record] = [record for record in run.log.of("evaluate") if record["epoch"] == best["epoch"]]
            own = list(zip([one.layout for one in galleries(run)], record.get("datasets", [record]), strict=True))
            note_tested(run, best["checkpoint"], best["epoch"], own)
        others = tested_on(run, self.settings.test_on) if self.settings.test_on else []
        told = [[one.layout.dataset, one.layout.id, best["checkpoint"]] for one in others]
        done = any(record["told"] == told for record in run.log.of("transfer"))
        if others and not self.group.broadcast_object(done):
            started, trained = time.perf_counter(), stages.load_trained(run, best["checkpoint"], self.group.device)
            found = self._test(trained, others)
            if self.group.is_main:
                each = [{"dataset": layout.dataset, "layout": layout.name} | asdict(one) for layout, one in found]
                self._record(
                    "transfer", started, best["epoch"], checkpoint=best["checkpoint"], datasets=each, told=told
                )
                note_tested(run, best["checkpoint"], best["epoch"], [(layout, asdict(one)) for layout, one in found])

    def _save(self, position: Position) -> None:
        """Write a checkpoint, and remove those that are no longer needed."""
        if self.group.is_main:
            self.run.check_held()
            self.checkpoint = save_checkpoint(self.run.folder, self.train_step, position)
            self._prune_checkpoints(self.checkpoint)
        self.checkpoint = self.group.broadcast_object(self.checkpoint)
        self.begun = None if position.finished else position
        self.stop.saved = f"saved: epoch {position.epoch}, batch {position.cursor}"

    def _prune_checkpoints(self, newest: str) -> None:
        best = self.run.best()
        needed = checkpoints_to_embed(self.run) | ({best["checkpoint"]} if best else set())
        prune_checkpoints(self.run.folder, newest, needed, self.settings.keep_checkpoints)

    def _position(self, epoch: int, **where: Any) -> Position:
        return Position(self.run.layout.id, self.run.layout.places_id, epoch, step=self.step, **where)

    def _record(self, stage: str, started: float, epoch: int | None = None, **measured: object) -> None:
        """Log the result of a stage that began at ``started`` (a ``time.perf_counter`` value), on the main rank."""
        if self.group.is_main:
            seconds = time.perf_counter() - started
            self._log(new_record(stage, self.epoch if epoch is None else epoch, seconds, **measured))

    def _log(self, record: Record) -> None:
        """Add a record to the run's log."""
        self.run.check_held()
        self.run.log.add(record)
        write_events(self.run.folder, self.run.log.records)
        log_record(logger, record)
        self.export(record)
        if self.on_record is not None:
            self.on_record(record)

    def _attributes(self) -> dict[str, str]:
        """Return what the run's metrics are told apart by."""
        return {"dataset": self.run.layout.dataset, "run": self.run.name, "layout": self.run.layout.name}

    def _say(self, text: str, *values: object) -> None:
        if self.group.is_main:
            logger.info(f"%s: {text}", self.run.url, *values)
