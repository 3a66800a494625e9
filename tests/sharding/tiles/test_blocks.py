"""Training and test do not touch, and what is test depends on the position alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.errors import BadInput
from sharding.tiles.blocks import check_blocks, in_test_block, nearest_row, overlaps_any
from sharding.tiles.grid import Grid


@settings(max_examples=30, deadline=None)
@given(st.floats(-70, 70), st.floats(-170, 170), st.floats(30, 200), st.floats(3, 8), st.sampled_from([0.5, 0.34, 0.2]))
def test_no_training_tile_that_is_kept_overlaps_a_test_tile(
    south: float, west: float, metres: float, sides: float, share: float
) -> None:
    grid = Grid(metres)
    size = 12 * metres / 111_000
    centres = grid.centres(grid.cells_within(west, south, west + size, south + size))
    test = in_test_block(centres, sides * metres, share)
    boxes = grid.boxes(centres)
    kept = boxes[~test][~overlaps_any(boxes[~test], boxes[test])]
    for box in boxes[test]:
        apart = (kept[:, 0] > box[2]) | (kept[:, 2] < box[0]) | (kept[:, 1] > box[3]) | (kept[:, 3] < box[1])
        assert apart.all()


@pytest.mark.parametrize("share", [0.5, 0.25, 0.2, 0.1])
def test_about_the_asked_share_of_the_land_is_for_testing(share: float) -> None:
    rng = np.random.default_rng(0)
    position = np.stack([rng.uniform(48.0, 48.3, 20_000), rng.uniform(11.0, 11.4, 20_000)], axis=1)
    assert in_test_block(position, 500.0, share).mean() == pytest.approx(share, abs=0.01)


def test_a_photo_that_comes_later_changes_nothing_for_the_others() -> None:
    position = np.random.default_rng(1).uniform((48.0, 11.0), (48.1, 11.1), (500, 2))
    assert (in_test_block(position, 300.0, 0.2)[:400] == in_test_block(position[:400], 300.0, 0.2)).all()


def test_the_nearest_is_found_on_the_ground_not_in_degrees() -> None:
    known = np.array([[60.0, 10.0], [60.01, 10.015]])  # a degree of longitude is half as long there
    assert nearest_row(np.array([[60.0, 10.012]]), known).tolist() == [0]
    assert nearest_row(np.array([[0.0, 179.9999]]), np.array([[0.0, 179.0], [0.0, -179.9999]])).tolist() == [1]


@pytest.mark.parametrize(("block", "share"), [(100.0, 0.2), (1000.0, 0.0), (1000.0, 0.6)])
def test_blocks_that_make_no_sense_are_refused(block: float, share: float) -> None:
    with pytest.raises(BadInput, match="block_metres|test_share"):
        check_blocks(block, share, 60.0)
