"""A small HTTP server whose answers a test writes, for what no real server can be made to say."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    """A request as it came; header names in small letters."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_conditional(self) -> bool:
        return self.headers.get("if-none-match") == "*" or "if-match" in self.headers


@dataclass(frozen=True)
class Answer:
    """What is sent back; of an answer to HEAD only the headers."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def s3_error(status: int, code: str, message: str = "", more: str = "") -> Answer:
    """A refusal in S3's words; ``more``: further elements."""
    xml = f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'
    return Answer(status, xml.encode(), {"Content-Type": "application/xml"})


def tag(data: bytes) -> str:
    """What S3 calls a content by."""
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def content(request: Request, data: bytes) -> Answer:
    """An object, or the range of it that is asked for."""
    headers = {"ETag": tag(data), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
    if not (wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))):
        return Answer(200, data, headers)
    start, stop = int(wanted[1] or 0), min(int(wanted[2] or len(data)) + 1, len(data))
    if not wanted[1]:
        start, stop = len(data) - int(wanted[2]), len(data)
    if start >= len(data):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


class ScriptedServer:
    """The server at ``url``; ``requests`` are all that came."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self.answer, self.requests = answer, list[Request]()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body leave together

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                request = Request(self.command, self.path, headers, body)
                outer.requests.append(request)
                answer = outer.answer(request)
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD" and answer.status not in (204, 304):
                    self.wfile.write(answer.body)
                self.wfile.flush()

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def start(self) -> None:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def scripted_server(answer: Callable[[Request], Answer]) -> Iterator[ScriptedServer]:
    """The server for the length of a ``with`` block."""
    server = ScriptedServer(answer)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Bucket:
    """An S3 bucket for a scripted server: ``put`` may answer a put, else it is done; ``heeds``: conditions of puts."""

    heeds: bool = True
    put: Callable[[Request], Answer | None] = lambda _: None
    objects: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Answer:
        name = request.path.split("?")[0].removeprefix("/bucket/")
        with self.lock:
            if request.method == "PUT":
                if answer := self.put(request):
                    return answer
                wanted = request.headers.get("if-match")
                there = tag(self.objects[name]) if name in self.objects else None
                if self.heeds and request.is_conditional and there != wanted:
                    return s3_error(412, "PreconditionFailed")
                self.objects[name] = request.body
                return Answer(200, headers={"ETag": tag(request.body)})
            if request.method == "DELETE":
                self.objects.pop(name, None)
                return Answer(204)
            if name not in self.objects:
                return s3_error(404, "NoSuchKey")
            return content(request, self.objects[name])
