"""What the flows share: where the store is, what is worth a retry, how results show on Prefect's pages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import Task, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from geostream.errors import BadInput, StoreError
from geostream.layout import Layout
from geostream.layout import open_layout as open_stored
from geostream.store import Store


def open_store(url: str | None) -> Store:
    """The store at ``url``, or at $GEOSTREAM_STORE, which ``make up`` sets for its worker."""
    url = url or os.environ.get("GEOSTREAM_STORE")
    if not url:
        raise BadInput("no store: give the parameter store (s3://bucket/prefix or a folder), or set GEOSTREAM_STORE")
    return Store.open(url)


def store_failed(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a task failed for the object store's sake: bad input stays bad, and a defect a defect."""
    return isinstance(state.result(raise_on_failure=False), StoreError)


@task(retries=2, retry_delay_seconds=10, retry_condition_fn=store_failed, cache_policy=NO_CACHE)
def open_layout(store: Store, dataset: str | None, layout: str | None) -> Layout:
    """A flow's layout: of the only dataset where None is named, the newest generation where no layout is."""
    return open_stored(store, dataset, layout)


def show(key: str, rows: Sequence[Mapping[str, object]], description: str) -> None:
    """A table on the flow run's page; ``key``: small letters and hyphens."""
    create_table_artifact(key=key, table=[dict(row) for row in rows], description=description)
