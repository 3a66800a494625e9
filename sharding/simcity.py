"""Renders cities in VIGOR's raw layout: data for the demo and the tests, where nobody has VIGOR at hand.

Decision: what is written is what VIGOR publishes, file for file, so the one adapter (`sharding.vigor`) reads both and
no code knows a rendered city from a real one. Everything follows from the seed: a city does not depend on its
neighbours in the list, nor a file on the number of workers. The cost: an easier world than the real one (see
`sharding.simcity_map`), and by `max_offset` an easier geometry where one asks for it.

    <raw>/<City>/panorama/<id>,<lat>,<lon>,.jpg      <raw>/<City>/satellite/satellite_<lat>_<lon>.png
    <raw>/splits/<City>/satellite_list.txt           all tiles, those without a panorama too
    <raw>/splits/<City>/pano_label_balanced.txt      and same_area_balanced_train.txt, same_area_balanced_test.txt
    <raw>/simcity.json                               the settings that it was rendered from
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from geostream.errors import BadInput
from geostream.progress import Bar
from sharding.simcity_map import City, plan_city
from sharding.simcity_plan import PITCH, TILE_METRES, CitySpec, Tile, View, plan_tiles, plan_views, write_splits
from sharding.simcity_raster import rasterise
from sharding.simcity_view import FAR, Rays, cut_tile, look_around

COARSEST = 0.6  # metres a pixel of the map, at most
BLOCK = 12  # tiles: what one task renders is a block of 12 x 12; in smaller ones the edges that they share weigh more
FORMAT = 1
SIZES = {"small": (6, 8, 6, 6), "demo": (60, 60, 22, 22)}  # rows, columns of a training city; of a test city


def vigor_cities(size: str) -> list[CitySpec]:
    """VIGOR's four cities, two for training and two for testing, of a size in `SIZES`."""
    if size not in SIZES:
        raise BadInput(f"no size {size!r}: choose one of {', '.join(SIZES)}")
    rows, columns, test_rows, test_columns = SIZES[size]
    train = [CitySpec(name, rows, columns) for name in ("NewYork", "Seattle")]
    return train + [CitySpec(name, test_rows, test_columns) for name in ("Chicago", "SanFrancisco")]


@dataclass(frozen=True)
class RenderSummary:
    """What lies in the raw folder; `fresh` is false where it lay there already."""

    cities: int
    tiles: int
    empty_tiles: int
    views: int
    seconds: float
    fresh: bool


@dataclass(frozen=True)
class _Look:
    """The sizes that every image is rendered at."""

    tile_size: int
    view_size: tuple[int, int]
    jpeg_quality: int

    @property
    def metres(self) -> float:
        """Side of the map's pixels: a whole fraction of the tile's, an even number of them a tile."""
        fold = max(1, math.ceil(TILE_METRES / self.tile_size / COARSEST))
        return TILE_METRES / (self.tile_size * (fold + self.tile_size * fold % 2))


@dataclass(frozen=True)
class _Block:
    """One task: a window of the city, and the tiles and views to render from it."""

    folder: Path
    city: City
    area: tuple[float, float, float, float]
    tiles: list[Tile]
    views: list[View]
    look: _Look


def render_cities(
    raw: Path,
    cities: Sequence[CitySpec],
    *,
    seed: int,
    tile_size: int = 64,
    view_size: tuple[int, int] = (48, 192),
    max_offset: float = 0.25,
    empty_share: float = 0.15,
    extra_view_share: float = 0.25,
    jpeg_quality: int = 92,
    workers: int | None = None,
) -> RenderSummary:
    """Render `cities` into the folder `raw`, which appears only when it is whole.

    tile_size: pixels of a tile's side. view_size: height and width of a panorama, the width a multiple of 4 (quarter
    turns must be whole columns). max_offset: how far a panorama may stand from its tile's centre, north or east, in
    shares of the tile's side; VIGOR: 0.25, less is easier. empty_share: tiles that are left without a panorama on
    purpose (a few more are, where the middle of the tile is built over). extra_view_share: probability that a tile
    with a panorama has a second, and one with two a third. workers: processes, by default one a core.

    Rendering again what is there already returns at once. Raises BadInput for settings that make no sense, and when
    `raw` holds something else than these settings give.
    """
    started = time.monotonic()
    _check(cities, tile_size, view_size, max_offset, empty_share, extra_view_share)
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise BadInput(f"workers {workers}: at least one process must render")
    settings = {
        "format": FORMAT,
        "seed": seed,
        "cities": [asdict(city) for city in cities],
        "tile_size": tile_size,
        "view_size": list(view_size),
        "max_offset": max_offset,
        "empty_share": empty_share,
        "extra_view_share": extra_view_share,
        "jpeg_quality": jpeg_quality,
    }
    found = _find(raw, settings)
    if found is not None:
        return RenderSummary(len(cities), **found, seconds=time.monotonic() - started, fresh=False)

    raw = raw.absolute()
    partial = raw.with_name(f".{raw.name}.simcity-partial")
    if partial.exists():  # a render that was killed
        shutil.rmtree(partial)
    look = _Look(tile_size, view_size, jpeg_quality)
    counts = {"tiles": 0, "empty_tiles": 0, "views": 0}
    blocks: list[_Block] = []
    for spec in cities:
        rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        reach = PITCH + FAR + 10
        area = (-reach, -reach, (spec.columns - 1) * PITCH + reach, (spec.rows - 1) * PITCH + reach)
        city = plan_city(area, rng)
        tiles = plan_tiles(spec)
        views = plan_views(spec, city, tiles, max_offset, empty_share, extra_view_share, rng)
        if not any(views):
            raise BadInput(f"city {spec.name} has room for no panorama: raise rows, columns or max_offset")
        write_splits(partial / "splits" / spec.name, tiles, [view for at_tile in views for view in at_tile], rng)
        for kind in ("panorama", "satellite"):
            (partial / spec.name / kind).mkdir(parents=True)
        blocks += _blocks(partial / spec.name, spec, city, tiles, views, look)
        counts["tiles"] += len(tiles)
        counts["empty_tiles"] += sum(not at_tile for at_tile in views)
        counts["views"] += sum(len(at_tile) for at_tile in views)

    with Bar("rendering", counts["tiles"] + counts["views"]) as bar:
        for images in _run(blocks, workers):
            bar.advance(images)
    (partial / "simcity.json").write_text(json.dumps({"settings": settings, "counts": counts}, indent=1))
    if raw.exists():
        raw.rmdir()  # empty, or _find would have complained
    partial.rename(raw)
    return RenderSummary(len(cities), **counts, seconds=time.monotonic() - started, fresh=True)


def _check(
    cities: Sequence[CitySpec], tile_size: int, view_size: tuple[int, int],
    max_offset: float, empty_share: float, extra_view_share: float,
) -> None:  # fmt: skip
    if not cities:
        raise BadInput("no city to render: give at least one CitySpec")
    names = [city.name for city in cities]
    if len(set(names)) < len(names):
        raise BadInput(f"two cities of one name in {names}: give each its own")
    for city in cities:
        if not city.name.isalnum():
            raise BadInput(f"city name {city.name!r}: use letters and digits only, it becomes a folder")
        if city.rows < 2 or city.columns < 2:
            raise BadInput(f"city {city.name} has {city.rows} x {city.columns} tiles: a view needs 2 x 2 around it")
    if tile_size < 16 or min(view_size) < 16 or view_size[1] % 4:
        raise BadInput(f"tile_size {tile_size}, view_size {view_size}: at least 16 pixels, view width a multiple of 4")
    if not 0 < max_offset <= 0.25:
        raise BadInput(f"max_offset {max_offset}: choose more than 0 and at most 0.25 of the tile's side")
    if not 0 <= empty_share < 1 or not 0 <= extra_view_share < 1:
        raise BadInput(f"empty_share {empty_share}, extra_view_share {extra_view_share}: choose from 0 up to below 1")


def _find(raw: Path, settings: dict[str, object]) -> dict[str, int] | None:
    """The counts of a finished render by the same settings; None where the folder is free; else BadInput."""
    if not raw.exists() or (raw.is_dir() and not any(raw.iterdir())):
        return None
    marker = raw / "simcity.json"
    if not marker.is_file():
        raise BadInput(f"{raw} holds something else than a rendered city: name a new or an empty folder")
    stored = json.loads(marker.read_text())
    other = [key for key in settings if stored["settings"].get(key) != settings[key]]
    if other:
        raise BadInput(f"{raw} was rendered with other settings ({', '.join(other)}): remove it or name a new folder")
    counts: dict[str, int] = stored["counts"]
    return counts


def _blocks(
    folder: Path, spec: CitySpec, city: City, tiles: list[Tile], views: list[list[View]], look: _Look
) -> Iterator[_Block]:
    margin = PITCH + FAR + 2
    for j in range(0, spec.rows, BLOCK):
        for i in range(0, spec.columns, BLOCK):
            members = [
                row * spec.columns + column
                for row in range(j, min(j + BLOCK, spec.rows))
                for column in range(i, min(i + BLOCK, spec.columns))
            ]
            xs, ys = [tiles[n].x for n in members], [tiles[n].y for n in members]
            area = (min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin)
            seen = [view for n in members for view in views[n]]
            yield _Block(folder, city.window(area), area, [tiles[n] for n in members], seen, look)


def _run(blocks: list[_Block], workers: int) -> Iterator[int]:
    """Render the blocks; yields the number of images of each. Few blocks don't pay for a pool of processes."""
    if workers == 1 or len(blocks) < 4:
        yield from map(_render, blocks)
        return
    with ProcessPoolExecutor(min(workers, len(blocks)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_render, blocks)


def _render(block: _Block) -> int:
    metres, (height, width) = block.look.metres, block.look.view_size
    west, south = (math.floor(edge / metres) for edge in block.area[:2])
    east, north = (math.ceil(edge / metres) for edge in block.area[2:])
    raster = rasterise(block.city, west, south, north - south, east - west, metres)
    for tile in block.tiles:
        picture = cut_tile(raster, tile.x, tile.y, TILE_METRES, block.look.tile_size)
        Image.fromarray(picture).save(block.folder / "satellite" / tile.name, compress_level=1)
    fold = 2 if height < 128 else 1
    rays = Rays.of(height * fold, width * fold, metres)
    for view in block.views:
        picture = look_around(raster, view.x, view.y, rays, view.light, fold)
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=block.look.jpeg_quality)
        (block.folder / "panorama" / view.name).write_bytes(jpeg)
    return len(block.tiles) + len(block.views)


def main() -> None:
    """`python -m sharding.simcity RAW --size demo --seed 1`."""
    parser = argparse.ArgumentParser(description="Render cities in VIGOR's raw layout.")
    parser.add_argument("raw", type=Path, help="the folder to make")
    parser.add_argument("--size", choices=list(SIZES), default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tile-size", type=int, default=64, help="pixels")
    parser.add_argument("--view-size", type=int, nargs=2, default=(48, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--max-offset", type=float, default=0.25, help="share of the tile's side")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    args = parser.parse_args()
    try:
        summary = render_cities(
            args.raw,
            vigor_cities(args.size),
            seed=args.seed,
            tile_size=args.tile_size,
            view_size=tuple(args.view_size),
            max_offset=args.max_offset,
            workers=args.workers,
        )
    except BadInput as error:
        raise SystemExit(f"simcity: {error}") from None
    print(
        f"{args.raw}: {summary.views} panoramas, {summary.tiles} tiles ({summary.empty_tiles} without a panorama) of "
        f"{summary.cities} cities, {'rendered' if summary.fresh else 'found'} in {summary.seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
