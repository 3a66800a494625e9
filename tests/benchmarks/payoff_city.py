"""The cities that the payoff benchmark trains on and is tested on: rendered, then sharded by the product's own writer.

Decides the regime: panoramas within a tenth of the tile's side of its centre, because hard negatives pay once random
batches have become easy, and on VIGOR's own geometry a network this small never gets there in minutes. Every tile has
one panorama where there is room for it, so that places and pairs are nearly the same. Twenty cities to train on,
because with ten random access gained less, and five resident shards held six batches only; ten to be tested on, because
differences of a hundredth are looked for. Each seed has cities of its own; rendering them takes about three minutes of
one core.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from sharding.simcity import render_cities
from sharding.simcity.plan import CitySpec
from tests.benchmarks.measure import Failed

DATASET = "simcity"
TILE, VIEW = (64, 64), (48, 192)  # height and width in pixels
MAX_OFFSET = 0.1


@dataclass(frozen=True)
class Size:
    """Rows and columns of each city, how many there are, and what is streamed of them."""

    train: tuple[int, int]
    train_cities: int
    test: tuple[int, int]
    test_cities: int
    shard_bytes: int
    resident_shards: int  # of the streamed contestant


SIZES = {
    "full": Size((23, 23), 20, (23, 24), 10, 2**19, 10),  # about 10,100 training places, 5,500 tiles in the gallery
    "tiny": Size((9, 9), 2, (6, 6), 2, 2**15, 3),  # 150 places: does it work at all?
}


@dataclass(frozen=True)
class Cities:
    """What is rendered, for training and for testing, and how it is sharded."""

    train: list[CitySpec]
    test: list[CitySpec]
    tile: tuple[int, int]
    view: tuple[int, int]
    shard_bytes: int
    rendering: dict[str, Any]  # options of the renderer


def prepare(folder: Path, size: Size, seed: int, workers: int) -> dict[str, Any]:
    """The payoff's cities of ``seed``, in the local store ``folder/store``; see :func:`render_and_shard`."""
    cities = Cities(
        [CitySpec(f"Train{n:02d}", *size.train) for n in range(size.train_cities)],
        [CitySpec(f"Test{n:02d}", *size.test) for n in range(size.test_cities)],
        TILE,
        VIEW,
        size.shard_bytes,
        {"max_offset": MAX_OFFSET, "empty_share": 0.0, "extra_view_share": 0.0},
    )
    return render_and_shard(folder, cities, seed, workers)


def render_and_shard(folder: Path, cities: Cities, seed: int, workers: int) -> dict[str, Any]:
    """Render the cities by ``seed`` and shard them into the local store ``folder/store``; at once where that is done.

    Returns what was made: pairs, places, shards and bytes. Raises Failed where other cities were made there.
    """
    done = folder / "city.json"
    what = json.loads(json.dumps(asdict(cities) | {"seed": seed}))
    if not done.exists():
        raw, all_cities = folder / "raw", cities.train + cities.test
        sizes: dict[str, Any] = {"tile_size": cities.tile[0], "view_size": cities.view}
        render_cities(raw, all_cities, seed=seed, workers=workers, **sizes, **cities.rendering)
        names = {
            "train_cities": [city.name for city in cities.train],
            "test_cities": [city.name for city in cities.test],
        }
        options = ShardOptions(tile_size=cities.tile, view_size=cities.view, shard_bytes=cities.shard_bytes)
        places = read_places("vigor", raw, **names)
        layout = shard(places, Store.open(folder / "store"), DATASET, options=options, workers=workers).layout
        shutil.rmtree(raw)
        facts = {name: layout.info[name] for name in ("places", "pairs", "bytes")}
        done.write_text(json.dumps(facts | {"shards": len(layout.shard_names), "of": what}))
    made: dict[str, Any] = json.loads(done.read_text())
    if made.pop("of", what) != what:  # a folder of before it was noted is taken as it is
        raise Failed(f"{done}: of other cities; name another folder to keep results in, or delete {folder}")
    return made
