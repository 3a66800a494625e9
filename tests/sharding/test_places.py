from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sharding
from geostream.errors import BadInput
from sharding.places import FolderIndex, Place, RawImage, View, assign_keys, read_lines, sorted_places

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


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_lines_of_any_making(tmp_path: Path, ends: str, bom: str) -> None:
    (tmp_path / "list.txt").write_bytes((bom + ends.join(["one", "", "  two  ", "thr\u00e9e"])).encode())
    lines = read_lines(tmp_path, tmp_path / "list.txt")
    assert lines.lines == [(1, "one"), (3, "two"), (4, "thrée")]
    assert lines.where(3) == "list.txt:3"


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("one".encode("utf-16"))
    with pytest.raises(BadInput, match=r"list\.txt: not UTF-8"):
        read_lines(tmp_path, tmp_path / "list.txt")
    with pytest.raises(BadInput, match=r"none\.txt: cannot read it \(No such file"):
        read_lines(tmp_path, tmp_path / "none.txt")


def test_files_are_found_ignoring_case(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpg", "B.jpg", "c.jpg"):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / name).touch()
    index = FolderIndex(tmp_path, tmp_path / "f")
    assert index.find("a.jpg", "x:1") == RawImage("f/a.JPG", "x:1")
    assert index.find("b.jpg", "x:1").path == "f/b.jpg"
    assert index.find("no.jpg", "x:1") == RawImage("f/no.jpg", "x:1", present=False)
    assert not index.find("../f/c.jpg", "x:1").present
    with pytest.raises(BadInput, match=r"x:7: b\.JPG could be any of B\.jpg, b\.jpg"):
        index.find("b.JPG", "x:7")


def test_places_and_views_are_sorted_whatever_the_lists_order() -> None:
    def view(name: str, split: str) -> View:
        return View(RawImage(name, "x:1"), split)

    views = (view("c", "train"), view("a", "test"), view("b", "train"))
    places = [Place(key, area, ("train",), RawImage(key, "x:1"), views=views) for area, key in ["Bb", "Ab", "Aa"]]
    ordered = sorted_places(places)
    assert [(p.area, p.key) for p in ordered] == [("A", "a"), ("A", "b"), ("B", "b")]
    assert [v.image.path for v in ordered[0].views] == ["b", "c", "a"]


def test_adapters_are_called_by_name_and_know_their_options(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no adapter for 'vigour'; there is one for vigor"):
        sharding.read_places("vigour", tmp_path)
    with pytest.raises(BadInput, match="vigor has no option city; it has protocol, train_cities, test_cities"):
        sharding.read_places("vigor", tmp_path, city="Chicago")
