"""What one process has used so far: memory, processor time, bytes and requests; asked of Dask's workers, too.

The most memory is the kernel's high-water mark of the process itself (``VmHWM``). The one of ``getrusage`` would begin
with that of the process that started it. Bytes are those of all reads and writes of files, from the disk or from the
kernel's cache. Requests are the calls of obstore, which would be requests on S3; the index is read through fsspec and
counts in bytes only.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore

CALLS = ("get", "get_range", "get_ranges", "head", "put", "delete")
_made = 0


def usage() -> dict[str, float]:
    """Return what this process has used since it began, and the requests since :func:`begin`."""
    times = os.times()
    io = dict(re.findall(r"(\w+): (\d+)", Path("/proc/self/io").read_text()))
    return {
        "peak_bytes": _memory("VmHWM"),
        "cpu_seconds": times.user + times.system,
        "bytes_read": int(io["rchar"]),
        "bytes_written": int(io["wchar"]),
        "requests": _made,
    }


def resident() -> int:
    """Return the bytes that this process holds now."""
    return _memory("VmRSS")


def _memory(field: str) -> int:
    [kib] = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


def begin() -> dict[str, float]:
    """Import what the stages' tasks import, count requests from now on, and return the usage."""
    import faiss  # noqa: F401
    import scipy.spatial  # noqa: F401

    import geostream.mining.visual
    import geostream.planning.make_plan
    import geostream.reclustering.recluster  # noqa: F401

    for name in (*CALLS, *(f"{name}_async" for name in CALLS)):
        setattr(obstore, name, _counted(getattr(obstore, name)))
    return usage()


def _counted(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def counted(*arguments: Any, **named: Any) -> Any:
        global _made  # of this process; one too few now and then does not matter
        _made += 1
        return call(*arguments, **named)

    return counted
