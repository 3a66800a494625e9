"""Keep a flow run's page up to date beside the work, from a thread that neither holds the work up nor fails it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from types import TracebackType
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from geostream.progress import listening

EVERY = 1.0  # seconds between two updates, at least
END_TIMEOUT = 5.0  # seconds that the last update may take: a worker that stops has few

logger = logging.getLogger(__name__)


class Updater:
    """Call a function in a thread whenever there is news, and a last time when the context is left.

    What the function raises is logged once and else ignored: the server or the store may be away, and come back.

    Args:
        update: called without arguments, in Prefect's context of this thread, one call at a time.
    """

    def __init__(self, update: Callable[[], object]) -> None:
        self._update = update
        self._news, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)

    def wake(self) -> None:
        """Say that there is news; this returns at once."""
        self._news.set()

    def __enter__(self) -> Updater:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._news.set()
        self._thread.join(END_TIMEOUT)

    def _run(self) -> None:
        logged = last = False
        while not last:
            self._news.wait()
            self._news.clear()
            last = self._over.is_set()
            try:
                self._update()
            except Exception as error:
                if not logged:
                    logger.warning("the flow run's page is not up to date: %s: %s", type(error).__name__, error)
                    logged = True
            self._over.wait(EVERY)


class ShownProgress:
    """Show a share of work as a progress artifact on the flow run's page, while the context is open.

    Args:
        key: the artifact's name, of small letters and hyphens.
        description: what is shown beside the bar.
    """

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._share = 0.0
        self._artifact: UUID | None = None
        self._updater = Updater(self._put)

    def __enter__(self) -> ShownProgress:
        self._updater.__enter__()
        self._updater.wake()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._share = 1.0
        self._updater.__exit__(kind, error, trace)

    def show(self, share: float) -> None:
        """Show that this share of the work, from 0 to 1, is done."""
        if share != self._share:
            self._share = share
            self._updater.wake()

    def _put(self) -> None:
        percent = round(100 * self._share, 1)
        if self._artifact is None:
            made = create_progress_artifact(progress=percent, key=self._key, description=self._description)
            assert isinstance(made, UUID)  # not a coroutine: this thread runs no event loop
            self._artifact = made
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent)


@contextmanager
def progress_of(bar: str, key: str, description: str) -> Iterator[None]:
    """Show on the flow run's page how far a progress bar of the library is, while the context is open.

    Args:
        bar: the bar's description (:mod:`geostream.progress`).
        key: the artifact's name, of small letters and hyphens.
        description: what is shown beside the bar.
    """
    with ShownProgress(key, description) as progress:

        def hear(which: str, done: int, total: int | None) -> None:
            if which == bar and total:
                progress.show(done / total)

        with listening(hear):
            yield
