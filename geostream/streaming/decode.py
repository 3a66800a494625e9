"""Decode an image to pixels of the size that the model wants.

A JPEG is scaled while it is decoded when the wanted size is smaller: a panorama of 2048 columns wanted at 768 is
decoded at 1024, which is a quarter of the work. An antialiased bilinear resize does the rest. Images that were sharded
at the training size are not resized. The aspect ratio is not kept, because a layout stores the one that its data set
needs. Decoding releases the GIL. See :mod:`geostream.images` for the decoders.
"""

from __future__ import annotations

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from geostream.errors import BadInput
from geostream.images import Pixels, decode_jpeg, decode_png, is_jpeg


def decode_image(data: bytes | memoryview, into: Pixels) -> Pixels:
    """Decode a JPEG or PNG into an array.

    Args:
        data: The whole file.
        into: (height, width, 3), contiguous. The image is resized to this size and written here.

    Returns:
        ``into``, with RGB pixels.

    Raises:
        BadInput: The image is damaged. The message says how; the caller adds which image it is.
    """
    try:
        pixels = decode_jpeg(data, into) if is_jpeg(data) else decode_png(data)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what the decoders raise
        raise BadInput(f"not a whole JPEG{'' if is_jpeg(data) else ' or PNG'} ({error})") from error
    if pixels is into:
        return into
    if pixels.shape != into.shape:
        channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
        pixels = functional.resize(channels_first, list(into.shape[:2]), antialias=True).permute(1, 2, 0).numpy()
    into[...] = pixels
    return into
