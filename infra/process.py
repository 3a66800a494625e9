"""Child processes that are ended by their own id, and never outlive their purpose unnoticed.

Decides that every server is started with a random mark in its environment: whatever it forks inherits the mark, so
ending the server ends its offspring too, also what lost its parent, and nothing else. A child is known by pid *and*
start time, because pids are reused. The cost: Unix only, and one look at this user's processes when something ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from secrets import token_hex
from tempfile import gettempdir

import psutil

LOOPBACK = "127.0.0.1"
# Below the range from which Linux takes the ports of outgoing connections (32768–60999).
PORTS = range(20_000, 32_000)
MARK = "GEOSTREAM_CHILD"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Child:
    """A process that we started: ``started`` is its start time in seconds since the epoch, ``log`` its output."""

    pid: int
    started: float
    mark: str
    log: str

    def running(self) -> bool:
        """Whether the very process that was started still runs (not another under its pid, not a zombie)."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and _is_live(process)
        except psutil.NoSuchProcess:
            return False

    def family(self) -> list[psutil.Process]:
        """Every live process that descends from this child, itself included."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    found.update([process, *process.children(recursive=True)])
        return [process for process in found if _is_live(process)]

    def listens(self, port: int) -> bool:
        """Whether it is this child, not some other server, that listens on the port."""
        for process in self.family():
            with suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                        return True
        return False

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of its output."""
        try:
            return "\n".join(Path(self.log).read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""


def spawn(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    folder: Path | None = None,
    outlive: bool = False,
) -> Child:
    """Start ``command`` in a session of its own, its output appended to ``log``.

    Unless ``outlive``, Linux ends it when this process dies, however hard. That signal is bound to the thread that
    starts the child, so it is asked for from the main thread only: another may end long before the process does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = token_hex(8)
    tied = not outlive and sys.platform == "linux" and threading.current_thread() is threading.main_thread()
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            env={**environment, MARK: mark},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent() if tied else None,
        )
    # Reaps the child when it ends, so that it is never left a zombie, and costs nothing while it runs.
    threading.Thread(target=process.wait, daemon=True).start()
    try:
        started = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        started = 0.0  # gone already: running() says so, and the caller shows the log
    return Child(process.pid, started, mark, str(log))


def _die_with_parent() -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl  # looked up here: little is safe to do between fork and exec
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we could ask
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def _is_live(process: psutil.Process) -> bool:
    """Not gone, and no zombie: nobody may ever collect those whose parent does not care."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(child: Child, grace: float = 15.0) -> None:
    """End the child and all its offspring: SIGTERM, and SIGKILL to what is left after ``grace`` seconds."""
    for sign, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        family = child.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(sign)
        deadline = time.monotonic() + patience
        while any(map(_is_live, family)) and time.monotonic() < deadline:
            time.sleep(0.05)


def wait_until(ready: Callable[[], bool], child: Child, what: str, timeout: float) -> str | None:
    """Poll until ``ready``; returns None, or one line that says why not (the child ended, or took too long)."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not child.running():
            return f"{what} ended while starting"
        if ready():
            return None
        time.sleep(0.05)
    return f"{what} was not ready within {timeout:.0f} s"


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count as taken
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def choose_ports(preferred: Sequence[int], *, use_preferred: bool = True) -> list[int]:
    """The preferred ports if all are free, else as many others that are. Hold ``port_lock`` until they are bound."""
    if use_preferred and all(is_free(port) for port in preferred):
        return list(preferred)
    chosen: list[int] = []
    for port in SystemRandom().sample(PORTS, len(PORTS)):
        if len(chosen) == len(preferred):
            break
        if is_free(port):
            chosen.append(port)
    return chosen


@contextmanager
def port_lock() -> Iterator[None]:
    """One server of this user chooses and binds its ports at a time: several starting at once do not collide."""
    with Path(gettempdir(), f"geostream-ports-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
