"""Read raw images for the encoder: from a local folder, from a store, and by URL from a web server.

A reader is cheap to send to worker processes, each of which opens connections of its own. Reads from a store are
repeated as the store does it, reads by http and https as :mod:`sharding.web` does it. What a server says is not there,
or may not be read, is a broken image. A server that does not answer stops the work with an error.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path

import urllib3

from geostream.errors import NotFound
from geostream.store import Store
from sharding.encode import BrokenImage
from sharding.raw_path import RawPath, stamp_of
from sharding.sources import Stamp
from sharding.web import ask

WEB = ("http://", "https://")
CONNECTIONS = 16  # to one web server


@dataclass(frozen=True)
class RawReader:
    """Read the images of a data set by the paths that its places name.

    Attributes:
        root: the raw folder, a local path or the URL of a store's folder.
    """

    root: str

    @classmethod
    def of(cls, root: RawPath) -> RawReader:
        """Return the reader of a raw folder."""
        return cls(str(root))

    def is_remote(self, path: str) -> bool:
        """Return whether an image comes from a server, where several are read at a time."""
        return "://" in path or ("://" in self.root and not path.startswith("/"))

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """Read an image's file.

        Args:
            path: below the root, or absolute, or a URL.

        Returns:
            Its bytes, and the stamp of the version that was read.

        Raises:
            BrokenImage: it is missing or unreadable.
            StoreError: the server does not answer, or refuses the credentials.
        """
        if not self.is_remote(path):
            try:
                with Path(self.root, path).open("rb") as file:
                    return file.read(), _stamp(os.fstat(file.fileno()))
            except OSError as error:
                raise BrokenImage(f"cannot be read: {error.strerror}") from error
        url = path if "://" in path else f"{self.root}/{path}"
        if url.startswith(WEB):
            answer = ask("GET", url, url, CONNECTIONS)
            if answer.status != 200:
                raise BrokenImage(f"the server says {answer.status} {answer.reason or ''}".rstrip())
            return answer.data, _of_headers(answer)
        store, key = _store_of(path, self.root)
        try:
            data, info = store.read_with_info(key)
        except NotFound as error:
            raise BrokenImage("missing") from error
        return data, stamp_of(info)

    def stamp(self, path: str) -> Stamp | None:
        """Look at an image's file without reading it.

        Args:
            path: as for :meth:`read`; an image of a store has its stamp from the listing, and is not looked at here.

        Returns:
            Its stamp; None where it is gone, or where only reading it tells what it is.
        """
        if not self.is_remote(path):
            try:
                return _stamp(Path(self.root, path).stat())
            except OSError:
                return None
        url = path if "://" in path else f"{self.root}/{path}"
        if not url.startswith(WEB):
            return None
        answer = ask("HEAD", url, url, CONNECTIONS)
        known = answer.status == 200 and "Content-Length" in answer.headers
        return _of_headers(answer) if known else None


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_size, found.st_mtime_ns)


def _of_headers(answer: urllib3.BaseHTTPResponse) -> Stamp:
    headers, mtime_ns = answer.headers, 0
    with suppress(KeyError, ValueError):
        mtime_ns = int(parsedate_to_datetime(headers["Last-Modified"]).timestamp() * 1e9)
    size = int(headers.get("Content-Length", "")) if headers.get("Content-Length", "").isdecimal() else len(answer.data)
    return Stamp(size, mtime_ns, headers.get("ETag", ""))


@lru_cache(maxsize=64)
def _opened(url: str) -> Store:
    return Store.open(url)


def _store_of(path: str, root: str) -> tuple[Store, str]:
    """Return the store that holds an image, and its key there."""
    if "://" not in path:
        return _opened(root), path
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    return _opened(f"{scheme}://{bucket}"), key
