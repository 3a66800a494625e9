"""One contestant of the sharding benchmark, in a fresh process: ``python -m tests.benchmarks.shard_run write|check …``.

Decides where the clock stands: it runs from the end of importing to the last file, so reading the lists, starting
workers and closing shards count. ``write MODULE JOB`` prints what it took, ``check MODULE JOB`` what was stored: how
many images, in which sizes, and how near they are to Pillow's. The result is one line of JSON, the last.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SHARD_BYTES = 128 * 2**20
TILE, VIEW = (384, 384), (384, 768)  # height, width as they are stored
EVERY = 10  # of the images are compared with Pillow's


class Listed(NamedTuple):
    """A raw image below the raw folder, and the (height, width) that it shall have."""

    path: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Job:
    """All that a contestant is told. ``listing``: a JSON file of the places, each its tile and its views."""

    raw: str
    out: str  # not there yet
    listing: str
    workers: int

    def listed(self) -> list[list[Listed]]:
        places = json.loads(Path(self.listing).read_text())
        return [[Listed(path, TILE if n == 0 else VIEW) for n, path in enumerate(place)] for place in places]


def check(module: Any, job: Job) -> dict[str, Any]:
    """Raises ValueError where an image is missing, there twice, or of another size than wanted."""
    from tests.benchmarks.peers.pillow_shard import stored

    wanted = {image.path: image for place in job.listed() for image in place}
    compared, seen = set(sorted(wanted)[::EVERY]), set[str]()
    n_bytes, nearness = 0, []
    for path, data in module.read(job):
        n_bytes += len(data)
        height, width = wanted[path].size
        with Image.open(io.BytesIO(data)) as image:
            if path in seen or image.format != "JPEG" or image.size != (width, height):
                raise ValueError(f"{path}: stored twice, or as {image.format} of {image.size}")
            seen.add(path)
            if path in compared:
                theirs = Image.open(io.BytesIO(stored(Path(job.raw), wanted[path])))
                nearness.append(psnr(np.asarray(image), np.asarray(theirs)))
    if seen != set(wanted):
        raise ValueError(f"{len(wanted) - len(seen)} images were not stored")
    return {"images": len(seen), "bytes": n_bytes, "psnr_median": float(np.median(nearness)), "psnr_min": min(nearness)}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB between two uint8 images; 99 where they are the same."""
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(min(99.0, 10 * np.log10(255**2 / error))) if error else 99.0


def main(task: str, name: str, path: str) -> None:
    module, job = importlib.import_module(name), Job(**json.loads(Path(path).read_text()))
    if task == "check":
        print(json.dumps(check(module, job)), flush=True)
        return
    cpu, begin = sum(os.times()[:4]), time.perf_counter()
    module.write(job)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "cpu_s_before": cpu}), flush=True)


def write_job(job: Job, path: Path) -> None:
    path.write_text(json.dumps(asdict(job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
