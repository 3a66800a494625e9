"""What a contestant fetched: counted by itself, or by hooks in the S3 clients that the peers use.

The counts lie in shared memory, so that forked loader workers add to them, too.
"""

from __future__ import annotations

import multiprocessing
from functools import wraps
from typing import Any


class Traffic:
    """Bytes fetched, requests, and the bytes of the images handed over (``bytes_used``)."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._counts = {name: context.Value("q", 0) for name in ("bytes_fetched", "requests", "bytes_used")}

    def add(self, *, bytes_fetched: int = 0, requests: int = 0, bytes_used: int = 0) -> None:
        for name, more in (("bytes_fetched", bytes_fetched), ("requests", requests), ("bytes_used", bytes_used)):
            with self._counts[name]:
                self._counts[name].value += more

    def as_dict(self) -> dict[str, int]:
        return {name: count.value for name, count in self._counts.items()}


def count_botocore(traffic: Traffic) -> None:
    """From now on count what botocore (and boto3 on it) sends and gets in this process and its forks."""
    from botocore.httpsession import URLLib3Session

    send = URLLib3Session.send

    @wraps(send)
    def counted(self: Any, request: Any) -> Any:
        response = send(self, request)
        length = int(response.headers.get("Content-Length") or 0) if request.method == "GET" else 0
        traffic.add(requests=1, bytes_fetched=length)
        return response

    URLLib3Session.send = counted


def count_obstore(traffic: Traffic) -> None:
    """The same for obstore's reads. Adjacent ranges asked for together count as the one request that they become."""
    import obstore

    get, get_async = obstore.get, obstore.get_async
    get_ranges, get_ranges_async = obstore.get_ranges, obstore.get_ranges_async

    def whole(result: Any) -> Any:
        traffic.add(requests=1, bytes_fetched=int(result.meta["size"]))
        return result

    def parts(result: Any) -> Any:
        traffic.add(requests=1, bytes_fetched=sum(len(part) for part in result))
        return result

    async def counted_get_async(*args: Any, **options: Any) -> Any:
        return whole(await get_async(*args, **options))

    async def counted_get_ranges_async(*args: Any, **options: Any) -> Any:
        return parts(await get_ranges_async(*args, **options))

    obstore.get = lambda *args, **options: whole(get(*args, **options))
    obstore.get_ranges = lambda *args, **options: parts(get_ranges(*args, **options))
    obstore.get_async, obstore.get_ranges_async = counted_get_async, counted_get_ranges_async
