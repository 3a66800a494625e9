"""Read and write the objects of one folder, at an ``s3://`` URL or in a local directory.

The library obstore reads and writes objects (ranges, conditional puts and multipart uploads, without the GIL). Zarr
uses it, too; single columns of Parquet files are read through fsspec. Every write is atomic: an object is either
complete or absent. For credentials see :mod:`geostream.store.s3`. The interface offers only what S3 and local folders
can both do.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.fsspec import FsspecStore
from obstore.store import LocalStore, from_url
from zarr.storage import ObjectStore as ZarrStore

from geostream.errors import AlreadyExists, BadInput, Changed, NotFound, Refused, StoreError, Unanswered, Unsupported
from geostream.store.conditional import put_new, replace
from geostream.store.errors import explained
from geostream.store.forks import check_process
from geostream.store.s3 import PATIENT_RETRIES, client_options, s3_client, s3_files
from geostream.store.url import read_url
from geostream.store.web import web_client, web_files

if TYPE_CHECKING:
    from obstore import ObjectMeta

Names = list[str]  # spelled out here because Store.list hides the builtin inside the class
RETRIES = 6
DELETES = 16  # objects that are removed at the same time
ROW_GROUP = 2**16  # rows of a Parquet file that can be read alone
ABANDONED = 3600.0  # seconds without a byte, after which an upload into a local folder counts as killed
UNFINISHED = re.compile(r"(.+)#\d+")
CHUNK = 2 * 2**20  # bytes handed over at a time; few enough to stay in the processor's cache until they are copied
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

_patient = 0  # contexts of patience() that are open in this process


@contextmanager
def patience() -> Iterator[None]:
    """Wait for a server that is away, ``s3.RETRY_DEADLINE`` seconds, while the context is open in this process.

    For work that would lose much if it gave up, as a training. Outside it, a server that does not answer is reported
    after some seconds, because the address may be wrong.
    """
    global _patient
    _patient += 1
    try:
        yield
    finally:
        _patient -= 1


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing."""

    path: str  # relative to the store that was listed
    size: int  # bytes
    modified: datetime  # when it was written, by the store's clock
    etag: str = ""  # names its content on a server; "" where it gives none, or the store is a local folder
    version: str | None = None  # where the bucket keeps versions and the object was read


def check_name(kind: str, name: str) -> str:
    """Check the name of a data set, layout or run, which becomes part of object paths.

    Args:
        kind: "dataset", "layout" or "run", for the error.
        name: The name.

    Returns:
        The name.

    Raises:
        BadInput: It has other characters than letters, digits, "-" and "_", or begins with one of these two signs.
    """
    if not NAME.fullmatch(name):
        raise BadInput(f"{kind} name {name!r}: use letters, digits, '-' and '_' only, beginning with a letter or digit")
    return name


def table_bytes(table: pa.Table) -> bytes:
    """Return the content of a Parquet file that holds the table, in parts that can be read and checked alone."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True)
    return buffer.getvalue()


def table_of(data: bytes) -> pa.Table:
    """Return the table that the content of a Parquet file holds.

    It is read in this thread. One of Arrow's own may still hold the bytes when the program ends, which would abort it
    (apache/arrow issue 34314).

    Raises:
        pyarrow.ArrowException, OSError: The bytes are no whole Parquet file.
    """
    return pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Store:
    """A folder of objects.

    It is cheap to make and can be shared between threads. Pickling it sends only the URL.
    """

    url: str  # without a slash at its end; an absolute path for a local folder

    @classmethod
    def open(cls, url: str | Path) -> Store:
        """Open a store, without a request.

        Args:
            url: ``s3://bucket/prefix``, ``file:///folder`` or a local path. URLs of the other stores that obstore
                supports work, too: ``gs://``, ``az://``, ``abfss://``, and ``http://`` and ``https://`` for reading.
                Their credentials come from obstore's own environment variables.

        Raises:
            BadInput: The URL does not name exactly one folder (:mod:`geostream.store.url`).
        """
        return cls(read_url(str(url)))

    @property
    def is_s3(self) -> bool:
        """Whether this is a folder of an S3 bucket."""
        return self.url.startswith("s3://")

    @property
    def is_local(self) -> bool:
        """Whether this is a local folder."""
        return "://" not in self.url

    @property
    def is_web(self) -> bool:
        """Whether this is a folder of a web server, whose objects can only be read by name."""
        return self.url.startswith(("http://", "https://"))

    def child(self, *parts: str) -> Store:
        """Return the store of the folder at the path ``parts`` below this one."""
        return Store("/".join([self.url, *parts]))

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "url", state["url"])

    @property
    def _obstore(self) -> Any:
        return self._made(PATIENT_RETRIES if _patient else RETRIES)

    @property
    def _impatient(self) -> Any:
        """The client that tries every request once."""
        return self._made(0)

    def _made(self, retries: int) -> Any:
        """Return the client, made at its first use; raise ForkedProcess in a forked child of a process that had one."""
        check_process(self.url)
        clients = self.__dict__.setdefault("_clients", {})
        if retries not in clients:
            clients[retries] = self._client(retries)
        return clients[retries]

    def _client(self, retries: int) -> Any:
        if self.is_local:
            if not Path(self.url).is_dir():  # only a write makes the folder
                raise FileNotFoundError(self.url)
            return LocalStore(prefix=self.url)
        if self.is_s3:
            return s3_client(self.url, retries=retries)
        if self.is_web:
            return web_client(self.url, retries=retries)
        return from_url(self.url, **client_options(self.url, retries))

    def renew(self) -> None:
        """Ask for credentials again in the next :meth:`stream_range`, also where they have no time of expiry."""
        self.__dict__.get("_clients", {}).pop(0, None)

    def _make_folder(self) -> None:
        """Make the folder of a local store before a write; raise Unsupported where nothing can be written."""
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
        """Read a whole object.

        Args:
            path: Path of the object within the store.

        Raises:
            NotFound: There is no such object.
            StoreError: It cannot be read.
        """
        with explained(self._at(path)):
            return bytes(obstore.get(self._obstore, path).bytes())

    def read_with_info(self, path: str) -> tuple[bytes, ObjectInfo]:
        """Read a whole object, and what the store says of the very version that was read.

        Args:
            path: Path of the object within the store.

        Raises:
            NotFound: There is no such object.
            StoreError: It cannot be read.
        """
        with explained(self._at(path)):
            answer = obstore.get(self._obstore, path)
            return bytes(answer.bytes()), self._info(answer.meta)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Read a range of an object.

        Args:
            path: Path of the object within the store.
            offset: First byte of the range.
            size: Bytes of the range.

        Returns:
            ``size`` bytes; fewer where the object ends before, none where the range begins behind its end.

        Raises:
            NotFound: There is no such object.
            StoreError: It cannot be read.
        """
        try:
            with explained(self._at(path)):
                return bytes(obstore.get_range(self._obstore, path, start=offset, length=size))
        except (NotFound, Refused, Unanswered):
            raise
        except StoreError:  # each kind of server has its own error for a range behind the object's end
            if self._ends_before(path, offset):
                return b""
            raise

    def _ends_before(self, path: str, offset: int) -> bool:
        """Return whether an object is known to end at or before ``offset``; False where its size cannot be read."""
        try:
            return self.size(path) <= offset
        except StoreError:
            return False

    async def stream_range(self, path: str, offset: int, size: int) -> AsyncGenerator[tuple[memoryview, int]]:
        """Read a range of an object in chunks, as they arrive.

        The request is not repeated, and given up after ``s3.READ_TIMEOUT`` without a byte; callers have retries of
        their own.

        Args:
            path: Path of the object within the store.
            offset: First byte of the range.
            size: Bytes of the range.

        Yields:
            A chunk, and the size of the whole object in bytes. The chunks are shorter together than ``size`` only
            where the object ends before. An empty range gives one empty chunk.

        Raises:
            NotFound: There is no such object.
            Refused: The server refuses the credentials.
            Unanswered: No complete answer came, for a reason that may be temporary.
            StoreError: The range cannot be read.
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
        """Write an object atomically.

        Args:
            path: Path of the object within the store.
            data: The object's content.
            if_absent: Write only where there is no such object, by a conditional put. For servers without these see
                :mod:`geostream.store.conditional`.

        Raises:
            AlreadyExists: There is such an object, and ``if_absent`` is set.
            StoreError: It cannot be written.
        """
        with explained(self._at(path)):
            self._make_folder()
            if if_absent:
                put_new(self, path, data)
            else:
                obstore.put(self._obstore, path, data)

    def replace(self, path: str, data: bytes, seen: tuple[bytes, ObjectInfo] | None) -> None:
        """Write an object, unless somebody else has written it since it was read: of many writers one succeeds.

        Servers that cannot do this in one step are treated as :mod:`geostream.store.conditional` says.

        Args:
            path: Path of the object within the store.
            data: The object's content.
            seen: What :meth:`read_with_info` gave; None where there was no object.

        Raises:
            Changed: The object was written or removed by somebody else.
            StoreError: It cannot be written.
        """
        try:
            with explained(self._at(path)):
                if seen is not None:
                    self._check_writable()
                    replace(self, path, data, seen)
                else:
                    self.write(path, data, if_absent=True)
        except AlreadyExists as error:
            raise Changed(f"{self._at(path)}: written by somebody else meanwhile") from error

    def write_file(self, path: str, local: Path) -> None:
        """Upload a local file atomically, in several parts where it is large.

        Args:
            path: Path of the object within the store.
            local: The file.

        Raises:
            StoreError: It cannot be written.
        """
        with explained(self._at(path)):
            self._make_folder()
            obstore.put(self._obstore, path, local)

    # documents and tables

    def read_json(self, path: str) -> Any:
        """Read the JSON document at ``path``.

        Raises:
            NotFound: There is no object at this path.
            StoreError: It cannot be read, or is no JSON.
        """
        return self._parsed(path, self.read(path))

    def _parsed(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(f"{self._at(path)}: not valid JSON ({error}); the object is damaged") from error

    def write_json(self, path: str, value: Any, *, if_absent: bool = False) -> None:
        """Write ``value`` as a JSON document; the other arguments and the errors are those of :meth:`write`."""
        self.write(path, _json_bytes(value), if_absent=if_absent)

    def update_json(self, path: str, change: Callable[[Any], Any]) -> Any:
        """Change a JSON document so that no change that somebody else makes at the same time is lost.

        Args:
            path: Path of the object within the store.
            change: Called with the document, or None where there is none; it returns the new one, or None to leave it
                as it is. It is called again if somebody else was faster, and must not change what it is given.

        Returns:
            The document as it is afterwards; None where there is none.

        Raises:
            StoreError: It cannot be read or written, or is no JSON.
        """
        while True:
            before, seen = None, None
            with suppress(NotFound):
                seen = self.read_with_info(path)
                before = self._parsed(path, seen[0])
            after = change(before)
            if after is None or after == before:
                return before
            with suppress(Changed):  # somebody else has made progress, so this ends
                self.replace(path, _json_bytes(after), seen)
                return after

    def read_table(self, path: str, columns: Names | None = None) -> pa.Table:
        """Read a Parquet table.

        Args:
            path: Path of the object within the store.
            columns: Names of the columns to read, without fetching the others; None reads all.

        Raises:
            NotFound: There is no such object.
            StoreError: It cannot be read, or is no Parquet file.
        """
        with explained(self._at(path)):
            try:
                # pq.read_table would guess partition columns from "name=value" in the path.
                if columns is None:
                    return table_of(self.read(path))
                filesystem, root = self.filesystem()
                with filesystem.open(f"{root}/{path}", "rb") as source:
                    return pq.ParquetFile(source, pre_buffer=False).read(columns=columns, use_threads=False)
            except pa.ArrowInvalid as error:
                raise StoreError(f"{self._at(path)}: not a whole Parquet file ({error}); write it again") from error

    def write_table(self, path: str, table: pa.Table) -> None:
        """Write a table as a Parquet file at ``path``; errors are those of :meth:`write`."""
        self.write(path, table_bytes(table))

    def filesystem(self) -> tuple[Any, str]:
        """Return an fsspec filesystem and the path of this store in it, for libraries that use fsspec."""
        import fsspec

        if self.is_local:
            return fsspec.filesystem("file"), self.url
        if self.is_s3:
            return s3_files(urlsplit(self.url).netloc), self.url.removeprefix("s3://")
        if self.is_web:
            return web_files(self.url, retries=RETRIES), self.url
        return FsspecStore(cast("Any", urlsplit(self.url).scheme)), self.url

    def zarr(self, path: str, *, read_only: bool = False) -> ZarrStore[Any]:
        """Return the Zarr store at ``path``, for ``zarr.open_group``; a local folder is made unless ``read_only``."""
        folder = self.child(path)
        with explained(folder.url):
            if not read_only:
                folder._make_folder()
            return ZarrStore(folder._obstore, read_only=read_only)

    # names

    @property
    def _is_absent(self) -> bool:
        """Whether this is a local folder that does not exist yet."""
        return self.is_local and not Path(self.url).exists()

    def exists(self, path: str) -> bool:
        """Return whether there is an object at ``path``.

        Raises:
            StoreError: The store cannot be asked.
        """
        try:
            self.size(path)
        except NotFound:
            return False
        return True

    def size(self, path: str) -> int:
        """Return the size of the object at ``path``, in bytes.

        Raises:
            NotFound: There is no object at this path.
            StoreError: The store cannot be asked.
        """
        with explained(self._at(path)):
            return int(obstore.head(self._obstore, path)["size"])

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """List all objects below a folder.

        Args:
            prefix: Path of the folder within the store; "" is the store itself.

        Returns:
            The objects, sorted by path.

        Raises:
            StoreError: The store cannot be listed; Unsupported on a web server.
        """
        if self._is_absent:
            return []
        self._check_listable()
        with explained(self._at(prefix)):
            found = [self._info(meta) for chunk in obstore.list(self._obstore, prefix=prefix or None) for meta in chunk]
        return sorted(found, key=lambda info: info.path)

    def _info(self, meta: ObjectMeta) -> ObjectInfo:
        etag = "" if self.is_local else meta["e_tag"] or ""
        return ObjectInfo(str(meta["path"]), int(meta["size"]), meta["last_modified"], etag, meta["version"])

    def folders(self, prefix: str = "") -> Names:
        """List the folders directly below a folder.

        Args:
            prefix: Path of the folder within the store; "" is the store itself.

        Returns:
            The names of the folders, sorted.

        Raises:
            StoreError: The store cannot be listed; Unsupported on a web server.
        """
        if self._is_absent:
            return []
        self._check_listable()
        with explained(self._at(prefix)):
            listing = obstore.list_with_delimiter(self._obstore, prefix=prefix or None)
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in listing["common_prefixes"])

    def delete(self, path: str) -> None:
        """Remove the object at ``path``; do nothing where there is none.

        Raises:
            StoreError: It cannot be removed; Unsupported on a web server.
        """
        self._check_writable()
        with explained(self._at(path)), suppress(FileNotFoundError):
            obstore.delete(self._obstore, path)

    def delete_all(self, paths: Iterable[str]) -> None:
        """Remove the objects with these paths, and nothing else.

        Whoever removes objects must know their names; no method removes whatever a listing finds. In a local store,
        folders that become empty are removed, too, and so are the unfinished files of killed uploads of these objects.

        Args:
            paths: Paths of the objects within the store.

        Raises:
            StoreError: An object cannot be removed; Unsupported on a web server.
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
        """Remove the files that killed uploads of these objects left in a local folder.

        An upload writes to ``name#1`` and renames it at its end. Such a file is removed if nothing has been written to
        it for ``ABANDONED`` seconds, so that uploads under way are kept.

        Args:
            paths: Paths of the objects within the store.
        """
        if not self.is_local:
            return
        wanted = {Path(self.url, path) for path in paths}
        for folder in {path.parent for path in wanted}:
            for file in folder.glob("*#*") if folder.is_dir() else ():
                upload = UNFINISHED.fullmatch(file.name)
                with suppress(FileNotFoundError):  # its writer has just renamed it
                    if upload and folder / upload[1] in wanted and time.time() - file.stat().st_mtime > ABANDONED:
                        file.unlink()

    def _drop_empty_folders(self, folder: Path) -> None:
        """Remove ``folder`` and the folders above it, up to this store's own, as long as they are empty."""
        own = Path(self.url)
        with suppress(OSError):  # not empty, or gone
            while folder == own or own in folder.parents:
                folder.rmdir()
                folder = folder.parent

    def check(self, *, write: bool = False) -> None:
        """Check that the store can be listed.

        Args:
            write: Check also that stores of this kind can be written to.

        Raises:
            StoreError: One of these is not possible; the message says what to do.
        """
        if write:
            self._check_writable()
        if self.is_local and not Path(self.url).is_dir():
            raise StoreError(f"{self.url}: no such folder; correct the path, or shard a dataset into it first")
        self._check_listable()
        with explained(self.url):
            obstore.list_with_delimiter(self._obstore)
