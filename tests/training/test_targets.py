"""Which pairs are no negatives, and how the target is spread: against the rules in plain Python, and on a layout."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.layout.join import join_layouts
from geostream.runs.begin import check_coordinates
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.targets import PairPlaces, Relations, batch_targets, not_negatives, shares
from tests.cities import SPACING, city

PAIRS = torch.tensor([0, 1, 2, 5, 30])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Two areas of 5 × 5 places; up to three views each."""
    return city(Store.open(tmp_path_factory.mktemp("city")), side=5, views=3)


@st.composite
def relations(draw: st.DrawFn) -> Relations:
    """Points on a line, some of them unknown; some excluded."""
    at = draw(st.lists(st.floats(0, 200) | st.just(math.inf), min_size=1, max_size=7))
    n = len(at)
    metres = np.array([[0.0 if i == j else abs(a - b) for j, b in enumerate(at)] for i, a in enumerate(at)])
    flags = np.array(draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n)), dtype=bool).reshape(n, n)
    return Relations(np.nan_to_num(metres, nan=np.inf), (flags | flags.T) & ~np.eye(n, dtype=bool))


@given(relations(), st.sampled_from([0.0, 30.0, 100.0]))
def test_near_places_and_semi_positives_are_no_negatives(found: Relations, radius: float) -> None:
    left_out = not_negatives(found, radius)
    for i, row in enumerate(left_out.tolist()):
        for j, made in enumerate(row):
            near = found.metres[i, j] <= radius or bool(found.excluded[i, j])
            assert made == (radius > 0 and i != j and near)
    assert (left_out == left_out.T).all()


@given(relations(), st.sampled_from([0.0, 30.0]), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.0, 1.0, 50.0]))
def test_shares_are_a_target(found: Relations, radius: float, smoothing: float, scale: float) -> None:
    left_out = not_negatives(found, radius)
    made = shares(found.metres, left_out, smoothing, scale)
    assert made.sum(axis=1) == pytest.approx(1)
    assert not made[left_out].any() and (made >= 0).all()
    for i, row in enumerate(made):
        assert row[i] >= 1 - smoothing
        weight = [
            (not left_out[i, j]) * (1.0 if not scale else math.exp(-found.metres[i, j] / scale))
            for j in range(len(row))
        ]
        wanted = [(1 - smoothing) * (i == j) + smoothing * weight[j] / sum(weight) for j in range(len(row))]
        assert row.tolist() == pytest.approx(wanted)


def test_a_large_scale_is_label_smoothing_and_a_small_one_the_positive_alone() -> None:
    metres = np.abs(np.subtract.outer(np.arange(4.0), np.arange(4.0))) * 50
    nothing = np.zeros((4, 4), bool)
    assert shares(metres, nothing, 0.1, 1e9) == pytest.approx(shares(metres, nothing, 0.1, 0.0))
    assert shares(metres, nothing, 0.1, 1e-3) == pytest.approx(np.eye(4))


def test_relations_on_a_layout(layout: Layout) -> None:
    """Pairs are views; distances are those of their places' tiles, within an area."""
    places = PairPlaces(layout)
    place = layout.pairs("train").place
    every = torch.arange(len(place))
    found = places.relations(every)
    excluded = layout.excluded("train")
    for i, one in enumerate(place.tolist()):
        for j, other in enumerate(place.tolist()):
            north, east = layout.position[one] - layout.position[other]
            wanted = math.hypot(north, east) if layout.area[one] == layout.area[other] else math.inf
            assert found.metres[i, j] == pytest.approx(wanted, abs=1e-6)
            assert found.excluded[i, j] == (other in excluded.row(one))
    assert (found.metres == SPACING).any() and (found.excluded & (found.metres > SPACING)).any()
    assert (np.isfinite(found.metres) & (found.metres == 0)).sum() > len(place), "two views of a place are at 0 m"


def test_degrees_are_metres_too(tmp_path: Path) -> None:
    layout = city(Store.open(tmp_path), side=3, areas=1, coordinates="latlon")
    north, east = (PairPlaces(layout).relations(torch.tensor([0, other])).metres[0, 1] for other in (3, 1))
    assert north == pytest.approx(6_371_008.8 * math.radians(3e-4), abs=1e-3)
    assert east == pytest.approx(6_371_008.8 * math.radians(4e-4) * math.cos(math.radians(40)), abs=1e-3)


def test_each_of_joined_data_sets_has_its_own_coordinates(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    sources = [city(store, side=3, areas=1, coordinates=kind, dataset=kind) for kind in ("latlon", "utm")]
    joined, _ = join_layouts(store, "both", sources)
    check_coordinates(TrainSettings().changed(negative_radius=30.0), joined)
    place = joined.pairs("train").place
    found = PairPlaces(joined).relations(torch.arange(len(place))).metres
    for number, source in enumerate(sources):
        mine = joined.part[place] == number
        alone = PairPlaces(source).relations(torch.arange(len(source.pairs("train"))))
        assert found[np.ix_(mine, mine)] == pytest.approx(alone.metres)
        assert np.isinf(found[np.ix_(mine, ~mine)]).all()


def test_unknown_coordinates_are_plain_negatives(tmp_path: Path) -> None:
    layout = city(Store.open(tmp_path), side=3, areas=1, views=3)
    layout.position[4] = np.nan
    pair = torch.from_numpy(np.flatnonzero(layout.pairs("train").place >= 3))
    of = layout.pairs("train").place[pair.numpy()]
    metres = PairPlaces(layout).relations(pair).metres
    unknown = of == 4
    assert np.isinf(metres[unknown][:, ~unknown]).all() and np.isinf(metres[~unknown][:, unknown]).all()
    assert unknown.sum() > 1 and not metres[unknown][:, unknown].any(), "but two views of one place are at 0 m"
    settings = TrainSettings().changed(negative_radius=1e6, soft_targets=1e6)
    made = batch_targets(pair, PairPlaces(layout), settings, CPU)
    assert torch.isfinite(made.share).all()


def test_targets_of_a_batch(layout: Layout) -> None:
    settings = TrainSettings().changed(negative_radius=40.0, soft_targets=100.0, decoupled=True)
    made = batch_targets(PAIRS, PairPlaces(layout), settings, CPU)
    assert made.decoupled and made.share.dtype == torch.float32 and made.left_out.any()
    assert torch.equal(made.left_out, made.left_out.T) and not made.left_out.diagonal().any()
    alone = batch_targets(PAIRS, None, TrainSettings().changed(decoupled=True), CPU)
    assert alone.decoupled and not alone.left_out.any()
    torch.testing.assert_close(alone.share, 0.9 * torch.eye(5) + 0.02)


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    bare = city(Store.open(tmp_path), side=2, coordinates="none")
    for name in ("negative_radius", "soft_targets"):
        with pytest.raises(BadInput, match=name):
            check_coordinates(TrainSettings().changed(**{name: 30.0}), bare)
    check_coordinates(TrainSettings().changed(decoupled=True), bare)
    with pytest.raises(BadInput, match="soft_targets"):
        TrainSettings().changed(soft_targets=30.0, label_smoothing=0.0)
