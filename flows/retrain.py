"""Train on the current layout, evaluate on the test gallery and write the report: the flow ``retrain``.

Its run on the store is named after the time the flow was scheduled for: every schedule trains anew, and a flow run
that is retried goes on from its last checkpoint. The training is done by processes of their own, one for each GPU.
Cancelling the flow run stops them, with a checkpoint (:mod:`geostream.runs.launch`).
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.common import may_pass, open_layout, open_store, show
from geostream.dask import scheduler_url
from geostream.layout import Layout
from geostream.runs.launch import Launch, Ranks
from geostream.runs.log import RunResult
from geostream.settings import TrainSettings, default_settings, make_settings
from geostream.store import Store

if TYPE_CHECKING:
    from geostream.runs.run import Run


@flow(name="retrain", flow_run_name="retrain")
def retrain(
    store: str | None = None,
    dataset: str | None = None,
    layout: str | None = None,
    run: str | None = None,
    settings: dict[str, Any] | None = None,
    cluster: str | None = None,
    processes: int | None = None,
    nodes: int = 1,
    address: str | None = None,
) -> str:
    """Train on a layout, and return the URL of the run on the store.

    Args:
        store: s3://bucket/prefix or a folder. None: $GEOSTREAM_STORE, which `make up` sets for its worker.
        dataset: None: the only one in the store.
        layout: name or tag. None: the one that the run reads; for a new run the dataset's current one.
        run: the run's name; one that exists goes on. None: "retrain-" and the time the flow was scheduled for.
        settings: what differs from the dataset's recipe; without a recipe from Sample4Geo's settings, for a GPU.
        cluster: URL of a Dask scheduler for mining. None: $DASK_SCHEDULER_ADDRESS, which `make up` sets for its worker;
            without it, or with "", in the processes that train.
        processes: how many train together on this machine. None: one for each GPU, or one without a GPU.
        nodes: how many machines train together; on the others start the command of docs/how-to/several-gpus.md.
        address: HOST:PORT at which the other machines reach this one; needed where there are several.
    """
    target = open_store(store)
    ranks = Ranks(processes, nodes, address)
    name = run or f"retrain-{flow_run.scheduled_start_time:%Y%m%d-%H%M%S}"
    opened = open_layout(target, dataset, layout, name)
    numbers = make_settings(default_settings(opened.dataset).flat() | (settings or {}))
    trained = train(target, opened, name, numbers, scheduler_url(cluster), ranks)
    result = write_report(trained)
    show_run(trained, result)
    return result.url


# Worth another try, because the run goes on from its last checkpoint.
@task(
    task_run_name="train {run}",
    retries=3,
    retry_delay_seconds=30,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
)
def train(store: Store, layout: Layout, run: str, settings: TrainSettings, cluster: str | None, ranks: Ranks) -> Run:
    """Train, and log what the ranks log; parameters as in :func:`retrain`, but opened. Return the run."""
    logger = get_run_logger()

    def show_line(line: str) -> None:
        if logger.isEnabledFor(logging.INFO):
            logger.info(line)
        else:  # progress is shown even where the log is quiet
            print(line, file=sys.stderr, flush=True)

    with Launch(store, layout, run, settings, cluster=cluster, ranks=ranks, log=logger.log, show=show_line) as launched:
        # What the report needs takes seconds to import: the same seconds that the ranks take to start.
        import geostream.report.report  # noqa: F401
        from geostream.runs.run import Run

        launched.wait()
    return Run.open(store, layout, run)


@task(retries=2, retry_delay_seconds=10, retry_condition_fn=may_pass, cache_policy=NO_CACHE)
def write_report(run: Run) -> RunResult:
    """Write the run's report to the store, and return the run's result."""
    from geostream.report import report

    result = RunResult.of(run.url, run.log, already_finished=False)
    report.publish(run, result, report.summarise(run.store.url, run.layout, result))
    return result


def show_run(run: Run, result: RunResult) -> None:
    """Show the run's evaluations, plans and reclusterings on the flow run's page."""
    from geostream.report.evaluation_page import results_by_epoch

    rows = results_by_epoch(run.layout, result.evaluations)
    show("evaluation", rows, f"Recall on the test gallery; the report is {result.url}/report.html")
    show("epoch-plans", result.plans, "Hardness: 0 = random batches, 1 = Sample4Geo's with random access to everything")
    if result.reclusterings:
        show("generations", result.reclusterings, "Shards rewritten in the order of similarity, and the scores it gave")
