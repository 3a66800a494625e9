"""Encode one raw image as the bytes that are stored, or say why it cannot be.

By default an image is decoded whole, resized by Lanczos to the size that training uses, and stored as a JPEG of quality
90 with 4:2:0 colour: a VIGOR panorama of 1 MB becomes about 100 kB. The sides are set one by one: an image of another
aspect is squeezed, a smaller one enlarged (and counted). A JPEG that has the size already keeps its bytes.

A photo that a camera marked as turned is stored upright, and a panorama that looks somewhere with north in its middle.
Both are encoded anew, at whatever size. A tile that is cut from imagery comes as pixels.

Every image is decoded once, also where its bytes are kept, by the rule that training decodes by
(:mod:`geostream.images`). So truncated images, those too large for memory, and those that training could not read are
never stored. The result depends on the bytes and the library versions alone: the resizer computes in whole numbers, the
same on every processor.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np
import simplejpeg
from cykooz_resizer import (
    FilterType,
    ImageData,
    PixelType,
    ResizeAlg,
    ResizeOptions,
    Resizer,
)
from PIL import ExifTags, Image, UnidentifiedImageError

from geostream.images import Pixels, decode_jpeg, decode_png, is_jpeg
from sharding.places import Size

# Resized bytes may differ between these: part of what a finished shard is recognised by.
ENCODER = " ".join(f"{package} {version(package)}" for package in ("pillow", "simplejpeg", "cykooz-resizer"))
LANCZOS = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.lanczos3))
# What sets a picture upright, by its EXIF orientation (Exif 2.32, tag 0x0112: where row 0 and column 0 are).
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}
PNG_END = b"IEND\xaeB`\x82"
# Formats of files that were seen under the names .jpg and .png: offset, the bytes there, name.
OTHERS = (
    (8, b"WEBP", "WebP"), (0, b"BM", "BMP"), (0, b"GIF8", "GIF"), (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"),
    (4, b"ftyp", "AVIF or HEIC"), (4, b"jP  ", "JPEG 2000"), (0, b"\xff\x0a", "JPEG XL"), (0, b"<", "HTML or XML"),
)  # fmt: skip


class BrokenImage(Exception):
    """Say that an image cannot be decoded, and why; the writer counts these and goes on."""


@dataclass(frozen=True)
class Encoded:
    """Hold an image as it is stored.

    Attributes:
        data: its bytes.
        suffix: of the file type that they are.
        enlarged: the raw image was smaller than the stored size.
    """

    data: bytes
    suffix: Literal["jpg", "png"]
    enlarged: bool = False


def encode(raw: bytes, size: Size | None, quality: int) -> Encoded:
    """Return the stored form of an image.

    Args:
        raw: the file's bytes; JPEG or PNG by content, whatever its name.
        size: (height, width) in pixels; None: the bytes are kept.
        quality: JPEG quality, 1 to 100.

    Raises:
        BrokenImage: it cannot be decoded.
    """
    jpeg = is_jpeg(raw)
    pixels = _decode_jpeg(raw) if jpeg else _decode_png(raw)
    if size is None or (jpeg and pixels.shape[:2] == size):
        return Encoded(raw, "jpg" if jpeg else "png")
    return encode_pixels(pixels, size, quality)


def encode_photo(raw: bytes, size: Size | None, quality: int, heading: float | None) -> Encoded:
    """Return the stored form of a photo: upright, and with north in the middle where it is a panorama.

    Args:
        raw: the file's bytes.
        size: (height, width) in pixels; None: as large as it is.
        quality: JPEG quality, 1 to 100.
        heading: degrees clockwise from north that a panorama's middle looks to; None: it is not turned.

    Raises:
        BrokenImage: it cannot be decoded.
    """
    upright = UPRIGHT.get(_orientation(raw))
    if upright is None and not heading:
        return encode(raw, size, quality)
    pixels = _decode_jpeg(raw) if is_jpeg(raw) else _decode_png(raw)
    if upright is not None:
        pixels = upright(pixels)
    if heading:
        pixels = np.roll(pixels, round(heading / 360 * pixels.shape[1]), axis=1)
    return encode_pixels(pixels, size, quality)


def encode_pixels(pixels: Pixels, size: Size | None, quality: int) -> Encoded:
    """Return the stored form of a decoded image, a JPEG.

    Args:
        pixels: (h, w, 3) RGB.
        size: (height, width) in pixels; None: as large as it is.
        quality: JPEG quality, 1 to 100.
    """
    height, width = pixels.shape[:2]
    size = size or (height, width)
    if (height, width) != size:
        pixels = _resize(pixels, size)
    pixels = np.ascontiguousarray(pixels)
    data = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False)
    return Encoded(data, "jpg", enlarged=height < size[0] or width < size[1])


def _orientation(raw: bytes) -> int:
    """Return how a camera says it was held, by EXIF's numbers; 1: upright, or it says nothing that can be read."""
    try:
        with Image.open(io.BytesIO(raw), formats=("JPEG", "PNG")) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return 1  # whether the picture itself is whole shows when it is decoded


def _resize(pixels: Pixels, size: Size) -> Pixels:
    source = ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())
    resized = ImageData(size[1], size[0], PixelType.U8x3)
    Resizer().resize(source, resized, LANCZOS)
    return np.frombuffer(resized.get_buffer(), dtype=np.uint8).reshape(*size, 3)


def _decode_jpeg(raw: bytes) -> Pixels:
    try:
        return decode_jpeg(raw)
    except (OSError, ValueError) as error:
        raise BrokenImage(f"broken JPEG: {error}") from error


def _decode_png(raw: bytes) -> Pixels:
    if not raw:
        raise BrokenImage("empty file")
    try:
        # Pillow decodes past a wrong checksum and a missing end. verify() sees both, but uses the image up.
        Image.open(io.BytesIO(raw), formats=["PNG"]).verify()
        if PNG_END not in raw:  # verify() does not look at the end mark's own checksum
            raise BrokenImage("broken PNG: cut off in its end mark")
        return decode_png(raw)
    except UnidentifiedImageError as error:
        raise BrokenImage(f"neither JPEG nor PNG{_looks_like(raw)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"broken PNG: {error}") from error


def _looks_like(raw: bytes) -> str:
    if not raw.strip(b"\0"):
        return ", nothing but zero bytes"
    return next((f" but {name}" for at, magic, name in OTHERS if raw.startswith(magic, at)), "")
