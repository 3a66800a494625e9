"""Report from a child process to the process that started it, by lines of JSON on the child's standard output.

What the two say to one another is told in :mod:`geostream.runs.launch` and :mod:`geostream.runs.background`. The same
for both is that log lines travel as ``level``, ``text`` and ``fields``, so that only the first process of all decides
how they are shown.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any


def take_standard_output() -> int:
    """Keep standard output for reports, and send what libraries print to standard error.

    Returns:
        The file descriptor to report on.
    """
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return channel


def report(channel: int, **what: Any) -> None:
    """Write a report in one piece, because threads and ranks write to the same pipe."""
    os.write(channel, (json.dumps(what, default=str) + "\n").encode())


def report_log_lines(channel: int) -> None:
    """Report each line that geostream logs in this process, instead of showing it."""
    ours = logging.getLogger("geostream")
    ours.addHandler(_Report(channel))
    ours.setLevel(logging.INFO)
    ours.propagate = False


class _Report(logging.Handler):
    """Report each line that is logged."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        report(self._channel, level=record.levelno, text=self.format(record), fields=fields)
