"""The errors a person is meant to read: one line that says what is wrong and what to do.

Commands print the line and exit with 1; anything that is not a ``GeostreamError`` is a defect of ours and
keeps its traceback.
"""

from __future__ import annotations


class GeostreamError(Exception):
    """Base of every error that a user can do something about."""


class BadInput(GeostreamError):
    """Raw data, a setting or an argument is wrong; the message names the file and line, key or option."""


class MissingRaw(BadInput):
    """A file or folder of a raw dataset is not there."""


class StoreError(GeostreamError):
    """The object store refused or failed; the message names the URL, never a secret."""


class NotFound(StoreError):
    """No object at this path."""


class Refused(StoreError):
    """The object store does not let us: wrong or expired credentials, or no right to do it."""


class Unanswered(StoreError):
    """A request got no whole answer, for a ``reason`` that may pass: "busy" (429, 5xx) or "dropped"."""

    def __init__(self, message: str, reason: str = "dropped") -> None:  # torch makes errors anew from a text alone
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Unanswered], tuple[str, str]]:  # so that a Dask worker can send it back
        return type(self), (str(self), self.reason)


class Unsupported(StoreError):
    """The object store cannot do what this takes, whichever object is asked for (as to send ranges)."""


class AlreadyExists(StoreError):
    """A conditional write found an object in its place."""


class ForkedProcess(GeostreamError):
    """Object storage was used in a forked child process, where its library's threads are missing."""


class Stalled(GeostreamError):
    """What is waited for cannot come: the worker, thread, server or rank that makes it has ended, or is stuck."""


class LayoutNotCommitted(GeostreamError):
    """The layout has no ``layout.json``: it was never finished, so nothing of it may be read."""


class StaleArtefact(GeostreamError):
    """An artefact (plan, graph, embeddings, checkpoint) was made from another layout than the one in use."""


class Interrupted(GeostreamError):
    """Work was stopped on request, after what was done had been saved; the same command goes on from there."""
