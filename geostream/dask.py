"""Run tasks on a Dask cluster: the one at a URL, or without a URL a cluster of threads in this process.

Threads start in a tenth of a second where processes take seconds, and the tasks spend their time in code that releases
the GIL (FAISS, NumPy, object storage). The cost is isolation: a task that crashes ends this process, too. When a worker
of a cluster dies, its results are lost and Dask makes them again from their inputs. So every task may run twice. Dask
gives up on a task after four workers have died while running it.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar

from joblib import cpu_count

from geostream.errors import GeostreamError, Stalled

Task = TypeVar("Task")

CONNECT_SECONDS = 20
LOOK_EVERY = 5.0  # seconds between two questions to the scheduler, and the longest wait for an answer
NO_ANSWER = 120.0  # seconds that a scheduler may be silent
NO_WORKER = 300.0  # seconds that it may be without any worker
ALL_PAUSED = 1800.0  # seconds that all workers may be paused; a paused worker finishes its task and takes no other
TELL_EVERY = 60.0  # seconds between two lines of the log
COURTESY = 30.0  # seconds for clean-up in the workers, which is not essential

logger = logging.getLogger(__name__)


@contextmanager
def connected(url: str | None, tasks: int) -> Iterator[Any]:
    """Connect to a Dask cluster, and turn its failures within the context into errors of one line.

    Args:
        url: URL of a scheduler; None starts a cluster of threads in this process.
        tasks: How many tasks there are; no more threads are started.

    Yields:
        A ``distributed.Client``.

    Raises:
        GeostreamError: The scheduler cannot be reached, or workers die again and again while running a task.
        Stalled: The scheduler is lost, or no task can be carried out any more.
    """
    from distributed import KilledWorker  # imported here because it takes a second
    from distributed.comm.core import CommClosedError

    with ExitStack() as stack:
        client = _connect(stack, url, tasks)
        watch = stack.enter_context(_Watch(client, url or "in this process"))
        try:
            yield client
        except KilledWorker as error:
            raise GeostreamError(
                f"Dask: workers died again and again ({str(error).splitlines()[0]}); give them more memory"
            ) from error
        except (CancelledError, CommClosedError) as error:
            reason = watch.reason or "it is gone, and the work with it; start it again"
            raise Stalled(f"Dask scheduler {watch.name}: {reason}") from error


class _Watch:
    """Context manager that checks whether tasks can still be carried out, and ends the waiting for them if not.

    Dask itself ends the waiting only when the connection breaks. But a scheduler that is stuck keeps its connections,
    and tasks without a worker wait for one.
    """

    def __init__(self, client: Any, name: str) -> None:
        self.name = name
        self.reason = ""  # why nothing can come any more
        self._client = client
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="geostream-dask", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        # Counted, not read from the clock: time in which the process was suspended does not count.
        waits = {"has not answered": 0.0, "has no worker": 0.0, "has only workers that are paused": 0.0}
        limits = dict(zip(waits, (NO_ANSWER, NO_WORKER, ALL_PAUSED), strict=True))
        while not self._done.wait(LOOK_EVERY):
            state = self._state()
            passed = 2 * LOOK_EVERY if state == "has not answered" else LOOK_EVERY
            for what, waited in waits.items():
                waits[what] = waited + passed if what == state else 0.0
                if waited // TELL_EVERY < waits[what] // TELL_EVERY:
                    logger.warning("Dask scheduler %s %s for %.0f s", self.name, what, waits[what])
                if waits[what] >= limits[what]:
                    self._give_up(f"it {what} for {waits[what]:.0f} s; see to it, and start this again")
                    return

    def _state(self) -> str | None:
        client = self._client
        try:
            if client.sync(client.scheduler.ncores_running, callback_timeout=LOOK_EVERY):
                return None
            some = client.sync(client.scheduler.ncores, callback_timeout=LOOK_EVERY)
        except Exception:  # any error here means that no answer came
            return "has not answered"
        return "has only workers that are paused" if some else "has no worker"

    def _give_up(self, reason: str) -> None:
        """Close the connection, so that whatever waits for a result fails."""
        self.reason = reason
        with suppress(Exception):
            self._client.sync(self._client._close, fast=True, callback_timeout=CONNECT_SECONDS)


def results(futures: Sequence[Any]) -> Iterator[Any]:
    """Yield the results of futures, in the order in which they are done; raise the error of a task that failed."""
    from distributed import as_completed

    for future in as_completed(futures):  # type: ignore[no-untyped-call]
        yield future.result()


def run_tasks(url: str | None, work: Callable[[Task], Any], tasks: Sequence[Task]) -> Iterator[Any]:
    """Run tasks on a cluster, and yield their results in the order in which they are done.

    Args:
        url: URL of a Dask scheduler; None starts a cluster of threads in this process.
        work: Called with each task. It may be called twice for one, because tasks run again where a worker dies.
        tasks: The arguments of ``work``.

    Raises:
        GeostreamError: The scheduler cannot be reached or is lost.
        Exception: Whatever ``work`` raised.
    """
    with connected(url, len(tasks)) as client:
        yield from results(client.map(work, tasks, pure=False))


def everywhere(client: Any, work: Callable[[], Any]) -> None:
    """Call ``work`` in every worker that can be reached within ``COURTESY`` seconds; ignore the others."""
    with suppress(OSError, RuntimeError, AttributeError, CancelledError):
        client.sync(client._run, work, on_error="ignore", callback_timeout=COURTESY)


def give_back() -> None:
    """Give freed memory back to the operating system. Tasks that use large blocks of memory call this first.

    The C library glibc would keep about 60 MB for each thread. Dask prevents that in its worker processes by an
    environment variable, which cannot be set for threads of this process. With another C library, nothing happens.
    """
    with suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _client(url: str) -> Any:
    """Return a client of the scheduler at ``url``; raise OSError where it does not answer.

    Dask itself would wait for ever for a scheduler that accepts the connection and is silent.
    """
    from distributed import Client

    made: Future[Any] = Future()

    def connect() -> None:
        try:
            made.set_result(Client(url, timeout=CONNECT_SECONDS))  # type: ignore[no-untyped-call]
        except BaseException as error:  # for whoever waits
            made.set_exception(error)

    threading.Thread(target=connect, name="geostream-dask", daemon=True).start()
    return made.result(2 * CONNECT_SECONDS)


def _connect(stack: ExitStack, url: str | None, tasks: int) -> Any:
    from dask import config
    from distributed import Client, LocalCluster

    if url is not None:
        try:
            return stack.enter_context(_client(url))
        except (OSError, ValueError) as error:
            raise GeostreamError(f"Dask scheduler {url}: cannot connect; is it up, and the URL right?") from error
    logging.getLogger("distributed").setLevel(logging.ERROR)  # it logs every connection
    ours = {
        "distributed.worker.profile.enabled": False,  # it samples a hundred times a second
        "distributed.scheduler.worker-ttl": None,  # else the only worker is removed while the program is suspended
    }
    stack.enter_context(config.set(ours))
    local = LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=1,  # all threads share its queue, so none is idle while tasks wait for another
        threads_per_worker=max(1, min(cpu_count(), tasks)),
        processes=False,
        memory_limit=0,  # a limit counts the whole process, and would pause the worker of a large one for ever
        dashboard_address="127.0.0.1:0",  # the default listens to the whole network
        worker_dashboard_address="127.0.0.1:0",
    )
    return stack.enter_context(Client(stack.enter_context(local)))  # type: ignore[no-untyped-call]
