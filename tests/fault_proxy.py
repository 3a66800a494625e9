"""An S3 server's bad days: a proxy between a client and a real server that spoils the answers it is told to.

Decides that everything but the scripted faults is real. Requests go through byte for byte (Host, too, so signatures
stay valid), bodies are streamed, and faults befall only GETs that the server answered well: a fault counted in ``met``
is one that a client saw. The cost: a connection to the server for each request, and one thread for all of it.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from random import Random
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["drop", "cut", "short", "status", "flip", "delay", "stall"]

LOOPBACK = "127.0.0.1"
PIECE = 2**16
RESET_WHEN_CLOSED = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time at all


@dataclass
class Fault:
    """What befalls GETs whose path contains ``path``: each with probability ``share``, ``times`` of them at most.

    drop: closed without an answer. cut: closed within the body. short: a body cut off, and a Content-Length that fits
    it (Content-Range still tells of the whole). status: an S3 error. flip: one byte of the body inverted. delay: all
    well, but late. stall: silence within the body, until the client closes.
    """

    kind: Kind
    share: float = 1.0
    seed: int = 0
    times: int | None = None
    path: str = ".tar"
    once: bool = False  # never the same range of the same path again, so that nothing is beyond repair
    part: float = 0.5  # cut, short, stall: of the body, what still comes
    reset: bool = False  # drop, cut: with RST instead of FIN
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 1.0  # delay
    random: Random = field(init=False, repr=False)
    struck: set[tuple[str, str | None]] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def strikes(self, path: str, range: str | None) -> bool:
        """Whether a request meets this fault; if so, it has one time less left."""
        if self.path not in path or self.times == 0 or self.random.random() >= self.share:
            return False
        if self.once and (path, range) in self.struck:
            return False
        self.struck.add((path, range))
        if self.times is not None:
            self.times -= 1
        return True


@dataclass(frozen=True)
class Request:
    """A request as it came; ``connection`` counts the client's connections from 0."""

    method: str
    path: str
    range: str | None
    access_key: str | None
    connection: int


@dataclass(frozen=True)
class Head:
    """The lines before a body: as they were on the wire, and taken apart."""

    raw: bytes
    start: list[str]
    fields: dict[str, str]

    @classmethod
    async def read(cls, source: asyncio.StreamReader) -> Head:
        raw = await source.readuntil(b"\r\n\r\n")
        start, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        named = (line.split(":", 1) for line in lines)
        return cls(raw, start.split(" ", 2), {name.lower(): value.strip() for name, value in named})

    @property
    def length(self) -> int:
        return int(self.fields.get("content-length", 0))

    def with_length(self, length: int) -> bytes:
        return re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % length, self.raw)

    async def body(self, source: asyncio.StreamReader) -> AsyncIterator[bytes]:
        """What follows on the wire, piece by piece, chunk sizes and all."""
        if self.fields.get("transfer-encoding", "").lower() != "chunked":
            async for piece in exactly(source, self.length):
                yield piece
            return
        size = -1
        while size != 0:
            line = await source.readuntil(b"\r\n")
            yield line
            size = int(line.split(b";")[0], 16)
            if size:
                async for piece in exactly(source, size + len(b"\r\n")):
                    yield piece
        while line != b"\r\n":  # trailers
            line = await source.readuntil(b"\r\n")
            yield line


async def exactly(source: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    """The next ``size`` bytes, in pieces."""
    while size:
        piece = await source.read(min(size, PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


async def copy(pieces: AsyncIterator[bytes], target: asyncio.StreamWriter, flip: int | None = None) -> None:
    """Write all pieces, with byte number ``flip`` inverted."""
    at = 0
    async for piece in pieces:
        if flip is not None and at <= flip < at + len(piece):
            spoilt = bytearray(piece)
            spoilt[flip - at] ^= 0xFF
            piece = bytes(spoilt)
        at += len(piece)
        target.write(piece)
        await target.drain()


def error_answer(status: int, code: str, method: str = "GET") -> bytes:
    """A refusal in S3's words."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>fault proxy</Message></Error>'
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/xml\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{'' if method == 'HEAD' else body}".encode()


class FaultProxy:
    """A proxy at ``url`` to ``upstream``, which may be changed, or be down: then connections are reset."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []  # the first that strikes is the one
        self.met: Counter[str] = Counter()  # by kind; "refused": keys
        self.requests: list[Request] = []
        self._refused: dict[str, int] = {}
        self._connections = 0
        self._open: set[asyncio.Task[Any]] = set()
        self._socket = socket.create_server((LOOPBACK, 0))
        # Connections inherit it; asyncio sets it on sockets of its own making only. Without: 40 ms an answer.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(),), name=f"fault-proxy {self.url}", daemon=True
        )
        self._thread.start()

    def inject(self, kind: Kind, **parameters: Any) -> Fault:
        """Add a fault; the parameters are ``Fault``'s."""
        fault = Fault(kind, **parameters)
        self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults, every key accepted; what was counted stays."""
        self.faults = []
        self._refused = {}

    def refuse_key(self, access_key: str, status: int = 403) -> None:
        """From now on, whatever is signed with this key gets ExpiredToken (from AWS itself: with status 400)."""
        self._refused[access_key] = status

    @property
    def open_connections(self) -> int:
        """How many connections clients hold."""
        return len(self._open)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, sock=self._socket)
        await self._end.wait()
        server.close()
        await asyncio.sleep(0)  # connections just accepted begin
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open)
        await asyncio.sleep(0)  # aborted connections close their sockets

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._open.add(task)
        number, self._connections = self._connections, self._connections + 1
        writer.transport.set_write_buffer_limits(high=0)  # what is drained is sent
        try:
            while await self._exchange(number, reader, writer):
                pass
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):  # either side is gone, or a fault wants it so
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_WHEN_CLOSED)
        except asyncio.CancelledError:  # the proxy ends
            pass
        finally:
            writer.transport.abort()
            self._open.discard(task)

    async def _exchange(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False: the connection ends with it."""
        head = await Head.read(reader)
        method, url, _ = head.start
        key = re.search(r"Credential=([^/,]+)/", head.fields.get("authorization", ""))
        request = Request(method, url.split("?")[0], head.fields.get("range"), key and key[1], number)
        self.requests.append(request)
        if request.access_key in self._refused:
            async for _ in head.body(reader):
                pass
            self.met["refused"] += 1
            writer.write(error_answer(self._refused[request.access_key], "ExpiredToken", method))
            await writer.drain()
            return True
        address = urlsplit(self.upstream)
        source, target = await asyncio.open_connection(address.hostname, address.port)
        try:
            target.write(head.raw)
            if "expect" in head.fields:  # the client sends its body once the server says that it wants it
                answer = await Head.read(source)
                writer.write(answer.raw)
                if answer.start[1] != "100":
                    await copy(answer.body(source), writer)
                    return False
            await copy(head.body(reader), target)
            return await self._answer(request, source, reader, writer)
        finally:
            target.transport.abort()

    async def _answer(
        self, request: Request, source: asyncio.StreamReader, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """The server's answer, spoilt or not; False: the connection ends with it."""
        answer = await Head.read(source)
        well = request.method == "GET" and answer.start[1] in ("200", "206") and answer.length > 0
        fault = next((fault for fault in self.faults if well and fault.strikes(request.path, request.range)), None)
        if fault is None:
            writer.write(answer.raw)
            if request.method != "HEAD" and answer.start[1] not in ("204", "304"):
                await copy(answer.body(source), writer)
            return True
        self.met[fault.kind] += 1
        if fault.kind == "status":
            writer.write(error_answer(fault.status, fault.code))
            await writer.drain()
            return True
        if fault.kind == "delay":
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), fault.seconds)  # nothing comes, but the client may go
                return False
        if fault.kind != "drop":
            kept = int(answer.length * fault.part) if fault.kind in ("cut", "short", "stall") else answer.length
            writer.write(answer.with_length(kept) if fault.kind == "short" else answer.raw)
            flip = fault.random.randrange(answer.length) if fault.kind == "flip" else None
            await copy(exactly(source, kept), writer, flip)
        if fault.kind == "stall":
            await reader.read()  # until the client closes
        if fault.reset:
            raise ConnectionResetError
        return fault.kind in ("short", "flip", "delay")


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy for the length of a ``with`` block; its connections end with it."""
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.stop()
