"""Read a store from a plain web server: ``http://`` and ``https://`` URLs.

Objects and ranges of them are read by GET. Nothing is listed or written, not even on a server with WebDAV: obstore's
listing of a folder below the server's root has the wrong names.
"""

from __future__ import annotations

from typing import Any, cast

from obstore.fsspec import FsspecStore
from obstore.store import HTTPStore

from geostream.store.s3 import client_options


def web_client(url: str, *, retries: int) -> HTTPStore:
    """Make an obstore client for the folder at ``url``, also where obstore would take the host for a cloud's.

    Args:
        url: The folder's ``http://`` or ``https://`` URL.
        retries: How often a request is repeated after a temporary failure.
    """
    return HTTPStore.from_url(url, **client_options(url, retries))


def web_files(url: str, *, retries: int) -> Any:
    """Make an fsspec filesystem for the folder at ``url``; arguments are those of :func:`web_client`."""
    return _WebFiles(url, retries)


class _WebFiles(FsspecStore):
    """Use obstore's filesystem without its parsing of URLs: a path is ``url``, a slash and the object's name."""

    def __init__(self, url: str, retries: int) -> None:
        super().__init__(cast("Any", "http"))
        self._url, self._retries = url, retries

    def _split_path(self, path: str) -> tuple[str, str]:
        return self._url, path.removeprefix(self._url).lstrip("/")

    def _construct_store(self, bucket: str) -> HTTPStore:
        return web_client(bucket, retries=self._retries)
