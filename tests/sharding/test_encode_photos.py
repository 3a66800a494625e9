"""Photos are stored upright as Pillow would turn them, and panoramas with north in the middle."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from geostream.images import decode_png
from sharding.encode import BrokenImage, encode, encode_photo


def turned(orientation: int, kind: str) -> bytes:
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    large = Image.fromarray(picture).resize((96, 64), Image.Resampling.BICUBIC)
    large.save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_as_pillow_turns_it(orientation: int, kind: str) -> None:
    raw = turned(orientation, kind)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    stored = pixels(encode_photo(raw, None, 95, None).data)
    assert stored.shape[:2] == upright.size[::-1]
    assert np.abs(stored - np.asarray(upright.convert("RGB"))).mean() < 6


def test_an_upright_photo_keeps_its_bytes_as_any_image_does() -> None:
    raw = turned(1, "JPEG")
    assert encode_photo(raw, None, 90, None).data == raw == encode(raw, (64, 96), 90).data
    assert encode_photo(raw, (64, 96), 90, 0.0).data == raw


@pytest.mark.parametrize("heading", [90.0, 180.0, 270.0])
def test_north_is_moved_to_the_middle(heading: float) -> None:
    buffer = io.BytesIO()
    picture = np.zeros((16, 32, 3), np.uint8)
    north = round((0.5 - heading / 360) * 32) % 32  # where a middle that looks to the heading has north
    picture[:, north] = 255
    Image.fromarray(picture).save(buffer, "PNG")
    stored = pixels(encode_photo(buffer.getvalue(), None, 95, heading).data)
    assert stored[..., 0].mean(axis=0).argmax() == 16
    assert decode_png(buffer.getvalue())[0, north, 0] == 255


def test_a_broken_photo_is_told() -> None:
    for raw in (b"", b"\xff\xd8nothing", turned(6, "JPEG")[:300]):
        with pytest.raises(BrokenImage):
            encode_photo(raw, (8, 8), 90, 12.0)
