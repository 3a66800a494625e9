"""Tiny raw folders that are named and arranged as VIGOR's, with real PNG and JPEG files, for tests."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

STEP = 0.000328  # degrees between two tiles: VIGOR's
CORNERS = {
    "NewYork": (40.7, -74.0),
    "Seattle": (47.6, -122.3),
    "Chicago": (41.85, -87.7),
    "SanFrancisco": (37.7, -122.45),
}
TWO = {"train_cities": ["NewYork"], "test_cities": ["Chicago"]}  # options of the adapter
Size = tuple[int, int]


@dataclass(frozen=True)
class RawCity:
    """What was written of one city: names as its lists give them."""

    tiles: list[str]
    labels: list[str]  # the lines of pano_label_balanced.txt

    @property
    def panoramas(self) -> list[str]:
        return [line.split()[0] for line in self.labels]


def png(rng: np.random.Generator, size: Size) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(rng, size)).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(rng: np.random.Generator, size: Size) -> bytes:
    return bytes(simplejpeg.encode_jpeg(picture(rng, size), quality=90))


def picture(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Coarse noise: no two alike, and it compresses."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def write_city(
    raw: Path,
    city: str,
    rows: int = 3,
    columns: int = 4,
    *,
    tile_size: Size = (20, 20),
    view_size: Size = (16, 32),
    published: bool = True,
) -> RawCity:
    """Write one city of rows × columns tiles. Two panoramas stand in every third tile, none in the one after it, one in
    the others; the four nearest tiles are its positive and semi-positives. ``published``: VIGOR's own arrangement of
    folders, else that of Sample4Geo's authors.
    """
    rng = np.random.default_rng(sum(city.encode()))
    panorama_folder = raw / city / "panorama" if published else raw / "ground" / city
    tile_folder = raw / city / "satellite" if published else raw / "satellite" / city
    splits = raw / "splits" / city
    for folder in (panorama_folder, tile_folder, splits):
        folder.mkdir(parents=True)
    north, east = CORNERS[city]
    spots = [(row, column) for row in range(rows) for column in range(columns)]
    tiles = {spot: f"satellite_{north + spot[0] * STEP:.10f}_{east + spot[1] * STEP:.10f}.png" for spot in spots}
    labels = []
    for number, (row, column) in enumerate(spots):
        (tile_folder / tiles[row, column]).write_bytes(png(rng, tile_size))
        beside = (row + 1 if row + 1 < rows else row - 1, column + 1 if column + 1 < columns else column - 1)
        shown = [(row, column), (row, beside[1]), (beside[0], column), beside]
        for view in range((2, 0, 1)[number % 3]):
            at = (north + row * STEP, east + column * STEP + view * 1e-5)
            name = f"-5G{city[0]}{number:03d}_{view}T,{at[0]:.6f},{at[1]:.6f},.jpg"
            (panorama_folder / name).write_bytes(jpeg(rng, view_size))
            columns_ = " ".join(f"{tiles[spot]} {12.0 * i} -{3.5 * i}" for i, spot in enumerate(shown))
            labels.append(f"{name} {columns_}")
    (splits / "satellite_list.txt").write_text("\n".join(tiles.values()) + "\n")
    (splits / "pano_label_balanced.txt").write_text("\n".join(labels) + "\n")
    (splits / "same_area_balanced_train.txt").write_text("\n".join(labels[::2]) + "\n")
    (splits / "same_area_balanced_test.txt").write_text("\n".join(labels[1::2]) + "\n")
    return RawCity(list(tiles.values()), labels)


def write_vigor(raw: Path, rows: int = 3, columns: int = 4, **how: object) -> dict[str, RawCity]:
    """All four cities."""
    return {city: write_city(raw, city, rows, columns, **how) for city in CORNERS}  # type: ignore[arg-type]
