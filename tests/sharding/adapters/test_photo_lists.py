"""Photos are found with where they were taken, by EXIF and by tables as people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from PIL import ExifTags, Image

from geostream.errors import BadInput
from sharding.adapters.photo_lists import Found, find_photos
from tests.sharding.tiles.pictures import photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "walk").mkdir(parents=True)
    (root / "walk" / "a.jpg").write_bytes(photo(47.07, 15.43, heading=90))
    (root / "walk" / "b.jpg").write_bytes(photo(47.08, 15.44))
    return root


def listed(folder: Path, *lines: str, end: str = "\n") -> Found:
    (folder / "spots.csv").write_bytes(end.join(lines).encode())
    return find_photos(folder, folder / "spots.csv")


def test_north_is_a_heading_and_a_blank_is_none(folder: Path) -> None:
    for number, (heading, expected) in enumerate(
        ((0, 0.0), (0.0, 0.0), (-10, 350.0), (float("nan"), 90.0), (None, 90.0))
    ):
        row = {"file": "walk/a.jpg", "lat": 47.0, "lon": 15.0, "heading": heading}
        pq.write_table(pa.Table.from_pylist([row]), folder / "spots.parquet")
        (folder / "spots.geojson").write_text(json.dumps({"features": [{"properties": row}]}))
        (folder / "spots.csv").write_text(f"file,lat,lon,heading\nwalk/a.jpg,47,15,{'' if number > 2 else heading}")
        for kind in ("parquet", "geojson", "csv"):
            [spot] = find_photos(folder, folder / f"spots.{kind}").spots
            assert spot.heading == expected, kind  # a photo's own heading, 90, where the table has none


def test_the_points_of_geoparquet_are_taken_by_their_own_name(folder: Path) -> None:
    for system, code in (("OGC", "CRS84"), ("EPSG", 32633)):
        crs = {"id": {"authority": system, "code": code}}
        said = {"primary_column": "where", "columns": {"where": {"encoding": "WKB", "crs": crs}}}
        rows = pa.Table.from_pylist([{"file": "walk/a.jpg", "where": shapely.Point(15.0, 47.0).wkb}])
        pq.write_table(rows.replace_schema_metadata({"geo": json.dumps(said)}), folder / "spots.geoparquet")
        if system == "OGC":
            [spot] = find_photos(folder, folder / "spots.geoparquet").spots
            assert (spot.latitude, spot.longitude) == (47, 15)
    with pytest.raises(BadInput, match="EPSG:32633, not in degrees"):
        find_photos(folder, folder / "spots.geoparquet")


def test_zeros_are_no_position(folder: Path) -> None:
    found = listed(folder, "file,lat,lon", "walk/a.jpg,0,0.0", "walk/b.jpg,0,15")
    assert [spot.image.path for spot in found.spots] == ["walk/b.jpg"]
    assert [(one.path, one.named) for one in found.without] == [("walk/a.jpg", "spots.csv:2")]


def test_what_one_row_leaves_blank_another_may_say(folder: Path) -> None:
    for lines in (("walk/a.jpg,,,", "walk/a.jpg,36.7,-79.9,5"), ("walk/a.jpg,36.7,-79.9,", "./walk/a.jpg,,,5")):
        [spot] = listed(folder, "file,lat,lon,heading", *lines).spots
        assert (spot.latitude, spot.longitude, spot.heading) == (36.7, -79.9, 5)
    with pytest.raises(BadInput, match=r"spots\.csv:3: .*contradicts"):
        listed(folder, "file,lat,lon,heading", "walk/a.jpg,36.7,-79.9,5", "walk/a.jpg,,,6")


def test_tables_as_people_write_them(folder: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        found = listed(folder, "File,Latitude,LNG,colour", '"walk/a.jpg" ,36.7 ,-79.9,red', end=end)
        assert [(spot.latitude, spot.longitude) for spot in found.spots] == [(36.7, -79.9)]
        assert found.notes == ("columns not used: colour",)
    with pytest.raises(BadInput, match="semicolons"):
        listed(folder, "file;lat;lon", "walk/a.jpg;36,7;-79,9")
    with pytest.raises(BadInput, match="lat is there twice"):
        listed(folder, "file,lat,lon,lat", "walk/a.jpg,1,2,3")


def test_a_link_to_its_own_folder_is_followed_once(folder: Path) -> None:
    (folder / "again").symlink_to(".")
    (folder / "a link before its target").symlink_to("walk")
    (folder / "walk" / "up").symlink_to("..")
    (folder / "itself").symlink_to("itself")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "c.jpg").write_bytes(photo(47.07, 15.43))
    (folder / "linked").symlink_to(outside)
    paths = [spot.image.path for spot in find_photos(folder, None).spots]
    assert paths == ["linked/c.jpg", "walk/a.jpg", "walk/b.jpg"]


def test_pictures_that_are_not_read_are_named(folder: Path) -> None:
    assert find_photos(folder, None).notes == ()
    (folder / "imagery").mkdir()
    for name in ("one.HEIC", "two.heic", "walk/three.webp", "imagery/land.tif", "notes.txt"):
        (folder / name).write_bytes(b"")
    [note] = find_photos(folder, None, folder / "imagery").notes
    assert "3 pictures" in note and "(heic, webp; one.HEIC" in note and "JPEG" in note
    for path in folder.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(BadInput, match=r"no photo.*3 pictures.*heic"):
        find_photos(folder, None, folder / "imagery")


def test_exif_without_sides_is_no_position_and_damaged_exif_hides_no_panorama(folder: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({2: (47.0, 0.0, 0.0), 4: (15.0, 0.0, 0.0)})
    Image.new("RGB", (40, 20)).save(folder / "bare.jpg", exif=exif)
    whole = (folder / "walk" / "a.jpg").read_bytes()
    (folder / "damaged.jpg").write_bytes(whole.replace(b"Exif\0\0", b"Exif\0\0\xff\xff", 1)[: len(whole)])
    assert [one.path for one in find_photos(folder, None).without] == ["bare.jpg", "damaged.jpg"]
    spots = listed(folder, "file,lat,lon", "damaged.jpg,47,15").spots
    assert spots[0].is_panorama and spots[0].heading is None
