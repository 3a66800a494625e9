"""Regions: the tiles that they get, what of them has imagery, and what is said of those that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geostream.errors import BadInput, MissingRaw
from geostream.layout import open_layout
from geostream.store import Store
from sharding import ShardOptions, shard
from sharding.places import TileImage
from sharding.tiles.region import read_region, read_shapes
from tests.sharding.tiles.pictures import LAND, SIDE, SOUTH, WEST, write_geotiff, write_region

SQUARE = '{"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 0]]]}'
MIDDLE = (WEST + SIDE / 4, SOUTH + SIDE / 4, WEST + 3 * SIDE / 4, SOUTH + 3 * SIDE / 4)
OPTIONS = ShardOptions(tile_size=(24, 24), shard_bytes=10_000)


@pytest.fixture(scope="module")
def land(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_geotiff(tmp_path_factory.mktemp("land") / "land.tif", metres=1.0))


def test_the_same_region_twice_has_the_same_keys_and_a_larger_one_has_them_too(land: str, tmp_path: Path) -> None:
    region = write_region(tmp_path / "graz.geojson", MIDDLE)
    first = read_region(land, region, metres=50, work=tmp_path)
    assert read_region(land, region, metres=50, work=tmp_path).places == first.places
    larger = write_region(tmp_path / "larger.geojson", (MIDDLE[0], MIDDLE[1], MIDDLE[2] + SIDE / 20, MIDDLE[3]))
    second = read_region(land, larger, metres=50, work=tmp_path, area="graz")
    assert {place.key for place in first.places} < {place.key for place in second.places}
    assert {place.area for place in first.places} == {"graz"} and first.is_gallery and first.tile_metres == 50


def test_a_gallery_of_a_region_is_committed_and_an_append_sees_no_change(land: str, tmp_path: Path) -> None:
    region, store = write_region(tmp_path / "graz.geojson", MIDDLE), Store.open(tmp_path / "store")
    raw = read_region(land, region, metres=50, work=tmp_path)
    layout = shard(raw, store, "graz", options=OPTIONS, workers=1).layout
    opened = open_layout(store)
    assert opened.id == layout.id and opened.n_places == len(raw.places) and len(opened.shard_names) > 1
    assert opened.tile_metres == 50.0 and opened.source is not None and opened.source["name"] == "land.tif"
    assert len(opened.references("test")) == len(raw.places) and len(opened.pairs("test").place) == 0
    again = shard(read_region(land, region, metres=50, work=tmp_path), store, "graz", workers=1)
    assert again.already and again.bytes_read == 0


def test_changed_imagery_is_cut_anew_where_it_has_changed(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "land.tif", metres=1.0)
    region, store = write_region(tmp_path / "graz.geojson", MIDDLE), Store.open(tmp_path / "store")

    def sharded(**rules: bool) -> Any:
        return shard(
            read_region(str(path), region, metres=50, work=tmp_path), store, "graz", "base", OPTIONS, 1, **rules
        )

    places = sharded().layout.n_places
    path.touch()  # another time, the same pixels: all is read, nothing is written
    assert sharded().already
    import rasterio

    with rasterio.open(path, "r+") as raster:
        window = ((0, raster.height), (0, raster.width // 2))
        raster.write(np.full((3, raster.height, raster.width // 2), 9, np.uint8), window=window)
    report = sharded(extend_test=True)
    assert 0 < report.counts["changed places"] < places and report.layout.generation == 1


def test_tiles_that_reach_beyond_the_imagery_are_left_out_and_noted(land: str, tmp_path: Path) -> None:
    raw = read_region(land, write_region(tmp_path / "all.geojson", LAND), metres=50, work=tmp_path)
    assert any("beyond the imagery" in note for note in raw.notes)
    for place in raw.places:
        assert isinstance(place.tile, TileImage)
        west, south, east, north = place.tile.box
        assert west >= LAND[0] - 1e-6 and south >= LAND[1] - 1e-6
        assert east <= LAND[2] + 1e-5 and north <= LAND[3] + 1e-5


def test_a_region_without_imagery_says_which_part(land: str, tmp_path: Path) -> None:
    west, south, east, north = LAND
    half = write_region(tmp_path / "half.geojson", (west + SIDE / 2, south, east + SIDE / 2, north))
    with pytest.raises(BadInput, match=r"50\.\d% .*longitude 15\.434") as error:
        read_region(land, half, metres=50, work=tmp_path)
    assert "\n" not in str(error.value)
    exchanged = write_region(tmp_path / "exchanged.geojson", (south, west, north, east))
    with pytest.raises(BadInput, match="elsewhere.*exchanged"):
        read_region(land, exchanged, metres=50, work=tmp_path)
    far = write_region(tmp_path / "far.geojson", (0.0, 0.0, 0.01, 0.01))
    with pytest.raises(BadInput, match="elsewhere") as error:
        read_region(land, far, metres=50, work=tmp_path)
    assert "exchanged" not in str(error.value)


@pytest.mark.parametrize(("metres", "said"), [(8.0, "raise --metres"), (900.0, "no tile"), (-5.0, "metres")])
def test_sizes_that_the_imagery_does_not_give_are_refused(land: str, tmp_path: Path, metres: float, said: str) -> None:
    small = write_region(tmp_path / "r.geojson", (WEST + 0.002, SOUTH + 0.002, WEST + 0.0021, SOUTH + 0.0021))
    with pytest.raises(BadInput, match=said):
        read_region(land, small, metres=metres, work=tmp_path)


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([(179.9, 1.0, 180.0, 1.1), (-180.0, 1.0, -179.9, 1.1)], "360.0 degrees.*180th meridian"),
        ([(179.9995, 1.0, 180.0, 1.001)], "180th meridian"),
        ([(-180.0, 1.0, -179.9995, 1.001)], "180th meridian"),
        ([(5.0, 45.0, 15.0, 55.0)], "more than 5,000,000.*raise --metres"),
    ],
)
def test_regions_across_the_180th_meridian_or_too_large_are_refused_before_anything_is_read(
    tmp_path: Path, boxes: list[Any], said: str
) -> None:
    rings = [[[[w, s], [e, s], [e, n], [w, n], [w, s]]] for w, s, e, n in boxes]
    (tmp_path / "r.geojson").write_text(json.dumps({"type": "MultiPolygon", "coordinates": rings}))
    with pytest.raises(BadInput, match=f"r.geojson.*{said}") as error:
        read_region("/nowhere", tmp_path / "r.geojson", metres=50, work=tmp_path)
    assert "\n" not in str(error.value)


def test_polygons_have_areas_and_a_tile_belongs_to_one(land: str, tmp_path: Path) -> None:
    boxes = {"West": (MIDDLE[0], MIDDLE[1], WEST + SIDE / 2, MIDDLE[3]), "East": (WEST + SIDE / 2, *MIDDLE[1:])}
    features: list[Any] = []
    for name, box in boxes.items():
        features += json.loads(write_region(tmp_path / "one.geojson", box, area=name).read_text())["features"]
    (tmp_path / "two.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    raw = read_region(land, tmp_path / "two.geojson", metres=50, work=tmp_path)
    assert {place.area for place in raw.places} == {"East", "West"}
    tiles = [place.tile.path for place in raw.places]
    assert len(tiles) == len(set(tiles))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no GeoJSON"),
        ("[]", "no GeoJSON"),
        ('{"type": "FeatureCollection", "features": []}', "empty"),
        ('{"type": "Point", "coordinates": [1, 2]}', "Point"),
        ('{"type": "Feature", "geometry": null}', "feature 0"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [600000, 0], [600000, 5], [0, 0]]]}', "degrees"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]]}', "Self-intersection"),
        ('{"type": "Polygon", "crs": {"properties": {"name": "EPSG:25832"}}, "coordinates": []}', "EPSG:25832"),
        ('{"type": "Polygon", "crs": "EPSG:25832", "coordinates": []}', "EPSG:25832"),
        ('{"type": "Polygon", "crs": {"properties": "EPSG:25832"}, "coordinates": []}', "EPSG:25832"),
        ('{"type": "Polygon", "crs": "EPSG:4326", "coordinates": []}', "without area"),
        ('{"type": "FeatureCollection", "features": null}', "empty"),
        ('{"type": "FeatureCollection", "features": {"a": 1}}', "no list"),
        ('{"type": "FeatureCollection", "features": [null]}', "feature 0"),
        (f'{{"type": "Feature", "properties": ["x"], "geometry": {SQUARE}}}', "feature 0: its properties"),
        (f'{{"type": "Feature", "properties": "x", "geometry": {SQUARE}}}', "feature 0: its properties"),
        (f'{{"type": "Polygon", "coordinates": {"[" * 50_000}{"]" * 50_000}}}', "no GeoJSON"),
        (f'{{"type": "Polygon", "coordinates": {"[" * 900}{"]" * 900}}}', "feature 0"),
    ],
)
def test_regions_that_are_none_are_told_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "r.geojson").write_text(content)
    with pytest.raises(BadInput, match=said) as error:
        read_shapes(tmp_path / "r.geojson")
    assert "r.geojson" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(MissingRaw, match="nowhere"):
        read_shapes(tmp_path / "nowhere.geojson")
