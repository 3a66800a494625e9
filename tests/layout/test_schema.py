"""Damage in a layout's index: found at the first use, even where the hashes were written anew, and told in one line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import StoreError
from geostream.layout import Layout, list_layouts, open_layout
from geostream.layout.schema import MEMBERS, PLACES, IndexDamage, check_index
from geostream.store import Store, table_bytes
from tests.helpers import tiny_layout

Rows = list[dict[str, Any]]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Places 0 and 1 in shard 0, with three members each, 2 and 3 in shard 1; a successor is a semi-positive."""
    return tiny_layout(Store.open(tmp_path), places=2, test_places=2, distractors=0, places_per_shard=2)


def refused(layout: Layout, message: str) -> None:
    """The layout cannot be used, and the one line says which it is, ``message``, and what to do."""
    with pytest.raises(StoreError) as error:
        _ = open_layout(Store.open(layout.store.url.rsplit("/", 3)[0]), layout.dataset, layout.name).places
    line = str(error.value)
    assert re.fullmatch(
        rf"{re.escape(layout.store.url)}(: |/){message}.*; "
        "restore the layout's folder from a copy, or delete it and shard the dataset again",
        line.replace("; the index is damaged: ", "; "),
    ), line


def rewrite(layout: Layout, file: str, data: bytes) -> None:
    """Put other bytes in the place of a table, and their hash into layout.json."""
    info = layout.store.read_json("layout.json")
    info["index"][file] = hashlib.sha256(data).hexdigest()
    layout.store.write(file, data)
    layout.store.write_json("layout.json", info)


def damage_member(layout: Layout, row: int, **changes: object) -> None:
    rows = layout.members.to_pylist()
    rows[row].update(changes)
    rewrite(layout, "members.parquet", table_bytes(pa.Table.from_pylist(rows, schema=MEMBERS)))


def damage_place(layout: Layout, row: int, **changes: object) -> None:
    rows = layout.places.to_pylist()
    rows[row].update(changes)
    rewrite(layout, "places.parquet", table_bytes(pa.Table.from_pylist(rows, schema=PLACES)))


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (0, {"place": -1}, "'tile.jpg' of place number -1 in shard-00000.tar .* places.parquet"),
        (0, {"place": 4}, "'tile.jpg' of place number 4 in shard-00000.tar .* places.parquet"),
        (0, {"shard": -1}, "'tile.jpg' of place alpha-0000 in shard number -1 .* layout.json"),
        (0, {"shard": 2}, "'tile.jpg' of place alpha-0000 in shard number 2 .* layout.json"),
        (0, {"offset": -512}, "'tile.jpg' of place alpha-0000 .*offset -512.* byte 512"),
        (0, {"offset": 511}, "'tile.jpg' of place alpha-0000 .* byte 512"),
        (1, {"size": -1}, "'view-00.jpg' of place alpha-0000 in shard-00000.tar .*-1 bytes.* negative"),
        (5, {"size": 10**6}, "'json' of place alpha-0001 in shard-00000.tar .* past the end"),
        (5, {"offset": 2**63 - 1}, "'json' of place alpha-0001 in shard-00000.tar .* past the end"),
        (5, {"offset": 2**63 - 1, "size": 2**63 - 1}, "'json' of place alpha-0001 .* past the end"),
        (1, {"offset": 600}, "'view-00.jpg' of place alpha-0000 .* overlaps"),
        (2, {"offset": 600}, "'json' of place alpha-0000 .* order"),
        (4, {"shard": 1}, "'json' of place alpha-0001 .* order"),
        (
            5,
            {"place": 2},
            "'json' of place beta-0002 in shard-00000.tar .* in one shard",
        ),
        (0, {"member": "../tile.jpg"}, "'../tile.jpg' of place alpha-0000 in shard-00000.tar .* is neither tile.jpg"),
        (0, {"member": "tile.jpg\n"}, r"'tile.jpg\\n' of place alpha-0000 .* is neither"),
        (0, {"member": "tile"}, "'tile' of place alpha-0000 .* is neither"),
        (1, {"member": "view-0.jpg"}, "'view-0.jpg' of place alpha-0000 .* is neither"),
        (1, {"member": f"view-{10**30}.jpg"}, "'view-10+.jpg' of place alpha-0000 .* is neither"),
        (1, {"member": "view-01.jpg"}, "'view-01.jpg' of place alpha-0000 .* view .*places.parquet"),
        (1, {"member": "tile.png"}, "place alpha-0000 has 2 members tile"),
        (4, {"member": "json"}, "place alpha-0001 has 0 members view-00"),
        (2, {"place": 1}, "place alpha-0000 has 0 members json"),
        (3, {"crc32c": None}, "column 'crc32c' has empty values"),
    ],
)
def test_a_member_that_contradicts_the_rest(layout: Layout, row: int, changes: dict[str, object], message: str) -> None:
    # Rows 0 to 5: tile, view and facts of the two places in the first shard.
    damage_member(layout, row, **changes)
    refused(layout, f"members.parquet: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "beta-0002"}, ".*same key beta-0002"),
        ({"key": None}, "column 'key' has empty values"),
        ({"splits": ["train", None]}, "column 'splits' has empty values"),
        ({"splits": ["train", "gallery"]}, "place alpha-0001 has a split 'gallery'"),
        ({"views": None}, "column 'views' has empty values"),
        ({"views": [None]}, "column 'views' has empty values"),
    ],
)
def test_a_place_that_contradicts_the_rest(layout: Layout, changes: dict[str, object], message: str) -> None:
    damage_place(layout, 1, **changes)
    refused(layout, f"places.parquet: {message}")


def test_a_view_of_an_unknown_split(layout: Layout) -> None:
    views = layout.places["views"].to_pylist()[2]
    views[0]["split"] = "val"
    damage_place(layout, 2, views=views)
    refused(layout, "places.parquet: place beta-0002 has a view of split 'val'")


@pytest.mark.parametrize("key", ["", "..", "a/b", "/a", "a\\b", "a.b", "a\n", "a\0", "\x1b[2J", "é", " "])
def test_a_key_that_is_no_file_name(layout: Layout, key: str) -> None:
    damage_place(layout, 1, key=key)
    refused(layout, f"places.parquet: key {re.escape(repr(key))} of place 1: ")


@pytest.mark.parametrize("named", [-1, 4])
def test_a_semi_positive_that_is_no_place(layout: Layout, named: int) -> None:
    views = layout.places["views"].to_pylist()[2]
    views[0]["semi_positives"] = [3, named]
    damage_place(layout, 2, views=views)
    message = f"a view of place beta-0002 .*{named} as semi-positive"
    refused(layout, f"places.parquet: {message}")


def test_a_place_without_members_and_no_place_at_all(layout: Layout) -> None:
    rows = layout.members.to_pylist()
    rewrite(layout, "members.parquet", table_bytes(pa.Table.from_pylist(rows[:-3], schema=MEMBERS)))
    refused(layout, "members.parquet: place beta-0003 has 0 members tile")
    rewrite(layout, "members.parquet", table_bytes(MEMBERS.empty_table()))
    refused(layout, "members.parquet: place alpha-0000 has 0 members tile")
    rewrite(layout, "places.parquet", table_bytes(PLACES.empty_table()))
    refused(layout, "places.parquet: .*one place")


def without_column(table: pa.Table) -> pa.Table:
    return table.drop_columns(["offset"])


def with_a_column(table: pa.Table) -> pa.Table:
    return table.append_column("more", table["offset"])


def of_another_type(table: pa.Table) -> pa.Table:
    return table.set_column(3, "offset", table["offset"].cast(pa.string()))


def twice(table: pa.Table) -> pa.Table:
    return table.append_column("offset", table["offset"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_column, "columns 'place, member, shard, size, crc32c'"),
        (with_a_column, "columns 'place, member, shard, offset, size, crc32c, more'"),
        (twice, "columns 'place, member, shard, offset, size, crc32c, offset'"),
        (of_another_type, "column 'offset' .*string"),
    ],
)
def test_another_schema(layout: Layout, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    rewrite(layout, "members.parquet", table_bytes(change(layout.members)))
    refused(layout, f"members.parquet: .*{message}")


def test_the_tables_swapped(layout: Layout) -> None:
    rewrite(layout, "places.parquet", layout.store.read("members.parquet"))
    refused(layout, "places.parquet: .*columns 'place, member, ")


def test_no_whole_parquet_file(layout: Layout) -> None:
    whole = layout.store.read("members.parquet")
    for data in (b"", b"no table", whole[:-20], whole[: len(whole) // 2] + bytes(8) + whole[len(whole) // 2 + 8 :]):
        rewrite(layout, "members.parquet", data)
        refused(layout, "members.parquet: .*Parquet file")


def test_a_text_that_is_no_text(layout: Layout) -> None:
    keys = pa.array([b"\xff\xfe", b"b", b"c", b"d"]).view(pa.string())
    rewrite(layout, "places.parquet", table_bytes(layout.places.set_column(0, "key", keys)))
    refused(layout, "places.parquet: .*Parquet file .*UTF")


def test_a_table_that_is_gone_or_changed(layout: Layout) -> None:
    layout.store.write("members.parquet", table_bytes(layout.members.slice(0, 3)))
    refused(layout, "members.parquet: changed")
    layout.store.delete("members.parquet")
    refused(layout, "members.parquet: gone")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(([name], None, f"{name}: ") for name in ("dataset", "layout", "id", "generation", "coordinates", "places")),
        *(([name], None, f"{name}: ") for name in ("pairs", "bytes", "shards", "images", "source", "broken", "index")),
        (["format"], 4, "format 4, .*formats 1 to 3"),
        (["dataset"], "../other", "dataset: "),
        (["layout"], "g0\n", "layout: "),
        (["generation"], "0", "generation: "),
        (["generation"], -1, "generation: "),
        (["coordinates"], "miles", "coordinates: "),
        (["protocols"], [], "protocols: "),
        (["protocols"], ["within-6m"], "protocols.0: "),
        (["shards"], [], "shards: "),
        (["shards", 1, "name"], "../shard-00001.tar", "shards.1.name: "),
        (["shards", 1, "name"], "shard-1.tar", "shards.1.name: "),
        (["shards", 1, "name"], "shard-00001.tar\n", "shards.1.name: "),
        (["shards", 1, "name"], "shard-00000.tar", "two shards"),
        (["shards", 1, "size"], -1, "shards.1.size: "),
        (["shards", 1, "size"], 2**64, "shards.1.size: "),
        (["shards", 1, "size"], None, "shards.1.size: "),
        (["shards", 1, "members"], 5, "'shards' contradicts"),
        (["places"], 5, "'places' contradicts"),
        (["pairs"], {"train": 9}, "'pairs' contradicts"),
        (["bytes"], 0, "'bytes' contradicts"),
        (["pairs"], {"a\nb": -1}, r"pairs.a\\nb: "),
        (["index"], {"places.parquet": ""}, "index: "),
        (["index"], {"places.parquet": "", "../secret": ""}, "index.../secret"),
    ],
)
def test_layout_json_that_no_commit_wrote(layout: Layout, path: list[Any], value: object, message: str) -> None:
    info = layout.store.read_json("layout.json")
    inside = info
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = value
    layout.store.write_json("layout.json", info)
    refused(layout, f"layout.json: {message}")


def test_layout_json_without_a_field(layout: Layout) -> None:
    info = layout.store.read_json("layout.json")
    for name in info.keys() - {"protocols", "gallery"}:
        layout.store.write_json("layout.json", {key: value for key, value in info.items() if key != name})
        refused(layout, f"layout.json: {name}: ")


def test_layout_json_from_before_protocols(layout: Layout) -> None:
    info = layout.store.read_json("layout.json")
    del info["protocols"]
    layout.store.write_json("layout.json", info)
    reopened = open_layout(Store.open(layout.store.url.rsplit("/", 3)[0]), layout.dataset, layout.name)
    assert reopened.protocols == ("paired",)


@pytest.mark.parametrize("value", [[], None, 7, "text"])
def test_layout_json_that_is_something_else(layout: Layout, value: object) -> None:
    layout.store.write_json("layout.json", value)
    refused(layout, "layout.json: all: ")
    with pytest.raises(StoreError, match="layout.json: all: "):
        list_layouts(Store.open(layout.store.url.rsplit("/", 3)[0]), layout.dataset)


def test_layout_json_that_is_no_json(layout: Layout) -> None:
    whole = layout.store.read("layout.json")
    for data in (b"", whole[:-9], b"\xff" + whole):
        layout.store.write("layout.json", data)
        with pytest.raises(StoreError, match=r"g0/layout.json: .*JSON .*damaged"):
            open_layout(Store.open(layout.store.url.rsplit("/", 3)[0]))


def test_damage_on_s3(s3_store: Store) -> None:
    layout = tiny_layout(s3_store, places_per_shard=2)
    damage_member(layout, 5, size=10**6)
    refused(layout, "members.parquet: 'json' of place alpha-0001 in shard-00000.tar .* past the end")


Index = tuple[Rows, Rows, list[tuple[str, int]]]


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    """Any valid index: rows of places and members, and shards; members with gaps between them, places in any order."""
    n = draw(st.integers(1, 6))
    views = [draw(st.integers(0, 3)) for _ in range(n)]
    some = st.lists(st.integers(0, n - 1), max_size=2)
    places: Rows = []
    for number, count in enumerate(views):
        shown = [
            {"name": f"view-{v:02d}", "split": "train", "source": "", "north": 0.0, "east": 0.0}
            | {"semi_positives": draw(some)}
            for v in range(count)
        ]
        key = f"Key_{number}-{'x' * draw(st.integers(0, 70))}"
        places.append({"key": key, "area": "a", "splits": ["train"], "north": 0.0, "east": 0.0, "source": ""})
        places[-1]["views"] = shown
    members: Rows = []
    shards: list[tuple[str, int]] = []
    end = 0
    for place in draw(st.permutations(range(n))):
        if not shards or draw(st.booleans()):
            shards.append((f"shard-{len(shards):05d}.tar", 0))
            end = 0
        tile = draw(st.sampled_from(["tile.jpg", "tile.png"]))
        names = [tile, "json", *(f"view-{v:02d}.jpg" for v in range(views[place]))]
        for name in draw(st.permutations(names)):
            offset, size = end + 512 + draw(st.integers(0, 2000)), draw(st.integers(0, 5000))
            fields = (place, name, len(shards) - 1, offset, size, draw(st.integers(0, 2**32 - 1)))
            members.append(dict(zip(MEMBERS.names, fields, strict=True)))
            end = offset + size
        shards[-1] = (shards[-1][0], end + draw(st.integers(0, 3)) * 512)
    return places, members, shards


def check(index: Index) -> None:
    places, members, shards = index
    check_index(pa.Table.from_pylist(places, schema=PLACES), pa.Table.from_pylist(members, schema=MEMBERS), shards)


BAD_KEYS = ["", ".", "..", "/", "a/b", "a\\b", "a.b", "a\0b", "a\n", "\x1b[2J", "a b", "ä"]
BAD_NAMES = ["", "tile", "tile.", "tile.jpg.png", "tile.jpg/", "../tile.jpg", "view-1.jpg", "view-x.jpg", "json.json"]


@st.composite
def corruptions(draw: st.DrawFn, index: Index) -> Index:
    """``index`` with one value damaged so that it contradicts the others, whatever they are."""
    places, members, shards = deepcopy(index)
    row = draw(st.integers(0, len(members) - 1))
    member, place = members[row], places[draw(st.integers(0, len(places) - 1))]
    behind = [other for other in members[row + 1 :] if other["shard"] == member["shard"]]
    limit = behind[0]["offset"] - 512 if behind else shards[member["shard"]][1]
    kind = draw(st.sampled_from(["place", "member", "shard", "offset", "size", "gone", "twice", "key", "semi", "cut"]))
    if kind == "place":
        member["place"] = draw(st.integers(-3, len(places) + 3).filter(lambda number: number != member["place"]))
    elif kind == "shard":
        member["shard"] = draw(st.integers(-3, len(shards) + 3).filter(lambda number: number != member["shard"]))
    elif kind == "member":
        others = [m["member"] for m in members if m["place"] == member["place"] and m is not member]
        member["member"] = draw(st.sampled_from([*BAD_NAMES, *others, "view-03.jpg", "view-99999.png"]))
    elif kind == "offset":
        begin = members[row - 1] if row and members[row - 1]["shard"] == member["shard"] else None
        lowest = 512 if begin is None else begin["offset"] + begin["size"] + 512
        low, high = st.integers(-(2**63), lowest - 1), st.integers(limit - member["size"] + 1, 2**63 - 1)
        member["offset"] = draw(low | high)
    elif kind == "size":
        member["size"] = draw(st.integers(-(2**63), -1) | st.integers(limit - member["offset"] + 1, 2**63 - 1))
    elif kind == "gone":
        del members[row]
    elif kind == "twice":
        members.insert(row, dict(member))
    elif kind == "key":
        others = [p["key"] for p in places if p is not place]
        place["key"] = draw(st.sampled_from([*BAD_KEYS, *others]) | st.text().map(lambda text: text + "."))
    elif kind == "semi":
        wrong = draw(st.integers(-(2**31), -1) | st.integers(len(places), 2**31 - 1))
        view = {"name": "view-00", "split": "train", "source": "", "north": 0.0, "east": 0.0, "semi_positives": [wrong]}
        place["views"] = [*place["views"][:-1], view]
    else:
        shard = draw(st.integers(0, len(shards) - 1))
        end = max(m["offset"] + m["size"] for m in members if m["shard"] == shard)
        shards[shard] = (shards[shard][0], draw(st.integers(0, end - 1)))
    return places, members, shards


@settings(deadline=None, max_examples=75)
@given(index=indexes(), data=st.data())
def test_valid_indexes_are_accepted_and_damaged_ones_refused(index: Index, data: st.DataObject) -> None:
    check(index)
    damaged = data.draw(corruptions(index))
    with pytest.raises(IndexDamage) as error:
        check(damaged)
    assert str(error.value).isprintable()  # and so one line, whatever the names
