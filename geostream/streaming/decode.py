"""From an image's bytes to pixels of the size the model wants.

A JPEG is scaled while decoding when the wanted size is smaller (a panorama of 2048 columns wanted at 768 is decoded at
1024: a quarter of the work), and whatever is left to the wanted size is an antialiased bilinear resize. Images sharded
at the training size are not resized at all. The aspect is not kept: a layout stores the aspect its dataset asks for.
Decoding holds no GIL. How bytes become pixels: :mod:`geostream.images`.
"""

from __future__ import annotations

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from geostream.errors import BadInput
from geostream.images import Pixels, decode_jpeg, decode_png, is_jpeg


def decode_image(data: bytes | memoryview, into: Pixels) -> Pixels:
    """RGB pixels of a JPEG or PNG, at the size of ``into`` (height, width, 3; contiguous), put there and returned.

    Raises BadInput saying what is wrong with the image; the caller knows and adds which image it is.
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
