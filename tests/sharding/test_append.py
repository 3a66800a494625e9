"""A raw folder that grows: what is appended, what is read for it, and that old layouts stay as they were."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import sharding.append as append_module
import sharding.writer as writer_module
from geostream.errors import BadInput, StoreError
from geostream.layout import Layout, open_layout, use_layout
from geostream.layout.diff import diff_layouts
from geostream.layout.members import read_image
from geostream.layout.verify import verify_layout
from geostream.reclustering.recluster import _in_order
from geostream.reclustering.rewrite import rewrite
from geostream.store import Store
from sharding import RawDataset, ShardOptions, ShardReport, dry_run, read_places, shard
from sharding.simcity import render_cities
from sharding.simcity.plan import CitySpec
from tests.command import geostream
from tests.sharding.growing import SMALL, Folder, members


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "raw").add("NewYork", range(4)).add("Chicago", range(3))


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def sharded(raw: RawDataset, store: Store, **rules: Any) -> ShardReport:
    report = shard(raw, store, "vigor", options=rules.pop("options", SMALL), workers=1, **rules)
    found = verify_layout(open_layout(store, "vigor", report.layout.name))
    assert not found.problems
    return report


def contents(store: Store) -> dict[str, str]:
    return {info.path: hashlib.sha256(store.read(info.path)).hexdigest() for info in store.list()}


def at_once(raw: RawDataset, store: Store) -> Layout:
    return sharded(raw, store).layout


def test_a_new_city_is_appended_and_nothing_else_is_read(folder: Folder, s3_store: Store, tmp_path: Path) -> None:
    first = sharded(folder.read(), s3_store).layout
    before = contents(s3_store.child("vigor", "layouts", "base"))
    folder.add("Seattle", range(2), views=2)
    raw = folder.read("NewYork+Seattle")
    whole = at_once(raw, Store.open(tmp_path / "whole"))
    folder.spoil(*(path for path in folder.written if not path.startswith("Seattle")))
    report = sharded(raw, s3_store, options=None)
    layout = report.layout
    assert (layout.name, layout.generation, layout.info["parent"]) == ("base-g1", 1, first.id)
    assert report.counts == {"new places": 2} and len(report.notes) == 1 and not report.broken
    assert layout.keys[: first.n_places] == first.keys and layout.keys[first.n_places :] == whole.keys[-2:]
    assert members(layout) == members(whole)
    assert layout.shard_paths[: len(first.shard_paths)] == first.shard_paths
    assert layout.borrowed.tolist() == [True] * len(first.shard_paths) + [False]
    for path in layout.keys[0], layout.keys[-1]:
        place = layout.keys.index(path)
        assert read_image(layout, place) == read_image(whole, whole.keys.index(path))
    assert contents(s3_store.child("vigor", "layouts", "base")) == before
    assert open_layout(s3_store, "vigor").name == "base-g1"
    assert layout.gallery == first.gallery == whole.gallery is not None


def test_where_nothing_has_changed_nothing_is_written(folder: Folder, local: Store) -> None:
    raw = folder.read()
    sharded(raw, local)
    folder.tiles["NewYork", 1] += 1
    sharded(folder.read(), local)
    before = contents(local)
    for path in folder.written:
        os.utime(folder.root / path)  # other times alone are no change
    report = sharded(folder.read(), local)
    assert (report.already, report.written, report.layout.name, report.counts) == (True, 0, "base-g1", {})
    assert contents(local) == before
    folder.spoil(*folder.written)
    plan = dry_run(folder.read(), local, "vigor")
    assert (plan.figures["images to read"], plan.figures["places to write"], plan.refused) == (0, 0, None)
    assert contents(local) == before


def test_a_changed_place_is_written_anew_and_the_rest_of_it_taken_over(folder: Folder, local: Store) -> None:
    folder.views["NewYork", 1] = {0: 0, 1: 0}
    first = sharded(folder.read(), local).layout
    [place] = [
        number
        for number, row in enumerate(first.places.to_pylist())
        if row["source"] == folder.tile_path(("NewYork", 1))
    ]
    images = [read_image(first, place, view) for view in (None, 0, 1)]
    folder.tiles["NewYork", 1] += 1
    folder.views["NewYork", 1] |= {2: 0}
    raw = folder.read()
    folder.spoil(*(path for path in folder.written if "NewYork" not in path), folder.view_path(("NewYork", 1), 0))
    plan = dry_run(raw, local, "vigor", options=SMALL)
    assert (plan.figures["images to read"], plan.figures["compared"], plan.figures["places to write"]) == (2, 1, 1)
    assert "base, " in plan.state and not local.child("vigor", "layouts").exists("base-g1/layout.json")
    report = sharded(raw, local)
    assert report.counts == {"changed places": 1, "changed images": 2}
    layout = report.layout
    assert (layout.n_places, layout.keys) == (first.n_places, first.keys)
    assert [read_image(layout, place, view) for view in (0, 1)] == images[1:] and read_image(layout, place) != images[0]
    assert len(layout.pairs("train")) == len(first.pairs("train")) + 1
    assert layout.borrowed[layout.shard_of_place].tolist() == [number != place for number in range(layout.n_places)]
    diff = diff_layouts(first, layout)
    assert (diff.came.count, diff.went.count, diff.changed.first) == (0, 0, (layout.keys[place],))
    assert (diff.own, diff.same_gallery, diff.pairs["train"]) == (1, True, (5, 6))


def test_the_test_set_is_frozen_until_it_is_to_be_extended(folder: Folder, local: Store, tmp_path: Path) -> None:
    first = sharded(folder.read(), local).layout
    folder.add("Chicago", range(3, 5)).add("NewYork", range(4, 5))
    folder.tiles["Chicago", 0] += 1
    folder.views["Chicago", 1] |= {1: 0}
    del folder.tiles["Chicago", 2], folder.views["Chicago", 2]
    raw = folder.read()
    report = sharded(raw, local, remove_missing=True)
    assert report.counts == {
        "new places": 1,
        "left-out test tiles": 2,
        "left-out test views": 3,
        "left-out test changes": 1,
        "left-out test removals": 1,
    }
    assert report.layout.gallery == first.gallery
    assert report.layout.references("test").tolist() == first.references("test").tolist()
    extended = sharded(raw, local, remove_missing=True, extend_test=True)
    assert extended.counts["new places"] == 2 and extended.counts["removed places"] == 1
    whole = at_once(raw, Store.open(tmp_path / "whole"))
    assert members(extended.layout) == members(whole)
    assert extended.layout.gallery == whole.gallery != first.gallery
    assert sharded(raw, local).already


def test_where_a_place_is_for_both_what_is_new_joins_training(folder: Folder, local: Store) -> None:
    for views in folder.views.values():
        views |= {1: 0}
    same = {"protocol": "same-area", "train": "NewYork+Chicago", "test": "NewYork+Chicago"}
    first = sharded(folder.read(**same), local).layout
    folder.add("NewYork", range(4, 6), views=2)
    folder.views["NewYork", 0] |= {0: 1}  # a training view changes, and with it its place, whose test view stays
    layout = sharded(folder.read(**same), local).layout
    assert layout.gallery == first.gallery
    assert [row["splits"] for row in layout.places.to_pylist()[-2:]] == [["train"], ["train"]]
    assert (len(layout.pairs("train")), len(layout.pairs("test"))) == (9, 7)


def test_what_is_gone_stays_until_it_is_to_be_removed(folder: Folder, local: Store, tmp_path: Path) -> None:
    folder.views["NewYork", 0] |= {1: 0}
    first = sharded(folder.read(), local).layout
    gone, bare = ("NewYork", 2), ("NewYork", 0)
    version = folder.tiles.pop(gone)
    views = folder.views.pop(gone)
    del folder.views[bare][1]
    raw = folder.read()
    report = sharded(raw, local)
    assert report.counts == {"missing places": 1, "missing images": 1}
    assert members(report.layout) == members(first)
    report = sharded(raw, local, remove_missing=True)
    layout, whole = report.layout, at_once(raw, Store.open(tmp_path / "whole"))
    assert report.counts["removed places"] == report.counts["removed views"] == 1
    assert layout.keys == first.keys and members(layout) == members(whole)
    [row] = [row for row in layout.places.to_pylist() if row["source"].endswith(folder.tile_path(gone))]
    place = layout.keys.index(row["key"])
    assert (row["splits"], row["views"], layout.shard_of_place[place]) == ([], [], -1)
    assert place not in layout.references("train") and place not in layout.pairs("train").place
    assert place not in layout.semi_positives("train").indices
    assert sorted([*_in_order(layout).tolist(), place]) == list(range(layout.n_places))
    again = rewritten(layout, local)
    assert members(again) == members(layout) and not again.borrowed.any() and not verify_layout(again).problems
    assert diff_layouts(layout, again).changed.count == diff_layouts(layout, again).went.count == 0
    assert diff_layouts(first, again).went.first == (row["key"],)
    assert sharded(raw, local, remove_missing=True).already
    folder.tiles[gone], folder.views[gone] = version, views
    report = sharded(folder.read(), local)  # it comes back, with its old id
    assert report.counts["new places"] == 1 and report.layout.shard_of_place[place] >= 0
    assert report.layout.keys == first.keys


def rewritten(layout: Layout, store: Store) -> Layout:
    """The next generation, as a reclustering writes it: other shards, of other places."""
    shards = np.array_split(_in_order(layout)[::-1], 3)
    first = layout.info["source"].get("first", layout.info["source"])
    return rewrite(store, layout, [part for part in shards if len(part)], {"first": first})


def test_a_file_that_is_broken_now_does_not_replace_the_stored_image(folder: Folder, local: Store) -> None:
    first = sharded(folder.read(), local).layout
    folder.put(folder.tile_path(("NewYork", 0)), b"no picture")
    report = sharded(read_places("vigor", folder.root, train_cities=["NewYork"], test_cities=["Chicago"]), local)
    assert report.already and report.counts == {"broken": 1} and folder.tile_path(("NewYork", 0)) in report.broken[0]
    assert report.layout.id == first.id


def test_a_broken_place_is_taken_when_it_is_mended(folder: Folder, local: Store, tmp_path: Path) -> None:
    allowed = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000, max_broken=0.5)
    tile, view = folder.tile_path(("NewYork", 0)), folder.view_path(("NewYork", 1), 0)
    raw = folder.read()
    whole = {path: (folder.root / path).read_bytes() for path in (tile, view)}
    for path in whole:
        folder.put(path, b"")
    first = sharded(raw, local, options=allowed)
    assert len(first.broken) == 2
    report = sharded(raw, local)
    assert report.already and len(report.broken) == 2  # known to be broken: neither read nor counted again
    for path, data in whole.items():
        folder.put(path, data)
    report = sharded(raw, local)
    assert report.counts == {"new places": 1, "changed places": 1, "changed images": 1} and not report.broken
    assert members(report.layout) == members(at_once(raw, Store.open(tmp_path / "whole")))


def test_a_view_that_moves_to_another_place_is_in_one(folder: Folder, local: Store, tmp_path: Path) -> None:
    sharded(folder.read(), local)
    labels = folder.root / "splits" / "NewYork" / "pano_label_balanced.txt"
    first, second, *rest = labels.read_text().splitlines()
    moved = " ".join([first.split()[0], *second.split()[1:]])
    labels.write_text("\n".join([moved, second, *rest]) + "\n")
    raw = read_places("vigor", folder.root, train_cities=["NewYork"], test_cities=["Chicago"])
    report = sharded(raw, local)
    assert report.counts["moved views"] == 1
    assert members(report.layout) == members(at_once(raw, Store.open(tmp_path / "whole")))


def test_a_layout_from_before_sources_were_noted(folder: Folder, local: Store) -> None:
    first = sharded(folder.read(), local).layout
    path = Path(first.store.url, "layout.json")
    info = json.loads(path.read_text())
    info["format"] = 1
    del info["gallery"], info["index"]["sources.parquet"]
    path.write_text(json.dumps(info))
    first.store.delete("sources.parquet")
    old = open_layout(local, "vigor")
    assert (old.id, old.gallery, verify_layout(old).count) == (first.id, None, 0)
    report = sharded(folder.read(), local)
    assert report.already and report.counts == {}
    folder.views["NewYork", 3] = {0: 1}
    report = sharded(folder.read(), local)
    assert report.counts == {"changed places": 1, "changed images": 1} and report.layout.gallery == first.gallery
    before = contents(local)
    folder.spoil(*folder.written)
    assert sharded(folder.read(), local).already and contents(local) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (ShardOptions(original=True), "original"),
        (ShardOptions(tile_size=(40, 40)), "tile_size"),
        (ShardOptions(quality=80), "quality"),
    ],
)
def test_other_images_are_refused(folder: Folder, local: Store, options: ShardOptions, named: str) -> None:
    raw = folder.read()
    sharded(raw, local)
    with pytest.raises(BadInput, match=f"layouts/base: .*{named}"):
        shard(raw, local, "vigor", options=options, workers=1)
    assert named in str(dry_run(raw, local, "vigor", options=options).refused)


def test_another_adapter_or_protocol_is_refused(folder: Folder, local: Store) -> None:
    raw = folder.read()
    sharded(raw, local)
    folder.views["NewYork", 0] |= {1: 0}
    folder.views["Chicago", 0] |= {1: 0}
    with pytest.raises(BadInput, match="protocol cross-area"):
        shard(folder.read(protocol="same-area"), local, "vigor", options=SMALL, workers=1)
    other = RawDataset("cvusa", raw.root, {}, raw.coordinates, raw.tile_size, raw.view_size, raw.places)
    with pytest.raises(BadInput, match="adapter vigor"):
        shard(other, local, "vigor", options=SMALL, workers=1)


def test_a_key_that_is_taken_gets_a_suffix(folder: Folder, local: Store) -> None:
    first = sharded(folder.read(), local).layout
    folder.tiles = {spot: version for spot, version in folder.tiles.items() if spot != ("NewYork", 0)}
    del folder.views["NewYork", 0]
    raw = folder.read()
    tile = folder.tile_path(("NewYork", 0))
    again = tile.replace(".png", ".jpg")  # the same place under another file's name
    folder.put(again, folder.picture(tile, ("tile", 0, 5)))
    lists = folder.root / "splits" / "NewYork" / "satellite_list.txt"
    lists.write_text(lists.read_text() + again.rpartition("/")[2] + "\n")
    raw = read_places("vigor", folder.root, train_cities=["NewYork"], test_cities=["Chicago"])
    layout = sharded(raw, local).layout
    [key] = [row["key"] for row in layout.places.to_pylist() if row["source"] == again]
    assert layout.keys[: first.n_places] == first.keys and key[:-9] in first.keys


class Interrupted(Exception):
    pass


def test_it_goes_on_where_it_was_cut_off(folder: Folder, local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=1)
    first = sharded(folder.read(), local).layout
    folder.add("NewYork", range(4, 8))
    raw = folder.read()
    write_part, count = writer_module.write_part, iter(range(1000))

    def write(*arguments: Any) -> Any:
        if next(count) == 2:
            raise Interrupted
        return write_part(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_part", write)
        with pytest.raises(Interrupted):
            sharded(raw, local, options=tiny)
    assert open_layout(local, "vigor").id == first.id and not verify_layout(first).problems
    report = sharded(raw, local, options=tiny)
    assert (report.resumed, report.written, report.layout.name) == (2, 2, "base-g1")
    folder.add("NewYork", range(8, 9))
    assert sharded(folder.read(), local).layout.name == "base-g2"


def test_a_different_change_begins_another_folder(
    folder: Folder, local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(folder.read(), local)
    folder.add("NewYork", range(4, 6))
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_write_all", lambda *_: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(Interrupted):
            sharded(folder.read(), local)
    folder.add("NewYork", range(6, 7))
    assert sharded(folder.read(), local).layout.name == "base-g1-2"


def test_of_two_at_once_one_wins_and_the_other_is_told(
    folder: Folder, local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(folder.read(), local)
    other = Folder(tmp_path / "other").add("NewYork", range(4)).add("Chicago", range(3)).add("Seattle", range(2))
    folder.add("NewYork", range(4, 6))
    raw, write_part = folder.read(), writer_module.write_part

    def write(*arguments: Any) -> Any:
        monkeypatch.setattr(writer_module, "write_part", write_part)
        sharded(other.read("NewYork+Seattle"), local)
        return write_part(*arguments)

    monkeypatch.setattr(writer_module, "write_part", write)
    with pytest.raises(BadInput, match="has been made of base meanwhile"):
        sharded(raw, local)
    assert local.child("vigor", "layouts").folders() == ["base", "base-g1-2"]
    layout = sharded(raw, local).layout
    assert (layout.name, layout.n_places) == ("base-g2", 11)


def test_killed_behind_the_commit_it_is_finished_by_the_next(
    folder: Folder, local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(folder.read(), local)
    folder.add("NewYork", range(4, 6))
    with monkeypatch.context() as patch:
        patch.setattr(append_module, "advance", lambda *_: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(Interrupted):
            sharded(folder.read(), local)
    assert open_layout(local, "vigor").name == "base"
    report = sharded(folder.read(), local)
    assert (report.already, report.layout.name, open_layout(local, "vigor").name) == (True, "base-g1", "base-g1")
    assert not [path for path in contents(local) if "/parts/" in path]


def test_a_person_goes_back_and_appends_something_else(folder: Folder, local: Store) -> None:
    sharded(folder.read(), local)
    folder.add("NewYork", range(4, 6))
    wrong = sharded(folder.read(), local).layout
    use_layout(local, "vigor", "base")
    del folder.tiles["NewYork", 5], folder.views["NewYork", 5]
    layout = sharded(folder.read(), local).layout
    assert (layout.name, layout.generation, layout.n_places) == ("base-g1-2", 1, wrong.n_places - 1)
    assert open_layout(local, "vigor").id == layout.id and open_layout(local, "vigor", "base-g1").id == wrong.id


def test_a_reclustering_beside_an_append(folder: Folder, local: Store) -> None:
    """A run on the old layout may still rewrite it; what was appended is appended to."""
    first = sharded(folder.read(), local).layout
    folder.add("NewYork", range(4, 6))
    grown = sharded(folder.read(), local).layout
    beside = rewritten(first, local)
    assert (beside.generation, beside.info["index"]["sources.parquet"]) == (1, first.info["index"]["sources.parquet"])
    assert open_layout(local, "vigor").id == grown.id
    folder.add("NewYork", range(6, 7))
    assert sharded(folder.read(), local).layout.info["parent"] == grown.id


def test_damage_in_a_borrowed_shard_is_named(folder: Folder, local: Store) -> None:
    first = sharded(folder.read(), local).layout
    folder.tiles["NewYork", 0] += 1
    layout = sharded(folder.read(), local).layout
    shard_number = int(layout.shard_of_place[layout.keys.index(first.keys[-1])])
    path = layout.shard_paths[shard_number]
    data = bytearray(layout.shards_store.read(path))
    data[700] ^= 1
    layout.shards_store.write(path, bytes(data))
    [problem] = verify_layout(layout).problems
    assert problem.startswith(f"{path}: ")
    layout.shards_store.delete(path)
    layout.store.write("sources.parquet", b"")
    assert verify_layout(layout).problems[0].startswith("sources.parquet: ")
    layout.store.delete("sources.parquet")
    assert verify_layout(layout).problems[1:] == (f"{path}: gone since the commit",)
    with pytest.raises(StoreError):
        rewritten(layout, local)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["tile", "view", "add", "drop", "more", "less"]),
        st.sampled_from(["NewYork", "Chicago", "Seattle"]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=4,
)


def change(folder: Folder, kind: str, spot: tuple[str, int]) -> None:
    views = folder.views.get(spot, {})
    if kind == "add" and spot not in folder.tiles:
        folder.tiles[spot], folder.views[spot] = 0, {0: 0}
    elif spot not in folder.tiles or spot[1] == 0:
        return  # the first of each city stays as it is, so that there is always something to train and to test on
    elif kind == "tile":
        folder.tiles[spot] += 1
    elif kind == "drop":
        del folder.tiles[spot], folder.views[spot]
    elif kind == "view" and views:
        views[min(views)] += 1
    elif kind == "more":
        views[max(views, default=-1) + 1] = 0
    elif kind == "less" and views:
        del views[max(views)]


STEPS = st.lists(st.tuples(CHANGES, st.booleans()), min_size=1, max_size=4)


@pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_any_changes_appended_one_by_one_give_what_sharding_at_once_gives(examples: int) -> None:
    @settings(deadline=None, max_examples=examples, phases=[Phase.generate, Phase.shrink])
    @given(steps=STEPS)
    def check(steps: list[Any]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            append_and_compare(Path(temporary), steps)

    check()


def append_and_compare(temporary: Path, steps: list[Any]) -> None:
    folder = Folder(temporary / "raw")
    for city in ("NewYork", "Chicago", "Seattle"):
        folder.add(city, range(2))
    store, cities = Store.open(temporary / "store"), {"train": "NewYork+Seattle", "test": "Chicago"}
    layout = sharded(folder.read(**cities), store).layout
    for changes, recluster in steps:
        keys = layout.keys
        for kind, city, number in changes:
            change(folder, kind, (city, number))
        layout = sharded(folder.read(**cities), store, remove_missing=True, extend_test=True).layout
        assert layout.keys[: len(keys)] == keys
        layout = rewritten(layout, store) if recluster else layout
    whole = at_once(folder.read(**cities), Store.open(temporary / "whole"))
    last = rewritten(layout, store)
    assert members(last) == members(layout) == members(whole)
    assert last.gallery == layout.gallery == whole.gallery
    assert not verify_layout(last).problems and not last.borrowed.any()


CITIES = {
    "vigor": ([CitySpec("NewYork", 3, 3), CitySpec("Chicago", 3, 3)], {"train_cities": ["NewYork"]}),
    "cvusa": ([CitySpec("Austin", 3, 3)], {}),
    "cvact": ([CitySpec("Canberra", 5, 5)], {}),
    "university1652": ([CitySpec("Kyoto", 4, 4), CitySpec("Leiden", 3, 3)], {}),
}


@pytest.mark.parametrize("adapter", list(CITIES))
def test_each_adapter(adapter: str, tmp_path: Path) -> None:
    cities, options = CITIES[adapter]
    options = options | ({"test_cities": ["Chicago"]} if adapter == "vigor" else {})
    view = {"cvusa": (16, 88), "university1652": (16, 16)}.get(adapter, (16, 32))
    more: dict[str, Any] = {"drone_views": 2, "street_views": 1} if adapter == "university1652" else {}
    render_cities(tmp_path / "raw", cities, seed=3, adapter=adapter, workers=1, tile_size=16, view_size=view, **more)
    store = Store.open(tmp_path / "store")
    stored = ShardOptions(tile_size=(16, 16), view_size=(16, 32), shard_bytes=2**14, max_broken=0.5)

    raw = read_places(adapter, tmp_path / "raw", **options)
    trained = [place for place in raw.places if any(view.split == "train" for view in place.views)]
    fewer = replace(raw, places=tuple(place for place in raw.places if place is not trained[-1]))

    def again(raw: RawDataset, **rules: bool) -> ShardReport:
        return shard(raw, store, "any", "base", stored, 1, **rules)

    first = again(fewer).layout
    assert again(raw).counts == {"new places": 1} and again(raw).already
    path = tmp_path / "raw" / trained[0].tile.path
    path.write_bytes((tmp_path / "raw" / trained[1].tile.path).read_bytes())
    os.utime(path, (1, 1))
    assert again(raw).counts == {"changed places": 1, "changed images": 1}
    assert again(fewer).counts == {"missing places": 1}
    report = again(fewer, remove_missing=True)
    assert report.counts == {"removed places": 1} and report.layout.gallery == first.gallery
    assert not verify_layout(report.layout).problems and again(fewer, remove_missing=True).already


def test_on_the_command_line(folder: Folder, tmp_path: Path) -> None:
    folder.write()
    command = [
        "shard",
        "vigor",
        str(folder.root),
        str(tmp_path / "store"),
        "--test-cities",
        "Chicago",
        "--workers",
        "1",
    ]
    assert "Committed" in geostream(*command, "--train-cities", "NewYork").stdout
    folder.add("Seattle", range(2)).write()
    command += ["--train-cities", "NewYork,Seattle"]
    assert "images to read:  4" in geostream(*command, "--dry-run").stdout
    done = geostream(*command)
    assert "base-g1: 9 places" in done.stdout and "2 new places" in done.stdout, done.stderr
    assert "Nothing has changed" in geostream(*command, "--remove-missing", "--extend-test").stdout


SCRIPT = """
import sys
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
if __name__ == "__main__":
    raw = read_places("vigor", sys.argv[1], train_cities=["NewYork"], test_cities=["Chicago"])
    options = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=1)
    shard(raw, Store.open(sys.argv[2]), "vigor", "base", options, 2)
"""


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(folder: Folder, s3_store: Store, tmp_path: Path) -> None:
    first = sharded(folder.read(), s3_store).layout
    folder.add("NewYork", range(4, 64))
    folder.tiles["NewYork", 0] += 1
    raw = folder.read()
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(folder.root), s3_store.url]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parts = s3_store.child("vigor", "layouts", "base-g1")
    for least in (2, 20):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(parts.list("parts")) < least:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not parts.exists("layout.json")
        assert open_layout(s3_store, "vigor").id == first.id and not verify_layout(first).problems
    subprocess.run(command, env=environment, check=True)
    layout = open_layout(s3_store, "vigor")
    assert layout.name == "base-g1" and not verify_layout(layout).problems
    assert members(layout) == members(at_once(raw, Store.open(tmp_path / "whole")))
    assert s3_store.child("vigor", "layouts").folders() == ["base", "base-g1"]
