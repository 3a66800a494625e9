"""Read a store's URL, and refuse one that libraries would read in different ways.

One library drops what follows ``#`` or ``?``; another turns ``a//b`` into ``a/b`` or resolves ``..``. Two different
URLs could then mean the same folder, and one job could remove another's shards. So a prefix is accepted only if every
library behind :class:`Store` takes it literally.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from geostream.errors import BadInput

OTHERS = ("gs", "az", "abfss", "http", "https")  # schemes that obstore reads by itself
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?")
CONTAINER = re.compile(rf"({BUCKET.pattern}@)?{BUCKET.pattern}")
KINDS = f"s3://bucket/prefix, a local folder, file:///folder, {', '.join(f'{scheme}://…' for scheme in OTHERS)}"
# Signs that have a meaning in URLs but none in object names. Some clients turn backslashes into slashes.
NOT_IN_NAMES = {"#": "'#'", "?": "'?'", "\\": "a backslash"}


def read_url(text: str) -> str:
    """Return the store's URL as :class:`Store` keeps it.

    Args:
        text: A URL, or the path of a local folder.

    Returns:
        An absolute local path, or ``scheme://…`` without a slash at its end.

    Raises:
        BadInput: The text names no store, or libraries would take it for different folders.
    """
    if not text.strip():
        raise BadInput("the store's URL is empty; name s3://bucket/prefix or a local folder")
    if not text.isprintable() and "://" in text:
        raise BadInput(f"{text!a}: holds a character that cannot be seen; write the URL without it")
    scheme, slashes, rest = text.partition("://")
    if not slashes:
        return _local(text)
    scheme = scheme.lower()
    if scheme == "file":
        return _file(text, rest)
    if scheme not in ("s3", *OTHERS):
        raise BadInput(f"{text}: stores are {KINDS}")
    rest = rest.removesuffix("/")
    _check_names(text, rest, percent=scheme in ("s3", "http", "https"))
    _check_first(text, scheme, rest.split("/")[0])
    return f"{scheme}://{rest}"


def _check_first(text: str, scheme: str, first: str) -> None:
    """Raise BadInput if ``first`` is no bucket, container or host, whichever the scheme needs."""
    shape, what = {
        "s3": (BUCKET, "a bucket, s3://bucket/prefix"),
        "http": (HOST, "a host, http://host/folder"),
        "https": (HOST, "a host, https://host/folder"),
    }.get(scheme, (CONTAINER, f"a bucket, {scheme}://bucket/prefix"))
    if not shape.fullmatch(first):
        said = f"{first!r} is none" if first and "@" not in first else "there is none"
        raise BadInput(f"{_without_secret(text)}: the URL of this kind begins with {what}; {said}")


def _check_names(text: str, rest: str, *, percent: bool) -> None:
    """Raise BadInput if a part of the path is empty, "." or "..", or has a character that some library changes."""
    text = _without_secret(text)
    names = rest.split("/")[1:]
    if "" in names:
        raise BadInput(f"{text}: a folder's name is empty (two slashes in a row); write one slash")
    if steps := sorted({".", ".."} & set(names)):
        raise BadInput(f"{text}: {steps[0]!r} is no folder's name in an object store; write the folder itself")
    odd = NOT_IN_NAMES if percent else NOT_IN_NAMES | {"%": "'%'"}
    for sign, said in odd.items():
        if sign in rest:
            raise BadInput(f"{text}: {said} in a store's URL is not safe to use; choose a prefix without it")


def _file(text: str, rest: str) -> str:
    """Return the path of a ``file://`` URL's folder."""
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise BadInput(f"{text}: a file URL has three slashes and an absolute path, file:///folder")
    if "#" in path or "?" in path:
        raise BadInput(f"{text}: '#' and '?' end the path in a file URL; name the folder without file://")
    try:
        return _local(f"/{unquote(path, errors='strict')}")
    except UnicodeDecodeError as error:
        raise BadInput(f"{text}: its percent signs spell no UTF-8; name the folder without file://") from error


def _local(text: str) -> str:
    """Return the absolute path of a local folder; ``..`` is resolved as the operating system does it, after links."""
    if "\0" in text:
        raise BadInput(f"{text!a}: holds a zero byte; correct the path")
    found = SCHEME.match(text)
    if found and found[1].lower() in ("s3", "file", *OTHERS):
        raise BadInput(f"{text}: two slashes are missing behind {found[0]!r}; stores are {KINDS}")
    try:
        path = Path(text).expanduser()
        path = path.resolve() if ".." in path.parts else path.absolute()
    except (RuntimeError, OSError) as error:  # no such user, a loop of links
        raise BadInput(f"{text}: no local folder can be called so ({error})") from error
    return str(path)


def _without_secret(text: str) -> str:
    """Return the URL without the user and password before its host."""
    return re.sub(r"(?<=://)[^/@]*:[^/@]*@", "…@", text)
