from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from geostream.errors import BadInput
from geostream.layout import open_layout
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from tests.vigor_raw import jpeg, png

SMALL = ShardOptions(tile_size=(20, 20), view_size=(8, 44), shard_bytes=8000)
IDS = [f"-{n:02d}_Aa{'zyxwvutsrqponmlkjihgfedcba'[n % 26]}" for n in range(30)]
TRAIN, VAL, TEST = range(10), range(10, 14), range(10, 30)  # as in the real one, validation is a part of the test set


def mat(**changes: Any) -> dict[str, Any]:
    """The content of the .mat, as scipy reads the authors' own: a matrix of characters, columns of indexes from 1."""
    content = {
        "panoIds": np.array(IDS),
        "utm": np.array([(690_000.5 + 3 * n, 6_090_000.0 - n) for n in range(30)]),
        "trainSet": {"trainNum": 10, "trainInd": np.array(TRAIN)[:, None] + 1},
        "valSet": {"valNum": 4, "valInd": np.array(VAL)[:, None] + 1},
        "valSetAll": {"valNum": 20, "valInd": np.array(TEST)[:, None] + 1},
    } | changes
    return {name: value for name, value in content.items() if value is not None}


def files(number: int, folder: str) -> tuple[str, str]:
    one = IDS[number]
    return f"{folder}/satview_polish/{one}_satView_polish.jpg", f"{folder}/streetview/{one}_grdView.jpg"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    root = tmp_path / "raw"
    for folder, numbers in (("ANU_data_small", [*TRAIN, *VAL]), ("ANU_data_test", TEST)):
        for kind in ("streetview", "satview_polish"):
            (root / folder / kind).mkdir(parents=True)
        for number in numbers:
            tile, panorama = files(number, folder)
            (root / tile).write_bytes(jpeg(rng, (30, 30)))
            (root / panorama).write_bytes(jpeg(rng, (22, 44)))
    savemat(root / "ACT_data.mat", mat())
    return root


def test_validation(raw: Path) -> None:
    places = read_places("cvact", raw)
    assert (places.options, places.coordinates, places.protocols) == ({"protocol": "val"}, "utm", ("paired",))
    assert (places.tile_size, places.view_size, places.notes) == ((384, 384), (140, 768), ())
    assert (places.count("train"), places.count("test")) == (10, 4)
    by_tile = {place.tile.path: place for place in places.places}
    place = by_tile[files(12, "ANU_data_small")[0]]
    [view] = place.views
    assert (place.key, place.area, place.splits) == (f"Canberra_{IDS[12]}", "Canberra", ("test",))
    assert (view.image.path, view.split) == (files(12, "ANU_data_small")[1], "test")
    assert (place.north, place.east) == (view.north, view.east) == (6_089_988.0, 690_036.5)
    assert place.tile.named == view.image.named == "ACT_data.mat:panoIds(13)"
    assert all(image.present for place in places.places for image in place.images())


def test_the_test_set(raw: Path) -> None:
    shutil.rmtree(raw / "ANU_data_small" / "streetview")
    places = read_places("cvact", raw, protocol="test")
    assert places.protocols == ("paired", "within-5m")
    assert (places.count("train"), places.count("test")) == (10, 20)
    tested = [place for place in places.places if place.splits == ("test",)]
    assert {place.tile.path for place in tested} == {files(n, "ANU_data_test")[0] for n in TEST}
    assert all(image.present for place in tested for image in place.images())
    missing = [image for place in places.places for image in place.images() if not image.present]
    assert {image.path for image in missing} == {files(n, "ANU_data_small")[1] for n in TRAIN}


def test_a_test_set_that_only_the_folder_knows(raw: Path) -> None:
    """Upper case, PNG, halves of a pair, an id that the .mat lacks, strays: what is there is taken."""
    savemat(raw / "ACT_data.mat", mat(valSetAll=None))
    tile, panorama = ((raw / path) for path in files(10, "ANU_data_test"))
    tile.rename(tile.with_suffix(".PNG"))
    panorama.rename(panorama.with_suffix(".JPEG"))
    (raw / files(11, "ANU_data_test")[0]).unlink()
    (raw / files(12, "ANU_data_test")[1]).rename(panorama.with_name("new,id.é_grdView.jpg"))
    panorama.with_name("Thumbs.db").touch()
    places = read_places("cvact", raw, protocol="test")
    assert places.notes == (
        "ACT_data.mat has no valSetAll: the test set is what lies in ANU_data_test",
        "ACT_data.mat has no coordinates of 1 of 31 pairs",
    )
    by_key = {place.key: place for place in places.places}
    assert len(by_key) == 31 and places.count("test") == 21
    assert by_key[f"Canberra_{IDS[10]}"].tile.path.endswith(".PNG")
    assert by_key[f"Canberra_{IDS[10]}"].tile.present and by_key[f"Canberra_{IDS[10]}"].views[0].image.present
    gone = {image.path for place in places.places for image in place.images() if not image.present}
    assert gone == {
        files(11, "ANU_data_test")[0],
        files(12, "ANU_data_test")[1],
        "ANU_data_test/satview_polish/new,id.é_satView_polish.jpg",
    }


def test_ids_in_cells_and_indexes_as_they_come(raw: Path) -> None:
    """Cells, padding, rows and doubles in the place of columns of integers, repeated indexes: the same places."""
    plain = read_places("cvact", raw)
    cells = np.array([f"{one}  " for one in IDS], dtype=object)
    train = {"trainInd": np.array([3.0, *TRAIN]) + 1}
    savemat(raw / "ACT_data.mat", mat(panoIds=cells, trainSet=train), do_compression=True)
    read = read_places("cvact", raw)
    assert read.notes == ("1 lines repeat an earlier one and were read once",)
    assert read.places == plain.places


def test_without_coordinates(raw: Path) -> None:
    savemat(raw / "ACT_data.mat", mat(utm=None))
    places = read_places("cvact", raw, protocol="test")
    assert (places.coordinates, places.protocols) == ("none", ("paired",))
    assert places.notes == ("ACT_data.mat has no coordinates of 30 of 30 pairs",)
    utm = mat()["utm"]
    utm[5, 1] = np.nan
    savemat(raw / "ACT_data.mat", mat(utm=utm))
    assert read_places("cvact", raw).notes == ("ACT_data.mat has no coordinates of 1 of 14 pairs",)


def spoil(**changes: Any) -> Callable[[Path], None]:
    return lambda root: savemat(root / "ACT_data.mat", mat(**changes))


def cut(root: Path) -> None:
    savemat(root / "ACT_data.mat", mat(), do_compression=True)
    path = root / "ACT_data.mat"
    path.write_bytes(path.read_bytes()[:-100])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no ids": (spoil(panoIds=None), "has no panoIds"),
    "no training": (spoil(trainSet=None), "has no trainSet"),
    "no validation": (spoil(valSet=None), "has no valSet"),
    "another field": (spoil(trainSet={"ind": [1]}), "trainSet .*trainInd"),
    "no struct": (spoil(trainSet=np.arange(1, 5)), "trainSet .*trainInd"),
    "index 0": (
        spoil(trainSet={"trainInd": np.arange(3)}),
        "trainSet.trainInd names 0, .* 1 to 30",
    ),
    "index 31": (spoil(valSet={"valInd": np.array([11, 31])}), "valSet.valInd names 31,"),
    "half an index": (spoil(valSet={"valInd": np.array([11.5])}), "valSet.valInd names 11.5,"),
    "words": (spoil(valSet={"valInd": "all"}), "valSet.valInd holds no numbers"),
    "utm of fewer": (spoil(utm=np.zeros((29, 2))), r"utm .*\(29, 2\), .*\(30, 2\)"),
    "trained and tested": (
        spoil(valSet={"valInd": np.array([11, 3])}),
        rf"panoIds\(3\): {IDS[2]} .*training, .*val set.* \(ACT_data\.mat:panoIds\(3\)\)",
    ),
    "text": (lambda root: (root / "ACT_data.mat").write_text("panoIds"), r"ACT_data\.mat: .*MATLAB file"),
    "cut off": (cut, r"ACT_data\.mat: .*MATLAB file"),
    "HDF5": (
        lambda root: (root / "ACT_data.mat").write_bytes(b"MATLAB 7.3".ljust(124) + b"\0\2IM" + bytes(400)),
        "MATLAB 7.3",
    ),
    "no .mat": (lambda root: (root / "ACT_data.mat").unlink(), r"ACT_data\.mat: .*\(No such file"),
    "no folder": (lambda root: shutil.rmtree(root), "no such folder.* CVACT"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_file(raw: Path, case: str) -> None:
    change, message = BAD[case]
    change(raw)
    with pytest.raises(BadInput, match=message) as error:
        read_places("cvact", raw)
    assert "\n" not in str(error.value)


def test_protocols_and_folders_that_are_not_there(raw: Path) -> None:
    with pytest.raises(BadInput, match="protocol 'all': .*val .*test"):
        read_places("cvact", raw, protocol="all")
    savemat(raw / "ACT_data.mat", mat(valSetAll=None))
    shutil.rmtree(raw / "ANU_data_test")
    with pytest.raises(BadInput, match=r"ANU_data_test/streetview: .*\(No such file"):
        read_places("cvact", raw, protocol="test")


def test_stored_with_its_protocols(raw: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    (raw / files(3, "ANU_data_small")[1]).write_bytes(png(rng, (22, 44)))  # whatever it is called
    store = Store.open(tmp_path / "store")
    shard(read_places("cvact", raw, protocol="test"), store, "cvact", options=SMALL, workers=1)
    reopened = open_layout(store, "cvact")
    assert (reopened.protocols, reopened.coordinates) == (("paired", "within-5m"), "utm")
    assert reopened.info["pairs"] == {"train": 10, "test": 20}
    near = reopened.position[reopened.references("test")]
    assert 0 < np.linalg.norm(near[0] - near[1]) < 5
