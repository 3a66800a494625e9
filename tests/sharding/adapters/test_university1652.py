from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geostream.errors import BadInput
from geostream.layout import open_layout
from geostream.layout.members import read_image
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from tests.sharding.test_writer import contents
from tests.vigor_raw import jpeg

SMALL = ShardOptions(tile_size=(20, 20), view_size=(20, 20), shard_bytes=8000)
VIEWS = 4  # of a building; the real ones have 54
FOLDERS = {
    "train/satellite": ["0839", "0842", "1000"],
    "train/drone": ["0839", "0842", "1000"],
    "train/street": ["0839", "1000"],
    "test/gallery_satellite": ["0001", "0003", "0009"],
    "test/query_satellite": ["0001", "0003"],
    "test/gallery_drone": ["0001", "0003", "0009"],
    "test/query_drone": ["0001", "0003"],
    "test/gallery_street": ["0001", "0009"],
    "test/query_street": ["0001"],
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for folder, buildings in FOLDERS.items():
        for building in buildings:
            inside = root / folder / building
            inside.mkdir(parents=True)
            one = "satellite" in folder
            for number in range(1 if one else VIEWS):
                # Queries are in the gallery, too: the same bytes under the same name.
                rng = np.random.default_rng([int(building), number, sum(folder.rpartition("_")[2].encode())])
                name = f"{building}.jpg" if one else f"image-{number + 1:02d}.jpeg"
                (inside / name).write_bytes(jpeg(rng, (20, 20)))
    return root


def test_drone(raw: Path) -> None:
    places = read_places("university1652", raw)
    assert (places.options, places.coordinates, places.protocols) == ({"views": "drone"}, "none", ("both-ways",))
    assert (places.tile_size, places.view_size, places.notes) == ((384, 384), (384, 384), ())
    assert [place.key for place in places.places] == [
        "test_0001", "test_0003", "test_0009", "train_0839", "train_0842", "train_1000",
    ]  # fmt: skip
    by_key = {place.key: place for place in places.places}
    asked, distractor, trained = by_key["test_0003"], by_key["test_0009"], by_key["train_0842"]
    assert (asked.area, asked.splits, asked.tile.path) == ("test", ("test",), "test/gallery_satellite/0003/0003.jpg")
    assert [(view.split, view.image.path) for view in asked.views] == [
        ("test", f"test/query_drone/0003/image-{n:02d}.jpeg") for n in range(1, VIEWS + 1)
    ]
    assert distractor.splits == ("test",)
    assert [view.image.path for view in distractor.views] == [
        f"test/gallery_drone/0009/image-{n:02d}.jpeg" for n in range(1, VIEWS + 1)
    ]
    assert {view.split for view in distractor.views} == {"gallery"}
    assert (trained.area, trained.splits, {view.split for view in trained.views}) == ("train", ("train",), {"train"})
    assert asked.views[0].image.named == "test/query_drone/0003"
    assert [places.count(split) for split in ("train", "test", "gallery")] == [3 * VIEWS, 2 * VIEWS, VIEWS]


def test_street(raw: Path) -> None:
    """Few buildings have street views: the others are distractors."""
    places = read_places("university1652", raw, views="street")
    assert {place.key: [view.split for view in place.views] for place in places.places} == {
        "test_0001": ["test"] * VIEWS,
        "test_0003": [],
        "test_0009": ["gallery"] * VIEWS,
        "train_0839": ["train"] * VIEWS,
        "train_0842": [],
        "train_1000": ["train"] * VIEWS,
    }
    assert all("street" in view.image.path for place in places.places for view in place.views)


def test_folders_as_they_come(raw: Path) -> None:
    """Mixed suffixes, hidden and stray files, odd names, empty folders; several satellite images, and none."""
    drone = raw / "train" / "drone"
    (drone / "0839" / "image-01.jpeg").rename(drone / "0839" / "image, 1.é.PNG")
    for stray in (raw / "train" / "drone" / "Thumbs.db", drone / "0839" / "notes.txt", drone / ".DS_Store"):
        stray.touch()
    (drone / "0839" / "._image-02.jpeg").touch()
    (drone / "0839" / "more.jpg").mkdir()
    (drone / "9999").mkdir()
    shutil.rmtree(raw / "train" / "satellite" / "0842")
    (raw / "train" / "satellite" / "Ünï.1").mkdir()
    (raw / "train" / "satellite" / "Ünï.1" / "b.JPG").touch()
    (raw / "train" / "satellite" / "Ünï.1" / "a.png").touch()
    gallery = raw / "test" / "gallery_drone" / "0001"
    (gallery / "image-01.jpeg").rename(gallery / "image-99.jpeg")  # neither does every query lie in the gallery
    places = read_places("university1652", raw)
    assert places.notes == (
        "3 files or folders are no .jpg or .png of a building and were passed over: "
        "train/drone/0839/more.jpg, train/drone/0839/notes.txt, train/drone/Thumbs.db",
        "2 buildings have no satellite image and were left out, with their views: train/0842, train/9999",
        "1 buildings have several satellite images, of which the first by name was taken: train/Ünï.1",
    )
    by_key = {place.key: place for place in places.places}
    assert [key for key in by_key if key.startswith("train")] == ["train_-n--1", "train_0839", "train_1000"]
    assert by_key["train_-n--1"].tile.path == "train/satellite/Ünï.1/a.png"
    assert by_key["train_0839"].views[0].image.path == "train/drone/0839/image, 1.é.PNG"
    assert len(by_key["train_0839"].views) == VIEWS
    assert [(view.split, view.image.path[-8:]) for view in by_key["test_0001"].views][-2:] == [
        ("test", "-04.jpeg"),
        ("gallery", "-99.jpeg"),
    ]


def test_without_a_gallery_of_views(raw: Path) -> None:
    shutil.rmtree(raw / "test" / "gallery_drone")
    with pytest.raises(BadInput, match=r"test/gallery_drone: .*\(No such file"):
        read_places("university1652", raw)


def test_bad_input(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="views 'google': .*drone .*street"):
        read_places("university1652", raw, views="google")
    with pytest.raises(BadInput, match="no such folder.* University-1652"):
        read_places("university1652", tmp_path / "none")
    with pytest.raises(BadInput, match=f"{raw / 'train'}: only a part"):
        read_places("university1652", raw / "train")


def test_stored_with_its_gallery_and_the_same_for_any_number_of_workers(raw: Path, tmp_path: Path) -> None:
    one, two = Store.open(tmp_path / "one"), Store.open(tmp_path / "two")
    layout = shard(read_places("university1652", raw), one, "university1652", options=SMALL, workers=1).layout
    shard(read_places("university1652", raw), two, "university1652", options=SMALL, workers=2)
    assert len(layout.shard_names) > 2 and contents(one) == contents(two)
    reopened = open_layout(two, "university1652")
    assert (reopened.protocols, reopened.coordinates) == (("both-ways",), "none")
    assert reopened.info["pairs"] == {"train": 3 * VIEWS, "test": 2 * VIEWS, "gallery": VIEWS}
    assert reopened.keys == [f"test_{n}" for n in ("0001", "0003", "0009")] + [
        f"train_{n}" for n in ("0839", "0842", "1000")
    ]
    assert reopened.references("test").tolist() == [0, 1, 2]
    assert reopened.pairs("gallery").place.tolist() == [2] * VIEWS
    place, view = (int(column[1]) for column in reopened.pairs("gallery"))
    assert read_image(reopened, place, view) == (raw / "test" / "gallery_drone" / "0009" / "image-02.jpeg").read_bytes()


def test_look_alikes_share_no_batch_and_the_test_set_stays(raw: Path, tmp_path: Path) -> None:
    """The same building again, brighter, in another size and another quality; in training alone it is joined."""
    satellite = raw / "train" / "satellite"
    for building in ("0839", "0842", "1000"):
        drawn = np.kron(np.random.default_rng(int(building)).integers(40, 200, (8, 8, 3)), np.ones((16, 16, 1)))
        Image.fromarray(drawn.astype(np.uint8)).save(satellite / building / f"{building}.jpg", quality=95)
        if building == "1000":
            (satellite / "1001").mkdir()
            again = Image.fromarray((1.1 * drawn + 10).astype(np.uint8)).resize((96, 96))
            again.save(satellite / "1001" / "1001.jpg", quality=70)
    shutil.copytree(raw / "train" / "drone" / "1000", raw / "train" / "drone" / "1001")
    shutil.copy(raw / "test/gallery_satellite/0001/0001.jpg", raw / "test/gallery_satellite/0003/0003.jpg")
    (satellite / "0842" / "0842.jpg").write_bytes(b"no picture")
    plain, joined = read_places("university1652", raw), read_places("university1652", raw, join_alike=0.9)
    assert plain.options == {"views": "drone"} and joined.options == {"views": "drone", "join_alike": 0.9}
    semi = {place.key: {view.semi_positives for view in place.views} for place in joined.places}
    assert semi.pop("train_1000") == {("train_1001",)} and semi.pop("train_1001") == {("train_1000",)}
    assert all(one <= {()} for one in semi.values()), "neither the test set nor a tile that cannot be read"
    assert not any(view.semi_positives for place in plain.places for view in place.views)
    assert joined.notes == (
        "2 training buildings look like another one and never share a batch with it: train_1000, train_1001",
    )
    options = ShardOptions(tile_size=(20, 20), view_size=(20, 20), max_broken=0.2)
    store = Store.open(tmp_path / "store")
    layout = shard(joined, store, "university1652", options=options, workers=1).layout
    with pytest.raises(BadInput, match="join_alike"):
        shard(plain, store, "university1652", options=options, workers=1)
    one, other = (layout.keys.index(key) for key in ("train_1000", "train_1001"))
    excluded = layout.excluded("train")
    assert excluded.row(one).tolist() == [other] and excluded.row(other).tolist() == [one]
    assert not len(layout.semi_positives("test").indices)
    for wrong in (0.0, 1.5):
        with pytest.raises(BadInput, match="join_alike"):
            read_places("university1652", raw, join_alike=wrong)
