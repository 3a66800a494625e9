"""Run the processes of :mod:`geostream.runs.launch`: a trainer alone, or torch's elastic launcher and its ranks.

Started with the work as its only argument, it trains alone or becomes the launcher, which starts it again for each
rank, with its own process id as a second argument. What is said on standard output are lines of JSON for whoever
started all this; ``print`` goes to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from geostream import errors
from geostream.errors import GeostreamError
from geostream.runs.launch import END_TIMEOUT, MODULE, signal_name
from geostream.runs.reports import report, report_log_lines, take_standard_output

LOOK_EVERY = 1.0  # seconds between two looks of a rank whether its launcher lives
KILL_AFTER = 5.0  # seconds that the launcher has to kill ranks, once their time is over


def main() -> None:
    """Do the work that the arguments name, as a rank or as what trains alone or starts the ranks."""
    work = json.loads(sys.argv[1])
    if len(sys.argv) > 2:
        launcher = int(sys.argv[2])
        _end_after(lambda: _wait_for_end_of(launcher), END_TIMEOUT)
        from geostream.training.distributed import ProcessGroup

        _train(work, ProcessGroup.current)
        return
    _end_after(_wait_for_end_of_input, END_TIMEOUT + KILL_AFTER)
    import torch  # only now: it takes seconds, in which the input may end

    from geostream.training.distributed import ProcessGroup

    nodes, address = work["ranks"]["nodes"], work["ranks"]["address"]
    processes = work["ranks"]["processes"] or max(1, torch.cuda.device_count())
    if nodes * processes == 1:
        _train(work, ProcessGroup)
    else:
        _launch(processes, nodes, address)


def _launch(processes: int, nodes: int, address: str | None) -> None:
    """Start the ranks of this machine, as ``torchrun`` does, and wait for them."""
    from joblib import cpu_count
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # in this process: what its ranks do and die of is reported below
    # torchrun's own choice is one thread, whatever the machine.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", f"{END_TIMEOUT:.0f}")
    words = ["--nproc-per-node", str(processes)]
    if nodes == 1:
        words += ["--standalone"]
    else:
        host, _, port = str(address).rpartition(":")
        words += ["--nnodes", str(nodes), "--node-rank", "0", "--master-addr", host, "--master-port", port]
    try:
        arguments: Any = parse_args([*words, "-m", "--", MODULE, sys.argv[1], str(os.getpid())])  # type: ignore[no-untyped-call]
        run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # One that was killed makes others fail within the same second; those that are then ended get a SIGTERM.
        killed = {of: one for of, one in error.failures.items() if one.exitcode < 0 and one.exitcode != -signal.SIGTERM}
        if failure.exitcode >= 0 and killed:
            rank, failure = next(iter(killed.items()))
        if failure.exitcode < 0:
            text = f"rank {rank} was ended by {signal_name(-failure.exitcode)}; the run can go on from its checkpoint"
            report(sys.stdout.fileno(), error=text, kind=errors.Stalled.__name__, trace="")
        sys.exit(max(1, failure.exitcode))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except DistError as error:
        text = f"{nodes} machines did not meet at {address}: {str(error).splitlines()[0]}"
        report(sys.stdout.fileno(), error=text, kind=errors.Stalled.__name__, trace="")
        sys.exit(1)


def _train(work: dict[str, Any], new_group: Callable[[], Any]) -> None:
    """Train the run as one rank, and report what is logged and what goes wrong."""
    channel = take_standard_output()
    report(channel, pid=os.getpid())
    report_log_lines(channel)
    try:
        _train_as(work, new_group)
    except GeostreamError as error:
        report(channel, error=str(error), kind=errors.kind(error), trace="")
        sys.exit(1)
    except Exception as error:
        text = f"{type(error).__name__}: {error}; the log has the traceback"
        report(channel, error=text, kind="", trace=traceback.format_exc())
        sys.exit(1)


def _train_as(work: dict[str, Any], new_group: Callable[[], Any]) -> None:
    from geostream.layout import open_layout
    from geostream.runs.loop import train
    from geostream.settings import make_settings
    from geostream.store import Store

    with new_group() as group:
        store = Store.open(work["store"])
        layout = open_layout(store, work["dataset"], work["layout"])
        settings = make_settings(work["settings"])
        train(store, layout, work["run"], settings, cluster=work["cluster"], group=group)


def _end_after(wait: Callable[[], None], timeout: float) -> None:
    """Stop this process when ``wait`` has returned, as SIGTERM does, and kill it ``timeout`` seconds later."""

    def end() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(timeout)
        os._exit(1)

    threading.Thread(target=end, name="geostream-end", daemon=True).start()


def _wait_for_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass


def _wait_for_end_of(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(LOOK_EVERY)


if __name__ == "__main__":
    main()
