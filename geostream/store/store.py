"""One folder of objects, at an ``s3://`` URL or in a local directory, behind one small interface.

Decides how bytes get in and out: obstore carries them (ranges, conditional puts, multipart, no GIL held),
fsspec/s3fs reads Parquet column by column, Zarr sits on obstore too. Every write is atomic: an object is either
whole or absent, on both kinds of store. Credentials come from botocore's chain (environment, profile, role) and are
renewed before they expire. The cost of the one interface is that only what both kinds of store can do is offered.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.fsspec import FsspecStore
from obstore.store import LocalStore, from_url
from zarr.storage import ObjectStore as ZarrStore

from geostream.errors import BadInput, NotFound, Refused, StoreError, Unanswered, Unsupported
from geostream.store.conditional import put_new
from geostream.store.errors import explained
from geostream.store.forks import check_process
from geostream.store.s3 import client_options, s3_client, s3_files
from geostream.store.url import read_url
from geostream.store.web import web_client, web_files

Names = list[str]  # spelled out here because Store.list hides the builtin inside the class
RETRIES = 6
DELETES = 16  # objects that are removed at a time
ABANDONED = 3600.0  # seconds without a byte, after which an upload into a local folder counts as killed
UNFINISHED = re.compile(r"(.+)#\d+")
CHUNK = 2 * 2**20  # bytes that stay in the processor's cache between the socket and their place
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing; ``path`` is relative to the store it was listed from."""

    path: str
    size: int


def check_name(kind: str, name: str) -> str:
    """A dataset, layout or run name becomes part of object paths: refuse what could climb out or confuse."""
    if not NAME.fullmatch(name):
        raise BadInput(f"{kind} name {name!r}: use letters, digits, '-' and '_' only, beginning with a letter or digit")
    return name


def table_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@dataclass(frozen=True)
class Store:
    """A folder of objects. Cheap to make, safe to pickle (only the URL travels) and to share between threads."""

    url: str

    @classmethod
    def open(cls, url: str | Path) -> Store:
        """A store at ``s3://bucket/prefix``, ``file:///folder`` or a local path. No request is made yet.

        What else obstore reaches (``gs://``, ``az://``, ``https://``, which is for reading) works as obstore does it:
        with the credentials of its own environment variables. Raises BadInput where the URL is not exactly one folder
        (:mod:`geostream.store.url`).
        """
        return cls(read_url(str(url)))

    @property
    def is_s3(self) -> bool:
        return self.url.startswith("s3://")

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def is_web(self) -> bool:
        """Whether this is a folder of a web server, whose objects can be read by name, and nothing else."""
        return self.url.startswith(("http://", "https://"))

    def child(self, *parts: str) -> Store:
        """The folder ``parts`` below this one."""
        return Store("/".join([self.url, *parts]))

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "url", state["url"])

    @property
    def _obstore(self) -> Any:
        return self._made(RETRIES)

    @property
    def _impatient(self) -> Any:
        """As ``_obstore``, but every request is tried once."""
        return self._made(0)

    def _made(self, retries: int) -> Any:
        """The client, made at its first use. Raises ForkedProcess in a forked child of a process that had one."""
        check_process(self.url)
        clients = self.__dict__.setdefault("_clients", {})
        if retries not in clients:
            clients[retries] = self._client(retries)
        return clients[retries]

    def _client(self, retries: int) -> Any:
        if self.is_local:
            if not Path(self.url).is_dir():  # reading makes no folder
                raise FileNotFoundError(self.url)
            return LocalStore(prefix=self.url)
        if self.is_s3:
            return s3_client(self.url, retries=retries)
        if self.is_web:
            return web_client(self.url, retries=retries)
        return from_url(self.url, **client_options(self.url, retries))

    def renew(self) -> None:
        """Ask for credentials anew with the next :meth:`stream_range`, also where they came without an expiry."""
        self.__dict__.get("_clients", {}).pop(0, None)

    def _make_folder(self) -> None:
        """Before something is written: the folder of a local store. Raises Unsupported where nothing can be written."""
        self._check_writable()
        if self.is_local:
            Path(self.url).mkdir(parents=True, exist_ok=True)

    def _check_writable(self) -> None:
        if self.is_web:
            raise Unsupported(f"{self.url}: a web server's folder can only be read; write to s3:// or a local folder")

    def _check_listable(self) -> None:
        if self.is_web:
            raise Unsupported(
                f"{self.url}: a web server's folder cannot be listed; name dataset and layout (--dataset, --layout)"
            )

    def _at(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    # bytes

    def read(self, path: str) -> bytes:
        """The whole object. Raises NotFound."""
        with explained(self._at(path)):
            return bytes(obstore.get(self._obstore, path).bytes())

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; fewer only where the object ends, none from behind its end."""
        try:
            with explained(self._at(path)):
                return bytes(obstore.get_range(self._obstore, path, start=offset, length=size))
        except (NotFound, Refused, Unanswered):
            raise
        except StoreError:  # each kind of server refuses in its own words what lies behind the end
            if self._ends_before(path, offset):
                return b""
            raise

    def _ends_before(self, path: str, offset: int) -> bool:
        """Say whether an object is known to end at or before ``offset``; an error of this question hides no other."""
        try:
            return self.size(path) <= offset
        except StoreError:
            return False

    async def stream_range(self, path: str, offset: int, size: int) -> AsyncGenerator[tuple[memoryview, int]]:
        """Chunks of ``size`` bytes from ``offset`` as they come, each with the size of the whole object.

        Less comes only where the object ends; of an empty range, one empty chunk. Asked once, and given up after
        ``s3.READ_TIMEOUT``: for readers that have their own patience. Raises NotFound, Refused, Unanswered for whatever
        may pass, and StoreError for what will not.
        """
        with explained(self._at(path)):
            # An empty range cannot be asked for.
            wanted = {"range": (offset, offset + size)} if size else {"head": True}
            answer = await obstore.get_async(self._impatient, path, options=cast("Any", wanted))
            whole = int(answer.meta["size"])
            if not size:
                yield memoryview(b""), whole
                return
            async for chunk in answer.stream(min_chunk_size=CHUNK):
                yield memoryview(chunk), whole

    def write(self, path: str, data: bytes, *, if_absent: bool = False) -> None:
        """Write the object atomically. With ``if_absent``, raise AlreadyExists where there is one (conditional put).

        What happens on servers without conditional puts: :mod:`geostream.store.conditional`.
        """
        with explained(self._at(path)):
            self._make_folder()
            if if_absent:
                put_new(self, path, data)
            else:
                obstore.put(self._obstore, path, data)

    def write_file(self, path: str, local: Path) -> None:
        """Upload a local file (multipart where large), atomically."""
        with explained(self._at(path)):
            self._make_folder()
            obstore.put(self._obstore, path, local)

    # documents and tables

    def read_json(self, path: str) -> Any:
        try:
            return json.loads(self.read(path))
        except ValueError as error:
            raise StoreError(f"{self._at(path)}: not valid JSON ({error}); the object is damaged") from error

    def write_json(self, path: str, value: Any, *, if_absent: bool = False) -> None:
        self.write(path, (json.dumps(value, indent=1) + "\n").encode(), if_absent=if_absent)

    def read_table(self, path: str, columns: Names | None = None) -> pa.Table:
        """A Parquet table; where only some ``columns`` are wanted, no more is fetched."""
        with explained(self._at(path)):
            try:
                # Not the dataset reader: one file, and no partition columns guessed from "name=value" in the path.
                if columns is None:
                    return pq.ParquetFile(io.BytesIO(self.read(path))).read()
                filesystem, root = self.filesystem()
                with filesystem.open(f"{root}/{path}", "rb") as source:
                    return pq.ParquetFile(source).read(columns=columns)
            except pa.ArrowInvalid as error:
                raise StoreError(f"{self._at(path)}: not a whole Parquet file ({error}); write it again") from error

    def write_table(self, path: str, table: pa.Table) -> None:
        self.write(path, table_bytes(table))

    def filesystem(self) -> tuple[Any, str]:
        """(fsspec filesystem, root path): for libraries that speak fsspec."""
        import fsspec

        if self.is_local:
            return fsspec.filesystem("file"), self.url
        if self.is_s3:
            return s3_files(urlsplit(self.url).netloc), self.url.removeprefix("s3://")
        if self.is_web:
            return web_files(self.url, retries=RETRIES), self.url
        return FsspecStore(cast("Any", urlsplit(self.url).scheme)), self.url

    def zarr(self, path: str, *, read_only: bool = False) -> ZarrStore[Any]:
        """The Zarr store at ``path``, for ``zarr.open_group``."""
        folder = self.child(path)
        with explained(folder.url):
            if not read_only:
                folder._make_folder()
            return ZarrStore(folder._obstore, read_only=read_only)

    # names

    @property
    def _is_absent(self) -> bool:
        """Whether this is a local folder that nobody has made yet."""
        return self.is_local and not Path(self.url).exists()

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except NotFound:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes of the object. Raises NotFound."""
        with explained(self._at(path)):
            return int(obstore.head(self._obstore, path)["size"])

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """All objects below ``prefix`` (a folder), sorted by path."""
        if self._is_absent:
            return []
        self._check_listable()
        with explained(self._at(prefix)):
            found = [
                ObjectInfo(str(meta["path"]), int(meta["size"]))
                for chunk in obstore.list(self._obstore, prefix=prefix or None)
                for meta in chunk
            ]
        return sorted(found, key=lambda info: info.path)

    def folders(self, prefix: str = "") -> Names:
        """Names of the folders directly below ``prefix``, sorted."""
        if self._is_absent:
            return []
        self._check_listable()
        with explained(self._at(prefix)):
            listing = obstore.list_with_delimiter(self._obstore, prefix=prefix or None)
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in listing["common_prefixes"])

    def delete(self, path: str) -> None:
        """Remove the object; nothing happens where there is none."""
        self._check_writable()
        with explained(self._at(path)), suppress(FileNotFoundError):
            obstore.delete(self._obstore, path)

    def delete_all(self, paths: Iterable[str]) -> None:
        """Remove the objects that are named; whatever else lies here stays.

        There is no way to remove what a listing finds: only who has written an object's name down owns it. Of a local
        store, folders that this leaves empty go, too, and so does what uploads of these objects that were killed left.
        """
        paths = list(paths)
        with ThreadPoolExecutor(DELETES) as threads:
            for _ in threads.map(self.delete, paths):
                pass
        self.delete_unfinished(paths)
        if self.is_local:
            for path in paths:
                self._drop_empty_folders(Path(self.url, path).parent)

    def delete_unfinished(self, paths: Iterable[str]) -> None:
        """Remove what killed uploads of these objects left in a local folder; those of living writers stay.

        obstore writes ``name#1`` and renames it. One that nobody has written to for ``ABANDONED`` seconds is left over.
        """
        if not self.is_local:
            return
        wanted = {Path(self.url, path) for path in paths}
        for folder in {path.parent for path in wanted}:
            for file in folder.glob("*#*") if folder.is_dir() else ():
                upload = UNFINISHED.fullmatch(file.name)
                with suppress(FileNotFoundError):  # renamed by its writer just now
                    if upload and folder / upload[1] in wanted and time.time() - file.stat().st_mtime > ABANDONED:
                        file.unlink()

    def _drop_empty_folders(self, folder: Path) -> None:
        """Remove ``folder`` and those above it, up to this store's own, as far as they are empty."""
        own = Path(self.url)
        with suppress(OSError):  # not empty, or gone
            while folder == own or own in folder.parents:
                folder.rmdir()
                folder = folder.parent

    def check(self, *, write: bool = False) -> None:
        """Raise StoreError, with what to do, where the store cannot be listed, or where none of its kind is written."""
        if write:
            self._check_writable()
        if self.is_local and not Path(self.url).is_dir():
            raise StoreError(f"{self.url}: no such folder; correct the path, or shard a dataset into it first")
        self._check_listable()
        with explained(self.url):
            obstore.list_with_delimiter(self._obstore)
