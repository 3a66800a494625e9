"""Start loader processes, and notice those that can no longer deliver batches.

torch's DataLoader notices a worker that has died. But it waits for ever for a worker that is stopped or stuck, and for
a batch that a worker could not hand over. Here every worker sends a sign of life each second, and a thread of the
trainer looks for it. A batch that can no longer come ends in :class:`Stalled`, an error of one line that says why.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from geostream.errors import Stalled

GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
HEARTBEAT_INTERVAL = 1.0  # seconds between two signs of life of a worker
HEARTBEAT_TIMEOUT = 60.0  # seconds without one, after which the worker is given up
START_TIMEOUT = 300.0  # seconds that workers may take to start, from a cold disk or with a large index
BATCH_TIMEOUT = 3600.0  # seconds that a batch may take, as long as ranks wait for each other
LOG_INTERVAL = 60.0  # seconds of waiting between two lines of the log
MORE_SHARED_MEMORY = (
    "shared memory (/dev/shm) is too small for the batches; give the container more (docker run --shm-size=2g), "
    "or load without worker processes (workers=0)"
)
MORE_FILES = "more files are open than may be; raise the limit (ulimit -n), or use fewer workers"

logger = logging.getLogger(__name__)


class BatchWait:
    """Count the seconds that a batch has been waited for, and log them once a minute.

    They are not read from the clock, so that time in which the program was suspended does not count.
    """

    def __init__(self) -> None:
        self._waited = 0.0

    def ends(self, seconds: float) -> str | None:
        """Count some more seconds of waiting.

        Returns:
            The reason to give up after ``BATCH_TIMEOUT`` seconds, before that None.
        """
        before, self._waited = self._waited, self._waited + seconds
        if before // LOG_INTERVAL < self._waited // LOG_INTERVAL:
            logger.warning("the next batch has been waited for for %.0f s", self._waited)
        if self._waited < BATCH_TIMEOUT:
            return None
        return (
            f"no batch came for {BATCH_TIMEOUT:.0f} s, though its maker is alive; is decoding or augmenting it stuck?"
        )


class Watch:
    """Context manager that watches a DataLoader's workers, and ends them when it is left.

    Args:
        context: The multiprocessing context of the workers.
        workers: How many there are.
    """

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._beats, self.beat = context.Pipe(duplex=False)  # beat: for begin_worker
        self._quiet, self._begun = [0.0] * workers, [False] * workers
        self._batches: Any = None  # torch's iterator
        self._waiting: BatchWait | None = None  # of whoever waits for a batch now
        self._reason = ""  # why the workers were given up
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="geostream-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._batches is not None:
                self._batches._shutdown_workers()  # waits for a thread that only the watch can free
        finally:
            self._done.set()
            self._thread.join()
            self._kill()  # one that is stopped has not ended yet
            self._beats.close()
            self.beat.close()

    def start(self, loader: DataLoader[Any]) -> None:
        """Start the workers of a loader.

        Raises:
            Stalled: They cannot be started.
        """
        try:
            self._batches = iter(loader)
        except (OSError, EOFError) as error:
            reason = self._reason or "the process that starts loader workers has ended; what it said is above"
            raise Stalled(reason) from error

    def take(self) -> Any:
        """Return the next item, or None after the last one.

        Raises:
            Stalled: No item can come any more.
            Exception: Whatever a worker raised.
        """
        self._waiting = BatchWait()
        try:
            return next(self._batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            if not (reason := self._explain(error)):
                raise
            raise Stalled(reason) from error
        finally:
            self._waiting = None

    @property
    def _processes(self) -> Sequence[BaseProcess]:
        return () if self._batches is None else self._batches._workers

    def _look(self) -> None:
        starting = 0.0
        while not self._done.wait(HEARTBEAT_INTERVAL):
            for worker, quiet in enumerate(self._quiet):
                self._quiet[worker] = quiet + HEARTBEAT_INTERVAL
            while self._beats.poll():
                worker = int.from_bytes(self._beats.recv_bytes(), "little")
                self._quiet[worker], self._begun[worker] = 0.0, True
            if self._reason:
                continue
            if self._batches is None:
                starting += HEARTBEAT_INTERVAL
                if starting > START_TIMEOUT:
                    self._reason = f"loader workers could not be started within {START_TIMEOUT:.0f} s"
                    _kill_forkserver()
                continue
            for process, quiet, begun in zip(self._processes, self._quiet, self._begun, strict=True):
                limit = HEARTBEAT_TIMEOUT if begun else START_TIMEOUT
                if quiet > limit and not wait([process.sentinel], 0):  # one that has ended is torch's to notice
                    self._give_up(f"loader worker {process.pid} has given no sign of life for {limit:.0f} s")
            if (waited := self._waiting) and (reason := waited.ends(HEARTBEAT_INTERVAL)):
                self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        """End all workers, so that whatever torch waits for fails."""
        self._reason = reason
        self._kill()
        # torch would wait for the rest of half a message as long as any process could still write it.
        self._batches._worker_result_queue._writer.close()

    def _kill(self) -> None:
        for process in self._processes:
            if not wait([process.sentinel], 0):  # it has not ended, so its number is still its own
                process.kill()

    def _explain(self, error: BaseException) -> str:
        """Return in words what an error of torch's means; "" for one that a worker raised."""
        text = str(error)
        if text.startswith("Caught "):
            return ""
        if self._reason:
            return self._reason
        if isinstance(error, OSError | EOFError):  # a worker has died while it handed something over
            wait([process.sentinel for process in self._processes], 2.0)
        gone = [process for process in self._processes if process.exitcode or str(process.pid) in text]
        if gone and (isinstance(error, OSError | EOFError) or "exited unexpectedly" in text):
            return f"loader worker {gone[0].pid} {_ended(gone[0].exitcode)}"
        return MORE_FILES if "Too many open files" in text else ""


def _ended(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "was killed; if memory was short, use fewer workers or smaller batches"
    if code == -signal.SIGBUS:
        return f"died of a bus error: {MORE_SHARED_MEMORY}"
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code} before its work was done; what it said is above"


def start_forkserver() -> None:
    """Start the process that loader workers are forked from, with signals to the process group blocked.

    Only the trainer ends loading; Ctrl-C in its terminal must not end the workers first.
    """
    resource_tracker.ensure_running()  # now, because it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_forkserver() -> None:
    process = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if process is not None:
        os.kill(process, signal.SIGKILL)


def begin_worker(environment: dict[str, str], beat: Connection, worker: int) -> None:
    """Set up a new worker: give it the trainer's environment, send signs of life, and end it with the trainer.

    The fork server does none of this. It keeps the environment that it was started with. And as it is the worker's
    parent, torch's own watchdog would not notice that the trainer was killed.

    Args:
        environment: The trainer's environment variables.
        beat: Where the worker sends its number as a sign of life.
        worker: Number of the worker.
    """
    os.setsid()  # leave the trainer's process group, so that signals to it do not end the worker
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    os.environ.clear()
    os.environ.update(environment)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        with suppress(OSError):  # nobody listens any more
            while trainer.is_alive():
                beat.send_bytes(worker.to_bytes(4, "little"))
                trainer.join(HEARTBEAT_INTERVAL)
        os._exit(1)

    threading.Thread(target=watch, name="geostream-watch", daemon=True).start()


def enter_worker(as_items: bool) -> None:
    """Prepare a loader worker for its first batch: unblock signals, and report batches that cannot be handed over.

    Python's queue drops a batch that it cannot send, and the trainer would wait for it for ever. From now on an error
    is sent in its place.

    Args:
        as_items: Send the error itself, for a reader that raises it; otherwise send it in torch's wrapper.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)  # a plain DataLoader may have our fork server's workers

    def instead(queue: Any, error: Exception, item: Any) -> None:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], int)):  # another queue's
            _show(error)
            return
        number, made = item
        if isinstance(made, Stalled) or getattr(made, "exc_type", None) is Stalled:  # not even the error can be sent
            _show(error)
            os._exit(1)
        told = Stalled(f"a loader worker cannot hand over a batch: {_cause(error)}")
        wrap: Any = ExceptionWrapper
        # First in the queue, in place of the batch: behind the mark of the end it would be ignored.
        queue._sem.acquire()
        queue._buffer.appendleft(
            (number, told if as_items else wrap((Stalled, told, None), "in a DataLoader worker")),
        )

    Queue._on_queue_feeder_error = instead  # type: ignore[attr-defined]


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "Too many open files" in text:
        return MORE_FILES
    if any(part in text for part in ("shared memory", "</torch_", "No space left")):
        return f"{MORE_SHARED_MEMORY} ({text})"
    _show(error)
    return text


def _show(error: Exception) -> None:
    with suppress(OSError, ValueError):  # standard error may be full or closed
        traceback.print_exception(error)
