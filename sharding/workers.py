"""Run one function over many tasks on all cores, and yield the results in the order of the tasks.

Each worker has a few tasks ahead of the result that is waited for, so cores stay busy and few results are held.
Processes are spawned, not forked: a forked child would inherit the threads and locks of obstore and Prefect. Each takes
about a second to start.

Each worker has a pipe of its own, which a thread of this process serves. The pools of the standard library and joblib
have one pipe for the results of all workers: one that is killed while it writes leaves half a message there, and its
reader waits for ever, because the others keep the pipe open.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from geostream.errors import GeostreamError

AHEAD = 3  # tasks a worker that are under way, or whose results wait for their turn
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's names, see mallopt(3)
KEPT = 2**25, 2**27  # bytes: buffers up to the first come from the heap, and so much of it is kept when freed

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Generator[Result, None, None]:
    """Yield ``function`` of each task, in order.

    Args:
        function: a function of a module, so that a worker can import it.
        tasks: what it is called with; taken a few a worker ahead.
        workers: processes; 1: this one.

    Raises:
        GeostreamError: a worker died, or none could be started, as from a script without a main guard.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    leave_a_starting_worker()
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def ask(task: Task) -> Result:
        worker = idle.get()
        try:
            answer: Result = worker.ask(task)
            return answer
        finally:
            idle.put(worker)  # also one that has died: it answers each further task with the same error

    with ExitStack() as stack:
        for _ in range(workers):
            worker = _Worker(function)
            stack.callback(worker.end)
            idle.put(worker)
        threads = ThreadPoolExecutor(workers, thread_name_prefix="geostream-worker")
        stack.callback(threads.shutdown, cancel_futures=True)
        under_way: deque[Future[Result]] = deque()
        for task in tasks:
            under_way.append(threads.submit(ask, task))
            if len(under_way) == AHEAD * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def leave_a_starting_worker() -> None:
    """Exit where this process is a worker that is just starting.

    A spawned worker runs the main script first. Without a main guard it comes here; the parent reports the error.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)


class _Worker:
    """Start a process that calls a function with one task at a time."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(function, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe ends with the process
        self._begun = False

    def ask(self, task: Any) -> Any:
        """Return the function of a task, or raise its error."""
        try:
            self._begun = self._begun or self._pipe.recv()
            self._pipe.send(task)
            result, error = self._pipe.recv()
        except (EOFError, OSError) as gone:
            self._process.join()
            if not self._begun and self._process.exitcode == 1:
                raise GeostreamError(
                    "no worker process could start: each runs the program's main script first. Call this below "
                    'if __name__ == "__main__": in a script file, or with workers=1'
                ) from gone
            raise GeostreamError(
                "a worker process died (killed, or out of memory?); what is finished is kept: run again to go on, with "
                "fewer workers or smaller shards if memory is short"
            ) from gone
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """End the process, which waits for a task."""
        self._pipe.close()
        self._process.join()


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Answer the tasks that come through the pipe; end silently at ctrl-C, and when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _keep_memory()
    with suppress(EOFError, OSError):  # the parent has closed its end
        pipe.send(True)
        while True:
            task = pipe.recv()
            try:
                pipe.send((function(task), None))
            except Exception as error:
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
                pipe.send((None, error))


def _keep_memory() -> None:
    """Have glibc keep freed memory for the next image instead of handing it back; do nothing with other libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT[0])
        mallopt(M_TRIM_THRESHOLD, KEPT[1])
