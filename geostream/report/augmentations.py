"""A picture sheet of training pairs, each plain and as the network is given it, with the compass drawn on both.

Decides that the sheet shows what training does: a dozen pairs spread evenly over the split go through the same stages,
with the rows that the first epoch draws for them, and the compass goes through the same turn as the pictures. So where
tile and panorama did not turn together, the sheet would show it. It costs two small reads a pair, and half a megabyte
of the report.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from geostream.errors import GeostreamError
from geostream.layout import Layout
from geostream.settings import TrainSettings
from geostream.streaming.decode import decode_image
from geostream.streaming.pipeline import ImageSizes
from geostream.training.augment import KINDS, Augmentation, Pixels, augment_on_device, turn

TILE_SIDE, VIEW_WIDTH, MARGIN, GAP = 120, 300, 18, 10  # pixels on the page
COLOURS = {"N": "#c03028", "E": "#2563a6"}


class Mark(NamedTuple):
    """Where one point of the compass is on a pair's pictures, in shares of their width and height."""

    tile: tuple[float, float]  # x and y of the middle of the tile's edge
    view: float | None  # x in the panorama, 0 ≤ x < 1; None: the view is none


@dataclass(frozen=True)
class SheetPair:
    """A training pair, plain and changed. Pictures are (H, W, 3), of the size that the network takes."""

    name: str
    plain: dict[str, Pixels]  # by "tile" and "view"
    changed: dict[str, Pixels]
    marks: dict[str, Mark]  # of the changed pictures, by "N" and "E"
    changes: dict[str, str]  # in words: of the "pair" together, and of "tile" and "view"


def sheet_pairs(layout: Layout, settings: TrainSettings, *, count: int = 12, epoch: int = 1) -> list[SheetPair]:
    """``count`` pairs spread evenly over the training split, as ``epoch`` has them; a damaged one is left out.

    Raises BadInput where the layout's views cannot be turned as the settings ask.
    """
    pairs = layout.pairs("train")
    drawn, sizes = Augmentation.of(settings, epoch, len(pairs)), ImageSizes.of(settings)
    found = []
    for pair in np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int)).tolist():
        rows = layout.member_rows(pairs.place[[pair]]), layout.member_rows(pairs.place[[pair]], pairs.view[[pair]])
        try:
            tile, view = (_picture(layout, int(row[0]), kind, sizes) for row, kind in zip(rows, KINDS, strict=True))
        except GeostreamError:
            continue
        name = f"{layout.keys[int(pairs.place[pair])]} view-{int(pairs.view[pair]):02d}"
        found.append(sheet_pair(name, tile, view, pair, drawn))
    return found


def sheet_pair(name: str, tile: Pixels, view: Pixels, pair: int, drawn: Augmentation) -> SheetPair:
    """The pictures of pair ``pair`` before and after all that ``drawn`` has for it."""
    sample = drawn({"tile": tile, "view": view, "pair": pair})
    tensors = {column: torch.from_numpy(np.array(value))[None] for column, value in sample.items()}
    tensors |= {kind: tensors[kind].permute(0, 3, 1, 2) for kind in KINDS}
    views, tiles = augment_on_device(tensors, drawn.settings)
    return SheetPair(
        name=name,
        plain={"tile": tile, "view": view},
        changed={"tile": _pixels(tiles), "view": _pixels(views)},
        marks=compass(bool(drawn.flip[pair]), int(drawn.turns[pair]), drawn.settings.augment.view_kind == "panorama"),
        changes={"pair": _moves(drawn, pair)} | {kind: _changes(drawn, pair, k) for k, kind in enumerate(KINDS)},
    )


def compass(flip: bool = False, turns: int = 0, panorama: bool = True) -> dict[str, Mark]:
    """Where north and east of a tile and its view are after :func:`turn`, which moves a picture of each mark here."""
    marks = {}
    for point, (row, column), middle in (("N", (0, 1), 8), ("E", (1, 2), 12)):
        tile, view = np.zeros((3, 3, 3), np.uint8), np.zeros((1, 16, 3), np.uint8)
        tile[row, column] = 255
        view[:, middle - 1 : middle + 1] = 255  # a direction lies between two columns
        tile, view = turn(tile, view, flip, turns, panorama)
        [[y, x]] = np.argwhere(tile[..., 0])
        angles = (np.flatnonzero(view[0, :, 0]) + 0.5) / 16 * 2j * np.pi
        share = round(float(np.angle(np.exp(angles).sum())) / (2 * np.pi) * 16) / 16 % 1.0
        marks[point] = Mark((float(x) / 2, float(y) / 2), share if panorama else None)
    return marks


def sheet_section(pairs: Sequence[SheetPair]) -> str:
    """The pairs as a section of the report's HTML."""
    rows = "".join(_row(pair) for pair in pairs)
    together = "Tile and panorama are mirrored and turned together"
    if pairs and pairs[0].marks["N"].view is None:
        together = "Tile and view are mirrored together, and the tile is turned alone"
    north, east = (f"<b style='color:{colour}'>{point}</b>" for point, colour in COLOURS.items())
    return (
        f"<h2>What the network is given</h2><p>Training pairs, plain and as an epoch changes them. {together}: {north} "
        f"is where north went, {east} where east went. All else is done to each picture by itself.</p>{rows}"
    )


def _row(pair: SheetPair) -> str:
    panorama = pair.marks["N"].view is not None
    pictures, x, changed_at = [], MARGIN, 0
    for images, marks, words in (
        (pair.plain, compass(panorama=panorama), {"tile": pair.name, "view": ""}),
        (pair.changed, pair.marks, {kind: pair.changes[kind] for kind in KINDS}),
    ):
        changed_at = x
        for kind in KINDS:
            height, width = images[kind].shape[:2]
            shown = min(TILE_SIDE / height, (TILE_SIDE if kind == "tile" else VIEW_WIDTH) / width)
            size = round(width * shown), round(height * shown)
            pictures.append(_svg_picture(images[kind], kind, marks, (x, MARGIN), size, words[kind]))
            x += size[0] + GAP + MARGIN
    height = TILE_SIDE + 2 * MARGIN + 30
    moves = f"<text x={changed_at} y={height - 8} font-weight=bold>{pair.changes['pair']}</text>"
    return (
        f"<svg viewBox='0 0 {x} {height}' width={x} font-family=sans-serif font-size=11 fill='#666'>"
        f"{''.join(pictures)}{moves}</svg>"
    )


def _svg_picture(
    image: Pixels, kind: str, marks: dict[str, Mark], at: tuple[int, int], size: tuple[int, int], words: str
) -> str:
    """A picture at ``at`` of the row, the compass drawn over its edge, words below."""
    (x, y), (width, height) = at, size
    small = Image.fromarray(image)
    small.thumbnail((2 * width, 2 * height))
    data = base64.b64encode(simplejpeg.encode_jpeg(np.asarray(small), 80, "RGB", colorsubsampling="420")).decode()
    area = f"x={x} y={y} width={width} height={height} preserveAspectRatio=none"
    parts = [f"<image {area} href='data:image/jpeg;base64,{data}'/>"]
    for point, mark in marks.items():
        if kind == "tile":
            end = x + mark.tile[0] * width, y + mark.tile[1] * height
            begin = x + width / 2, y + height / 2
            outward = mark.tile[0] - 0.5, mark.tile[1] - 0.5
        elif mark.view is not None:
            end = x + mark.view * width, y
            begin = end[0], y + height
            outward = 0.0, -0.5
        else:
            continue
        line = f"x1={begin[0]:.1f} y1={begin[1]:.1f} x2={end[0]:.1f} y2={end[1]:.1f}"
        label = end[0] + 20 * outward[0], end[1] + 20 * outward[1] + 4
        parts.append(
            f"<line {line} stroke='{COLOURS[point]}' stroke-width=1.5 />"
            f"<text x={label[0]:.1f} y={label[1]:.1f} text-anchor=middle font-size=13 font-weight=bold "
            f"fill='{COLOURS[point]}'>{point}</text>"
        )
    parts.append(f"<text x={x} y={y + TILE_SIDE + MARGIN + 8}>{html.escape(words)}</text>")
    return "".join(parts)


def _moves(drawn: Augmentation, pair: int) -> str:
    flip, turns = drawn.flip[pair], int(drawn.turns[pair])
    words = ["mirrored"] * bool(flip) + [f"turned left by {90 * turns}°"] * bool(turns)
    return " and ".join(words) or "neither mirrored nor turned"


def _changes(drawn: Augmentation, pair: int, k: int) -> str:
    """What picture k of the pair is put through by itself."""
    words = [f"JPEG {drawn.quality[pair, k]}"] * bool(drawn.quality[pair, k])
    words += ["colour"] * bool((drawn.colour[pair, k] != (1, 1, 1, 0)).any())
    words += [["blurred"], ["sharpened"]][drawn.focus[pair, k] - 1] if drawn.focus[pair, k] else []
    words += [["grid"], ["rectangles"]][drawn.holes[pair, k] - 1] if drawn.holes[pair, k] else []
    return ", ".join(words)


def _picture(layout: Layout, row: int, kind: str, sizes: ImageSizes) -> Pixels:
    member = layout.members.slice(row, 1).to_pylist()[0]
    data = layout.store.read_range(layout.shard_names[member["shard"]], member["offset"], member["size"])
    return decode_image(data, np.empty((*getattr(sizes, kind), 3), np.uint8))


def _pixels(images: Tensor) -> Pixels:
    """The first image (1, 3, H, W) in 0…1 as (H, W, 3)."""
    return images[0].mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
