"""Tiles from real GeoTIFFs: right to the pixel in any coordinate system, across files, with holes, damaged ones."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from geostream.errors import BadInput, Unanswered
from sharding.places import Uncovered
from sharding.tiles.geotiff import Rasters, inside, open_rasters
from sharding.tiles.grid import Grid
from sharding.tiles.source import facts_of, open_source
from tests.sharding.tiles.pictures import LAND, SIDE, SOUTH, WEST, expected, write_geotiff

BOX = tuple(Grid(60.0).boxes(np.array([[SOUTH + SIDE / 2, WEST + SIDE / 2]]))[0].tolist())


def opened(*paths: Path) -> Rasters:
    return open_rasters([str(path) for path in paths], facts_of("land"))


def read(source: Rasters, box: Any = BOX, size: int = 64) -> np.ndarray:
    return source.window(box).imagery.read(box, size, size)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:32633", "EPSG:31256"])
def test_a_tile_shows_what_lies_there_in_any_coordinate_system(tmp_path: Path, crs: str) -> None:
    source = opened(write_geotiff(tmp_path / "land.tif", crs=crs))
    off = read(source).astype(int) - expected(BOX, 64)
    # A pixel of the tile is 0.9 m: a shift by half of one changes green by 0.26, and blue by up to 9.
    assert np.abs(off).mean() < 1.5 and np.abs(off[..., :2]).max() <= 3
    shrink = math.cos(math.radians(SOUTH)) if crs == "EPSG:3857" else 1.0  # a metre there is less on the ground
    assert source.window(BOX).pixels == pytest.approx(60 / 0.6 / shrink, rel=0.1)


def test_tiles_across_files_have_no_seam(tmp_path: Path) -> None:
    middle_lon, middle_lat = WEST + SIDE / 2 + 1e-6, SOUTH + SIDE / 2 + 2e-6
    west, south, east, north = LAND
    quarters = [(west, south, middle_lon, middle_lat), (middle_lon, south, east, middle_lat)]
    quarters += [(west, middle_lat, middle_lon, north), (middle_lon, middle_lat, east, north)]
    parts = [write_geotiff(tmp_path / f"{n}.tif", box, crs="EPSG:3857") for n, box in enumerate(quarters)]
    source = opened(*parts)
    assert len(source.window(BOX).imagery.paths) == 4  # type: ignore[attr-defined]
    off = np.abs(read(source).astype(int) - expected(BOX, 64))
    assert off.mean() < 2 and off[..., :2].max() <= 4


def test_the_first_file_has_precedence(tmp_path: Path) -> None:
    dark = write_geotiff(tmp_path / "dark.tif", crs="EPSG:3857", picture=np.zeros((3, 5000, 5000), np.uint8), metres=2)
    light = write_geotiff(tmp_path / "light.tif", crs="EPSG:3857", metres=2)
    assert read(opened(dark, light)).max() == 0 and read(opened(light, dark)).max() > 100


def test_a_coarser_tile_is_the_mean_of_its_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write_geotiff(tmp_path / "noise.tif", crs="EPSG:3857", picture=rng.integers(0, 256, (3, 736, 742), np.uint8))
    pixels = read(opened(path), size=8).astype(float)
    assert abs(pixels.mean() - 127.5) < 5 and pixels.std() < 20  # nearest neighbours would have 74


def test_grey_becomes_rgb_and_a_fourth_band_is_not_a_colour(tmp_path: Path) -> None:
    grey = read(opened(write_geotiff(tmp_path / "grey.tif", count=1)))
    assert (grey[..., 0] == grey[..., 2]).all() and grey.shape == (64, 64, 3)
    bands = np.concatenate([np.full((3, 900, 700), 100, np.uint8), np.full((1, 900, 700), 7, np.uint8)])
    path = write_geotiff(tmp_path / "nir.tif", count=4, picture=bands, photometric="rgb", alpha="unspecified")
    assert (read(opened(path)) == 100).all()


@pytest.mark.parametrize("how", ["nodata", "alpha"])
def test_holes_in_the_imagery_are_told(tmp_path: Path, how: str) -> None:
    bands = np.full((4, 800, 700), 90, np.uint8)
    bands[3] = 255
    bands[:, 200:600, 330:] = 0
    options: dict[str, Any] = {"count": 4, "photometric": "rgb", "alpha": "yes"} if how == "alpha" else {"nodata": 0}
    source = opened(write_geotiff(tmp_path / "hole.tif", picture=bands, **options))
    with pytest.raises(Uncovered, match=r"\d+% .*hole.tif"):
        read(source)


def test_a_stamp_changes_with_the_file_and_only_where_it_lies(tmp_path: Path) -> None:
    west, south, east, north = LAND
    near = write_geotiff(tmp_path / "near.tif", (west, south, east, north))
    far = write_geotiff(tmp_path / "far.tif", (east + 0.01, south, east + 0.012, north), metres=2)
    before = opened(near, far).window(BOX)
    assert opened(near, far).window(BOX) == before
    write_geotiff(far, (east + 0.01, south, east + 0.013, north), metres=2)
    assert opened(near, far).window(BOX) == before
    write_geotiff(near, (west, south, east, north), metres=0.7)
    assert opened(near, far).window(BOX).stamp != before.stamp
    assert pickle.loads(pickle.dumps(before)) == before  # it is sent to worker processes  # noqa: S301


def test_a_file_that_goes_away_ends_the_run_in_one_line(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "gone.tif")
    window = opened(path).window(BOX)
    path.unlink()
    with pytest.raises(Unanswered, match="gone.tif.*run again") as error:
        window.imagery.read(BOX, 8, 8)
    assert "\n" not in str(error.value)


def test_what_no_tiles_can_be_cut_from_is_refused(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "bare.tif", metres=20)
    cut = (tmp_path / "cut.tif").write_bytes((tmp_path / "bare.tif").read_bytes()[:100])
    assert cut == 100
    write_geotiff(tmp_path / "deep.tif", dtype="uint16", metres=20)
    write_geotiff(tmp_path / "metres.tif", crs="EPSG:32633", metres=20)
    with rasterio.open(tmp_path / "metres.tif", "r+") as raster:
        raster.crs = "EPSG:4326"
    with (
        rasterio.open(tmp_path / "bare.tif") as raster,
        rasterio.open(tmp_path / "lost.tif", "w", **{**raster.profile, "crs": None}) as bare,
    ):
        bare.write(raster.read())
    for name, said in (
        ("cut", "cut.tif"),
        ("lost", "no coordinate system"),
        ("deep", "uint16.*Byte"),
        ("metres", "not on Earth.*a_srs"),
    ):
        with pytest.raises(BadInput, match=said) as error:
            opened(tmp_path / f"{name}.tif")
        assert "\n" not in str(error.value)
    (tmp_path / "text.tif").write_text("no raster")
    (tmp_path / "empty").mkdir()
    for source, said in (
        (tmp_path / "text.tif", "text.tif"),
        (tmp_path / "empty", "no GeoTIFF"),
        (tmp_path / "x", "{z}"),
    ):
        with pytest.raises(BadInput, match=said):
            open_source(str(source), LAND, 60.0, tmp_path)


def test_a_raster_across_the_180th_meridian_is_refused_and_one_of_the_whole_earth_is_not(tmp_path: Path) -> None:
    def written(name: str, crs: str, corner: tuple[float, float], each: float, size: tuple[int, int]) -> Path:
        at = rasterio.transform.from_origin(*corner, each, each)
        options: dict[str, Any] = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": crs, "transform": at}
        with rasterio.open(tmp_path / name, "w", width=size[0], height=size[1], **options) as raster:
            raster.write(np.ones((3, size[1], size[0]), np.uint8))
        return tmp_path / name

    for path in (
        written("utm.tif", "EPSG:32660", (820_000, 1_500_000), 1000, (64, 64)),
        written("degrees.tif", "EPSG:4326", (179, 10), 0.1, (64, 64)),
    ):
        with pytest.raises(BadInput, match=f"{path.name}.*180th meridian") as error:
            opened(path)
        assert "\n" not in str(error.value)
    assert opened(written("earth.tif", "EPSG:4326", (-180, 80), 5, (72, 32))).footprint().area == pytest.approx(
        360 * 160
    )


@pytest.mark.parametrize(
    ("crs", "said"), [('LOCAL_CS["site",UNIT["metre",1]]', "local"), ("IAU_2015:49900", "no raster that can be read")]
)
def test_a_raster_that_lies_nowhere_on_earth_is_refused(tmp_path: Path, crs: str, said: str) -> None:
    path = write_geotiff(tmp_path / "bare.tif", metres=20)
    with (
        rasterio.open(path) as raster,
        rasterio.open(tmp_path / "away.tif", "w", **{**raster.profile, "crs": crs}) as away,
    ):
        away.write(raster.read())
    with pytest.raises(BadInput, match=f"away.tif.*{said}") as error:
        opened(tmp_path / "away.tif")
    assert "\n" not in str(error.value)


def test_leftovers_in_a_folder_of_imagery_are_skipped(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "land.tif", metres=20)
    (tmp_path / "._land.tif").write_bytes(b"Mac OS X")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "old.tif").write_bytes(b"old")
    source = open_source(str(tmp_path), LAND, 60.0, tmp_path)
    assert isinstance(source, Rasters) and [Path(one.path).name for one in source.files] == ["land.tif"]


def test_a_window_is_cut_at_whole_pixels_of_the_picture() -> None:
    assert inside(0.0, 100.0, 10, 100) == (slice(0, 10), 0.0, 100.0)
    assert inside(-25.0, 100.0, 10, 100) == (slice(3, 10), 5.0, 70.0)
    assert inside(55.0, 100.0, 10, 100) == (slice(0, 4), 55.0, 40.0)
    assert inside(200.0, 100.0, 10, 100)[0] == slice(0, 0)
