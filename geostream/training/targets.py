"""Decide what the loss aims at for the pairs of a batch: which of them are no negatives, and how the target is spread.

Two places that lie next to each other show much of the same ground, so the tile of one is no plain negative of the
other's view. There are two remedies, which can be combined:

- ``negative_radius``: pairs whose places are within it, and semi-positives, are left out of each other's denominators,
  in both directions (Fervers et al., Statewide Visual Geolocalization in the Wild, ECCV 2024, and the authors' code).
- ``soft_targets``: the share of label smoothing is spread in proportion to exp(-metres / soft_targets), the pair itself
  included, at 0 metres. So a pair without near places has its whole target at the positive, and with a very large scale
  all pairs get the same, which is label smoothing. The kernel is that of PIGEON (Haas et al., CVPR 2024). Overlap of
  tiles (Game4Loc, Ji et al., AAAI 2025) would need the side of the tiles, which a layout need not have.

What is left out has no share of the target. So of a radius and soft targets together, the latter act beyond the radius.
Decoupled, each target is left out of its own denominator, those of label smoothing as well (Fervers et al., too).

Coordinates are those of the tiles. Places of two areas or data sets, and those with unknown coordinates, count as
infinitely far apart; two views of one place as 0 metres. For B pairs this takes about B² × 60 ns on the CPU, while a
GPU embeds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from geostream.arrays import Bools, Csr, Float64, Int32, listed, take
from geostream.layout import Layout
from geostream.mining.gps import place_points
from geostream.settings import TrainSettings
from geostream.training.loss import Targets


class Relations(NamedTuple):
    """How the places of B pairs lie to one another."""

    metres: Float64  # (B, B) distances, infinite where unknown, 0 for two pairs of one place
    excluded: Bools  # (B, B) whether one is a semi-positive of the other


class PairPlaces:
    """The places of a layout's training pairs.

    It holds 24 bytes for each place and 4 for each pair, beside the layout's lists of excluded places, in the trainer's
    process only.

    Args:
        layout: A layout with coordinates.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._place: Int32 = layout.pairs("train").place
        self._excluded: Csr = layout.excluded("train")

    def relations(self, pair: Tensor) -> Relations:
        """Return how the places of some pairs lie to one another.

        Args:
            pair: (B,) pair ids.
        """
        from scipy.spatial.distance import cdist  # here, because only these settings need it

        place = self._place[pair.numpy()]
        points, area = place_points(self._layout, place), self._layout.area[place]
        metres = cdist(points, points)
        metres[np.isnan(metres) | (area[:, None] != area)] = np.inf
        metres[place[:, None] == place] = 0.0
        return Relations(metres, listed(take(self._excluded, place), np.arange(len(place))[:, None], place))


def batch_targets(pair: Tensor, places: PairPlaces | None, settings: TrainSettings, device: torch.device) -> Targets:
    """Return what the loss of a batch aims at.

    Args:
        pair: (B,) pair ids, on the CPU.
        places: The places of the pairs; None where no setting asks for coordinates.
        settings: The run's settings.
        device: Where the targets go.
    """
    n, loss = len(pair), settings.loss
    relations = Relations(np.full((n, n), np.inf), np.zeros((n, n), bool)) if places is None else places.relations(pair)
    left_out = not_negatives(relations, loss.negative_radius)
    share = shares(relations.metres, left_out, settings.optim.label_smoothing, loss.soft_targets)
    here = torch.from_numpy(share.astype(np.float32)).to(device), torch.from_numpy(left_out).to(device)
    return Targets(*here, loss.decoupled)


def not_negatives(relations: Relations, radius: float) -> Bools:
    """Return which pairs are no negatives of each other: near ones and semi-positives; with radius 0 none.

    Args:
        relations: How the places of B pairs lie to one another.
        radius: Metres, the limit included.

    Returns:
        (B, B), symmetric, False on the diagonal.
    """
    if not radius:
        return np.zeros_like(relations.excluded)
    near: Bools = (relations.metres <= radius) | relations.excluded
    return near & ~np.eye(len(near), dtype=bool)


def shares(metres: Float64, left_out: Bools, smoothing: float, scale: float) -> Float64:
    """Return the share that each pair has of each row's target.

    Args:
        metres: (B, B) distances of the places.
        left_out: (B, B) pairs that get nothing.
        smoothing: Share that is spread over the pairs; the rest is the positive's.
        scale: Metres over which a pair's part of that falls to 1/e; 0: all have the same.

    Returns:
        (B, B), rows add up to 1.
    """
    own = np.eye(len(metres))
    weight = np.maximum(np.exp(-metres / scale), own) if scale else np.ones_like(metres)
    weight = np.where(left_out, 0.0, weight)
    share: Float64 = (1 - smoothing) * own + smoothing * weight / weight.sum(axis=1, keepdims=True)
    return share
