"""Rewrite a layout in the order of similarity, as its next generation: the flow ``recluster``.

Run again after a failure it goes on from the shards that are there; run again after success it finds the generation and
writes nothing. Trainings go on undisturbed: the old generation stays until ``geostream layouts prune``.
"""

from __future__ import annotations

from typing import Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from flows.assets import note_asset
from flows.common import layout_committed, link, may_pass, open_layout, open_store, show, title
from flows.parameters import Cluster, Dataset, LayoutName, StoreURL
from flows.updates import progress_of
from geostream.dask import scheduler_url
from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.reclustering.recluster import describe
from geostream.runs import stages
from geostream.runs.log import RunLog
from geostream.runs.run import LOG, Run, run_folder
from geostream.store import Store


@flow(name="recluster", flow_run_name="recluster")
def recluster(
    run: Annotated[str | None, Field(description="whose embeddings say what is alike; none: the newest")] = None,
    store: StoreURL = None,
    dataset: Dataset = None,
    layout: LayoutName = None,
    epoch: Annotated[int | None, Field(ge=1, description="of the embeddings; none: the newest")] = None,
    cluster: Cluster = None,
) -> str:
    """Write the next generation of a layout, and return its name.

    Args:
        run: the run whose embeddings of the training set say what is alike. None: the newest that has some.
        store: s3://bucket/prefix or a folder. None: $GEOSTREAM_STORE, which `make up` sets for its worker.
        dataset: None: the only one in the store.
        layout: name or tag of the layout to begin from. None: the current one.
        epoch: of the embeddings. None: the newest.
        cluster: URL of a Dask scheduler whose workers reach the store. None: $DASK_SCHEDULER_ADDRESS, which `make up`
            sets for its worker; without it, or with "", in the flow's own process.
    """
    target = open_store(store)
    before = open_layout(target, dataset, layout)
    name = run or newest_embedded(target, before.dataset)
    title(f"recluster {before.dataset} {before.name} by {name}")
    after = rewrite(target, before, name, epoch, scheduler_url(cluster))
    link("layout-folder", after.store.url, f"{after.dataset} {after.name}")
    rows = [row | {"id": str(row["id"])[:12]} for row in describe(before, after)]
    show("generations", rows, f"The next generation is at {after.store.url}")
    if after.id != before.id:
        layout_committed(after)
        sources = [before.store.url, run_folder(target, before.dataset, name).url]
        facts = {"id": after.id[:12], "generation": after.generation}
        note_asset(after.store.url, f"{after.dataset} {after.name}", sources, facts)
    return after.name


def newest_embedded(store: Store, dataset: str) -> str:
    """Return the name of the run whose embeddings of the training set are the newest.

    Args:
        store: the root of the store.
        dataset: whose runs are looked at.

    Raises:
        BadInput: no run has embeddings of its training set.
    """
    found = {}
    for name in store.child(dataset).folders("runs"):
        folder = run_folder(store, dataset, name)
        if any(not embedded.startswith("test-") for embedded in folder.folders("embeddings")):
            found[name] = max((record.get("started") or 0 for record in RunLog(folder, LOG).of("embed")), default=0)
    if not found:
        raise BadInput(f"{store.url}/{dataset}: no run has embeddings of its training set yet; train one, or name one")
    return max(found, key=lambda name: (found[name], name))


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
    with progress_of("reclustered shards", "reclustering", f"{layout.dataset} {layout.name}: shards rewritten"):
        return stages.recluster(opened, epoch)
