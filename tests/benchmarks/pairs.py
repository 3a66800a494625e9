"""Pairs of JPEGs in one local file: what the peers' own formats are written from, and what is decoded from memory.

Imports nothing but numpy, so that a peer's virtual environment with other versions can read it, too.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt


class Pairs:
    """Opened pairs; an item is (tile, view), each the bytes of a JPEG."""

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        self.sizes: npt.NDArray[np.int64] = np.load(folder / "sizes.npy")  # (P, 2)
        self._ends = np.cumsum(self.sizes)
        with (folder / "pairs.bin").open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> tuple[bytes, bytes]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        middle, end = (int(at) for at in self._ends[2 * number : 2 * number + 2])
        start = middle - int(self.sizes[number, 0])
        return self._data[start:middle], self._data[middle:end]

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return (self[number] for number in range(len(self)))

    @property
    def n_bytes(self) -> int:
        return int(self.sizes.sum())


def write_pairs(folder: Path, pairs: Iterable[tuple[bytes, bytes]]) -> Pairs:
    folder.mkdir(parents=True)
    sizes = []
    with (folder / "pairs.bin").open("wb") as file:
        for tile, view in pairs:
            file.write(tile)
            file.write(view)
            sizes.append((len(tile), len(view)))
    np.save(folder / "sizes.npy", np.array(sizes, dtype=np.int64))
    return Pairs(folder)
