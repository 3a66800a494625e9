"""Write an object only where there is none, or only where nobody has replaced it, also on S3 servers without that.

A conditional put lets exactly one of many writers succeed: ``If-None-Match: *`` where there is no object yet, and
``If-Match`` with the tag of the object that the writer has read. Some servers refuse such a header, and a few ignore it
and overwrite the object. The first conditional write of each kind to a bucket in a process finds out which kind the
server is. On servers of these two kinds, later writes use a weaker way: look at the object, then write it. Two writers
that look at the same moment can then both succeed, so a warning says that jobs under the same name must not run at
once.

The first write costs two more requests: a look at the object before it, so that nothing is overwritten, and a second
conditional put after it, which the server has to refuse.

In a local folder an object is replaced while the folder is locked. The lock ends with the process that holds it.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import obstore
from botocore.exceptions import BotoCoreError
from obstore import exceptions as obexc

from geostream.errors import AlreadyExists, Changed, NotFound, Refused, StoreError, Unanswered
from geostream.store.errors import Answer, translated
from geostream.store.s3 import s3_access

if TYPE_CHECKING:
    from geostream.store.store import ObjectInfo, Store

TRIES, FIRST_PAUSE = 8, 0.1  # pauses in seconds; each is twice as long, at most 13 seconds together
PROBE = "geostream-probe-"
NEW, SAME = "If-None-Match", "If-Match"  # the headers

Tag = dict[str, str | None]  # names the content of an object as it was read: its ``e_tag``, and ``version``
Mode = Literal["create"] | Tag
NO_TAG: Tag = {"e_tag": f'"{"0" * 32}"', "version": None}  # of no object

_sound = set[tuple[str, str]]()  # (URL of a bucket, header) whose server is known to obey that header
_weak = dict[tuple[str, str], str]()  # (URL, header) whose server does not, with the warning
log = logging.getLogger(__name__)


class _HeaderRefused(Exception):
    """The server refuses conditional puts."""


def put_new(store: Store, path: str, data: bytes) -> None:
    """Write an object where there is none.

    Args:
        store: The store to write to.
        path: Path of the object within it.
        data: The object's content.

    Raises:
        AlreadyExists: There is an object at this path.
        StoreError: The object cannot be written.
    """
    if not store.is_s3:
        obstore.put(store._obstore, path, data, mode="create", use_multipart=False)
        return
    _write(store, path, data, "create", lambda: _look(store, path))


def replace(store: Store, path: str, data: bytes, seen: tuple[bytes, ObjectInfo]) -> None:
    """Replace an object, unless somebody else has replaced it since it was read.

    In a local folder the contents are compared: the file system's times are too coarse to tell two writes apart.

    Args:
        store: The store to write to.
        path: Path of the object within it.
        data: The object's new content.
        seen: What :meth:`Store.read_with_info` gave.

    Raises:
        Changed: The object is another by now, or gone.
        StoreError: The object cannot be written.
    """
    before, info = seen
    tag: Tag = {"e_tag": info.etag or None, "version": info.version}
    try:
        if store.is_local:
            with _locked(Path(store.url, path).parent):
                _compare(store, path, before)
                obstore.put(store._obstore, path, data)
        elif store.is_s3:
            _write(store, path, data, tag, lambda: _compare(store, path, before))
        else:
            obstore.put(store._obstore, path, data, mode=_any(tag), use_multipart=False)
    except NotFound as error:
        raise Changed(f"{store.url}/{path}: removed by somebody else meanwhile") from error


def probe(store: Store) -> str | None:
    """Try the store by writing a small object under a unique name and removing it again.

    Returns:
        A warning where the server has no conditional puts, else None.

    Raises:
        StoreError: The object cannot be written or removed.
    """
    name = f"{PROBE}{uuid4().hex}"
    try:
        store.write(name, b"written by geostream to try this store; may be removed\n", if_absent=True)
    except StoreError:
        with suppress(StoreError):
            store.delete(name)  # it may have been written, and only the answer lost
        raise
    store.delete(name)
    return _weak.get((_bucket(store), NEW)) if store.is_s3 else None


def _bucket(store: Store) -> str:
    return s3_access(urlsplit(store.url).netloc).url


def _look(store: Store, path: str) -> None:
    if store.exists(path):
        raise AlreadyExists(f"{store.url}/{path}: exists already")


def _compare(store: Store, path: str, before: bytes) -> None:
    if store.read(path) != before:
        raise Changed(f"{store.url}/{path}: replaced by somebody else meanwhile")


def _any(tag: Mode) -> Any:
    """Return the tag as obstore takes it, whose types know no keys without a value."""
    return tag if isinstance(tag, str) else {name: value for name, value in tag.items() if value is not None}


def _write(store: Store, path: str, data: bytes, mode: Mode, check: Callable[[], None]) -> None:
    """Put an object conditionally, or the weaker way on a server without that: ``check``, then put."""
    header = (_bucket(store), NEW if mode == "create" else SAME)
    if header not in _weak:
        try:
            _put_conditionally(store, header, path, data, mode, check)
            return
        except _HeaderRefused as error:
            refusal = str(error)
    check()
    obstore.put(store._obstore, path, data)
    if header not in _weak:  # the plain put was accepted, so the header was the reason for the refusal
        _warn(store, header, f"takes no puts with {header[1]} ({refusal})")


def _put_conditionally(
    store: Store, header: tuple[str, str], path: str, data: bytes, mode: Mode, check: Callable[[], None]
) -> None:
    """Put the object conditionally; raise _HeaderRefused where the server has no such puts."""
    if header not in _sound:
        with suppress(Refused):  # credentials that may write are not always allowed to read
            check()
    try:
        _put_patiently(store, path, data, mode)
    except (AlreadyExists, Changed):
        _sound.add(header)
        raise
    if header not in _sound:
        with suppress(StoreError, _HeaderRefused):  # the next write tries to find out again
            try:
                _put(store, path, data, mode if mode == "create" else NO_TAG)
                _warn(store, header, f"overwrites an object in spite of {header[1]}")
            except (AlreadyExists, Changed):
                _sound.add(header)


def _put_patiently(store: Store, path: str, data: bytes, mode: Mode) -> None:
    """Put the object conditionally, and repeat that after temporary failures."""
    for attempt in range(TRIES):
        try:
            _put(store, path, data, mode)
            return
        except (AlreadyExists, Changed):
            if attempt and _holds(store, path, data):  # an earlier try has written it; only its answer was lost
                return
            raise
        except Unanswered:
            if attempt == TRIES - 1:
                raise
        longest = FIRST_PAUSE * 2.0**attempt
        time.sleep(random.uniform(longest / 2, longest))


def _holds(store: Store, path: str, data: bytes) -> bool:
    with suppress(StoreError):
        return store.read(path) == data
    return False


def _put(store: Store, path: str, data: bytes, mode: Mode) -> None:
    """Send one conditional put, without a retry."""
    try:
        # A multipart upload cannot be conditional; S3 accepts up to 5 GB in a single put.
        obstore.put(store._impatient, path, data, mode=_any(mode), use_multipart=False)
    except (obexc.BaseError, BotoCoreError, OSError) as error:
        answer = Answer.of(error)
        if answer.refuses_a_header:
            raise _HeaderRefused(answer.said()) from error
        raise translated(f"{store.url}/{path}", error) from error


def _warn(store: Store, header: tuple[str, str], what: str) -> None:
    _weak[header] = (
        f"s3://{urlsplit(store.url).netloc}: the server {what}. Instead, geostream looks at the object before it "
        "writes it: two jobs that write under the same name at the same moment may both go through, so run one at a "
        "time"
    )
    log.warning(_weak[header])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a local folder; where it cannot be locked, warn and go on without."""
    with ExitStack() as held:
        try:
            import fcntl  # Windows has none

            handle = os.open(folder, os.O_RDONLY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except FileNotFoundError:
            pass  # then there is nothing to replace, which shows at once
        except (ImportError, OSError) as error:  # OSError: as on some network file systems
            if (key := (str(folder), SAME)) not in _weak:
                _weak[key] = f"{folder}: cannot be locked ({error}); write under the same name one at a time"
                log.warning(_weak[key])
        yield
