"""Show the stages of a training on its flow run's page: a task run for each stage of each epoch, "epoch 3: mine".

The trainer is another process, and its loop knows nothing of Prefect. When a stage is done it adds a record to the
run's log on the store (:mod:`geostream.runs.log`), and says so in a line that reaches the flow. With such a line the
log is read, and new records become task runs with the records' own times. They are sent as the events by which
Prefect's own engine reports its task runs: in the background, so a server that is away holds nothing up.

Flow run, stage and epoch make a task run's id. So no stage is shown twice, however often the training is started again,
and what was recorded while nobody watched is shown by the next try. Stages that another flow run has done are left out.
While an epoch trains, its task run is Running. Where the training ends with an error, the stage that it was in is
Failed, or Crashed if the training can go on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import TracebackType
from uuid import UUID, uuid5

from prefect.client.schemas.objects import State, StateType, TaskRun, TaskRunResult
from prefect.runtime import flow_run, task_run
from prefect.utilities.engine import emit_task_run_state_change_event

from flows.updates import ShownProgress, Updater
from geostream.errors import Interrupted, Stalled, StoreError
from geostream.runs.log import STAGES, Record, RunLog
from geostream.runs.run import LOG, Run
from geostream.settings import TrainSettings

# What a trainer says once it is at work: a stage is done, or the run goes on.
AT_WORK = re.compile(rf"({'|'.join(STAGES)}): |.*: goes on (in|from) epoch ")

Stage = tuple[str, int]  # its name, and the epoch that it belongs to


class ShownStages:
    """Show the stages of a training while the context is open. To be made within the task that trains.

    Args:
        run: the run.
        settings: that it is trained with.
        progress: shows which share of the epochs is trained.
    """

    def __init__(self, run: Run, settings: TrainSettings, progress: ShownProgress) -> None:
        self._run, self._settings, self._progress = run, settings, progress
        self._flow_run, self._task_run = UUID(flow_run.id), UUID(task_run.id)
        self._since: float = flow_run.scheduled_start_time.timestamp()
        self._opened = time.time()
        self._records: list[Record] = []
        self._shown: dict[Stage, float] = {}  # when each that was shown as done has begun
        self._running: Stage | None = None
        self._at_work = False
        self._error: BaseException | None = None
        self._updater = Updater(self._look)

    def __enter__(self) -> ShownStages:
        self._updater.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._error = error
        self._updater.__exit__(kind, error, trace)

    def hear(self, line: str) -> None:
        """Take in a line of the training's log; this returns at once."""
        if AT_WORK.match(line):
            self._at_work = True
            self._updater.wake()

    def _look(self) -> None:
        """Read the run's log, and show what is new in it."""
        error = self._error
        try:
            self._records = RunLog(self._run.folder, LOG).records
        except StoreError:
            if error is None:
                raise
        done = stages_of(self._records)
        for record in self._records:
            stage, started = (record["stage"], record["epoch"]), record.get("started", 0.0)
            if record["stage"] in STAGES and started >= self._since and self._shown.get(stage) != started:
                self._shown[stage] = started
                self._tell(stage, StateType.COMPLETED, started, started + record["seconds"])
        trained = last_trained(done)
        self._progress.show(trained / self._settings.optim.epochs)
        # A stage of this try begins where the one before has ended, and not before the try itself.
        ends = [record["started"] + record["seconds"] for record in self._records if "started" in record]
        now_since = max([self._opened, *ends])
        training = ("train", trained + 1)
        if error is not None:
            self._show_end(done, now_since, error)
        elif self._at_work and ("plan", trained + 1) in done and self._running != training:
            self._running = training
            self._tell(training, StateType.RUNNING, now_since)

    def _show_end(self, done: set[Stage], since: float, error: BaseException) -> None:
        """Show what has become of the stage that was under way; nothing where the training had not come to one."""
        if not self._at_work and (done or not self._run.exists):
            return
        import torch  # the task that trains has imported it by now

        with suppress(StoreError):
            done = done | stages_of(self._run.preparation_log(last_trained(done) + 1).records)
        has_tests = len(self._run.layout.pairs("test")) > 0
        stage = under_way(done, self._settings, has_tests=has_tests, on_gpu=torch.cuda.is_available())
        if stage is not None:
            goes_on = isinstance(error, Interrupted | Stalled | StoreError) or not isinstance(error, Exception)
            said = (str(error) or type(error).__name__).splitlines()[0]
            self._tell(stage, StateType.CRASHED if goes_on else StateType.FAILED, since, time.time(), said)

    def _tell(
        self, stage: Stage, kind: StateType, started: float, ended: float | None = None, message: str | None = None
    ) -> None:
        """Tell the server that a stage runs, or how it has ended; times in seconds since 1970."""
        name, epoch = stage
        when = datetime.fromtimestamp(started if ended is None else ended, UTC)
        one = TaskRun(
            id=uuid5(self._flow_run, f"{name} {epoch}"),
            name=f"epoch {epoch}: {name}",
            flow_run_id=self._flow_run,
            task_key=f"geostream.{name}",
            dynamic_key=str(epoch),
            task_inputs={"__parents__": [TaskRunResult(id=self._task_run)]},
            run_count=1,
            expected_start_time=datetime.fromtimestamp(started, UTC),
            start_time=datetime.fromtimestamp(started, UTC),
            end_time=None if ended is None else when,
            total_run_time=timedelta(seconds=0.0 if ended is None else ended - started),
        )
        state: State[None] = State(type=kind, timestamp=when, message=message)
        emit_task_run_state_change_event(one, initial_state=None, validated_state=state)


def stages_of(records: Sequence[Record]) -> set[Stage]:
    """Return the stages that records are of, as (stage, epoch)."""
    return {(record["stage"], record["epoch"]) for record in records}


def last_trained(done: Collection[Stage]) -> int:
    """Return the last epoch that is trained; 0: none."""
    return max((epoch for stage, epoch in done if stage == "train"), default=0)


def under_way(done: Collection[Stage], settings: TrainSettings, *, has_tests: bool, on_gpu: bool) -> Stage | None:
    """Return the stage that a trainer is in which has done some, in the order of :mod:`geostream.runs.loop`.

    Args:
        done: the stages that are done, by the trainer, or to prepare its next epoch.
        settings: of the run.
        has_tests: whether the layout has test pairs.
        on_gpu: whether the trainer has a GPU, and therefore embeds the training set itself.

    Returns:
        The stage; None where all are done. A reclustering counts as a part of planning.
    """
    from geostream.runs.stages import first_planned_from, mining_due, mining_for  # with torch, which takes seconds

    epoch, epochs = last_trained(done), settings.optim.epochs
    evaluates = has_tests and (epoch == epochs or epoch % settings.evaluate_every == 0)
    if epoch and evaluates and ("evaluate", epoch) not in done:
        return "evaluate", epoch
    embeds = mining_due(epoch, settings) and (on_gpu or settings.plan.mining_lag == 0)
    if epoch and embeds and ("embed", epoch) not in done:
        return "embed", epoch
    if epoch == epochs:
        return None
    if ("plan", epoch + 1) in done:
        return "train", epoch + 1
    mining = mining_for(epoch + 1, settings)
    if mining_due(mining, settings) and first_planned_from(mining, settings) == epoch + 1:
        for stage in ("embed", "mine"):
            if (stage, mining) not in done:
                return stage, mining
    return "plan", epoch + 1
