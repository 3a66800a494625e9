"""Share what all flows need: open the store, decide on retries, show results on its pages, tell of layouts.

Importing it makes the lines that Prefect shows of a flow run JSON, where ``GEOSTREAM_LOG`` asks for that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import Task, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.events import emit_event
from prefect.logging.configuration import ensure_logging_setup
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.runtime import flow_run

from geostream.errors import BadInput, Stalled, StoreError
from geostream.layout import Layout
from geostream.layout import open_layout as open_stored
from geostream.progress import JsonLines, json_wanted
from geostream.store import Store

if json_wanted():
    ensure_logging_setup()
    for _handler in logging.getLogger().handlers:
        if isinstance(_handler, PrefectConsoleHandler):
            _handler.setFormatter(JsonLines())


def open_store(url: str | None) -> Store:
    """Return the store at a URL.

    Args:
        url: s3://bucket/prefix or a folder. None: $GEOSTREAM_STORE, which ``make up`` sets for its worker.

    Raises:
        BadInput: neither is given, or the URL is malformed.
    """
    url = url or os.environ.get("GEOSTREAM_STORE")
    if not url:
        raise BadInput("no store: give the parameter store (s3://bucket/prefix or a folder), or set GEOSTREAM_STORE")
    return Store.open(url)


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Tell Prefect whether a task failed for a reason that may pass: the store, Dask, or a process that is gone."""
    return isinstance(state.result(raise_on_failure=False), StoreError | Stalled)


@task(
    task_run_name="open layout",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
)
def open_layout(store: Store, dataset: str | None, layout: str | None, run: str | None = None) -> Layout:
    """Open the layout that a flow works on.

    Args:
        store: the root of the store.
        dataset: None: the only one in the store.
        layout: name or tag. None: the one that the run reads, or the current one.
        run: name of the run that the flow goes on with, if it does.

    Raises:
        LayoutNotCommitted: there is no such layout.
        BadInput: several data sets or layouts could be meant.
    """
    if run is None:
        return open_stored(store, dataset, layout)
    from geostream.runs.run import Run  # takes seconds, which other flows need not wait

    return Run.find(store, dataset, layout, run).layout


def title(text: str) -> None:
    """Rename the flow run, so that lists of them say what each is about; best with data set, layout and run."""
    if flow_run.id:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=text)


def link(key: str, url: str, text: str) -> None:
    """Show a link on the flow run's page.

    Args:
        key: the link's name, of small letters and hyphens.
        url: where it leads.
        text: what is shown.
    """
    create_link_artifact(key=key, link=url, link_text=text, description=url)


def percent(share: float | None) -> str:
    """Return a share as a person reads it: "83.1 %"; "" for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def layout_committed(layout: Layout) -> None:
    """Emit the event ``geostream.layout.committed``, which an automation may start a training on."""
    emit_event(
        event="geostream.layout.committed",
        resource={
            "prefect.resource.id": f"geostream.dataset.{layout.dataset}",
            "prefect.resource.name": f"{layout.dataset} {layout.name}",
            "geostream.store": layout.store.url.removesuffix(f"/{layout.dataset}/layouts/{layout.name}"),
            "geostream.dataset": layout.dataset,
            "geostream.layout": layout.name,
        },
        payload={"id": layout.id[:12], "places": layout.n_places},
    )


def show(key: str, rows: Sequence[Mapping[str, object]], description: str) -> None:
    """Show a table on the flow run's page.

    Args:
        key: the table's name, of small letters and hyphens.
        rows: all with the same columns.
        description: Markdown above the table.
    """
    create_table_artifact(key=key, table=[dict(row) for row in rows], description=description)
