"""Read a store from a plain web server: ``http://`` and ``https://`` URLs.

An object is one GET away, and a member one GET of a range. Nothing is listed or written, also where a server speaks
WebDAV: obstore's listing of a folder below the server's root has the wrong names.
"""

from __future__ import annotations

from typing import Any, cast

from obstore.fsspec import FsspecStore
from obstore.store import HTTPStore

from geostream.store.s3 import client_options


def web_client(url: str, *, retries: int) -> HTTPStore:
    """obstore's client for the folder at ``url``, whatever a cloud's host in it would mean to obstore."""
    return HTTPStore.from_url(url, **client_options(url, retries))


def web_files(url: str, *, retries: int) -> Any:
    """fsspec's filesystem for what is below ``url``."""
    return _WebFiles(url, retries)


class _WebFiles(FsspecStore):
    """obstore's filesystem, less its reading of URLs: paths are ``url``, a slash and the object's name."""

    def __init__(self, url: str, retries: int) -> None:
        super().__init__(cast("Any", "http"))
        self._url, self._retries = url, retries

    def _split_path(self, path: str) -> tuple[str, str]:
        return self._url, path.removeprefix(self._url).lstrip("/")

    def _construct_store(self, bucket: str) -> HTTPStore:
        return web_client(bucket, retries=self._retries)
