"""A raw VIGOR folder that grows and changes between two shardings, for tests."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from geostream.layout import Layout
from sharding import RawDataset, ShardOptions, read_places
from tests.vigor_raw import CORNERS, STEP, jpeg, png

SMALL = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000)
Spot = tuple[str, int]  # a city, and a number in it
Member = tuple[str, str, int]


@dataclass
class Folder:
    """What a raw folder holds: for each spot the version of its tile, and of each of its panoramas by number."""

    root: Path
    tiles: dict[Spot, int] = field(default_factory=dict)
    views: dict[Spot, dict[int, int]] = field(default_factory=dict)
    written: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    clock: int = 1_700_000_000

    def add(self, city: str, numbers: range, views: int = 1) -> Folder:
        for number in numbers:
            self.tiles[city, number] = 0
            self.views[city, number] = dict.fromkeys(range(views), 0)
        return self

    def tile_path(self, spot: Spot) -> str:
        north, east = CORNERS[spot[0]]
        return f"{spot[0]}/satellite/satellite_{north + spot[1] * STEP:.10f}_{east:.10f}.png"

    def view_path(self, spot: Spot, view: int) -> str:
        north, east = CORNERS[spot[0]]
        return f"{spot[0]}/panorama/p{spot[1]:03d}_{view},{north + spot[1] * STEP:.6f},{east + view * 1e-5:.6f},.jpg"

    def write(self) -> Path:
        """Write what has changed, with a later time, and remove what is gone."""
        wanted = {self.tile_path(spot): ("tile", spot[1], version) for spot, version in self.tiles.items()}
        for spot, views in self.views.items():
            wanted |= {self.view_path(spot, view): (f"view{view}", spot[1], v) for view, v in views.items()}
        for path in self.written.keys() - wanted.keys():
            (self.root / path).unlink()
        for path in sorted(wanted):
            if wanted[path] != self.written.get(path):
                self.put(path, self.picture(path, wanted[path]))
        self.written = wanted
        for city in {city for city, _ in self.tiles}:
            self._lists(city)
        return self.root

    def put(self, path: str, data: bytes) -> None:
        """Write a raw file, with a time later than that of any before."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)
        self.clock += 1
        os.utime(self.root / path, (self.clock, self.clock))

    def spoil(self, *paths: str) -> None:
        """Replace raw files by garbage of the same size and time: whoever opens them makes something else of them."""
        for path in paths:
            file = self.root / path
            before = file.stat()
            file.write_bytes(bytes(before.st_size))
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    @staticmethod
    def picture(path: str, what: tuple[str, int, int]) -> bytes:
        rng = np.random.default_rng(list(repr((path.split("/")[0], *what)).encode()))
        return png(rng, (20, 20)) if what[0] == "tile" else jpeg(rng, (16, 32))

    def _lists(self, city: str) -> None:
        splits = self.root / "splits" / city
        splits.mkdir(parents=True, exist_ok=True)
        spots = sorted(spot for spot in self.tiles if spot[0] == city)
        tiles = {spot: self.tile_path(spot).rpartition("/")[2] for spot in spots}
        lines = []
        for at, spot in enumerate(spots):
            shown = [spots[(at + step) % len(spots)] for step in range(4)]
            for view in sorted(self.views[spot]):
                columns = " ".join(f"{tiles[one]} 1.0 1.0" for one in shown)
                lines.append(f"{self.view_path(spot, view).rpartition('/')[2]} {columns}")
        (splits / "satellite_list.txt").write_text("\n".join(tiles.values()) + "\n")
        (splits / "pano_label_balanced.txt").write_text("\n".join(lines) + "\n")
        (splits / "same_area_balanced_train.txt").write_text("\n".join(line for line in lines if "_0," in line) + "\n")
        (splits / "same_area_balanced_test.txt").write_text("\n".join(line for line in lines if "_1," in line) + "\n")

    def read(self, train: str = "NewYork", test: str = "Chicago", **options: str) -> RawDataset:
        """Write the folder, and read it as places; cities are separated by "+"."""
        cities = {"train_cities": train.split("+"), "test_cities": test.split("+")}
        return read_places("vigor", self.write(), **cities, **options)


def members(layout: Layout) -> set[Member]:
    """The key, name and checksum of each member."""
    keys = layout.keys
    return {(keys[row["place"]], row["member"], row["crc32c"]) for row in layout.members.to_pylist()}
