from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sharding
from geostream.errors import BadInput
from sharding.places import Place, RawImage, View, assign_keys, sorted_places

NAMES = st.tuples(st.sampled_from(["A", "B"]), st.text(min_size=1, max_size=120).filter(lambda n: max(n) < "\ud800"))


@settings(max_examples=100, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=12, unique=True), st.randoms())
def test_keys_are_unique_clean_and_independent_of_order(tiles: list[tuple[str, str]], random: object) -> None:
    keys = assign_keys(tiles)
    shuffled = list(tiles)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert assign_keys(shuffled) == keys
    assert len(set(keys.values())) == len(tiles)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in keys.values())


def test_keys_that_collide_all_get_a_suffix() -> None:
    keys = assign_keys([("X", "a.b.png"), ("X", "a,b.png"), ("X", "c.png")])
    assert keys["X", "c.png"] == "X_c"
    assert re.fullmatch(r"X_a-b_[0-9a-f]{8}", keys["X", "a.b.png"])
    assert re.fullmatch(r"X_a-b_[0-9a-f]{8}", keys["X", "a,b.png"])


def test_key_of_a_vigor_tile_holds_no_dot() -> None:
    tile = ("NewYork", "satellite_40.7010870725_-74.0191359886.png")
    assert assign_keys([tile])[tile] == "NewYork_satellite_40-7010870725_-74-0191359886"


def test_places_and_views_are_sorted_whatever_the_lists_order() -> None:
    def view(name: str, split: str) -> View:
        return View(RawImage(name, "x:1"), split)

    views = (view("0", "gallery"), view("c", "train"), view("a", "test"), view("b", "train"))
    places = [
        Place(key, area, ("train",), RawImage(key, "x:1"), views=views)
        for area, key in (("B", "b"), ("A", "b"), ("A", "a"))
    ]
    ordered = sorted_places(places)
    assert [(p.area, p.key) for p in ordered] == [("A", "a"), ("A", "b"), ("B", "b")]
    assert [v.image.path for v in ordered[0].views] == ["b", "c", "a", "0"]


def test_adapters_are_called_by_name_and_know_their_options(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'vigour'.* vigor, cvusa, cvact, university1652"):
        sharding.read_places("vigour", tmp_path)
    with pytest.raises(BadInput, match="vigor .*city; .*protocol, train_cities, test_cities"):
        sharding.read_places("vigor", tmp_path, city="Chicago")
    with pytest.raises(BadInput, match="cvusa .*protocol; .*none"):
        sharding.read_places("cvusa", tmp_path, protocol="val")
    with pytest.raises(BadInput, match="cvact .*views; .*protocol"):
        sharding.read_places("cvact", tmp_path, views="drone")
    with pytest.raises(BadInput, match="university1652 .*protocol; .*views"):
        sharding.read_places("university1652", tmp_path, protocol="val")
