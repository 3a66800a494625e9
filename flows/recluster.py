"""Rewrite a layout in the order of similarity, as its next generation: the flow ``recluster``.

Run again after a failure it goes on from the shards that are there; run again after success it finds the generation and
writes nothing. Trainings go on undisturbed: the old generation stays until ``geostream layouts prune``.
"""

from __future__ import annotations

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.common import may_pass, open_layout, open_store, show
from geostream.dask import scheduler_url
from geostream.layout import Layout
from geostream.reclustering.recluster import describe
from geostream.runs import stages
from geostream.runs.run import Run
from geostream.store import Store


@flow(name="recluster", flow_run_name="recluster {run}")
def recluster(
    run: str,
    store: str | None = None,
    dataset: str | None = None,
    layout: str | None = None,
    epoch: int | None = None,
    cluster: str | None = None,
) -> str:
    """Write the next generation of a layout, and return its name.

    Args:
        run: the run whose embeddings of the training set say what is alike.
        store: s3://bucket/prefix or a folder. None: $GEOSTREAM_STORE, which `make up` sets for its worker.
        dataset: None: the only one in the store.
        layout: name or tag of the layout to begin from. None: the current one.
        epoch: of the embeddings. None: the newest.
        cluster: URL of a Dask scheduler whose workers reach the store. None: $DASK_SCHEDULER_ADDRESS, which `make up`
            sets for its worker; without it, or with "", in the flow's own process.
    """
    target = open_store(store)
    before = open_layout(target, dataset, layout)
    after = rewrite(target, before, run, epoch, scheduler_url(cluster))
    show("generations", describe(before, after), f"The next generation is at {after.store.url}")
    return after.name


# A store that stumbles is worth another try: the shards that are there are kept.
@task(
    task_run_name="recluster {run}",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
)
def rewrite(store: Store, layout: Layout, run: str, epoch: int | None, cluster: str | None) -> Layout:
    """Write the next generation; parameters as in :func:`recluster`, but opened."""
    opened = Run(store, layout, run, cluster)
    opened.settings = opened.settings_or_recipe()
    return stages.recluster(opened, epoch)
