"""A Dask scheduler and workers as processes: no workers, a wrong environment, killed in the middle of work."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from geostream import dask
from geostream.dask import run_tasks
from geostream.errors import GeostreamError, Refused, Stalled
from geostream.mining import exact
from geostream.mining.graph import NeighbourGraph
from geostream.mining.visual import build_visual_graph
from geostream.store import Store
from infra.dask_cluster import WORKERS, DaskCluster, start_scheduler, start_workers
from infra.process import LOOPBACK, Child, end, spawn
from tests.cities import city
from tests.conftest import ROOT
from tests.mining.test_approximate import K, embed

pytestmark = pytest.mark.slow  # each process takes seconds to start

# Tasks are sent by name, so that scheduler and workers must find this module, as pytest does: from its folder.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """A scheduler without workers."""
    started = start_scheduler(tmp_path_factory.mktemp("dask"), environment=ENVIRONMENT)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def cluster(scheduler: DaskCluster) -> Iterator[DaskCluster]:
    """The same scheduler, with workers."""
    started = start_workers(scheduler, environment=ENVIRONMENT)
    yield started
    for worker in started.workers:
        end(worker)


def double(number: int) -> int:
    return 2 * number


def refuse(url: str) -> None:
    raise Refused(f"{url}: access denied")


def slowly(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def wait_for(ready: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def workers_of(cluster: DaskCluster) -> int:
    return (cluster.counts() or {"workers": 0})["workers"]


def other_worker(cluster: DaskCluster, program: list[str], path: str) -> Child:
    """A worker with a PYTHONPATH of its own, once the scheduler knows it."""
    options = ["--no-nanny", "--host", LOOPBACK, "--dashboard-address", f"{LOOPBACK}:0"]
    command = [sys.executable, *program, cluster.address, *options]
    folder = Path(cluster.folder)
    worker = spawn(command, environment={**ENVIRONMENT, "PYTHONPATH": path}, log=folder / "other.log", folder=folder)
    wait_for(lambda: workers_of(cluster) == 1 or not worker.running())
    assert worker.running(), worker.log_tail()
    return worker


def test_a_scheduler_without_workers_is_refused_soon(scheduler: DaskCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "FIRST_WORKER", 2.0)
    with pytest.raises(Stalled, match=f"{scheduler.address}.* no worker for 2 s"):
        list(run_tasks(scheduler.address, double, [1], "double"))


def test_the_operator_is_told_how_many_workers_are_wanted(tmp_path: Path) -> None:
    """Without Dask's API the autoscaler would speak to the scheduler in the protocol of its own version of Dask."""
    [made, _] = yaml.safe_load_all((ROOT / "infra" / "kubernetes" / "dask.yaml").read_text())
    [container] = made["spec"]["scheduler"]["spec"]["containers"]
    routes = {one["name"]: one["value"] for one in container["env"]}
    started = start_scheduler(tmp_path, environment=ENVIRONMENT | routes)
    try:
        at = started.dashboard.removesuffix("/status")
        asked = httpx.get(f"{at}/api/v1/adaptive_target", trust_env=False, timeout=30)
        assert asked.raise_for_status().json() == {"workers": 0}
        assert httpx.get(f"{at}/health", trust_env=False, timeout=30).text == "ok"
        assert started.counts() is not None
    finally:
        started.stop()


def test_a_scheduler_comes_back_at_its_address(tmp_path: Path, scheduler: DaskCluster) -> None:
    """Also where it was not Dask's usual one, which another scheduler has."""
    first = start_scheduler(tmp_path, environment=ENVIRONMENT)
    assert first.ports != scheduler.ports
    first.stop()
    again = start_scheduler(tmp_path, environment=ENVIRONMENT, ports=first.ports)
    again.stop()
    assert again.address == first.address and again.dashboard == first.dashboard


def test_a_worker_without_geostream_is_named(scheduler: DaskCluster) -> None:
    """Its Python has all packages, but nothing leads it to ours."""
    program = "from distributed.cli.dask_worker import main; main()"
    worker = other_worker(scheduler, ["-S", "-c", program], sysconfig.get_path("purelib"))
    try:
        with pytest.raises(GeostreamError, match=rf"worker tcp://{LOOPBACK}:\d+.*geostream"):
            list(run_tasks(scheduler.address, double, [1], "double"))
    finally:
        end(worker)
    wait_for(lambda: workers_of(scheduler) == 0)


def test_a_worker_with_another_version_is_named(scheduler: DaskCluster, tmp_path: Path) -> None:
    info = tmp_path / "geostream-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: geostream\nVersion: 9.9.9\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    worker = other_worker(scheduler, ["-m", "distributed.cli.dask_worker"], path)
    try:
        with pytest.raises(GeostreamError, match=rf"worker tcp://{LOOPBACK}:\d+.*geostream 9\.9\.9"):
            list(run_tasks(scheduler.address, double, [1], "double"))
    finally:
        end(worker)
    wait_for(lambda: workers_of(scheduler) == 0)


def test_a_worker_that_cannot_reach_the_store_is_named(cluster: DaskCluster) -> None:
    assert cluster.healthy() and cluster.complete() and workers_of(cluster) == WORKERS
    assert sorted(run_tasks(cluster.address, double, [1, 2, 3], "double")) == [2, 4, 6]
    with pytest.raises(Refused, match=rf"s3://bucket: access denied \(on Dask worker tcp://{LOOPBACK}:\d+"):
        list(run_tasks(cluster.address, refuse, ["s3://bucket"], "refuse"))


def test_a_worker_killed_in_the_middle_of_mining_does_no_harm(
    cluster: DaskCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its processes are killed, and nobody starts it again before the graph is done."""
    for name, rows in (("BLOCK", 512), ("QUERIES", 256)):
        monkeypatch.setattr(exact, name, rows)
    root = Store.open(tmp_path)
    layout = city(root, side=34, areas=2)
    run = root.child("run")
    embeddings = embed(run, layout, clusters=12)

    def mined(name: str, url: str | None) -> NeighbourGraph:
        return build_visual_graph(run, name, layout, embeddings, K, url, "exact")

    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: (cluster.counts() or {"memory": 0})["memory"] >= 4)
        for process in cluster.workers[0].family():
            killed.append(process.pid)
            process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    graph = mined("neighbours/killed.zarr", cluster.address)
    killer.join(60)
    assert killed and not cluster.complete()
    calm = mined("neighbours/calm.zarr", None)
    assert np.array_equal(graph.indices, calm.indices) and np.array_equal(graph.scores, calm.scores)
    again = start_workers(cluster, environment=ENVIRONMENT)  # only the one that is missing
    try:
        assert again.complete() and again.workers[0] == cluster.workers[1]
        wait_for(lambda: workers_of(again) == WORKERS)
    finally:
        end(again.workers[1])


def test_work_begins_again_when_the_scheduler_was_restarted(cluster: DaskCluster) -> None:
    running = run_tasks(cluster.address, slowly, [0.0, 600.0], "slow")
    assert next(running) == 0.0
    os.kill(cluster.scheduler.pid, signal.SIGKILL)
    with pytest.raises(Stalled, match=cluster.address):
        next(running)
    with pytest.raises(Stalled, match=cluster.address):  # before it is there again
        list(run_tasks(cluster.address, double, [1], "double"))
    wait_for(lambda: not any(worker.running() for worker in cluster.workers))  # they end with their scheduler
    again = start_scheduler(Path(cluster.folder), environment=ENVIRONMENT)
    try:
        again = start_workers(replace(again, workers=cluster.workers), environment=ENVIRONMENT)
        assert sorted(run_tasks(again.address, double, [1, 2], "double")) == [2, 4]
    finally:
        again.stop()
