"""Name raw files and folders wherever they lie: a local path, or a folder of an object store with the same methods.

Adapters see :class:`RawPath`, the part of :class:`pathlib.Path` that they need. A local folder is a plain ``Path``. A
folder on a store is a :class:`StorePath`. Its objects are listed once, with one request for every thousand, and the
listing tells what is there and in which version; nothing is asked again. It takes about 500 bytes an object.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Protocol, Self

from geostream.errors import BadInput, NotFound, Unsupported
from geostream.store import ObjectInfo, Store
from sharding.sources import Stamp

HERE = PurePosixPath()


class RawPath(Protocol):
    """Name a raw file or folder."""

    @property
    def name(self) -> str:
        """The last part of the path."""

    @property
    def parent(self) -> Self:
        """The folder that holds it."""

    def __truediv__(self, other: str, /) -> Self: ...

    def relative_to(self, other: Any, /) -> PurePath:
        """Return the path below a folder."""

    def exists(self) -> bool:
        """Return whether there is such a file or folder."""

    def is_dir(self) -> bool:
        """Return whether it is a folder."""

    def read_bytes(self) -> bytes:
        """Return a file's content; raise OSError where there is none."""


class Entry(Protocol):
    """Describe what lies in a folder: ``os.DirEntry`` for a local one."""

    @property
    def name(self) -> str:
        """The file's or folder's name."""

    @property
    def path(self) -> str:
        """Where it lies, for messages."""

    def is_dir(self) -> bool:
        """Return whether it is a folder."""

    def is_file(self) -> bool:
        """Return whether it is a file."""


class StoreTree:
    """Hold the listing of a store's folder, made when it is first asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def _listing(self) -> tuple[dict[str, Stamp], dict[str, dict[str, None]]]:
        """Stamps of all objects by path, and the names in each folder."""
        try:
            objects = self.store.list()
        except Unsupported as error:
            raise BadInput(
                f"{self.store.url}: a web server's folder cannot be listed; copy it to a store or a local folder, or "
                "name its files in a table (geostream shard table)"
            ) from error
        files = {one.path: stamp_of(one) for one in objects}
        folders: dict[str, dict[str, None]] = {}
        for path in files:
            while path:
                path, _, name = path.rpartition("/")
                inside = folders.setdefault(path, {})
                if name in inside:
                    break
                inside[name] = None
        return files, folders

    def stamp(self, path: str) -> Stamp | None:
        """Return what the listing has of a file; None: there is none."""
        return self._listing[0].get(path)

    def names(self, folder: str) -> list[str] | None:
        """Return the names in a folder; None: there is no such folder."""
        inside = self._listing[1].get(folder)
        return None if inside is None else list(inside)


def stamp_of(info: ObjectInfo) -> Stamp:
    """Return the stamp of an object."""
    return Stamp(info.size, int(info.modified.timestamp() * 1e9), info.etag)


@dataclass(frozen=True)
class StorePath:
    """Name a file or folder below a listed folder of a store.

    Attributes:
        tree: the listed folder.
        inside: the path below it.
    """

    tree: StoreTree
    inside: PurePosixPath = HERE

    def __str__(self) -> str:
        return self.path

    @property
    def _key(self) -> str:
        return "" if self.inside == HERE else self.inside.as_posix()

    @property
    def path(self) -> str:
        """Its URL."""
        return f"{self.tree.store.url}/{self._key}" if self._key else self.tree.store.url

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> StorePath:
        """The folder that holds it; for the listed folder one that is not listed yet."""
        if self._key:
            return StorePath(self.tree, self.inside.parent)
        return open_store_path(self.path.rpartition("/")[0])

    def __truediv__(self, other: str) -> StorePath:
        return StorePath(self.tree, self.inside / other)

    def relative_to(self, other: StorePath) -> PurePosixPath:
        """Return the path below a folder of the same listing."""
        return self.inside.relative_to(other.inside)

    def exists(self) -> bool:
        """Return whether the listing has such a file or folder."""
        return self.is_file() or self.is_dir()

    def is_dir(self) -> bool:
        """Return whether the listing has something below it."""
        return self.tree.names(self._key) is not None

    def is_file(self) -> bool:
        """Return whether the listing has an object of this name."""
        return self.tree.stamp(self._key) is not None

    def stamp(self) -> Stamp | None:
        """Return what the listing has of the file."""
        return self.tree.stamp(self._key)

    def entries(self) -> list[StorePath]:
        """Return what lies in the folder; raise FileNotFoundError where there is none."""
        names = self.tree.names(self._key)
        if names is None:
            raise _not_found(self.path)
        return [self / name for name in names]

    def read_bytes(self) -> bytes:
        """Return the object's content; raise FileNotFoundError where there is none, StoreError as the store does."""
        try:
            return self.tree.store.read(self._key) if self._key else self.parent.tree.store.read(self.name)
        except NotFound as error:
            raise _not_found(self.path) from error


def _not_found(url: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "No such file or folder", url)


def open_raw(raw: str | Path) -> RawPath:
    """Return where raw data lie, without a request.

    Args:
        raw: a local path, or the URL of a folder or file on a store.

    Raises:
        BadInput: the URL is malformed.
    """
    if isinstance(raw, str) and "://" in raw:
        store = Store.open(raw)
        return Path(store.url) if store.is_local else StorePath(StoreTree(store))
    return Path(raw)


def open_store_path(url: str) -> StorePath:
    """Return a folder of a store; raise BadInput where the URL is malformed."""
    return StorePath(StoreTree(Store.open(url)))


def entries(folder: RawPath) -> Sequence[Entry]:
    """Return what lies in a folder, in any order; raise OSError where it cannot be listed."""
    if isinstance(folder, StorePath):
        return folder.entries()
    with os.scandir(str(folder)) as found:
        return list(found)


def stamps(folder: RawPath) -> dict[str, Stamp | None]:
    """Return the names in a folder, with the stamps that its listing has; a local folder's has none.

    Raises:
        OSError: it cannot be listed.
    """
    if isinstance(folder, StorePath):
        return {entry.name: entry.stamp() for entry in folder.entries()}
    return dict.fromkeys(os.listdir(str(folder)))  # noqa: PTH208, names alone


def read_text(path: RawPath) -> str:
    r"""Return a text file's content: UTF-8 with or without byte order mark, each line's end as "\n".

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    with io.TextIOWrapper(io.BytesIO(path.read_bytes()), encoding="utf-8-sig") as text:
        return text.read()
