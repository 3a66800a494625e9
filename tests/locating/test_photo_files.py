"""Photos of all kinds are read, upright and in RGB; what is no photo is refused in one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from geostream.errors import BadInput
from geostream.locating.photos import field_of_view, read_photo, taken_at

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(pixel: Any, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(np.array(pixel, dtype=int) - colour).max() < 40)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP")]
)
def test_every_kind_of_picture_becomes_rgb(mode: str, kind: str) -> None:
    image = read_photo(saved(picture().convert(mode), kind))
    assert image.mode == "RGB" and image.size == (40, 20)
    if mode != "L":
        assert near(image.getpixel((5, 10)), RED) and near(image.getpixel((35, 10)), BLUE)


def test_of_16_bits_the_upper_eight_are_kept() -> None:
    values = np.full((4, 4), 0x80FF, dtype=np.uint16)
    image = read_photo(saved(Image.fromarray(values), "PNG"))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (128, 128, 128)


def test_a_photo_is_turned_as_its_camera_was_held() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera's top was on the right
    image = read_photo(saved(picture(), "JPEG", exif=exif, quality=95))
    assert image.size == (20, 40)
    assert near(image.getpixel((10, 5)), RED) and near(image.getpixel((10, 35)), BLUE)


def test_exif_says_where_and_how_wide() -> None:
    exif = Image.Exif()
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLatitude] = "S", (33.0, 52.0, 10.5)
    gps[ExifTags.GPS.GPSLongitudeRef], gps[ExifTags.GPS.GPSLongitude] = "E", (151.0, 12.0, 30.0)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 18
    image = read_photo(saved(picture(), "JPEG", exif=exif))
    assert taken_at(image) == pytest.approx((-(33 + 52 / 60 + 10.5 / 3600), 151 + 12.5 / 60))
    assert field_of_view(image) == pytest.approx(90)
    upright = read_photo(saved(picture(20, 40), "JPEG", exif=exif))
    assert field_of_view(upright) == pytest.approx(67.38, abs=0.01), "the film's short side"
    assert taken_at(picture()) is None and field_of_view(picture()) is None


@pytest.mark.parametrize("latitude", [(95.0, 0.0, 0.0), (0.0, 0.0)])
def test_coordinates_that_cannot_be_are_none(latitude: tuple[float, ...]) -> None:
    exif = Image.Exif()
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLatitude] = "N", latitude
    gps[ExifTags.GPS.GPSLongitudeRef], gps[ExifTags.GPS.GPSLongitude] = "E", (0.0, 0.0, 0.0)
    assert taken_at(read_photo(saved(picture(), "JPEG", exif=exif))) is None


def placed(latitude: Any, north: Any, longitude: Any, east: Any) -> bytes:
    exif = Image.Exif()
    tags = (north, latitude, east, longitude)
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps.update({number: value for number, value in enumerate(tags, start=1) if value is not None})
    return saved(picture(), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("north", "east", "expected"),
    [
        ("N", "W", (36.5, -79.75)),
        (" s ", " W", (-36.5, -79.75)),
        ("North", "East", (36.5, 79.75)),
        (None, "W", None),
        ("N", None, None),
        ("", "W", None),
        ("N", "?", None),
        ("E", "N", None),
    ],
)
def test_a_position_needs_both_sides(north: str | None, east: str | None, expected: tuple[float, float] | None) -> None:
    found = taken_at(read_photo(placed((36.0, 30.0, 0.0), north, (79.0, 45.0, 0.0), east)))
    assert found == (None if expected is None else pytest.approx(expected))


def test_zeros_are_no_position_but_the_equator_is() -> None:
    zero, some = (0.0, 0.0, 0.0), (9.0, 0.0, 0.0)
    assert taken_at(read_photo(placed(zero, "N", zero, "E"))) is None
    assert taken_at(read_photo(placed(zero, "N", some, "E"))) == (0, 9)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged tags
def test_damaged_exif_data_refuse_no_photo() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[1], gps[2], gps[3], gps[4] = "S", (33.0, 52.0, 10.5), "E", (151.0, 12.0, 30.0)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 18
    whole = saved(picture(), "JPEG", exif=exif)
    start, size = whole.index(b"Exif"), len(exif.tobytes())
    for at in range(start, start + size):
        for value in (0x00, 0x03, 0xFF):
            image = read_photo(whole[:at] + bytes([value]) + whole[at + 1 :])
            assert image.size in ((40, 20), (20, 40))
            position, degrees = taken_at(image), field_of_view(image)
            assert position is None or abs(position[0]) <= 90
            assert degrees is None or 0 < degrees < 180


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((4, 4), 0.5, np.float32), "floating-point"),
        (np.full((4, 4), 70_000, np.int32), "16 bits"),
        (np.full((4, 4), -1, np.int32), "16 bits"),
    ],
)
def test_values_of_no_known_range_are_refused(values: Any, reason: str) -> None:
    with pytest.raises(BadInput, match=f"photo: .*{reason}"):
        read_photo(saved(Image.fromarray(values), "TIFF"))


def animation() -> bytes:
    return saved(picture(), "GIF", save_all=True, append_images=[picture(40, 20).rotate(180)])


BAD = {
    "empty": (b"", "empty"),
    "text": (b"no image at all, but some text", "not an image"),
    "cut": (saved(picture(400, 200), "JPEG")[:900], "cannot be read"),
    "cut png": (saved(picture(400, 200), "PNG")[:120], "cannot be read"),
    "animated": (animation(), "animated"),
    "pages": (saved(picture(), "TIFF", save_all=True, append_images=[picture()]), "several pages"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_photo_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    data, reason = BAD[kind]
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=f"holiday.jpg: .*{reason}") as caught:
        read_photo(path)
    assert "\n" not in str(caught.value)


def test_a_huge_picture_is_refused_before_it_is_decoded() -> None:
    bomb = saved(Image.new("1", (12_000, 12_000)), "PNG")  # some kB that would decode to 432 MB
    with pytest.raises(BadInput, match=r"photo: .*pixels"):
        read_photo(bomb)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jpg", tmp_path):
        with pytest.raises(BadInput, match=str(path)):
            read_photo(path)
