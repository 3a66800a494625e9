"""The commands index, locate and export, as a person types them, on a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from geostream.cli.main import app
from geostream.store import Store
from sharding.index_cli import index
from tests.command import geostream, refused, said
from tests.helpers import tiny_places, write_layout
from tests.runs.small_runs import run_with_checkpoint


@pytest.fixture(autouse=True)
def with_index_command() -> None:
    """The command, also where the package was installed before it had the entry point."""
    if not any(command.name == "index" for command in app.registered_commands):
        app.command("index")(index)


def photo(folder: Path, name: str, data: bytes, at: tuple[float, float] | None = None) -> str:
    path = folder / name
    path.write_bytes(data)
    if at is not None:
        exif = Image.Exif()
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        for degrees, letters, ref, value in (
            (at[0], "NS", ExifTags.GPS.GPSLatitudeRef, ExifTags.GPS.GPSLatitude),
            (at[1], "EW", ExifTags.GPS.GPSLongitudeRef, ExifTags.GPS.GPSLongitude),
        ):
            gps[ref], gps[value] = letters[degrees < 0], (abs(degrees), 0.0, 0.0)
        with Image.open(path) as image:
            image.save(path, exif=exif, quality=95)
    return str(path)


def test_index_and_locate(s3_store: Store, tmp_path: Path) -> None:
    places = tiny_places()
    layout = write_layout(s3_store, places)
    run_with_checkpoint(s3_store, layout, "run")
    assert "no model was promoted" in refused("index", s3_store.url)
    assert "no index yet" in refused("locate", str(tmp_path), "--store", s3_store.url)
    assert "18 tiles" in said("index", s3_store.url, "--run", "run")
    assert "Was there already" in said("index", s3_store.url, "--run", "run")
    images = [place.images["view-00.jpg"] for place in places[:2]]
    good = photo(tmp_path, "good.jpg", images[0], (40.0, -74.0))
    assert "geostream index --tta" in refused("locate", good, "--store", s3_store.url, "--tta")
    other = photo(tmp_path, "other.jpg", images[1])
    out = tmp_path / "answers.geojson"
    table = said("locate", good, other, "--store", s3_store.url, "--geojson", str(out))
    assert "good.jpg" in table and "not sure" in table and "No answer is called sure" in table
    found = json.loads(out.read_text())
    assert found["type"] == "FeatureCollection" and len(found["features"]) == 11
    first, truth = found["features"][0], found["features"][5]
    assert first["geometry"]["type"] == "Point" and first["properties"]["rank"] == 1
    place = places[first["properties"]["place"]]
    assert first["geometry"]["coordinates"] == [place.position[1], place.position[0]]
    assert truth["properties"]["kind"] == "truth" and truth["geometry"]["coordinates"] == pytest.approx([-74.0, 40.0])
    assert first["properties"]["error_metres"] == pytest.approx((place.position[0] - 40) * 111_195, abs=1), (
        "from the photo's EXIF data to the centre of the best tile"
    )
    assert found["features"][-1]["properties"]["error_metres"] is None
    assert json.loads(said("locate", other, "--store", s3_store.url, "--geojson", "-", "--best", "2"))["features"][1]
    assert "no model was promoted" in refused("locate", other, "--store", s3_store.url, "--model", "current")


def test_bad_photos_are_told_and_the_others_answered(s3_store: Store, tmp_path: Path) -> None:
    places = tiny_places()
    run_with_checkpoint(s3_store, write_layout(s3_store, places), "run")
    said("index", s3_store.url, "--run", "run")
    good = photo(tmp_path, "good.jpg", places[0].images["view-00.jpg"])
    bad = [photo(tmp_path, name, data) for name, data in (("empty.jpg", b""), ("text.jpg", b"some text, no picture"))]
    done = geostream("locate", bad[0], good, bad[1], str(tmp_path / "gone.jpg"), "--store", s3_store.url)
    assert done.returncode == 1 and "good.jpg" in done.stdout
    empty, text, gone, last = done.stderr.strip().splitlines()
    assert "empty.jpg" in empty and "text.jpg" in text and "gone.jpg" in gone and "3 of 4 photos" in last
    nowhere = str(tmp_path / "no" / "answers.json")
    assert "--geojson" in refused("locate", good, "--store", s3_store.url, "--geojson", nowhere)


@pytest.mark.slow  # torch's exporter takes seconds
def test_export(s3_store: Store, tmp_path: Path) -> None:
    run_with_checkpoint(s3_store, write_layout(s3_store, tiny_places()), "run")
    table = said("export", s3_store.url, str(tmp_path / "model"), "--run", "run")
    assert "view.onnx: differs from torch by at most" in table
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tile.onnx",
        "view.onnx",
    ]
    assert "is there already" in refused("export", s3_store.url, str(tmp_path / "model"), "--run", "run")
