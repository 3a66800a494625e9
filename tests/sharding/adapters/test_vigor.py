from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from geostream.errors import BadInput
from sharding import read_places
from sharding.places import RawDataset
from tests.vigor_raw import write_city, write_vigor


def list_of(raw: Path, city: str, name: str = "pano_label_balanced") -> Path:
    return raw / "splits" / city / f"{name}.txt"


def two_cities(raw: Path) -> RawDataset:
    return read_places("vigor", raw, train_cities=["NewYork"], test_cities=["Chicago"])


@pytest.mark.parametrize("published", [True, False])
def test_cross_area(tmp_path: Path, published: bool) -> None:
    cities = write_vigor(tmp_path, published=published)
    raw = read_places("vigor", tmp_path)
    assert len(raw.places) == sum(len(city.tiles) for city in cities.values())
    assert raw.count("train") == len(cities["NewYork"].labels) + len(cities["Seattle"].labels)
    assert raw.count("test") == len(cities["Chicago"].labels) + len(cities["SanFrancisco"].labels)
    for place in raw.places:
        split = "train" if place.area in ("NewYork", "Seattle") else "test"
        assert place.splits == (split,)
        assert all(view.split == split for view in place.views)
        assert all((tmp_path / image.path).is_file() and image.present for image in place.images())
    assert {len(place.views) for place in raw.places} == {0, 1, 2}  # distractors included


def test_columns_coordinates_and_lines(tmp_path: Path) -> None:
    cities = {city: write_city(tmp_path, city) for city in ("NewYork", "Chicago")}
    raw = two_cities(tmp_path)
    by_key = {place.key: place for place in raw.places}
    line = cities["NewYork"].labels[2]
    name, positive, *_ = line.split()
    view, place = next((v, p) for p in raw.places for v in p.views if v.image.path.endswith(name))
    assert place.tile.path == f"NewYork/satellite/{positive}"
    assert (place.north, place.east) == tuple(float(x) for x in positive[:-4].split("_")[1:])
    assert (view.north, view.east) == tuple(float(x) for x in name.split(",")[1:3])
    assert view.image.named == "splits/NewYork/pano_label_balanced.txt:3"
    semi = {by_key[key].tile.path.split("/")[-1] for key in view.semi_positives}
    assert semi == set(line.split()[4::3])
    row = cities["NewYork"].tiles.index(positive)
    assert place.tile.named == f"splits/NewYork/satellite_list.txt:{row + 1}"


def test_same_area(tmp_path: Path) -> None:
    cities = write_vigor(tmp_path)
    raw = read_places("vigor", tmp_path, protocol="same-area")
    assert all(place.splits == ("train", "test") for place in raw.places)
    assert raw.count("train") + raw.count("test") == sum(len(city.labels) for city in cities.values())
    raw = read_places(
        "vigor", tmp_path, protocol="same-area", train_cities=["Seattle"], test_cities=["Seattle", "Chicago"]
    )
    assert {place.area: place.splits for place in raw.places} == {"Seattle": ("train", "test"), "Chicago": ("test",)}


def test_corrected_labels_are_preferred(tmp_path: Path) -> None:
    for city in ("NewYork", "Chicago"):
        write_city(tmp_path, city)
    labels = list_of(tmp_path, "NewYork")
    lines = labels.read_text().splitlines()
    labels.with_name("pano_label_balanced__corrected.txt").write_text("\n".join(lines[:4]))
    assert two_cities(tmp_path).count("train") == 4
    # As that work publishes them: a folder of their own, with the list of tiles in it.
    (tmp_path / "splits" / "NewYork").rename(tmp_path / "moved")
    (tmp_path / "splits__corrected").mkdir()
    (tmp_path / "moved").rename(tmp_path / "splits__corrected" / "NewYork")
    assert two_cities(tmp_path).count("train") == 4


def test_lists_as_they_come(tmp_path: Path) -> None:
    """BOM, Windows line ends, blank and repeated lines, upper-case suffixes, any order: the same places."""
    for city in ("NewYork", "Chicago"):
        write_city(tmp_path, city)
    plain = two_cities(tmp_path)
    for name in ("pano_label_balanced", "satellite_list"):
        path = list_of(tmp_path, "NewYork", name)
        lines = path.read_text().splitlines()[::-1]
        path.write_bytes(("\ufeff" + "\r\n".join(["", lines[0], *lines, "   ", ""])).encode())
    panorama = sorted((tmp_path / "NewYork" / "panorama").iterdir())[0]
    panorama.rename(panorama.with_suffix(".JPG"))
    odd = two_cities(tmp_path)
    assert odd.notes == ("2 lines repeat an earlier one and were read once",)
    assert [p.key for p in odd.places] == [p.key for p in plain.places]
    for one, other in zip(odd.places, plain.places, strict=True):
        assert (one.north, one.east, one.tile.path) == (other.north, other.east, other.tile.path)
        assert [v.semi_positives for v in one.views] == [v.semi_positives for v in other.views]
        assert [v.image.path.lower() for v in one.views] == [v.image.path.lower() for v in other.views]
        assert all(image.present for image in one.images())


def test_missing_images_are_marked_with_their_line(tmp_path: Path) -> None:
    new_york, _ = (write_city(tmp_path, city) for city in ("NewYork", "Chicago"))
    (tmp_path / "NewYork" / "panorama" / new_york.panoramas[1]).unlink()
    (tmp_path / "NewYork" / "satellite" / new_york.tiles[5]).unlink()
    missing = [image for place in two_cities(tmp_path).places for image in place.images() if not image.present]
    assert {image.named for image in missing} == {
        "splits/NewYork/pano_label_balanced.txt:2",
        "splits/NewYork/satellite_list.txt:6",
    }


def edit(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(raw: Path) -> None:
        path = list_of(raw, "NewYork", name)
        path.write_text("\n".join(change(path.read_text().splitlines())))

    return apply


def columns(line: str, at: int, text: str) -> str:
    parts = line.split()
    parts[at] = text
    return " ".join(parts)


LABELS, TILES = "pano_label_balanced", "satellite_list"
BAD = {
    "12 columns": (edit(LABELS, lambda x: [x[0], x[1].rsplit(" ", 1)[0], *x[2:]]), r"balanced\.txt:2: 12 columns"),
    "a space in a name": (edit(LABELS, lambda x: ["a b" + x[0], *x[1:]]), r"balanced\.txt:1: 14 columns.*space"),
    "offset": (edit(LABELS, lambda x: [columns(x[0], 3, "1,5"), *x[1:]]), r"balanced\.txt:1: '1,5' .*offset"),
    "offset nan": (edit(LABELS, lambda x: [columns(x[0], 6, "nan")]), r"balanced\.txt:1: 'nan' .*offset"),
    "unlisted tile": (
        edit(TILES, lambda x: x[1:]),
        r"balanced\.txt:\d+: tile satellite_40\S+ .*NewYork",
    ),
    "contradiction": (
        edit(LABELS, lambda x: [*x, columns(x[0], 2, "99.0")]),
        r"balanced\.txt:13: .*contradicts.* splits/NewYork/pano_label_balanced\.txt:1;",
    ),
    "no coordinates in the tile": (
        edit(TILES, lambda x: ["tile.png", *x]),
        r"satellite_list\.txt:1: tile\.png",
    ),
    "coordinates no number": (edit(TILES, lambda x: ["s_1_x.png", *x]), r"satellite_list\.txt:1: 'x' "),
    "not on Earth": (edit(TILES, lambda x: [*x, "s_91_0.png"]), r"satellite_list\.txt:13: s_91_0\.png"),
    "panorama's name": (edit(LABELS, lambda x: [columns(x[0], 0, "pano.jpg")]), r"balanced\.txt:1: pano\.jpg"),
    "empty city": (edit(TILES, lambda x: []), r"splits/NewYork/satellite_list\.txt: no tile"),
    "no panoramas": (edit(LABELS, lambda x: [""]), r"NewYork/pano_label_balanced\.txt: no panorama"),
    "no labels": (lambda raw: list_of(raw, "NewYork").unlink(), r"labels .*train of NewYork .*splits"),
    "no list of tiles": (
        lambda raw: list_of(raw, "NewYork", TILES).unlink(),
        r"list of tiles of NewYork",
    ),
    "no city": (
        lambda raw: shutil.rmtree(raw / "NewYork"),
        r"panoramas of NewYork.*NewYork/panorama, ground/NewYork",
    ),
    "no folder": (lambda raw: shutil.rmtree(raw), r"no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_file_and_line(tmp_path: Path, case: str) -> None:
    raw = tmp_path / "raw"
    for city in ("NewYork", "Chicago"):
        write_city(raw, city)
    spoil, message = BAD[case]
    two_cities(raw)
    spoil(raw)
    with pytest.raises(BadInput, match=message):
        two_cities(raw)


def test_protocols_and_cities_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="protocol 'same': .*cross-area .*same-area"):
        read_places("vigor", tmp_path, protocol="same")
    with pytest.raises(BadInput, match="Seattle: "):
        read_places("vigor", tmp_path, test_cities=["Seattle", "Chicago"])


def test_a_panorama_in_both_lists_of_same_area(tmp_path: Path) -> None:
    write_city(tmp_path, "Seattle")
    train, test = (list_of(tmp_path, "Seattle", f"same_area_balanced_{split}") for split in ("train", "test"))
    test.write_text(train.read_text().splitlines()[0])
    with pytest.raises(
        BadInput, match=r"same_area_balanced_test\.txt:1: .*contradicts.*same_area_balanced_train\.txt:1"
    ):
        read_places("vigor", tmp_path, protocol="same-area", train_cities=["Seattle"], test_cities=["Seattle"])
