from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from geostream.errors import BadInput, MissingRaw
from geostream.store import Store
from sharding import RawDataset, ShardOptions, read_places, shard
from sharding.places import Place
from tests.command import refused, said
from tests.scripted_server import Answer, Request, content, scripted_server
from tests.vigor_raw import jpeg

SMALL = ShardOptions(tile_size=(16, 16), view_size=(16, 32), max_broken=0.0)
pytestmark = pytest.mark.usefixtures("quick_retries")
HEAD = "query,tile,key,lat,lon,area,split,semi_positives,query_lat,query_lon"
LINES = (
    "photos/1.jpg,tiles/a.jpg,a,47.07,15.44,Graz,train,b,47.0701,15.4402",
    "photos/2.jpg,tiles/a.jpg,a,47.07,15.44,Graz,train,,,",
    "photos/3.jpg,tiles/b.jpg,b,47.08,15.45,Graz,train,a; c,47.08,15.45",
    "photos/4.jpg,tiles/c.jpg,c,48.2,16.37,Vienna,test,,48.2,16.37",
    ",tiles/d.jpg,d,48.21,16.38,Vienna,test,,,",
)


def images(root: Path, *names: str) -> dict[str, bytes]:
    """Write pictures, each by its name, and return them."""
    made = {name: jpeg(np.random.default_rng(list(name.encode())), (20, 20)) for name in names}
    for name, data in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "own"
    images(root, *(f"photos/{n}.jpg" for n in range(1, 5)), *(f"tiles/{n}.jpg" for n in "abcd"))
    return root


def table(folder: Path, *lines: str, head: str = HEAD, name: str = "pairs.csv") -> Path:
    (folder / name).write_text("\n".join([head, *lines]))
    return folder / name


def by_key(raw: RawDataset) -> dict[str, Place]:
    return {place.key: place for place in raw.places}


def test_a_table_with_every_column(folder: Path, tmp_path: Path) -> None:
    raw = read_places("table", table(folder, *LINES))
    places = by_key(raw)
    assert list(places) == ["a", "b", "c", "d"] and raw.coordinates == "latlon"
    assert [view.image.path for view in places["a"].views] == ["photos/1.jpg", "photos/2.jpg"]
    first, second = places["a"].views
    assert (first.north, first.east, first.semi_positives) == (47.0701, 15.4402, ("b",)) and math.isnan(second.north)
    assert places["b"].views[0].semi_positives == ("a", "c")
    assert (places["d"].splits, places["d"].views, places["d"].area) == (("test",), (), "Vienna")
    layout = shard(raw, Store.open(tmp_path / "store"), "own", options=SMALL, workers=1).layout
    assert layout.info["pairs"] == {"train": 3, "test": 1} and layout.position[0].tolist() == [47.07, 15.44]


def test_a_table_of_two_columns(folder: Path) -> None:
    photos = [f"photos/{n}.jpg" for n in range(40)]
    images(folder, *photos, *(f"tiles/{n}.jpg" for n in range(40)))
    lines = [f"{photo},tiles/{n}.jpg" for n, photo in enumerate(photos)]
    raw = read_places("table", table(folder, *lines, head="query,tile"))
    splits = {place.key: place.splits for place in raw.places}
    assert raw.coordinates == "none" and {place.area for place in raw.places} == {"all"}
    assert 0 < raw.count("test") < 12 and raw.count("train") + raw.count("test") == 40
    assert "no column split" in raw.notes[0]
    more = read_places("table", table(folder, *lines[::-1][:30], head="query,tile"))
    assert all(splits[place.key] == place.splits for place in more.places)  # whatever else the table has


def test_tiles_without_keys_are_named_by_their_path(folder: Path) -> None:
    raw = read_places(
        "table",
        table(
            folder,
            "photos/1.jpg,tiles/a.jpg,tiles/b.jpg",
            "photos/2.jpg,tiles/b.jpg,",
            head="query,tile,semi_positives",
        ),
    )
    assert by_key(raw)["all_tiles-a"].views[0].semi_positives == ("all_tiles-b",)


@pytest.mark.parametrize("name", ["./{0}", "{1}/{0}", "{1}/tiles/../{0}", "{1}/again/{0}", "again/{0}", "link.jpg"])
def test_one_image_under_two_names_is_one(folder: Path, name: str) -> None:
    """By a detour, absolute, through a link to its folder, and by a link to the file."""
    (folder / "again").symlink_to(".")
    for shown in ("tiles/a.jpg", "photos/1.jpg"):
        (folder / "link.jpg").unlink(missing_ok=True)
        (folder / "link.jpg").symlink_to(shown)
        other = name.format(shown, folder)
        if shown.startswith("tiles"):
            lines = (f"photos/1.jpg,{shown},train", f"photos/2.jpg,{other},Train")
            [place] = read_places("table", table(folder, *lines, head="query,tile,split")).places
            assert len(place.views) == 2 and place.tile.path == "tiles/a.jpg" and place.splits == ("train",)
        else:
            lines = (f"{shown},tiles/a.jpg,train", f"{other},tiles/b.jpg,test")
            with pytest.raises(BadInput, match=r"pairs\.csv:3: .*contradicts its other line, pairs\.csv:2"):
                read_places("table", table(folder, *lines, head="query,tile,split"))
            again = read_places(
                "table", table(folder, lines[0], f"{other},./tiles/a.jpg,train", head="query,tile,split")
            )
            assert again.count("train") == 1 and any("1" in note for note in again.notes)


def test_semi_positives_may_be_written_otherwise_than_the_tile(folder: Path) -> None:
    lines = (
        f"photos/1.jpg,tiles/a.jpg,./tiles/b.jpg; {folder}/tiles/c.jpg",
        "photos/2.jpg,tiles/b.jpg,",
        ",tiles/c.jpg,",
    )
    raw = read_places("table", table(folder, *lines, head="query,tile,semi_positives"))
    assert by_key(raw)["all_tiles-a"].views[0].semi_positives == ("all_tiles-b", "all_tiles-c")


def test_one_object_of_a_bucket_under_two_names_is_one(folder: Path, s3_store: Store) -> None:
    for path in folder.rglob("*.jpg"):
        s3_store.write(f"own/{path.relative_to(folder).as_posix()}", path.read_bytes())
    url = f"{s3_store.url}/own"
    lines = ("photos/1.jpg,tiles/a.jpg", f"photos/2.jpg,{url}/tiles/a.jpg", f"photos/3.jpg,S3{url[2:]}/tiles/a.jpg")
    s3_store.write("own/pairs.csv", "\n".join(["query,tile", *lines]).encode())
    [place] = read_places("table", f"{url}/pairs.csv").places
    assert [view.image.path for view in place.views] == ["photos/1.jpg", "photos/2.jpg", "photos/3.jpg"]


def test_the_scheme_and_host_of_a_url_may_be_in_capitals(folder: Path) -> None:
    lines = ("HTTP://Example.org/Q.jpg,tiles/a.jpg", "http://example.org/Q.jpg,tiles/a.jpg")
    raw = read_places("table", table(folder, *lines, head="query,tile"))
    assert [view.image.path for view in raw.places[0].views] == ["http://example.org/Q.jpg"]


@pytest.mark.parametrize("head", ["query,tile,latitude,longitude", "query,tile,Lat,LNG"])
def test_latitude_and_longitude_may_be_written_out(folder: Path, head: str) -> None:
    raw = read_places("table", table(folder, '"photos/1.jpg" ,"tiles/a.jpg"  ,47.07,15.44', head=head))
    assert (raw.coordinates, raw.places[0].north, raw.places[0].east, raw.notes[1:]) == ("latlon", 47.07, 15.44, ())


def test_line_ends_of_any_kind(folder: Path) -> None:
    (folder / "pairs.csv").write_bytes(b'"query" ,tile\rphotos/1.jpg,"tiles/a.jpg" \rphotos/2.jpg,tiles/b.jpg')
    assert [place.tile.path for place in read_places("table", folder / "pairs.csv").places] == [
        "tiles/a.jpg",
        "tiles/b.jpg",
    ]


def geoparquet(file: Path, name: str, crs: object = None, shape: str = "POINT (15.44 47.07)") -> Path:
    """A row with its shape in a column of some name, as GeoParquet's metadata say."""
    column = {"encoding": "WKB", "geometry_types": []} | ({"crs": crs} if crs else {})
    said = {"version": "1.0.0", "primary_column": name, "columns": {name: column}}
    rows = [{"query": "photos/1.jpg", "tile": "tiles/a.jpg", name: shapely.from_wkt(shape).wkb}]
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"geo": json.dumps(said)}), file)
    return file


@pytest.mark.parametrize(
    "crs",
    [
        None,
        {"id": {"authority": "OGC", "code": "CRS84"}},
        {"id": {"authority": "EPSG", "code": 4326}},
        {"name": "WGS 84"},
    ],
)
def test_the_points_of_geoparquet_are_taken(folder: Path, crs: object) -> None:
    [place] = read_places("table", geoparquet(folder / "pairs.geoparquet", "where", crs)).places
    assert (place.north, place.east) == (47.07, 15.44)


@pytest.mark.parametrize(
    ("crs", "shape", "said"),
    [
        ({"id": {"authority": "EPSG", "code": 32633}}, "POINT (500000 5200000)", "EPSG:32633, not in degrees"),
        ({"name": "unknown system"}, "POINT (1 2)", "unknown system, not in degrees"),
        ("EPSG:4326", "POINT (1 2)", "metadata are malformed"),
        (None, "LINESTRING (1 2, 3 4)", "pairs.parquet:1: .*LineString, no Point"),
    ],
)
def test_geoparquet_of_something_else_is_one_line(folder: Path, crs: object, shape: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_places("table", geoparquet(folder / "pairs.parquet", "geometry", crs, shape))


def test_damaged_parquet_is_one_line(folder: Path) -> None:
    file = geoparquet(folder / "pairs.parquet", "geometry")
    whole, refused = file.read_bytes(), 0
    for at in range(0, len(whole), 13):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read_places("table", file)
        except BadInput as error:
            assert "pairs.parquet" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20


POINT = {"type": "Point", "coordinates": [15.44, 47.07]}
PAIR = {"query": "photos/1.jpg", "tile": "tiles/a.jpg"}


@pytest.mark.parametrize(
    "content",
    [
        {"features": None},
        {"features": [{"properties": [1], "geometry": POINT}]},
        {"features": [{"properties": "x", "geometry": POINT}]},
        {"features": ["x"]},
        {"features": [{"properties": PAIR, "geometry": "POINT (1 2)"}]},
        {"features": [{"properties": PAIR, "geometry": {"type": "Point", "coordinates": None}}]},
        {"features": [{"properties": PAIR, "geometry": {"type": "Point", "coordinates": {"x": 1}}}]},
        "deep",
    ],
)
def test_malformed_geojson_is_one_line(folder: Path, content: object) -> None:
    text = "[" * 200_000 if content == "deep" else json.dumps(content)
    (folder / "pairs.geojson").write_text(text)
    with pytest.raises(BadInput, match=r"pairs\.geojson") as told:
        read_places("table", folder / "pairs.geojson")
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def rows() -> list[dict[str, str]]:
    return [dict(zip(HEAD.split(","), line.split(","), strict=True)) for line in LINES]


def as_numbers(row: dict[str, str]) -> dict[str, object]:
    places = {name: float(row[name]) if row[name] else None for name in ("lat", "lon", "query_lat", "query_lon")}
    return {**row, **places, "query": row["query"] or None}


def test_the_same_in_every_format(folder: Path) -> None:
    expected = read_places("table", table(folder, *LINES)).places
    tabs = ["\t".join(line.split(",")) for line in (HEAD, *LINES)]
    assert read_places("table", table(folder, *tabs[1:], head=tabs[0], name="pairs.tsv")).places == renamed(
        expected, "pairs.tsv", 0
    )
    pq.write_table(
        pa.Table.from_pylist([as_numbers(row) | {"note": "mine"} for row in rows()]), folder / "pairs.parquet"
    )
    assert read_places("table", folder / "pairs.parquet").places == renamed(expected, "pairs.parquet", -1)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [float(row["lon"]), float(row["lat"])]},
            "properties": {name: value for name, value in as_numbers(row).items() if name not in ("lat", "lon")},
        }
        for row in rows()
    ]
    (folder / "pairs.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert read_places("table", folder / "pairs.geojson").places == renamed(expected, "pairs.geojson", -1)


def renamed(places: tuple[Place, ...], name: str, shift: int) -> tuple[Place, ...]:
    """The same places as they are named by another file, whose rows begin at another number."""

    def where(text: str) -> str:
        return f"{name}:{int(text.rpartition(':')[2]) + shift}"

    return tuple(
        replace(
            place,
            tile=replace(place.tile, named=where(place.tile.named)),
            views=tuple(
                replace(view, image=replace(view.image, named=where(view.image.named))) for view in place.views
            ),
        )
        for place in places
    )


WRONG = {
    "no column": (("photos/1.jpg,train",), "query,split", r"pairs\.csv:1: no column tile"),
    "head line alone": ((), "query,tile", r"pairs\.csv: no row"),
    "half a position": (("a,b,1",), "query,tile,lat", r"pairs\.csv: a column lat.*lat and lon"),
    "twice": (("a,b,c",), "query,tile,tile", r"pairs\.csv:1: .*tile is there twice"),
    "semicolons": (("a.jpg;b.jpg",), "query;tile", r"pairs\.csv:1: .*semicolons.*commas"),
    "cells": (("a.jpg",), "query,tile", r"pairs\.csv:2: 1 cells, but 2 columns"),
    "split": (("photos/1.jpg,tiles/a.jpg,val",), "query,tile,split", r"csv:2: split 'val'.*train, test, gallery"),
    "no tile": (("photos/1.jpg,",), "query,tile", r"pairs\.csv:2: no tile"),
    "key": (("photos/1.jpg,tiles/a.jpg,a.1",), "query,tile,key", r"pairs\.csv:2: key 'a\.1'"),
    "one key, two tiles": (
        ("photos/1.jpg,tiles/a.jpg,a", "photos/2.jpg,tiles/b.jpg,a"),
        "query,tile,key",
        r"pairs\.csv:3: the key a has another tile at pairs\.csv:2",
    ),
    "one tile, two keys": (
        ("photos/1.jpg,tiles/a.jpg,a", "photos/2.jpg,tiles/a.jpg,b"),
        "query,tile,key",
        r"pairs\.csv:3: tiles/a\.jpg .*pairs\.csv:2",
    ),
    "two tiles of a query": (
        ("photos/1.jpg,tiles/a.jpg", "photos/1.jpg,tiles/b.jpg"),
        "query,tile",
        r"pairs\.csv:3: photos/1\.jpg contradicts.*pairs\.csv:2",
    ),
    "two positions": (
        ("photos/1.jpg,tiles/a.jpg,47,15", "photos/2.jpg,tiles/a.jpg,48,15"),
        "query,tile,lat,lon",
        r"pairs\.csv:3: tiles/a\.jpg lies at",
    ),
    "no position": (
        ("photos/1.jpg,tiles/a.jpg,47,15", "photos/2.jpg,tiles/b.jpg,,"),
        "query,tile,lat,lon",
        r"pairs\.csv:3: no lat and lon",
    ),
    "not on Earth": (("photos/1.jpg,tiles/a.jpg,115,47",), "query,tile,lat,lon", r"pairs\.csv:2: .*not on Earth"),
    "semi-positive": (("photos/1.jpg,tiles/a.jpg,z",), "query,tile,semi_positives", r"pairs\.csv:2: semi-positive z"),
    "password": (("https://me:secret@host/a.jpg,tiles/a.jpg",), "query,tile", r"pairs\.csv:2: a URL with a password"),
    "above": (("../1.jpg,tiles/a.jpg",), "query,tile", r"pairs\.csv:2: '\.\./1\.jpg'"),
    "empty": ((), "", r"pairs\.csv:1: no column query and tile"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(WRONG))
def test_what_is_wrong_is_named_by_line(folder: Path, what: str) -> None:
    lines, head, message = WRONG[what]
    with pytest.raises(BadInput, match=message) as told:
        read_places("table", table(folder, *lines, head=head))
    assert "\n" not in str(told.value) and "secret" not in str(told.value)


def test_columns_that_are_not_used_are_named(folder: Path) -> None:
    raw = read_places("table", table(folder, "photos/1.jpg, tiles/a.jpg, red", head="Query,TILE , Colour"))
    assert "columns not used: colour" in raw.notes


def test_what_is_no_table(folder: Path) -> None:
    with pytest.raises(MissingRaw, match=r"none\.csv"):
        read_places("table", folder / "none.csv")
    with pytest.raises(BadInput, match=r"photos: .*\.csv"):
        read_places("table", folder / "photos")
    for name, data in (("a.parquet", b"PAR1"), ("a.geojson", b"[1]"), ("a.csv", "query,tile\nö".encode("latin-1"))):
        (folder / name).write_bytes(data)
        with pytest.raises(BadInput, match=name):
            read_places("table", folder / name)
    line = {"type": "LineString", "coordinates": [[1, 2], [3, 4]]}
    feature = {"geometry": line, "properties": {"query": "photos/1.jpg", "tile": "tiles/a.jpg"}}
    (folder / "a.geojson").write_text(json.dumps({"features": [feature]}))
    with pytest.raises(BadInput, match=r"a\.geojson:1: .*Point"):
        read_places("table", folder / "a.geojson")


def test_missing_images_are_named_by_line(folder: Path, tmp_path: Path) -> None:
    file = table(folder, *LINES, "photos/5.jpg,tiles/b.jpg,b,47.08,15.45,Graz,train,,,")
    assert "pairs.csv:7: photos/5.jpg: missing" in refused("shard", "table", str(file), str(tmp_path / "store"))


def test_images_anywhere(folder: Path, tmp_path: Path, s3_store: Store) -> None:
    """One pair each from the table's folder, another folder, S3 and a web server; a second sharding reads nothing."""
    elsewhere = images(tmp_path / "elsewhere", "q.jpg", "t.jpg")
    for name, data in elsewhere.items():
        s3_store.write(f"raw/deep/{name}", data)
    with scripted_server(
        lambda request: content(request, elsewhere["q.jpg" if "q.jpg" in request.path else "t.jpg"])
    ) as server:
        places = (
            ("photos/1.jpg", "tiles/a.jpg", "train"),
            (f"{tmp_path}/elsewhere/q.jpg", f"{tmp_path}/elsewhere/t.jpg", "train"),
            (f"{s3_store.url}/raw/deep/q.jpg", f"{s3_store.url}/raw/deep/t.jpg", "train"),
            (f"{server.url}/q.jpg?token=1", f"{server.url}/t.jpg", "test"),
        )
        file = table(folder, *map(",".join, places), head="query,tile,split")
        target = Store.open(tmp_path / "store")
        report = shard(read_places("table", file), target, "own", options=SMALL, workers=1)
        assert report.layout.info["pairs"] == {"train": 3, "test": 1} and not report.broken
        server.requests.clear()
        again = shard(read_places("table", file), target, "own", options=SMALL, workers=1)
        assert again.already and again.bytes_read == 0
        assert {request.method for request in server.requests} == {"HEAD"}
        images(folder, "photos/9.jpg", "tiles/9.jpg")
        table(folder, *map(",".join, places), "photos/9.jpg,tiles/9.jpg,train", head="query,tile,split")
        grown = shard(read_places("table", file), target, "own", options=SMALL, workers=1)
        assert grown.counts == {"new places": 1} and grown.layout.n_places == 5


def test_a_table_in_a_bucket_names_images_beside_it(folder: Path, tmp_path: Path, s3_store: Store) -> None:
    table(folder, *LINES)
    for path in folder.rglob("*.*"):
        s3_store.write(f"own/{path.relative_to(folder).as_posix()}", path.read_bytes())
    local = shard(
        read_places("table", folder / "pairs.csv"), Store.open(tmp_path / "a"), "own", options=SMALL, workers=1
    )
    command = ("shard", "table", f"{s3_store.url}/own/pairs.csv", str(tmp_path / "b"), "--dataset", "own")
    assert "4 places" in said(*command, "--tile-size", "16x16", "--view-size", "16x32", "--workers", "1")
    assert Store.open(tmp_path / "b").read_json("own/layouts/base/layout.json")["id"] == local.layout.id


def test_a_table_on_a_web_server_names_images_beside_it(folder: Path, tmp_path: Path) -> None:
    table(folder, *LINES)
    local = shard(
        read_places("table", folder / "pairs.csv"), Store.open(tmp_path / "a"), "own", options=SMALL, workers=1
    )
    with scripted_server(lambda request: content(request, (folder / request.path.lstrip("/")).read_bytes())) as server:
        raw = read_places("table", f"{server.url}/pairs.csv")
        layout = shard(raw, Store.open(tmp_path / "b"), "own", options=SMALL, workers=1).layout
    assert [place.tile.path for place in raw.places] == [f"{server.url}/tiles/{n}.jpg" for n in "abcd"]
    assert layout.keys == local.layout.keys and layout.info["pairs"] == local.layout.info["pairs"]


def test_what_a_url_does_not_give_is_named_by_line(folder: Path, tmp_path: Path, s3_store: Store) -> None:
    def answer(request: Request) -> Answer:
        return Answer(404) if "gone" in request.path else content(request, b"no picture")

    s3_store.write("x.jpg", b"")
    with scripted_server(answer) as server:
        for number, (url, said_of_it) in enumerate(
            (
                (f"{server.url}/gone.jpg", "the server says 404"),
                (f"{server.url}/text.jpg", "neither JPEG nor PNG"),
                (f"{s3_store.url}/none.jpg", "missing"),
            )
        ):
            file = table(
                folder,
                f"{url},tiles/a.jpg,train",
                "photos/1.jpg,tiles/b.jpg,train",
                "photos/2.jpg,tiles/c.jpg,test",
                head="query,tile,split",
            )
            line = refused("shard", "table", str(file), str(tmp_path / f"store-{number}"), "--workers", "1")
            assert f"pairs.csv:2: {url}: {said_of_it}" in line
    url = "http://127.0.0.1:9/1.jpg"  # the port of "discard", where nobody listens
    file = table(folder, f"{url},tiles/a.jpg,train", "photos/2.jpg,tiles/c.jpg,test", head="query,tile,split")
    assert f"{url}: no answer" in refused("shard", "table", str(file), str(tmp_path / "store"), "--workers", "1")
    assert not (tmp_path / "store" / "table" / "layouts" / "base" / "layout.json").exists()
