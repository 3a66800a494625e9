from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geostream.errors import BadInput, MissingRaw
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from tests.vigor_raw import jpeg

TWO = {"train_cities": ["paris"], "test_cities": ["rio"]}


def write_city(raw: Path, city: str, names: str, at: tuple[float, float]) -> list[str]:
    """A city with a pair for each letter; its list, which is written as it is returned."""
    lines = []
    for number, name in enumerate(names):
        tile, view = f"{city}/sat_images/{name}.jpg", f"{city}/pano_images/{name}.jpg"
        for path in (tile, view):
            (raw / path).parent.mkdir(parents=True, exist_ok=True)
            (raw / path).write_bytes(jpeg(np.random.default_rng(list(path.encode())), (20, 20)))
        lines.append(f"{name},{at[1] + number},{at[0]},{city},{tile},{view}")
    (raw / city / "img_info.csv").write_text("\n".join(lines))
    return lines


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_city(tmp_path / "raw", "paris", "ab", (48.8, 2.3))
    write_city(tmp_path / "raw", "rio", "acd", (-22.9, -43.2))
    return tmp_path / "raw"


def rewritten(raw: Path, city: str, *lines: str) -> None:
    (raw / city / "img_info.csv").write_text("\n".join(lines))


def test_each_line_is_a_place_at_its_longitude_and_latitude(raw: Path, tmp_path: Path) -> None:
    dataset = read_places("cv-cities", raw, **TWO)
    assert [place.key for place in dataset.places] == ["paris_a", "paris_b", "rio_a", "rio_c", "rio_d"]
    second = dataset.places[1]
    assert (second.north, second.east, second.area, second.splits) == (48.8, 3.3, "paris", ("train",))
    (view,) = second.views
    assert (view.image.path, view.split, view.north, view.east) == ("paris/pano_images/b.jpg", "train", 48.8, 3.3)
    options = ShardOptions(tile_size=(16, 16), view_size=(16, 16))
    layout = shard(dataset, Store.open(tmp_path / "store"), "cv-cities", options=options, workers=1).layout
    assert layout.info["pairs"] == {"train": 2, "test": 3} and layout.coordinates == "latlon"


def test_those_of_the_authors_cities_that_are_there_are_the_default(raw: Path) -> None:
    dataset = read_places("cv-cities", raw)
    assert dataset.options == {"train_cities": ["paris"], "test_cities": ["rio"]}
    assert dataset.notes[0].startswith("not there, and left out: barcelona, ") and "paris" not in dataset.notes[0]
    assert read_places("cv-cities", raw, **TWO).notes == ()
    with pytest.raises(BadInput, match="paris: for training and test"):
        read_places("cv-cities", raw, train_cities=["paris"], test_cities=["rio", "paris"])
    with pytest.raises(MissingRaw, match=r"no oslo/img_info\.csv.*huggingface.co"):
        read_places("cv-cities", raw, train_cities=["oslo"])
    (raw / "rio" / "img_info.csv").unlink()
    with pytest.raises(MissingRaw, match=r"to train and to test on.*huggingface.co"):
        read_places("cv-cities", raw)


def test_paths_as_windows_writes_them_and_lines_that_are_there_twice(raw: Path) -> None:
    lines = (raw / "rio" / "img_info.csv").read_text().splitlines()
    rewritten(raw, "rio", *(line.replace("/", "\\") for line in lines), lines[0])
    dataset = read_places("cv-cities", raw, **TWO)
    assert dataset.count("test") == 3 and "1 lines" in dataset.notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,-43.2,-22.9,rio,rio/sat_images/a.jpg", r"rio/img_info\.csv:4: 5 columns instead of 6"),
        ("x,-22.9,-143.2,rio,rio/sat_images/a.jpg,rio/pano_images/x.jpg", r"rio/img_info\.csv:4: .*not on Earth"),
        ("x,east,-22.9,rio,rio/sat_images/a.jpg,rio/pano_images/x.jpg", r"rio/img_info\.csv:4: 'east'"),
        ("x,-43.2,-22.9,rio,rio/sat_images/c.jpg,rio/pano_images/a.jpg", r"rio/img_info\.csv:4: x contradicts.*csv:1"),
        ("x,-43.1,-22.9,rio,rio/sat_images/a.jpg,rio/pano_images/x.jpg", r"rio/img_info\.csv:4: x contradicts.*csv:1"),
        ("x,-43.2,-22.9,rio,/etc/../a.jpg,rio/pano_images/x.jpg", r"rio/img_info\.csv:4: .*below the raw folder"),
    ],
)
def test_a_wrong_line_is_named(raw: Path, line: str, message: str) -> None:
    lines = (raw / "rio" / "img_info.csv").read_text().splitlines()
    rewritten(raw, "rio", *lines, line)
    with pytest.raises(BadInput, match=message):
        read_places("cv-cities", raw, **TWO)


def test_an_empty_list_and_a_missing_image(raw: Path) -> None:
    (raw / "paris" / "pano_images" / "a.jpg").unlink()
    dataset = read_places("cv-cities", raw, **TWO)
    assert [view.image.present for place in dataset.places for view in place.views] == [False, True, True, True, True]
    rewritten(raw, "paris", "")
    with pytest.raises(BadInput, match=r"paris/img_info\.csv: no pair"):
        read_places("cv-cities", raw, **TWO)
