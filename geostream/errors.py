"""The errors a person is meant to read: one line that says what is wrong and what to do.

Commands print the line and exit with 1; anything that is not a ``GeostreamError`` is a defect of ours and
keeps its traceback.
"""

from __future__ import annotations


class GeostreamError(Exception):
    """Base of every error that a user can do something about."""


class BadInput(GeostreamError):
    """Raw data, a setting or an argument is wrong; the message names the file and line, key or option."""


class StoreError(GeostreamError):
    """The object store refused or failed; the message names the URL, never a secret."""


class NotFound(StoreError):
    """No object at this path."""


class AlreadyExists(StoreError):
    """A conditional write found an object in its place."""


class LayoutNotCommitted(GeostreamError):
    """The layout has no ``layout.json``: it was never finished, so nothing of it may be read."""


class StaleArtefact(GeostreamError):
    """An artefact (plan, graph, embeddings, checkpoint) was made from another layout than the one in use."""
