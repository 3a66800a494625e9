"""What befalls a loader in the middle of its work, as the ``change`` that it does to every sample: light to import."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

Sample = dict[str, Any]


@dataclass(frozen=True)
class Signal:
    """The worker is sent a signal, as by the kernel or an administrator."""

    number: signal.Signals

    def __call__(self, sample: Sample) -> Sample:
        os.kill(os.getpid(), self.number)
        return sample


@dataclass(frozen=True)
class Exit:
    """The process ends, or only the thread wants to."""

    how: str

    def __call__(self, sample: Sample) -> Sample:
        if self.how == "process":
            os._exit(3)
        sys.exit(3)


class SmallFiles:
    """No file of this process may be larger than a few bytes, shared memory included."""

    def __call__(self, sample: Sample) -> Sample:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        return sample


class FewFiles:
    """No more files may be opened by this process."""

    def __call__(self, sample: Sample) -> Sample:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        return sample


class Stuck:
    """It never comes back."""

    def __call__(self, sample: Sample) -> Sample:
        threading.Event().wait()
        return sample


class Unspeakable:
    """It raises an error whose class nobody else can name."""

    def __call__(self, sample: Sample) -> Sample:
        class Local(Exception):
            pass

        raise Local("of this function only")


class Wrong:
    """A defect of whoever wrote it."""

    def __call__(self, sample: Sample) -> Sample:
        raise ZeroDivisionError("in a change")


class Slow:
    """So that there is time for something to happen."""

    def __call__(self, sample: Sample) -> Sample:
        time.sleep(0.1)
        return sample
