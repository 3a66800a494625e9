"""The hard cities of the recipe benchmark: rendered with what makes VIGOR hard, sharded by the product's writer.

- Views stand up to a quarter of the tile's side off its centre, and tiles overlap by half, so that three semi-positives
  show each view besides its tile. A seventh of the tiles has no view; a quarter of the others has several.
- Cities come in pairs that look alike: the same streets, lots and trees, and three in ten buildings painted anew. So
  every view of a city has a double in the gallery, many tiles away.
- One in twenty training views has a position that is wrong by 50 m, and the labels of that position, as in data whose
  tiles were found by GPS: its positive is a tile which at best shows the spot in a corner, its own tile is a negative.
  What geographic neighbours it has is wrong, too. Test cities are right, so the figures are.

Each seed has cities of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.simcity import CitySpec
from tests.benchmarks.payoff_city import Cities, render_and_shard

TILE, VIEW = (64, 64), (48, 192)  # height and width in pixels
MISPLACED = 0.05


@dataclass(frozen=True)
class Size:
    """Rows and columns of every city, how many pairs of cities there are, and how they are trained on."""

    train: tuple[int, int]
    train_pairs: int
    test: tuple[int, int]
    test_pairs: int
    shard_bytes: int
    resident_shards: int
    epochs: int


SIZES = {
    "full": Size((20, 20), 4, (20, 20), 4, 2**19, 10, 4),  # about 3,500 training pairs, 3,500 queries, 3,200 tiles
    "quick": Size((6, 6), 1, (5, 5), 1, 2**15, 3, 1),  # does it work at all?
}


def hard_cities(size: Size) -> Cities:
    """The cities of a size, without their seed."""
    train = pairs_of_cities("Train", size.train, size.train_pairs)
    test = pairs_of_cities("Test", size.test, size.test_pairs)
    misplaced = {city.name: MISPLACED for city in train}
    return Cities(train, test, TILE, VIEW, size.shard_bytes, {"misplaced": misplaced})


def pairs_of_cities(name: str, size: tuple[int, int], pairs: int) -> list[CitySpec]:
    """Cities of which each second one looks like the one before."""
    return [
        city
        for n in range(pairs)
        for city in (CitySpec(f"{name}{n:02d}A", *size), CitySpec(f"{name}{n:02d}B", *size, like=f"{name}{n:02d}A"))
    ]


def prepare(folder: Path, size: Size, seed: int, workers: int) -> dict[str, Any]:
    """The hard cities of ``seed``, in the local store ``folder/store``."""
    return render_and_shard(folder, hard_cities(size), seed, workers)
