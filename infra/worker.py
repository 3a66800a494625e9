"""Run a Prefect worker of type "process" that ends gracefully: SIGTERM gives its flow runs time to save what they do.

Prefect's own ``prefect worker start`` kills its flow runs at once when it is stopped, so that a training loses its step
and the flow run stays "Running". This one takes no more work, sends SIGTERM to its flow runs, and waits for them: a
training finishes its step and writes a checkpoint (:mod:`geostream.runs.launch`), and the flow run reports that it has
crashed. The automation "geostream: start crashed trainings again" (:mod:`infra.automations`) then schedules it anew.

``python -m infra.worker`` runs it in the folder it is started in. A second signal does not wait.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
import warnings
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import psutil
from prefect.workers.process import ProcessWorker

from geostream.runs.launch import KILL_TIMEOUT

POOL = "geostream"
DRAIN_TIMEOUT = KILL_TIMEOUT + 15.0  # seconds for the flow runs to end, of which a training takes KILL_TIMEOUT at most
LOOK_EVERY = 0.5  # seconds

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that this class takes the place of Prefect's for its type is meant

    class GracefulWorker(ProcessWorker):
        """Take no more flow runs once ``draining`` is set."""

        draining = False

        async def get_and_submit_flow_runs(self) -> list[Any]:
            """Take the flow runs that are due, unless the worker is about to end."""
            return [] if self.draining else await super().get_and_submit_flow_runs()

        async def drain(self) -> None:
            """Take no more work, send SIGTERM to the flow runs, and wait until they have ended."""
            self.draining = True
            until, told = time.monotonic() + DRAIN_TIMEOUT, set()
            while time.monotonic() < until and (self.limiter.borrowed_tokens or self._submitting_flow_run_ids):
                for child in psutil.Process().children():
                    # Each flow run leads a process group. Until it does, it is not told: it could miss the signal.
                    with suppress(psutil.Error, ProcessLookupError):
                        if child.pid not in told and os.getpgid(child.pid) == child.pid:
                            os.killpg(child.pid, signal.SIGTERM)
                            told.add(child.pid)
                await anyio.sleep(LOOK_EVERY)


async def serve(worker: GracefulWorker, *, with_healthcheck: bool) -> None:
    """Run the worker until SIGTERM or SIGINT.

    Args:
        worker: the worker.
        with_healthcheck: whether it answers on port 8080 whether it still asks for work.
    """
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def hear(number: int) -> None:
        loop.remove_signal_handler(number)  # the next one does not wait
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear, number)

    async with anyio.create_task_group() as tasks:

        async def stop_when_asked() -> None:
            await asked.wait()
            print("Worker stops: its flow runs are asked to save what they do.", flush=True)
            await worker.drain()
            tasks.cancel_scope.cancel()

        tasks.start_soon(stop_when_asked)
        await worker.start(with_healthcheck=with_healthcheck, printer=partial(print, flush=True))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m infra.worker", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default=None, help="the worker's name; default: a random one")
    parser.add_argument("--limit", type=int, default=1, help="flow runs at a time")
    parser.add_argument("--with-healthcheck", action="store_true", help="answer at :8080/health")
    arguments = parser.parse_args()
    worker = GracefulWorker(work_pool_name=POOL, name=arguments.name, limit=arguments.limit)
    asyncio.run(serve(worker, with_healthcheck=arguments.with_healthcheck))


if __name__ == "__main__":
    main()
