"""Preview the augmentation: training pairs, plain and as the network is given them, with a compass drawn on both.

The pairs go through the same code as in training, with the random values that the epoch draws for them. The compass
goes through the same turn as the pictures. So if tile and panorama were not turned together, the preview would show it.
Each pair costs two small reads from the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from geostream.errors import GeostreamError
from geostream.layout import Layout
from geostream.layout.members import read_image
from geostream.settings import TrainSettings
from geostream.streaming.decode import decode_image
from geostream.streaming.pipeline import ImageSizes
from geostream.training.augment import KINDS, Augmentation, Pixels, augment_on_device, turn

TILE_SIDE, VIEW_WIDTH = 120, 300  # pixels on the page


class Mark(NamedTuple):
    """Tell where a point of the compass is on a pair's pictures, as fractions of their width and height.

    Attributes:
        tile: x and y of the middle of an edge of the tile.
        view: x in the panorama, 0 ≤ x < 1. None if the view is no panorama, or a narrowed one, which looks anywhere.
    """

    tile: tuple[float, float]
    view: float | None


@dataclass(frozen=True)
class PreviewPair:
    """Hold a training pair before and after augmentation.

    Attributes:
        name: Place and view.
        plain: Pictures before, by ``"tile"`` and ``"view"``: (H, W, 3) in uint8, in the size that the network takes.
        changed: Pictures after, likewise.
        marks: Compass of the changed pictures, by ``"N"`` and ``"E"``.
        changes: What was done, in words: to the ``"pair"`` together, to ``"tile"`` and to ``"view"``.
    """

    name: str
    plain: dict[str, Pixels]
    changed: dict[str, Pixels]
    marks: dict[str, Mark]
    changes: dict[str, str]


def preview_pairs(layout: Layout, settings: TrainSettings, *, count: int = 12, epoch: int = 1) -> list[PreviewPair]:
    """Return pairs of the training split before and after augmentation.

    Args:
        layout: Layout to read the pairs from.
        settings: The run's settings.
        count: Number of pairs, spread evenly over the split.
        epoch: Epoch whose random values are used.

    Returns:
        The pairs. One with a damaged image is left out.

    Raises:
        BadInput: The layout's views cannot be turned as the settings ask.
    """
    pairs = layout.pairs("train")
    drawn, sizes = Augmentation.of(settings, epoch, len(pairs)), ImageSizes.of(settings)
    found = []
    for pair in np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int)).tolist():
        place, number = int(pairs.place[pair]), int(pairs.view[pair])
        try:
            tile = _decoded(read_image(layout, place), sizes.tile)
            view = _decoded(read_image(layout, place, number), sizes.view)
        except GeostreamError:
            continue
        name = f"{layout.key(place)} view-{number:02d}"
        found.append(preview_pair(name, tile, view, pair, drawn))
    return found


def preview_pair(name: str, tile: Pixels, view: Pixels, pair: int, drawn: Augmentation) -> PreviewPair:
    """Augment one pair as training does.

    Args:
        name: Place and view.
        tile: The tile, (H, W, 3) in uint8.
        view: The view, likewise.
        pair: Index of the pair among those of ``drawn``.
        drawn: Random values of an epoch.
    """
    sample = drawn({"tile": tile, "view": view, "pair": pair})
    tensors = {column: torch.from_numpy(np.array(value))[None] for column, value in sample.items()}
    tensors |= {kind: tensors[kind].permute(0, 3, 1, 2) for kind in KINDS}
    views, tiles = augment_on_device(tensors, drawn.settings)
    panorama = drawn.settings.augment.view_kind == "panorama"
    return PreviewPair(
        name=name,
        plain={"tile": tile, "view": view},
        changed={"tile": _pixels(tiles), "view": _pixels(views)},
        marks=compass(bool(drawn.flip[pair]), int(drawn.turns[pair]), panorama and not drawn.settings.augment.narrows),
        changes={"pair": _moves(drawn, pair)} | {kind: _changes(drawn, pair, k) for k, kind in enumerate(KINDS)},
    )


def compass(flip: bool = False, turns: int = 0, panorama: bool = True) -> dict[str, Mark]:
    """Return where north and east of a tile and its view are after mirroring and turning.

    A picture of each mark goes through :func:`~geostream.training.augment.turn`, so that the compass shows what that
    function does, not what it should do.

    Args:
        flip: Whether tile and view are mirrored.
        turns: Number of quarter turns to the left.
        panorama: Whether the view is a panorama, which turns with the tile.

    Returns:
        The marks by ``"N"`` and ``"E"``.
    """
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


def preview_rows(pairs: Sequence[PreviewPair]) -> list[dict[str, Any]]:
    """Return what the template ``augmentations.html`` shows of each pair, with the pictures as small JPEGs.

    Args:
        pairs: Pairs before and after augmentation.
    """
    return [
        {
            "name": pair.name,
            "plain": _shown(pair.plain),
            "plain_marks": compass(panorama=pair.marks["N"].view is not None),
            "changed": _shown(pair.changed),
            "marks": pair.marks,
            "changes": pair.changes,
        }
        for pair in pairs
    ]


def _shown(images: Mapping[str, Pixels]) -> dict[str, dict[str, Any]]:
    """Return the pictures as JPEGs of twice the size on the page, for sharp screens, beside that size in pixels."""
    shown = {}
    for kind, image in images.items():
        height, width = image.shape[:2]
        scale = min(TILE_SIDE / height, (TILE_SIDE if kind == "tile" else VIEW_WIDTH) / width)
        height, width = round(height * scale), round(width * scale)
        small = Image.fromarray(image)
        small.thumbnail((2 * width, 2 * height))
        jpeg = simplejpeg.encode_jpeg(np.asarray(small), 80, "RGB", colorsubsampling="420")
        shown[kind] = {"jpeg": jpeg, "width": width, "height": height}
    return shown


def _moves(drawn: Augmentation, pair: int) -> str:
    flip, turns = drawn.flip[pair], int(drawn.turns[pair])
    words = ["mirrored"] * bool(flip) + [f"turned left by {90 * turns}°"] * bool(turns)
    return " and ".join(words) or "neither mirrored nor turned"


def _changes(drawn: Augmentation, pair: int, k: int) -> str:
    """Say what is done to picture k of the pair by itself."""
    words = [f"JPEG {drawn.quality[pair, k]}"] * bool(drawn.quality[pair, k])
    words += ["colour"] * bool((drawn.colour[pair, k] != (1, 1, 1, 0)).any())
    words += [["blurred"], ["sharpened"]][drawn.focus[pair, k] - 1] if drawn.focus[pair, k] else []
    words += [["grid"], ["rectangles"]][drawn.holes[pair, k] - 1] if drawn.holes[pair, k] else []
    return ", ".join(words)


def _decoded(data: bytes, size: tuple[int, int]) -> Pixels:
    return decode_image(data, np.empty((*size, 3), np.uint8))


def _pixels(images: Tensor) -> Pixels:
    """Return the first image, (1, 3, H, W) in 0…1, as (H, W, 3) in uint8."""
    return images[0].mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
