"""Decode a JPEG or PNG to RGB pixels, in the same way for sharding and for training; read what its EXIF data say.

JPEGs are decoded by libjpeg-turbo, which scales them while decoding where a smaller size is wanted. PNGs are decoded by
Pillow, and so are JPEGs in CMYK, because libjpeg-turbo does not convert these to RGB. Of 16-bit values the upper eight
bits are kept, transparency is dropped, and the orientation that a camera recorded (EXIF) is ignored.

A JPEG is refused if libjpeg-turbo warns of anything in it. The only exception are zero bytes in front of the end mark,
which some programs write as padding. Other bytes there may be the trace of a flipped bit, although image viewers show
such pictures. Damaged EXIF data are taken for none.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image

Pixels = npt.NDArray[np.uint8]  # (height, width, 3), RGB
LARGEST = 2**27  # pixels, about 16,000 × 8,000: 400 MB decoded, more than the largest panoramas
STRAY = "extraneous bytes before marker 0xd9"
END = b"\xff\xd9"


def is_jpeg(data: bytes | memoryview) -> bool:
    """Return whether the image is a JPEG by its first bytes, whatever its file is called."""
    return bytes(data[:2]) == b"\xff\xd8"


def check_size(height: int, width: int) -> None:
    """Check that an image is not too large to decode.

    Args:
        height: In pixels.
        width: In pixels.

    Raises:
        ValueError: It has more than ``LARGEST`` pixels.
    """
    if height * width > LARGEST:
        raise ValueError(f"{width} × {height} pixels, more than {LARGEST:,} are not decoded")


def decode_jpeg(data: bytes | memoryview, into: Pixels | None = None) -> Pixels:
    """Decode a JPEG.

    Args:
        data: The whole file.
        into: (height, width, 3) of the wanted size. The JPEG is decoded at the smallest of libjpeg's scales that is no
            smaller. If that is the wanted size, the pixels are written here.

    Returns:
        RGB pixels: ``into`` where they fit it; at the JPEG's own size where ``into`` is None.

    Raises:
        ValueError: The JPEG is damaged, too large, or of a kind that cannot be decoded.
    """
    try:
        return _turbo(data, into)
    except ValueError as error:
        if STRAY not in str(error):
            raise
        picture = bytes(data).rpartition(END)[0]
        kept = picture.rstrip(b"\0")
        if kept.endswith(b"\xff"):  # this byte is part of the picture, and so is the zero that follows it
            kept += b"\0"
        if kept == picture:
            raise
        return _turbo(kept + END, into)


def _turbo(data: bytes | memoryview, into: Pixels | None) -> Pixels:
    at_least = {} if into is None else {"min_height": into.shape[0], "min_width": into.shape[1]}
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, **at_least)
    check_size(height, width)
    if colours in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK")  # raises for what Pillow would tolerate
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    if into is not None and (height, width) == into.shape[:2]:
        simplejpeg.decode_jpeg(data, "RGB", **at_least, buffer=into)
        return into
    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", **at_least)
    return pixels


def decode_png(data: bytes | memoryview) -> Pixels:
    """Decode a PNG at its own size.

    Args:
        data: The whole file.

    Returns:
        RGB pixels.

    Raises:
        ValueError: The PNG is too large, or damaged.
        OSError: It is damaged; Pillow may also raise SyntaxError or Image.DecompressionBombError.
    """
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        check_size(image.height, image.width)
        if image.mode.startswith("I"):  # 16-bit grey: convert() would clip values above 255 instead of scaling them
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def exif_tags(image: Image.Image, ifd: int) -> dict[int, Any]:
    """Return a group of a picture's EXIF tags; none where it has none, or they are damaged.

    Args:
        image: A picture.
        ifd: The group, of ``ExifTags.IFD``.
    """
    try:
        return dict(image.getexif().get_ifd(ifd))
    except Exception:  # Pillow raises almost anything of damaged data, TypeError and struct.error among them
        return {}


def gps_position(gps: Mapping[int, Any]) -> tuple[float, float] | None:
    """Return latitude and longitude from EXIF's GPS tags, in degrees.

    Without N or S, and E or W, a number may lie on either side, so it is no position. Nor is 0, 0: receivers write
    zeros while they know nothing yet.

    Args:
        gps: The tags of ``ExifTags.IFD.GPSInfo``.

    Returns:
        The position; None where there is none, or none that can be.
    """
    try:
        latitude = _degrees(gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef], "NS")
        longitude = _degrees(gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef], "EW")
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    known = abs(latitude) <= 90 and abs(longitude) <= 180  # false for NaN
    return (latitude, longitude) if known and (latitude, longitude) != (0, 0) else None


def _degrees(parts: Any, side: Any, sides: str) -> float:
    """Return degrees of EXIF's degrees, minutes and seconds; raise ValueError where the side is neither of the two."""
    degrees, minutes, seconds = (float(part) for part in parts)
    text = side.decode("ascii") if isinstance(side, bytes) else str(side)
    sign = (1, -1)[sides.index(text.strip("\0 ").upper()[:1] or "?")]
    return sign * (degrees + minutes / 60 + seconds / 3600)
