"""Where queries lie in their tiles: by hand, by property, and on the page of a real layout."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geostream.report.pairs_page import pairs_page
from geostream.report.spots import Spots, find_spots, metres_between, pick_spots, scale_bar
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from sharding.simcity import CitySpec, render_cities
from tests.cities import city
from tests.command import refused, said
from tests.helpers import tiny_layout
from tests.report.self_contained import needs_nothing_else


def test_degrees_become_metres() -> None:
    tile = np.array([[60.0, 10.0], [0.0, 179.9999], [47.0, 15.0]])
    view = np.array([[60.001, 10.001], [0.0, -179.9999], [np.nan, np.nan]])
    east, north = metres_between(tile, view, "latlon").T
    assert (north[0], east[0]) == pytest.approx((111.195, 55.5975), rel=1e-4)
    assert east[1] == pytest.approx(22.239, rel=1e-3), "across the date line"
    assert np.isnan([east[2], north[2]]).all()
    assert metres_between(tile[:1], np.add(tile[:1], [3.0, -4.0]), "utm").tolist() == [[-4.0, 3.0]]


@given(side=st.floats(0.5, 1e5))
def test_a_scale_bar_is_a_round_number_that_fits(side: float) -> None:
    bar = scale_bar(side)
    assert 0.15 * side <= bar <= 0.4 * side * (1 + 1e-6)
    assert round(bar / 10.0 ** math.floor(math.log10(bar * (1 + 1e-9))), 6) in (1, 2, 5)


def spots_of(offset: list[list[float]], side: float = 70.0) -> Spots:
    n = len(offset)
    return Spots(np.arange(n, dtype=np.int32), np.zeros(n, np.int16), np.array(offset), np.full(n, side))


def test_the_farthest_are_picked_first_and_each_once() -> None:
    spots = spots_of([[0.0, 0.0], [50.0, 0.0], [np.nan, np.nan], [0.0, -36.0], [1.0, 1.0]])
    assert spots.outside.tolist() == [False, True, False, True, False]
    assert pick_spots(spots, 2, 2).tolist() == [1, 3, 0, 4]
    assert pick_spots(spots, 9, 0).tolist() == [1, 3, 4, 0]
    assert sorted(pick_spots(spots, 2, 9).tolist()) == [0, 1, 2, 3, 4]
    assert pick_spots(spots_of([[0.0, 0.0]], np.nan), 2, 2).tolist() == [0]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("city") / "raw"
    cities = [CitySpec("NewYork", 3, 4), CitySpec("Chicago", 3, 3)]
    render_cities(raw, cities, seed=1, tile_size=32, view_size=(16, 64), workers=1)
    return raw


TWO = {"train_cities": ["NewYork"], "test_cities": ["Chicago"]}
SMALL = ShardOptions(tile_size=(32, 32), view_size=(16, 64))


def test_a_rendered_city_lies_where_its_labels_say(raw: Path, tmp_path: Path) -> None:
    """VIGOR's offsets in the label files are pixels of 640 a tile; signs: see sharding/simcity/vigor.py."""
    layout = shard(read_places("vigor", raw, **TWO), Store.open(tmp_path), "vigor", options=SMALL, workers=1).layout
    spots, rows = find_spots(layout), layout.places.to_pylist()
    labels = {
        line.split()[0]: line.split()[2:4]
        for name in ("NewYork", "Chicago")
        for line in (raw / "splits" / name / "pano_label_balanced.txt").read_text().splitlines()
    }
    assert len(labels) == len(spots.place) > 10 and not spots.outside.any()
    for place, view, (east, north) in zip(spots.place, spots.view, spots.offset, strict=True):
        row, column = map(float, labels[rows[place]["views"][view]["source"].rpartition("/")[2]])
        assert [east, north] == pytest.approx([-column * 0.11, -row * 0.11], abs=0.4)
    assert spots.side.min() > 60 and spots.side.max() < 80


def test_slipped_columns_are_seen_on_the_page(raw: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    shard(read_places("vigor", raw, **TWO), store, "good", options=SMALL, workers=1)
    page = tmp_path / "page.html"
    assert str(page) in said("inspect", store.url, "--page", str(page))
    text = page.read_text()
    needs_nothing_else(text)
    assert "queries were taken within their tile" in text and "outside the tile" not in text
    assert text.count('class="spot"') == text.count('class="pair"') >= 12 and "20 m" in text
    lines = (raw / "splits" / "NewYork" / "pano_label_balanced.txt").read_text().splitlines()
    slipped = [
        " ".join([one.split()[0], *other.split()[1:]]) for one, other in zip(lines, lines[3:] + lines[:3], strict=True)
    ]
    wrong = tmp_path / "raw"
    wrong.symlink_to(raw)
    (tmp_path / "copy").mkdir()
    for folder in ("NewYork", "Chicago"):
        (tmp_path / "copy" / folder).symlink_to(raw / folder)
    for name in ("NewYork", "Chicago"):
        splits = tmp_path / "copy" / "splits" / name
        splits.mkdir(parents=True)
        for file in (raw / "splits" / name).iterdir():
            (splits / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy" / "splits" / "NewYork" / "pano_label_balanced.txt").write_text("\n".join(slipped))
    bad = shard(read_places("vigor", tmp_path / "copy", **TWO), store, "bad", options=SMALL, workers=1).layout
    text = pairs_page(bad)
    needs_nothing_else(text)
    count = int(find_spots(bad).outside.sum())
    assert count >= len(slipped) // 2 and f"<b>{count}</b> of" in text and "outside the tile" in text
    assert "no such folder" in refused(
        "inspect", store.url, "--dataset", "bad", "--page", str(tmp_path / "no" / "p.html")
    )


def test_without_coordinates_or_scale_pairs_are_shown_alone(tmp_path: Path) -> None:
    text = pairs_page(tiny_layout(Store.open(tmp_path)))
    needs_nothing_else(text)
    assert "How large a tile is" in text and 'class="spot"' not in text and 12 <= text.count('class="pair"') <= 18
    layout = city(Store.open(tmp_path / "utm"))
    layout.info["tile_metres"] = 70.0
    assert find_spots(layout).side.tolist() == [70.0] * len(find_spots(layout).place)


def test_who_took_the_imagery_is_named(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path))
    layout.info["source"] |= {"attribution": "Survey <of> Styria", "licence": "CC BY 4.0"}
    assert "Imagery: CC BY 4.0 · Survey &lt;of&gt; Styria" in pairs_page(layout)
