"""A running page: its server as a process of its own, or within the test's."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import httpx
import numpy as np
import psutil
import uvicorn
from PIL import Image

from geostream.locating.locate import Locator
from geostream.serving.app import make_app
from geostream.serving.server import listen, make_server
from geostream.serving.service import Service
from geostream.serving.uploads import Limits
from geostream.store import Store

HERE = "127.0.0.1"


@dataclass
class Page:
    """The server of a page, a process of its own."""

    process: subprocess.Popen[str]
    url: str = ""
    errors: list[str] = field(default_factory=list)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def memory(self) -> int:
        """The most bytes of memory that the process has held so far."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) * 1024

    @property
    def open_files(self) -> int:
        return psutil.Process(self.process.pid).num_fds()


def page_command(store: Store, *options: str) -> subprocess.Popen[str]:
    """Start ``geostream serve`` on a free port."""
    command = [sys.executable, "-m", "geostream", "serve", store.url, "--port", "0", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@contextmanager
def running_page(store: Store, *options: str) -> Iterator[Page]:
    """``geostream serve`` on a free port, from when it answers to when the test is done with it."""
    process = page_command(store, *options)
    page = Page(process)
    assert process.stdout and process.stderr
    reader = threading.Thread(target=_read_lines, args=(process.stderr, page.errors), daemon=True)
    reader.start()
    try:
        first = process.stdout.readline()
        found = re.match(r"http://\S+", first)
        assert found, first + "".join(page.errors)
        page.url = found[0]
        yield page
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)
        reader.join(10)
        process.stdout.close()
        process.stderr.close()


def _read_lines(stream: IO[str], lines: list[str]) -> None:
    lines.extend(stream)


class Here(NamedTuple):
    """The server of a page, a thread of this process."""

    url: str
    service: Service
    server: uvicorn.Server


@contextmanager
def page_here(store: Store, limits: Limits | None = None) -> Iterator[Here]:
    """The page of a store's only index, served by a thread of this process."""
    service = Service(Locator.open(store), limits or Limits())
    listening = listen(HERE, 0)
    url = f"http://{HERE}:{listening.getsockname()[1]}"
    server = make_server(make_app(service))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Here(url, service, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to this"
        time.sleep(0.05)


def picture(width: int = 64, height: int = 16, seed: int = 0, kind: str = "JPEG") -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def ask(url: str, *photos: bytes, name: str = "photo.jpg") -> httpx.Response:
    """Ask where photos were taken."""
    files = [("photos", (name, photo, "image/jpeg")) for photo in photos]
    return httpx.post(f"{url}/api/locate", files=files, timeout=200)
