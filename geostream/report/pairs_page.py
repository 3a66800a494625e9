"""Show pairs of a layout on one page, with the spot where each query was taken drawn on its tile, and a scale bar.

Wrong coordinates show here in a minute, and not after a week of training: swapped latitude and longitude, tiles of
another grid, a slipped column. The table counts all pairs, by area. The pictures are those that lie farthest from their
tile's middle, and some that are spread evenly over the layout; each pair costs two reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from geostream.layout import Layout
from geostream.layout.layout import PLACES_FILE
from geostream.layout.members import read_image
from geostream.report.pages import render
from geostream.report.retrievals import thumbnail
from geostream.report.spots import Spots, find_spots, pick_spots, scale_bar

FARTHEST, SPREAD = 6, 12  # pairs shown of each kind
PIXELS = 320  # of a picture's longer side
EDGE = 0.47  # of the side: how far from the middle a mark is drawn at most
WINDS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")


@dataclass(frozen=True)
class ShownPair:
    """Hold a pair as the page shows it.

    Attributes:
        key: of the place.
        area: of the place.
        view: number of the view.
        tile: JPEG.
        query: JPEG.
        x: of the spot, in percent of the tile's side from its left edge; of one outside where the way to it leaves the
            tile; None: unknown.
        y: the same from the upper edge.
        distance: metres from the tile's middle; None: unknown.
        wind: the way from the middle, such as "NE"; "": unknown.
        outside: the spot lies outside the tile.
        bar: metres of the scale bar; None: the tile's side is unknown.
        bar_percent: its length in percent of the tile's side.
    """

    key: str
    area: str
    view: int
    tile: bytes
    query: bytes
    x: float | None
    y: float | None
    distance: float | None
    wind: str
    outside: bool
    bar: float | None
    bar_percent: float


def pairs_page(layout: Layout) -> str:
    """Return the page as HTML.

    Args:
        layout: the layout.

    Raises:
        StoreError: a shard cannot be read.
    """
    spots = find_spots(layout)
    rows = pick_spots(spots, FARTHEST, SPREAD)
    far = min(FARTHEST, int((~np.isnan(spots.distance)).sum()))
    shown = [pair for row in rows.tolist() if (pair := _shown(layout, spots, row)) is not None]
    number = {row: at for at, row in enumerate(rows.tolist())}
    return render(
        "pairs.html",
        title=f"Pairs of {layout.dataset} {layout.name}",
        table=area_table(layout, spots),
        pairs=len(spots.place),
        outside=int(spots.outside.sum()),
        with_sides=bool((~np.isnan(spots.side)).any()),
        with_spots=bool((~np.isnan(spots.distance)).any()),
        far=shown[: min(far, len(number))],
        spread=shown[min(far, len(number)) :],
        imagery=layout.source,
    )


def area_table(layout: Layout, spots: Spots) -> list[dict[str, Any]]:
    """Return a row for each area: how many pairs, how far queries are from their tile's middle, and how many outside.

    Args:
        layout: the layout.
        spots: of all its pairs.
    """
    names = sorted({area for part in layout.index.parts(PLACES_FILE, ["area"]) for area in part["area"].to_pylist()})
    area, rows = layout.area[spots.place], []
    for number, name in enumerate(names):
        of_area = area == number
        if not of_area.any():
            continue
        distance = spots.distance[of_area]
        distance = distance[~np.isnan(distance)]
        side = spots.side[of_area]
        quantiles = np.quantile(distance, (0.5, 0.95, 1.0)).tolist() if len(distance) else [None] * 3
        rows.append(
            {
                "area": name,
                "pairs": int(of_area.sum()),
                "without a spot": int(of_area.sum()) - len(distance),
                "side of a tile, m": None if np.isnan(side).all() else _metres(float(np.nanmedian(side))),
                "median, m": _metres(quantiles[0]),
                "95 %, m": _metres(quantiles[1]),
                "farthest, m": _metres(quantiles[2]),
                "outside": None if np.isnan(side).all() else int(spots.outside[of_area].sum()),
            }
        )
    return rows


def _metres(value: float | None) -> str | None:
    return None if value is None else f"{value:,.1f}"


def _shown(layout: Layout, spots: Spots, row: int) -> ShownPair | None:
    """Return a pair as it is shown; None where one of its images cannot be decoded."""
    place, view = int(spots.place[row]), int(spots.view[row])
    try:
        tile, query = (thumbnail(read_image(layout, place, one), PIXELS) for one in (None, view))
    except (OSError, SyntaxError, ValueError):  # raised by Pillow for damaged images
        return None
    [facts] = layout.index.read(PLACES_FILE, ["key", "area"], place, place + 1).to_pylist()
    (east, north), side = spots.offset[row].tolist(), float(spots.side[row])
    known, scaled = not np.isnan(east), not np.isnan(side)
    bar = scale_bar(side) if scaled else None
    reach = min(1.0, EDGE * side / max(abs(east), abs(north), 1e-9)) if known and scaled else 0.0
    return ShownPair(
        key=facts["key"],
        area=facts["area"],
        view=view,
        tile=tile,
        query=query,
        x=50 + 100 * reach * east / side if reach else None,
        y=50 - 100 * reach * north / side if reach else None,
        distance=float(np.hypot(east, north)) if known else None,
        wind=WINDS[round(np.degrees(np.arctan2(east, north)) / 45) % 8] if known else "",
        outside=bool(spots.outside[row]),
        bar=bar,
        bar_percent=100 * bar / side if bar else 0.0,
    )
