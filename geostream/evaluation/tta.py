"""Average the similarity of view and tile over flips and turns at test time (TTA).

A view and a tile are changed alike, as in training: both mirrored, or the tile turned and the panorama rolled. Each of
the changes g gives a similarity f(g·view) · f(g·tile), and their mean is the score. With n changes it costs n passes of
the network an image, on both sides.

The mean is the dot product of two vectors, each the n vectors of an image one after the other, divided by √n. So
vectors that are n times as long are all that others see: recall, an index and its search need no change. To average an
image's vectors instead would keep their length. But that also compares a view that looks north with a tile that is
turned away from it, and throws away what the model knows of directions: recall falls far below that without any
averaging (docs/notes/locating.md).

The changes are those that the model was trained with. Others would show it what it has never seen. A view that is no
panorama is not turned. Nor is one that training narrows: what it shows is always in the middle, and looks anywhere.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from geostream.settings import TrainSettings

Alike = tuple[bool, int]  # whether both are mirrored, and the tile's counter-clockwise quarter turns


def changes(settings: TrainSettings) -> list[Alike]:
    """Return the changes of a pair that training with the settings makes, the first of which leaves it as it is.

    Args:
        settings: Of the model's run.
    """
    flips = (False, True) if settings.augment.flip_probability else (False,)
    turns = range(4) if settings.augment.rotate_probability else range(1)
    return list(product(flips, turns))


def changed(images: Tensor, kind: str, alike: Alike, settings: TrainSettings) -> Tensor:
    """Change images on the device as training changes one (:func:`geostream.training.augment.turn`).

    Args:
        images: (B, 3, H, W).
        kind: "tile" or "view".
        alike: The change.
        settings: Of the model's run.
    """
    flip, turns = alike
    rolls = settings.augment.view_kind == "panorama" and not settings.augment.narrows
    if flip:
        images = images.flip(3)
    if turns and kind == "tile":
        images = images.rot90(turns, (2, 3))
    elif turns and rolls:
        images = images.roll(-turns * (images.shape[3] // 4), 3)
    return images


def joined(vectors: list[Tensor]) -> Tensor:
    """Join the unit vectors (B, D) of n changes to unit vectors (B, n·D), whose dot products are the mean ones."""
    return torch.cat(vectors, dim=1) / math.sqrt(len(vectors))
