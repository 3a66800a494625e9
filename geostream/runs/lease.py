"""Hold a run: one trainer at a time writes into a run's folder, and one that has died does not lock it for ever.

The holder keeps an object ``lease/00000001.json`` in the run, which says who it is, and writes it anew every ten
seconds. Whoever comes second reads it. On the same machine the process tells whether the holder lives; elsewhere its
last sign of life does, and since clocks differ, one that looks old is watched before it is given up. To take over is
to write the next number by a conditional put, so one of several wins, and to remove the number before. The highest
number holds. A holder that was suspended looks at the numbers before it writes anything, and stops where there is a
higher one.

It costs a small object written every ten seconds, and a listing of one folder before each record and checkpoint. On a
server without conditional puts two that take over at the same moment can both go through (docs/guarantees.md).
"""

from __future__ import annotations

import getpass
import logging
import os
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
BEAT = 10.0  # seconds between two signs of life
DEAD = 60.0  # seconds without one, after which a holder on another machine may be dead
WATCH = 2.0  # times BEAT that such a holder is watched before it is given up

logger = logging.getLogger(__name__)


class RunHeld(GeostreamError):
    """Another process holds the run."""


class Lease:
    """Context manager: within it this process holds the run. Raises RunHeld where another one does."""

    def __init__(self, run: Store) -> None:
        self.run = run
        self._folder = run.child(FOLDER)
        self._me = _identity()
        self._number = 0
        self._lost = ""
        self._done = threading.Event()
        self._beats = threading.Thread(target=self._keep, name="geostream-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._acquire()
        self._beats.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._beats.join(BEAT)
        with suppress(StoreError):  # then it is taken over as that of a process that has ended
            if self._number in _numbers(self._folder):
                self._folder.delete_all([_name(self._number)])

    def check(self) -> None:
        """Raise RunHeld where another process has taken the run over. Called before anything is written into it."""
        numbers = _numbers(self._folder)
        if not self._lost and numbers[-1:] != [self._number]:
            self._lost = _who(self._read(numbers[-1])) if numbers else "another process"
        if self._lost:
            raise RunHeld(f"{self.run.url}: taken over by {self._lost}; this process stops")

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
            self._number = number
            return

    def _wait_for_end_of(self, number: int) -> None:
        """Return where the holder is dead or gone. Raises RunHeld where it lives."""
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
            # A store that stumbles is asked again; before anything is written the numbers are looked at anyway.
            with suppress(StoreError):
                if _numbers(self._folder)[-1:] == [self._number]:
                    self._folder.write_json(_name(self._number), self._said())

    def _said(self) -> dict[str, Any]:
        return self._me | {"beat": datetime.now(UTC).isoformat()}

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            said = self._folder.read_json(_name(number))
        except NotFound:
            return None
        return said if isinstance(said, dict) else {}


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _numbers(folder: Store) -> list[int]:
    names = (info.path.removesuffix(".json") for info in folder.list())
    return sorted(int(name) for name in names if name.isdigit() and len(name) == 8)


def _identity() -> dict[str, Any]:
    """What a holder says of itself."""
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
    """What two processes share where one can see whether the other lives: host, boot, and space of process ids."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has these
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the very process runs, not another under its number, nor its remains."""
    try:
        process = psutil.Process(int(holder["pid"]))
        same = abs(process.create_time() - float(holder["started"])) < 1
        return same and bool(process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, KeyError, ValueError):
        return False


def _age(holder: dict[str, Any]) -> float:
    """Seconds since the last sign of life, as this machine's clock has it."""
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
