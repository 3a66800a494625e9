"""Find photos and where they were taken: by what cameras write into the files (EXIF), or by a table.

A table is CSV, GeoJSON or GeoParquet (:mod:`sharding.adapters.table_rows`). It names each photo's ``file`` below the
folder of photos, and has ``lat`` and ``lon`` in degrees (or a point as geometry). The columns ``heading``, ``area`` and
``split`` may be there. The position 0, 0 is none: receivers write it while they know nothing yet.

The header of every photo is read, not its picture: its size tells whether it is a panorama (twice as wide as high). The
heading is EXIF's GPSImgDirection; a panorama may have it in XMP instead (Google's GPano:PoseHeadingDegrees).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from geostream.errors import BadInput
from geostream.images import exif_tags, gps_position
from sharding.adapters.raw_files import Folders, list_folder, read_number, read_position, readable_name
from sharding.adapters.table_rows import POSITION, Row, read_table
from sharding.places import IMAGE_SUFFIX, Broken, RawImage

OPENERS = 8  # photos whose headers are read at the same time
NAMES = {  # how the columns of a table may be called
    "file": ("file", "path", "photo", "filename"),
    **POSITION,
    "heading": ("heading",),
    "area": ("area",),
    "split": ("split",),
}
NOT_READ = re.compile(r"\.(heic|heif|avif|webp|tiff?|dng|jxl|jp2|bmp|gif)$", re.IGNORECASE)  # pictures, but not for us
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


class Found(NamedTuple):
    """Hold the photos of a folder.

    Attributes:
        spots: those with coordinates, by path.
        without: those without, which cannot be placed.
        notes: what a person should know.
    """

    spots: list[Spot]
    without: list[Broken]
    notes: tuple[str, ...]


class Header(NamedTuple):
    """Hold what a photo's header says; NaN and None: nothing."""

    latitude: float = math.nan
    longitude: float = math.nan
    heading: float | None = None
    is_panorama: bool = False


def find_photos(raw: Path, table: Path | None, imagery: Path | None = None) -> Found:
    """Return the photos of a folder, with and without coordinates.

    Args:
        raw: the folder.
        table: that says where they were taken; None: the photos do.
        imagery: file or folder of the tiles, which holds no photos that were forgotten.

    Raises:
        MissingRaw: the folder or the table is missing.
        BadInput: the table is malformed, or there is no photo.
    """
    if table is not None:
        spots, notes = _listed(raw, table)
    else:
        files = sorted(_files(raw))
        spots = [Spot(RawImage(path, raw.name)) for path in files if IMAGE_SUFFIX.search(path)]
        notes = _not_read(raw, files, imagery)
    if not spots:
        raise BadInput("; ".join((f"{table or raw}: no photo (.jpg or .png); name a folder that holds some", *notes)))
    with ThreadPoolExecutor(OPENERS) as threads:
        headers = list(threads.map(partial(_header, raw), (spot.image for spot in spots)))
    found, without = [], []
    for spot, header in zip(spots, headers, strict=True):
        heading = header.heading if spot.heading is None else spot.heading
        spot = replace(spot, heading=heading, is_panorama=header.is_panorama)
        if table is None:
            spot = replace(spot, latitude=header.latitude, longitude=header.longitude)
        if math.isnan(spot.latitude):
            reason = (
                "no coordinates (GPS) in its EXIF" if table is None else "no coordinates in the table (0, 0 is none)"
            )
            without.append(Broken(spot.image.path, spot.image.named, reason))
        else:
            found.append(spot)
    return Found(sorted(found, key=lambda spot: spot.image.path), without, notes)


def _files(root: Path) -> Iterator[str]:
    """Yield the paths below a folder of all files in it and in its folders.

    Each folder is read once, however many links lead to it, and by its own name where it has one below the root.
    """
    seen, folders, links = set[str](), [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        for entry in list_folder(folder):
            path = Path(entry.path)
            readable_name(entry)
            if path.is_dir():  # false for a link to itself, of which the entry would raise
                (links if path.is_symlink() else folders).append(path)
            else:
                yield path.relative_to(root).as_posix()


def _not_read(raw: Path, files: Sequence[str], imagery: Path | None) -> tuple[str, ...]:
    """Return a note of the pictures that are of no kind that can be read."""
    own = None if imagery is None else imagery.resolve()
    left = [path for path in files if NOT_READ.search(path)]
    left = [path for path in left if own is None or not (raw / path).resolve().is_relative_to(own)]
    if not left:
        return ()
    kinds = ", ".join(sorted({path.rpartition(".")[2].lower() for path in left}))
    return (f"{len(left)} pictures were not read ({kinds}; {left[0]} is one); convert them to JPEG to have them",)


def _header(root: Path, image: RawImage) -> Header:
    """Return what a photo's header says; nothing where it cannot be read, which is told when it is encoded."""
    if not image.present:
        return Header()
    try:
        with Image.open(root / image.path, formats=("JPEG", "PNG")) as photo:
            gps = exif_tags(photo, ExifTags.IFD.GPSInfo)
            width, height = photo.size[::-1] if _lies(photo) else photo.size
            found = XMP_HEADING.search(photo.info.get("xmp") or b"")
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, Image.DecompressionBombError):
        return Header()
    north, east = gps_position(gps) or (math.nan, math.nan)
    heading = _number(gps.get(ExifTags.GPS.GPSImgDirection))
    if math.isnan(heading) and found:
        heading = _number(found[1])
    is_panorama = abs(width - 2 * height) <= 0.01 * width
    return Header(north, east, None if math.isnan(heading) else heading % 360, is_panorama)


def _lies(photo: Image.Image) -> bool:
    """Return whether the camera was held upright, so that the stored picture lies on its side."""
    try:
        return photo.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF data, of which Pillow raises almost anything
        return False


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _listed(raw: Path, table: Path) -> tuple[list[Spot], tuple[str, ...]]:
    """Return what a table says, and notes; rows of one file must agree, and it is taken once."""
    folders, spots = Folders(raw), dict[str, Spot]()
    said = read_table(table, NAMES, ("file", "lat", "lon"))
    for where, row in said.rows:
        if not row["file"]:
            raise BadInput(f"{where}: names no file; mend the row")
        spot = _spot(folders.find(row["file"], where), row, where)
        before = spots.setdefault(spot.image.path, spot)
        spots[spot.image.path] = _joined(before, spot, where)
    splits = {bool(spot.split) for spot in spots.values()}
    if len(splits) > 1:
        bare = next(spot for spot in spots.values() if not spot.split)
        raise BadInput(f"{bare.image.named}: has no split, and others have one; give all of them one, or none")
    return list(spots.values()), ((f"columns not used: {', '.join(said.unused)}",) if said.unused else ())


def _spot(image: RawImage, row: Row, where: str) -> Spot:
    """Return what a row says of a photo."""
    position = math.nan, math.nan
    if row["lat"] or row["lon"]:
        position = read_position((row["lat"], row["lon"]), image.path, where)
    if position == (0, 0):
        position = math.nan, math.nan
    text = row.get("heading", "")
    heading = read_number(text, "a heading in degrees", where) % 360 if text else None
    split = row.get("split", "").lower()
    if split and split not in SPLITS:
        raise BadInput(f"{where}: split {split!r}; write train or test, or nothing")
    return Spot(image, *position, heading, False, row.get("area", ""), split)


def _joined(one: Spot, other: Spot, where: str) -> Spot:
    """Return what two rows say of one photo; raise BadInput where both say something, and not the same."""
    joined = {}
    for name in (field.name for field in fields(Spot) if field.name != "image"):
        first, second = getattr(one, name), getattr(other, name)
        is_blank = first in (None, "") or first != first  # NaN
        joined[name] = second if is_blank else first
        if not is_blank and second not in (None, "", first) and second == second:
            raise BadInput(f"{where}: {one.image.path} contradicts its other line, {one.image.named}; keep one of them")
    return replace(one, **joined)
