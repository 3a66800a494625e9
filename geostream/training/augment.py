"""Augment the two images of a pair together: turns, flips, JPEG, colour, blur and holes.

Turns and flips change both images, so that a direction in a panorama stays the same direction on the tile. A view that
is not a panorama is flipped with its tile, but not turned. With the setting ``fov``, a panorama is then narrowed to
what an ordinary photo shows of it, in a direction that the network is not told.

All randomness of a pair comes from (seed, epoch, pair id), so a batch is the same whichever worker makes it. The
choices for each pair are drawn for the whole epoch at once (47 bytes a pair); the details of a blur or of holes, and
what part of a panorama is shown, are drawn when they are needed.

JPEG, turns and flips run in the decoding threads, image by image, without the GIL. Colour, blur and holes run on the
device, on those images of the batch that get them.

Source: Sample4Geo (Deuser et al., ICCV 2023) and its code. It flips with probability 0.5 and turns with 0.75. To each
image separately it applies JPEG of quality 90 to 100 (0.5), colour jitter of 0.15 (0.5), blur or sharpening (0.3), and
a grid of holes or rectangles (0.3). Its order is the same, except that it turns last, and it compresses before it
resizes, where we compress at training size.
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
from geostream.training.field_of_view import narrow
from geostream.training.model import as_float

Pixels = npt.NDArray[np.uint8]
KINDS = ("tile", "view")
LOWEST_QUALITY = 90
DRAWS_OF_BLOCK = 4  # of the generator, Philox 4×64
GRID_OF_TILES, GRID_OF_PANORAMAS = 0.4, 0.5  # side of a hole / distance from one hole to the next


@dataclass(frozen=True)
class Augmentation:
    """The random changes of one epoch, one row for each of P consecutive pair ids.

    In arrays of shape (P, 2, …), index 0 of the second axis is the tile and 1 the view.

    Attributes:
        settings: The run's settings.
        epoch: The epoch that the changes are for.
        first: The pair id of the first row.
        flip: (P,) whether the pair is mirrored.
        turns: (P,) counter-clockwise quarter turns of the tile, 0 to 3.
        colour: (P, 2, 4) factors of brightness, contrast and saturation, and the hue's change in whole turns.
        quality: (P, 2) JPEG quality; 0 leaves the image as it is.
        focus: (P, 2) 0 leaves the image as it is, 1 blurs it, 2 sharpens it.
        holes: (P, 2) 0 makes no holes, 1 a grid of them, 2 rectangles.
    """

    settings: TrainSettings
    epoch: int
    first: int
    flip: npt.NDArray[np.bool_]
    turns: npt.NDArray[np.int64]
    colour: Float32
    quality: npt.NDArray[np.uint8]
    focus: npt.NDArray[np.uint8]
    holes: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, settings: TrainSettings, epoch: int, pairs: int, first: int = 0) -> Augmentation:
        """Draw the changes of an epoch.

        Row p depends only on seed, epoch and p: it comes from draws 9p to 9p + 8 of the epoch's first random stream,
        and from draws 12p to 12p + 11 of its second one.

        Args:
            settings: The run's settings.
            epoch: Number of the epoch.
            pairs: Number of pairs, P.
            first: The pair id of the first one.

        Raises:
            BadInput: Panoramas are to be turned, but 4 does not divide their width.
        """
        wanted = settings.augment
        if wanted.view_kind == "panorama" and wanted.rotate_probability > 0 and settings.model.view_width % 4:
            raise BadInput(
                f"view_width {settings.model.view_width}: quarter turns need a width that 4 divides; "
                "change it, or set rotate_probability=0"
            )
        uniform = _draws(settings, epoch, 0, (first, pairs, 9))
        turned = uniform[:, 1] < wanted.rotate_probability
        more = _draws(settings, epoch, 1, (first, pairs, 12)).reshape(pairs, 6, 2)
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
            first=first,
            flip=uniform[:, 0] < wanted.flip_probability,
            turns=np.where(turned, 1 + (uniform[:, 2] * 3).astype(np.int64), 0),
            colour=colour,
            quality=np.where(compressed, LOWEST_QUALITY + (more[:, 1] * 11).astype(np.uint8), 0).astype(np.uint8),
            focus=_either(more[:, 2], wanted.blur_probability),
            holes=_either(more[:, 3], wanted.dropout_probability),
        )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Compress, flip, turn and narrow the images of a sample, and add columns for the changes made on the device.

        Args:
            sample: "pair" (id), "tile" (s, s, 3) and "view" (h, w, 3) as uint8, and other columns, which are kept.

        Returns:
            A new sample with the added columns ``<kind>_colour`` (4,), or (3,) if the hue does not change,
            ``<kind>_kernel`` (7, 7) and ``<kind>_holes`` (25, 5), for kind "tile" and "view". A column is there only
            if the settings ask for such changes.
        """
        pair, settings = int(sample["pair"]), self.settings
        row = pair - self.first
        tile, view = (_compressed(sample[kind], int(self.quality[row, k])) for k, kind in enumerate(KINDS))
        panorama = settings.augment.view_kind == "panorama"
        tile, view = turn(tile, view, bool(self.flip[row]), int(self.turns[row]), panorama)
        if settings.augment.narrows:
            drawn = _generator(settings, self.epoch, pair, stream=4)
            view = narrow(view, drawn.uniform(*settings.augment.fov), drawn.random())
        changed = sample | {"tile": tile, "view": view}
        for k, kind in enumerate(KINDS):
            random = None
            if self.focus[row, k] or self.holes[row, k]:
                random = _generator(settings, self.epoch, pair, stream=2 + k)
            if settings.augment.color_jitter > 0:
                changed[f"{kind}_colour"] = self.colour[row, k, : 4 if settings.augment.hue_jitter > 0 else 3]
            if settings.augment.blur_probability > 0:
                changed[f"{kind}_kernel"] = self._kernel(row, k, random)
            if settings.augment.dropout_probability > 0:
                changed[f"{kind}_holes"] = self._holes(row, k, random, changed[kind].shape)
        return changed

    def _kernel(self, row: int, k: int, random: np.random.Generator | None) -> Float32:
        """Return the kernel for image k of a pair; zeros if it is neither blurred nor sharpened."""
        if random is None or not self.focus[row, k]:
            return np.zeros((KERNEL_WIDTH, KERNEL_WIDTH), dtype=np.float32)
        return blur_kernel(random) if self.focus[row, k] == 1 else sharpen_kernel(random)

    def _holes(self, row: int, k: int, random: np.random.Generator | None, shape: tuple[int, ...]) -> Int16:
        """Return the holes of image k of a pair, whose shape begins with height and width."""
        if random is None or not self.holes[row, k]:
            return no_holes()
        if self.holes[row, k] == 2:
            return rectangles(random, *shape[:2])
        is_panorama = KINDS[k] == "view" and self.settings.augment.view_kind == "panorama"
        return grid(shape[1], GRID_OF_PANORAMAS if is_panorama else GRID_OF_TILES)


@dataclass(frozen=True)
class Augmenter:
    """A stage of the loader's pipeline that changes each sample as :class:`Augmentation` says.

    A pair's row is drawn when its sample comes, which takes at most 0.1 ms, so that nothing is held for the others.

    Args:
        settings: The run's settings.
        epoch: The epoch that the changes are for.

    Raises:
        BadInput: Panoramas are to be turned, but 4 does not divide their width.
    """

    settings: TrainSettings
    epoch: int

    def __post_init__(self) -> None:
        Augmentation.of(self.settings, self.epoch, 0)  # refuses what cannot be done before the first sample

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change a sample, as :meth:`Augmentation.__call__` does."""
        return Augmentation.of(self.settings, self.epoch, 1, int(sample["pair"]))(sample)


def turn(tile: Pixels, view: Pixels, flip: bool, turns: int, panorama: bool = True) -> tuple[Pixels, Pixels]:
    """Mirror a tile and its view, then turn them by quarter turns.

    A panorama has north in its middle column and east to the right of it; the tile has north up. Turning the tile
    counter-clockwise brings east to the top, and rolling the panorama by a quarter to the left brings east to the
    middle.

    Args:
        tile: (s, s, 3) pixels.
        view: (h, w, 3) pixels; for a panorama 4 must divide w.
        flip: Whether both are mirrored from left to right.
        turns: Number of counter-clockwise quarter turns, 0 to 3.
        panorama: Whether the view is a panorama; another view is not turned.

    Returns:
        Tile and view. They may share memory with the input: copy them before writing to them.
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
    """Change colour, sharpness and visible parts of a batch's images on the device.

    Args:
        tensors: "view" and "tile", uint8 (B, 3, H, W), and the columns that :class:`Augmentation` adds. Leave the
            columns on the CPU: looking up which images are changed is then possible without waiting for the GPU.
        settings: The run's settings.

    Returns:
        Views and tiles, float32 (B, 3, H, W) in 0…1, on the device of the input.
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
    """Change those of the images (B, 3, H, W) that ``some`` (B,) marks, each by its row of ``column``; in place."""
    rows = some.nonzero().squeeze(1)
    if len(rows) == len(images):
        return change(images, column.to(images.device, non_blocking=True))
    if len(rows):
        there = rows.to(images.device, non_blocking=True)
        images[there] = change(images[there], column[rows].to(images.device, non_blocking=True))
    return images


def _generator(
    settings: TrainSettings, epoch: int, pair: int = 0, stream: int = 0, block: int = 0
) -> np.random.Generator:
    """Return the random generator of an epoch, or of one pair in it; streams are 2^128 draws apart, pairs 2^64."""
    key = np.array([settings.seed, epoch], dtype=np.uint64)
    counter = np.array([block, pair, stream, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _draws(settings: TrainSettings, epoch: int, stream: int, rows: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Return rows of an epoch's stream; ``rows``: the first row, their number, and the draws in each."""
    first, number, width = rows
    start = first * width
    generator = _generator(settings, epoch, stream=stream, block=start // DRAWS_OF_BLOCK)
    skipped = start % DRAWS_OF_BLOCK
    return generator.random(skipped + number * width)[skipped:].reshape(number, width)


def _either(uniform: npt.NDArray[np.float64], probability: float) -> npt.NDArray[np.uint8]:
    """Return 0 where ``uniform`` is not below ``probability``, else 1 or 2, each half the time."""
    return np.where(uniform < probability, 1 + (uniform < probability / 2), 0).astype(np.uint8)


def _compressed(pixels: Pixels, quality: int) -> Pixels:
    """Encode and decode the pixels as a JPEG with halved colour resolution; quality 0 leaves them unchanged."""
    if not quality:
        return pixels
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", colorsubsampling="420")
    return np.asarray(simplejpeg.decode_jpeg(data, "RGB"))
