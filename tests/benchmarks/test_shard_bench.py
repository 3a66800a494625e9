"""What the sharding benchmark makes of its measurements, and that it sees what a contestant leaves out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.shard import figures
from tests.benchmarks.shard_run import TILE, VIEW, Job, check


def jpeg(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size[::-1], (90, 120, 30)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_a_peer_is_beaten_by_the_median_of_the_better_one() -> None:
    def repeats(*rates: float) -> list[dict[str, float]]:
        return [{"images_per_s": rate, "images_per_cpu_s": rate / 2, "peak_bytes": 3e8} for rate in rates]

    raw = {"2": {"geostream": repeats(30, 32, 34), "webdataset": repeats(20, 20, 90), "litdata": repeats(10, 10, 10)}}
    stored = {"images": 2, "bytes": 100, "psnr_min": 41.0, "psnr_median": 43.0}
    made = figures(raw, {"geostream": stored, "webdataset": stored, "litdata": stored | {"bytes": 80}})
    assert made["of_best_peer_2_workers"]["best_peer"] == "webdataset"
    assert made["of_best_peer_2_workers"]["value"] == pytest.approx(1.6) and made["of_best_peer_2_workers"]["met"]
    assert made["peak_mb_2_workers"]["met"] and made["psnr_of_pillows_db"]["met"]
    assert made["bytes_of_peers"]["value"] == pytest.approx(1.25) and not made["bytes_of_peers"]["met"]


def test_what_was_stored_is_checked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    places = [[f"tile-{n}.png", f"view-{n}.png"] for n in range(10)]
    for place in places:
        for name in place:
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "listing.json").write_text(json.dumps(places))
    job = Job(str(tmp_path), "", str(tmp_path / "listing.json"), 1)
    whole = [(name, jpeg(size)) for place in places for name, size in zip(place, (TILE, VIEW), strict=True)]

    def contestant(*stored: tuple[str, bytes]) -> SimpleNamespace:
        def read(job: Job) -> Iterator[tuple[str, bytes]]:
            yield from stored

        return SimpleNamespace(read=read)

    assert check(contestant(*whole), job)["images"] == 20
    assert check(contestant(*whole), job)["psnr_min"] < 30  # grey is not what the raw images show
    with pytest.raises(ValueError, match="1 images "):
        check(contestant(*whole[1:]), job)
    with pytest.raises(ValueError, match="twice"):
        check(contestant(*whole, whole[0]), job)
    with pytest.raises(ValueError, match="of \\(768, 384\\)"):
        check(contestant((whole[0][0], jpeg(VIEW)), *whole[1:]), job)
