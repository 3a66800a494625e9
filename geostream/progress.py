"""Show the progress of long work: as a bar on a terminal, elsewhere as a line every ten seconds.

So the log of a flow or a container stays readable. A bar is redrawn ten times a second. Whoever wants to show progress
elsewhere listens to it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
LOG_EVERY_SECONDS = 10.0

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
        self._terminal = sys.stderr.isatty()
        self._last_line = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        if self._terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
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
            print(f"{self.description}: {self.done}{of}  {_text(fields)}".rstrip(), file=sys.stderr, flush=True)

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
