"""What a committed layout promises, and that nothing else can be opened."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import AlreadyExists, BadInput, LayoutNotCommitted, StoreError
from geostream.layout import MEMBERS, PLACES, Layout, NewLayout, commit_layout, list_datasets, list_layouts, open_layout
from geostream.layout.members import MemberTable
from geostream.reclustering.rewrite import rewrite
from geostream.store import Store
from tests.helpers import member_of, tiny_layout

World = list[dict[str, Any]]  # places, as rows of PLACES


def view(number: int, split: str, semi: list[int]) -> dict[str, Any]:
    return {
        "name": f"view-{number:02d}",
        "split": split,
        "source": f"v{number}.jpg",
        "north": 0.0,
        "east": 0.0,
        "semi_positives": semi,
    }


def place(key: str, views: list[dict[str, Any]], splits: list[str]) -> dict[str, Any]:
    return {
        "key": key,
        "area": "A",
        "splits": splits,
        "north": 1.0,
        "east": 2.0,
        "source": f"{key}.png",
        "views": views,
    }


def members_of(world: World, order: list[int], per_shard: int) -> tuple[pa.Table, list[tuple[str, int]]]:
    """Members of 10 bytes, 512 apart, places in ``order``."""
    rows, sizes = [], []
    for shard, start in enumerate(range(0, len(order), per_shard)):
        offset = 512
        for number in order[start : start + per_shard]:
            names = ["tile.jpg", *(f"{v['name']}.jpg" for v in world[number]["views"]), "json"]
            for name in names:
                rows.append((number, name, shard, offset, 10, 7))
                offset += 1024
        sizes.append((f"shard-{shard:05d}.tar", offset))
    columns = list(zip(*rows, strict=True))
    return pa.Table.from_pydict(dict(zip(MEMBERS.names, columns, strict=True)), schema=MEMBERS), sizes


def commit(root: Store, world: World, name: str = "a-000", **changes: Any) -> Layout:
    order = changes.pop("order", list(range(len(world))))
    members, shards = members_of(world, order, changes.pop("per_shard", 2))
    arguments: dict[str, Any] = {
        "dataset": "vigor",
        "name": name,
        "generation": 0,
        "coordinates": "latlon",
        "places": pa.Table.from_pylist(world, schema=PLACES),
        "members": members,
        "shards": shards,
        "source": {},
        "images": {},
        "broken": [],
    }
    return commit_layout(root.child("vigor", "layouts", name), NewLayout(**(arguments | changes)))


@pytest.fixture
def world() -> World:
    return [
        place("a", [view(0, "train", [1, 2]), view(1, "test", [3])], ["train", "test"]),
        place("b", [], ["test"]),
        place("c", [view(0, "train", [])], ["train"]),
        place("d", [view(0, "test", [])], ["test"]),
    ]


def test_open_gives_back_what_was_committed(s3_store: Store, world: World) -> None:
    made = commit(s3_store, world)
    layout = open_layout(s3_store)
    assert layout.id == made.id
    assert layout.places.equals(made.places)
    assert layout.members.equals(made.members)
    assert layout.pairs("train").place.tolist() == [0, 2]
    assert layout.pairs("test").view.tolist() == [1, 0]
    assert layout.references("test").tolist() == [0, 1, 3]
    assert layout.shard_of_place.tolist() == [0, 0, 1, 1]
    assert layout.info["pairs"] == {"train": 2, "test": 2}
    assert [layout.excluded().row(i).tolist() for i in range(4)] == [[1, 2], [0], [0], []]
    assert [layout.semi_positives("test").row(i).tolist() for i in range(2)] == [[3], []]
    assert list_datasets(s3_store) == ["vigor"]
    assert list_layouts(s3_store, "vigor") == ["a-000"]
    assert layout.protocols == ("paired",)


def test_views_that_are_only_candidates(tmp_path: Path, world: World) -> None:
    """A view of split "gallery" is in no gallery of tiles and in no pair of another split."""
    world[1]["views"] = [view(0, "gallery", []), view(1, "gallery", [])]
    commit(Store.open(tmp_path), world, protocols=("both-ways", "paired"))
    layout = open_layout(Store.open(tmp_path))
    assert layout.protocols == ("both-ways", "paired")
    assert layout.info["pairs"] == {"train": 2, "test": 2, "gallery": 2}
    assert [column.tolist() for column in layout.pairs("gallery")] == [[1, 1], [0, 1]]
    assert layout.pairs("test").place.tolist() == [0, 3]
    assert layout.references("gallery").tolist() == []
    assert [member_of(layout, 1, view)["member"] for view in (0, 1)] == ["view-00.jpg", "view-01.jpg"]


def test_a_generation_keeps_the_protocols_of_the_one_before(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    first = tiny_layout(store)
    first.store.write_json("layout.json", first.info | {"protocols": ["paired", "within-5m"]})
    parent = open_layout(store)
    rewrite(store, parent, [np.arange(parent.n_places, dtype=np.int32)], {})
    after = open_layout(store)
    assert after.generation == 1 and after.protocols == parent.protocols == ("paired", "within-5m")


def test_where_tiles_come_from_and_how_large_they_are_is_there_where_it_is_known(tmp_path: Path, world: World) -> None:
    root = Store.open(tmp_path)
    bare = commit(root, world)
    assert bare.source is None and bare.tile_metres is None and "tile_metres" not in bare.info
    facts = {"name": "ortho", "licence": "CC0-1.0", "attribution": None, "url": None}
    made = commit(root, world, "b", source={"adapter": "photos", **facts}, tile_metres=60.0)
    opened = open_layout(root, "vigor", "b")
    assert opened.id == made.id and opened.source == facts and opened.tile_metres == 60.0
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(BadInput, match="tile_metres"):
            commit(root, world, "c", tile_metres=wrong)


def test_a_generation_keeps_where_its_tiles_come_from(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    layout = tiny_layout(root)
    facts = {"name": "ortho", "licence": None, "attribution": "A", "url": None}
    known = replace(layout, info=layout.info | {"source": facts, "tile_metres": 50.0})
    after = rewrite(root, known, [np.arange(layout.n_places, dtype=np.int32)], {})
    assert after.source == facts and after.tile_metres == 50.0


def test_uncommitted_is_refused_and_not_listed(s3_store: Store, world: World) -> None:
    commit(s3_store, world)
    s3_store.delete("vigor/layouts/a-000/layout.json")
    assert list_layouts(s3_store, "vigor") == []
    with pytest.raises(LayoutNotCommitted, match="layouts/a-000"):
        open_layout(s3_store, "vigor", "a-000")
    with pytest.raises(LayoutNotCommitted):
        open_layout(s3_store, "vigor")
    with pytest.raises(BadInput, match="geostream shard"):
        open_layout(s3_store)


def test_commit_twice_is_one_commit_and_another_is_refused(tmp_path: Path, world: World) -> None:
    store = Store.open(tmp_path)
    first = commit(store, world)
    before = {o.path: store.read(o.path) for o in store.list()}
    assert commit(store, world).id == first.id
    with pytest.raises(AlreadyExists, match="another layout"):
        commit(store, [place(key, [], ["train"]) for key in "xyz"])
    assert {o.path: store.read(o.path) for o in store.list()} == before


def test_index_changed_after_commit(tmp_path: Path, world: World) -> None:
    store = Store.open(tmp_path)
    layout = commit(store, world)
    layout.store.write_table("members.parquet", layout.members.slice(0, 3))
    with pytest.raises(StoreError, match=r"members\.parquet: changed"):
        open_layout(store).pairs("train")


def test_newest_generation_is_opened_unless_ambiguous(tmp_path: Path, world: World) -> None:
    store = Store.open(tmp_path)
    first = commit(store, world, "a-000")
    second = commit(store, world, "a-001", order=[3, 1, 0, 2], generation=1, parent=first.id)
    assert open_layout(store).id == second.id != first.id
    assert open_layout(store, "vigor", "a-000").id == first.id
    assert second.pairs("train").place.tolist() == first.pairs("train").place.tolist()
    commit(store, [place("z", [], ["train"])], "b-000")
    with pytest.raises(BadInput, match="a-001, b-000"):
        open_layout(store)


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("place", 0, 9, "'tile.jpg' of place number 9 in shard-00000.tar .* places.parquet"),
        ("shard", 0, 5, "'tile.jpg' of place a in shard number 5 .* layout.json"),
        ("offset", 0, 4000, "'view-00.jpg' of place a .* order"),
        ("size", 11, 10**6, "'json' of place d in shard-00001.tar .* past the end"),
        ("size", 0, 1500, "'view-00.jpg' of place a .* overlaps"),
        ("shard", 2, 1, "'json' of place a .* order"),
        (
            "place",
            11,
            0,
            "'tile.jpg' of place a in shard-00000.tar .* in one shard",
        ),
    ],
)
def test_index_that_contradicts_itself(
    tmp_path: Path, world: World, column: str, row: int, value: int, message: str
) -> None:
    members, _ = members_of(world, [0, 1, 2, 3], 2)
    rows = members.to_pylist()
    assert len(rows) == 12
    rows[row][column] = value
    store = Store.open(tmp_path)
    with pytest.raises(BadInput, match=f"layouts/a-000: members.parquet: {message}"):
        commit(store, world, members=pa.Table.from_pylist(rows, schema=MEMBERS))
    assert store.list() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": [("shard-00000.tar", 9000), ("../shard-00001.tar", 9000)]}, "layout.json: shards.1.layout: "),
        ({"shards": [("shard-00000.tar", 9000)] * 2}, "layout.json: two shards have the same name"),
        ({"dataset": "../vigor"}, "layout.json: dataset: "),
        ({"coordinates": "miles"}, "layout.json: coordinates: "),
        ({"protocols": ["pared"]}, "layout.json: protocols.0: "),
        ({"members": PLACES.empty_table()}, "not matching"),
    ],
)
def test_commit_that_no_one_could_open(tmp_path: Path, world: World, changes: dict[str, Any], message: str) -> None:
    store = Store.open(tmp_path)
    with pytest.raises(BadInput, match=message):
        commit(store, world, **changes)
    assert store.list() == []


def test_image_that_the_layout_lacks(tmp_path: Path, world: World) -> None:
    layout = commit(Store.open(tmp_path), world)
    with pytest.raises(BadInput, match="place b lacks"):
        MemberTable.of(layout).rows(np.array([1], np.int32), np.array([0], np.int16))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    n = draw(st.integers(1, 12))
    some = st.lists(st.integers(0, n - 1), max_size=3, unique=True)
    splits = st.sampled_from(["train", "test"])
    return [
        place(
            f"k{i}",
            [view(j, draw(splits), draw(some)) for j in range(draw(st.integers(0, 4)))],
            draw(st.lists(splits, unique=True)),
        )
        for i in range(n)
    ]


@settings(deadline=None, max_examples=40)
@given(world=worlds(), data=st.data())
def test_index_finds_every_member(world: World, data: st.DataObject) -> None:
    """Arrays agree with the rows they were made from, whatever the order of the places on disk."""
    order = data.draw(st.permutations(range(len(world))))
    with tempfile.TemporaryDirectory() as folder:
        layout = commit(Store.open(folder), world, order=order, per_shard=data.draw(st.integers(1, 5)))
    members = MemberTable.of(layout)
    total = 0
    for split in ("train", "test"):
        pairs = layout.pairs(split)
        expected = [(i, j) for i, p in enumerate(world) for j, v in enumerate(p["views"]) if v["split"] == split]
        assert list(zip(pairs.place.tolist(), pairs.view.tolist(), strict=True)) == expected
        for (i, j), row in zip(expected, members.rows(pairs.place, pairs.view).tolist(), strict=True):
            assert (members.place[row], members.name(row)) == (i, f"view-{j:02d}.jpg")
        for i, row in zip(pairs.place, members.rows(pairs.place).tolist(), strict=True):
            assert (members.place[row], members.name(row)) == (i, "tile.jpg")
        semi = layout.semi_positives(split)
        assert [semi.row(r).tolist() for r in range(len(expected))] == [
            world[i]["views"][j]["semi_positives"] for i, j in expected
        ]
        excluded = layout.excluded(split)
        named = {(i, s) for i, j in expected for s in world[i]["views"][j]["semi_positives"] if s != i}
        symmetric = named | {(b, a) for a, b in named}
        assert {(i, int(s)) for i in range(len(world)) for s in excluded.row(i)} == symmetric
        among = np.array([i for i in range(len(world)) if data.draw(st.booleans())], dtype=np.int32)
        some = layout.excluded(split, among)
        inside = {(a, b) for a, b in symmetric if {a, b} <= set(among.tolist())}
        assert {(i, int(s)) for i in range(len(world)) for s in some.row(i)} == inside
        assert layout.references(split).tolist() == [i for i, p in enumerate(world) if split in p["splits"]]
        total += len(expected)
    assert sum(layout.info["pairs"].values()) == total
