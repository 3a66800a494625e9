"""Raw data on a real S3 server and behind a real HTTP server: read as from a disk, whatever befalls the connection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from geostream.errors import BadInput, MissingRaw, Unanswered
from geostream.store import Store
from infra.s3 import S3Server
from sharding import ShardOptions, read_places, shard
from sharding import raw_reader as raw_reader_module
from sharding.encode import BrokenImage
from sharding.raw_path import StorePath, open_raw
from sharding.raw_reader import RawReader
from sharding.sources import Stamp, sources_of
from tests.command import refused, said
from tests.fault_proxy import Fault, fault_proxy
from tests.scripted_server import Answer, Request, content, scripted_server
from tests.sharding.growing import Folder
from tests.vigor_raw import TWO, jpeg, write_city

SMALL = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000)
pytestmark = pytest.mark.usefixtures("quick_retries")


def uploaded(folder: Path, store: Store) -> Store:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    return store


def university(raw: Path) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("train/satellite/01", "train/drone/01", "test/gallery_satellite/02", "test/query_drone/02"):
        (raw / folder).mkdir(parents=True)
        (raw / folder / "é, image.jpeg").write_bytes(jpeg(rng, (16, 16)))
    (raw / "test/gallery_drone/03").mkdir(parents=True)
    (raw / "test/gallery_drone/03/1.jpg").write_bytes(jpeg(rng, (16, 16)))
    return raw


def test_a_folder_in_a_bucket_makes_the_same_layout(tmp_path: Path, s3_store: Store, raw_folder: Path) -> None:
    remote = uploaded(raw_folder, s3_store.child("raw", "vigor"))
    layouts = [
        shard(read_places("vigor", where, **TWO), Store.open(tmp_path / name), "vigor", "base", SMALL, workers).layout
        for name, where, workers in (("local", str(raw_folder), 1), ("remote", remote.url, 2))
    ]
    assert layouts[0].id == layouts[1].id
    local, other = (sources_of(layout) for layout in layouts)
    assert local and other and local.keys() == other.keys()
    assert all(other[path].crc32c == one.crc32c and other[path].etag and not one.etag for path, one in local.items())


def test_folders_of_pictures_without_lists(tmp_path: Path, s3_store: Store) -> None:
    raw = university(tmp_path / "raw")
    local = read_places("university1652", raw)
    remote = read_places("university1652", uploaded(raw, s3_store.child("u")).url)
    assert local.places == remote.places and len(local.places) == 2 and local.notes == remote.notes
    assert all(image.stamp for place in remote.places for image in place.images())
    layouts = [
        shard(one, Store.open(tmp_path / n), "u", options=SMALL, workers=1).layout
        for n, one in zip("ab", (local, remote), strict=True)
    ]
    assert layouts[0].id == layouts[1].id


def test_what_is_unchanged_in_a_bucket_is_not_read_again(tmp_path: Path, s3_store: Store) -> None:
    folder = Folder(tmp_path / "raw").add("NewYork", range(6)).add("Chicago", range(4))
    uploaded(folder.write(), s3_store.child("raw"))
    target = Store.open(tmp_path / "store")

    def sharded() -> tuple[dict[str, int], int, bool]:
        raw = read_places("vigor", f"{s3_store.url}/raw", **TWO)
        report = shard(raw, target, "vigor", options=SMALL, workers=1)
        return report.counts, report.bytes_read, report.already

    sharded()
    assert sharded() == ({}, 0, True)
    before = (tmp_path / "raw" / folder.tile_path(("NewYork", 2))).read_bytes()
    s3_store.write(f"raw/{folder.tile_path(('NewYork', 2))}", before)  # the same bytes at another time: the same ETag
    assert sharded() == ({}, 0, True)
    folder.tiles["NewYork", 2] = 1
    uploaded(folder.add("NewYork", range(6, 8)).write(), s3_store.child("raw"))
    counts, read, already = sharded()
    assert not already and (counts["new places"], counts["changed places"], counts["changed images"]) == (2, 1, 1)
    assert read < sum(path.stat().st_size for path in (tmp_path / "raw" / "NewYork").rglob("*.*")) * 0.8


def test_a_raw_folder_that_moves_into_a_bucket_is_read_once(tmp_path: Path, s3_store: Store, raw_folder: Path) -> None:
    target = Store.open(tmp_path / "store")
    first = shard(read_places("vigor", raw_folder, **TWO), target, "vigor", options=SMALL, workers=1)
    raw = read_places("vigor", uploaded(raw_folder, s3_store.child("raw")).url, **TWO)
    again = shard(raw, target, "vigor", options=SMALL, workers=1)
    assert again.already and again.bytes_read > 0 and again.layout.id == first.layout.id


def test_reads_that_break_off_are_repeated(
    tmp_path: Path, s3: S3Server, s3_store: Store, raw_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded(raw_folder, s3_store.child("raw"))
    whole = shard(
        read_places("vigor", raw_folder, **TWO), Store.open(tmp_path / "a"), "vigor", options=SMALL, workers=1
    )
    faults = [Fault("drop", path="panorama", times=3), Fault("status", path="satellite", times=3)]
    with fault_proxy(s3.endpoint) as proxy:
        proxy.faults = faults
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        raw = read_places("vigor", f"{s3_store.url}/raw", **TWO)
        raw_reader_module._opened.cache_clear()
        report = shard(raw, Store.open(tmp_path / "b"), "vigor", options=SMALL, workers=1)
        assert sum(proxy.met.values()) == 6
    assert report.layout.id == whole.layout.id and not report.broken


def test_an_object_that_is_gone_since_the_listing_is_a_missing_image(
    s3_store: Store, raw_folder: Path, tmp_path: Path
) -> None:
    raw = read_places("vigor", uploaded(raw_folder, s3_store.child("raw")).url, **TWO)
    victim = raw.places[0].tile.path
    s3_store.delete(f"raw/{victim}")
    with pytest.raises(BadInput, match=f"satellite_list.txt:\\d+: {victim}: missing.*github"):
        shard(raw, Store.open(tmp_path / "store"), "vigor", options=SMALL, workers=1)


def test_what_is_no_raw_folder_on_a_store(s3_store: Store) -> None:
    with pytest.raises(MissingRaw, match=f"{s3_store.url}/raw: no such folder.*github"):
        read_places("vigor", f"{s3_store.url}/raw")
    s3_store.write("raw/splits/NewYork/satellite_list.txt", b"a.png\n")
    with pytest.raises(MissingRaw, match=f"{s3_store.url}/raw: no panoramas of Chicago"):
        read_places("vigor", f"{s3_store.url}/raw")
    with scripted_server(lambda _: Answer(404)) as server, pytest.raises(BadInput, match=r"cannot be listed.*table"):
        read_places("vigor", f"{server.url}/raw")
    with pytest.raises(BadInput, match="s4://bucket/raw"):
        read_places("vigor", "s4://bucket/raw")


SCRIPT = """
import sys
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
if __name__ == "__main__":
    raw = read_places("vigor", sys.argv[1], train_cities=["NewYork"], test_cities=["Chicago"])
    options = ShardOptions(tile_size=(160, 160), shard_bytes=50_000)
    print(shard(raw, Store.open(sys.argv[2]), "vigor", options=options, workers=2).resumed)
"""


@pytest.mark.slow
def test_killed_while_it_reads_from_a_bucket_and_started_again(tmp_path: Path, s3_store: Store) -> None:
    for city in ("NewYork", "Chicago"):
        write_city(tmp_path / "raw", city, 4, 4, tile_size=(300, 300), view_size=(256, 512))
    remote = uploaded(tmp_path / "raw", s3_store.child("raw"))
    options = ShardOptions(tile_size=(160, 160), shard_bytes=50_000)
    raw = read_places("vigor", tmp_path / "raw", **TWO)
    whole = shard(raw, Store.open(tmp_path / "whole"), "vigor", options=options, workers=1).layout
    (tmp_path / "script.py").write_text(SCRIPT)
    target = s3_store.child("store")
    command = [sys.executable, str(tmp_path / "script.py"), remote.url, target.url]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    parts = target.child("vigor", "layouts", "base", "parts")
    while process.poll() is None and len(parts.list()) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists("vigor/layouts/base/layout.json")
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 1
    assert target.read_json("vigor/layouts/base/layout.json")["id"] == whole.id


def test_the_command_takes_a_bucket(tmp_path: Path, s3_store: Store, raw_folder: Path) -> None:
    remote = uploaded(raw_folder, s3_store.child("raw"))
    options = ("--train-cities", "NewYork", "--test-cities", "Chicago", "--tile-size", "20x20", "--view-size", "16x32")
    assert "Committed" in said("shard", "vigor", remote.url, str(tmp_path / "store"), *options, "--workers", "1")
    assert f"{s3_store.url}/none" in refused("shard", "vigor", f"{s3_store.url}/none", str(tmp_path / "store"))


# One image at a time, over HTTP


def test_an_image_by_url_and_what_tells_its_version() -> None:
    with scripted_server(lambda request: content(request, b"picture")) as server:
        reader = RawReader("/anywhere")
        data, stamp = reader.read(f"{server.url}/a%20b.jpg?size=large")
        assert data == b"picture" and stamp.etag and stamp.mtime_ns and stamp.bytes == 7
        assert reader.stamp(f"{server.url}/a%20b.jpg?size=large") == stamp
        assert [(one.method, one.path) for one in server.requests] == [
            ("GET", "/a%20b.jpg?size=large"),
            ("HEAD", "/a%20b.jpg?size=large"),
        ]


def test_a_busy_web_server_is_asked_again() -> None:
    answers = iter([Answer(503), Answer(429, headers={"Retry-After": "0"})])
    with scripted_server(lambda request: next(answers, content(request, b"picture"))) as server:
        assert RawReader("").read(f"{server.url}/a.jpg")[0] == b"picture"
        assert len(server.requests) == 3


def test_a_body_cut_short_is_read_again() -> None:
    first = iter([Answer(200, b"pict", {"Content-Length": "7", "Connection": "close"})])
    with scripted_server(lambda request: next(first, content(request, b"picture"))) as server:
        assert RawReader("").read(f"{server.url}/a.jpg")[0] == b"picture"


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_a_web_server_refuses_is_a_broken_image(status: int) -> None:
    with scripted_server(lambda _: Answer(status)) as server:
        with pytest.raises(BrokenImage, match=str(status)):
            RawReader("").read(f"{server.url}/a.jpg")
        assert RawReader("").stamp(f"{server.url}/a.jpg") is None


def test_a_server_that_is_away_stops_the_work() -> None:
    with scripted_server(lambda _: Answer(503)) as server, pytest.raises(Unanswered, match=r"a\.jpg: 503.*busy"):
        RawReader("").read(f"{server.url}/a.jpg")
    with pytest.raises(Unanswered, match=r"a\.jpg: no answer.*run again"):
        RawReader("").read("http://127.0.0.1:9/a.jpg")  # the port of "discard", where nobody listens


def test_a_server_without_head_or_length_tells_no_version() -> None:
    def answer(request: Request) -> Answer:
        return Answer(405) if request.method == "HEAD" else Answer(200, b"picture")

    with scripted_server(answer) as server:
        assert RawReader("").stamp(f"{server.url}/a.jpg") is None
        assert RawReader("").read(f"{server.url}/a.jpg")[1] == Stamp(7, 0)


def test_stamps_are_the_same_by_etag_else_by_time() -> None:
    assert Stamp(5, 1, "x").is_same(Stamp(5, 2, "x"))
    assert not Stamp(5, 1, "x").is_same(Stamp(5, 1, "y"))
    assert Stamp(5, 1, "x").is_same(Stamp(5, 1)) and not Stamp(5, 1).is_same(Stamp(5, 2))
    assert not Stamp(5, 0).is_same(Stamp(5, 0)) and not Stamp(5, 1, "x").is_same(Stamp(6, 1, "x"))


def test_paths_on_a_store_are_those_of_a_folder(tmp_path: Path, s3_store: Store) -> None:
    university(tmp_path)
    remote = open_raw(uploaded(tmp_path, s3_store.child("raw")).url)
    assert isinstance(remote, StorePath)
    for path in ("train", "train/satellite/01", "train/satellite/01/é, image.jpeg", "none", "train/none"):
        here, there = tmp_path / path, remote / path
        assert (here.exists(), here.is_dir(), here.name) == (there.exists(), there.is_dir(), there.name)
        assert there.relative_to(remote).as_posix() == path and there.parent.name == (
            here.parent.name if "/" in path else "raw"
        )
    assert sorted(one.name for one in (remote / "train").entries()) == ["drone", "satellite"]
    with pytest.raises(FileNotFoundError):
        (remote / "none.txt").read_bytes()
