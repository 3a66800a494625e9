"""One raw image → the bytes that are stored, or a reason why it cannot be.

Decides what an image looks like in a layout. By default it is resized to the size that training uses, so that every
batch has one shape and a VIGOR panorama of 1 MB becomes about 100 kB: a box reduction by the largest whole factor
that stays at or above the target, then Lanczos (PSNR 44 dB against Lanczos alone, in half the time), then JPEG of
quality 90 with 4:2:0 colour. The sides are set one by one, as the field does: an image of another aspect is
squeezed, a smaller one enlarged (and counted). A JPEG that has the size already keeps its bytes; ``original`` keeps
the bytes of every image. Either way each image is decoded whole once, strictly: truncated data never gets in.
EXIF orientation is ignored. The result depends on the bytes and the library versions alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from sharding.places import Size

Pixels = npt.NDArray[np.uint8]
# Resized bytes may differ between these: part of what a finished shard is recognised by.
ENCODER = " ".join(f"{package} {version(package)}" for package in ("pillow", "simplejpeg"))


class BrokenImage(Exception):
    """The image cannot be decoded; the text says why. Counted by the writer, never shown as a traceback."""


@dataclass(frozen=True)
class Encoded:
    """Bytes to store, with the suffix that fits them. ``enlarged``: the raw image was smaller than the target."""

    data: bytes
    suffix: Literal["jpg", "png"]
    enlarged: bool = False


def encode(raw: bytes, size: Size | None, quality: int) -> Encoded:
    """The stored form of ``raw`` (JPEG or PNG by content, whatever it is called): ``size`` (height, width), or its own
    bytes where ``size`` is None. Raises BrokenImage.
    """
    is_jpeg = raw[:2] == b"\xff\xd8"
    pixels = _decode_jpeg(raw) if is_jpeg else _decode_png(raw)
    height, width = pixels.shape[:2]
    if size is None or (is_jpeg and (height, width) == size):
        return Encoded(raw, "jpg" if is_jpeg else "png")
    if (height, width) != size:
        image = Image.fromarray(pixels)
        # reducing_gap 1: the box reduction that the docstring names.
        pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS, reducing_gap=1.0))
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    return Encoded(data, "jpg", enlarged=height < size[0] or width < size[1])


def _decode_jpeg(raw: bytes) -> Pixels:
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(raw, colorspace="RGB", strict=True)
    except ValueError as error:
        raise BrokenImage(f"broken JPEG: {error}") from error
    return pixels


def _decode_png(raw: bytes) -> Pixels:
    if not raw:
        raise BrokenImage("empty file")
    try:
        # Pillow decodes past a wrong checksum and a missing end; verify() sees both, but uses the image up.
        Image.open(io.BytesIO(raw), formats=["PNG"]).verify()
        return np.asarray(Image.open(io.BytesIO(raw), formats=["PNG"]).convert("RGB"))
    except UnidentifiedImageError as error:
        raise BrokenImage("neither JPEG nor PNG") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"broken PNG: {error}") from error
