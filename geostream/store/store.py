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
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.fsspec import FsspecStore
from obstore.store import LocalStore, from_url
from zarr.storage import ObjectStore as ZarrStore

from geostream.errors import BadInput, NotFound, StoreError
from geostream.store.errors import explained
from geostream.store.s3 import client_options, s3_client

Names = list[str]  # spelled out here because Store.list hides the builtin inside the class
OTHERS = ("gs", "az", "abfss", "http", "https")  # schemes that are obstore's own business
RETRIES = 6
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
        with the credentials of its own environment variables.
        """
        text = str(url)
        parts = urlsplit(text)
        if parts.scheme == "s3":
            if not parts.netloc:
                raise BadInput(f"{text}: an S3 URL names a bucket, s3://bucket/prefix")
            return cls(text.rstrip("/"))
        if parts.scheme == "file":
            return cls(str(Path(unquote(parts.path)).absolute()))
        if parts.scheme in OTHERS:
            return cls(text.rstrip("/"))
        if "://" in text:
            kinds = ", ".join(f"{scheme}://…" for scheme in OTHERS)
            raise BadInput(f"{text}: stores are s3://bucket/prefix, a local folder, {kinds}")
        return cls(str(Path(text).expanduser().absolute()))

    @property
    def is_s3(self) -> bool:
        return self.url.startswith("s3://")

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    def child(self, *parts: str) -> Store:
        """The folder ``parts`` below this one."""
        return Store("/".join([self.url, *parts]))

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "url", state["url"])

    @cached_property
    def _obstore(self) -> Any:
        return self._client(RETRIES)

    @cached_property
    def _impatient(self) -> Any:
        """As ``_obstore``, but every request is tried once."""
        return self._client(0)

    def _client(self, retries: int) -> Any:
        if self.is_local:
            Path(self.url).mkdir(parents=True, exist_ok=True)
            return LocalStore(prefix=self.url)
        if self.is_s3:
            return s3_client(self.url, retries=retries)
        return from_url(self.url, **client_options(self.url, retries))

    def renew(self) -> None:
        """Ask for credentials anew with the next :meth:`stream_range`, also where they came without an expiry."""
        self.__dict__.pop("_impatient", None)

    def _at(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    # bytes

    def read(self, path: str) -> bytes:
        """The whole object. Raises NotFound."""
        with explained(self._at(path)):
            return bytes(obstore.get(self._obstore, path).bytes())

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; fewer only where the object ends."""
        with explained(self._at(path)):
            return bytes(obstore.get_range(self._obstore, path, start=offset, length=size))

    async def stream_range(self, path: str, offset: int, size: int) -> AsyncGenerator[tuple[memoryview, int]]:
        """Chunks of ``size`` bytes from ``offset`` as they come, each with the size of the whole object.

        Less comes only where the object ends; of an empty range, one empty chunk. Asked once, and given up after
        ``s3.SILENCE``: for readers that have their own patience. Raises NotFound, Refused, Unanswered for whatever may
        pass, and StoreError for what will not.
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
        """Write the object atomically. With ``if_absent``, raise AlreadyExists where there is one (conditional put)."""
        with explained(self._at(path)):
            # A conditional put cannot be multipart, and S3 takes up to 5 GB in one.
            obstore.put(
                self._obstore,
                path,
                data,
                mode="create" if if_absent else "overwrite",
                use_multipart=False if if_absent else None,
            )

    def write_file(self, path: str, local: Path) -> None:
        """Upload a local file (multipart where large), atomically."""
        with explained(self._at(path)):
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
        if not self.is_s3:
            return FsspecStore(cast("Any", urlsplit(self.url).scheme)), self.url
        # No listing cache: other processes write here, and a cached listing would hide what they commit.
        return fsspec.filesystem("s3", use_listings_cache=False, default_block_size=2**20), self.url.removeprefix(
            "s3://"
        )

    def zarr(self, path: str, *, read_only: bool = False) -> ZarrStore[Any]:
        """The Zarr store at ``path``, for ``zarr.open_group``."""
        return ZarrStore(self.child(path)._obstore, read_only=read_only)

    # names

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
        with explained(self._at(prefix)):
            found = [
                ObjectInfo(str(meta["path"]), int(meta["size"]))
                for chunk in obstore.list(self._obstore, prefix=prefix or None)
                for meta in chunk
            ]
        return sorted(found, key=lambda info: info.path)

    def folders(self, prefix: str = "") -> Names:
        """Names of the folders directly below ``prefix``, sorted."""
        with explained(self._at(prefix)):
            listing = obstore.list_with_delimiter(self._obstore, prefix=prefix or None)
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in listing["common_prefixes"])

    def delete(self, path: str) -> None:
        """Remove the object; nothing happens where there is none."""
        with explained(self._at(path)), suppress(FileNotFoundError):
            obstore.delete(self._obstore, path)

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object below the folder ``prefix``."""
        for info in self.list(prefix):
            self.delete(info.path)

    def check(self) -> None:
        """Raise StoreError, with what to do, where the store cannot be listed."""
        if self.is_local and not Path(self.url).is_dir():
            raise StoreError(f"{self.url}: no such folder; correct the path, or shard a dataset into it first")
        with explained(self.url):
            obstore.list_with_delimiter(self._obstore)
