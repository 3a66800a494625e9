"""Find photos and where they were taken: by what cameras write into the files (EXIF), or by a table.

A table is CSV, GeoJSON or GeoParquet, by its suffix. It names each photo's ``file`` below the folder of photos, and has
``lat`` and ``lon`` in degrees (or a point as geometry). The columns ``heading``, ``area`` and ``split`` may be there.

The header of every photo is read, not its picture: its size tells whether it is a panorama (twice as wide as high). The
heading is EXIF's GPSImgDirection; a panorama may have it in XMP instead (Google's GPano:PoseHeadingDegrees).
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from geostream.errors import BadInput, MissingRaw
from sharding.adapters.raw_files import Folders, list_folder, read_number, read_position, readable_name
from sharding.places import IMAGE_SUFFIX, Broken, RawImage

OPENERS = 8  # photos whose headers are read at the same time
NAMES = {  # how the columns of a table may be called
    "file": ("file", "path", "photo", "filename"),
    "lat": ("lat", "latitude"),
    "lon": ("lon", "longitude", "lng"),
    "heading": ("heading",),
    "area": ("area",),
    "split": ("split",),
}
SPLITS = ("train", "test")
XMP_HEADING = re.compile(rb"PoseHeadingDegrees\s*(?:=\s*[\"']|>)\s*(-?[\d.]+)")


@dataclass(frozen=True)
class Spot:
    """Describe a photo and where it was taken.

    Attributes:
        image: its file.
        latitude: degrees; NaN: unknown.
        longitude: likewise.
        heading: degrees clockwise from north that its middle looks to; None: unknown.
        is_panorama: it shows all around.
        area: that a table names; "": none.
        split: likewise.
    """

    image: RawImage
    latitude: float = math.nan
    longitude: float = math.nan
    heading: float | None = None
    is_panorama: bool = False
    area: str = ""
    split: str = ""


class Header(NamedTuple):
    """Hold what a photo's header says; NaN and None: nothing."""

    latitude: float = math.nan
    longitude: float = math.nan
    heading: float | None = None
    is_panorama: bool = False


def find_photos(raw: Path, table: Path | None) -> tuple[list[Spot], list[Broken]]:
    """Return the photos of a folder with their coordinates, and those without any.

    Args:
        raw: the folder.
        table: that says where they were taken; None: the photos do.

    Returns:
        Photos with coordinates, by path. Photos without, which cannot be placed.

    Raises:
        MissingRaw: the folder or the table is missing.
        BadInput: the table is malformed, or there is no photo.
    """
    spots = _listed(raw, table) if table is not None else [Spot(image) for image in _images(raw, raw)]
    if not spots:
        raise BadInput(f"{table or raw}: no photo (.jpg or .png); name a folder that holds some")
    with ThreadPoolExecutor(OPENERS) as threads:
        headers = list(threads.map(partial(_header, raw), (spot.image for spot in spots)))
    found, without = [], []
    for spot, header in zip(spots, headers, strict=True):
        heading = header.heading if spot.heading is None else spot.heading
        spot = replace(spot, heading=heading, is_panorama=header.is_panorama)
        if table is None:
            spot = replace(spot, latitude=header.latitude, longitude=header.longitude)
        if math.isnan(spot.latitude):
            reason = "no coordinates (GPS) in its EXIF" if table is None else "no coordinates in the table"
            without.append(Broken(spot.image.path, spot.image.named, reason))
        else:
            found.append(spot)
    return sorted(found, key=lambda spot: spot.image.path), without


def _images(root: Path, folder: Path) -> Iterator[RawImage]:
    """Yield all images in a folder and those in it."""
    for entry in list_folder(folder):
        name = readable_name(entry)
        inside = Path(entry.path).relative_to(root).as_posix()
        if entry.is_dir():
            yield from _images(root, Path(entry.path))
        elif IMAGE_SUFFIX.search(name):
            yield RawImage(inside, root.name)


def _header(root: Path, image: RawImage) -> Header:
    """Return what a photo's header says; nothing where it cannot be read, which is told when it is encoded."""
    if not image.present:
        return Header()
    try:
        with Image.open(root / image.path, formats=("JPEG", "PNG")) as photo:
            exif = photo.getexif()
            gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
            turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            width, height = photo.size[::-1] if turned else photo.size
            found = XMP_HEADING.search(photo.info.get("xmp") or b"")
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, Image.DecompressionBombError):
        return Header()
    north = _degrees(gps, ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLatitudeRef, "S", 90)
    east = _degrees(gps, ExifTags.GPS.GPSLongitude, ExifTags.GPS.GPSLongitudeRef, "W", 180)
    if math.isnan(north + east) or (north, east) == (0.0, 0.0):  # a receiver without a fix writes zeros
        north = east = math.nan
    heading = _number(gps.get(ExifTags.GPS.GPSImgDirection))
    if math.isnan(heading) and found:
        heading = _number(found[1])
    is_panorama = abs(width - 2 * height) <= 0.01 * width
    return Header(north, east, None if math.isnan(heading) else heading % 360, is_panorama)


def _degrees(gps: Any, tag: int, side: int, negative: str, most: float) -> float:
    """Return degrees out of EXIF's degrees, minutes and seconds; NaN where they are none."""
    parts = gps.get(tag)
    if not isinstance(parts, tuple) or len(parts) != 3:
        return math.nan
    degrees, minutes, seconds = (_number(part) for part in parts)
    value = degrees + minutes / 60 + seconds / 3600
    if str(gps.get(side, "")).upper().startswith(negative):
        value = -value
    return value if abs(value) <= most else math.nan


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _listed(raw: Path, table: Path) -> list[Spot]:
    """Return what a table says; a file that is named twice must be the same twice, and is taken once."""
    folders, spots = Folders(raw), dict[str, Spot]()
    for where, row in _rows(table):
        image = folders.find(_text(row, "file"), where)
        position = math.nan, math.nan
        if _text(row, "lat") or _text(row, "lon"):
            position = read_position((_text(row, "lat"), _text(row, "lon")), image.path, where)
        heading = (
            read_number(_text(row, "heading"), "a heading in degrees", where) % 360 if row.get("heading") else None
        )
        split = _text(row, "split").lower()
        if split and split not in SPLITS:
            raise BadInput(f"{where}: split {split!r}; write train or test, or nothing")
        spot = Spot(image, *position, heading, False, _text(row, "area"), split)
        before = spots.setdefault(image.path, spot)
        if replace(before, image=image) != spot and not math.isnan(spot.latitude + before.latitude):
            raise BadInput(f"{where}: {image.path} contradicts its other line, {before.image.named}; keep one of them")
    splits = {bool(spot.split) for spot in spots.values()}
    if len(splits) > 1:
        bare = next(spot for spot in spots.values() if not spot.split)
        raise BadInput(f"{bare.image.named}: has no split, and others have one; give all of them one, or none")
    return list(spots.values())


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the columns of each row, by our names for them."""
    readers = {".csv": _csv, ".geojson": _geojson, ".json": _geojson, ".parquet": _geoparquet}
    if (reader := readers.get(table.suffix.lower())) is None:
        raise BadInput(f"{table}: no table that is known; make it one of {', '.join(readers)}")
    try:
        data = table.read_bytes()
    except OSError as error:
        raise MissingRaw(f"{table}: cannot read the table ({error.strerror})") from error
    for where, row in reader(data, table):
        named = {str(column).strip().lower(): value for column, value in row.items() if column is not None}
        ours = {name: next((named[one] for one in ways if one in named), None) for name, ways in NAMES.items()}
        if lacking := [name for name in ("file", "lat", "lon") if not any(one in named for one in NAMES[name])]:
            raise BadInput(f"{where}: has no {', '.join(lacking)}; a table has file, lat, lon and, if wanted, more")
        if not _text(ours, "file"):
            raise BadInput(f"{where}: names no file; mend the row")
        yield where, ours


def _csv(data: bytes, table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{table}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    try:
        for row in reader:
            yield f"{table.name}:{reader.line_num}", row
    except csv.Error as error:
        raise BadInput(
            f"{table.name}:{reader.line_num}: no line of comma-separated values ({error}); mend it"
        ) from error


def _geojson(data: bytes, table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        features = json.loads(data)["features"]
        rows = [(one["properties"] or {}, one["geometry"]) for one in features]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{table}: no GeoJSON of features ({error}); save it as a FeatureCollection") from error
    for number, (properties, geometry) in enumerate(rows):
        where = f"{table.name}:feature {number}"
        yield where, {**properties, **_point(geometry and geometry.get("type"), geometry, where)}


def _point(kind: Any, geometry: Any, where: str) -> dict[str, Any]:
    if geometry is None:
        return {"lat": None, "lon": None}
    if kind != "Point" or len(geometry.get("coordinates", ())) < 2:
        raise BadInput(f"{where}: its geometry is no point; photos are taken at one")
    return {"lat": geometry["coordinates"][1], "lon": geometry["coordinates"][0]}


def _geoparquet(data: bytes, table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: Sequence[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{table}: no Parquet file ({' '.join(str(error).split())[:100]})") from error
    for number, row in enumerate(rows):
        where = f"{table.name}:row {number}"
        geometry = row.pop("geometry", None)
        yield where, row if geometry is None else {**row, **_wkb_point(geometry, where)}


def _wkb_point(data: Any, where: str) -> dict[str, Any]:
    from shapely import GEOSException, from_wkb

    try:
        point = from_wkb(data)
    except (GEOSException, TypeError) as error:
        raise BadInput(f"{where}: its geometry is no WKB; save the table as GeoParquet") from error
    if point.geom_type != "Point" or point.is_empty:
        raise BadInput(f"{where}: its geometry is a {point.geom_type}; photos are taken at one point")
    return {"lat": point.y, "lon": point.x}
