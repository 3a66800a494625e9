"""A run whose stages are Dask tasks: workers or scheduler are killed in the middle, and it ends as if they had not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from geostream.errors import Stalled
from geostream.layout import open_layout
from geostream.runs.loop import train
from geostream.store import Store
from infra.dask_cluster import DaskCluster, start_scheduler, start_workers
from tests.helpers import tiny_layout
from tests.runs.test_ranks_of_a_run import EMBEDDED, SETTINGS, alone, assert_same_run
from tests.training.ranks import environment

__all__ = ["alone"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def on_s3(store: Store) -> Store:
    tiny_layout(store, places=24, test_places=8, views=2, view_size=(32, 64))
    return store


def with_workers(scheduler: DaskCluster, killed: Path, victim: int, at: str) -> DaskCluster:
    """The cluster with workers that kill ``victim``, or themselves (0), in each stage whose name begins with ``at``."""
    killed.mkdir(exist_ok=True)
    preload = json.dumps([str(Path(__file__).with_name("dask_killer.py"))])
    faults = {"DASK_DISTRIBUTED__WORKER__PRELOAD": preload, "KILLED": str(killed), "VICTIM": str(victim), "AT": at}
    return start_workers(scheduler, environment=environment(**faults))


def test_a_worker_killed_in_each_stage_changes_nothing(s3_store: Store, alone: Store, tmp_path: Path) -> None:
    store, killed = on_s3(s3_store), tmp_path / "killed"
    cluster = start_scheduler(tmp_path / "dask", environment=environment())
    try:
        cluster = with_workers(cluster, killed, 0, "")
        train(store, open_layout(store), "one", SETTINGS, cluster=cluster.address)
    finally:
        cluster.stop()
    stages = {path.name for path in killed.iterdir()}
    for stage in ("gps", "mine", "plan", "recluster", "rewrite", "evaluate"):
        assert any(name.startswith(stage) for name in stages), stages
    assert_same_run(store, alone, EMBEDDED)


@pytest.mark.parametrize("stage", ["plan", "mine", "rewrite"])
def test_a_run_goes_on_when_the_scheduler_is_back(s3_store: Store, alone: Store, tmp_path: Path, stage: str) -> None:
    store, killed = on_s3(s3_store), tmp_path / "killed"
    cluster = start_scheduler(tmp_path / "dask", environment=environment())
    try:
        cluster = with_workers(cluster, killed, cluster.scheduler.pid, stage)
        with pytest.raises(Stalled, match=cluster.address):
            train(store, open_layout(store), "one", SETTINGS, cluster=cluster.address)
        assert [path.name.startswith(stage) for path in killed.iterdir()] == [True]
        before = cluster
        before.stop()
        cluster = start_scheduler(tmp_path / "dask", environment=environment(), ports=before.ports)
        assert cluster.address == before.address  # whoever knows it finds it again
        cluster = with_workers(replace(cluster, workers=[]), killed, 0, "nothing")
        train(store, open_layout(store), "one", SETTINGS, cluster=cluster.address)
    finally:
        cluster.stop()
    assert_same_run(store, alone, EMBEDDED)
