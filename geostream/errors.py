"""Define the errors that users see: one line that says what is wrong and what to do.

Commands print the line and exit with 1. Any other error than a ``GeostreamError`` is a defect of geostream and keeps
its traceback.
"""

from __future__ import annotations


class GeostreamError(Exception):
    """Base class of all errors that a user can do something about."""


class BadInput(GeostreamError):
    """Raw data, a setting or an argument is wrong; the message names the file and line, key or option."""


class MissingRaw(BadInput):
    """A file or folder of a raw dataset is not there."""


class StoreError(GeostreamError):
    """The object store refused or failed; the message names the URL, never a secret."""


class NotFound(StoreError):
    """There is no object at this path."""


class Refused(StoreError):
    """The object store refuses access: the credentials are wrong, have expired, or lack a right."""


class Unanswered(StoreError):
    """A request got no complete answer, for a reason that may be temporary.

    Args:
        message: One line for the user.
        reason: A word to count failures by, such as "busy" (429, 5xx), "stalled", "short" or "dropped".
    """

    def __init__(self, message: str, reason: str = "dropped") -> None:  # torch makes errors anew from a text alone
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Unanswered], tuple[str, str]]:  # so that a Dask worker can send it back
        return type(self), (str(self), self.reason)


class Unsupported(StoreError):
    """The object store lacks an ability that is needed, such as sending ranges of objects."""


class AlreadyExists(StoreError):
    """A conditional write found that the object exists already."""


class Changed(StoreError):
    """Somebody else has replaced the object since it was read."""


class ForkedProcess(GeostreamError):
    """Object storage was used in a forked child process, which lacks the threads of the object store library."""


class Stalled(GeostreamError):
    """A result can no longer come, because the worker, thread, server or rank that makes it has ended or is stuck."""


class LayoutNotCommitted(GeostreamError):
    """The layout has no ``layout.json``: it was never finished and must not be read."""


class StaleArtefact(GeostreamError):
    """An artefact (plan, graph, embeddings, checkpoint) was made from another layout than the one in use."""


class Interrupted(GeostreamError):
    """Work was stopped on request and its state saved; the same command continues it."""


def kind(error: GeostreamError) -> str:
    """Return the name of the error's class, or of its nearest base class in this module.

    A process reports it by this name to the one that started it, which raises the same kind of error.

    Args:
        error: Any of our errors.
    """
    return str(next(one.__name__ for one in type(error).__mro__ if globals().get(one.__name__) is one))
