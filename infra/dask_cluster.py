"""Start a Dask scheduler and workers on loopback.

A worker is two processes: ``dask worker`` itself, which starts its process for tasks again when that dies, and this
process. Workers end with their scheduler. They have low priority, so that a training on the same machine comes first.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from joblib import cpu_count

from geostream.dask import SCHEDULER_VARIABLE
from geostream.errors import GeostreamError
from infra.process import LOOPBACK, Child, choose_ports, end, port_lock, spawn, wait_until

DEFAULT_PORTS = (8786, 8787)  # of the scheduler and its dashboard
WORKERS = 2
NICE = 10
ATTEMPTS = 3


#: Dask's profiler samples a hundred times a second, and takes a sixth of a core from tasks in Python. Its logs keep the
#: last 1,000 messages of each connection, with the tasks in them.
LEAN = {"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False", "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "1"}


def without_dask(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variable that names a scheduler, which may be another one."""
    return {name: value for name, value in environment.items() if name != SCHEDULER_VARIABLE}


@dataclass(frozen=True)
class DaskCluster:
    """Use and end a running cluster.

    Attributes:
        scheduler: its process.
        ports: of the scheduler and its dashboard.
        folder: absolute path of its folder, for logs and what workers spill.
        workers: their processes.
    """

    scheduler: Child
    ports: list[int]
    folder: str
    workers: list[Child] = field(default_factory=list)

    @property
    def address(self) -> str:
        """URL of the scheduler, for clients and workers."""
        return f"tcp://{LOOPBACK}:{self.ports[0]}"

    @property
    def dashboard(self) -> str:
        """URL of the dashboard, for a browser."""
        return f"http://{LOOPBACK}:{self.ports[1]}/status"

    def environment(self) -> dict[str, str]:
        """Return the variable with which flows and commands find the scheduler."""
        return {SCHEDULER_VARIABLE: self.address}

    def healthy(self) -> bool:
        """Return whether our scheduler answers, not another one on its port."""
        return self.counts() is not None and self.scheduler.listens(self.ports[0])

    def counts(self) -> dict[str, int] | None:
        """Return the scheduler's own counts, of workers among others; None where it does not answer."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"http://{LOOPBACK}:{self.ports[1]}/json/counts.json", timeout=5) as response:
                counts: dict[str, int] = json.load(response)
        except (urllib.error.URLError, OSError, ValueError):
            return None
        return counts

    def complete(self) -> bool:
        """Return whether all workers run."""
        return len(self.workers) == WORKERS and all(worker.running() for worker in self.workers)

    def stop(self) -> None:
        """End workers and scheduler."""
        for child in (*self.workers, self.scheduler):
            end(child)


def start_scheduler(
    folder: Path, *, environment: Mapping[str, str], timeout: float = 120.0, outlive: bool = False
) -> DaskCluster:
    """Start a scheduler, on Dask's default ports if they are free, and return when it answers.

    Args:
        folder: for its log, ``scheduler.log``.
        environment: its variables.
        timeout: seconds that it may take.
        outlive: whether it goes on when this process ends.

    Returns:
        A cluster without workers.

    Raises:
        GeostreamError: it does not come up; the message has the end of its log.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):  # somebody without our lock can still take a port before the scheduler does
        with port_lock():
            ports = choose_ports(DEFAULT_PORTS, use_preferred=attempt == 0)
            command = [
                *(sys.executable, "-m", "distributed.cli.dask_scheduler"),
                *("--host", LOOPBACK, "--port", str(ports[0]), "--dashboard-address", f"{LOOPBACK}:{ports[1]}"),
            ]
            log = folder / "scheduler.log"
            child = spawn(command, environment=without_dask(environment), log=log, folder=folder, outlive=outlive)
            cluster = DaskCluster(child, ports, str(folder))
            try:
                problem = wait_until(cluster.healthy, child, "the local Dask scheduler", timeout)
            except BaseException:
                cluster.stop()
                raise
        if problem is None:
            return cluster
        slow = child.running()
        cluster.stop()
        if slow:
            break
    raise GeostreamError(f"{problem}; its log, {child.log}, ends with:\n{child.log_tail()}")


def start_workers(
    cluster: DaskCluster, *, environment: Mapping[str, str], timeout: float = 120.0, outlive: bool = False
) -> DaskCluster:
    """Start the workers that are missing, and return when the scheduler knows them.

    Args:
        cluster: a running scheduler, with workers or without.
        environment: the variables of the workers, with which they reach the store.
        timeout: seconds that they may take.
        outlive: whether they go on when this process ends.

    Returns:
        The cluster with all of its workers.

    Raises:
        GeostreamError: a worker does not come up; the message has the end of its log.
    """
    folder = Path(cluster.folder)
    kept = [worker for worker in cluster.workers if worker.running()]
    logs = [folder / f"worker-{number}.log" for number in range(WORKERS)]
    free = [log for log in logs if str(log) not in {worker.log for worker in kept}]
    new: list[Child] = []
    for worker in cluster.workers:
        if worker not in kept:
            end(worker)  # what it has left behind
    command = [
        *("nice", "-n", str(NICE), sys.executable, "-m", "distributed.cli.dask_worker", cluster.address),
        *("--host", LOOPBACK, "--dashboard-address", f"{LOOPBACK}:0", "--local-directory", str(folder)),
        *("--nthreads", str(max(1, cpu_count() // WORKERS))),
    ]
    try:
        for log in free:
            log.unlink(missing_ok=True)  # what an earlier worker said must not count for this one
            new.append(spawn(command, environment={**environment, **LEAN}, log=log, folder=folder, outlive=outlive))
        for worker in new:
            problem = wait_until(partial(_registered, worker), worker, "a local Dask worker", timeout)
            if problem is not None:
                raise GeostreamError(f"{problem}; its log, {worker.log}, ends with:\n{worker.log_tail()}")
    except BaseException:
        for worker in new:
            end(worker)
        raise
    return replace(cluster, workers=[*kept, *new])


def _registered(worker: Child) -> bool:
    return "Registered to:" in worker.log_tail(60)
