"""Project a panorama to the ground plane, as a picture of the place from above that can be compared with tiles.

A pixel of the picture is a point of flat ground. A ray from the camera to it meets the panorama at a column and a row;
the picture has the colour from there. What stands upright is drawn outwards from where it meets the ground. Ground
below the panorama's lowest row is black, and so is what a narrowed panorama does not show.

The camera is in the middle. North is up, as in a tile: a panorama's middle column looks north, and its columns go
clockwise. A mirrored panorama gives the mirrored picture. One that is rolled by a quarter turn gives the picture turned
by that.

Only the ratio of the ground's side to the camera's height matters: a camera of half the height over ground of half the
side sees the same.

Source: EP-BEV (Ye et al., ECCV 2024, and its code). Its code takes a camera 1.5 m above the ground, and 512 pixels of
0.06 m. It takes panoramas whose pixels are as high as wide, with the horizon in the middle row: CVUSA's, which show a
part of the sphere, are padded with black to such ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from geostream.settings import ModelSettings


class BirdsEye(nn.Module):
    """The projection for panoramas of one size. It has nothing to learn, and nothing to store with a checkpoint.

    Args:
        settings: Sizes of views and tiles; how much ground is shown, and from how high.

    Attributes:
        settings: As given.
        grid: (1, S, S, 2) where :func:`~torch.nn.functional.grid_sample` finds each pixel, in the panorama that
            :meth:`forward` has made a column wider on both sides.
        shown: (S, S) 1 where the panorama shows the ground, else 0.
    """

    grid: Tensor
    shown: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        size, width = settings.tile_size, settings.view_width
        metres = (torch.arange(size, dtype=torch.float64) + 0.5 - size / 2) * settings.birds_eye / size
        east, north = metres.expand(size, size), -metres[:, None].expand(size, size)
        turn = torch.atan2(east, north) / (2 * math.pi)  # clockwise from north, -0.5 to 0.5
        below = torch.rad2deg(torch.atan2(torch.tensor(settings.camera_height).double(), torch.hypot(east, north)))
        # grid_sample counts from -1, the first column's outer edge, to 1, the last one's.
        x, y = 2 * turn * width / (width + 2), 2 * below / settings.degrees_high
        self.register_buffer("grid", torch.stack([x, y], dim=2)[None].float(), persistent=False)
        self.register_buffer("shown", (y <= 1).float(), persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        """Return the ground around the cameras, (B, 3, S, S), of panoramas (B, 3, H, W) in 0…1."""
        ring = torch.cat([views[..., -1:], views, views[..., :1]], dim=3)  # what lies south has a seam in it
        grid = self.grid.expand(views.shape[0], -1, -1, -1)  # len() would fix the size of an exported batch
        return grid_sample(ring, grid, padding_mode="border", align_corners=False) * self.shown
