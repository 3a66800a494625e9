"""Stopping a run: what SIGTERM and SIGINT do to it.

Decides that they end a run where that loses least. Within an epoch the signal is held until the step is done and its
checkpoint written, on all ranks after the same step; anywhere else the run ends at once, because those stages are done
again from the checkpoint anyway. A second signal does not wait. Signals reach the main thread alone: elsewhere a run
hears none. Who handled them before (Prefect does) gets them when the run has made itself safe; where nobody did, the
process ends with 143 or 130, as shells expect.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from geostream.training.distributed import ProcessGroup, is_loss

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal's Ctrl-C may come twice, from it and from torchrun.
ONE = 1.0  # second, within which signals count as one


class Stopped(SystemExit):
    """The run was stopped by a signal; ends the process with ``code``, 128 and the signal's number."""


class Stop:
    """Context manager: hears the signals for a run of ``group``, called ``name`` when it is said to be stopped."""

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self.group, self.name = group, name
        self.saved = ""  # what of the epoch under way is saved, in words
        self._heard = 0  # number of the signal
        self._heard_at = 0.0
        self._held = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                earlier = signal.getsignal(number)
                if earlier not in (signal.SIG_IGN, None):
                    self._earlier[number] = earlier
                    signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self._heard and error is not None and (self._leaving or is_loss(error)):
            if self.group.ends_first():
                by = signal.Signals(self._heard).name
                where = self.saved or "what was under way is done again"
                logger.warning("%s: stopped by %s; start the same command again to go on (%s)", self.name, by, where)
            if not self._leaving:  # another rank was stopped, too, and was quicker
                raise Stopped(128 + self._heard) from error

    @contextmanager
    def held(self) -> Iterator[Callable[[], bool]]:
        """Within, a signal waits; what it gives says whether one has come to any rank, and all have to ask together.

        They do at the end of it, too: then the run is stopped.
        """
        self._held = True
        try:
            yield self.asked
            if self.asked():
                self._leave()
        finally:
            self._held = False

    def asked(self) -> bool:
        """Whether a signal has come to any rank; the same on all of them, which have to ask together."""
        number = self.group.most(self._heard)
        self._heard = self._heard or number
        return number > 0

    _leaving = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again = self._heard and time.monotonic() - self._heard_at > ONE
        if not self._heard:
            self._heard, self._heard_at = number, time.monotonic()
        if again or not self._held:
            self._leave(frame)

    def _leave(self, frame: FrameType | None = None) -> None:
        self._leaving = True
        earlier = self._earlier.get(self._heard)
        self._restore()
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(self._heard, frame)
        raise Stopped(128 + self._heard)

    def _restore(self) -> None:
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)
        self._earlier = {}
