"""What is done to the images: colour as torchvision has it, kernels, holes, and all of it on a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional

from geostream.settings import TrainSettings
from geostream.training.augment import Augmentation, augment_on_device
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

SIDES = st.integers(8, 60)
SEEDS = st.integers(0, 2**32)


def expected_colour(images: Tensor, factors: Tensor) -> Tensor:
    changed = []
    for image, (brightness, contrast, saturation, hue) in zip(images, factors.tolist(), strict=True):
        image = functional.adjust_brightness(image, brightness)
        image = functional.adjust_contrast(image, contrast)
        image = functional.adjust_saturation(image, saturation)
        changed.append(functional.adjust_hue(image, hue))
    return torch.stack(changed)


def test_colour_is_torchvisions_with_own_factors_for_each_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(6, 3, 20, 30, generator=generator)  # nothing reaches the ends of the range
    images[0] = images[0, :1]  # grey: no hue at all
    images[1, :2] = images[1, :1]  # two channels alike: a corner of the hue
    factors = 0.85 + 0.3 * torch.rand(6, 4, generator=generator)
    factors[:, 3] = torch.tensor([0.15, -0.15, 0.1, -0.05, 0.0, 0.5])
    expected = expected_colour(images, factors)
    torch.testing.assert_close(colour_jitter(images, factors), expected, atol=2e-5, rtol=0)
    strided = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(colour_jitter(strided, factors), expected, atol=2e-5, rtol=0)
    factors[:, 3] = 0
    torch.testing.assert_close(
        colour_jitter(images, factors[:, :3]), expected_colour(images, factors), atol=2e-5, rtol=0
    )


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, height=SIDES, width=SIDES)
def test_colour_stays_in_range_and_factors_of_one_change_nothing(seed: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, height, width, generator=generator)
    torch.testing.assert_close(colour_jitter(images, torch.tensor([[1.0, 1, 1, 0]] * 3)), images)
    wild = colour_jitter(images, 3 * torch.rand(3, 4, generator=generator))
    assert wild.min() >= 0 and wild.max() <= 1 and wild.isfinite().all()


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS)
def test_a_blur_weighs_its_neighbourhood_and_sharpening_takes_from_it(seed: int) -> None:
    random = np.random.default_rng(seed)
    blur, sharp = blur_kernel(random), sharpen_kernel(random)
    assert blur.shape == sharp.shape == (KERNEL_WIDTH, KERNEL_WIDTH)
    assert blur.sum() == pytest.approx(1, abs=1e-5) and blur.min() >= 0
    middle = KERNEL_WIDTH // 2
    assert blur[middle, middle] > 0.9 * blur.max()  # but for the noise
    assert 0.75 <= sharp.sum() <= 1.0 + 1e-6
    around = np.delete(sharp[middle - 1 : middle + 2, middle - 1 : middle + 2].ravel(), 4)
    assert (around == around[0]).all() and -0.5 <= around[0] <= -0.2
    assert np.count_nonzero(sharp) == 9


def test_blurs_have_all_sizes_and_sharpening_makes_edges_steeper() -> None:
    random = np.random.default_rng(0)
    kernels = [blur_kernel(random) for _ in range(200)]
    rings = {int((k > 0).any(axis=0).sum()) for k in kernels}
    assert {3, 5, 7} <= rings | {7} and len(rings) >= 2
    edge = torch.full((2, 3, 9, 12), 0.4)
    edge[..., 6:] = 0.6
    steeper, flatter = convolve(edge, torch.from_numpy(np.stack([sharpen_kernel(random), blur_wide()])))
    assert steeper[0, 4, 6] - steeper[0, 4, 5] > 0.2 > flatter[0, 4, 6] - flatter[0, 4, 5]


def blur_wide() -> np.ndarray:
    return np.full((KERNEL_WIDTH, KERNEL_WIDTH), 1 / KERNEL_WIDTH**2, dtype=np.float32)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, height=SIDES, width=SIDES)
def test_each_image_is_convolved_with_its_own_kernel(seed: int, height: int, width: int) -> None:
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.random((3, 3, height, width), dtype=np.float32))
    same = np.zeros((KERNEL_WIDTH, KERNEL_WIDTH), np.float32)
    same[KERNEL_WIDTH // 2, KERNEL_WIDTH // 2] = 1
    kernels = np.stack([same, blur_kernel(random), sharpen_kernel(random)])
    changed = convolve(images, torch.from_numpy(kernels))
    assert torch.equal(changed[0], images[0])
    radius = KERNEL_WIDTH // 2
    for image, kernel, result in zip(images.numpy(), kernels, changed.numpy(), strict=True):
        wide = np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(wide, (KERNEL_WIDTH, KERNEL_WIDTH), axis=(1, 2))
        expected = np.einsum("chwij,ij->chw", windows, kernel).clip(0, 1)
        np.testing.assert_allclose(result, expected, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, height=SIDES, width=SIDES)
def test_rectangles_are_as_many_and_as_large_as_said_and_hide_themselves(seed: int, height: int, width: int) -> None:
    holes = rectangles(np.random.default_rng(seed), height, width)
    real = holes[holes[:, 1] > 0].astype(int)
    assert 10 <= len(real) <= 25 and (holes[len(real) :] == no_holes()[0]).all()
    expected = np.zeros((height, width), bool)
    for top, tall, left, wide, _ in real:
        assert min(max(1, height // 10), width) <= wide <= min(max(1, height // 5), width)
        assert max(1, height // 10) <= tall <= max(1, height // 5)
        assert top >= 0 and left >= 0 and top + tall <= height and left + wide <= width
        expected[top : top + tall, left : left + wide] = True
    black = cutout(torch.ones(1, 3, height, width), torch.from_numpy(holes)[None])
    assert np.array_equal(black[0].numpy() == 0, np.broadcast_to(expected, (3, height, width)))


@pytest.mark.parametrize(("height", "width", "ratio"), [(384, 384, 0.4), (384, 768, 0.5), (33, 57, 0.5), (8, 90, 0.4)])
def test_a_grid_hides_the_square_of_its_ratio(height: int, width: int, ratio: float) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) + 0.1
    hidden = cutout(images, torch.from_numpy(np.stack([grid(width, ratio), no_holes()])))
    assert torch.equal(hidden[1], images[1])
    share = float((hidden[0] == 0).float().mean())
    assert share == pytest.approx(ratio**2, rel=0.1 if height == 384 else 0.6) and share > 0
    kept = hidden[0] != 0
    assert torch.equal(hidden[0][kept], images[0][kept])


def test_rectangles_hide_a_third_of_a_square_and_half_as_much_of_a_panorama() -> None:
    random = np.random.default_rng(1)
    for width, least, most in ((384, 0.29, 0.36), (768, 0.15, 0.20)):
        holes = torch.from_numpy(np.stack([rectangles(random, 384, width) for _ in range(60)]))
        shares = (cutout(torch.ones(60, 1, 384, width), holes) == 0).float().mean((1, 2, 3))
        assert least < float(shares.mean()) < most and float(shares.std()) > 0.02


def batch_of(drawn: Augmentation, pairs: int, sizes: tuple[int, int, int]) -> dict[str, Tensor]:
    """Random images of pairs 0…, as the loader would deliver them."""
    side, height, width = sizes
    random = np.random.default_rng(3)
    samples = [
        drawn(
            {
                "tile": random.integers(0, 256, (side, side, 3), dtype=np.uint8),
                "view": random.integers(0, 256, (height, width, 3), dtype=np.uint8),
                "pair": pair,
            }
        )
        for pair in range(pairs)
    ]
    tensors = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    return tensors | {kind: tensors[kind].permute(0, 3, 1, 2) for kind in ("tile", "view")}


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, side=SIDES, height=SIDES, quarter=st.integers(2, 20), kind=st.sampled_from(["panorama", "picture"]))
def test_a_batch_stays_in_range_whatever_its_sizes(seed: int, side: int, height: int, quarter: int, kind: str) -> None:
    always = {"jpeg_probability": 1, "blur_probability": 1, "dropout_probability": 1, "color_jitter": 0.5}
    wanted = TrainSettings().changed(seed=seed, view_kind=kind, view_width=4 * quarter, **always)
    tensors = batch_of(Augmentation.of(wanted, 1, 5), 5, (side, height, 4 * quarter))
    views, tiles = augment_on_device(tensors, wanted)
    assert views.shape == (5, 3, height, 4 * quarter) and tiles.shape == (5, 3, side, side)
    for images in (views, tiles):
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        assert ((images == 0).all(1).flatten(1).any(1)).all(), "every image has holes"


def test_a_pair_comes_out_the_same_in_whichever_batch() -> None:
    wanted = TrainSettings().changed(seed=4)
    tensors = batch_of(Augmentation.of(wanted, 2, 40), 40, (32, 24, 64))
    whole = augment_on_device(tensors, wanted)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    parts = [augment_on_device({n: t[rows] for n, t in tensors.items()}, wanted) for rows in order.split(7)]
    for images, chunks in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(chunks), images[order], atol=1e-6, rtol=0)


def test_only_what_was_drawn_is_changed() -> None:
    wanted = TrainSettings().changed(jpeg_probability=0)
    drawn = Augmentation.of(wanted, 1, 200)
    tensors = batch_of(drawn, 200, (16, 16, 32))
    for k, (kind, images) in enumerate(zip(("view", "tile"), augment_on_device(tensors, wanted), strict=True)):
        row = 1 - k
        plain = tensors[kind].float() / 255
        changed = (images != plain).flatten(1).any(1).numpy()
        coloured = (drawn.colour[:, row] != (1, 1, 1, 0)).any(1)
        surely = coloured | (drawn.focus[:, row] == 2) | (drawn.holes[:, row] > 0)
        assert changed[surely].all(), "but the narrowest blurs, which change nothing"
        assert not changed[~surely & (drawn.focus[:, row] == 0)].any()


def test_what_is_switched_off_costs_no_column_and_changes_no_byte() -> None:
    off = {"color_jitter": 0, "jpeg_probability": 0, "blur_probability": 0, "dropout_probability": 0}
    wanted = TrainSettings().changed(flip_probability=0, rotate_probability=0, **off)
    random = np.random.default_rng(0)
    tile, view = random.integers(0, 256, (8, 8, 3), np.uint8), random.integers(0, 256, (8, 16, 3), np.uint8)
    sample = Augmentation.of(wanted, 1, 1)({"tile": tile, "view": view, "pair": 0})
    assert sample.keys() == {"tile", "view", "pair"} and sample["tile"] is tile and sample["view"] is view
    tensors = {k: torch.from_numpy(sample[k]).permute(2, 0, 1)[None] for k in ("tile", "view")}
    for images, kind in zip(augment_on_device(tensors, wanted), ("view", "tile"), strict=True):
        assert torch.equal(images, tensors[kind].float() / 255)


def test_the_trainers_autocast_does_not_reach_the_images() -> None:
    wanted = TrainSettings().changed(blur_probability=1, dropout_probability=1)
    tensors = batch_of(Augmentation.of(wanted, 1, 4), 4, (16, 16, 32))
    plain = augment_on_device(tensors, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = augment_on_device(tensors, wanted)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
