"""Run the page's server: one process, until a signal ends it.

On SIGTERM or SIGINT no more connections are taken, and requests under way are answered first, for up to ``DRAIN``
seconds. Clients that keep a connection without sending a request are cut off after ``IDLE`` seconds; how long a request
may take to arrive, and how many may be answered at the same time, is in :mod:`geostream.serving.uploads`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from geostream.errors import BadInput

logger = logging.getLogger(__name__)

IDLE = 20.0  # seconds
DRAIN = 20  # seconds
CONNECTIONS = 256  # open at the same time; to others the server answers 503 without reading on


def listen(host: str, port: int) -> socket.socket:
    """Open the server's socket.

    Args:
        host: Name or address to listen on.
        port: 0 takes any free one.

    Raises:
        BadInput: The address is not this machine's, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BadInput(f"--port {port}: another program listens there; choose another, or 0 for any") from error
        reason = error.strerror or error
        raise BadInput(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from error
    # Its connections inherit this. asyncio sets it only where a socket names its protocol, and without it the end of
    # an answer waits for the client's acknowledgement of its beginning, which takes 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def make_server(app: FastAPI) -> uvicorn.Server:
    """Make the server of an application.

    Args:
        app: The application.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Impatient,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(IDLE),
            timeout_graceful_shutdown=DRAIN,
            limit_concurrency=CONNECTIONS,
        )
    )


def serve(app: FastAPI, listening: socket.socket, started: Callable[[], None]) -> None:
    """Serve the application until a signal comes.

    Args:
        app: The application.
        listening: The socket; it is closed at the end.
        started: Called when requests are answered.
    """
    server = make_server(app)

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if server.started:
            started()
        await serving

    # uvicorn raises the signal again when it is done, for whoever handled it before.
    earlier = {number: signal.signal(number, _ended) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(run())
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _ended(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


class _Impatient(H11Protocol):
    """Cut off a connection that brings no whole head of a request in time.

    uvicorn's own limit begins only when the first request was answered, and ends with the first byte of the next.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(IDLE, self._cut_off)

    def on_response_complete(self) -> None:
        self._deadline.cancel()
        self._deadline = self.loop.call_later(IDLE, self._cut_off)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _cut_off(self) -> None:
        """Close the connection unless a request is being answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
