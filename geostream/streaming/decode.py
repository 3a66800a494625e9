"""From an image's bytes to pixels of the size the model wants.

Decides that JPEGs go through libjpeg-turbo, scaled while decoding when the wanted size is smaller (a panorama of 2048
columns wanted at 768 is decoded at 1024: a quarter of the work), and that whatever is left to the wanted size is an
antialiased bilinear resize. Images sharded at the training size are not resized at all. The aspect is not kept: a
layout stores the aspect its dataset asks for. Decoding holds no GIL.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]

from geostream.errors import BadInput

Pixels = npt.NDArray[np.uint8]  # (height, width, 3), RGB


def decode_image(data: bytes | memoryview, into: Pixels) -> Pixels:
    """RGB pixels of a JPEG or PNG, at the size of ``into`` (height, width, 3; contiguous), put there and returned.

    Raises BadInput saying what is wrong with the image; the caller knows and adds which image it is.
    """
    pixels = _jpeg(data, into) if bytes(data[:2]) == b"\xff\xd8" else _png(data)
    if pixels is into:
        return into
    if pixels.shape != into.shape:
        channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
        pixels = functional.resize(channels_first, list(into.shape[:2]), antialias=True).permute(1, 2, 0).numpy()
    into[...] = pixels
    return into


def _jpeg(data: bytes | memoryview, into: Pixels) -> Pixels:
    """The JPEG at its own size, or at the smallest of libjpeg's scales that is no smaller than wanted.

    Where that is the wanted size, it is decoded into its place.
    """
    wanted = {"min_height": into.shape[0], "min_width": into.shape[1]}
    try:
        size = simplejpeg.decode_jpeg_header(data, **wanted)[:2]
        if size == into.shape[:2]:
            simplejpeg.decode_jpeg(data, "RGB", **wanted, buffer=into)
            return into
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", **wanted)
    except ValueError as error:
        raise BadInput(f"not a whole JPEG ({error})") from error
    return pixels


def _png(data: bytes | memoryview) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise BadInput(f"not a whole JPEG or PNG ({error})") from error
