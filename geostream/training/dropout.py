"""Black holes in images: a grid of them, or some rectangles, to hide what a network would look at alone.

Decides that both are the same thing: up to 25 holes, each rows and columns that may come again after a period. So a
batch's holes travel as a few numbers, and its mask is one product of row masks and column masks on the device.

Source: albumentations 1.3's GridDropout and CoarseDropout, with the sizes and numbers of Sample4Geo's code. A grid
hides the square of its ratio; the rectangles hide a third of a square image, and half as much of one twice as wide.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from geostream.arrays import Int16

MOST, FEWEST = 25, 10  # rectangles
FAR = 2**15 - 1  # a period longer than any image: once


def no_holes() -> Int16:
    """(25, 5): holes of no height. A hole is top, height, left, width, and the period of both, in pixels."""
    holes = np.zeros((MOST, 5), dtype=np.int16)
    holes[:, 4] = 1
    return holes


def grid(width: int, ratio: float) -> Int16:
    """Square holes, ten along an image's width, whose sides are ``ratio`` of their distances; as of no_holes."""
    unit = max(2, width // 10)
    side = min(max(int(unit * ratio), 1), unit - 1)
    holes = no_holes()
    holes[0] = 0, side, 0, side, unit
    return holes


def rectangles(random: np.random.Generator, height: int, width: int) -> Int16:
    """10 to 25 rectangles anywhere in an image, whose sides are a tenth to a fifth of its height; as of no_holes."""
    number = int(random.integers(FEWEST, MOST, endpoint=True))
    shortest = max(1, height // 10)
    longest = max(shortest, height // 5)
    sides = random.integers(shortest, longest, (number, 2), endpoint=True)
    sides = np.minimum(sides, (height, width))
    corner = random.integers(0, (height, width) - sides, endpoint=True)
    holes = no_holes()
    holes[:number] = np.column_stack([corner[:, 0], sides[:, 0], corner[:, 1], sides[:, 1], np.full(number, FAR)])
    return holes


def occlude(images: Tensor, holes: Tensor) -> Tensor:
    """Images (B, 3, H, W) that are black where one of their ``holes`` (B, 25, 5) is."""
    top, height, left, width, period = holes.to(images.device, torch.int32).unsqueeze(-1).unbind(2)
    rows = (torch.arange(images.shape[2], device=images.device) - top) % period < height
    columns = (torch.arange(images.shape[3], device=images.device) - left) % period < width
    covered = torch.bmm(rows.transpose(1, 2).to(images.dtype), columns.to(images.dtype)) > 0
    return images.masked_fill(covered.unsqueeze(1), 0)
