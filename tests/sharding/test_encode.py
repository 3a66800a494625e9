from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from sharding.encode import BrokenImage, encode
from tests.vigor_raw import jpeg, picture, png

RNG = np.random.default_rng(0)


def pil_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def size_of(data: bytes) -> tuple[int, int]:
    return simplejpeg.decode_jpeg_header(data)[:2]


def test_original_keeps_the_bytes() -> None:
    for raw, suffix in ((jpeg(RNG, (20, 30)), "jpg"), (png(RNG, (20, 30)), "png")):
        stored = encode(raw, None, 90)
        assert (stored.data, stored.suffix, stored.enlarged) == (raw, suffix, False)


def test_a_jpeg_of_the_right_size_keeps_its_bytes_and_a_png_becomes_a_jpeg() -> None:
    raw = jpeg(RNG, (20, 30))
    assert encode(raw, (20, 30), 90).data == raw
    stored = encode(png(RNG, (20, 30)), (20, 30), 90)
    assert stored.suffix == "jpg" and size_of(stored.data) == (20, 30)


def test_the_documented_resize() -> None:
    pixels = picture(RNG, (640, 640))
    stored = encode(pil_bytes(Image.fromarray(pixels), "PNG"), (384, 384), 90)
    resized = Image.fromarray(pixels).resize((384, 384), Image.Resampling.LANCZOS)
    want = simplejpeg.encode_jpeg(np.asarray(resized), 90, colorspace="RGB", colorsubsampling="420", fastdct=False)
    assert stored.data == want and not stored.enlarged


def test_a_large_reduction_is_close_to_lanczos_alone() -> None:
    raw = jpeg(RNG, (1024, 2048))
    stored = encode(raw, (384, 768), 100)
    whole = Image.fromarray(simplejpeg.decode_jpeg(raw)).resize((768, 384), Image.Resampling.LANCZOS)
    error = np.asarray(whole, dtype=float) - simplejpeg.decode_jpeg(stored.data)
    assert np.sqrt((error**2).mean()) < 2


def test_enlarging_is_told() -> None:
    stored = encode(jpeg(RNG, (16, 64)), (32, 32), 90)
    assert size_of(stored.data) == (32, 32) and stored.enlarged


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_png_of_any_colour(mode: str) -> None:
    raw = pil_bytes(Image.fromarray(picture(RNG, (20, 20))).convert(mode), "PNG")
    assert size_of(encode(raw, (10, 10), 90).data) == (10, 10)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_any_colour(mode: str) -> None:
    raw = pil_bytes(Image.fromarray(picture(RNG, (20, 20))).convert(mode), "JPEG")
    assert size_of(encode(raw, (10, 10), 90).data) == (10, 10)


@pytest.mark.parametrize("lost", [1, 2, 100, 1000])
@pytest.mark.parametrize("size", [None, (50, 50), (64, 64)])
def test_a_truncated_jpeg_is_broken(lost: int, size: tuple[int, int] | None) -> None:
    raw = simplejpeg.encode_jpeg(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    encode(raw, size, 90)
    with pytest.raises(BrokenImage, match="broken JPEG: Premature end"):
        encode(raw[:-lost], size, 90)


@pytest.mark.parametrize("lost", [8, 14, 100, 1000])
@pytest.mark.parametrize("size", [None, (50, 50)])
def test_a_truncated_png_is_broken(lost: int, size: tuple[int, int] | None) -> None:
    raw = pil_bytes(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")
    encode(raw, size, 90)
    with pytest.raises(BrokenImage, match="broken PNG"):
        encode(raw[:-lost], size, 90)


def test_a_flipped_bit_in_a_png_is_broken() -> None:
    raw = bytearray(png(RNG, (64, 64)))
    raw[len(raw) // 2] ^= 1
    with pytest.raises(BrokenImage, match="broken PNG"):
        encode(bytes(raw), None, 90)


@pytest.mark.parametrize(
    "raw", [b"", b"<html>not found</html>", pil_bytes(Image.new("RGB", (4, 4)), "GIF"), b"\xff\xd8"]
)
def test_what_is_no_image(raw: bytes) -> None:
    with pytest.raises(BrokenImage, match="empty file|neither JPEG nor PNG|broken JPEG"):
        encode(raw, (10, 10), 90)
