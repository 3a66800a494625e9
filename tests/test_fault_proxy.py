"""The fault proxy: what goes through it is the real server's, and each fault is one that a client really sees."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from random import Random
from threading import enumerate as threads
from typing import Any

import obstore
import pytest
from botocore.session import Session
from obstore.exceptions import GenericError, PermissionDeniedError
from obstore.store import S3Store

from infra.s3 import REGION, S3Server
from tests.fault_proxy import FaultProxy, fault_proxy

DATA = Random(1).randbytes(1_000_000)
START, END = 1_000, 901_000
RANGE = DATA[START:END]


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint) as running:
        yield running
    assert not [thread.name for thread in threads() if thread.name.startswith("fault-proxy")]


@pytest.fixture
def shard(s3: S3Server, proxy: FaultProxy) -> Shard:
    """DATA on the server, to be read through the proxy."""
    folder = uuid.uuid4().hex
    store(s3, s3.endpoint, folder).put("shard.tar", DATA)
    return Shard(store(s3, proxy.url, folder))


def store(s3: S3Server, endpoint: str, folder: str) -> S3Store:
    return S3Store(
        s3.bucket,
        prefix=folder,
        endpoint=endpoint,
        region=REGION,
        access_key_id=s3.credentials.key,
        secret_access_key=s3.credentials.secret,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


class Shard:
    """The object ``shard.tar``, as a client gets it that never tries again."""

    def __init__(self, at: S3Store) -> None:
        self.store = at

    def read(self, start: int = START, end: int = END, seconds: float = 5.0) -> bytes:
        return asyncio.run(self.read_async(start, end, seconds))

    async def read_async(self, start: int = START, end: int = END, seconds: float = 5.0) -> bytes:
        async with asyncio.timeout(seconds):
            result = await obstore.get_async(self.store, "shard.tar", options={"range": (start, end)})
            return bytes(await result.bytes_async())

    def read_all(self) -> bytes:
        return bytes(self.store.get("shard.tar").bytes())


def test_without_faults_all_is_as_on_the_server(shard: Shard, proxy: FaultProxy, s3: S3Server) -> None:
    assert shard.read() == RANGE
    assert shard.read_all() == DATA
    shard.store.put("other.tar", DATA[::-1])
    assert bytes(shard.store.get("other.tar").bytes()) == DATA[::-1]
    assert [meta["path"] for chunk in shard.store.list() for meta in chunk] == ["other.tar", "shard.tar"]
    assert shard.store.head("shard.tar")["size"] == len(DATA)
    with pytest.raises(FileNotFoundError):
        shard.store.get("absent.tar")

    first = proxy.requests[0]
    assert (first.method, first.path) == ("GET", f"/{s3.bucket}/{shard.store.prefix}/shard.tar")
    assert (first.range, first.access_key) == (f"bytes={START}-{END - 1}", s3.credentials.key)
    # Not always one: a client that asks again at once may not know yet that its connection is free.
    assert len({request.connection for request in proxy.requests}) < len(proxy.requests) / 2
    assert not proxy.met


@pytest.mark.parametrize(
    ("kind", "parameters", "error", "message"),
    [
        ("drop", {}, GenericError, "IncompleteMessage"),
        ("drop", {"reset": True}, GenericError, "ConnectionReset"),
        ("cut", {}, GenericError, "IncompleteBody"),
        ("cut", {"reset": True}, GenericError, "ConnectionReset"),
        ("status", {}, GenericError, "503 Service Unavailable.*<Code>SlowDown</Code>"),
        ("status", {"status": 429, "code": "TooManyRequests"}, GenericError, "429 Too Many Requests"),
        ("status", {"status": 500, "code": "InternalError"}, GenericError, "500 Internal Server Error"),
        ("status", {"status": 403, "code": "AccessDenied"}, PermissionDeniedError, "<Code>AccessDenied</Code>"),
        ("stall", {}, TimeoutError, ""),
    ],
)
def test_failures(
    shard: Shard, proxy: FaultProxy, kind: Any, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    proxy.inject(kind, times=1, **parameters)
    with pytest.raises(error, match=f"(?s){message}"):
        shard.read(seconds=0.5)
    assert proxy.met == {kind: 1}
    assert shard.read() == RANGE
    assert len(proxy.requests) == 2


def test_short_body_goes_unnoticed_by_the_client(shard: Shard, proxy: FaultProxy) -> None:
    proxy.inject("short", times=2, part=0.25)
    assert shard.read() == RANGE[: len(RANGE) // 4]
    assert shard.read_all() == DATA[: len(DATA) // 4]
    assert proxy.met == {"short": 2}


def test_a_client_that_asks_before_it_sends_a_body(shard: Shard, proxy: FaultProxy, s3: S3Server) -> None:
    """botocore, and with it s3fs, sends ``Expect: 100-continue``."""
    client = Session().create_client(
        "s3",
        endpoint_url=proxy.url,
        region_name=REGION,
        aws_access_key_id=s3.credentials.key,
        aws_secret_access_key=s3.credentials.secret,
    )
    client.put_object(Bucket=s3.bucket, Key=f"{shard.store.prefix}/shard.tar", Body=DATA[::-1])
    client.close()
    assert shard.read_all() == DATA[::-1]


def test_flip_inverts_one_byte_that_the_seed_tells(shard: Shard, proxy: FaultProxy) -> None:
    seen = []
    for seed in (1, 1, 2):
        proxy.clear()
        proxy.inject("flip", seed=seed)
        seen.append(shard.read())
    assert seen[0] == seen[1] != seen[2]
    assert [a ^ b for a, b in zip(seen[0], RANGE, strict=True) if a != b] == [0xFF]


def test_delay_is_late_and_whole(shard: Shard, proxy: FaultProxy) -> None:
    proxy.inject("delay", seconds=0.3)
    began = time.monotonic()
    assert shard.read() == RANGE
    assert time.monotonic() - began > 0.3


@pytest.mark.parametrize("kind", ["delay", "stall"])
def test_waiting_requests_end_with_the_client(shard: Shard, proxy: FaultProxy, kind: Any) -> None:
    proxy.inject(kind, **({"seconds": 60} if kind == "delay" else {}))

    async def read_eight() -> list[bytes | BaseException]:
        return await asyncio.gather(*(shard.read_async(seconds=0.5) for _ in range(8)), return_exceptions=True)

    assert {type(result) for result in asyncio.run(read_eight())} == {TimeoutError}
    deadline = time.monotonic() + 2
    while proxy.open_connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proxy.open_connections == 0
    assert proxy.met == {kind: 8}


def test_stalled_answers_end_with_the_proxy(shard: Shard, s3: S3Server) -> None:
    with fault_proxy(s3.endpoint) as proxy:
        proxy.inject("stall")
        result = store(s3, proxy.url, str(shard.store.prefix)).get("shard.tar")
    with pytest.raises(GenericError, match="body"):
        result.bytes()


def test_share_times_and_path_say_which_requests_are_hit(shard: Shard, proxy: FaultProxy) -> None:
    def hits(requests: int, **parameters: Any) -> list[int]:
        proxy.clear()
        proxy.inject("short", part=0, **parameters)
        return [i for i in range(requests) if not shard.read(0, 10)]

    some = hits(30, share=0.3, seed=5)
    assert some == hits(30, share=0.3, seed=5) != hits(30, share=0.3, seed=6)
    assert 3 < len(some) < 18
    assert hits(5, times=2) == [0, 1]
    assert hits(3, path="elsewhere.tar") == []


def test_refused_key_has_expired(shard: Shard, proxy: FaultProxy, s3: S3Server) -> None:
    proxy.refuse_key(s3.credentials.key)
    with pytest.raises(PermissionDeniedError, match="ExpiredToken"):
        shard.read()
    with pytest.raises(PermissionDeniedError, match="ExpiredToken"):
        shard.store.put("new.tar", DATA, use_multipart=False)
    proxy.refuse_key(s3.credentials.key, status=400)
    with pytest.raises(GenericError, match="ExpiredToken"):
        shard.read()
    assert proxy.met == {"refused": 3}
    proxy.clear()
    assert shard.read() == RANGE


def test_the_server_may_be_down_and_come_back(shard: Shard, proxy: FaultProxy, s3: S3Server) -> None:
    proxy.upstream = "http://127.0.0.1:1"
    with pytest.raises(GenericError, match="ConnectionReset"):
        shard.read()
    proxy.upstream = s3.endpoint
    assert shard.read() == RANGE
