"""Prepare epochs in a process of its own, while the trainer trains.

The process works for one trainer: it has a lower priority, half of the cores, and no GPU. The trainer asks for an epoch
by a line of JSON on its standard input, and gets a line back when the epoch is prepared, or what went wrong. The end of
that input ends the process, whatever it is doing: so it never outlives its trainer, not even one that was killed. A
process that dies is started again twice, because most of what it dies of (a passing lack of memory) may pass; the
preparation goes on where it stood. What it does is :func:`geostream.runs.preparation.prepare` and nothing else, so no
batch depends on how long it takes.

Starting it costs about five seconds of one core, once in a session of a run.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO, Any

from joblib import cpu_count

from geostream import errors
from geostream.errors import GeostreamError
from geostream.runs.run import Run

PROGRAM = ("-m", "geostream.runs.background_process")
STARTS = 3  # of the process, for one epoch
END_TIMEOUT = 5.0  # seconds that it has to end by itself
LOOK_EVERY = 1.0  # seconds
TELL_EVERY = 60.0  # seconds between two lines of the log while the trainer waits
SILENT = 120  # looks without a sign of life, after which the process is taken for stuck
LAST_LINES = 8  # of its output, quoted when it has died

logger = logging.getLogger(__name__)


class Background:
    """Prepare the epochs of a run beside its training. To be used as a context manager, which ends the process.

    Args:
        run: The run, held, with its settings.

    Attributes:
        asked: The epoch that is being prepared; 0: none.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._process: subprocess.Popen[str] | None = None
        self.asked = 0
        self._answers: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._said: deque[str] = deque(maxlen=LAST_LINES)

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def start(self, epoch: int) -> None:
        """Begin to prepare an epoch, and return at once. The one asked for before must have been waited for."""
        self.asked = epoch
        self._ask()

    def wait(self) -> None:
        """Return when the epoch that was asked for is prepared.

        Raises:
            GeostreamError: It cannot be prepared: the error of the stage that failed, or what the process died of.
        """
        epoch = self.asked
        for left in reversed(range(STARTS)):
            answer = self._answer(epoch)
            if answer is not None:
                break
            died = self._end()
            if not left:
                output = "; ".join(self._said)
                raise GeostreamError(
                    f"{self._run.url}: the process that prepares epoch {epoch} died {STARTS} times ({died}): {output}"
                )
            logger.warning(
                "%s: the process that prepares epoch %d died (%s); starting it again", self._run.url, epoch, died
            )
            self._ask()
        self.asked = 0
        if answer is not None and "error" in answer:
            kind: type[GeostreamError] = getattr(errors, answer["kind"])
            raise kind(f"preparing epoch {epoch} in the background: {answer['error']}")

    def _answer(self, epoch: int) -> dict[str, Any] | None:
        """Return what the process answers, or None if it has died."""
        began = told = time.monotonic()
        silent = 0  # counted, not read from the clock: this process may have been suspended
        while silent < SILENT:
            try:
                answer = self._answers.get(timeout=LOOK_EVERY)
            except Empty:
                silent += 1
            else:
                if answer is None or "epoch" in answer:
                    return answer
                silent = 0
            if time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                logger.warning("%s: waiting for epoch %d to be prepared for %.0f s", self._run.url, epoch, told - began)
        self._kill()
        return None

    def _ask(self) -> None:
        if self._process is None:
            self._begin()
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError):  # it has died: that is found out by whoever waits
            self._process.stdin.write(json.dumps({"epoch": self.asked}) + "\n")
            self._process.stdin.flush()

    def _begin(self) -> None:
        run = self._run
        cores = str(max(1, cpu_count() // 2))
        limits = {"OMP_NUM_THREADS": cores, "LOKY_MAX_CPU_COUNT": cores, "CUDA_VISIBLE_DEVICES": ""}
        self._answers = SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, *PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | limits,
            # A terminal's Ctrl-C is for the trainer. A session of its own would have a share of the cores of its own,
            # whatever its priority (Linux's autogroup).
            process_group=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        threading.Thread(target=self._hear, args=(self._process.stdout, self._answers), daemon=True).start()
        threading.Thread(target=self._repeat, args=(self._process.stderr,), daemon=True).start()
        work = {
            "store": run.store.url,
            "dataset": run.layout.dataset,
            "layout": run.layout.name,
            "run": run.name,
            "cluster": run.cluster,
            "lease": run.lease,
            "settings": run.settings.model_dump(),
        }
        with suppress(OSError):
            self._process.stdin.write(json.dumps(work) + "\n")

    @staticmethod
    def _hear(output: IO[str], answers: SimpleQueue[dict[str, Any] | None]) -> None:
        for line in output:
            told = json.loads(line)
            if "text" in told:
                logger.log(told["level"], "%s", told["text"], extra={"fields": told["fields"]})
            else:
                answers.put(told)
        answers.put(None)  # its end

    def _repeat(self, output: IO[str]) -> None:
        for line in output:
            self._said.append(line.strip())
            print(line, end="", file=sys.stderr, flush=True)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _end(self) -> str:
        """End the process; return what it died of, in words."""
        if self._process is None:
            return ""
        process, self._process = self._process, None
        with suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            code = process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"
