"""Run one function over many tasks on all cores, and yield the results in the order of the tasks.

Each worker has a few tasks ahead of the result that is waited for, so cores stay busy and few results are held.
Processes are spawned, not forked: a forked child would inherit the threads and locks of obstore and Prefect. Each takes
about a second to start.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import TypeVar

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
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(begun,)) as pool:
        under_way: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                under_way.append(pool.submit(function, task))
                if len(under_way) == AHEAD * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            if not begun.is_set():
                raise GeostreamError(
                    "no worker process could start: each runs the program's main script first. Call this below "
                    'if __name__ == "__main__": in a script file, or with workers=1'
                ) from error
            raise GeostreamError(
                "a worker process died (killed, or out of memory?); what is finished is kept: run again to go on, with "
                "fewer workers or smaller shards if memory is short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def leave_a_starting_worker() -> None:
    """Exit where this process is a worker that is just starting.

    A spawned worker runs the main script first. Without a main guard it comes here; the parent reports the error.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)


def _start(begun: Event) -> None:
    """Say that a worker has started; end it silently at ctrl-C, and when its parent is killed."""
    begun.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _keep_memory()


def _keep_memory() -> None:
    """Have glibc keep freed memory for the next image instead of handing it back; do nothing with other libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT[0])
        mallopt(M_TRIM_THRESHOLD, KEPT[1])
