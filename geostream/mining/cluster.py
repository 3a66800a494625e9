"""The Dask cluster is a URL. Where there is none, one of threads runs within this process.

Threads start in a tenth of a second where processes take seconds, and what the tasks spend their time in (FAISS, NumPy,
object storage) holds no GIL. What that costs is isolation: a task that crashes takes this process with it.
A worker that dies takes the results it held with it; Dask makes these again from their inputs, so every task can run
twice, and gives up on a task that four workers have died of.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from geostream.cores import usable_cores
from geostream.errors import GeostreamError

Task = TypeVar("Task")

CONNECT_SECONDS = 20
LOOK_EVERY = 30.0  # seconds without a result, after which one looks whether there are workers
NO_WORKER = 300.0  # seconds that a scheduler may be without any

logger = logging.getLogger(__name__)


@contextmanager
def connected(url: str | None, tasks: int) -> Iterator[Any]:
    """A ``distributed.Client`` of the scheduler at ``url``, or of a cluster of threads for up to ``tasks`` at once.

    Raises GeostreamError where the scheduler cannot be reached.
    """
    with ExitStack() as stack:
        yield _connect(stack, url, tasks)


def results(futures: Sequence[Any]) -> Iterator[Any]:
    """Results of the futures, as they come. A task that fails raises here, its own error."""
    from distributed import KilledWorker, wait  # a second to import, which only mining should wait for

    pending, idle = set(futures), 0.0
    try:
        while pending:
            try:
                done, pending = wait(pending, timeout=LOOK_EVERY, return_when="FIRST_COMPLETED")  # type: ignore[no-untyped-call]
            except TimeoutError:
                idle = _check_workers(next(iter(pending)).client, idle)
                continue
            idle = 0.0
            for future in done:
                yield future.result()
    except CancelledError as error:
        raise GeostreamError("Dask: the scheduler is gone, and the work with it; start it again") from error
    except KilledWorker as error:
        raise GeostreamError(
            f"Dask: workers died again and again ({str(error).splitlines()[0]}); give them more memory"
        ) from error


def _check_workers(client: Any, idle: float) -> float:
    """Seconds that there has been no worker. Raises GeostreamError where that is too long, or the scheduler is gone."""
    address = client.scheduler.address if client.scheduler else "unknown"
    if client.status != "running":
        raise GeostreamError(f"Dask scheduler {address}: the connection is lost; is it up?")
    if client.scheduler_info(n_workers=-1)["workers"]:
        return 0.0
    idle += LOOK_EVERY
    if idle >= NO_WORKER:
        raise GeostreamError(f"Dask scheduler {address}: it has had no worker for {idle:.0f} s; start some")
    logger.warning("Dask scheduler %s: waiting for a worker", address)
    return idle


def run_tasks(url: str | None, work: Callable[[Task], Any], tasks: Sequence[Task]) -> Iterator[Any]:
    """Results of ``work`` on each of ``tasks``, as they come. A task that fails raises here, its own error.

    ``url``: of a Dask scheduler; None starts a cluster of threads. Tasks run again where a worker dies, so they may
    be carried out twice. Raises GeostreamError where the scheduler cannot be reached.
    """
    with connected(url, len(tasks)) as client:
        yield from results(client.map(work, tasks, pure=False))


def everywhere(client: Any, work: Callable[[], Any]) -> None:
    """``work`` in every worker that can be reached. A scheduler that cannot be reached has told so before."""
    with suppress(OSError, RuntimeError):
        client.run(work, on_error="ignore")


def give_back() -> None:
    """Called by tasks that take blocks of memory, first: what the one before freed goes back to the system.

    glibc would keep some 60 MB for each thread. Dask spares its worker processes that by an environment variable,
    which threads within this process cannot have; elsewhere than on glibc nothing happens.
    """
    with suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _connect(stack: ExitStack, url: str | None, tasks: int) -> Any:
    from dask import config
    from distributed import Client, LocalCluster

    if url is not None:
        try:
            return stack.enter_context(Client(url, timeout=CONNECT_SECONDS))  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise GeostreamError(f"Dask scheduler {url}: cannot connect; is it up, and the URL right?") from error
    logging.getLogger("distributed").setLevel(logging.ERROR)  # it tells of every connection, also to others' handlers
    stack.enter_context(config.set({"distributed.worker.profile.enabled": False}))  # samples a hundred times a second
    local = LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=1,  # of which all threads have one queue: none is idle while another has tasks waiting
        threads_per_worker=max(1, min(usable_cores(), tasks)),
        processes=False,
        memory_limit=0,  # a limit would be compared with the whole process, and pause a worker of a large one for ever
        dashboard_address="127.0.0.1:0",  # the default listens to the whole network
        worker_dashboard_address="127.0.0.1:0",
    )
    return stack.enter_context(Client(stack.enter_context(local)))  # type: ignore[no-untyped-call]
