"""Split a region into training and test so that no tile of one overlaps a tile of the other: pure functions on arrays.

Where nobody says what is test, squares of land are: every n-th block, in the pattern of a knight's moves, so that a row
of n blocks has one and test blocks do not touch. Which block a spot lies in follows from its position alone. So photos
that come later change nothing for those that were there. Training tiles that overlap a test tile are left out.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Bools, Float64
from geostream.errors import BadInput
from sharding.tiles.grid import LONGEST_DEGREE, metres_per_degree

SMALLEST = 3  # sides of a tile: in smaller blocks nearly every training tile would overlap a test tile


def check_blocks(block_metres: float, test_share: float, metres: float) -> None:
    """Raise BadInput where blocks are too small for tiles of ``metres``, or the share makes no sense."""
    if not 0 < test_share <= 0.5:
        raise BadInput(f"test_share {test_share:g}: choose a share of the blocks above 0 and at most 0.5")
    if block_metres < SMALLEST * metres:
        raise BadInput(
            f"block_metres {block_metres:g}: blocks of tiles of {metres:g} m need {SMALLEST * metres:g} m at least, "
            "else training tiles overlap test tiles everywhere"
        )


def in_test_block(position: Float64, block_metres: float, test_share: float) -> Bools:
    """Return which points lie in a block that is for testing.

    Args:
        position: (n, 2) latitudes and longitudes.
        block_metres: side of a block.
        test_share: share of the blocks that are for testing; one over it is rounded to a whole number.

    Returns:
        (n,) whether each does.
    """
    every = round(1 / test_share)
    step = block_metres / LONGEST_DEGREE
    row = np.floor(position[:, 0] / step)
    width = block_metres / metres_per_degree((row + 0.5) * step)[1]  # one for the whole row of blocks
    column = np.floor(position[:, 1] / width)
    inside: Bools = (column + 2 * row) % every == 0
    return inside


def overlaps_any(boxes: Float64, others: Float64) -> Bools:
    """Return which boxes overlap or touch one of the others.

    Args:
        boxes: (n, 4) west, south, east, north.
        others: (m, 4) likewise.

    Returns:
        (n,) whether each does.
    """
    from shapely import STRtree, box

    found = np.zeros(len(boxes), dtype=bool)
    if len(boxes) and len(others):
        found[STRtree(box(*others.T)).query(box(*boxes.T), predicate="intersects")[0]] = True
    return found


def nearest_row(position: Float64, known: Float64) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return for each point the row of the nearest of some known points, on the ground.

    Args:
        position: (n, 2) latitudes and longitudes.
        known: (m, 2) likewise, one at least.

    Returns:
        (n,) rows of ``known``.
    """
    from scipy.spatial import cKDTree

    def unit(points: Float64) -> Float64:
        phi, lam = np.deg2rad(points).T
        return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=1)

    rows: np.ndarray[tuple[int], np.dtype[np.int64]] = cKDTree(unit(known)).query(unit(position))[1].astype(np.int64)
    return rows
