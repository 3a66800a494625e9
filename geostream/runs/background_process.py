"""Run the process of :mod:`geostream.runs.background`: prepare epochs as a trainer asks for them on standard input."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from queue import SimpleQueue
from typing import Any

from geostream import errors
from geostream.errors import GeostreamError
from geostream.runs.reports import report, report_log_lines, take_standard_output

NICE = 10
BEAT = 2.0  # seconds between two signs of life


def main() -> None:
    """Prepare one epoch after the other, until the input ends."""
    if hasattr(os, "nice"):
        os.nice(NICE)
    answers = take_standard_output()
    report_log_lines(answers)
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    threading.Thread(target=_beat, args=(answers,), daemon=True).start()
    work = json.loads(lines.get())
    while True:
        epoch = json.loads(lines.get())["epoch"]
        report(answers, **_prepared(work, epoch))


def _beat(answers: int) -> None:
    """Tell the trainer again and again that this process lives."""
    while True:
        time.sleep(BEAT)
        report(answers)


def _read(lines: SimpleQueue[str]) -> None:
    """Read what the trainer asks; when it has ended, end this process in the middle of its work."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _prepared(work: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Prepare an epoch; return the answer to the trainer."""
    # Only now: these take seconds, and the trainer is to see earlier that this process lives.
    from geostream.layout import open_layout
    from geostream.runs.preparation import prepare
    from geostream.runs.run import Run
    from geostream.settings import make_settings
    from geostream.store import Store
    from geostream.store.store import patience

    try:
        with patience():
            store = Store.open(work["store"])
            run = Run.open(store, open_layout(store, work["dataset"], work["layout"]), work["run"], work["cluster"])
            run.settings = make_settings(work["settings"])
            run.hold_by(work["lease"])
            prepare(run, epoch, beside=True)
    except GeostreamError as error:
        return {"epoch": epoch, "error": str(error), "kind": errors.kind(error)}
    return {"epoch": epoch}


if __name__ == "__main__":
    main()
