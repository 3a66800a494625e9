from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from cykooz_resizer import CpuExtensions, ImageData, PixelType, Resizer
from PIL import Image

from sharding.encode import LANCZOS, BrokenImage, encode
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


def photograph(height: int, width: int) -> np.ndarray:
    """As hard to resize as a picture gets: shapes, and detail down to single pixels."""
    noise = np.random.default_rng(7).normal(0, 12, (height, width, 3))
    return np.clip(picture(RNG, (height, width)) + noise, 0, 255).astype(np.uint8)


def stored_by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    resized = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS)
    data = simplejpeg.encode_jpeg(np.asarray(resized), 100, colorspace="RGB", colorsubsampling="420", fastdct=False)
    return simplejpeg.decode_jpeg(data)


@pytest.mark.parametrize(
    ("of", "size"),
    [((640, 640), (384, 384)), ((512, 1024), (192, 384)), ((224, 1232), (140, 768)), ((100, 300), (150, 200))],
)
def test_the_resize_is_lanczos(of: tuple[int, int], size: tuple[int, int]) -> None:
    pixels = photograph(*of)
    stored = encode(pil_bytes(Image.fromarray(pixels), "PNG", compress_level=1), size, 100)
    error = stored_by_pillow(pixels, size).astype(float) - simplejpeg.decode_jpeg(stored.data)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 44


def test_the_resize_is_the_same_on_any_processor() -> None:
    """What fast_image_resize makes with and without a processor's extensions."""
    pixels, made = photograph(256, 512).tobytes(), []
    for extensions in (None, CpuExtensions.none):
        resizer, target = Resizer(), ImageData(200, 100, PixelType.U8x3)
        if extensions is not None:
            resizer.cpu_extensions = extensions
        resizer.resize(ImageData(512, 256, PixelType.U8x3, pixels), target, LANCZOS)
        made.append(target.get_buffer())
    assert made[0] == made[1]


def test_enlarging_is_told() -> None:
    stored = encode(jpeg(RNG, (16, 64)), (32, 32), 90)
    assert size_of(stored.data) == (32, 32) and stored.enlarged


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_png_of_any_colour(mode: str) -> None:
    raw = pil_bytes(Image.fromarray(picture(RNG, (20, 20))).convert(mode), "PNG")
    assert size_of(encode(raw, (10, 10), 90).data) == (10, 10)


def test_a_png_of_16_bits_keeps_its_range() -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = simplejpeg.decode_jpeg(encode(pil_bytes(Image.fromarray(grey), "PNG"), (64, 64), 100).data)
    assert np.abs(pixels[..., 0].astype(int) - (grey >> 8)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_of_any_colour(mode: str, progressive: bool) -> None:
    image = Image.fromarray(picture(RNG, (64, 64)))
    raw = pil_bytes(image.convert(mode), "JPEG", quality=95, progressive=progressive)
    pixels = simplejpeg.decode_jpeg(encode(raw, (32, 32), 95).data)
    want = np.asarray(image.convert(mode).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS))
    assert np.abs(pixels.astype(int) - want).mean() < 4


def test_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image = Image.fromarray(picture(RNG, (20, 40)))
    turned, plain = pil_bytes(image, "JPEG", exif=exif), pil_bytes(image, "JPEG")
    assert turned != plain and encode(turned, (10, 20), 90).data == encode(plain, (10, 20), 90).data


@pytest.mark.parametrize("lost", [1, 2, 100, 1000])
@pytest.mark.parametrize("size", [None, (50, 50), (64, 64)])
def test_a_truncated_jpeg_is_broken(lost: int, size: tuple[int, int] | None) -> None:
    raw = simplejpeg.encode_jpeg(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    encode(raw, size, 90)
    with pytest.raises(BrokenImage, match="broken JPEG"):
        encode(raw[:-lost], size, 90)


@pytest.mark.parametrize("lost", [1, 4, 8, 14, 100, 1000])
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


def test_any_flipped_bit_in_a_pngs_data_is_found() -> None:
    raw = png(RNG, (16, 16))
    for byte in range(8, len(raw) - 12):  # up to the end mark
        with pytest.raises(BrokenImage):
            encode(raw[:byte] + bytes([raw[byte] ^ 16]) + raw[byte + 1 :], (10, 10), 90)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty file"),
        (bytes(1000), "zero bytes"),
        (b"<html>not found</html>", "HTML or XML"),
        (b"not found", "PNG$"),
        *((pil_bytes(Image.new("RGB", (4, 4)), kind), f"PNG but {kind}") for kind in ("GIF", "BMP", "TIFF")),
        (pil_bytes(Image.new("RGB", (4, 4)), "WEBP"), "PNG but WebP"),
        (pil_bytes(Image.new("RGB", (4, 4)), "AVIF"), "PNG but AVIF"),
        (b"\xff\xd8", "broken JPEG"),
        (b"\x89PNG\r\n\x1a\n", "broken PNG|neither"),
    ],
    ids=["empty", "zeros", "html", "text", "gif", "bmp", "tiff", "webp", "avif", "jpeg start", "png start"],
)
def test_what_is_no_image(raw: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason):
        encode(raw, (10, 10), 90)


def test_an_image_too_large_for_memory_is_refused_unseen() -> None:
    huge = bytearray(pil_bytes(Image.new("RGB", (16, 16)), "JPEG"))
    frame = huge.index(b"\xff\xc0")
    huge[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"  # height and width: 65,280
    with pytest.raises(BrokenImage, match="65280 × 65280 pixels"):
        encode(bytes(huge), (10, 10), 90)
    header = b"IHDR" + struct.pack(">II", 65280, 65280) + bytes([8, 2, 0, 0, 0])
    chunks = (header, b"IDAT", b"IEND")
    huge_png = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    with pytest.raises(BrokenImage, match="pixels"):
        encode(b"\x89PNG\r\n\x1a\n" + huge_png, (10, 10), 90)
