"""Start servers as child processes, and end them with all their offspring.

Every child gets a random mark in its environment, which all that it forks inherits. So ending the child ends its
offspring, too, even what lost its parent, and nothing else. A child is known by pid *and* start time, because pids are
reused. This works on Unix only, and looks at all of this user's processes when a child ends.
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
    """Watch a process that we started.

    Attributes:
        pid: its process id.
        started: its start time, in seconds since 1970.
        mark: the value of ``GEOSTREAM_CHILD`` in its environment.
        log: path of the file that holds its output.
    """

    pid: int
    started: float
    mark: str
    log: str

    def running(self) -> bool:
        """Return whether the very process that was started still runs (not another under its pid, not a zombie)."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and _is_live(process)
        except psutil.NoSuchProcess:
            return False

    def family(self) -> list[psutil.Process]:
        """Return every live process that descends from this child, itself included."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    found.update([process, *process.children(recursive=True)])
        return [process for process in found if _is_live(process)]

    def listens(self, port: int) -> bool:
        """Return whether this child, not some other server, listens on the port."""
        for process in self.family():
            with suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                        return True
        return False

    def log_tail(self, lines: int = 15) -> str:
        """Return the last ``lines`` of its output; "" before there is any."""
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
    """Start a command in a session of its own.

    Args:
        command: program and arguments.
        environment: all its variables.
        log: file that its output is appended to.
        folder: folder that it runs in; None: this process's.
        outlive: whether it goes on when this process ends. Otherwise Linux ends it, even when this process is killed.
            That holds only for children that the main thread starts: the kernel's signal follows the starting thread.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch(mode=0o600)
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
            umask=0o077,  # databases and stores are for their owner alone
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
    """Return whether a process is there and no zombie, which a careless parent may never collect."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(child: Child, grace: float = 15.0) -> None:
    """End the child and all its offspring by SIGTERM; kill what is left after ``grace`` seconds."""
    for sign, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        family = child.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(sign)
        deadline = time.monotonic() + patience
        while any(map(_is_live, family)) and time.monotonic() < deadline:
            time.sleep(0.05)


def wait_until(ready: Callable[[], bool], child: Child, what: str, timeout: float) -> str | None:
    """Poll until a child is ready.

    Args:
        ready: tells whether it is.
        child: the process.
        what: its name, for the message.
        timeout: seconds to wait at most.

    Returns:
        None, or one line that says why it is not ready: it ended, or took too long.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not child.running():
            return f"{what} ended while starting"
        if ready():
            return None
        time.sleep(0.05)
    return f"{what} was not ready within {timeout:.0f} s"


def is_free(port: int) -> bool:
    """Return whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count as taken
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def choose_ports(preferred: Sequence[int], *, use_preferred: bool = True) -> list[int]:
    """Return the preferred ports if all are free, else as many others that are.

    The caller holds :func:`port_lock` until they are bound.

    Args:
        preferred: port numbers.
        use_preferred: False: return others in any case.
    """
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
    """Let one server of this user choose and bind its ports at a time, so that no two choose the same."""
    with Path(gettempdir(), f"geostream-ports-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
