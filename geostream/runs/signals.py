"""Stop a run on SIGTERM or SIGINT where that loses the least work.

Within an epoch, the signal waits until the current step is done and its checkpoint is written; all ranks stop after
the same step. Anywhere else the run ends at once, because the other stages are repeated from the checkpoint anyway. A
second signal does not wait. Python delivers signals only to the main thread; in other threads a run gets none.

An earlier signal handler (Prefect has one) is called once the run is saved. Without one, the process ends with exit
code 143 or 130, as shells expect.
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
# Ctrl-C in a terminal may arrive twice: from the terminal and from torchrun.
ONE = 1.0  # seconds within which several signals count as one


class Stopped(SystemExit):
    """The run was stopped by a signal; the process ends with exit code 128 + the signal's number."""


class Stop:
    """Handle SIGTERM and SIGINT while the context is open.

    Args:
        group: The run's process group.
        name: What the run is called in the message that says it was stopped.

    Attributes:
        saved: What is saved of the current epoch, in words, for that message; to be set by the caller.

    Raises:
        Stopped: A signal came (from within the context).
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self.group, self.name = group, name
        self.saved = ""
        self._heard = 0  # number of the signal that came; 0: none
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
            if not self._leaving:  # another rank was stopped too, and ended before this one
                raise Stopped(128 + self._heard) from error

    @contextmanager
    def held(self) -> Iterator[Callable[[], bool]]:
        """Hold signals back while the context is open, and stop the run at its end if one came.

        All ranks must open it and leave it together, because its end asks all of them (:meth:`asked`).

        Yields:
            The method :meth:`asked`.

        Raises:
            Stopped: A signal came to some rank, or a second one to this rank.
        """
        self._held = True
        try:
            yield self.asked
            if self.asked():
                self._leave()
        finally:
            self._held = False

    def asked(self) -> bool:
        """Return whether a signal has come to any rank; all ranks must call this together and get the same answer."""
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
