"""A rendered city as a person's own imagery and photos, from the folder to a committed layout by the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import ExifTags, Image, ImageOps
from typer import Typer
from typer.testing import CliRunner

from geostream.errors import BadInput
from geostream.layout import open_layout
from geostream.store import Store
from sharding.cli import shard
from sharding.simcity import CitySpec, render_cities
from sharding.simcity.geotiff import SQUARE, sexagesimal
from sharding.simcity.shots import TILE_METRES
from tests.vigor_raw import write_city

CITY = CitySpec("Graz", 6, 6)


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("city") / "raw"
    render_cities(raw, [CITY], seed=0, adapter="photos", tile_size=32, view_size=(32, 64), workers=1)
    return raw


def run(*words: object) -> str:
    app = Typer()
    app.command()(shard)
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_files_say_where_they_lie(city: Path) -> None:
    tiffs = sorted((city / "imagery").glob("Graz-*.tif"))
    with rasterio.open(tiffs[0]) as raster:
        corner = CITY.degrees(-TILE_METRES, SQUARE - TILE_METRES)
        assert (raster.bounds.top, raster.bounds.left) == pytest.approx(corner)
        assert raster.crs.to_epsg() == 4326 and raster.dtypes == ("uint8",) * 3
    lying = 0
    for path in (city / "photos").rglob("*.jpg"):
        with Image.open(path) as photo:
            exif = photo.getexif()
            gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
            latitude = sum(float(part) / 60**n for n, part in enumerate(gps[ExifTags.GPS.GPSLatitude]))
            assert 0 <= CITY.metres(latitude, CITY.origin[1])[1] <= CITY.extent[1]
            assert ImageOps.exif_transpose(photo).size == (64, 32)
            lying += exif.get(ExifTags.Base.Orientation) == 8
    assert lying > 0


def test_from_a_folder_to_a_layout_by_the_command(city: Path, tmp_path: Path) -> None:
    sizes = ["--tile-size", "32x32", "--view-size", "32x64", "--shard-mib", "0.1", "--workers", "1"]
    how = ["photos", city, tmp_path / "store", "--metres", "30", "--block-metres", "90", "--test-share", "0.34"]
    how += sizes
    terms = ["--licence", "CC0-1.0", "--attribution", "The city of Graz"]
    seen = run(*how, *terms, "--dry-run")
    assert "latlon" in seen and "Nothing was written" in seen
    assert "Committed" in run(*how, *terms)
    layout = open_layout(Store.open(tmp_path / "store"))
    assert layout.dataset == "photos" and layout.tile_metres == 30.0
    assert layout.source == {
        "name": "imagery", "licence": "CC0-1.0", "attribution": "The city of Graz", "url": None
    }  # fmt: skip
    assert len(layout.pairs("train").place) > 3 and len(layout.pairs("test").place) > 1
    assert "Nothing has changed" in run(*how[:-6], *terms)  # sizes as stored
    for name in ("NewYork", "Chicago", "SanFrancisco"):
        write_city(tmp_path / "vigor", name)
    with pytest.raises(BadInput, match="--licence"):
        run("vigor", tmp_path / "vigor", tmp_path / "store", "--licence", "X", "--train-cities", "NewYork")
    gallery = ["tiles", city / "imagery", tmp_path / "store", "--region", city / "region.geojson", "--metres", "35"]
    assert "Committed" in run(*gallery, "--dataset", "graz", *sizes[:2], *sizes[4:])
    assert open_layout(Store.open(tmp_path / "store"), "graz").info["pairs"] == {}
    for words, said in ((["--protocol", "val"], "protocol"), (["--table", "x.csv"], "table")):
        with pytest.raises(BadInput, match=said):
            run(*gallery, *words)
    with pytest.raises(BadInput, match="--region"):
        run("tiles", city / "imagery", tmp_path / "store")


@pytest.mark.parametrize("degrees", [0.0, 47.0707, 15.9999999, 179.123456])
def test_degrees_minutes_seconds_are_exact_to_millimetres(degrees: float) -> None:
    parts = [float(part) for part in sexagesimal(degrees)]
    assert parts[0] + parts[1] / 60 + parts[2] / 3600 == pytest.approx(degrees, abs=2e-8)
    assert 0 <= parts[1] < 60 and 0 <= parts[2] < 60 and np.isfinite(parts).all()
