"""End the demo as a user would go on: index the tiles, locate photos of unseen cities, and keep what the page needs.

The demo's S3 server ends with it. So the index and the layout of its tiles are copied to a local folder, from which
``geostream locate`` and ``geostream serve`` answer photos later.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image

from geostream.store import Store
from sharding.simcity.geotiff import sexagesimal

if TYPE_CHECKING:
    from geostream.locating.index import Index
    from geostream.locating.locate import Answer
    from geostream.runs.run import Run

NAME = "demo"
PHOTOS = 3
CITIES = ("Chicago", "SanFrancisco")  # that the demo does not train on


def index_and_locate(run: Run, raw: Path, out: Path) -> list[Answer]:
    """Index the tiles of the unseen cities, copy what answering needs to ``out/store``, and locate photos from there.

    Args:
        run: The trained run.
        raw: The rendered cities.
        out: The demo's folder, which gets ``photos`` and ``store``.
    """
    from geostream.locating.locate import Locator
    from geostream.locating.make import make_index
    from geostream.locating.photos import read_photo, taken_at

    index, _ = make_index(run, None, run.layout, NAME, split="test")
    kept = Store.open(out / "store")
    keep_index(index, kept)
    paths = write_photos(raw, out / "photos")
    images = [read_photo(path) for path in paths]
    names = [str(path) for path in paths]
    return Locator.open(kept).answer(images, names, truths=[taken_at(image) for image in images])


def keep_index(index: Index, to: Store) -> None:
    """Copy an index and the layout of its tiles to another store; ``index.json`` goes last.

    Args:
        index: The index.
        to: The root of the other store.
    """
    dataset, layout = index.layout.dataset, index.layout
    layouts, folder = to.child(dataset, "layouts"), to.child(dataset, "indexes", NAME)
    for path in layout.shard_paths:
        layouts.write(path, layout.shards_store.read(path))
    for path in [*layout.info["index"], "layout.json"]:
        layouts.write(f"{layout.name}/{path}", layout.store.read(path))
    paths = sorted((one.path for one in index.folder.list()), key=lambda path: path == "index.json")
    for path in paths:
        folder.write(path, index.folder.read(path))


def write_photos(raw: Path, folder: Path) -> list[Path]:
    """Copy some panoramas of the unseen cities, with where they were taken as EXIF data; return their paths.

    Args:
        raw: The rendered cities, whose panoramas have that in their names.
        folder: Where the copies go.
    """
    found = [path for city in CITIES for path in sorted((raw / city / "panorama").glob("*.jpg"))]
    folder.mkdir()
    written: list[Path] = []
    for path in found[len(found) // (2 * PHOTOS) :: len(found) // PHOTOS][:PHOTOS]:
        _, latitude, longitude, _ = path.name.split(",")
        exif = Image.Exif()
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        for value, sides, side, degrees in (
            (float(latitude), "NS", ExifTags.GPS.GPSLatitudeRef, ExifTags.GPS.GPSLatitude),
            (float(longitude), "EW", ExifTags.GPS.GPSLongitudeRef, ExifTags.GPS.GPSLongitude),
        ):
            gps[side], gps[degrees] = sides[value < 0], sexagesimal(abs(value))
        buffer = io.BytesIO()
        with Image.open(path) as image:
            image.save(buffer, "JPEG", quality="keep", exif=exif)
        written.append(folder / f"{path.parent.parent.name}-{len(written) + 1}.jpg")
        written[-1].write_bytes(buffer.getvalue())
    return written
