"""Ranks as real processes on the CPU: by torchrun, or without it where seconds count."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from infra.process import LOOPBACK
from tests.conftest import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RUN_PROGRAM = str(ROOT / "tests" / "runs" / "run_program.py")
TOLD = "geostream: "  # how a command begins the line of an error


def environment(**more: str) -> dict[str, str]:
    """This process's, with the checkout to import from, one thread for each rank and no GPU."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def start_ranks(command: list[str], ranks: int = 2) -> list[subprocess.Popen[str]]:
    """The Python program ``command`` on each rank, without torchrun; stdout and stderr in one pipe."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(
                RANK=str(rank),
                WORLD_SIZE=str(ranks),
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR=LOOPBACK,
                MASTER_PORT=str(port),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Until something is so; a process that ends before it, or the time, is an error."""
    until = time.monotonic() + timeout
    while not ready():
        assert process.poll() is None and time.monotonic() < until, f"exit code {process.poll()}"
        time.sleep(0.02)


def ended(processes: list[subprocess.Popen[str]], timeout: float = 120) -> tuple[list[int], list[str]]:
    """Exit codes and output of all, when they have ended; none outlives this."""
    try:
        output = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], output


def torchrun(*command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """``command`` on two ranks, to its end; stdout and stderr in one."""
    return subprocess.run(
        [*TORCHRUN, *command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
