"""Augment the two images of a pair together: turns, flips, JPEG, colour, blur and holes.

Turns and flips move both images, so that a direction in a panorama stays the same direction on the tile. A view that is
no panorama is flipped with its tile, which turns alone. All randomness of a pair comes from (seed, epoch, pair id): a
batch is the same whoever makes it. What every pair has is drawn for the whole epoch at once, at 47 bytes a pair; the
details of a blur or of holes are drawn when they are needed.

JPEG, turns and flips run in the decoding threads, image by image, without the GIL. Colour, blur and holes run on the
device, on those images of the batch that have them.

Source: Sample4Geo (Deuser et al., ICCV 2023) and its code: flip p 0.5, turn p 0.75; then for each image by itself JPEG
of quality 90 to 100 p 0.5, colour jitter of 0.15 p 0.5, blur or sharpening p 0.3, a grid of holes or rectangles p 0.3.
It does them in this order, but turns last. It compresses before it resizes; here the image has its training size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch import Tensor

from geostream.arrays import Float32, Int16
from geostream.errors import BadInput
from geostream.settings import TrainSettings
from geostream.training.augment_ops import (
    KERNEL_WIDTH,
    blur_kernel,
    colour_jitter,
    convolve,
    cutout,
    grid,
    no_holes,
    rectangles,
    sharpen_kernel,
)
from geostream.training.model import as_float

Pixels = npt.NDArray[np.uint8]
KINDS = ("tile", "view")
LOWEST_QUALITY = 90
GRID_OF_TILES, GRID_OF_PANORAMAS = 0.4, 0.5  # side of a hole, in distances between holes


@dataclass(frozen=True)
class Augmentation:
    """The random changes of one epoch, a row for each pair id; a stage of the loader's pipeline."""

    settings: TrainSettings
    epoch: int
    flip: npt.NDArray[np.bool_]  # (P,) mirrored or not
    turns: npt.NDArray[np.int64]  # (P,) counter-clockwise quarter turns of the tile, 0…3
    colour: Float32  # (P, 2, 4) of tile and view: factors of brightness, contrast, saturation, and turn of the hue
    quality: npt.NDArray[np.uint8]  # (P, 2) of JPEG; 0: as it is
    focus: npt.NDArray[np.uint8]  # (P, 2) 0 as it is, 1 blurred, 2 sharpened
    holes: npt.NDArray[np.uint8]  # (P, 2) 0 none, 1 a grid, 2 rectangles

    @classmethod
    def of(cls, settings: TrainSettings, epoch: int, pairs: int) -> Augmentation:
        """The changes of ``epoch`` for ``pairs`` pairs. Raises BadInput where views cannot be turned.

        Row p depends on seed, epoch and p alone: it holds draws 9p to 9p + 8 of the epoch's generator, and 12p to
        12p + 11 of its second one.
        """
        wanted = settings.augment
        if wanted.view_kind == "panorama" and wanted.rotate_probability > 0 and settings.model.view_width % 4:
            raise BadInput(
                f"view_width {settings.model.view_width}: quarter turns need a width that 4 divides; "
                "change it, or set rotate_probability=0"
            )
        uniform = _generator(settings, epoch).random((pairs, 9))
        turned = uniform[:, 1] < wanted.rotate_probability
        more = _generator(settings, epoch, stream=1).random((pairs, 6, 2))
        lowest, highest = max(0.0, 1 - wanted.color_jitter), 1 + wanted.color_jitter
        colour = np.empty((pairs, 2, 4), dtype=np.float32)
        colour[..., :3] = (lowest + (highest - lowest) * uniform[:, 3:]).reshape(-1, 2, 3)
        colour[..., 3] = (2 * more[:, 5] - 1) * wanted.hue_jitter
        chance = wanted.color_probability if wanted.color_jitter > 0 else 0.0
        colour[more[:, 4] >= chance] = 1, 1, 1, 0
        compressed = more[:, 0] < wanted.jpeg_probability
        return cls(
            settings=settings,
            epoch=epoch,
            flip=uniform[:, 0] < wanted.flip_probability,
            turns=np.where(turned, 1 + (uniform[:, 2] * 3).astype(np.int64), 0),
            colour=colour,
            quality=np.where(compressed, LOWEST_QUALITY + (more[:, 1] * 11).astype(np.uint8), 0).astype(np.uint8),
            focus=_either(more[:, 2], wanted.blur_probability),
            holes=_either(more[:, 3], wanted.dropout_probability),
        )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with ``tile`` and ``view`` compressed and turned together; what the device does added as columns.

        These are, for kind tile and view, ``<kind>_colour`` (4,), or (3,) where no hue is turned, ``<kind>_kernel``
        (7, 7) and ``<kind>_holes`` (25, 5), each only where the settings ask for such changes at all.
        """
        pair, settings = int(sample["pair"]), self.settings
        tile, view = (_compressed(sample[kind], int(self.quality[pair, k])) for k, kind in enumerate(KINDS))
        panorama = settings.augment.view_kind == "panorama"
        tile, view = turn(tile, view, bool(self.flip[pair]), int(self.turns[pair]), panorama)
        changed = sample | {"tile": tile, "view": view}
        for k, kind in enumerate(KINDS):
            random = None
            if self.focus[pair, k] or self.holes[pair, k]:
                random = _generator(settings, self.epoch, pair, stream=2 + k)
            if settings.augment.color_jitter > 0:
                changed[f"{kind}_colour"] = self.colour[pair, k, : 4 if settings.augment.hue_jitter > 0 else 3]
            if settings.augment.blur_probability > 0:
                changed[f"{kind}_kernel"] = self._kernel(pair, k, random)
            if settings.augment.dropout_probability > 0:
                changed[f"{kind}_holes"] = self._holes(pair, k, random, changed[kind].shape)
        return changed

    def _kernel(self, pair: int, k: int, random: np.random.Generator | None) -> Float32:
        """Of image k of the pair; zeros where it is neither blurred nor sharpened."""
        if random is None or not self.focus[pair, k]:
            return np.zeros((KERNEL_WIDTH, KERNEL_WIDTH), dtype=np.float32)
        return blur_kernel(random) if self.focus[pair, k] == 1 else sharpen_kernel(random)

    def _holes(self, pair: int, k: int, random: np.random.Generator | None, shape: tuple[int, ...]) -> Int16:
        """Of image k of the pair, which has the given height and width."""
        if random is None or not self.holes[pair, k]:
            return no_holes()
        if self.holes[pair, k] == 2:
            return rectangles(random, *shape[:2])
        is_panorama = KINDS[k] == "view" and self.settings.augment.view_kind == "panorama"
        return grid(shape[1], GRID_OF_PANORAMAS if is_panorama else GRID_OF_TILES)


def turn(tile: Pixels, view: Pixels, flip: bool, turns: int, panorama: bool = True) -> tuple[Pixels, Pixels]:
    """Tile (s, s, 3) and view (h, w, 3) mirrored, then turned by ``turns`` counter-clockwise quarter turns.

    A panorama has north in its middle column and east to the right of it; the tile has north up. Turning the tile
    counter-clockwise brings its east up, and rolling the panorama by a quarter to the left brings its east to the
    middle. 4 must divide w. Another view is not turned. Views on the input where possible: copy before writing.
    """
    if flip:
        tile, view = tile[:, ::-1], view[:, ::-1]
    if turns:
        tile = np.rot90(tile, turns)
    if turns and panorama:
        split = turns * (view.shape[1] // 4)
        view = np.concatenate([view[:, split:], view[:, :split]], axis=1)  # np.roll, at a fifth of its time
    return tile, view


@torch.no_grad()
def augment_on_device(tensors: dict[str, Tensor], settings: TrainSettings) -> tuple[Tensor, Tensor]:
    """Views and tiles, float32 (B, 3, H, W) in 0…1 where ``tensors`` has them, with colour, blur and holes done.

    ``tensors``: "view" and "tile" uint8 (B, 3, H, W), and the columns that :class:`Augmentation` adds. The columns are
    best left on the CPU: which images are changed is asked there without waiting for the GPU.
    """
    with torch.autocast(tensors["view"].device.type, enabled=False):
        return _on_device("view", tensors, settings), _on_device("tile", tensors, settings)


def _on_device(kind: str, tensors: dict[str, Tensor], settings: TrainSettings) -> Tensor:
    images = as_float(tensors[kind])
    if settings.augment.color_jitter > 0:
        colour = tensors[f"{kind}_colour"]
        images = _on_some(
            colour_jitter, images, colour, (colour != colour.new_tensor([1, 1, 1, 0][: colour.shape[1]])).any(1)
        )
    if settings.augment.blur_probability > 0:
        kernel = tensors[f"{kind}_kernel"]
        images = _on_some(convolve, images, kernel, (kernel != 0).flatten(1).any(1))
    if settings.augment.dropout_probability > 0:
        holes = tensors[f"{kind}_holes"]
        images = _on_some(cutout, images, holes, holes[:, 0, 1] > 0)
    return images


def _on_some(change: Callable[[Tensor, Tensor], Tensor], images: Tensor, column: Tensor, some: Tensor) -> Tensor:
    """The images (B, 3, H, W), those that ``some`` (B,) has changed, each by its row of the column; in place."""
    rows = some.nonzero().squeeze(1)
    if len(rows) == len(images):
        return change(images, column.to(images.device, non_blocking=True))
    if len(rows):
        there = rows.to(images.device, non_blocking=True)
        images[there] = change(images[there], column[rows].to(images.device, non_blocking=True))
    return images


def _generator(settings: TrainSettings, epoch: int, pair: int = 0, stream: int = 0) -> np.random.Generator:
    """Of the epoch, or of one pair in it; streams are 2^128 draws apart, pairs 2^64."""
    key = np.array([settings.seed, epoch], dtype=np.uint64)
    counter = np.array([0, pair, stream, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _either(uniform: npt.NDArray[np.float64], probability: float) -> npt.NDArray[np.uint8]:
    """0 for neither, else 1 or 2, as often one as the other."""
    return np.where(uniform < probability, 1 + (uniform < probability / 2), 0).astype(np.uint8)


def _compressed(pixels: Pixels, quality: int) -> Pixels:
    """As a JPEG of that quality shows them, with the usual halved colour resolution; unchanged at 0."""
    if not quality:
        return pixels
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", colorsubsampling="420")
    return np.asarray(simplejpeg.decode_jpeg(data, "RGB"))
