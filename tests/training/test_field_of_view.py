"""Panoramas narrowed to what an ordinary photo shows; without the setting, training is what it was."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from geostream.errors import BadInput
from geostream.settings import TrainSettings, make_settings, parse_settings
from geostream.training.augment import Augmentation
from geostream.training.field_of_view import Narrowing, narrow


def numbered(height: int = 90, width: int = 360) -> np.ndarray:
    """Each column has its own number, from 1, in two digits to the base 200; each row in the third."""
    rows, columns = np.mgrid[1 : height + 1, 1 : width + 1]
    return np.stack([columns // 200, columns % 200, rows], axis=2).astype(np.uint8)


@hypothesis_settings(deadline=None, max_examples=50)
@given(degrees=st.floats(1, 360), heading=st.floats(0, 1, exclude_max=True))
def test_the_part_is_in_the_middle_and_looks_where_it_should(degrees: float, heading: float) -> None:
    shown = narrow(numbered(), degrees, heading)
    assert shown.shape == (90, 360, 3)
    rows, columns = (np.flatnonzero(shown[..., 2].any(axis=axis)) for axis in (1, 0))
    assert len(columns) == pytest.approx(degrees, abs=0.51) and (np.diff(columns) == 1).all()
    assert columns[0] + columns[-1] == pytest.approx(359, abs=1) and rows[0] + rows[-1] == pytest.approx(89, abs=1)
    assert len(rows) == (90 if len(columns) == 360 else min(90, max(1, round(0.75 * len(columns)))))
    number = shown[rows[0], columns].astype(int) @ [200, 1, 0] - 1
    assert np.array_equal(number, (columns + round(heading * 360)) % 360)
    assert (shown[rows[0], columns, 2] == rows[0] + 1).all()


def sample(settings: TrainSettings, pair: int, epoch: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(pair)
    images = {"tile": rng.integers(1, 256, (32, 32, 3), np.uint8), "view": rng.integers(1, 256, (32, 128, 3), np.uint8)}
    return Augmentation.of(settings, epoch, 8)({**images, "pair": pair})


def digest(settings: TrainSettings) -> str:
    found = hashlib.sha256()
    for pair in range(8):
        for name, value in sorted(sample(settings, pair).items()):
            found.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:16]


def test_without_the_setting_training_is_bit_for_bit_what_it_was() -> None:
    """The digest is of the commit before the setting was there."""
    assert digest(TrainSettings().changed(jpeg_probability=0.0)) == "18bf6e3653af1c39"


def test_each_pair_and_epoch_has_a_part_of_its_own() -> None:
    settings = TrainSettings().changed(fov=[70, 180], jpeg_probability=0.0)
    whole = TrainSettings().changed(jpeg_probability=0.0)
    widths = []
    for pair in range(8):
        one, same, later = sample(settings, pair), sample(settings, pair), sample(settings, pair, epoch=2)
        assert np.array_equal(one["view"], same["view"]) and not np.array_equal(one["view"], later["view"])
        assert np.array_equal(one["tile"], sample(whole, pair)["tile"]), "nothing else is drawn otherwise"
        widths.append(int(one["view"].any(axis=(0, 2)).sum()))
    assert len(set(widths)) > 4 and min(widths) >= round(128 * 70 / 360) and max(widths) <= 64


def test_the_setting_is_one_number_or_two() -> None:
    assert TrainSettings().augment.fov == (360, 360) and not TrainSettings().augment.narrows
    assert parse_settings(["fov=90"], TrainSettings()).augment.fov == (90, 90)
    two = parse_settings(["fov=[70,360]"], TrainSettings())
    assert two.augment.fov == (70, 360) and two.augment.narrows
    assert make_settings(two.flat()) == two and make_settings(two.model_dump(mode="json")) == two
    old = TrainSettings().model_dump()
    del old["augment"]["fov"]
    assert make_settings(old) == TrainSettings(), "a run from before the setting goes on"


@pytest.mark.parametrize("wrong", ["fov=0", "fov=[360,70]", "fov=[70,400]", "fov=wide", "fov=[70]"])
def test_other_values_are_refused(wrong: str) -> None:
    with pytest.raises(BadInput, match="fov"):
        parse_settings([wrong], TrainSettings())
    with pytest.raises(BadInput, match="view_kind"):
        parse_settings(["fov=90", "view_kind=picture"], TrainSettings())


def test_an_evaluation_narrows_views_alone_and_the_same_way_each_time() -> None:
    change = Narrowing(90.0)
    view = numbered()
    one, other = (change({"view": view, "query": query})["view"] for query in (3, 4))
    assert np.array_equal(one, change({"view": view, "query": 3})["view"]) and not np.array_equal(one, other)
    tile = {"tile": view, "reference": 3}
    assert change(tile) is tile
