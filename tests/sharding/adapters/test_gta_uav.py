from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geostream.errors import BadInput, MissingRaw
from geostream.store import Store
from sharding import RawDataset, ShardOptions, read_places, shard
from sharding.places import Place
from tests.vigor_raw import png

# As the README has it: what a picture shows, the tiles that overlap and by how much, and where it was taken.
EXAMPLE = {
    "drone_img_dir": "drone/images",
    "drone_img_name": "500_0001_0000025682.png",
    "drone_loc_x_y": [4472.2036708036, 9460.91532053518],
    "sate_img_dir": "satellite",
    "pair_pos_sate_img_list": ["4_0_6_13.png"],
    "pair_pos_sate_weight_list": [0.47341428718085427],
    "pair_pos_semipos_sate_img_list": ["5_0_12_27.png", "4_0_6_13.png", "5_0_13_27.png"],
    "pair_pos_semipos_sate_weight_list": [0.27864086433392504, 0.47341428718085427, 0.2149980058725643],
}


def entry(name: str, positives: dict[str, float], semi: dict[str, float], at: tuple[float, float] = (100, 200)) -> Any:
    return EXAMPLE | {
        "drone_img_name": f"{name}.png",
        "drone_loc_x_y": list(at),
        "pair_pos_sate_img_list": list(positives),
        "pair_pos_sate_weight_list": list(positives.values()),
        "pair_pos_semipos_sate_img_list": [*semi, *positives],
        "pair_pos_semipos_sate_weight_list": [*semi.values(), *positives.values()],
    }


def write(raw: Path, train: list[Any], test: list[Any], tiles: tuple[str, ...] = (), kind: str = "cross-area") -> Path:
    """The two lists, all images that they name, and some tiles more."""
    named = {name for one in (*train, *test) for name in one["pair_pos_semipos_sate_img_list"]}
    pictures = {f"satellite/{name}" for name in (*tiles, *named)}
    pictures |= {f"drone/images/{one['drone_img_name']}" for one in (*train, *test)}
    for path in pictures:
        (raw / path).parent.mkdir(parents=True, exist_ok=True)
        (raw / path).write_bytes(png(np.random.default_rng(list(path.encode())), (20, 20)))
    for split, content in (("train", train), ("test", test)):
        (raw / f"{kind}-drone2sate-{split}.json").write_text(json.dumps(content))
    return raw


def by_tile(raw: RawDataset) -> dict[str, Place]:
    return {place.tile.path.removeprefix("satellite/"): place for place in raw.places}


def test_a_picture_belongs_to_the_tile_that_overlaps_most(tmp_path: Path) -> None:
    others = entry("a", {"6_0_1_1.png": 0.5, "6_0_1_2.png": 0.6}, {"5_0_0_0.png": 0.2})
    semi_alone = entry("b", {}, {"5_0_0_0.png": 0.2, "6_0_1_1.png": 0.3})
    raw = read_places(
        "gta-uav",
        write(tmp_path, [EXAMPLE, semi_alone], [others, entry("c", {}, {"5_0_0_0.png": 0.2})], ("7_0_3_4.png",)),
    )
    places = by_tile(raw)
    (view,) = places["4_0_6_13.png"].views
    assert view.semi_positives == ("level-5_5_0_12_27", "level-5_5_0_13_27") and view.split == "train"
    (view,) = places["6_0_1_2.png"].views
    assert (view.split, view.semi_positives) == ("test", ("level-5_5_0_0_0", "level-6_6_0_1_1"))
    assert [one.split for one in places["6_0_1_1.png"].views] == ["train"], "trained on without a positive"
    assert raw.count("test") == 1, "no query without a positive"
    assert places["7_0_3_4.png"].splits == ("test",) and not places["7_0_3_4.png"].views
    assert places["4_0_6_13.png"].splits == ("train", "test")


def test_positions_are_metres_east_and_north(tmp_path: Path) -> None:
    """By the README's own example, whose tiles lie at (4492.8, 9331.2), (4320, 9504) and (4665.6, 9504)."""
    raw = read_places(
        "gta-uav", write(tmp_path, [EXAMPLE], [entry("a", {"6_0_1_1.png": 0.5}, {})], ("4_128_6_13.png",))
    )
    places = by_tile(raw)
    for name, (x, y) in {"4_0_6_13.png": (4492.8, 9331.2), "5_0_12_27.png": (4320.0, 9504.0)}.items():
        assert (places[name].east, places[name].north) == pytest.approx((x, 11059.2 - y))
    assert places["4_128_6_13.png"].east == pytest.approx(4492.8 + 691.2 / 2), "shifted by half a tile"
    (view,) = places["4_0_6_13.png"].views
    assert (view.east, view.north) == pytest.approx((4472.2036708036, 11059.2 - 9460.91532053518))
    assert raw.coordinates == "utm" and {place.area for place in raw.places} == {"level-4", "level-5", "level-6"}


def test_both_protocols_and_names_without_an_offset(tmp_path: Path) -> None:
    lists = [entry("a", {"6_1_1.png": 0.5}, {})], [entry("b", {"6_1_2.png": 0.5}, {})]
    write(tmp_path, *lists)
    write(tmp_path, lists[1], lists[0], kind="same-area")
    cross, same = (read_places("gta-uav", tmp_path, protocol=one) for one in ("cross-area", "same-area"))
    assert by_tile(cross)["6_1_1.png"].views[0].split == "train"
    assert by_tile(same)["6_1_1.png"].views[0].split == "test"
    assert by_tile(cross)["6_1_1.png"].east == pytest.approx(1.5 * 11059.2 / 64)
    with pytest.raises(BadInput, match="protocol 'val': GTA-UAV"):
        read_places("gta-uav", tmp_path, protocol="val")


def test_it_is_sharded(tmp_path: Path) -> None:
    raw = read_places(
        "gta-uav", write(tmp_path / "raw", [EXAMPLE], [entry("a", {"6_0_1_1.png": 0.5}, {"5_0_12_27.png": 0.3})])
    )
    options = ShardOptions(tile_size=(16, 16), view_size=(16, 16))
    layout = shard(raw, Store.open(tmp_path / "store"), "gta-uav", options=options, workers=1).layout
    assert layout.info["pairs"] == {"train": 1, "test": 1} and layout.coordinates == "utm"
    assert np.diff(layout.semi_positives("test").indptr).tolist() == [1]


def test_what_is_wrong_is_named_by_entry(tmp_path: Path) -> None:
    good = [entry("a", {"6_0_1_1.png": 0.5}, {})]
    with pytest.raises(MissingRaw, match=r"cross-area-drone2sate-train\.json.*huggingface.co"):
        raw = write(tmp_path / "none", good, good)
        (raw / "cross-area-drone2sate-train.json").unlink()
        read_places("gta-uav", raw)
    for number, (wrong, message) in enumerate(
        (
            ({"drone_img_name": "x.png"}, r"train\.json:2: no entry"),
            (EXAMPLE | {"drone_loc_x_y": ["west", 1]}, r"train\.json:2: 'west'"),
            (entry("b", {"tile.png": 0.5}, {}), r"train\.json:2: 'tile\.png'"),
            (entry("a", {"6_0_1_2.png": 0.5}, {}), r"train\.json:2: drone/images/a\.png is listed before"),
            (EXAMPLE | {"pair_pos_semipos_sate_weight_list": [0.5]}, r"train\.json:2: no entry"),
        )
    ):
        raw = write(tmp_path / str(number), good, [entry("z", {"6_0_9_9.png": 0.5}, {})])
        (raw / "cross-area-drone2sate-train.json").write_text(json.dumps([*good, wrong]))
        with pytest.raises(BadInput, match=message):
            read_places("gta-uav", raw)
    for text in ("[", "{}", "[]"):
        (raw / "cross-area-drone2sate-train.json").write_text(text)
        with pytest.raises(BadInput, match=r"train\.json: not"):
            read_places("gta-uav", raw)


def test_missing_images_are_marked(tmp_path: Path) -> None:
    raw = write(tmp_path, [EXAMPLE], [entry("a", {"6_0_1_1.png": 0.5}, {})])
    (raw / "satellite" / "5_0_12_27.png").unlink()
    assert not by_tile(read_places("gta-uav", raw))["5_0_12_27.png"].tile.present
