"""Render cities as the raw folders of VIGOR, CVUSA, CVACT and University-1652.

Each folder has the files that the data set publishes, so its adapter reads rendered and real ones alike. All files
follow from the seed and do not depend on the number of workers. The world is easier than the real one
(:mod:`sharding.simcity.map`). The layouts are described in :mod:`sharding.simcity.vigor`, :mod:`sharding.simcity.pairs`
and :mod:`sharding.simcity.university`. Beside their files lies ``simcity.json``: the settings that they were rendered
from.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from joblib import cpu_count

from geostream.errors import BadInput
from geostream.progress import Bar
from sharding.simcity.layouts import LAYOUTS, RawLayout, cities_of, raw_layout
from sharding.simcity.map import City, look_alike, plan_city
from sharding.simcity.plan import CitySpec, RawPlan, Town
from sharding.simcity.shots import PITCH, Block, Look, blocks, render_block
from sharding.simcity.view import FAR
from sharding.workers import in_order

FORMAT = 2


@dataclass(frozen=True)
class RenderSummary:
    """Count what lies in the raw folder.

    Attributes:
        cities: how many.
        tiles: of all cities.
        empty_tiles: those without a view.
        views: of all cities.
        seconds: that the call took.
        fresh: false where it lay there already.
    """

    cities: int
    tiles: int
    empty_tiles: int
    views: int
    seconds: float
    fresh: bool


def render_cities(
    raw: Path,
    cities: Sequence[CitySpec],
    *,
    seed: int,
    adapter: str = "vigor",
    tile_size: int = 64,
    view_size: tuple[int, int] | None = None,
    jpeg_quality: int = 92,
    workers: int | None = None,
    **options: Any,
) -> RenderSummary:
    """Render cities into a folder, which appears only when it is whole.

    Rendering again what is there already returns at once.

    Args:
        raw: the folder.
        cities: which, and how large.
        seed: of all that is random.
        adapter: whose raw layout it is.
        tile_size: pixels of a tile's side.
        view_size: height and width of a view in pixels, the width a multiple of 4; None: the layout's own.
        jpeg_quality: of JPEG files.
        workers: processes; None: one a core.
        options: the layout's: see ``plan_vigor``, ``plan_cvusa``, ``plan_cvact``, ``plan_university``.

    Raises:
        BadInput: the settings make no sense, or the folder holds something else than they give.
    """
    started = time.monotonic()
    layout = raw_layout(adapter)
    view_size = layout.view_size if view_size is None else view_size
    _check(cities, tile_size, view_size)
    workers = cpu_count() if workers is None else workers
    if workers < 1:
        raise BadInput(f"workers {workers}: at least one process must render")
    options = {name: value for name, value in _all_options(adapter, layout, options).items() if value is not None}
    settings = {
        "format": FORMAT,
        "adapter": adapter,
        "seed": seed,
        # What is not given is left out, so that folders are known again that were rendered before it could be.
        "cities": [{name: value for name, value in asdict(city).items() if value is not None} for city in cities],
        "tile_size": tile_size,
        "view_size": list(view_size),
        "jpeg_quality": jpeg_quality,
        **options,
    }
    found = _find(raw, settings)
    if found is not None:
        return RenderSummary(len(cities), **found, seconds=time.monotonic() - started, fresh=False)

    towns = [_town(spec, cities, seed) for spec in cities]
    plan = layout.plan(towns, np.random.default_rng([seed, zlib.crc32(adapter.encode())]), **options)
    counts = {"tiles": plan.tiles, "empty_tiles": plan.empty_tiles, "views": plan.views}
    raw = raw.absolute()
    partial = _partial(raw)
    _write_lists(partial, plan)
    look = Look(tile_size, view_size, jpeg_quality)
    tasks = [
        block
        for town, scenes in zip(towns, plan.scenes, strict=True)
        for block in blocks(partial, town.city, scenes, look)
    ]
    with Bar("rendering", sum(len(scene.shots) for scenes in plan.scenes for scene in scenes)) as bar:
        for images in _run(tasks, workers):
            bar.advance(images)
    (partial / "simcity.json").write_text(json.dumps({"settings": settings, "counts": counts}, indent=1))
    fresh = True
    try:
        partial.rename(raw)  # an empty folder is replaced
    except OSError:  # somebody was faster
        shutil.rmtree(partial)
        if _find(raw, settings) is None:
            raise
        fresh = False
    return RenderSummary(len(cities), **counts, seconds=time.monotonic() - started, fresh=fresh)


def _partial(raw: Path) -> Path:
    """Return the folder that this process alone renders into; remove those that killed processes left here."""
    before = f".{raw.name}.simcity-{socket.gethostname()}-"
    for left in raw.parent.glob(f"{escape(before)}*"):
        process = left.name.removeprefix(before)
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    partial = raw.with_name(f"{before}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier process with the same id
    return partial


def _check(cities: Sequence[CitySpec], tile_size: int, view_size: tuple[int, int]) -> None:
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
        if city.like is not None and (city.like, city.rows, city.columns, None) not in map(astuple, cities):
            raise BadInput(
                f"city {city.name} is like {city.like}: name a city that is rendered with it, has as many rows and "
                "columns, and is like no other"
            )
    if tile_size < 16 or min(view_size) < 16 or view_size[1] % 4:
        raise BadInput(f"tile_size {tile_size}, view_size {view_size}: at least 16 pixels, view width a multiple of 4")


def _all_options(adapter: str, layout: RawLayout, given: dict[str, Any]) -> dict[str, Any]:
    """Return the planner's options, given or by default; raise BadInput for one that it does not have."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(layout.plan).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    if unknown := sorted(set(given) - set(known)):
        raise BadInput(f"{adapter} is rendered without {', '.join(unknown)}; it has {', '.join(known)}")
    return known | given


def _find(raw: Path, settings: dict[str, Any]) -> dict[str, int] | None:
    """Return the counts of a finished render by the same settings; None where the folder is free; else BadInput."""
    if not raw.exists() or (raw.is_dir() and not any(raw.iterdir())):
        return None
    marker = raw / "simcity.json"
    if not marker.is_file():
        raise BadInput(f"{raw} holds something else than a rendered city: name a new or an empty folder")
    stored = json.loads(marker.read_text())
    before = stored["settings"]
    other = [key for key in sorted(before.keys() | settings.keys()) if before.get(key) != settings.get(key)]
    if other:
        raise BadInput(f"{raw} was rendered with other settings ({', '.join(other)}): remove it or name a new folder")
    counts: dict[str, int] = stored["counts"]
    return counts


def _town(spec: CitySpec, cities: Sequence[CitySpec], seed: int) -> Town:
    """Return the city with its map, which reaches as far beyond its tiles as anyone sees."""
    rng = _generator(spec, seed)
    if spec.like is None:
        return Town(spec, _map(spec, rng), rng)
    original = next(city for city in cities if city.name == spec.like)
    return Town(spec, look_alike(_map(original, _generator(original, seed)), rng), rng)


def _generator(spec: CitySpec, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(spec.name.encode())])


def _map(spec: CitySpec, rng: np.random.Generator) -> City:
    reach = PITCH + FAR + 10
    east, north = spec.extent
    return plan_city((-reach, -reach, east + reach, north + reach), rng)


def _write_lists(folder: Path, plan: RawPlan) -> None:
    """Write the lists and tables, and make the folders that images go to."""
    images = {
        Path(file).parent for scenes in plan.scenes for scene in scenes for shot in scene.shots for file in shot.files
    }
    for parent in sorted(images | {Path(path).parent for path in plan.files}):
        (folder / parent).mkdir(parents=True, exist_ok=True)
    for path, content in plan.files.items():
        (folder / path).write_bytes(content)


def _run(tasks: list[Block], workers: int) -> Iterator[int]:
    """Render the blocks and yield the number of images of each; few blocks are rendered in this process."""
    yield from in_order(render_block, tasks, 1 if len(tasks) < 4 else min(workers, len(tasks)))


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    """Run ``python -m sharding.simcity RAW --adapter university1652 --size demo --seed 1``."""
    parser = argparse.ArgumentParser(description="Render cities in a dataset's raw layout.")
    parser.add_argument("raw", type=Path, help="the folder to make")
    parser.add_argument("--adapter", choices=list(LAYOUTS), default="vigor")
    parser.add_argument("--size", choices=("small", "demo"), default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tile-size", type=int, default=64, help="pixels")
    parser.add_argument("--view-size", type=int, nargs=2, default=None, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="option of the layout")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    args = parser.parse_args()
    try:
        cities, options = cities_of(args.adapter, args.size)
        options = options | dict(_option(text) for text in args.set)
        summary = render_cities(
            args.raw,
            cities,
            seed=args.seed,
            adapter=args.adapter,
            tile_size=args.tile_size,
            view_size=args.view_size and tuple(args.view_size),
            workers=args.workers,
            **options,
        )
    except BadInput as error:
        raise SystemExit(f"simcity: {error}") from None
    print(
        f"{args.raw}: {summary.views} views, {summary.tiles} tiles ({summary.empty_tiles} without a view) of "
        f"{summary.cities} cities, {'rendered' if summary.fresh else 'found'} in {summary.seconds:.1f} s"
    )
