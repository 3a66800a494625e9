"""Augmentation: tile and view stay in step, randomness belongs to the pair, colour is torchvision's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from geostream.errors import BadInput
from geostream.settings import TrainSettings
from geostream.training.augment import Augmentation, Pixels, colour_jitter, turn

SIZE, HEIGHT, WIDTH = 65, 16, 192


def marked(heading: float) -> tuple[Pixels, Pixels]:
    """A tile with north up and a view with north in the middle, a mark on both at ``heading`` (degrees, clockwise)."""
    tile, view = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    angle, middle = math.radians(heading), SIZE / 2
    row, column = middle - 25 * math.cos(angle), middle + 25 * math.sin(angle)
    tile[round(row - 2) : round(row + 2), round(column - 2) : round(column + 2)] = 255
    centre = WIDTH / 2 + heading / 360 * WIDTH
    view[:, [round(centre + step) % WIDTH for step in (-2, -1, 0, 1)]] = 255
    return tile, view


def tile_heading(tile: Pixels) -> float:
    rows, columns = (axis.mean() + 0.5 - SIZE / 2 for axis in np.nonzero(tile[..., 0]))
    return math.degrees(math.atan2(columns, -rows)) % 360


def view_heading(view: Pixels) -> float:
    columns = np.flatnonzero(view[0, :, 0])
    angles = (columns + 0.5 - WIDTH / 2) / WIDTH * 2 * math.pi
    return math.degrees(math.atan2(np.sin(angles).mean(), np.cos(angles).mean())) % 360


def apart(one: float, other: float) -> float:
    return abs((one - other + 180) % 360 - 180)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_a_direction_stays_the_same_on_tile_and_view(flip: bool, turns: int) -> None:
    for heading in range(0, 360, 20):
        tile, view = turn(*marked(heading), flip, turns)
        expected = (-heading if flip else heading) - 90 * turns
        assert apart(tile_heading(tile), expected) < 3, "the tile turned counter-clockwise"
        assert apart(view_heading(view), expected) < 3, "the view rolled with it"


def test_one_turn_brings_east_up_and_to_the_middle() -> None:
    tile, view = turn(*marked(90), False, 1)
    assert tile[:20, SIZE // 2].any() and not tile[40:].any()
    assert view[0, WIDTH // 2].any()


def test_an_epoch_turns_and_flips_as_often_as_it_says() -> None:
    drawn = Augmentation.of(TrainSettings(), 1, 8000)
    turns = np.bincount(drawn.turns, minlength=4) / 8000
    assert np.abs(turns - 0.25).max() < 0.02 and abs(drawn.flip.mean() - 0.5) < 0.02
    colour = drawn.colour.reshape(8000, 6)
    assert colour.min() >= 0.85 and colour.max() <= 1.15 and np.abs(colour.mean(axis=0) - 1).max() < 0.01
    assert np.abs(np.corrcoef(colour.T) - np.eye(6)).max() < 0.05, "tile and view are coloured independently"


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), epoch=st.integers(1, 1000), pairs=st.integers(1, 50), more=st.integers(0, 50))
def test_a_row_depends_on_seed_epoch_and_pair_alone(seed: int, epoch: int, pairs: int, more: int) -> None:
    settings = TrainSettings(seed=seed)
    one, longer = Augmentation.of(settings, epoch, pairs), Augmentation.of(settings, epoch, pairs + more)
    for name in ("flip", "turns", "colour"):
        assert np.array_equal(getattr(one, name), getattr(longer, name)[:pairs])
    others = [Augmentation.of(settings, epoch + 1, pairs), Augmentation.of(TrainSettings(seed=seed + 1), epoch, pairs)]
    assert not any(np.array_equal(one.colour, other.colour) for other in others)
    assert len(np.unique(one.colour[:, 0, 0])) == pairs


def test_a_sample_is_changed_as_its_row_says() -> None:
    drawn = Augmentation.of(TrainSettings(), 1, 20)
    tile, view = marked(30)
    for pair in range(20):
        changed = drawn({"tile": tile, "view": view, "pair": pair})
        expected = turn(tile, view, bool(drawn.flip[pair]), int(drawn.turns[pair]))
        assert np.array_equal(changed["tile"], expected[0]) and np.array_equal(changed["view"], expected[1])
        assert np.array_equal([changed["tile_colour"], changed["view_colour"]], drawn.colour[pair])


def test_nothing_happens_at_probability_zero() -> None:
    still = TrainSettings(flip_probability=0, rotate_probability=0, color_jitter=0)
    drawn = Augmentation.of(still, 1, 100)
    assert not drawn.flip.any() and not drawn.turns.any() and (drawn.colour == 1).all()


def test_views_that_cannot_be_turned_by_a_quarter_are_refused() -> None:
    with pytest.raises(BadInput, match="view_width 190"):
        Augmentation.of(TrainSettings(view_width=190), 1, 10)
    assert Augmentation.of(TrainSettings(view_width=190, rotate_probability=0), 1, 10)


def test_colour_is_torchvisions_with_an_own_factor_for_each_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(5, 3, 20, 30, generator=generator)  # nothing reaches the ends of the range
    factors = 0.85 + 0.3 * torch.rand(5, 3, generator=generator)
    expected = [
        functional.adjust_saturation(
            functional.adjust_contrast(functional.adjust_brightness(image, float(b)), float(c)), float(s)
        )
        for image, (b, c, s) in zip(images, factors, strict=True)
    ]
    torch.testing.assert_close(colour_jitter(images, factors), torch.stack(expected), atol=1e-5, rtol=0)
    strided = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(colour_jitter(strided, factors), torch.stack(expected), atol=1e-5, rtol=0)


def test_colour_stays_in_range_and_factors_of_one_change_nothing() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(colour_jitter(images, torch.ones(4, 3)), images)
    wild = colour_jitter(images, torch.tensor([[3.0, 2.0, 0.0]] * 4))
    assert wild.min() >= 0 and wild.max() <= 1
