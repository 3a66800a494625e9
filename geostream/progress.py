"""Show on standard error what goes on: log lines, and the progress of long work.

Progress is a bar on a terminal, redrawn ten times a second, and elsewhere a line every ten seconds. So the log of a
flow or a container stays readable. Whoever wants to show progress elsewhere listens to it. For a collector of logs,
``GEOSTREAM_LOG=json`` in the environment makes each line an object of JSON, and draws no bars. It is an environment
variable because that reaches ranks and flows alike.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from geostream.errors import BadInput

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
LOG_EVERY_SECONDS = 10.0
LOG_VARIABLE = "GEOSTREAM_LOG"
PACKAGES = ("geostream", "sharding", "flows")  # whose lines are shown from level INFO; those of others from WARNING

logger = logging.getLogger(__name__)


def json_wanted() -> bool:
    """Return whether log lines are to be JSON.

    Raises:
        BadInput: The environment variable has an unknown value.
    """
    value = os.environ.get(LOG_VARIABLE, "")
    if value not in ("", "json"):
        raise BadInput(f"{LOG_VARIABLE}={value}: json, or nothing for lines that a person reads")
    return value == "json"


class JsonLines(logging.Formatter):
    """Format a log line as one object of JSON: time (UTC), level, logger, message, and what else is known.

    A line that is logged with ``extra={"fields": {…}}`` also has these fields, an error with a traceback has
    ``traceback``, and a line of a Prefect flow the names of its flow run and task run.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        known: dict[str, Any] = dict(getattr(record, "fields", {}))
        known |= {name: getattr(record, name) for name in ("flow_run_name", "task_run_name") if hasattr(record, name)}
        line |= {name: value for name, value in known.items() if name not in line}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Show our log lines on standard error, in this process.

    As JSON, the warnings of other libraries and the traceback of what ends the process are such lines, too.

    Raises:
        BadInput: The environment asks for another form than JSON.
    """
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    if not json_wanted():
        for package in PACKAGES:
            logging.getLogger(package).addHandler(logging.StreamHandler(sys.stderr))
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: logger.critical("%s", error, exc_info=(kind, error, trace))


Listener = Callable[[str, int, int | None], object]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(hear: Listener) -> Iterator[None]:
    """Call a function with every advance of the bars in this thread, while the context is open.

    Args:
        hear: Called with the bar's description, the steps that are done, and their total (None if unknown). It must
            return soon, and not fail.
    """
    token = _listener.set(hear)
    try:
        yield
    finally:
        _listener.reset(token)


def _text(fields: dict[str, object]) -> str:
    """Return fields as text: ``{"loss": 1.2345}`` as ``loss 1.234``."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())


class Bar:
    """Context manager that shows the progress of one piece of work.

    >>> with Bar("epoch 3", total=160) as bar:
    ...     bar.advance(1, loss=0.52)

    Args:
        description: Shown in front of the bar.
        total: Steps of the work; None if unknown.
    """

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self._json = json_wanted()
        self._terminal = sys.stderr.isatty() and not self._json
        self._last_line = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        if self._terminal:
            from rich import progress as rich  # only now: every command imports this module
            from rich.console import Console

            self._progress = rich.Progress(
                rich.TextColumn("{task.description}"),
                rich.BarColumn(bar_width=30),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(self.description, total=self.total, text="")
            self._progress.start()
        return self

    def advance(self, steps: int = 1, **fields: object) -> None:
        """Count steps as done.

        Args:
            steps: How many.
            **fields: Shown behind the bar, such as ``loss=0.52``.
        """
        self.done += steps
        if (hear := _listener.get()) is not None:
            hear(self.description, self.done, self.total)
        if self._progress is not None:
            self._progress.update(self._task, advance=steps, text=_text(fields))
        elif time.monotonic() - self._last_line > LOG_EVERY_SECONDS:
            self._last_line = time.monotonic()
            of = "" if self.total is None else f"/{self.total}"
            line = f"{self.description}: {self.done}{of}  {_text(fields)}".rstrip()
            if self._json:
                logger.info("%s", line, extra={"fields": {"done": self.done, "total": self.total} | fields})
            else:
                print(line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield items, and show the progress.

    Args:
        items: Any items.
        description: Shown in front of the bar.
        total: How many there are; None takes their length where they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()
