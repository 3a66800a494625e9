"""Write an object only where there is none, also on S3 servers that cannot do so in one step.

A conditional put (``If-None-Match: *``) lets exactly one of many writers succeed. Some servers refuse it, and a few
ignore it and overwrite the object. The first conditional write to a bucket in a process finds out which kind the server
is. On servers of these two kinds, later writes use a weaker way: look whether the object exists, then write it. Two
writers that look at the same moment can then both succeed, so a warning says that jobs under the same name must not run
at once.

The first write costs two more requests: a look at the object before it, so that nothing is overwritten, and a second
conditional put after it, which the server has to refuse.
"""

from __future__ import annotations

import logging
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import obstore
from botocore.exceptions import BotoCoreError
from obstore import exceptions as obexc

from geostream.errors import AlreadyExists, Refused, StoreError, Unanswered
from geostream.store.errors import Answer, translated
from geostream.store.s3 import s3_access

if TYPE_CHECKING:
    from geostream.store.store import Store

TRIES, FIRST_PAUSE = 8, 0.1  # pauses in seconds; each is twice as long, at most 13 seconds together
PROBE = "geostream-probe-"

_sound = set[str]()  # URLs of the buckets whose server is known to obey conditional puts
_weak = dict[str, str]()  # URLs of the buckets whose server does not, with the warning
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
    bucket = _bucket(store)
    if bucket not in _weak:
        try:
            _put_conditionally(store, bucket, path, data)
            return
        except _HeaderRefused as error:
            refusal = str(error)
    _look(store, path)
    obstore.put(store._obstore, path, data)
    if bucket not in _weak:  # the plain put was accepted, so the header was the reason for the refusal
        _warn(store, bucket, f"takes no conditional puts ({refusal})")


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
    return _weak.get(_bucket(store)) if store.is_s3 else None


def _bucket(store: Store) -> str:
    return s3_access(urlsplit(store.url).netloc).url


def _look(store: Store, path: str) -> None:
    if store.exists(path):
        raise AlreadyExists(f"{store.url}/{path}: exists already")


def _put_conditionally(store: Store, bucket: str, path: str, data: bytes) -> None:
    """Put the object conditionally; raise _HeaderRefused where the server has no conditional puts."""
    if bucket not in _sound:
        with suppress(Refused):  # credentials that may write are not always allowed to read
            _look(store, path)
    try:
        _put_patiently(store, path, data)
    except AlreadyExists:
        _sound.add(bucket)
        raise
    if bucket not in _sound:
        with suppress(StoreError, _HeaderRefused):  # the next write tries to find out again
            try:
                _put(store, path, data)
                _warn(store, bucket, "overwrites an object in spite of If-None-Match")
            except AlreadyExists:
                _sound.add(bucket)


def _put_patiently(store: Store, path: str, data: bytes) -> None:
    """Put the object conditionally, and repeat that after temporary failures."""
    for attempt in range(TRIES):
        try:
            _put(store, path, data)
            return
        except AlreadyExists:
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


def _put(store: Store, path: str, data: bytes) -> None:
    """Send one conditional put, without a retry."""
    try:
        # A multipart upload cannot be conditional; S3 accepts up to 5 GB in a single put.
        obstore.put(store._impatient, path, data, mode="create", use_multipart=False)
    except (obexc.BaseError, BotoCoreError, OSError) as error:
        answer = Answer.of(error)
        if answer.refuses_a_header:
            raise _HeaderRefused(answer.said()) from error
        raise translated(f"{store.url}/{path}", error) from error


def _warn(store: Store, bucket: str, what: str) -> None:
    _weak[bucket] = (
        f"s3://{urlsplit(store.url).netloc}: the server {what}. Instead, geostream looks whether an object is there "
        "before it writes it: two jobs that write under the same name at the same moment may both go through, so run "
        "one at a time"
    )
    log.warning(_weak[bucket])
