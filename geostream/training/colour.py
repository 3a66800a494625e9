"""Colour of a batch, on the device: brightness, contrast, saturation and hue, with own factors for each image.

Decides that whole batches are coloured at once. torchvision's ``adjust_*`` take one factor for all, and calls an image
would keep a GPU waiting for thousands of small kernels. The first three are one expression, clamped to 0…1 once; hue
goes through HSV as torchvision's does, to its values, and costs three to four times as much as the others together.
"""

from __future__ import annotations

import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # the weights of ITU-R 601, as torchvision has them


def colour_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0…1 with brightness, contrast, saturation scaled and hue turned, in that order.

    ``factors`` (B, 4): three factors, and the hue's share of a whole turn; of (B, 3), and the hue stays. The arithmetic
    of torchvision's ``adjust_brightness``, ``adjust_contrast``, ``adjust_saturation`` and ``adjust_hue`` in a row.
    """
    factors = factors.to(images.dtype)
    brightness, contrast, saturation, *turn = factors[:, :, None, None, None].unbind(1)
    grey = (images.permute(0, 2, 3, 1) @ images.new_tensor(GREY)).unsqueeze(1)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    kept = brightness * contrast
    washed = grey.mul_((1 - saturation) * kept).add_(mean * (brightness - kept))
    changed = (images * (saturation * kept)).add_(washed).clamp_(0, 1)
    return _turn_hue(changed, turn[0].squeeze(1)) if turn else changed


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Images (B, 3, H, W) with their hue moved by ``turn`` (B, 1, 1) of the circle; value and saturation stay.

    Each channel falls from the value by the chroma times a function of the hue, which has the shape of a trapezium.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    some = chroma.clamp(min=torch.finfo(images.dtype).tiny)  # where it is nothing, the hue does not matter
    to_blue = torch.where(value == green, 2 + (blue - red) / some, 4 + (red - green) / some)
    hue = torch.where(value == red, (green - blue) / some, to_blue).add_(6 * turn)  # in sixths of a turn
    hue -= 6 * (hue / 6).floor_()
    falls = (2 - (hue - 3).abs_(), (hue - 2).abs_() - 1, (hue - 4).abs_() - 1)
    return torch.stack([value - fall.clamp_(0, 1).mul_(chroma) for fall in falls], dim=1)
