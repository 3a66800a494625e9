"""Train a run in processes of its own, one for each GPU, and follow them from the process that started them.

One process trains alone. Several are ranks, which torch's elastic launcher (torchrun) starts and watches. Both are
started the same way: as one child process, which reports by lines of JSON on its standard output what its ranks log,
which processes they are, and what went wrong.

The child's standard input stays open as long as the training may go on. When it ends, because the training is
cancelled or because this process was killed, all ranks are stopped as by SIGTERM: within an epoch they write a
checkpoint after the current step. They have END_TIMEOUT seconds for that, then they are killed. So no rank outlives
the process that started it by more than KILL_TIMEOUT. Ranks whose launcher was killed end as well, but without a new
checkpoint, because the launcher keeps the key-value store by which they meet.

Starting costs one import of torch and timm, about five seconds, and another two with the elastic launcher.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Any

import psutil

from geostream import errors
from geostream.errors import BadInput, GeostreamError, Interrupted, Stalled
from geostream.layout import Layout
from geostream.settings import TrainSettings
from geostream.store import Store

MODULE = "geostream.runs.launch_process"
END_TIMEOUT = 60.0  # seconds that a rank has to write its checkpoint and end
KILL_TIMEOUT = END_TIMEOUT + 15.0  # seconds until everything that was started is killed
READ_TIMEOUT = 5.0  # seconds to read what a process said before it ended
LAST_LINES = 8  # of its output, quoted where it ended without saying why
STOPPED = {128 + number: number.name for number in (signal.SIGTERM, signal.SIGINT)}  # exit code: by which signal

# Called with a level of the package logging, a line, and the fields that it has as JSON: those of a stage's record.
Log = Callable[[int, str, Mapping[str, Any]], object]


@dataclass(frozen=True)
class Ranks:
    """Say how many processes train together, and where those of several machines meet.

    Args:
        processes: Processes on this machine; None means one for each GPU, or one without a GPU.
        nodes: Number of machines. This one is the first, which has the main rank.
        address: HOST:PORT of this machine, where the ranks of several machines meet.

    Raises:
        BadInput: A number is below 1, or the address is missing or malformed.
    """

    processes: int | None = None
    nodes: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        for name, number in (("processes", self.processes), ("nodes", self.nodes)):
            if number is not None and number < 1:
                raise BadInput(f"{name}={number}: at least 1")
        host, _, port = (self.address or "").rpartition(":")
        is_port = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
        if (self.nodes > 1 or self.address) and not (host and is_port):
            raise BadInput(
                f"address={self.address}: several nodes need HOST:PORT, at which the others reach the first of them"
            )


class Launch:
    """Train a run in child processes while the context is open. Leaving it earlier stops them, with a checkpoint.

    The log is called from threads, until the context is left.

    Args:
        store: The store that holds the dataset.
        layout: The layout to begin on; a run that has reclustered continues on its own generation.
        name: The run's name; one that exists goes on.
        settings: The settings to train with.
        cluster: URL of a Dask scheduler for mining; None uses threads of the main rank.
        ranks: How many processes train together.
        log: Called with each line that the processes log.
        show: Called with each line that they print, such as progress. If this process has a terminal, it goes there.
    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        name: str,
        settings: TrainSettings,
        *,
        cluster: str | None,
        ranks: Ranks,
        log: Log,
        show: Callable[[str], object],
    ) -> None:
        self.url = f"{store.url}/{layout.dataset}/runs/{name}"
        self._work = {
            "store": store.url,
            "dataset": layout.dataset,
            "layout": layout.name,
            "run": name,
            "settings": settings.model_dump(),
            "cluster": cluster,
            "ranks": asdict(ranks),
        }
        self._log, self._show = log, show
        self._errors: list[dict[str, str]] = []
        self._ranks: list[psutil.Process] = []
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Launch:
        terminal = sys.stderr.isatty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, json.dumps(self._work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if terminal else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C is for this process, which then stops the others
        )
        for output, hear in ((self._process.stdout, self._hear), (self._process.stderr, self._repeat)):
            if output is not None:
                self._readers.append(threading.Thread(target=hear, args=(output,), daemon=True))
                self._readers[-1].start()
        return self

    def wait(self) -> None:
        """Return when the run is trained to its last epoch.

        Raises:
            GeostreamError: What ended the training, as the rank that failed first raised it.
            Stalled: A process was killed, or the machines did not meet; the run can go on from its newest checkpoint.
            Interrupted: The processes were stopped by SIGTERM or SIGINT from elsewhere.
            RuntimeError: A defect; the log has its traceback.
        """
        code = self._process.wait()
        self._read_out()
        if code:
            raise self._error(code)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        until = time.monotonic() + KILL_TIMEOUT
        try:
            with suppress(OSError):
                self._process.stdin.close()  # type: ignore[union-attr]
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_TIMEOUT)
            # Without their launcher, ranks stop by themselves.
            psutil.wait_procs(self._ranks, timeout=max(0.0, until - time.monotonic()))
        finally:  # also where another signal has ended the waiting
            self._process.kill()
            for rank in self._ranks:
                with suppress(psutil.Error):
                    rank.kill()
            self._process.wait()
            self._read_out()

    def _hear(self, output: IO[str]) -> None:
        """Take in what the processes report."""
        for line in output:
            try:
                told = json.loads(line)
            except ValueError:  # something else has written there
                self._print(line)
                continue
            if "text" in told:
                self._log(told["level"], told["text"], told["fields"])
            elif "error" in told:
                if told["trace"]:
                    self._log(logging.ERROR, told["trace"], {})
                self._errors.append(told)
            elif told["pid"] != self._process.pid:
                with suppress(psutil.Error):
                    self._ranks.append(psutil.Process(told["pid"]))

    def _repeat(self, output: IO[str]) -> None:
        for line in output:
            self._print(line)

    def _print(self, line: str) -> None:
        if text := line.rstrip():
            self._said.append(text)
            self._show(text)

    def _read_out(self) -> None:
        """Wait for what was said last; not for ever, because a stray process may keep the output open."""
        for reader in self._readers:
            reader.join(READ_TIMEOUT)

    def _error(self, code: int) -> Exception:
        """Return what ended the training; ``code`` is the exit code of the child process."""
        # That another rank is lost is the consequence of something, unless nobody told anything else. The launcher
        # speaks last and knows which rank was killed.
        told = [one for one in self._errors if one["kind"] != Stalled.__name__] or self._errors[::-1]
        if told:
            kind: type[Exception] = getattr(errors, told[0]["kind"], RuntimeError)
            return kind(told[0]["error"])
        goes_on = "the run goes on from its newest checkpoint when it is started again"
        if code in STOPPED:
            return Interrupted(f"{self.url}: stopped by {STOPPED[code]}; {goes_on}")
        output = f": {'; '.join(self._said)}" if self._said else ""
        if code < 0:
            return Stalled(f"{self.url}: the training was ended by {signal_name(-code)}; {goes_on}{output}")
        return GeostreamError(f"{self.url}: the training ended with exit code {code}{output}")


def signal_name(number: int) -> str:
    """Return how a signal is called in an error, with its usual cause where there is one."""
    names = {one.value: one.name for one in signal.Signals}
    name = names.get(number, f"signal {number}")
    return f"{name} (by somebody, or for lack of memory)" if name == "SIGKILL" else name
