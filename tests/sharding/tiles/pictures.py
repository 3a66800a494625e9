"""Small GeoTIFFs, regions and photos for tests. A picture's colour says where on Earth a pixel lies."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio.transform import from_origin
from rasterio.warp import transform

from sharding.simcity.geotiff import ExifJpeg

SOUTH, WEST = 47.0700, 15.4300  # the corner of the land that the tests know
SIDE = 0.004  # degrees of colour: from 0 to 255
LAND = (WEST, SOUTH, WEST + SIDE, SOUTH + SIDE)


def colours(longitude: np.ndarray, latitude: np.ndarray) -> np.ndarray:
    """(3, …) bytes: red grows to the east, green to the north, blue is a pattern of 16 stripes."""
    east, north = (longitude - WEST) / SIDE, (latitude - SOUTH) / SIDE
    blue = 128 + 100 * np.sin(2 * np.pi * 16 * (east + 0.3 * north))
    return np.clip(np.stack([255 * east, 255 * north, blue]) + 0.5, 0, 255).astype(np.uint8)


def write_geotiff(
    path: Path,
    box: tuple[float, float, float, float] = LAND,
    *,
    crs: str = "EPSG:4326",
    metres: float = 0.6,
    **how: Any,
) -> Path:
    """Write the land in a box of degrees, in any coordinate system, with pixels of about so many metres."""
    xs, ys = transform("EPSG:4326", crs, [box[0], box[2], box[0], box[2]], [box[1], box[1], box[3], box[3]])
    each = metres / 90_000 if crs == "EPSG:4326" else metres
    width, height = round((max(xs) - min(xs)) / each), round((max(ys) - min(ys)) / each)
    at = from_origin(min(xs), max(ys), each, each)
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = at @ (columns.ravel(), rows.ravel())
    longitude, latitude = transform(crs, "EPSG:4326", x, y)
    picture = colours(np.array(longitude), np.array(latitude)).reshape(3, height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"driver": "GTiff", "dtype": "uint8", "count": 3, "crs": crs, "transform": at, "tiled": True, **how}
    bands = how.pop("picture", picture)
    options.pop("picture", None)
    with rasterio.open(path, "w", width=width, height=height, **options) as raster:
        raster.write(bands[: options["count"]])
    return path


def write_region(path: Path, box: tuple[float, float, float, float], **properties: str) -> Path:
    """Write a rectangle as GeoJSON."""
    west, south, east, north = box
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    feature = {"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


def photo(
    latitude: float, longitude: float, *, heading: float = 0.0, lying: bool = False, size: tuple[int, int] = (32, 64)
) -> bytes:
    """A JPEG with EXIF, whose columns go from black on the left to white on the right."""
    ramp = np.linspace(0, 255, size[1]).astype(np.uint8)
    picture = np.repeat(np.broadcast_to(ramp, size)[..., None], 3, axis=2)
    return ExifJpeg(latitude, longitude, heading, lying).encode(np.rot90(picture, -1) if lying else picture, 95)


def png_of(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def expected(box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """(size, size, 3) of what a tile of a box should show."""
    west, south, east, north = box
    middle = (np.arange(size) + 0.5) / size
    longitude, latitude = np.meshgrid(west + middle * (east - west), north - middle * (north - south))
    return np.moveaxis(colours(longitude, latitude), 0, -1)
