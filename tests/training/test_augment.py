"""Augmentation: tile and view stay in step, and all randomness belongs to the pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import BadInput
from geostream.settings import TrainSettings
from geostream.training.augment import Augmentation, Augmenter, Pixels, turn

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


def smooth(height: int, width: int) -> Pixels:
    """What JPEG hardly changes, but does change."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows + columns, 255 - rows, columns % 256], axis=-1).astype(np.uint8)


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


def test_a_picture_is_flipped_with_its_tile_but_not_turned() -> None:
    tile, view = marked(30)
    for turns in range(4):
        turned, same = turn(tile, view, False, turns, panorama=False)
        assert same is view and apart(tile_heading(turned), 30 - 90 * turns) < 3
        assert np.array_equal(turn(tile, view, True, turns, panorama=False)[1], view[:, ::-1])
    wanted = TrainSettings().changed(
        view_kind="picture", view_width=190, flip_probability=0, jpeg_probability=0
    )  # 4 need not divide
    drawn = Augmentation.of(wanted, 1, 50)
    assert set(drawn.turns) == {0, 1, 2, 3}
    for pair in range(50):
        changed = drawn({"tile": tile, "view": view, "pair": pair})
        assert np.array_equal(changed["view"], view)
        assert np.array_equal(changed["tile"], np.rot90(tile, drawn.turns[pair]))


def test_probabilities_hold_over_many_pairs() -> None:
    drawn = Augmentation.of(TrainSettings(), 1, 8000)
    turns = np.bincount(drawn.turns, minlength=4) / 8000
    assert np.abs(turns - 0.25).max() < 0.02 and abs(drawn.flip.mean() - 0.5) < 0.02
    coloured = (drawn.colour != (1, 1, 1, 0)).any(axis=2)
    assert np.abs(coloured.mean(axis=0) - 0.5).max() < 0.02
    factors = drawn.colour[coloured]
    assert factors[:, :3].min() >= 0.85 and factors[:, :3].max() <= 1.15 and np.abs(factors[:, 3]).max() <= 0.15
    assert np.abs(factors.mean(axis=0) - (1, 1, 1, 0)).max() < 0.01 and factors.std(axis=0).min() > 0.08
    assert np.abs((drawn.quality > 0).mean(axis=0) - 0.5).max() < 0.02
    qualities = np.bincount(drawn.quality[drawn.quality > 0], minlength=101)
    assert qualities[:90].sum() == 0 and (np.abs(qualities[90:] / qualities.sum() - 1 / 11) < 0.015).all()
    for either in (drawn.focus, drawn.holes):
        assert np.abs((either == 1).mean(axis=0) - 0.15).max() < 0.015
        assert np.abs((either == 2).mean(axis=0) - 0.15).max() < 0.015
    events = np.column_stack(
        [coloured, drawn.quality > 0, drawn.focus > 0, drawn.holes > 0, drawn.flip, drawn.turns > 0]
    )
    assert np.abs(np.corrcoef(events.T) - np.eye(10)).max() < 0.05, "all of it is independent, for tile and view, too"


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), epoch=st.integers(1, 1000), pairs=st.integers(1, 50), more=st.integers(0, 50))
def test_a_row_depends_on_seed_epoch_and_pair_alone(seed: int, epoch: int, pairs: int, more: int) -> None:
    settings = TrainSettings().changed(seed=seed)
    one, longer = Augmentation.of(settings, epoch, pairs), Augmentation.of(settings, epoch, pairs + more)
    for name in ("flip", "turns", "colour", "quality", "focus", "holes"):
        assert np.array_equal(getattr(one, name), getattr(longer, name)[:pairs])
    alone = Augmentation.of(settings, epoch, 1, pairs - 1)
    for name in ("flip", "turns", "colour", "quality", "focus", "holes"):
        assert np.array_equal(getattr(alone, name), getattr(one, name)[-1:])
    wild = TrainSettings().changed(seed=seed, jpeg_probability=1, blur_probability=1, dropout_probability=1)
    tile, view = marked(30)
    seen = []
    for change in (
        Augmentation.of(wild, epoch, pairs),
        Augmentation.of(wild, epoch, pairs + more),
        Augmenter(wild, epoch),
    ):
        seen.append(change({"tile": tile, "view": view, "pair": pairs - 1}))
    for other in seen[1:]:
        assert seen[0].keys() == other.keys() and all(np.array_equal(seen[0][name], other[name]) for name in other)


def test_another_epoch_another_seed_and_another_pair_draw_otherwise() -> None:
    tile, view = marked(30)
    kernels = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        drawn = Augmentation.of(TrainSettings().changed(seed=seed, blur_probability=1), epoch, 30)
        for pair in range(30):
            changed = drawn({"tile": tile, "view": view, "pair": pair})
            kernels += [changed["tile_kernel"], changed["view_kernel"]]
    real = [kernel.tobytes() for kernel in kernels if np.count_nonzero(kernel) > 1]  # the narrowest are all alike
    assert len(set(real)) == len(real) > 150


def test_a_sample_is_changed_as_its_row_says() -> None:
    drawn = Augmentation.of(TrainSettings(), 1, 60)
    tile, view = (smooth(*size) for size in ((SIZE, SIZE), (HEIGHT, WIDTH)))
    before = tile.copy(), view.copy()
    for pair in range(60):
        changed = drawn({"tile": tile, "view": view, "pair": pair})
        expected = turn(tile, view, bool(drawn.flip[pair]), int(drawn.turns[pair]))
        for k, kind in enumerate(("tile", "view")):
            difference = np.abs(changed[kind].astype(int) - expected[k])
            assert difference.any() == bool(drawn.quality[pair, k]), "JPEG changes an image, and nothing else does"
            assert difference.mean() < 5
            assert np.array_equal(changed[f"{kind}_colour"], drawn.colour[pair, k])
            assert changed[f"{kind}_kernel"].any() == (drawn.focus[pair, k] > 0)
            assert (changed[f"{kind}_kernel"].min() < 0) == (drawn.focus[pair, k] == 2)
            many = (changed[f"{kind}_holes"][:, 1] > 0).sum()
            assert [many == 0, many == 1, many >= 10][drawn.holes[pair, k]]
    assert np.array_equal(tile, before[0]) and np.array_equal(view, before[1])


def test_without_hue_every_image_has_its_three_factors() -> None:
    wanted = TrainSettings().changed(color_probability=1, hue_jitter=0)
    drawn = Augmentation.of(wanted, 1, 200)
    assert (drawn.colour[..., 3] == 0).all() and (drawn.colour[..., :3] != 1).any(axis=2).all()
    tile, view = marked(30)
    assert drawn({"tile": tile, "view": view, "pair": 7})["view_colour"].tolist() == drawn.colour[7, 1, :3].tolist()


def test_nothing_happens_at_probability_zero() -> None:
    off = {"color_jitter": 0, "jpeg_probability": 0, "blur_probability": 0, "dropout_probability": 0}
    drawn = Augmentation.of(TrainSettings().changed(flip_probability=0, rotate_probability=0, **off), 1, 100)
    assert not drawn.flip.any() and not drawn.turns.any() and (drawn.colour == (1, 1, 1, 0)).all()
    assert not drawn.quality.any() and not drawn.focus.any() and not drawn.holes.any()


def test_views_that_cannot_be_turned_by_a_quarter_are_refused() -> None:
    with pytest.raises(BadInput, match="view_width 190"):
        Augmentation.of(TrainSettings().changed(view_width=190), 1, 10)
    assert Augmentation.of(TrainSettings().changed(view_width=190, rotate_probability=0), 1, 10)
