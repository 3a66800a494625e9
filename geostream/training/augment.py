"""Augmentation that keeps tile and view of a pair in step.

Decides three things. Turning and flipping move both images of a pair together, so that a direction in the view stays
the same direction on the tile. All randomness of a pair comes from (seed, epoch, pair id) and is drawn for the whole
epoch at once: a batch is the same whoever makes it, in whichever order, at 33 bytes a pair. And the work is split by
what it costs: turns and flips are NumPy views or one copy before the batch is stacked, while colour is done on the
whole batch, on the device, with an own factor for each image (torchvision's ``adjust_*`` take one factor for all, and
calls an image would cost more than decoding it). Hue is left alone: its way through HSV costs ten times the rest.

Source: Sample4Geo (Deuser et al., ICCV 2023) and its code: flip p 0.5, turn p 0.75, colour jitter 0.15 a view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from geostream.errors import BadInput
from geostream.settings import TrainSettings

Pixels = npt.NDArray[np.uint8]
GREY = (0.2989, 0.587, 0.114)  # the weights of ITU-R 601, as torchvision has them


@dataclass(frozen=True)
class Augmentation:
    """The random changes of one epoch, a row for each pair id; a stage of the loader's pipeline."""

    flip: npt.NDArray[np.bool_]  # (P,) mirrored or not
    turns: npt.NDArray[np.int64]  # (P,) counter-clockwise quarter turns of the tile, 0…3
    colour: npt.NDArray[np.float32]  # (P, 2, 3) of tile and view: factors of brightness, contrast, saturation

    @classmethod
    def of(cls, settings: TrainSettings, epoch: int, pairs: int) -> Augmentation:
        """The changes of ``epoch`` for ``pairs`` pairs. Raises BadInput where views cannot be turned.

        Row p depends on seed, epoch and p alone: it holds draws 9p to 9p + 8 of the epoch's generator.
        """
        if settings.rotate_probability > 0 and settings.view_width % 4:
            raise BadInput(
                f"view_width {settings.view_width}: quarter turns need a width that 4 divides; "
                "change it, or set rotate_probability=0"
            )
        key = np.array([settings.seed, epoch], dtype=np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key)).random((pairs, 9))
        turned = uniform[:, 1] < settings.rotate_probability
        lowest, highest = max(0.0, 1 - settings.color_jitter), 1 + settings.color_jitter
        return cls(
            flip=uniform[:, 0] < settings.flip_probability,
            turns=np.where(turned, 1 + (uniform[:, 2] * 3).astype(np.int64), 0),
            colour=(lowest + (highest - lowest) * uniform[:, 3:]).astype(np.float32).reshape(-1, 2, 3),
        )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with ``tile`` and ``view`` turned together, and the colour factors of both added."""
        pair = sample["pair"]
        tile, view = turn(sample["tile"], sample["view"], bool(self.flip[pair]), int(self.turns[pair]))
        tile_colour, view_colour = self.colour[pair]
        return sample | {"tile": tile, "view": view, "tile_colour": tile_colour, "view_colour": view_colour}


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
        split = turns * (view.shape[1] // 4)
        view = np.concatenate([view[:, split:], view[:, :split]], axis=1)  # np.roll, at a fifth of its time
    return tile, view


def colour_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0…1 with brightness, contrast and saturation scaled by ``factors`` (B, 3), in that order.

    The arithmetic of torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation`` in a row,
    collected into one expression, so that values are clamped to 0…1 once instead of three times.
    """
    brightness, contrast, saturation = factors.to(images.dtype).reshape(-1, 3, 1, 1, 1).unbind(1)
    grey = (images.permute(0, 2, 3, 1) @ images.new_tensor(GREY)).unsqueeze(1)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    kept = brightness * contrast
    washed = grey.mul_((1 - saturation) * kept).add_(mean * (brightness - kept))
    return (images * (saturation * kept)).add_(washed).clamp_(0, 1)
