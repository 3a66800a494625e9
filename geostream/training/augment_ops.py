"""Change the colour, sharpness and visible parts of a batch of images on the device.

Every operation takes the whole batch, with one row of numbers for each image. torchvision's ``adjust_*`` functions take
one factor for all images, and one call for each image would make a GPU wait for thousands of small kernels.

- Colour: brightness, contrast, saturation and hue, computed as torchvision does. Hue goes through HSV and costs three
  to four times as much as the other three together.
- Sharpness: a blur or a sharpening is a 7×7 kernel, drawn where the image is decoded (about 60 µs) and applied here.
- Holes: a grid of holes, or some rectangles. Both are stored as up to 25 holes, each of which may repeat with a period.
  The mask is one product of row masks and column masks.

An array of holes is int16 (25, 5). Each row holds top, height, left, width and period of a hole, in pixels. The period
holds for both directions.

Source: torchvision for colour. albumentations 1.3 for the others (AdvancedBlur, Sharpen, GridDropout, CoarseDropout),
with the ranges of Sample4Geo's code; the blur is that of Real-ESRGAN (Wang et al., ICCVW 2021).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from geostream.arrays import Float32, Int16

GREY = (0.2989, 0.587, 0.114)  # the weights of ITU-R 601, rounded as in torchvision
KERNEL_WIDTH = 7
MAX_HOLES, MIN_RECTANGLES = 25, 10
NO_REPEAT = 2**15 - 1  # a period longer than any image, so that the hole appears once


def colour_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation, and turn the hue, in that order.

    The result is that of torchvision's ``adjust_brightness``, ``adjust_contrast``, ``adjust_saturation`` and
    ``adjust_hue``, one after the other.

    Args:
        images: (B, 3, H, W) in 0…1.
        factors: (B, 4) three factors, and the hue's change in whole turns; or (B, 3), which leaves the hue.

    Returns:
        The changed images, a new tensor.
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
    """Move the hue of images (B, 3, H, W) by ``turn`` (B, 1, 1) whole turns; value and saturation stay.

    Each channel is the value minus the chroma times a function of the hue, whose graph is a trapezium.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    some = chroma.clamp(min=torch.finfo(images.dtype).tiny)  # where chroma is 0, the hue does not matter
    to_blue = torch.where(value == green, 2 + (blue - red) / some, 4 + (red - green) / some)
    hue = torch.where(value == red, (green - blue) / some, to_blue).add_(6 * turn)  # in sixths of a turn
    hue -= 6 * (hue / 6).floor_()
    falls = (2 - (hue - 3).abs_(), (hue - 2).abs_() - 1, (hue - 4).abs_() - 1)
    return torch.stack([value - fall.clamp_(0, 1).mul_(chroma) for fall in falls], dim=1)


def blur_kernel(random: np.random.Generator) -> Float32:
    """Draw a blur kernel of side 3, 5 or 7, with σ of 0.2 to 1 pixel along each of its axes.

    Args:
        random: The generator to draw from.

    Returns:
        (7, 7) weights that add up to 1; a smaller kernel is padded with zeros.
    """
    radius = int(random.integers(1, 4))
    sigma_x, sigma_y = random.uniform(0.2, 1.0, 2)
    angle = random.uniform(-math.pi / 2, math.pi / 2)
    # Half of the kernels are more peaked than a Gaussian (beta < 1), half are flatter.
    beta = random.uniform(0.5, 1.0) if random.random() < 0.5 else random.uniform(1.0, 8.0)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    weights = np.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2) ** beta)
    weights *= random.uniform(0.9, 1.1, weights.shape)
    return np.pad((weights / weights.sum()).astype(np.float32), KERNEL_WIDTH // 2 - radius)


def sharpen_kernel(random: np.random.Generator) -> Float32:
    """Draw a kernel that mixes an image with 0.2 to 0.5 of its edges, which darkens it by up to a quarter.

    Args:
        random: The generator to draw from.

    Returns:
        (7, 7) weights; the 3×3 kernel is padded with zeros.
    """
    alpha, lightness = random.uniform((0.2, 0.5), (0.5, 1.0))
    edges = np.full((3, 3), -1.0)
    edges[1, 1] = 8 + lightness
    weights = alpha * edges
    weights[1, 1] += 1 - alpha
    return np.pad(weights.astype(np.float32), KERNEL_WIDTH // 2 - 1)


def convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image with its own kernel; the images are mirrored at their edges.

    Args:
        images: (B, 3, H, W) in 0…1; H and W at least 4.
        kernels: (B, 7, 7) weights.

    Returns:
        (B, 3, H, W), clamped to 0…1.
    """
    number, channels, height, width = images.shape
    # contiguous(): channels-last images take five times as long on a CPU.
    wide = pad(images.contiguous(), [KERNEL_WIDTH // 2] * 4, mode="reflect")
    weights = kernels.to(images.dtype).repeat_interleave(channels, dim=0).unsqueeze(1)
    # One call for the batch: it becomes one image of B × 3 channels, each of which is a group.
    changed = conv2d(wide.reshape(1, number * channels, *wide.shape[2:]), weights, groups=number * channels)
    return changed.reshape(number, channels, height, width).clamp_(0, 1)


def no_holes() -> Int16:
    """Return an array of 25 holes without any height, which cover nothing."""
    holes = np.zeros((MAX_HOLES, 5), dtype=np.int16)
    holes[:, 4] = 1
    return holes


def grid(width: int, ratio: float) -> Int16:
    """Return a grid of square holes, ten along the image's width.

    Args:
        width: Width of the image in pixels.
        ratio: Side of a hole, as a share of the distance from one hole to the next.

    Returns:
        (25, 5) holes, of which the first repeats over the whole image.
    """
    unit = max(2, width // 10)
    side = min(max(int(unit * ratio), 1), unit - 1)
    holes = no_holes()
    holes[0] = 0, side, 0, side, unit
    return holes


def rectangles(random: np.random.Generator, height: int, width: int) -> Int16:
    """Draw 10 to 25 rectangular holes anywhere in an image, with sides of a tenth to a fifth of its height.

    Args:
        random: The generator to draw from.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        (25, 5) holes.
    """
    number = int(random.integers(MIN_RECTANGLES, MAX_HOLES, endpoint=True))
    shortest = max(1, height // 10)
    longest = max(shortest, height // 5)
    sides = random.integers(shortest, longest, (number, 2), endpoint=True)
    sides = np.minimum(sides, (height, width))
    corner = random.integers(0, (height, width) - sides, endpoint=True)
    holes = no_holes()
    holes[:number] = np.column_stack([corner[:, 0], sides[:, 0], corner[:, 1], sides[:, 1], np.full(number, NO_REPEAT)])
    return holes


def cutout(images: Tensor, holes: Tensor) -> Tensor:
    """Blacken each image where its holes are.

    Args:
        images: (B, 3, H, W).
        holes: (B, 25, 5) the holes of each image.

    Returns:
        The images with holes, a new tensor.
    """
    top, height, left, width, period = holes.to(images.device, torch.int32).unsqueeze(-1).unbind(2)
    rows = (torch.arange(images.shape[2], device=images.device) - top) % period < height
    columns = (torch.arange(images.shape[3], device=images.device) - left) % period < width
    covered = torch.bmm(rows.transpose(1, 2).to(images.dtype), columns.to(images.dtype)) > 0
    return images.masked_fill(covered.unsqueeze(1), 0)
