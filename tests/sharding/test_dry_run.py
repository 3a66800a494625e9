from __future__ import annotations

from pathlib import Path

import pytest

from geostream.errors import BadInput, StoreError
from geostream.store import Store
from sharding import ShardOptions, commit_shards, dry_run, plan_shards, read_places, shard, write_shards
from sharding.places import RawDataset
from tests.command import geostream
from tests.vigor_raw import TWO

SMALL = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000)


def test_it_foretells_what_sharding_does_and_writes_nothing(raw: RawDataset, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    plan = dry_run(raw, store, "vigor", options=SMALL)
    assert not (tmp_path / "store").exists()
    assert plan.refused is None and plan.remarks == []
    figures = plan.figures
    layout = shard(raw, store, "vigor", options=SMALL, workers=1).layout
    assert (figures["layout"], figures["there"]) == (layout.store.url, "nothing")
    assert (figures["places"], figures["shards"]) == (layout.n_places, len(layout.shard_names))
    assert figures["pairs"] == "test {test}, train {train}".format(**layout.info["pairs"])
    assert figures["test gallery"] == len(layout.references("test"))
    assert figures["images"] == layout.members.num_rows - layout.n_places
    assert (figures["stored tiles"], figures["stored views"]) == ("20x20", "16x32")
    assert figures["options"] == "protocol cross-area, train_cities NewYork, test_cities Chicago"
    assert plan.job.estimated_bytes == pytest.approx(layout.info["bytes"], rel=0.25)
    assert dry_run(raw, store, "vigor", options=SMALL).state.startswith("this very layout, committed")


def test_it_tells_what_is_missing_and_what_would_be_refused(raw_folder: Path, tmp_path: Path) -> None:
    for panorama in sorted((raw_folder / "NewYork" / "panorama").iterdir())[:11]:
        panorama.unlink()
    plan = dry_run(read_places("vigor", raw_folder, **TWO), Store.open(tmp_path / "store"), "vigor", options=SMALL)
    assert plan.figures["missing images"] == 11
    assert len(plan.remarks) == 12
    assert all(line.endswith(",.jpg: missing") and "pano_label_balanced.txt:" in line for line in plan.remarks[:10])
    assert plan.remarks[10] == "… and 1 more images are missing"
    assert plan.remarks[11].startswith("It would be refused: 11 of 48 images are broken, more than the share of 0.001")


def test_it_leaves_what_lies_there(raw: RawDataset, s3_store: Store) -> None:
    """Half a layout, leftovers of a run that was killed, another layout."""
    folder = s3_store.child("vigor", "layouts", "base")
    assert dry_run(raw, s3_store, "vigor", options=SMALL).state == "nothing"
    job = plan_shards(raw, SMALL)
    parts, _ = write_shards(job, folder, 1)
    before = folder.list()
    assert dry_run(raw, s3_store, "vigor", options=SMALL).state.startswith("an unfinished")
    assert folder.list() == before
    commit_shards(job, s3_store, "vigor", "base", parts)
    folder.write("parts/shard-00000.json", b"{}")
    before = folder.list()
    assert dry_run(raw, s3_store, "vigor", options=SMALL).state.startswith("this very layout")
    other = dry_run(raw, s3_store, "vigor", options=ShardOptions(original=True))
    assert other.refused is not None and "layouts/base: " in other.refused
    assert other.figures["stored tiles"] == "as they are"
    assert folder.list() == before


def test_what_makes_no_sense_is_an_error(raw: RawDataset, raw_folder: Path, s3_store: Store, tmp_path: Path) -> None:
    local = Store.open(tmp_path / "store")
    with pytest.raises(BadInput, match=r"dataset name '\.\./vigor'"):
        dry_run(raw, local, "../vigor")
    with pytest.raises(BadInput, match="no training pair"):
        dry_run(read_places("vigor", raw_folder, train_cities=[], test_cities=["Chicago"]), local, "vigor")
    with pytest.raises(StoreError, match="no-such-bucket"):
        dry_run(raw, Store.open("s3://no-such-bucket/x"), "vigor")


def test_on_the_command_line(raw_folder: Path, tmp_path: Path) -> None:
    (raw_folder / "NewYork" / "satellite" / "stray.txt").touch()
    next((raw_folder / "Chicago" / "panorama").iterdir()).unlink()
    store = tmp_path / "store"
    command = ["shard", "vigor", str(raw_folder), str(store)]
    command += ["--train-cities", "NewYork", "--test-cities", "Chicago", "--view-size", "32x64", "--dry-run"]
    done = geostream(*command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"layout:          {store}/vigor/layouts/base"
    for line in (
        "there:           nothing",
        "missing images:  1",
        "stored views:    32x64",
        "stored tiles:    384x384",
    ):
        assert line in lines
    assert "refused: 1 of 48 images" in lines[-2]
    assert lines[-1] == "Nothing was written." and not store.exists()
    command[1] = "cvusa"
    done = geostream(*command)
    assert done.returncode != 0 and "test_cities, train_cities" in done.stderr
