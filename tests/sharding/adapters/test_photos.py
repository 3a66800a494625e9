"""Own photos on real GeoTIFFs: places, splits that do not touch, what is left out, and an append."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import simplejpeg

from geostream.errors import BadInput, MissingRaw
from geostream.layout import Layout
from geostream.store import Store
from sharding import RawDataset, ShardOptions, read_places, shard
from sharding.append import joined_source
from sharding.places import TileImage
from tests.sharding.tiles.pictures import LAND, SIDE, SOUTH, WEST, photo, write_geotiff, write_region

OPTIONS = ShardOptions(tile_size=(24, 24), view_size=(16, 32), shard_bytes=20_000)
HOW: dict[str, Any] = {"metres": 20.0, "block_metres": 80.0, "test_share": 0.34}
INNER = (WEST + SIDE / 8, SOUTH + SIDE / 8, WEST + 7 * SIDE / 8, SOUTH + 7 * SIDE / 8)


@pytest.fixture(scope="module")
def imagery(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_geotiff(tmp_path_factory.mktemp("land") / "land.tif", metres=0.6))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty panoramas within the land, in folders, looking anywhere, some lying."""
    raw, rng = tmp_path / "raw", np.random.default_rng(3)
    for number in range(60):
        put(raw, number, *rng.uniform((INNER[1], INNER[0]), (INNER[3], INNER[2])))
    write_region(raw / "region.geojson", INNER)
    return raw


def put(raw: Path, number: int, latitude: float, longitude: float) -> Path:
    path = raw / "photos" / f"walk-{number % 3}" / f"{number:03d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo(latitude, longitude, heading=90.0 * (number % 4), lying=number % 5 == 0))
    return path


def read(raw: Path, imagery: str, **how: Any) -> RawDataset:
    return read_places("photos", raw, **{"tiles": imagery, **HOW, **how})


def boxes(raw: RawDataset, split: str) -> list[shapely.Geometry]:
    tiles = [place.tile for place in raw.places if place.splits == (split,)]
    return [shapely.box(*tile.box) for tile in tiles if isinstance(tile, TileImage)]


def no_tile_touches(raw: RawDataset) -> bool:
    tree = shapely.STRtree(boxes(raw, "test"))
    return not tree.query(boxes(raw, "train"), predicate="intersects").size


def test_a_photos_tile_has_it_nearest_to_its_middle_and_the_others_show_it(folder: Path, imagery: str) -> None:
    raw = read(folder, imagery)
    assert raw.count("train") > 5 and raw.count("test") > 3 and no_tile_touches(raw)
    at = {place.key: place for place in raw.places}
    shrink = np.cos(np.deg2rad(SOUTH))
    for place in raw.places:
        for view in place.views:
            spot = shapely.Point(view.east, view.north)

            def away(key: str, north: float = view.north, east: float = view.east) -> float:
                return float(np.hypot(at[key].north - north, (at[key].east - east) * shrink))

            showing = [p.key for p in raw.places if shapely.box(*p.tile.box).covers(spot)]  # type: ignore[attr-defined]
            assert sorted(view.semi_positives) == sorted(set(showing) - {place.key})
            assert away(place.key) <= min(map(away, showing)) + 1e-12 and view.split in place.splits
    assert raw.options == {"metres": 20.0, "overlap": 0.5, "test_share": 0.34, "block_metres": 80.0}
    assert raw.view_size == (384, 768)  # most are panoramas


def stored(layout: Layout, name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The pixels of the view that was made from a file, and what its place's JSON says of it."""
    for number, row in enumerate(layout.places.to_pylist()):
        for view in row["views"]:
            if view["source"].endswith(name):
                members = {m["member"]: m for m in layout.members.to_pylist() if m["place"] == number}

                def data(member: str, members: dict[str, Any] = members) -> bytes:
                    m = members[member]
                    return layout.store.read_range(layout.shard_names[m["shard"]], m["offset"], m["size"])

                [facts] = [v for v in json.loads(data("json"))["views"] if v["source"].endswith(name)]
                return simplejpeg.decode_jpeg(data(f"{view['name']}.jpg")), facts
    raise LookupError(name)


def test_photos_are_stored_upright_with_north_in_the_middle(folder: Path, imagery: str, tmp_path: Path) -> None:
    layout = shard(read(folder, imagery), Store.open(tmp_path / "store"), "own", options=OPTIONS, workers=1).layout
    assert layout.source == {"name": "land.tif", "licence": None, "attribution": None, "url": None}
    found = 0
    for row in layout.places.to_pylist():
        for view in row["views"]:
            number = int(view["source"].rpartition("/")[2][:3])
            pixels, facts = stored(layout, view["source"])
            assert pixels.shape == (16, 32, 3) and facts["heading"] == 0.0
            # The ramp goes from black to white; turned by the heading, its jump lies where the camera's back was.
            steps = np.diff(pixels[..., 0].mean(axis=0))
            jump = int(np.argmin(steps)) + 1 if steps.min() < -100 else 0
            assert abs(jump - 8 * (number % 4)) <= 1
            found += 1
    assert found > 10


def test_an_append_takes_new_photos_alone(folder: Path, imagery: str, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    first = shard(read(folder, imagery), store, "own", options=OPTIONS, workers=1).layout
    assert shard(read(folder, imagery), store, "own", workers=1).already
    rng = np.random.default_rng(9)
    for number in range(60, 90):
        put(folder, number, *rng.uniform((INNER[1], INNER[0]), (INNER[3], INNER[2])))
    report = shard(read(folder, imagery), store, "own", workers=1)
    assert not report.already and "new places" not in report.counts and report.counts["changed places"] > 0
    assert report.layout.n_places == first.n_places and report.layout.gallery == first.gallery
    assert report.layout.tile_metres == 20.0 and report.layout.source == first.source
    assert len(report.layout.pairs("train").place) > len(first.pairs("train").place)
    with pytest.raises(BadInput, match="metres 20.0"):
        shard(read(folder, imagery, metres=20.5, block_metres=62), store, "own", workers=1)


def test_photos_without_coordinates_are_named_counted_and_above_the_share_refused(
    folder: Path, imagery: str, tmp_path: Path
) -> None:
    (folder / "photos" / "bare.jpg").write_bytes(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
    (folder / "photos" / "zero.jpg").write_bytes(photo(0.0, 0.0))
    (folder / "photos" / "text.jpg").write_text("no photo")
    raw, store = read(folder, imagery), Store.open(tmp_path / "store")
    assert [one.path for one in raw.left_out] == ["photos/bare.jpg", "photos/text.jpg", "photos/zero.jpg"]
    with pytest.raises(BadInput, match=r"3 of \d+ images are broken.*bare.jpg: no coordinates"):
        shard(raw, store, "own", options=OPTIONS, workers=1)
    allowed = ShardOptions(tile_size=(24, 24), view_size=(16, 32), max_broken=0.1)
    report = shard(raw, store, "own", options=allowed, workers=1)
    assert len(report.broken) == 3 and len(report.layout.info["broken"]) == 3
    again = shard(read(folder, imagery), store, "own", workers=1)
    assert again.already and len(again.broken) == 3


@pytest.mark.parametrize("kind", ["csv", "geojson", "parquet"])
def test_a_table_says_where_photos_were_taken_and_what_is_test(
    folder: Path, imagery: str, tmp_path: Path, kind: str
) -> None:
    spots: list[dict[str, Any]] = [
        {"file": path.relative_to(folder).as_posix(), "heading": 45.0, "area": "Graz", "split": split, "at": at}
        for path in sorted((folder / "photos").rglob("*.jpg"))[:30]
        for at in [np.random.default_rng(len(path.name) + int(path.stem)).uniform(0.15, 0.85, 2)]
        for split in ["test" if at[0] > 0.6 else "train"]
    ]
    for spot in spots:
        spot["lat"], spot["lon"] = (float(v) for v in np.array((SOUTH, WEST)) + spot.pop("at") * SIDE)
    table = tmp_path / f"photos.{kind}"
    if kind == "csv":
        table.write_text("\n".join([",".join(spots[0]), *(",".join(map(str, spot.values())) for spot in spots)]))
    elif kind == "geojson":
        features = [
            {"type": "Feature", "properties": spot,
             "geometry": {"type": "Point", "coordinates": [spot.pop("lon"), spot.pop("lat")]}}
            for spot in spots
        ]  # fmt: skip
        table.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    else:
        points = [shapely.to_wkb(shapely.Point(spot.pop("lon"), spot.pop("lat"))) for spot in spots]
        pq.write_table(pa.Table.from_pylist(spots).append_column("geometry", pa.array(points)), table)
    raw = read(folder, imagery, table=str(table))
    assert no_tile_touches(raw) and {place.area for place in raw.places} == {"Graz"}
    views = [view for place in raw.places for view in place.views]
    assert views and all((view.split == "test") == (view.north > SOUTH + 0.6 * SIDE) for view in views)
    assert raw.count("test") > 2 and raw.count("train") > 2 and raw.options["block_metres"] is None
    assert {view.heading for view in views} == {0.0}  # panoramas: turned by what the table says


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["file,lat", "photos/walk-0/000.jpg,47"], "no column lon"),
        (["file,lat,lon", "photos/walk-0/000.jpg,north,15"], "photos.csv:2: 'north'"),
        (["file,lat,lon", "photos/walk-0/000.jpg,95,15"], "photos.csv:2.*not on Earth"),
        (["file,lat,lon,split", "photos/walk-0/000.jpg,47.072,15.432,validation"], "photos.csv:2: split"),
        (["file,lat,lon,split", "photos/walk-0/000.jpg,47.072,15.432,test", "photos/walk-1/001.jpg,47.072,15.432,"],
         "photos.csv:3: has no split"),
        (["file,lat,lon", "photos/walk-0/000.jpg,15.432,47.072"], "exchanged"),
        (["file,lat,lon", "photos/walk-0/000.jpg,47.072,15.432", "photos/walk-0/000.jpg,47.073,15.432"], "contradicts"),
        (["file,lat,lon", "../secret.jpg,47.072,15.432"], "photos.csv:2: '../secret.jpg'"),
        (["file,lat,lon", ",47.072,15.432"], "photos.csv:2: names no file"),
        (["file,lat,lon"], "no photo"),
    ],
)  # fmt: skip
def test_tables_that_make_no_sense_are_one_line(
    folder: Path, imagery: str, tmp_path: Path, lines: list[str], said: str
) -> None:
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    with pytest.raises(BadInput, match=said) as error:
        read(folder, imagery, table=str(tmp_path / "photos.csv"))
    assert "\n" not in str(error.value)


def test_photos_elsewhere_and_what_is_missing_are_told(folder: Path, imagery: str, tmp_path: Path) -> None:
    far = tmp_path / "far"
    put(far, 1, 10.0, 10.0)
    with pytest.raises(BadInput, match="no photo was taken in the region.*latitude 10.0") as error:
        read(far, imagery, region=str(folder / "region.geojson"))
    assert "exchanged" not in str(error.value)
    with pytest.raises(BadInput, match="--tiles"):
        read_places("photos", folder, **HOW)
    with pytest.raises(MissingRaw, match="nowhere"):
        read(folder, imagery, region="nowhere.geojson")
    with pytest.raises(MissingRaw, match="typo"):
        read(tmp_path / "typo", imagery, region=str(folder / "region.geojson"))
    with pytest.raises(BadInput, match="block_metres"):
        read(folder, imagery, block_metres=30.0)
    with pytest.raises(BadInput, match="block-metres"):
        read(folder, imagery, block_metres=5000.0, test_share=0.01)
    assert LAND[0] < INNER[0]


def test_an_append_from_other_imagery_names_both() -> None:
    before = {"name": "2020", "licence": "CC0-1.0", "attribution": "A", "url": None}
    now = {"adapter": "photos", "name": "2024", "licence": None, "attribution": "A and B", "url": "u"}
    assert joined_source(before, now) == {
        "adapter": "photos", "name": "2020; 2024", "licence": "CC0-1.0", "attribution": "A and B", "url": "u"
    }  # fmt: skip
    assert joined_source(None, now) == now and joined_source(before, before) == before
