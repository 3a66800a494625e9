"""Find tiles that look nearly the same, from their pixels alone.

University-1652 holds some buildings more than once: their tiles are nearly identical, and as negatives of each other
they teach a network to tell apart what is the same (users of Sample4Geo saw it cost 1 to 2 %). An adapter can make such
tiles semi-positives of each other, which never share a batch.

Two tiles are compared by the correlation of their thumbnails, 32 × 32 pixels in colour, each channel less its mean. It
ignores brightness and contrast, and stays high under a shift of a few pixels or another JPEG quality. A tile of one
colour correlates with nothing. All pairs of tiles are compared, so this is for thousands of tiles: 12 kB each, and n²
products.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from geostream.arrays import Csr, Float32
from sharding.raw_path import RawPath

SIDE = 32  # pixels of a thumbnail
READERS = 8  # images that are read at a time
ROWS = 1024  # tiles that are compared with all at a time


def alike(images: Sequence[RawPath], least: float) -> Csr:
    """Return for each image the numbers of the others that look nearly the same.

    Args:
        images: where they lie. One that cannot be read is like no other; the encoder says what is wrong with it.
        least: correlation from which two images count as alike.
    """
    with ThreadPoolExecutor(READERS) as threads:
        thumbnails = np.array(list(threads.map(_thumbnail, images)), dtype=np.float32)
    return correlated(thumbnails.reshape(len(images), SIDE * SIDE * 3), least)


def correlated(vectors: Float32, least: float) -> Csr:
    """Return for each vector the numbers of the others whose product with it is at least ``least``.

    Args:
        vectors: (n, D), each of length 1 or 0.
        least: above 0.
    """
    lists = []
    for start in range(0, len(vectors), ROWS):
        near = vectors[start : start + ROWS] @ vectors.T >= least
        rows = np.arange(len(near))
        near[rows, start + rows] = False
        lists += [np.flatnonzero(row).astype(np.int32) for row in near]
    lengths = [len(one) for one in lists]
    return Csr(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.concatenate([np.zeros(0, np.int32), *lists])
    )


def _thumbnail(image: RawPath) -> Float32:
    """Return an image's thumbnail as a vector of length 1; zeros where it is of one colour or cannot be read."""
    try:
        with Image.open(io.BytesIO(image.read_bytes())) as opened:
            small = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return np.zeros(SIDE * SIDE * 3, dtype=np.float32)
    pixels = np.asarray(small, dtype=np.float32)
    vector: Float32 = (pixels - pixels.mean(axis=(0, 1))).ravel()
    length = float(np.linalg.norm(vector))
    return vector / length if length > 1e-3 * len(vector) else np.zeros_like(vector)
