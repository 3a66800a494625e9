"""Lock a run, so that only one trainer at a time writes into its folder; a trainer that has died can be replaced.

The holder keeps an object ``lease/00000001.json`` in the run's folder that says who it is, and rewrites it every ten
seconds. A second trainer reads it. On the same machine it looks whether the holder's process is running. Elsewhere it
looks at the time of the last rewrite; because clocks differ, a lease that looks old is watched for a while first.

To take over, the second trainer writes the next number with a conditional put, so that only one of several succeeds,
and removes the earlier number. The highest number holds the run. A holder looks at the numbers before it writes
anything and stops if there is a higher one, for example after it was suspended.

The lease costs one small write every ten seconds, and a listing of one folder before each record and checkpoint. On a
server without conditional puts, two trainers that take over at the same moment can both succeed (docs/guarantees.md).
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import psutil

from geostream.errors import AlreadyExists, GeostreamError, NotFound, StoreError
from geostream.store import Store

FOLDER = "lease"
BEAT = 10.0  # seconds between two rewrites of the lease
DEAD = 60.0  # seconds without a rewrite, after which a holder on another machine may be dead
WATCH = 2.0  # such a holder is watched for WATCH * BEAT seconds before it is replaced

logger = logging.getLogger(__name__)


class RunHeld(GeostreamError):
    """Another process holds the run."""


class Holding:
    """The right to write into a run, which the lease of a number gives; also to helpers of the process that holds it.

    Args:
        run: The run's folder.
        number: Number of the lease.
    """

    def __init__(self, run: Store, number: int) -> None:
        self.run, self.number = run, number
        self._folder = run.child(FOLDER)
        self._lost = ""

    def check(self) -> None:
        """Check that the run is still held; to be called before anything is written into it.

        Raises:
            RunHeld: Another process has taken the run over.
            StoreError: The lease cannot be read.
        """
        numbers = _numbers(self._folder)
        if not self._lost and numbers[-1:] != [self.number]:
            self._lost = _who(self._read(numbers[-1])) if numbers else "another process"
        if self._lost:
            raise RunHeld(f"{self.run.url}: taken over by {self._lost}; this process stops")

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            said = self._folder.read_json(_name(number))
        except NotFound:
            return None
        return said if isinstance(said, dict) else {}


def is_held(run: Store, within: float = DEAD) -> bool:
    """Return whether a process holds a run now, without waiting.

    Args:
        run: The run's folder.
        within: Seconds since the last rewrite of the lease, for which a holder on another machine counts as alive.
    """
    holding = Holding(run, 0)
    numbers = _numbers(run.child(FOLDER))
    holder = holding._read(numbers[-1]) if numbers else None
    if holder is None:
        return False
    return _lives(holder) if holder.get("machine") == _machine() else abs(_age(holder)) < within


class Lease(Holding):
    """Hold a run while the context is open.

    Args:
        run: The run's folder.

    Raises:
        RunHeld: Another process holds the run (on entry).
        StoreError: The lease cannot be read or written (on entry).
    """

    def __init__(self, run: Store) -> None:
        super().__init__(run, 0)
        self._me = _identity()
        self._done = threading.Event()
        self._beats = threading.Thread(target=self._keep, name="geostream-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._acquire()
        self._beats.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._beats.join(BEAT)
        with suppress(StoreError):  # if the lease stays, the next trainer finds that its process has ended
            if self.number in _numbers(self._folder):
                self.run.delete_all(
                    [f"{FOLDER}/{_name(self.number)}"]
                )  # of a run that is gone the local folder goes, too

    def _acquire(self) -> None:
        while True:
            numbers = _numbers(self._folder)
            if numbers:
                self._wait_for_end_of(numbers[-1])
            number = numbers[-1] + 1 if numbers else 1
            try:
                self._folder.write_json(_name(number), self._said(), if_absent=True)
            except AlreadyExists:
                continue  # another process was faster: look who it is
            if _numbers(self._folder)[-1:] != [number]:  # one that looked earlier has a higher number
                self._folder.delete(_name(number))
                continue
            self._folder.delete_all(map(_name, numbers))
            self.number = number
            return

    def _wait_for_end_of(self, number: int) -> None:
        """Return when the holder is found dead or gone; raise RunHeld if it lives."""
        holder = self._read(number)
        if holder is None:
            return
        refused = RunHeld(f"{self.run.url}: held by {_who(holder)}; wait until it ends, stop it, or use another --run")
        if holder.get("machine") == self._me["machine"]:
            if _lives(holder):
                raise refused
            logger.info("%s: goes on for %s, which has ended", self.run.url, _who(holder))
            return
        if abs(_age(holder)) < DEAD:
            raise refused
        logger.warning("%s: held by %s; watching whether it lives", self.run.url, _who(holder))
        time.sleep(WATCH * BEAT)
        later = self._read(number)
        if later is not None and later.get("beat") != holder.get("beat"):
            raise refused
        logger.warning("%s: taken over from %s", self.run.url, _who(holder))

    def _keep(self) -> None:
        while not self._done.wait(BEAT):
            # A failed write is tried again at the next beat; check() looks at the numbers before anything is written.
            with suppress(StoreError):
                if _numbers(self._folder)[-1:] == [self.number]:
                    self._folder.write_json(_name(self.number), self._said())

    def _said(self) -> dict[str, Any]:
        return self._me | {"beat": datetime.now(UTC).isoformat()}


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _numbers(folder: Store) -> list[int]:
    names = (info.path.removesuffix(".json") for info in folder.list())
    return sorted(int(name) for name in names if name.isdigit() and len(name) == 8)


def _identity() -> dict[str, Any]:
    """Return what a holder's lease says about its process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        user = str(os.getuid())
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": process.pid,
        "started": process.create_time(),
        "user": user,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": token_hex(8),
    }


def _machine() -> str:
    """Return a name for this host, boot and process-id namespace; processes that share it can see each other."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # only Linux has these
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def _lives(holder: dict[str, Any]) -> bool:
    """Return whether the holder's own process runs: not a later one with the same process id, no zombie, not killed."""
    try:
        process = psutil.Process(int(holder["pid"]))
        same = abs(process.create_time() - float(holder["started"])) < 1
        return same and bool(process.status() != psutil.STATUS_ZOMBIE) and not _is_killed(process.pid)
    except (psutil.Error, KeyError, ValueError):
        return False


def _is_killed(pid: int) -> bool:
    """Return whether a process has been sent SIGKILL, as far as the system tells (Linux).

    It runs no more, but is listed as running until its memory is freed, which takes up to seconds.
    """
    with suppress(OSError):
        pending = re.search(r"^ShdPnd:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return pending is not None and bool(int(pending[1], 16) >> (signal.SIGKILL - 1) & 1)
    return False


def _age(holder: dict[str, Any]) -> float:
    """Return the seconds since the lease was rewritten, by this machine's clock; infinity if it does not say."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(str(holder["beat"]))).total_seconds()
    except (KeyError, ValueError, TypeError):
        return float("inf")


def _who(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    age = _age(holder)
    seen = f", last sign of life {age:.0f} s ago" if age != float("inf") else ""
    who = f"{holder.get('user', '?')} on {holder.get('host', '?')}"
    return f"process {holder.get('pid', '?')} of {who} since {holder.get('since', '?')}{seen}"
