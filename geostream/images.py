"""Decode a JPEG or PNG to RGB pixels: the one rule, for what is stored and for what is trained on.

JPEGs go through libjpeg-turbo, scaled while decoding where a smaller size is wanted; those in CMYK, which it gives no
RGB of, and PNGs go through Pillow. Of 16 bits the upper eight are kept, transparency is dropped, and the orientation
that a camera noted (EXIF) is ignored: a panorama or a tile lies in its file as it is meant. Whatever libjpeg-turbo
warns of is refused, with one exception: zero bytes in front of the end mark, which some writers pad with. Other stray
bytes there look as what one flipped bit in the picture leaves behind, and viewers show such pictures, too.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]  # (height, width, 3), RGB
LARGEST = 2**27  # pixels: 400 MB decoded, 16,000 × 8,000; the largest panoramas are below
STRAY = "extraneous bytes before marker 0xd9"
END = b"\xff\xd9"


def is_jpeg(data: bytes | memoryview) -> bool:
    """Return whether the image is a JPEG by its first bytes, whatever its file is called."""
    return bytes(data[:2]) == b"\xff\xd8"


def check_size(height: int, width: int) -> None:
    """Raise ValueError for an image that would take the memory away."""
    if height * width > LARGEST:
        raise ValueError(f"{width} × {height} pixels, more than {LARGEST:,} are not decoded")


def decode_jpeg(data: bytes | memoryview, into: Pixels | None = None) -> Pixels:
    """Decode a JPEG.

    Args:
        data: the whole file.
        into: where the pixels go if they have its size (height, width, 3); then it is what is returned. Else they come
            at the smallest of libjpeg's scales that is no smaller than it.

    Returns:
        RGB pixels; at the JPEG's own size where ``into`` is None.

    Raises:
        ValueError: it is damaged, or of a kind that cannot be decoded.
    """
    try:
        return _turbo(data, into)
    except ValueError as error:
        if STRAY not in str(error):
            raise
        picture = bytes(data).rpartition(END)[0]
        kept = picture.rstrip(b"\0")
        if kept.endswith(b"\xff"):  # whose zero belongs to it
            kept += b"\0"
        if kept == picture:
            raise
        return _turbo(kept + END, into)


def _turbo(data: bytes | memoryview, into: Pixels | None) -> Pixels:
    at_least = {} if into is None else {"min_height": into.shape[0], "min_width": into.shape[1]}
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, **at_least)
    check_size(height, width)
    if colours in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK")  # strictly, as the others are
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    if into is not None and (height, width) == into.shape[:2]:
        simplejpeg.decode_jpeg(data, "RGB", **at_least, buffer=into)
        return into
    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", **at_least)
    return pixels


def decode_png(data: bytes | memoryview) -> Pixels:
    """Decode a PNG at its own size.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: what Pillow raises for one that is damaged, and
            ValueError for one that is too large.
    """
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        check_size(image.height, image.width)
        if image.mode.startswith("I"):  # 16 bits of grey: convert() would cut off what is above 255, not scale it
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))
