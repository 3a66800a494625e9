"""Train on the newest layout, evaluate on the test gallery and write the report: the flow ``retrain``.

Its run on the store is named after the time the flow was scheduled for: every schedule trains anew, and a flow run
that is retried goes on from its last checkpoint.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.common import open_layout, open_store, show, store_failed
from geostream.dask import scheduler_url
from geostream.layout import Layout
from geostream.report import report
from geostream.report.evaluation_page import results_by_epoch
from geostream.runs import loop as trainer
from geostream.runs.log import Record, RunResult
from geostream.runs.run import Run
from geostream.settings import TrainSettings, default_settings, make_settings
from geostream.store import Store


@flow(name="retrain", flow_run_name="retrain")
def retrain(
    store: str | None = None,
    dataset: str | None = None,
    layout: str | None = None,
    run: str | None = None,
    settings: dict[str, Any] | None = None,
    cluster: str | None = None,
) -> str:
    """Train on a layout, and return the URL of the run on the store.

    Args:
        store: s3://bucket/prefix or a folder. None: $GEOSTREAM_STORE, which `make up` sets for its worker.
        dataset: None: the only one in the store.
        layout: None: the newest generation.
        run: the run's name; one that exists goes on. None: "retrain-" and the time the flow was scheduled for.
        settings: what differs from the dataset's recipe; without a recipe from Sample4Geo's settings, for a GPU.
        cluster: URL of a Dask scheduler for mining. None: $DASK_SCHEDULER_ADDRESS, which `make up` sets for its worker;
            without it, or with "", in the flow's own process.
    """
    target = open_store(store)
    opened = open_layout(target, dataset, layout)
    numbers = make_settings(default_settings(opened.dataset).flat() | (settings or {}))
    name = run or f"retrain-{flow_run.scheduled_start_time:%Y%m%d-%H%M%S}"
    result = train(target, opened, name, numbers, scheduler_url(cluster))
    write_report(target, opened, name, result)
    show_run(opened, result)
    return result.url


# A store that stumbles is worth another try: the run goes on from its last checkpoint.
@task(
    task_run_name="train {run}",
    retries=3,
    retry_delay_seconds=30,
    retry_condition_fn=store_failed,
    cache_policy=NO_CACHE,
)
def train(store: Store, layout: Layout, run: str, settings: TrainSettings, cluster: str | None) -> RunResult:
    """Train, and log each record of the run; parameters as in :func:`retrain`, but opened."""
    logger = get_run_logger()

    def log(record: Record) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        logger.info("%s: %s", record["stage"], "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    return trainer.train(store, layout, run, settings, cluster=cluster, on_record=log)


@task(retries=2, retry_delay_seconds=10, retry_condition_fn=store_failed, cache_policy=NO_CACHE)
def write_report(store: Store, layout: Layout, run: str, result: RunResult) -> str:
    """Write the run's report to the store, and return the page as HTML."""
    opened = Run.open(store, layout, run)
    return report.publish(opened, result, report.summarise(store.url, opened.layout, result))


def show_run(layout: Layout, result: RunResult) -> None:
    """Show the run's evaluations, plans and reclusterings on the flow run's page."""
    rows = results_by_epoch(layout, result.evaluations)
    show("evaluation", rows, f"Recall on the test gallery; the report is {result.url}/report.html")
    show("epoch-plans", result.plans, "Hardness: 0 = random batches, 1 = Sample4Geo's with random access to everything")
    if result.reclusterings:
        show("generations", result.reclusterings, "Shards rewritten in the order of similarity, and the scores it gave")
