from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geostream.errors import BadInput
from geostream.layout import open_layout
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from tests.sharding.test_writer import contents
from tests.vigor_raw import jpeg, png

SMALL = ShardOptions(tile_size=(20, 20), view_size=(8, 44), shard_bytes=8000)
TRAIN, VAL, LOCATIONS = "splits/train-19zl.csv", "splits/val-19zl.csv", "split_locations/all.csv"


def paths(number: int) -> tuple[str, str]:
    return f"bingmap/19/{number:07d}.jpg", f"streetview/panos/{number:07d}.jpg"


def line(number: int) -> str:
    return ",".join([*paths(number), f"streetview/annotations/{number:07d}.png"])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Pairs 1 to 20: every fourth is for testing."""
    rng = np.random.default_rng(1)
    root = tmp_path / "raw"
    for folder in ("bingmap/19", "streetview/panos", "splits", "split_locations"):
        (root / folder).mkdir(parents=True)
    for number in range(1, 21):
        tile, panorama = paths(number)
        (root / tile).write_bytes(jpeg(rng, (30, 30)))
        (root / panorama).write_bytes(jpeg(rng, (16, 88)))
    write(root, TRAIN, [line(n) for n in range(1, 21) if n % 4])
    write(root, VAL, [line(n) for n in range(1, 21) if n % 4 == 0])
    write(root, LOCATIONS, [f"{30 + n / 10},{-100 - n},{30.01 + n / 10},{-100.01 - n},x" for n in range(1, 21)])
    return root


def write(root: Path, name: str, lines: list[str]) -> None:
    (root / name).write_text("\n".join(lines) + "\n")


def edit(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    return lambda root: write(root, name, change((root / name).read_text().splitlines()))


def test_one_place_a_line(raw: Path) -> None:
    places = read_places("cvusa", raw)
    assert (places.coordinates, places.protocols, places.notes) == ("latlon", ("paired",), ())
    assert (places.tile_size, places.view_size) == ((384, 384), (140, 768))
    assert (places.count("train"), places.count("test"), len(places.places)) == (15, 5, 20)
    by_key = {place.key: place for place in places.places}
    place = by_key["USA_bingmap-19-0000007"]
    [view] = place.views
    assert (place.area, place.splits, view.split) == ("USA", ("train",), "train")
    assert (place.tile.path, view.image.path) == paths(7)
    assert (place.north, place.east, view.north, view.east) == pytest.approx((30.7, -107.0, 30.71, -107.01))
    assert place.tile.named == view.image.named == f"{TRAIN}:6"
    assert by_key["USA_bingmap-19-0000020"].splits == ("test",)
    assert all(image.present for place in places.places for image in place.images())


def test_lists_as_they_come(raw: Path) -> None:
    """BOM, Windows line ends, blank and repeated lines, quotes, blanks around cells, no annotation, ./: the same."""
    plain = read_places("cvusa", raw)
    odd = []
    for n, old in enumerate((raw / TRAIN).read_text().splitlines()[::-1]):
        tile, view, _ = old.split(",")
        odd.append(f'"{tile}" ,  "{view}"  ' if n % 2 else f"./{tile},{view},,")
    (raw / TRAIN).write_bytes(("\ufeff" + "\r\n".join(["", odd[3], *odd, "   "])).encode())
    (raw / LOCATIONS).write_bytes(
        ("\ufeff" + "\r\n".join(["", *(raw / LOCATIONS).read_text().splitlines(), ""])).encode()
    )
    read = read_places("cvusa", raw)
    assert read.notes == ("1 lines repeat an earlier one and were read once",)
    for one, other in zip(read.places, plain.places, strict=True):
        assert (one.key, one.north, one.east, one.tile.path) == (other.key, other.north, other.east, other.tile.path)
        assert [(v.image.path, v.split, v.north) for v in one.views] == [
            (v.image.path, v.split, v.north) for v in other.views
        ]


def test_odd_names_are_stored_and_found(raw: Path, tmp_path: Path) -> None:
    """Commas, dots, blanks and accents in names; upper-case suffixes; PNG where the list says JPEG."""
    tile, panorama = "bingmap/19/a,b. c'é.x.jpg", "streetview/panos/a,b. c'é.x.jpg"
    rng = np.random.default_rng(2)
    (raw / tile).write_bytes(jpeg(rng, (30, 30)))
    (raw / panorama.replace(".jpg", ".PNG")).write_bytes(png(rng, (16, 88)))
    (raw / paths(1)[0]).rename(raw / paths(1)[0].replace(".jpg", ".JPEG"))
    edit(TRAIN, lambda lines: [*lines, f'"{tile}","{panorama}"'])(raw)
    places = read_places("cvusa", raw)
    assert places.notes == (f"{LOCATIONS} has no row for 1 of 21 tiles: no coordinates",)
    layout = shard(places, Store.open(tmp_path / "store"), "cvusa", options=SMALL, workers=1).layout
    assert layout.n_places == 21 and layout.info["broken"] == []
    row = layout.keys.index("USA_bingmap-19-a-b--c---x")
    assert layout.places["source"][row].as_py() == tile
    assert layout.places["views"][row].as_py()[0]["source"] == panorama.replace(".jpg", ".PNG")
    assert math.isnan(layout.position[row, 0])


def test_without_coordinates(raw: Path, tmp_path: Path) -> None:
    (raw / LOCATIONS).unlink()
    places = read_places("cvusa", raw)
    assert places.coordinates == "none"
    [note] = places.notes
    assert LOCATIONS in note and "GPS" in note
    layout = shard(places, Store.open(tmp_path / "store"), "cvusa", options=SMALL, workers=1).layout
    assert layout.coordinates == "none" and np.isnan(layout.position).all()


def test_a_tile_with_several_panoramas_is_one_place(raw: Path) -> None:
    edit(TRAIN, lambda lines: [f"{paths(1)[0]},{paths(4)[1]}", *lines])(raw)
    edit(VAL, lambda lines: [f"{paths(1)[0]},{paths(8)[1]}", *lines[2:]])(raw)
    place = next(place for place in read_places("cvusa", raw).places if place.tile.path == paths(1)[0])
    assert place.splits == ("train", "test")
    assert [(view.split, view.image.path) for view in place.views] == [
        ("train", paths(1)[1]),
        ("train", paths(4)[1]),
        ("test", paths(8)[1]),
    ]


def test_missing_images_are_marked_with_their_line(raw: Path) -> None:
    (raw / paths(2)[0]).unlink()
    shutil.rmtree(raw / "streetview")
    images = [image for place in read_places("cvusa", raw).places for image in place.images() if not image.present]
    assert len(images) == 21
    assert {image.named for image in images if image.path.startswith("bingmap")} == {f"{TRAIN}:2"}


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "one column": (edit(TRAIN, lambda x: [x[0], paths(2)[0]]), r"train-19zl\.csv:2: 1 columns"),
    "a quote left open": (edit(TRAIN, lambda x: [x[0], f'"{x[1]}']), r"train-19zl\.csv:2: .*comma-separated"),
    "a header": (edit(VAL, lambda x: ["satellite,ground", *x]), r"val-19zl\.csv:1: 'satellite' .*path"),
    "out of the folder": (edit(TRAIN, lambda x: ["../a.jpg,b.jpg"]), r"train-19zl\.csv:1: '\.\./a\.jpg' "),
    "two tiles": (
        edit(TRAIN, lambda x: [*x, f"{paths(9)[0]},{paths(1)[1]}"]),
        r"train-19zl\.csv:16: streetview/\S+ contradicts .*splits/train-19zl\.csv:1;",
    ),
    "both splits": (
        edit(VAL, lambda x: [line(3), *x]),
        r"val-19zl\.csv:1: streetview/\S+ contradicts .*splits/train-19zl\.csv:3;",
    ),
    "no number": (edit(LOCATIONS, lambda x: ["a,b,c,d", *x[1:]]), r"all\.csv:1: 'a' .*latitude"),
    "not on Earth": (edit(LOCATIONS, lambda x: [x[0], "91,0,0,0"]), r"all\.csv:2: .*0000002\.jpg .*latitude 91"),
    "three columns": (edit(LOCATIONS, lambda x: [x[0], "1,2,3"]), r"all\.csv:2: 3 columns"),
    "no list": (lambda root: (root / VAL).unlink(), r"val-19zl\.csv: "),
    "no folder": (lambda root: shutil.rmtree(root), r"no such folder.* CVUSA"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_file_and_line(raw: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(raw)
    with pytest.raises(BadInput, match=message):
        read_places("cvusa", raw)


def test_the_same_bytes_whatever_the_order_of_lines(raw: Path, tmp_path: Path) -> None:
    one, two = Store.open(tmp_path / "one"), Store.open(tmp_path / "two")
    layout = shard(read_places("cvusa", raw), one, "cvusa", options=SMALL, workers=1).layout
    for name in (TRAIN, VAL):
        edit(name, lambda lines: lines[::-1])(raw)
    shard(read_places("cvusa", raw), two, "cvusa", options=SMALL, workers=1)
    assert len(layout.shard_names) > 2 and contents(one) == contents(two)
    reopened = open_layout(two, "cvusa")
    assert reopened.info["pairs"] == {"train": 15, "test": 5}
    assert reopened.info["images"] == {"tile_size": [20, 20], "view_size": [8, 44], "quality": 90, "enlarged": 0}
