"""Blurring and sharpening: a 7×7 kernel for each image, applied to a batch of them on the device.

Decides that both are one convolution. A kernel is drawn where the image is decoded, by NumPy in some 60 µs, and travels
with the batch; the device does not need to know what it was made for. Small kernels are padded with zeros: on a GPU a
convolution this small costs what reading the image does.

Source: albumentations' AdvancedBlur and Sharpen with their own ranges, as Sample4Geo's code takes them; the blur is
that of Real-ESRGAN (Wang et al., ICCVW 2021): a generalised Gaussian, turned, with noise on its weights.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor
from torch.nn.functional import conv2d, pad

from geostream.arrays import Float32

WIDTH = 7


def blur_kernel(random: np.random.Generator) -> Float32:
    """(7, 7) weights that add up to 1: a kernel of side 3, 5 or 7, with σ of 0.2…1 pixel along either of its axes."""
    radius = int(random.integers(1, 4))
    sigma_x, sigma_y = random.uniform(0.2, 1.0, 2)
    angle = random.uniform(-math.pi / 2, math.pi / 2)
    # As often flatter than a Gaussian as more peaked, though the range above 1 is far wider.
    beta = random.uniform(0.5, 1.0) if random.random() < 0.5 else random.uniform(1.0, 8.0)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    weights = np.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2) ** beta)
    weights *= random.uniform(0.9, 1.1, weights.shape)
    return np.pad((weights / weights.sum()).astype(np.float32), WIDTH // 2 - radius)


def sharpen_kernel(random: np.random.Generator) -> Float32:
    """(7, 7) weights: the image mixed with 0.2…0.5 of its edges, which darkens by up to a quarter."""
    alpha, lightness = random.uniform((0.2, 0.5), (0.5, 1.0))
    edges = np.full((3, 3), -1.0)
    edges[1, 1] = 8 + lightness
    weights = alpha * edges
    weights[1, 1] += 1 - alpha
    return np.pad(weights.astype(np.float32), WIDTH // 2 - 1)


def convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0…1, each with its own kernel of (B, 7, 7); mirrored at the edges, clamped to 0…1.

    H and W must be at least 4.
    """
    number, channels, height, width = images.shape
    # One channel after the other: a CPU is five times as fast so.
    wide = pad(images.contiguous(), [WIDTH // 2] * 4, mode="reflect")
    weights = kernels.to(images.dtype).repeat_interleave(channels, dim=0).unsqueeze(1)
    # One image of B × 3 channels, each of which is a group: the batch in one call.
    changed = conv2d(wide.reshape(1, number * channels, *wide.shape[2:]), weights, groups=number * channels)
    return changed.reshape(number, channels, height, width).clamp_(0, 1)
