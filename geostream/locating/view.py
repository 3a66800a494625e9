"""Bring a photo to the form in which a model has seen its training views.

A panorama, and any picture whose field of view is unknown, is resized to the size of the views. A photo whose field of
view is known is drawn into an empty panorama, at its scale and on the horizon, as far as it reaches. That is how
training with the setting ``fov`` shows parts of panoramas (:mod:`geostream.training.field_of_view`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import grid_sample

from geostream.images import Pixels
from geostream.locating.photos import field_of_view, upright
from geostream.settings import TrainSettings

FINER = 1.5  # how much finer than the panorama a photo is before it is drawn into it


def as_view(image: Image.Image, settings: TrainSettings) -> Pixels:
    """Return a photo as the model's view.

    Args:
        image: Any picture.
        settings: Of the model's run.

    Returns:
        (view height, view width, 3) RGB pixels.
    """
    size = settings.model.view_height, settings.model.view_width
    image = upright(image)
    degrees = field_of_view(image) if settings.augment.view_kind == "panorama" else None
    if degrees is None:
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS))
    return draw_into_panorama(image, degrees, *size)


def draw_into_panorama(image: Image.Image, degrees: float, height: int, width: int) -> Pixels:
    """Draw a photo into the middle of an empty panorama.

    The photo is taken for a perspective picture with the horizon in its middle, the panorama for one whose columns and
    rows are equal steps of the angle, 360 / width degrees each. What lies outside of the photo is black.

    Args:
        image: An upright RGB picture.
        degrees: What it shows from left to right; less than 180.
        height: Of the panorama in pixels.
        width: Likewise.

    Returns:
        (height, width, 3) pixels.
    """
    step = 2 * math.pi / width
    reach = math.tan(math.radians(degrees) / 2)  # half the photo's width, at a distance of 1
    columns = max(2, math.ceil(FINER * math.radians(degrees) / step))
    rows = max(2, round(columns * image.height / image.width))
    photo = torch.from_numpy(np.array(image.resize((columns, rows), Image.Resampling.LANCZOS)))
    azimuth = (torch.arange(width) + 0.5 - width / 2) * step
    elevation = (torch.arange(height) + 0.5 - height / 2) * step  # downwards
    x = torch.tan(azimuth).expand(height, width) / reach
    y = torch.tan(elevation)[:, None] / torch.cos(azimuth) / (reach * image.height / image.width)
    ahead = azimuth.abs() < math.pi / 2
    inside = ahead & (x.abs() <= 1) & (y.abs() <= 1)
    grid = torch.stack([x, y], dim=2)[None].float().nan_to_num().clamp(-2, 2)
    drawn = grid_sample(photo.permute(2, 0, 1)[None].float(), grid, padding_mode="border", align_corners=False)[0]
    pixels: Pixels = (drawn * inside).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return pixels
