"""The augmentation preview: its compass is where the pictures' own marks are, and its pictures are training's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from geostream.report.augmentations import compass, preview_pair, preview_pairs, preview_rows
from geostream.report.pages import render
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.augment import Augmentation, Pixels, turn
from tests.helpers import member_of, tiny_layout

OFF = {"color_jitter": 0, "jpeg_probability": 0, "blur_probability": 0, "dropout_probability": 0}
PLAIN = TrainSettings().changed(tile_size=33, view_height=16, view_width=64, **OFF)


def marked(east: bool) -> tuple[Pixels, Pixels]:
    """A tile and a panorama that are white in the north, or in the east, and black elsewhere."""
    tile, view = np.zeros((33, 33, 3), np.uint8), np.zeros((16, 64, 3), np.uint8)
    if east:
        tile[14:19, 30:], view[:, 46:50] = 255, 255
    else:
        tile[:3, 14:19], view[:, 30:34] = 255, 255
    return tile, view


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_the_compass_goes_where_the_pictures_go(flip: bool, turns: int) -> None:
    for point, east in (("N", False), ("E", True)):
        tile, view = turn(*marked(east), flip, turns)
        mark = compass(flip, turns)[point]
        x, y = mark.tile
        assert tile[round(y * 32), round(x * 32), 0] == 255, "the mark is on the tile's white spot"
        assert mark.view is not None and view[0, int(mark.view * 64) % 64, 0] == 255
        assert view[0, int(mark.view * 64) - 1, 0] == 255, "which it is in the middle of"


def test_north_is_up_and_in_the_middle_and_turns_to_the_left() -> None:
    assert compass()["N"] == ((0.5, 0.0), 0.5) and compass()["E"] == ((1.0, 0.5), 0.75)
    assert compass(turns=1)["N"] == ((0.0, 0.5), 0.25)
    assert compass(flip=True)["E"] == ((0.0, 0.5), 0.25)
    assert compass(turns=1, panorama=False)["N"] == ((0.0, 0.5), None)


def test_the_pictures_are_those_of_training() -> None:
    tile, view = marked(False)
    drawn = Augmentation.of(PLAIN, 1, 30)
    for pair in range(30):
        one = preview_pair("name", tile, view, pair, drawn)
        expected = turn(tile, view, bool(drawn.flip[pair]), int(drawn.turns[pair]))
        assert np.array_equal(one.changed["tile"], expected[0]) and np.array_equal(one.changed["view"], expected[1])
        assert np.array_equal(one.plain["tile"], tile) and np.array_equal(one.plain["view"], view)
        assert one.marks == compass(bool(drawn.flip[pair]), int(drawn.turns[pair]))
        assert ("mirrored" in one.changes["pair"].replace("neither mirrored", "")) == drawn.flip[pair]
        assert one.changes["tile"] == one.changes["view"] == ""


def test_what_is_done_to_a_picture_stands_below_it() -> None:
    wild = TrainSettings().changed(jpeg_probability=1, blur_probability=1, dropout_probability=1)
    drawn = Augmentation.of(wild, 1, 40)
    ones = [preview_pair("name", *marked(False), pair, drawn) for pair in range(40)]
    for kind in ("tile", "view"):
        words = [one.changes[kind] for one in ones]
        for word in ("JPEG 9", "JPEG 100", "colour", "blurred", "sharpened", "grid", "rectangles"):
            assert any(word in of_one for of_one in words), word
        black = [(one.changed[kind] == 0).all(axis=-1).mean() for one in ones]
        assert all(share > 0.02 for share in black)


def test_a_dozen_pairs_spread_over_the_split_without_damaged_ones(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path), places=40)
    ones = preview_pairs(layout, PLAIN)
    assert len(ones) == 12 and ones[0].name == "alpha-0000 view-00" and ones[-1].name == "alpha-0039 view-00"
    row = member_of(layout, int(layout.pairs("train").place[0]))
    shard = tmp_path / "tiny" / "layouts" / "g0" / layout.shard_names[row["shard"]]
    data = bytearray(shard.read_bytes())
    data[row["offset"] : row["offset"] + row["size"]] = b"x" * row["size"]
    shard.write_bytes(data)
    left = preview_pairs(layout, PLAIN)
    assert [one.name for one in left] == [one.name for one in ones[1:]]
    assert all(np.array_equal(a.changed["view"], b.changed["view"]) for a, b in zip(left, ones[1:], strict=True))


def section_of(settings: TrainSettings, name: str, count: int) -> str:
    drawn = Augmentation.of(settings, 1, count)
    pairs = [preview_pair(name, *marked(False), pair, drawn) for pair in range(count)]
    return render("augmentations.html", preview=preview_rows(pairs))


def test_the_section_draws_four_pictures_a_pair_and_the_compass_on_each() -> None:
    section = section_of(PLAIN, "a <b> & c", 2)
    assert section.count("a &lt;b&gt; &amp; c") == 2
    drawings = re.findall(r"<svg.*?</svg>", section, re.DOTALL)
    assert len(drawings) == 2 * 4
    for drawing in drawings:
        assert drawing.count("<image") == 1 and re.findall(">([A-Z])</text>", drawing) == ["N", "E"]
    assert 'x1="50.0%" y1="0" x2="50.0%" y2="100%"' in drawings[1], "north is in the middle of the plain panorama"


def test_a_view_that_is_no_panorama_has_no_compass() -> None:
    section = section_of(PLAIN.changed(view_kind="picture"), "name", 1)
    tile, view, changed_tile, changed_view = re.findall(r"<svg.*?</svg>", section, re.DOTALL)
    assert tile.count("<line") == changed_tile.count("<line") == 2
    assert view.count("<line") == changed_view.count("<line") == 0
