"""Own photos and a GeoTIFF to a committed layout, against a plain loop of rasterio and Pillow on as many processes.

Both cut the same tiles of 384 pixels from one GeoTIFF in UTM, turn and resize the same photos to 384 × 768, and store
JPEGs of quality 90. The loop does what one writes first: for each tile a window of the raster, opened once a process as
a warped VRT; for each photo ``ImageOps.exif_transpose`` and ``resize`` by Lanczos; each result a file. geostream does
more in its time: it lays the grid, reads EXIF, finds positives, checks every photo, orders, writes tars, an index and
checksums. Photos are of 1024 × 2048 pixels with the detail of real ones. Repeats run in fresh processes, one after the
other, in changing order; on a machine that does other things, too, images per second of processor time say more.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from joblib import cpu_count
from PIL import Image, ImageOps

from tests.benchmarks.measure import Result, ratio, run

SOUTH, WEST = 47.07, 15.43
METRES, PIXEL = 60.0, 0.15  # side of a tile, and of the raster's pixels
SIDE = 4096  # pixels of the raster
PHOTOS, REPEATS, SEED = 1000, 5, 0
TILE, VIEW = (384, 384), (384, 768)  # height, width
HOW = {"metres": METRES, "block_metres": 300.0, "test_share": 0.34}


def make_raw(folder: Path, photos: int) -> None:
    """Write a raster of the land, its region and photos with EXIF."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.warp import transform

    from sharding.simcity.geotiff import ExifJpeg

    rng = np.random.default_rng(SEED)
    [east], [north] = transform("EPSG:4326", "EPSG:32633", [WEST], [SOUTH])
    land = _detailed(rng, SIDE, SIDE)
    where = from_origin(east, north + SIDE * PIXEL, PIXEL, PIXEL)
    options: dict[str, Any] = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": "EPSG:32633", "tiled": True}
    options |= {"compress": "jpeg", "photometric": "ycbcr", "blockxsize": 512, "blockysize": 512}
    (folder / "photos").mkdir(parents=True)
    with rasterio.open(folder / "imagery.tif", "w", width=SIDE, height=SIDE, transform=where, **options) as raster:
        raster.write(np.moveaxis(land, -1, 0))
    edge = SIDE * PIXEL
    corners = [(90.0, 90.0), (edge - 90, 90.0), (edge - 90, edge - 90), (90.0, edge - 90), (90.0, 90.0)]
    xs, ys = transform("EPSG:32633", "EPSG:4326", *zip(*((east + x, north + y) for x, y in corners), strict=True))
    geometry = {"type": "Polygon", "coordinates": [list(zip(xs, ys, strict=True))]}
    (folder / "region.geojson").write_text(json.dumps(geometry))
    pool = [_detailed(rng, 1024, 2048) for _ in range(4)]
    at = rng.uniform(100, edge - 100, (photos, 2))
    longitudes, latitudes = transform("EPSG:32633", "EPSG:4326", east + at[:, 0], north + at[:, 1])
    for number, (longitude, latitude) in enumerate(zip(longitudes, latitudes, strict=True)):
        picture = np.roll(pool[number % len(pool)], int(rng.integers(2048)), axis=1)
        data = ExifJpeg(latitude, longitude, float(number % 360), False).encode(picture, 90)
        (folder / "photos" / f"{number:05d}.jpg").write_bytes(data)


def _detailed(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a picture whose spectrum falls as that of real ones does."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    bands = [
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, s=(height, width)) for _ in "rgb"
    ]
    return np.clip(128 + 40 * np.stack([band / band.std() for band in bands], axis=-1), 0, 255).astype(np.uint8)


def ours(raw: Path, out: Path, workers: int) -> int:
    """Write the committed layout; return its number of images."""
    from geostream.store import Store
    from sharding import read_places, shard

    places = read_places("photos", raw, **HOW)
    layout = shard(places, Store.open(out), "photos", workers=workers).layout
    return layout.n_places + sum(layout.info["pairs"].values())


def plain(raw: Path, out: Path, workers: int, listing: Path) -> int:
    """Write each image as a file; return their number."""
    out.mkdir()
    images = json.loads(listing.read_text())
    with ProcessPoolExecutor(workers) as pool:
        return sum(pool.map(partial(_plain, raw, out), range(len(images)), images, chunksize=16))


def _plain(raw: Path, out: Path, number: int, image: dict[str, Any]) -> int:
    if "photo" in image:
        with Image.open(raw / image["photo"]) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB").resize(VIEW[::-1], Image.Resampling.LANCZOS)
    else:
        from rasterio.enums import Resampling
        from rasterio.windows import from_bounds

        seen = _warped(str(raw / "imagery.tif"))
        window = from_bounds(*image["box"], transform=seen.transform)
        bands = seen.read([1, 2, 3], window=window, out_shape=(3, *TILE), resampling=Resampling.bilinear)
        picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(bands, 0, -1)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    (out / f"{number}.jpg").write_bytes(buffer.getvalue())
    return 1


@lru_cache(1)
def _warped(path: str) -> Any:
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    return WarpedVRT(rasterio.open(path), crs="EPSG:3857", resampling=Resampling.bilinear)


def write_listing(raw: Path, listing: Path) -> int:
    """Write what the plain loop is told: the very tiles and photos that geostream stores; return how many."""
    from sharding import read_places
    from sharding.places import TileImage
    from sharding.tiles.source import mercator_box

    images: list[dict[str, Any]] = []
    for place in read_places("photos", raw, **HOW).places:
        assert isinstance(place.tile, TileImage)
        images.append({"box": mercator_box(place.tile.box)})
        images += [{"photo": view.image.path} for view in place.views]
    listing.write_text(json.dumps(images))
    return len(images)


def figures(photos: int = PHOTOS, repeats: int = REPEATS, workers: int | None = None) -> dict[str, Any]:
    """Measure both, and return geostream's images per second in relation to the plain loop's."""
    workers = workers or cpu_count()
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    costs: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="geostream-photos-") as folder:
        raw, out, listing = Path(folder, "raw"), Path(folder, "out"), Path(folder, "listing.json")
        make_raw(raw, photos)
        images = write_listing(raw, listing)
        for repeat in range(repeats):
            for name in ("ours", "plain") if repeat % 2 else ("plain", "ours"):
                command = [sys.executable, "-m", "tests.benchmarks.locate_photos", name, str(raw), str(out)]
                result: Result = run([*command, str(workers), str(listing)], os.environ)
                shutil.rmtree(out)
                if result["images"] != images:
                    raise ValueError(f"{name} stored {result['images']} of {images} images")
                rates[name].append(images / result["seconds"])
                costs[name].append(images / result["cpu_s"])
    return {
        "photos_of_plain_loop": ratio(rates["ours"], rates["plain"], ">= 1.5")
        | {"images": images, "workers": workers, "images_per_s": rates},
        "photos_cpu_of_plain_loop": ratio(costs["ours"], costs["plain"], ">= 1.5"),
    }


def main(name: str, raw: str, out: str, workers: str, listing: str) -> None:
    """Run one contestant, and print what it took."""
    cpu, begin = sum(os.times()[:4]), time.perf_counter()
    if name == "ours":
        images = ours(Path(raw), Path(out), int(workers))
    else:
        images = plain(Path(raw), Path(out), int(workers), Path(listing))
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "images": images, "cpu_s_before": cpu}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        print(json.dumps(figures(), indent=1))
