from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import simplejpeg
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.gopen import gopen_schemes

from geostream.errors import BadInput, GeostreamError, LayoutNotCommitted, StoreError
from geostream.layout import Layout, open_layout
from geostream.store import Store
from sharding import ShardOptions, commit_shards, plan_shards, read_places, shard, write_shards
from sharding import commit as commit_module
from sharding import writer as writer_module
from sharding.job import Images, Part
from sharding.places import Place, RawDataset, RawImage, View
from sharding.raw_reader import RawReader
from sharding.workers import AHEAD, in_order
from tests.vigor_raw import TWO, RawCity, jpeg, png, write_city, write_vigor

SMALL = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000)
ORIGINAL = ShardOptions(original=True, shard_bytes=8000)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def contents(store: Store) -> dict[str, str]:
    """sha256 of every object."""
    return {info.path: hashlib.sha256(store.read(info.path)).hexdigest() for info in store.list()}


def view_of(layout: Layout, source: str) -> tuple[str, int]:
    """(key, number) of the view that was made from a raw file whose path ends so."""
    for place in layout.places.to_pylist():
        for number, view in enumerate(place["views"]):
            if view["source"].endswith(source):
                return place["key"], number
    raise LookupError(source)


def read_by_webdataset(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """All samples, through webdataset's own reader; only the opener of s3:// is given to it."""
    filesystem, _ = layout.store.filesystem()
    monkeypatch.setitem(gopen_schemes, "s3", lambda url, mode="rb", bufsize=8192: filesystem.open(url, mode))
    urls = [f"{layout.store.url}/{name}" for name in layout.shard_names]
    return list(wds.WebDataset(urls, shardshuffle=False))


def test_read_back_by_webdataset_over_s3_as_the_raw_bytes(
    s3_store: Store, raw: RawDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = shard(raw, s3_store, "vigor", options=ORIGINAL, workers=1).layout
    samples = {sample["__key__"]: sample for sample in read_by_webdataset(layout, monkeypatch)}
    assert set(samples) == set(layout.keys) == {place.key for place in raw.places}
    assert len(layout.shard_names) > 3
    for place in raw.places:
        sample = samples[place.key]
        assert sample["tile.png"] == (raw.root / place.tile.path).read_bytes()
        for number, view in enumerate(place.views):
            assert sample[f"view-{number:02d}.jpg"] == (raw.root / view.image.path).read_bytes()
        facts = json.loads(sample["json"])
        assert (facts["key"], facts["north"], len(facts["views"])) == (place.key, place.north, len(place.views))
        assert len([name for name in sample if name.startswith("view-")]) == len(place.views)


def test_resized_and_indexed(s3_store: Store, raw: RawDataset) -> None:
    options = ShardOptions(tile_size=(12, 12), view_size=(8, 16), shard_bytes=8000)
    layout = shard(raw, s3_store, "vigor", options=options, workers=1).layout
    reopened = open_layout(s3_store, "vigor", "base")
    assert reopened.id == layout.id
    members = reopened.members.to_pylist()
    assert len(members) == sum(2 + len(place.views) for place in raw.places)
    for member in members:
        data = layout.store.read_range(layout.shard_names[member["shard"]], member["offset"], member["size"])
        assert google_crc32c.value(data) == member["crc32c"]
        if member["member"] == "json":
            assert json.loads(data)["key"] == layout.keys[member["place"]]
        else:
            size = simplejpeg.decode_jpeg_header(data)[:2]
            assert size == ((12, 12) if member["member"] == "tile.jpg" else (8, 16))
    assert reopened.info["images"] == {"tile_size": [12, 12], "view_size": [8, 16], "quality": 90, "enlarged": 0}


def test_the_index_says_what_the_lists_say(local: Store, raw: RawDataset) -> None:
    layout = shard(raw, local, "vigor", options=SMALL, workers=1).layout
    assert layout.keys == [place.key for place in raw.places]
    assert [tuple(row) for row in layout.position] == [(place.north, place.east) for place in raw.places]
    assert len(layout.pairs("train")) == raw.count("train") and len(layout.pairs("test")) == raw.count("test")
    gallery = {layout.keys[place] for place in layout.references("test")}
    assert gallery == {place.key for place in raw.places if place.area == "Chicago"}
    for place, row in zip(raw.places, layout.places.to_pylist(), strict=True):
        for view, stored in zip(place.views, row["views"], strict=True):
            assert {layout.keys[i] for i in stored["semi_positives"]} == set(view.semi_positives)
            assert stored["semi_positives"] == sorted(stored["semi_positives"])
            assert (stored["source"], stored["split"], stored["north"]) == (view.image.path, view.split, view.north)


def test_training_shards_hold_nothing_but_training_places(local: Store, raw: RawDataset) -> None:
    layout = shard(raw, local, "vigor", options=SMALL, workers=1).layout
    of_group: dict[str, set[int]] = {}
    for place, number in zip(layout.places.to_pylist(), layout.shard_of_place, strict=True):
        trained = any(view["split"] == "train" for view in place["views"])
        group = "trained" if trained else "gallery" if "test" in place["splits"] else "rest"
        of_group.setdefault(group, set()).add(int(number))
    assert set(of_group) == {"trained", "gallery", "rest"}
    assert sum(len(shards) for shards in of_group.values()) == len(layout.shard_names)


def test_tars_are_plain_and_without_traces_of_the_machine(local: Store, raw: RawDataset) -> None:
    layout = shard(raw, local, "vigor", options=SMALL, workers=1).layout
    with tarfile.open(Path(layout.store.url) / layout.shard_names[0], format=tarfile.USTAR_FORMAT) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
            assert info.name.count(".") == (1 if info.name.endswith(".json") else 2)
    assert str(raw.root) not in (Path(layout.store.url) / "layout.json").read_text()


def test_the_same_bytes_for_any_number_of_workers_and_order_of_lists(
    tmp_path: Path, raw: RawDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [Store.open(tmp_path / name) for name in ("one", "two", "reversed")]
    shard(raw, stores[0], "vigor", options=SMALL, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "UNIT", 2)  # else each shard is one unit of work
        shard(raw, stores[1], "vigor", options=SMALL, workers=2)
    root = Path(str(raw.root))
    for path in root.glob("splits/*/*.txt"):
        path.write_text("\r\n".join(path.read_text().splitlines()[::-1]))
    shard(read_places("vigor", root, **TWO), stores[2], "vigor", options=SMALL, workers=1)
    first = contents(stores[0])
    assert contents(stores[1]) == first
    assert contents(stores[2]) == first
    assert {path.rsplit("/")[-1] for path in first if not path.endswith(".tar")} == {
        "layout.json",
        "members.parquet",
        "places.parquet",
        "sources.parquet",
        "current.json",
    }


@settings(deadline=None)
@given(views=st.lists(st.integers(0, 70), max_size=60))
def test_units_of_work_keep_the_places_and_their_order(views: list[int]) -> None:
    image = RawImage("tile.png", "list:1")
    places = tuple(
        Place(f"place-{number}", "area", ("train",), image, views=(View(image, "train"),) * count)
        for number, count in enumerate(views)
    )
    part = Part("shard-00000.tar", places, "")
    units = writer_module._units(Images(RawReader(""), None, None, 90), part)
    assert tuple(place for unit in units for place in unit.places) == places
    sizes = [sum(len(place.images()) for place in unit.places) for unit in units]
    assert all(size >= writer_module.UNIT for size in sizes[:-1]) and 0 not in sizes


def test_workers_are_a_bounded_number_of_tasks_ahead() -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield -number

    for number, result in enumerate(in_order(abs, tasks(), workers=2)):
        assert result == number and taken <= number + 2 * AHEAD


def test_done_before_is_done(local: Store, raw: RawDataset) -> None:
    first = shard(raw, local, "vigor", options=SMALL, workers=1)
    before = contents(local)
    again = shard(raw, local, "vigor", options=SMALL, workers=1)
    assert (first.already, again.already, again.written) == (False, True, 0)
    assert again.layout.id == first.layout.id and contents(local) == before


def test_a_committed_layout_is_never_touched(local: Store, raw: RawDataset) -> None:
    shard(raw, local, "vigor", options=SMALL, workers=1)
    before = contents(local)
    with pytest.raises(BadInput, match="layouts/base: .* original"):
        shard(raw, local, "vigor", options=ORIGINAL, workers=1)
    job = plan_shards(raw, ORIGINAL)
    with pytest.raises(BadInput, match="layouts/base: .* never change"):
        write_shards(job, local.child("vigor", "layouts", "base"), 1)
    tile = Path(str(raw.root), raw.places[-1].tile.path)
    tile.write_bytes((raw.root / raw.places[0].tile.path).read_bytes())
    assert shard(raw, local, "vigor", options=SMALL, workers=1).layout.name == "base-g1"
    after = contents(local)
    assert {path: data for path, data in after.items() if "-g1/" not in path and "current" not in path} == {
        path: data for path, data in before.items() if "current" not in path
    }
    assert shard(raw, local, "vigor", "original", options=ORIGINAL, workers=1).layout.name == "original"


class Interrupted(Exception):
    pass


def interrupt_after(shards: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = Interrupted) -> None:
    write_part, count = writer_module.write_part, iter(range(1000))

    def write(*arguments: Any) -> Any:
        if next(count) == shards:
            raise error
        return write_part(*arguments)

    monkeypatch.setattr(writer_module, "write_part", write)


@pytest.fixture
def interrupted(local: Store, raw: RawDataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store in which sharding was cut off after three shards."""
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(Interrupted):
            shard(raw, local, "vigor", options=SMALL, workers=1)
    yield local


def test_goes_on_from_what_is_whole(tmp_path: Path, interrupted: Store, raw: RawDataset) -> None:
    with pytest.raises(LayoutNotCommitted):
        open_layout(interrupted, "vigor", "base")
    folder = interrupted.child("vigor", "layouts", "base")
    folder.write("shard-00001.tar", folder.read("shard-00001.tar")[:-1])  # not what its sidecar says: written again
    report = shard(raw, interrupted, "vigor", options=SMALL, workers=1)
    assert report.resumed == 2 and report.written == len(report.layout.shard_names) - 2
    whole = Store.open(tmp_path / "uninterrupted")
    shard(raw, whole, "vigor", options=SMALL, workers=1)
    assert contents(interrupted) == contents(whole)


def test_another_job_does_not_mix_with_an_unfinished_one(interrupted: Store, raw: RawDataset) -> None:
    before = contents(interrupted)
    with pytest.raises(BadInput, match="layouts/base: .*unfinished.*vigor"):
        shard(raw, interrupted, "vigor", options=ORIGINAL, workers=1)
    assert contents(interrupted) == before


def test_ctrl_c_commits_nothing(local: Store, raw: RawDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(2, monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        shard(raw, local, "vigor", options=SMALL, workers=1)
    with pytest.raises(LayoutNotCommitted):
        open_layout(local, "vigor", "base")


def test_a_kill_between_commit_and_clean_up(local: Store, raw: RawDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(commit_module, "clean", lambda folder, shards: None)
        shard(raw, local, "vigor", options=SMALL, workers=1)
    assert any("/parts/" in path for path in contents(local))
    assert shard(raw, local, "vigor", options=SMALL, workers=1).already
    assert not any("/parts/" in path for path in contents(local))


SCRIPT = """
import sys
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
if __name__ == "__main__":
    raw = read_places("vigor", sys.argv[1], train_cities=["NewYork"], test_cities=["Chicago"])
    options = ShardOptions(tile_size=(160, 160), shard_bytes=50_000)
    shard(raw, Store.open(sys.argv[2]), "vigor", options=options, workers=2)
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("moments", [(0.4,), pytest.param((0.0, 0.67), marks=pytest.mark.slow)], ids=["once", "twice"])
def test_killed_at_any_moment_and_started_again(tmp_path: Path, s3_store: Store, moments: tuple[float, ...]) -> None:
    """SIGKILL the process group's parent ever later, until a run gets through: the same objects as uninterrupted.

    ``moments``: shares of the shards behind which it is killed.
    """
    for city in ("NewYork", "Chicago"):
        write_city(tmp_path / "raw", city, 5, 6, tile_size=(400, 400), view_size=(384, 768))
    raw = read_places("vigor", tmp_path / "raw", **TWO)
    whole = Store.open(tmp_path / "whole")
    options = ShardOptions(tile_size=(160, 160), shard_bytes=50_000)
    n_shards = len(shard(raw, whole, "vigor", options=options, workers=1).layout.shard_names)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = s3_store.child("vigor", "layouts", "base")
    command = [sys.executable, str(script), str(tmp_path / "raw"), s3_store.url]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    finished = []
    for shards in (max(1, int(n_shards * moment)) for moment in moments):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(folder.list("parts")) < 1 + shards:
            time.sleep(0.01)
        workers = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 20
        while any(is_running(pid) for pid in workers):  # a worker does not outlive its parent
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finished.append(len(folder.list("parts")) - 1)
        assert not folder.exists("layout.json")
    assert finished == sorted(finished) and finished[0] < n_shards
    subprocess.run(command, env=environment, check=True)
    assert contents(s3_store) == contents(whole)


def test_a_worker_that_dies(local: Store, tmp_path: Path) -> None:
    for city in ("NewYork", "Chicago"):
        write_city(tmp_path / "raw", city, 4, 4, view_size=(512, 1024))
    raw = read_places("vigor", tmp_path / "raw", **TWO)
    folder = local.child("vigor", "layouts", "base")

    def kill_one() -> None:
        while not folder.exists("parts/shard-00000.json"):
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(GeostreamError, match="worker process died"):
        shard(raw, local, "vigor", options=ShardOptions(shard_bytes=1), workers=2)
    killer.join(timeout=10)
    assert shard(raw, local, "vigor", options=ShardOptions(shard_bytes=1), workers=1).resumed > 0


def break_some(raw_folder: Path) -> tuple[RawCity, str, str]:
    """Truncate one panorama of NewYork, and put text in the place of another's tile that is a semi-positive, too."""
    folder = raw_folder / "NewYork"
    city = RawCity(
        *(
            (raw_folder / "splits" / "NewYork" / name).read_text().splitlines()
            for name in ("satellite_list.txt", "pano_label_balanced.txt")
        )
    )
    panorama, tile = city.panoramas[0], city.labels[-1].split()[1]
    path = folder / "panorama" / panorama
    path.write_bytes(path.read_bytes()[:-40])
    (folder / "satellite" / tile).write_bytes(b"not found")
    return city, panorama, tile


def test_broken_images_are_left_out_and_named(local: Store, raw_folder: Path, raw: RawDataset) -> None:
    city, panorama, tile = break_some(raw_folder)
    options = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000, max_broken=0.1)
    report = shard(raw, local, "vigor", options=options, workers=1)
    layout = report.layout
    row = city.tiles.index(tile) + 1
    assert sorted(report.broken) == [
        f"splits/NewYork/pano_label_balanced.txt:1: NewYork/panorama/{panorama}: "
        "broken JPEG: Premature end of JPEG file",
        f"splits/NewYork/satellite_list.txt:{row}: NewYork/satellite/{tile}: neither JPEG nor PNG",
    ]
    assert report.notes == ("1 places were left out because their tile is broken",)
    gone = next(place for place in raw.places if place.tile.path.endswith(tile))
    assert gone.key not in layout.keys and len(layout.keys) == len(raw.places) - 1
    assert len(layout.pairs("train")) == raw.count("train") - 1 - len(gone.views)
    # The other view of the truncated one's place is its first now.
    assert view_of(layout, city.panoramas[1])[1] == 0
    rows = layout.places.to_pylist()
    keys = {key: number for number, key in enumerate(layout.keys)}
    assert any(gone.key in view.semi_positives for place in raw.places for view in place.views if place.key in keys)
    for place in raw.places:
        if place.key in keys:
            sources = {view["source"]: view["semi_positives"] for view in rows[keys[place.key]]["views"]}
            for view in place.views:
                if view.image.path in sources:
                    assert sources[view.image.path] == sorted(keys[k] for k in view.semi_positives if k in keys)


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_broken_images(local: Store, raw_folder: Path, raw: RawDataset, workers: int) -> None:
    _, panorama, tile = break_some(raw_folder)
    with pytest.raises(BadInput, match=r"\d of 48 images .*0\.001.*NewYork/.*max_broken"):
        shard(raw, local, "vigor", options=SMALL, workers=workers)
    with pytest.raises(LayoutNotCommitted):
        open_layout(local, "vigor", "base")
    # Mended: it goes on, and nothing of the broken run stays.
    (raw_folder / "NewYork" / "panorama" / panorama).write_bytes(jpeg(np.random.default_rng(1), (16, 32)))
    (raw_folder / "NewYork" / "satellite" / tile).write_bytes(png(np.random.default_rng(1), (20, 20)))
    report = shard(raw, local, "vigor", options=SMALL, workers=1)
    assert report.broken == () and report.layout.n_places == len(raw.places)
    fresh = local.child("fresh")
    shard(raw, fresh, "vigor", options=SMALL, workers=1)
    assert contents(fresh.child("vigor")) == contents(local.child("vigor"))


def test_missing_images_are_an_error_before_anything_is_written(local: Store, raw_folder: Path) -> None:
    panorama = sorted((raw_folder / "Chicago" / "panorama").iterdir())[0]
    panorama.unlink()
    with pytest.raises(BadInput, match=r"1 of 48 images.*splits/Chicago/pano_label_balanced\.txt:1: .*: missing"):
        shard(read_places("vigor", raw_folder, **TWO), local, "vigor", options=SMALL, workers=1)
    assert local.list() == []


def test_nothing_to_train_on_or_to_search_in(local: Store, raw_folder: Path) -> None:
    with pytest.raises(BadInput, match="no training pair"):
        shard(read_places("vigor", raw_folder, train_cities=[], test_cities=["Chicago"]), local, "vigor")
    with pytest.raises(BadInput, match="no tile in the test gallery"):
        shard(read_places("vigor", raw_folder, train_cities=["NewYork"], test_cities=[]), local, "vigor")
    for path in (raw_folder / "NewYork" / "panorama").iterdir():
        path.write_bytes(b"")
    everything = ShardOptions(max_broken=1, shard_bytes=8000)
    with pytest.raises(BadInput, match="training pair .*empty file"):
        shard(read_places("vigor", raw_folder, **TWO), local, "vigor", options=everything, workers=1)
    assert not local.exists("vigor/layouts/base/layout.json")


def test_odd_names(local: Store, raw_folder: Path) -> None:
    for path in raw_folder.glob("splits/NewYork/*.txt"):
        text = path.read_text()
        text = text.replace("satellite_40.7000000000_-74.0000000000.png", "sat.tile,é_40.7_-74.0.PNG")
        path.write_text(text.replace("-5GN000_0T,", "a,b.c'ü,"))
    tile = raw_folder / "NewYork" / "satellite" / "satellite_40.7000000000_-74.0000000000.png"
    tile.rename(tile.with_name("sat.tile,é_40.7_-74.0.png"))
    panorama = next((raw_folder / "NewYork" / "panorama").glob("-5GN000_0T,*"))
    panorama.rename(panorama.with_name(panorama.name.replace("-5GN000_0T,", "a,b.c'ü,")))
    layout = shard(read_places("vigor", raw_folder, **TWO), local, "vigor", options=ORIGINAL, workers=1).layout
    key, number = view_of(layout, "a,b.c'ü,40.700000,-74.000000,.jpg")
    assert key == "NewYork_sat-tile--_40-7_-74-0"
    sample = next(sample for sample in read_by_webdataset_locally(layout) if sample["__key__"] == key)
    assert sample[f"view-{number:02d}.jpg"] == next(panorama.parent.glob("a,b*")).read_bytes()


def read_by_webdataset_locally(layout: Layout) -> list[dict[str, Any]]:
    return list(wds.WebDataset([f"{layout.store.url}/{name}" for name in layout.shard_names], shardshuffle=False))


def test_a_store_that_refuses_the_credentials(
    s3_store: Store, raw: RawDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StoreError, match="SignatureDoesNotMatch: .*AWS_SECRET_ACCESS_KEY") as error:
        shard(raw, Store.open(s3_store.url), "vigor", options=SMALL, workers=1)
    assert "not-the-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 0}, "quality 0"),
        ({"max_broken": 1.5}, "max_broken"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"tile_size": (0, 384)}, "image size"),
        ({"original": True, "view_size": (384, 768)}, "image size"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ShardOptions(**options)


def test_the_steps_one_by_one(local: Store, raw: RawDataset) -> None:
    """As a flow calls them, each on its own."""
    job = plan_shards(raw, SMALL)
    assert local.list() == []
    parts, whole = write_shards(job, local.child("vigor", "layouts", "base"), 1)
    assert whole == 0 and len(parts) == len(job.parts)
    report = commit_shards(job, local, "vigor", "base", parts, whole)
    assert open_layout(local, "vigor", "base").id == report.layout.id


def test_defaults_are_the_training_sizes(local: Store, tmp_path: Path) -> None:
    write_vigor(tmp_path / "raw", 2, 2, tile_size=(640, 640), view_size=(512, 1024))
    shard(read_places("vigor", tmp_path / "raw"), local, "vigor", workers=1)
    layout = open_layout(local, "vigor")
    assert layout.info["images"] == {
        "tile_size": [384, 384],
        "view_size": [384, 768],
        "quality": 90,
        "enlarged": 0,
    }
    assert len(layout.shard_names) == 3  # training, gallery, and training distractors
