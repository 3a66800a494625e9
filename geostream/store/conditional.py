"""Write an object only where there is none, also on S3 servers that cannot do so in one step.

A conditional put (``If-None-Match: *``) lets one of many writers win. Some servers refuse it, and a few overwrite the
object all the same. Which kind a server is, the first write in a process finds out, once a bucket. On those two kinds
the weaker way is taken from then on: look whether the object is there, then write it. Two writers who look at the same
moment can then both believe that they won, so a warning says that jobs under the same name must not run at once.

It costs two requests more in the first write: a look before, since a server that overwrites would do so, and the same
put again behind it, which has to be refused.
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

TRIES, FIRST_PAUSE = 8, 0.1  # a pause doubles each time: 13 seconds in all, or less
PROBE = "geostream-probe-"

_sound = set[str]()  # URLs of buckets whose server is known to keep what is there
_weak = dict[str, str]()  # of the others, with the warning
log = logging.getLogger(__name__)


class _HeaderRefused(Exception):
    """The server does not take conditional puts."""


def put_new(store: Store, path: str, data: bytes) -> None:
    """Write the object, or raise AlreadyExists where there is one. Raises StoreError for the rest."""
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
    if bucket not in _weak:  # now, since what was refused was the header
        _warn(store, bucket, f"takes no conditional puts ({refusal})")


def probe(store: Store) -> str | None:
    """Write an object of our own and remove it; return the warning where the server has no conditional puts.

    Its name is like no other. Raises StoreError where nothing may be written, or the object not be removed.
    """
    name = f"{PROBE}{uuid4().hex}"
    try:
        store.write(name, b"written by geostream to try this store; may be removed\n", if_absent=True)
    except StoreError:
        with suppress(StoreError):
            store.delete(name)  # an answer may have been lost
        raise
    store.delete(name)
    return _weak.get(_bucket(store)) if store.is_s3 else None


def _bucket(store: Store) -> str:
    return s3_access(urlsplit(store.url).netloc).url


def _look(store: Store, path: str) -> None:
    if store.exists(path):
        raise AlreadyExists(f"{store.url}/{path}: exists already")


def _put_conditionally(store: Store, bucket: str, path: str, data: bytes) -> None:
    """A conditional put; raises _HeaderRefused where the server knows none."""
    if bucket not in _sound:
        with suppress(Refused):  # who may write need not be allowed to look
            _look(store, path)
    try:
        _put_patiently(store, path, data)
    except AlreadyExists:
        _sound.add(bucket)
        raise
    if bucket not in _sound:
        with suppress(StoreError, _HeaderRefused):  # it could not be found out this time
            try:
                _put(store, path, data)
                _warn(store, bucket, "overwrites an object in spite of If-None-Match")
            except AlreadyExists:
                _sound.add(bucket)


def _put_patiently(store: Store, path: str, data: bytes) -> None:
    """Try again what may pass; raise AlreadyExists, _HeaderRefused, and StoreError for the rest."""
    for attempt in range(TRIES):
        try:
            _put(store, path, data)
            return
        except AlreadyExists:
            if attempt and _holds(store, path, data):  # of an earlier try only the answer was lost
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
    """One conditional put, asked once."""
    try:
        # It cannot be multipart, and S3 takes up to 5 GB in one.
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
