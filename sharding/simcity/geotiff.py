"""Plan rendered cities as a person's own imagery and photos: GeoTIFFs of the land, panoramas with EXIF, a region.

    imagery/<City>-00-00.tif …          the city from above, in squares, EPSG:4326
    photos/<City>/<id>.jpg              panoramas; EXIF has where they were taken, and where their middle looks to
    region.geojson                      the land that photos were taken in, a polygon a city

A camera is held as it comes: a panorama's middle looks anywhere, a whole number of pixels from north, and every third
photo lies on its side and says so by EXIF's orientation.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from geostream.errors import BadInput
from sharding.simcity.map import Bytes
from sharding.simcity.plan import METRES_PER_DEGREE, TRIES, CitySpec, RawPlan, Town, panorama_id, standing_room
from sharding.simcity.raster import Raster
from sharding.simcity.shots import PITCH, TILE_METRES, Look, Scene, Shot
from sharding.simcity.view import look_around

if TYPE_CHECKING:
    from fractions import Fraction

SQUARE = 3 * TILE_METRES  # metres: side of a GeoTIFF, which lies within what a block draws
MARGIN = TILE_METRES  # metres of imagery around the region
HEADINGS = 16  # that a camera may look to
LYING = 8  # EXIF's orientation of a camera that was turned clockwise: to be turned back by 90° against the clock


@dataclass(frozen=True)
class Aerial:
    """Take the square whose south-western corner is (west, south), in metres, from straight above."""

    west: float
    south: float

    def take(self, raster: Raster, look: Look) -> Bytes:
        """Return the picture, (H, W, 3) RGB bytes, in the map's own pixels."""
        side = round(SQUARE / raster.metres)
        row = round((raster.north - self.south) / raster.metres) - side
        column = round((self.west - raster.west) / raster.metres)
        return raster.colour[row : row + side, column : column + side]


@dataclass(frozen=True)
class Turned:
    """Look all around at (x, y), the middle ``heading`` degrees clockwise from north; ``lying``: on its side."""

    x: float
    y: float
    heading: float
    light: float
    lying: bool

    def take(self, raster: Raster, look: Look) -> Bytes:
        """Return the picture as the camera writes it, (H, W, 3) RGB bytes."""
        north = look_around(raster, self.x, self.y, look.rays(0.0, 2 * np.pi), self.light, look.fold)
        picture = np.roll(north, -round(self.heading / 360 * north.shape[1]), axis=1)
        return np.rot90(picture, -1) if self.lying else picture


@dataclass(frozen=True)
class GeoTiff:
    """Write a tiled GeoTIFF in degrees, deflated.

    Attributes:
        west: degrees of its corner.
        north: likewise.
        width: degrees from west to east.
        height: degrees from south to north.
    """

    west: float
    north: float
    width: float
    height: float

    def encode(self, picture: Bytes, quality: int) -> bytes:
        """Return the file's bytes."""
        import rasterio
        from rasterio.transform import from_origin

        rows, columns = picture.shape[:2]
        transform = from_origin(self.west, self.north, self.width / columns, self.height / rows)
        with rasterio.MemoryFile() as file:
            with file.open(
                driver="GTiff", width=columns, height=rows, count=3, dtype="uint8", crs="EPSG:4326",
                transform=transform, tiled=True, compress="deflate", photometric="rgb",
            ) as raster:  # fmt: skip
                raster.write(np.moveaxis(picture, -1, 0))
            return bytes(file.getbuffer())


@dataclass(frozen=True)
class ExifJpeg:
    """Write a JPEG with EXIF: where it was taken, where its middle looks to, how the camera was held."""

    latitude: float
    longitude: float
    heading: float
    lying: bool

    def encode(self, picture: Bytes, quality: int) -> bytes:
        """Return the file's bytes."""
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = LYING if self.lying else 1
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(
            {
                ExifTags.GPS.GPSLatitudeRef: "N" if self.latitude >= 0 else "S",
                ExifTags.GPS.GPSLatitude: sexagesimal(abs(self.latitude)),
                ExifTags.GPS.GPSLongitudeRef: "E" if self.longitude >= 0 else "W",
                ExifTags.GPS.GPSLongitude: sexagesimal(abs(self.longitude)),
                ExifTags.GPS.GPSImgDirectionRef: "T",
                ExifTags.GPS.GPSImgDirection: self.heading,
            }
        )
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "JPEG", quality=quality, exif=exif)
        return buffer.getvalue()


def sexagesimal(degrees: float) -> tuple[Fraction, Fraction, Fraction]:
    """Return degrees, minutes and seconds as EXIF holds them, to a ten-thousandth of a second (3 mm)."""
    from fractions import Fraction

    total = round(degrees * 3600 * 10_000)
    return Fraction(total // 36_000_000), Fraction(total // 600_000 % 60), Fraction(total % 600_000, 10_000)


def plan_photos(
    towns: list[Town], rng: np.random.Generator, *, photos_per_tile: float = 1.0, lying_share: float = 1 / 3
) -> RawPlan:
    """Plan the towns as own imagery and photos.

    Args:
        towns: the cities; each has as much land as its tiles would take.
        rng: not used: a city follows from its own.
        photos_per_tile: photos on a square of half a tile's side, on average, as far as there is room.
        lying_share: share of the photos that were taken with the camera on its side.

    Raises:
        BadInput: an option makes no sense, or a city has room for no photo.
    """
    if photos_per_tile <= 0 or not 0 <= lying_share <= 1:
        raise BadInput(f"photos_per_tile {photos_per_tile}, lying_share {lying_share}: above 0, and a share")
    scenes: list[list[Scene]] = []
    features, views = [], 0
    for town in towns:
        photos = _photos(town, photos_per_tile, lying_share)
        if not photos:
            raise BadInput(f"city {town.spec.name} has room for no photo: raise rows, columns or photos_per_tile")
        scenes.append([*_imagery(town.spec), *photos])
        views += len(photos)
        (south, west), (north, east) = town.spec.degrees(0, 0), town.spec.degrees(*town.spec.extent)
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "properties": {"area": town.spec.name}, "geometry": geometry})
    region = json.dumps({"type": "FeatureCollection", "features": features}, indent=1).encode()
    return RawPlan(scenes, {"region.geojson": region}, sum(map(len, scenes)) - views, 0, views)


def _imagery(spec: CitySpec) -> list[Scene]:
    """Return the squares that cover a city and its margin."""
    squares = []
    east, north = spec.extent
    for j in range(math.ceil((north + 2 * MARGIN) / SQUARE)):
        for i in range(math.ceil((east + 2 * MARGIN) / SQUARE)):
            x, y = i * SQUARE - MARGIN, j * SQUARE - MARGIN
            latitude, longitude = spec.degrees(x, y + SQUARE)
            writer = GeoTiff(
                longitude, latitude, spec.degrees(x + SQUARE, y)[1] - longitude, SQUARE / METRES_PER_DEGREE
            )
            shot = Shot(Aerial(x, y), (f"imagery/{spec.name}-{j:02d}-{i:02d}.tif",), writer)
            squares.append(Scene(x + SQUARE / 2, y + SQUARE / 2, (shot,)))
    return squares


def _photos(town: Town, photos_per_tile: float, lying_share: float) -> list[Scene]:
    """Return a scene a photo, in no order of place."""
    rng, (width, height) = town.rng, town.spec.extent
    wanted = max(1, round(photos_per_tile * width * height / PITCH**2))
    scenes: list[Scene] = []
    for _ in range(wanted):
        x, y = rng.uniform(0, width, TRIES), rng.uniform(0, height, TRIES)
        heading = float(rng.integers(HEADINGS)) * 360 / HEADINGS
        lying, light = bool(rng.random() < lying_share), float(rng.uniform(0.95, 1.05))
        name = f"photos/{town.spec.name}/{panorama_id(rng)}.jpg"
        for n in np.flatnonzero(standing_room(town.city, x, y))[:1].tolist():
            latitude, longitude = town.spec.degrees(float(x[n]), float(y[n]))
            camera = Turned(float(x[n]), float(y[n]), heading, light, lying)
            shot = Shot(camera, (name,), ExifJpeg(latitude, longitude, heading, lying))
            scenes.append(Scene(camera.x, camera.y, (shot,)))
    return scenes
