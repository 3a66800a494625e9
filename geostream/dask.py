"""Run tasks on a Dask cluster: the one at a URL, or without a URL a cluster of threads in this process.

Threads start in a tenth of a second where processes take seconds, and the tasks spend their time in code that releases
the GIL (FAISS, NumPy, object storage). The cost is isolation: a task that crashes ends this process, too. When a worker
of a cluster dies, its results are lost and Dask makes them again from their inputs. So every task may run twice. Dask
gives up on a task after four workers have died while running it.

Whatever fails for want of scheduler or workers is :class:`~geostream.errors.Stalled`, because the same work may succeed
later. Whatever fails on a worker says on which one.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import call
from secrets import token_hex
from types import TracebackType
from typing import Any, TypeVar

from geostream.errors import BadInput, GeostreamError, Stalled

Task = TypeVar("Task")

#: Names the scheduler to use where none is given. ``make up`` sets it, and Dask's own commands read it, too.
SCHEDULER_VARIABLE = "DASK_SCHEDULER_ADDRESS"
#: Packages whose versions must be the same everywhere: tasks and results are sent between them.
SAME_VERSION = ("geostream", "dask", "distributed", "numpy", "zarr", "obstore", "pyarrow")
#: Modules that a task may import.
NEEDED = ("faiss", "numpy", "obstore", "pyarrow", "sklearn", "zarr")

CONNECT_SECONDS = 20
FIRST_WORKER = 30.0  # seconds that a scheduler may be without any worker when work begins
LOOK_EVERY = 5.0  # seconds between two questions to the scheduler, and the longest wait for an answer
NO_ANSWER = 120.0  # seconds that a scheduler may be silent
NO_WORKER = 300.0  # seconds that it may be without any worker later on
ALL_PAUSED = 1800.0  # seconds that all workers may be paused; a paused worker finishes its task and takes no other
TELL_EVERY = 60.0  # seconds between two lines of the log
AHEAD = 2  # tasks for each thread of the workers that are sent before one is done
#: How many of the last messages each connection keeps, with the tasks in them; Dask's default of 1,000 is all of ours.
MESSAGES_KEPT = "distributed.admin.low-level-log-length"
COURTESY = 30.0  # seconds for clean-up in the workers, which is not essential

logger = logging.getLogger(__name__)


def scheduler_url(given: str | None) -> str | None:
    """Return the URL of the Dask scheduler to use; None for threads of this process.

    Args:
        given: What the user gave. None: what $DASK_SCHEDULER_ADDRESS says. "": threads of this process in any case.
    """
    return (os.environ.get(SCHEDULER_VARIABLE) if given is None else given) or None


@contextmanager
def connected(url: str | None, tasks: int) -> Iterator[Any]:
    """Connect to a Dask cluster, and turn its failures within the context into errors of one line.

    Args:
        url: URL of a scheduler; None starts a cluster of threads in this process.
        tasks: How many tasks there are; no more threads are started.

    Yields:
        A ``distributed.Client``.

    Raises:
        BadInput: The URL is none.
        Stalled: The scheduler cannot be reached or is lost, it has no worker, no task can be carried out any more, or
            workers die again and again while running a task.
        GeostreamError: The scheduler or a worker lacks a package, or has other versions than this process.
    """
    from distributed import KilledWorker  # imported here because it takes a second
    from distributed.client import ClosedClientError
    from distributed.comm.core import CommClosedError

    with ExitStack() as stack:
        client = _connect(stack, url, tasks)
        if url is not None:
            _wait_for_worker(client, url)
            _check_environments(client, url)
        watch = stack.enter_context(_Watch(client, url or "in this process"))
        try:
            yield client
        except KilledWorker as error:
            if url is not None:
                _check_environments(client, url)  # a worker that came later may die of what it cannot load
            raise Stalled(
                f"Dask: workers died again and again ({str(error).splitlines()[0]}); give them more memory"
            ) from error
        except (CancelledError, CommClosedError, ClosedClientError) as error:
            reason = watch.reason or "it is gone, and the work with it; start it again"
            raise Stalled(f"Dask scheduler {watch.name}: {reason}") from error
        except (ImportError, AttributeError, RuntimeError):  # what loading a task may raise
            if url is not None:
                _check_environments(client, url)
            raise


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
            state = _state(self._client)
            passed = 2 * LOOK_EVERY if state == "has not answered" else LOOK_EVERY
            for what, waited in waits.items():
                waits[what] = waited + passed if what == state else 0.0
                if waited // TELL_EVERY < waits[what] // TELL_EVERY:
                    logger.warning("Dask scheduler %s %s for %.0f s", self.name, what, waits[what])
                if waits[what] >= limits[what]:
                    self._give_up(f"it {what} for {waits[what]:.0f} s; see to it, and start this again")
                    return

    def _give_up(self, reason: str) -> None:
        """Close the connection, so that whatever waits for a result fails."""
        self.reason = reason
        with suppress(Exception):
            self._client.sync(self._client._close, fast=True, callback_timeout=CONNECT_SECONDS)


def _state(client: Any) -> str | None:
    """Ask the scheduler whether it can carry out tasks; return None, or what is in the way."""
    try:
        if client.sync(client.scheduler.ncores_running, callback_timeout=LOOK_EVERY):
            return None
        some = client.sync(client.scheduler.ncores, callback_timeout=LOOK_EVERY)
    except Exception:  # any error here means that no answer came
        return "has not answered"
    return "has only workers that are paused" if some else "has no worker"


def _wait_for_worker(client: Any, url: str) -> None:
    """Wait until the scheduler has a worker; raise Stalled after FIRST_WORKER seconds without."""
    began = time.monotonic()
    while (state := _state(client)) in ("has not answered", "has no worker"):
        limit = FIRST_WORKER if state == "has no worker" else NO_ANSWER
        if time.monotonic() - began >= limit:
            raise Stalled(
                f"Dask scheduler {url}: it {state} for {limit:.0f} s; start workers (dask worker {url}), then this"
            )
        time.sleep(0.1)


def versions() -> dict[str, str]:
    """Return the versions that must be the same everywhere; raise ImportError where a package is missing.

    The scheduler and the workers call it, too, and without geostream they cannot even load it.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python} | {name: importlib.metadata.version(name) for name in SAME_VERSION}


def worker_versions() -> dict[str, str]:
    """Return the same for a worker; raise ImportError also where it lacks a module that a task may import."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:  # nothing is imported, since workers answer nothing meanwhile
            raise ModuleNotFoundError(f"No module named {name!r}")
    return versions()


def _check_environments(client: Any, url: str) -> None:
    """Raise GeostreamError where the scheduler or a worker cannot run our tasks, and say which one and why.

    Whoever does not answer is passed over: it may have ended, which is noticed elsewhere.
    """
    answers: dict[str, Any] = {}
    try:
        answers[f"scheduler {url}"] = client.sync(client._run_on_scheduler, versions, callback_timeout=COURTESY)
    except (OSError, CancelledError):
        pass
    except Exception as error:  # of any kind, because it comes from loading our code there
        answers[f"scheduler {url}"] = error
    with suppress(OSError, CancelledError):
        found = client.sync(client._run, worker_versions, on_error="return", callback_timeout=COURTESY)
        answers |= {f"worker {address}": answer for address, answer in found.items()}
    ours = versions()
    for where, answer in answers.items():
        if isinstance(answer, Exception) and not isinstance(answer, OSError):
            raise _wrong_environment(where, answer) from answer
        theirs = ours if isinstance(answer, OSError) else answer
        if other := [f"{name} {theirs[name]}, not {mine}" for name, mine in ours.items() if theirs[name] != mine]:
            raise GeostreamError(f"Dask {where}: other versions than here ({'; '.join(other)}); install the same")


def _wrong_environment(where: str, error: BaseException) -> GeostreamError:
    return GeostreamError(
        f"Dask {where}: cannot load what geostream's tasks need ({error}); install there what is here"
    )


def on_worker(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run as a task: call ``work``, and let its errors say on which worker of the cluster they happened."""
    try:
        return work(*arguments)
    except Exception as error:
        from distributed import get_worker

        address = get_worker().address
        if address.startswith("inproc"):  # a thread of this process
            raise
        where = f"worker {address} on {socket.gethostname()}"
        if isinstance(error, ImportError):
            raise _wrong_environment(where, error) from error
        if isinstance(error, GeostreamError):
            error.args = (f"{error} (on Dask {where})", *error.args[1:])
        else:
            error.add_note(f"on Dask {where}")
        raise


def submit(client: Any, name: str, work: Callable[..., Any], *arguments: Any, priority: int = 0) -> Any:
    """Submit one task under a name.

    Args:
        client: A Dask client.
        name: Stage and part, such as ``mine-block-12``. The dashboard shows it, and takes the tasks of a stage together
            by what is before the number. Something random is added: of two tasks of one name Dask would run one.
        work: What the task calls.
        arguments: Its arguments; futures among them are replaced by their results.
        priority: Dask's priority of the task.

    Returns:
        A future of the result.
    """
    key = f"{name}-{token_hex(4)}"
    return client.submit(on_worker, work, *arguments, key=key, pure=False, priority=priority)


def results(futures: Sequence[Any]) -> Iterator[Any]:
    """Yield the results of futures, in the order in which they are done; raise the error of a task that failed."""
    from distributed import as_completed

    for future in as_completed(futures):  # type: ignore[no-untyped-call]
        yield future.result()


def run_tasks(url: str | None, work: Callable[[Task], Any], tasks: Sequence[Task], stage: str) -> Iterator[Any]:
    """Run tasks on a cluster, and yield their results in the order in which they are done.

    Only a few tasks for each thread are made and sent before one is done (``AHEAD``), so they may be large.

    Args:
        url: URL of a Dask scheduler; None starts a cluster of threads in this process.
        work: Called with each task. It may be called twice for one, because tasks run again where a worker dies.
        tasks: The arguments of ``work``.
        stage: What the tasks are, such as ``plan-lane``; on Dask's dashboard the first is then ``plan-lane-0``.

    Raises:
        Stalled: The scheduler cannot be reached or is lost, or has no workers.
        GeostreamError: The scheduler or a worker lacks a package, or has other versions than this process.
        Exception: Whatever ``work`` raised.
    """
    with connected(url, len(tasks)) as client:
        yield from in_turn(client, stage, call, _hidden(work, tasks))


@contextmanager
def shared_connection(url: str, stage: str) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]]:
    """Connect once to a cluster for several calls of the function that is yielded, which runs tasks as ``map`` does.

    It connects at the first call, and again only where the scheduler was gone for long between two calls.

    Args:
        url: URL of a Dask scheduler.
        stage: What all tasks are for, such as ``plan``; those of ``make_lane`` are then ``plan-make-lane-0``
            and so on.

    Yields:
        A function of work and tasks, as those of :func:`run_tasks`, that returns an iterator over the results.

    Raises:
        Stalled: As by :func:`run_tasks`; so are the other errors.
    """
    with ExitStack() as stack:
        client: Any = None

        def apply(work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
            nonlocal client
            if client is None or client.status == "closed":
                stack.close()
                client = stack.enter_context(connected(url, len(tasks)))
            name = getattr(work, "func", work).__name__.replace("_", "-")  # a partial function has none of its own
            return in_turn(client, f"{stage}-{name}", call, _hidden(work, tasks))

        yield apply


def in_turn(client: Any, name: str, work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Run tasks, few at a time, so that those to come are not held; yield results in the order in which they are done.

    Args:
        client: A Dask client.
        name: What the tasks are called; a number is added.
        work: Called with each task.
        tasks: The arguments of ``work``; futures among them are replaced by their results.
    """
    from distributed import as_completed

    running: Any = as_completed(loop=client.loop)  # type: ignore[no-untyped-call]
    threads = 1
    for number, task in enumerate(tasks):
        if running.count() >= AHEAD * threads:
            threads = _threads(client, threads)  # workers come and go
        if running.count() >= AHEAD * threads:
            yield next(running).result()
        running.add(submit(client, f"{name}-{number}", work, *task))
    for future in running:
        yield future.result()


def _hidden(work: Callable[[Task], Any], tasks: Iterable[Task]) -> Iterator[tuple[Callable[[], Any]]]:
    """Hide each task in a partial function from Dask, which would look for futures in it."""
    return ((partial(work, task),) for task in tasks)


def _threads(client: Any, before: int) -> int:
    """Return how many threads the workers have, one at least; ``before`` if the scheduler does not answer."""
    with suppress(Exception):  # any error here means that no answer came
        return max(1, int(sum(client.sync(client.scheduler.ncores, callback_timeout=LOOK_EVERY).values())))
    return before


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
    from dask import config
    from distributed import Client

    made: Future[Any] = Future()

    def connect() -> None:
        try:
            with config.set({MESSAGES_KEPT: 1}):
                made.set_result(Client(url, timeout=CONNECT_SECONDS))  # type: ignore[no-untyped-call]
        except BaseException as error:  # for whoever waits
            made.set_exception(error)

    threading.Thread(target=connect, name="geostream-dask", daemon=True).start()
    return made.result(2 * CONNECT_SECONDS)


def _check_url(url: str) -> None:
    """Raise BadInput where no client can be made for the URL.

    Dask would find it out in the middle of making one. What is left of that can block a later client for ever.
    """
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.comm.registry import get_backend
    from distributed.security import Security

    try:
        scheme, where = parse_address(url)
        get_backend(scheme)
        if scheme in ("tcp", "tls") and not 0 < parse_host_port(where)[1] < 2**16:
            raise ValueError("no such port")
        security: Any = Security()  # type: ignore[no-untyped-call]
        if scheme == "tls" and security.get_connection_args("client")["ssl_context"] is None:
            raise ValueError("Dask's configuration names no certificates")
    except (ValueError, TypeError, ImportError) as error:
        raise BadInput(
            f"Dask scheduler {url}: not a URL that can be connected to ({error}); it looks like tcp://host:8786"
        ) from error


def _connect(stack: ExitStack, url: str | None, tasks: int) -> Any:
    from dask import config
    from distributed import Client, LocalCluster
    from joblib import cpu_count

    if url is not None:
        _check_url(url)
        try:
            return stack.enter_context(_client(url))
        except OSError as error:
            raise Stalled(f"Dask scheduler {url}: cannot connect ({error}); is it up, and the URL right?") from error
    logging.getLogger("distributed").setLevel(logging.ERROR)  # it logs every connection
    ours = {
        "distributed.worker.profile.enabled": False,  # it samples a hundred times a second
        MESSAGES_KEPT: 1,
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
