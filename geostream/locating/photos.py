"""Read photos, and what a camera wrote into them: where they were taken, and how wide they look.

A photo may come from anywhere, so nothing in it is trusted: it is refused in one line if it is empty, no image, larger
than ``LARGEST`` pixels, damaged, of several pages, or of values without a known range. Damaged EXIF data are no reason:
such a photo is read as one without.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from geostream.errors import BadInput
from geostream.images import LARGEST, check_size, exif_tags, gps_position

FILM = 36.0, 24.0  # millimetres, width and height of the film that focal lengths are told for
HALF_AS_HIGH = 1.9  # width / height from which on a picture without a lens is taken for a panorama


def read_photo(data: bytes | Path, name: str | None = None) -> Image.Image:
    """Decode a photo, upright and in RGB, with its EXIF data.

    Args:
        data: The whole file, or its path.
        name: How the photo is called in errors; None: by its path.

    Raises:
        BadInput: The photo cannot be read; the message says why.
    """
    name = name or str(data if isinstance(data, Path) else "photo")
    try:
        content = data.read_bytes() if isinstance(data, Path) else data
        if not content:
            raise BadInput(f"{name}: empty file; choose a JPEG or PNG")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half of our own limit on
            opened = Image.open(io.BytesIO(content))
        with opened as image:
            check_size(image.height, image.width)
            if getattr(image, "is_animated", False) and image.format != "MPO":  # phones write two pictures into one MPO
                kind, part = ("several pages", "pages") if image.format == "TIFF" else ("animated", "frames")
                raise BadInput(f"{name}: {kind}; save one of its {part} as a picture of its own")
            return upright(image)
    except UnidentifiedImageError as error:
        raise BadInput(f"{name}: not an image; choose a JPEG or PNG") from error
    except Image.DecompressionBombError as error:
        raise BadInput(f"{name}: more than {LARGEST:,} pixels; choose a smaller copy") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:  # what Pillow's decoders raise
        raise BadInput(f"{name}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its camera was held, and convert it to RGB. Of 16-bit values the upper eight bits are kept.

    Args:
        image: Any picture.

    Raises:
        ValueError: Its values are fractions, or do not fit into 16 bits: how bright they are is not known.
    """
    image = _turned(image)
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers; save it with 8 bits a colour")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError("its values do not fit into 16 bits; save it with 8 bits a colour")
        exif = image.info.get("exif")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        image.info |= {"exif": exif} if exif else {}
    return image if image.mode == "RGB" else image.convert("RGB")


def _turned(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data say; where these are damaged, return it as it is, without them."""
    image.load()  # what is wrong with the picture itself is raised here
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises almost anything of damaged EXIF data, TypeError and struct.error among them
        bare = image.copy()
        bare.info.clear()
        return bare


def field_of_view(image: Image.Image) -> float | None:
    """Return how many degrees a photo shows from left to right, by the focal length in its EXIF data; None: unknown.

    Args:
        image: An upright picture.
    """
    focal = exif_tags(image, ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm)
    try:
        millimetres = float(focal) if focal is not None else 0.0
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not 3 <= millimetres <= 3000:  # 0 means unknown
        return None
    side = FILM[0] if image.width >= image.height else FILM[1]
    return 2 * math.degrees(math.atan(side / 2 / millimetres))


def taken_at(image: Image.Image) -> tuple[float, float] | None:
    """Return latitude and longitude from a photo's EXIF data, in degrees; None as :func:`gps_position`.

    Args:
        image: A picture.
    """
    return gps_position(exif_tags(image, ExifTags.IFD.GPSInfo))
