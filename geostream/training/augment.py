"""Augmentation that keeps tile and view of a pair in step.

Decides three things. Turning and flipping move both images of a pair together, so that a direction in the view stays
the same direction on the tile. All randomness of a pair comes from (seed, epoch, pair id), by a counter-based
generator: a batch is the same whoever makes it, in whichever order. And the work is split by what it costs: turns and
flips are NumPy views that cost nothing before the batch is stacked, while colour is done on the whole batch, on the
device, with an own factor for each image (torchvision's ``adjust_*`` take one factor for all, and one call an image
would cost as much as decoding it). Hue is left alone: its way through HSV costs more than a small network's step.

Source: Sample4Geo (Deuser et al., ICCV 2023) and its code: flip p 0.5, turn p 0.75, colour jitter 0.15 a view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from geostream.errors import BadInput
from geostream.settings import TrainSettings

Pixels = npt.NDArray[np.uint8]
Factors = npt.NDArray[np.float32]


class Draw(NamedTuple):
    """What happens to one pair: mirrored or not, quarter turns, and (brightness, contrast, saturation) each view."""

    flip: bool
    turns: int  # counter-clockwise quarter turns of the tile, 0…3
    tile_colour: Factors  # (3,)
    view_colour: Factors  # (3,)


@dataclass(frozen=True)
class Augmentation:
    """The random changes of one epoch."""

    seed: int
    epoch: int
    flip_probability: float
    rotate_probability: float
    color_jitter: float

    @classmethod
    def of(cls, settings: TrainSettings, epoch: int) -> Augmentation:
        """The augmentation of ``epoch`` under ``settings``. Raises BadInput where views cannot be turned."""
        if settings.rotate_probability > 0 and settings.view_width % 4:
            raise BadInput(
                f"view_width {settings.view_width}: quarter turns need a width that 4 divides; "
                "change it, or set rotate_probability=0"
            )
        return cls(settings.seed, epoch, settings.flip_probability, settings.rotate_probability, settings.color_jitter)

    def draw(self, pair: int) -> Draw:
        """What happens to ``pair`` in this epoch; depends on nothing else."""
        key = np.array([self.seed, self.epoch], dtype=np.int64).astype(np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, pair])).random(9)
        turns = 1 + int(uniform[2] * 3) if uniform[1] < self.rotate_probability else 0
        lowest, highest = max(0.0, 1 - self.color_jitter), 1 + self.color_jitter
        colour = (lowest + (highest - lowest) * uniform[3:9]).astype(np.float32)
        return Draw(bool(uniform[0] < self.flip_probability), turns, colour[:3], colour[3:])

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A stage of the loader's pipeline: ``tile`` and ``view`` turned together, their colour factors added."""
        drawn = self.draw(sample["pair"])
        tile, view = turn(sample["tile"], sample["view"], drawn.flip, drawn.turns)
        colours = {"tile_colour": drawn.tile_colour, "view_colour": drawn.view_colour}
        return sample | colours | {"tile": tile, "view": view}


def turn(tile: Pixels, view: Pixels, flip: bool, turns: int) -> tuple[Pixels, Pixels]:
    """Tile (s, s, 3) and view (h, w, 3) mirrored, then turned by ``turns`` counter-clockwise quarter turns.

    The view is a panorama with north in its middle column and east to the right of it; the tile has north up. Turning
    the tile counter-clockwise brings its east up, and rolling the panorama by a quarter to the left brings its east to
    the middle. 4 must divide w. Views on the input where possible: copy before writing.
    """
    if flip:
        tile, view = tile[:, ::-1], view[:, ::-1]
    if turns:
        tile = np.rot90(tile, turns)
        view = np.roll(view, -turns * (view.shape[1] // 4), axis=1)
    return tile, view


def colour_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0…1 with brightness, contrast and saturation scaled by ``factors`` (B, 3), in that order.

    The arithmetic of torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation`` in a row,
    collected into one expression, so that values are clamped to 0…1 once instead of three times.
    """
    brightness, contrast, saturation = factors.to(images.dtype).reshape(-1, 3, 1, 1, 1).unbind(1)
    red, green, blue = images.unbind(1)
    grey = (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    kept = brightness * contrast
    return (images * (saturation * kept) + (grey * ((1 - saturation) * kept) + mean * (brightness - kept))).clamp_(0, 1)
