"""Narrow a panorama to the part that an ordinary photo shows of it.

The part is shown where and as large as it would be in a panorama that looks its way: in the middle, at the same scale,
and black around it. So the network needs images of one size only, and a photo whose field of view is known can be put
in the same form (:mod:`geostream.locating.view`). An ordinary photo is as high as three quarters of its width; a part
that would be higher than the panorama is as high as this. Pixels of the panorama are taken to be as high as wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from geostream.images import Pixels

WHOLE = 360.0  # degrees
EVALUATED = (70.0, 90.0, 180.0, WHOLE)  # as papers do since Shi et al., CVPR 2020
HEIGHT_OF_PHOTO = 0.75  # of its width


def narrow(view: Pixels, degrees: float, heading: float) -> Pixels:
    """Show only a part of a panorama, moved into the middle.

    Args:
        view: (h, w, 3) pixels.
        degrees: How much of the horizon is shown; 360 shows the whole panorama, turned.
        heading: Where the part has its middle, in turns clockwise from the panorama's middle column.

    Returns:
        (h, w, 3) pixels, black outside of the part.
    """
    height, width = view.shape[:2]
    columns = min(width, max(1, round(width * degrees / WHOLE)))
    rows = height if columns == width else min(height, max(1, round(columns * HEIGHT_OF_PHOTO)))
    left, top = (width - columns) // 2, (height - rows) // 2
    shown = np.zeros_like(view)
    from_columns = (np.arange(left, left + columns) + round(heading * width)) % width
    shown[top : top + rows, left : left + columns] = view[top : top + rows, from_columns]
    return shown


@dataclass(frozen=True)
class Narrowing:
    """A stage of the loader's pipeline that narrows the views of a scan, to evaluate with another field of view.

    The heading of each view is random, but the same each time, because later photos look anywhere, too.

    Attributes:
        degrees: How much of the horizon each view shows.
        seed: Of the headings.
    """

    degrees: float
    seed: int = 0

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Narrow the view of a sample, if it has one."""
        if "view" not in sample:
            return sample
        heading = np.random.default_rng([self.seed, int(sample["query"])]).random()
        return sample | {"view": narrow(sample["view"], self.degrees, heading)}
