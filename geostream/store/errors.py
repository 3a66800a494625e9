"""Turn the object store library's errors into geostream's: one line with the URL and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore import exceptions as obexc

from geostream.errors import AlreadyExists, NotFound, Refused, StoreError, Unanswered

STATUS, CODE = re.compile(r"status code: (\d{3})"), re.compile(r"<Code>(\w+)</Code>")


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn obstore's errors into ours, with the URL and what to do."""
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StoreError(f"{url}: the bucket does not exist; create it or correct the URL") from error
        raise NotFound(f"{url}: no such object") from error
    except obexc.AlreadyExistsError as error:
        raise AlreadyExists(f"{url}: exists already") from error
    except (obexc.PermissionDeniedError, obexc.UnauthenticatedError, PermissionError) as error:
        raise Refused(_refused(url)) from error
    except (obexc.BaseError, OSError) as error:
        raise _sorted_out(url, error) from error


def _sorted_out(url: str, error: Exception) -> StoreError:
    """What an error of no particular class is about; only its text tells."""
    text = f"{url}: {_reason(error)}"
    status, code = STATUS.search(str(error)), CODE.search(str(error))
    if status is None:
        if isinstance(error, OSError):
            return StoreError(text)
        return Unanswered(text, "stalled" if "kind: Timeout" in str(error) else "dropped")
    if status[1] == "403" or (code and code[1] == "ExpiredToken"):
        return Refused(_refused(url))
    if status[1] == "429" or status[1].startswith("5") or (code and code[1] == "RequestTimeout"):
        return Unanswered(text, "busy")
    return StoreError(text)


def _refused(url: str) -> str:
    return (
        f"{url}: access refused; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, "
        "and that they may read and write here"
    )


def _reason(error: Exception) -> str:
    """The useful part of an obstore message, which otherwise runs over many lines of debug output."""
    text = str(error)
    if "NoSuchBucket" in text:
        return "the bucket does not exist; create it or correct the URL"
    if "Connection refused" in text or "ConnectionRefused" in text or "dns error" in text:
        return "cannot connect; is the server up, and AWS_ENDPOINT_URL right?"
    return " ".join(text.split("\n\nDebug source:")[0].split())[:500]
