"""The cities of the recipe benchmark: rendered, and sharded by the product's own writer.

The hard ones have what makes VIGOR hard. Each seed has cities of its own.

- Views stand up to a quarter of the tile's side off its centre, and tiles overlap by half, so that three semi-positives
  show each view besides its tile. A seventh of the tiles has no view; half of the others have several.
- Cities come in pairs that look alike: the same streets, lots and trees, and every second building painted anew. So
  every view of a city has a double in the gallery, in another city.
- One in twenty training views has a position that is wrong by 50 m, and the labels of that position, as in data whose
  tiles were found by GPS: its positive is a tile which at best shows the spot in a corner, its own tile is a negative.
  What geographic neighbours it has is wrong, too. Test cities are right, so the figures are.

The easy ones are those that the first weights are trained on, as a real encoder has seen ImageNet: views within a tenth
of the tile's side of its centre, one a tile, all positions right, no two cities alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.simcity import CitySpec
from tests.benchmarks.payoff_city import Cities, render_and_shard

TILE, VIEW = (48, 48), (32, 128)  # height and width in pixels
MISPLACED = 0.05
FIRST_SEED = 1000  # of the easy cities


@dataclass(frozen=True)
class Size:
    """How many cities of each kind, their rows and columns, and how they are trained on."""

    train: tuple[int, int]
    train_pairs: int
    test: tuple[int, int]
    test_pairs: int
    epochs: int
    easy: tuple[int, int]
    easy_cities: int
    easy_epochs: int
    batch_size: int
    shard_bytes: int
    resident_shards: int


SIZES = {
    # About 6,000 training pairs on 4,000 tiles; 3,200 queries and 2,166 tiles in the gallery.
    "full": Size((20, 20), 5, (19, 19), 3, 8, (23, 23), 15, 12, 32, 2**18, 10),
    "quick": Size((7, 7), 1, (5, 5), 1, 1, (8, 8), 2, 1, 8, 2**16, 8),  # does it work at all?
}


def hard_cities(size: Size) -> Cities:
    """The cities of a size, without their seed."""
    train = pairs_of_cities("Train", size.train, size.train_pairs)
    test = pairs_of_cities("Test", size.test, size.test_pairs)
    rendering = {"misplaced": {city.name: MISPLACED for city in train}, "extra_view_share": 0.5}
    return Cities(train, test, TILE, VIEW, size.shard_bytes, rendering)


def pairs_of_cities(name: str, size: tuple[int, int], pairs: int) -> list[CitySpec]:
    """Cities of which each second one looks like the one before."""
    return [
        city
        for n in range(pairs)
        for city in (CitySpec(f"{name}{n:02d}A", *size), CitySpec(f"{name}{n:02d}B", *size, like=f"{name}{n:02d}A"))
    ]


def easy_cities(size: Size) -> Cities:
    """The cities that the first weights are trained on; a single one tells how far they got."""
    train = [CitySpec(f"Easy{n:02d}", *size.easy) for n in range(size.easy_cities)]
    rendering = {"max_offset": 0.1, "empty_share": 0.0, "extra_view_share": 0.0}
    return Cities(train, [CitySpec("EasyTest", *size.easy)], TILE, VIEW, size.shard_bytes, rendering)


def prepare(folder: Path, size: Size, seed: int | None, workers: int) -> dict[str, Any]:
    """The hard cities of ``seed``, or the easy ones (None), in the local store ``folder/store``."""
    cities, seed = (easy_cities(size), FIRST_SEED) if seed is None else (hard_cities(size), seed)
    return render_and_shard(folder, cities, seed, workers)
