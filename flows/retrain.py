"""Train on the current layout, compare with the current model, promote what is no worse: the flow ``retrain``.

A new run begins from the current model with a shorter schedule, where there is a model. At its end both are evaluated
on the same test gallery. The new one becomes current if it is no worse (:mod:`geostream.runs.promotion`).

Its run on the store is named after the flow run: the time it was scheduled for, and the end of its id. So every
schedule trains anew, two that begin in one second do not meet, and a flow run that is started again goes on from its
last checkpoint under the same name. The training is done by processes of their own, one for each GPU. Stopping the flow
run, by cancelling it or by SIGTERM, stops them with a checkpoint (:mod:`geostream.runs.launch`).

One training of a data set runs at a time: a second one waits for Prefect's concurrency limit ``train …``, which is
made at the first training and may be set to another number on the server.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID
from zlib import crc32

from prefect import Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows.common import may_pass, open_layout, open_store, title
from flows.parameters import Cluster, Dataset, LayoutName, Settings, StoreURL, given
from flows.stages import ShownStages
from flows.training_page import note_assets, show_run, tell_decision, tell_stalled
from flows.tries import GivenUp, begin_try
from flows.updates import ShownProgress
from geostream.dask import scheduler_url
from geostream.layout import Layout
from geostream.runs.launch import Launch, Ranks
from geostream.runs.lease import RunHeld
from geostream.runs.log import RunResult
from geostream.runs.models import Model, current_model
from geostream.runs.run import Run, run_folder
from geostream.settings import TrainSettings, default_settings, make_settings, warm_settings
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints, read_position

if TYPE_CHECKING:
    from geostream.runs.promotion import Decision

RETRIES = 1000  # the end of tries without progress is flows.tries.MOST; this one is never reached
RETRY_DELAY = 30.0  # seconds
SLOT_LEASE = 60.0  # seconds without a sign of life, after which a training's place in the queue is free again

logger = logging.getLogger(__name__)


@flow(name="retrain", flow_run_name="retrain")
def retrain(
    store: StoreURL = None,
    dataset: Dataset = None,
    layout: LayoutName = None,
    run: Annotated[str | None, Field(description="one that exists goes on; none: named after the flow run")] = None,
    recipe: Annotated[str | None, Field(description="of geostream/recipes; none: the dataset's own")] = None,
    settings: Settings | None = None,
    warm_start: Annotated[bool, Field(description="begin a new run from the current model")] = True,
    promote: Annotated[bool, Field(description="make the result the current model if it is no worse")] = True,
    cluster: Cluster = None,
    processes: Annotated[int | None, Field(ge=1, description="on this machine; none: one for each GPU")] = None,
    nodes: Annotated[int, Field(ge=1, description="machines that train together")] = 1,
    address: Annotated[str | None, Field(description="HOST:PORT of this machine, for the others")] = None,
) -> Any:
    """Train on a layout, and return the URL of the run on the store.

    Args:
        store: s3://bucket/prefix or a folder. None: $GEOSTREAM_STORE, which `make up` sets for its worker.
        dataset: None: the only one in the store.
        layout: name or tag. None: the one that the run reads; for a new run the dataset's current one.
        run: the run's name; one that exists goes on. None: "retrain-", the time the flow was scheduled for, and the end
            of the flow run's id.
        recipe: name of the recipe that a new run is trained by. None: the dataset's own; without one, Sample4Geo's
            settings, for a GPU.
        settings: what differs from the recipe. Of a run that goes on: from its own settings.
        warm_start: begin a new run from the current model, where there is one, with a shorter schedule
            (:func:`geostream.settings.warm_settings`). False: as the recipe says.
        promote: compare the run's best checkpoint with the current model, and make it current if it is no worse. False:
            the current model stays, and nothing is compared.
        cluster: URL of a Dask scheduler for mining, planning, reclustering and evaluating. None:
            $DASK_SCHEDULER_ADDRESS, which `make up` sets for its worker; without it, or with "", in the flow's own
            processes.
        processes: how many train together on this machine. None: one for each GPU, or one without a GPU.
        nodes: how many machines train together; on the others start the command of docs/how-to/several-gpus.md.
        address: HOST:PORT at which the other machines reach this one; needed where there are several.
    """
    if was_cancelled():
        return Cancelled(message="It was cancelled before it crashed, and is not started again.")
    target = open_store(store)
    ranks = Ranks(processes, nodes, address)
    name = run or run_name()
    opened = open_layout(target, dataset, layout, name)
    numbers = choose_settings(target, opened, name, given(settings), recipe, warm_start=warm_start)
    title(f"retrain {opened.dataset} {opened.name}: {name}")
    with one_at_a_time(opened):
        done_before = finished(run_folder(target, opened.dataset, name), numbers)
        trained = train(target, opened, name, numbers, scheduler_url(cluster), ranks)
    model = None
    if promote:
        decision, model = compare_and_promote(trained)
        tell_decision(trained, decision)
    result = write_report(trained)
    show_run(trained, result)
    note_assets(opened, trained, model)
    if done_before:
        said = (
            f"{name} was finished before, after {numbers.optim.epochs} epochs: nothing was trained. For a new training "
            "leave out the parameter run; for more epochs of this one set settings.epochs"
        )
        get_run_logger().warning(said)
        return Completed(message=said, data=result.url)
    return result.url


def choose_settings(
    store: Store, layout: Layout, run: str, given: dict[str, Any], recipe: str | None, *, warm_start: bool
) -> TrainSettings:
    """Return a run's settings: its own if it exists, else the recipe's, shortened if it begins from a model.

    Args:
        store: the root of the store.
        layout: of the data set.
        run: the run's name.
        given: what differs.
        recipe: name of the recipe; None: the data set's own.
        warm_start: begin a new run from the current model, if there is one.

    Raises:
        BadInput: a setting has a wrong name or value, or there is no such recipe.
    """
    existing = Run(store, layout, run)
    base = default_settings(layout.dataset, recipe)
    if existing.exists:
        base = existing.settings
    else:
        model = current_model(store, layout.dataset) if warm_start and "weights" not in given else None
        if model is not None:
            get_run_logger().info("begins from model %d (run %s)", model.number, model.run)
            base = warm_settings(base, layout.dataset, recipe)
    return make_settings(base.flat() | given)


def was_cancelled() -> bool:
    """Return whether somebody asked to cancel this flow run, and it crashed before it was stopped."""
    if (flow_run.run_count or 1) < 2:
        return False
    with get_client(sync_client=True) as client:
        states = sorted(client.read_flow_run_states(UUID(flow_run.id)), key=lambda state: state.timestamp)
    names = [state.name for state in states]
    crashed = len(names) - names[::-1].index("Crashed") - 1 if "Crashed" in names else 0
    return crashed > 0 and names[crashed - 1] == "Cancelling" and "Cancelled" not in names[crashed:]


def run_name() -> str:
    """Return the run's name for this flow run: the same whenever it is started again, and no other flow run's."""
    # The end of the id is random in every version of UUIDs; the beginning may be a time.
    return f"retrain-{flow_run.scheduled_start_time:%Y%m%d-%H%M%S}-{str(flow_run.id)[-8:]}"


@contextmanager
def one_at_a_time(layout: Layout) -> Iterator[None]:
    """Wait until no other flow run trains on the data set, and hold others off while the context is open."""
    name = limit_name(layout.store.url.removesuffix(f"/layouts/{layout.name}"))
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another flow run was faster
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        else:
            if limit.active_slots >= limit.limit and not others_train(client):
                # A server that lost its memory would keep the place of a training that is gone for ever.
                client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=0))
            elif limit.active_slots >= limit.limit:
                get_run_logger().info("waits: another training of %s is under way (limit %s)", layout.dataset, name)
    with hold_slot(name):
        yield


def limit_name(dataset: str) -> str:
    """Return the name of the concurrency limit of the data set at a URL.

    Prefect refuses some characters. The checksum tells data sets apart that differ in these alone.
    """
    return f"{re.sub('[^A-Za-z0-9.-]+', '-', f'train {dataset}')}-{crc32(dataset.encode()):08x}"


@contextmanager
def hold_slot(name: str) -> Iterator[None]:
    """Wait for a place at a concurrency limit, and hold it while the context is open.

    A server that does not answer for a while, as a busy one on SQLite, is asked again for as long as it takes.
    """
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(concurrency(name, occupy=1, lease_duration=SLOT_LEASE))
                break
            except ConcurrencySlotAcquisitionError as error:
                logger.warning("%s; asking again in %.0f s", error, RETRY_DELAY)
                time.sleep(RETRY_DELAY)
        yield


def others_train(client: SyncPrefectClient) -> bool:
    """Return whether another flow run of this flow is under way."""
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING]))
    under_way = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"])),
        flow_run_filter=FlowRunFilter(state=states),
    )
    return any(str(one.id) != flow_run.id for one in under_way)


@task(
    task_run_name="look what is trained",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
)
def finished(run: Store, settings: TrainSettings) -> bool:
    """Return whether the run in a folder has trained all epochs that are asked for."""
    names = list_checkpoints(run)
    position = read_position(run, names[-1]) if names else None
    return position is not None and position.finished and position.epoch >= settings.optim.epochs


def may_go_on(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Tell Prefect whether a training may go on from its checkpoint: also where a dead holder seems to live still."""
    restarted = isinstance(state.result(raise_on_failure=False), RunHeld) and (flow_run.run_count or 1) > 1
    return restarted or may_pass(task, run, state)


@task(
    task_run_name="train {run}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY,
    retry_condition_fn=may_go_on,
    cache_policy=NO_CACHE,
)
def train(store: Store, layout: Layout, run: str, settings: TrainSettings, cluster: str | None, ranks: Ranks) -> Run:
    """Train, and log what the ranks log; parameters as in :func:`retrain`, but opened. Return the run."""
    run_logger = get_run_logger()
    folder = run_folder(store, layout.dataset, run)
    try:
        begin_try(folder)
    except GivenUp as error:
        tell_stalled(layout, run, str(error))
        raise
    opened = Run(store, layout, run)
    progress = ShownProgress("training", f"of {settings.optim.epochs} epochs: {run}")
    with progress, ShownStages(opened, settings, progress) as stages:

        def log(level: int, line: str, fields: Mapping[str, Any]) -> None:
            run_logger.log(level, line, extra={"fields": fields})
            stages.hear(line)

        def show_line(line: str) -> None:
            if run_logger.isEnabledFor(logging.INFO):
                run_logger.info(line)
            else:  # progress is shown even where the log is quiet
                print(line, file=sys.stderr, flush=True)

        with Launch(store, layout, run, settings, cluster=cluster, ranks=ranks, log=log, show=show_line) as launched:
            # What the report needs takes seconds to import: the same seconds that the ranks take to start.
            import geostream.report.report  # noqa: F401

            launched.wait()
    return Run.open(store, layout, run, cluster)


@task(
    task_run_name="compare {run.name}",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
)
def compare_and_promote(run: Run) -> tuple[Decision | None, Model | None]:
    """Compare the run's best checkpoint with the current model, and promote it if it is no worse.

    Returns:
        The decision, None where the layout has no test queries to compare on; and the model if it was promoted.
    """
    from geostream.runs.promotion import promote_if_no_worse  # with the network, which took seconds to import

    if not len(run.layout.pairs("test")):
        get_run_logger().warning("layout %s has no test queries: nothing is compared, or promoted", run.layout.name)
        return None, None
    decision, model = promote_if_no_worse(run)
    get_run_logger().info(decision.rule)
    return decision, model


@task(
    task_run_name="write report",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
)
def write_report(run: Run) -> RunResult:
    """Write the run's report to the store, and return the run's result."""
    from geostream.report import report

    result = RunResult.of(run.url, run.log, already_finished=False)
    report.publish(run, result, report.summarise(run.store.url, run.layout, result))
    return result
