"""The Dask cluster is a URL. Where there is none, one of threads runs within this process.

Threads start in a tenth of a second where processes take seconds, and what the tasks spend their time in (FAISS, NumPy,
object storage) holds no GIL. What that costs is isolation: a task that crashes takes this process with it.
A worker that dies takes the results it held with it; Dask makes these again from their inputs, so every task can run
twice, and gives up on a task that four workers have died of.
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
LOOK_EVERY = 5.0  # seconds between two looks at the scheduler, and that it has to answer one
NO_ANSWER = 120.0  # seconds that a scheduler may be silent
NO_WORKER = 300.0  # seconds that it may be without any worker
ALL_PAUSED = 1800.0  # seconds that all may be paused: they finish the task they have, and take no other
TELL_EVERY = 60.0  # seconds between two lines of the log
COURTESY = 30.0  # seconds for what workers may do or leave undone

logger = logging.getLogger(__name__)


@contextmanager
def connected(url: str | None, tasks: int) -> Iterator[Any]:
    """A ``distributed.Client`` of the scheduler at ``url``, or of a cluster of threads for up to ``tasks`` at once.

    Raises GeostreamError where the scheduler cannot be reached or is lost, or workers die of their task; Stalled where
    no task can be carried out any more.
    """
    from distributed import KilledWorker  # a second to import, which only mining should wait for
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
    """Context manager: looks whether tasks can still be carried out; where not, whoever waits for one is told.

    What Dask does by itself: it ends the waiting when the connection breaks. But a scheduler that is stuck keeps its
    connections, and tasks without a worker wait for one.
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
        # Counted, not read from the clock: who was suspended has waited for nothing.
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
        except Exception:  # of whatever kind: it says that there was no answer
            return "has not answered"
        return "has only workers that are paused" if some else "has no worker"

    def _give_up(self, reason: str) -> None:
        """Close the connection: all that is waited for then fails."""
        self.reason = reason
        with suppress(Exception):
            self._client.sync(self._client._close, fast=True, callback_timeout=CONNECT_SECONDS)


def results(futures: Sequence[Any]) -> Iterator[Any]:
    """Results of the futures, as they come. A task that fails raises here, its own error."""
    from distributed import as_completed

    for future in as_completed(futures):  # type: ignore[no-untyped-call]
        yield future.result()


def run_tasks(url: str | None, work: Callable[[Task], Any], tasks: Sequence[Task]) -> Iterator[Any]:
    """Results of ``work`` on each of ``tasks``, as they come. A task that fails raises here, its own error.

    ``url``: of a Dask scheduler; None starts a cluster of threads. Tasks run again where a worker dies, so they may
    be carried out twice. Raises GeostreamError where the scheduler cannot be reached.
    """
    with connected(url, len(tasks)) as client:
        yield from results(client.map(work, tasks, pure=False))


def everywhere(client: Any, work: Callable[[], Any]) -> None:
    """``work`` in every worker that can be reached, soon. A scheduler that cannot be reached has told so before."""
    with suppress(OSError, RuntimeError, AttributeError, CancelledError):
        client.sync(client._run, work, on_error="ignore", callback_timeout=COURTESY)


def give_back() -> None:
    """Called by tasks that take blocks of memory, first: what the one before freed goes back to the system.

    glibc would keep some 60 MB for each thread. Dask spares its worker processes that by an environment variable,
    which threads within this process cannot have; elsewhere than on glibc nothing happens.
    """
    with suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _client(url: str) -> Any:
    """A client of the scheduler at ``url``. Raises OSError where that does not answer: Dask itself would wait for ever
    for one that takes the connection and is silent.
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
    logging.getLogger("distributed").setLevel(logging.ERROR)  # it tells of every connection, also to others' handlers
    ours = {
        "distributed.worker.profile.enabled": False,  # it samples a hundred times a second
        "distributed.scheduler.worker-ttl": None,  # a program that was suspended would find its only worker removed
    }
    stack.enter_context(config.set(ours))
    local = LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=1,  # of which all threads have one queue: none is idle while another has tasks waiting
        threads_per_worker=max(1, min(cpu_count(), tasks)),
        processes=False,
        memory_limit=0,  # a limit would be compared with the whole process, and pause a worker of a large one for ever
        dashboard_address="127.0.0.1:0",  # the default listens to the whole network
        worker_dashboard_address="127.0.0.1:0",
    )
    return stack.enter_context(Client(stack.enter_context(local)))  # type: ignore[no-untyped-call]
