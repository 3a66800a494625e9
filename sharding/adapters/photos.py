"""Make places of own photos and any imagery: tiles on a grid, and each photo with the tile that has it in the middle.

The rule is VIGOR's (Zhu, Yang, Chen, VIGOR: Cross-View Image Geo-localization beyond One-to-one Retrieval, CVPR 2021):
tiles overlap by a half; the tile whose centre is nearest to a photo is its positive, the others that show its spot are
its semi-positives. Tiles without a photo stay in the gallery.

Training and test do not touch: no training tile overlaps a test tile. Which is which, a table says for each photo; then
a tile belongs with the photo nearest to it. Otherwise blocks of land decide (:mod:`sharding.tiles.blocks`). Tiles
between the two are left out, with the photos that are nearest to their centres.

A panorama whose heading is known is stored with north in its middle, as the panoramas of VIGOR, CVUSA and CVACT are,
because training turns tile and panorama together. An ordinary photo is stored as it was taken, and its heading is noted
in the place's JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geostream.arrays import Bools, Float64
from geostream.errors import BadInput
from sharding.adapters.photo_lists import Spot, find_photos
from sharding.places import Photo, Place, RawDataset, View, assign_keys
from sharding.raw_path import RawPath
from sharding.tiles.blocks import check_blocks, in_test_block, nearest_row, overlaps_any
from sharding.tiles.grid import Grid, Shown, tiles_of
from sharding.tiles.region import TILE_SIZE, Tiles, lay_tiles, work_folder
from sharding.tiles.source import describe

PHOTO_SIZE, PANORAMA_SIZE = (384, 384), (384, 768)
BLOCK_SIDES = 5  # sides of a tile that a block of land has, where nobody says
IMAGERY, REGION = ("imagery", "imagery.tif"), "region.geojson"  # looked for in the folder where nobody names others


def read_places(
    raw: RawPath,
    *,
    tiles: str | None = None,
    region: str | None = None,
    metres: float = 60.0,
    overlap: float = 0.5,
    table: str | None = None,
    test_share: float = 0.2,
    block_metres: float | None = None,
) -> RawDataset:
    """Read a folder of photos, and lay tiles over their region.

    Args:
        raw: the folder of photos, and of folders of them.
        tiles: a GeoTIFF, a folder of them, an XYZ template or a STAC search; None: ``imagery`` in the folder.
        region: a GeoJSON file of polygons; None: ``region.geojson`` in the folder.
        metres: side of a tile on the ground.
        overlap: share of its side that a tile has in common with the next one.
        table: CSV, GeoJSON or GeoParquet that says where photos were taken; None: their EXIF does.
        test_share: share of the blocks of land that are for testing, where no table has a split.
        block_metres: side of these blocks; None: five times a tile's.

    Returns:
        The places. Photos without coordinates are left out, and count as broken.

    Raises:
        BadInput: an option, the region or the imagery makes no sense; photos and region lie apart; or no photo is left
            to train or to test on.
        MissingRaw: a folder or file is missing.
        StoreError: a server of imagery refuses, or does not answer.
    """
    if not isinstance(raw, Path):
        raise BadInput(f"{raw}: photos are read from a local folder; copy them, or name them in a table of pairs")
    grid, block = Grid(metres, overlap), block_metres or BLOCK_SIDES * metres
    check_blocks(block, test_share, metres)
    source, borders = tiles or _imagery(raw), Path(region) if region else raw / REGION
    spots, without, said = find_photos(raw, Path(table) if table else None, Path(source))
    if not spots:
        hint = f"none of {len(without)} photos has coordinates; name a table that has them with --table"
        raise BadInput("; ".join((f"{raw}: {hint}", *said)))
    position = np.array([(spot.latitude, spot.longitude) for spot in spots])
    laid = lay_tiles(source, borders, grid, None, work_folder())
    shown = tiles_of(position, grid, laid.cells)
    _check_meet(position, shown, laid, raw)
    is_given = bool(spots[0].split)
    division = _divide_as_given(spots, position, shown, laid) if is_given else _divide(laid, block, test_share)
    areas = _areas(spots, position, laid)
    taken = np.array(
        [
            tile >= 0 and bool(division.kept[tile]) and spot.split in ("", division.split(int(tile)))
            for spot, tile in zip(spots, shown.nearest.tolist(), strict=True)
        ]
    )
    notes = [*said, *laid.notes, *_notes(spots, shown, taken, division, laid)]
    places = _places(spots, shown, taken, laid, division, areas)
    if not any(view.split == "test" for place in places for view in place.views):
        how = (
            "mend the table" if is_given else f"choose blocks below {block:g} m with --block-metres, or another region"
        )
        raise BadInput(f"{raw}: no photo is left to test on; {how}")
    panoramas = sum(spot.is_panorama for spot in spots)
    return RawDataset(
        adapter="photos",
        root=raw,
        options={
            "metres": metres,
            "overlap": overlap,
            "test_share": None if is_given else test_share,
            "block_metres": None if is_given else block,
        },
        coordinates="latlon",
        tile_size=TILE_SIZE,
        view_size=PANORAMA_SIZE if 2 * panoramas > len(spots) else PHOTO_SIZE,
        places=tuple(places),
        notes=tuple(notes),
        left_out=tuple(without),
        source=laid.source.facts,
        tile_metres=float(metres),
    )


def _imagery(raw: Path) -> str:
    found = next((raw / name for name in IMAGERY if (raw / name).exists()), None)
    if found is None:
        raise BadInput(
            f"{raw}: say where the tiles come from with --tiles: a GeoTIFF, an XYZ template or a STAC search"
        )
    return str(found)


def _check_meet(position: Float64, shown: Shown, laid: Tiles, raw: Path) -> None:
    """Raise BadInput where no photo stands in the region."""
    if (shown.nearest >= 0).any():
        return
    south, west = position.min(axis=0)
    north, east = position.max(axis=0)
    boxes = laid.grid.boxes(laid.centres)
    there = (*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0))
    exchanged = tiles_of(position[:, ::-1], laid.grid, laid.cells).nearest >= 0
    hint = "; latitude and longitude are exchanged" if exchanged.any() else ""
    raise BadInput(
        f"{raw}: no photo was taken in the region: photos {describe((west, south, east, north))}; tiles of {laid.name} "
        f"{describe(there)}{hint}"
    )


@dataclass(frozen=True)
class Division:
    """Say which tiles are for testing, and which are kept.

    Attributes:
        test: (N,) the tile is for testing.
        kept: (N,) it is a test tile, or a training tile that overlaps none.
    """

    test: Bools
    kept: Bools

    def split(self, tile: int) -> str:
        """Return the split of a tile."""
        return "test" if self.test[tile] else "train"


def _apart(laid: Tiles, test: Bools) -> Division:
    boxes = laid.grid.boxes(laid.centres)
    kept = test.copy()
    kept[~test] = ~overlaps_any(boxes[~test], boxes[test])
    return Division(test, kept)


def _divide(laid: Tiles, block: float, test_share: float) -> Division:
    return _apart(laid, in_test_block(laid.centres, block, test_share))


def _divide_as_given(spots: list[Spot], position: Float64, shown: Shown, laid: Tiles) -> Division:
    """Divide tiles as the photos nearest to them are; the positive of a test photo is for testing in any case."""
    of_spot = np.array([spot.split == "test" for spot in spots])
    test = of_spot[nearest_row(laid.centres, position)]
    test[shown.nearest[of_spot & (shown.nearest >= 0)]] = True
    return _apart(laid, test)


def _areas(spots: list[Spot], position: Float64, laid: Tiles) -> tuple[str, ...]:
    """Return the area of each tile: that of the photo nearest to it where a table names areas, else the region's."""
    if not any(spot.area for spot in spots):
        return laid.areas
    if bare := next((spot for spot in spots if not spot.area), None):
        raise BadInput(f"{bare.image.named}: has no area, and others have one; give all of them one, or none")
    return tuple(spots[row].area for row in nearest_row(laid.centres, position).tolist())


def _notes(spots: list[Spot], shown: Shown, taken: Bools, division: Division, laid: Tiles) -> list[str]:
    outside = int((shown.nearest < 0).sum())
    between = int((~taken).sum()) - outside
    gap = int((~division.kept).sum())
    turned = sum(spot.is_panorama and spot.heading is None for spot in spots)
    said = {
        f"{outside} photos were taken outside the region's tiles and were left out": outside,
        f"{gap} tiles between training and test were left out, and {between} photos with them": gap or between,
        f"{turned} panoramas have no heading: they are stored as they are, and north is not in their middle": turned,
        f"imagery: {laid.source.facts['name']}": 1,
    }
    return [text for text, count in said.items() if count]


def _places(
    spots: list[Spot], shown: Shown, taken: Bools, laid: Tiles, division: Division, areas: tuple[str, ...]
) -> list[Place]:
    """Return the kept tiles as places, with the photos that are nearest to their centres."""
    images = laid.images()
    keys = assign_keys((area, image.path) for area, image in zip(areas, images, strict=True))
    key = [keys[area, image.path] for area, image in zip(areas, images, strict=True)]
    views: dict[int, list[View]] = {}
    for number in np.flatnonzero(taken).tolist():
        spot, tile = spots[number], int(shown.nearest[number])
        others = shown.others.indices[shown.others.indptr[number] : shown.others.indptr[number + 1]].tolist()
        semi = tuple(sorted(key[other] for other in others if division.kept[other]))
        is_turned = spot.is_panorama and spot.heading is not None
        image = Photo(
            spot.image.path, spot.image.named, spot.image.present, heading=spot.heading if is_turned else None
        )
        heading = 0.0 if is_turned else spot.heading
        view = View(image, division.split(tile), spot.latitude, spot.longitude, semi, heading)
        views.setdefault(tile, []).append(view)
    return [
        Place(key[n], areas[n], (division.split(n),), images[n], latitude, longitude, tuple(views.get(n, ())))
        for n, (latitude, longitude) in enumerate(laid.centres.tolist())
        if division.kept[n]
    ]
