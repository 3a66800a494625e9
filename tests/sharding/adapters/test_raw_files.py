from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from geostream.errors import BadInput
from sharding.adapters.raw_files import (
    FolderIndex,
    Folders,
    list_folder,
    read_lines,
    read_position,
    readable_name,
    split_cells,
)
from sharding.places import RawImage


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


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
    with pytest.raises(BadInput, match=r"none\.txt: .*\(No such file"):
        read_lines(tmp_path, tmp_path / "none.txt")


def test_cells_quoted_or_not() -> None:
    assert split_cells(' "a" , "b"  ', "x:1") == ["a", "b"]
    assert split_cells('a.jpg , "b, c ""d"".jpg","",  e', "x:1") == ["a.jpg", 'b, c "d".jpg', "", "e"]
    with pytest.raises(BadInput, match="x:1: .*comma-separated"):
        split_cells('a.jpg,"b.jpg', "x:1")


def test_positions_on_earth() -> None:
    assert read_position(["-90", " 180.0"], "a.jpg", "x:1") == (-90.0, 180.0)
    with pytest.raises(BadInput, match=r"x:1: a\.jpg .*latitude 91\.0, longitude 0\.0"):
        read_position(["91", "0"], "a.jpg", "x:1")
    for text in ("", "north", "nan", "inf", "1,5"):
        with pytest.raises(BadInput, match=f"x:1: '{text}' .*latitude"):
            read_position([text, "0"], "a.jpg", "x:1")


def test_files_are_found_ignoring_case(tmp_path: Path) -> None:
    index = FolderIndex(tmp_path, touch(tmp_path / "f", "a.JPG", "b.jpg", "B.jpg", "c.jpg"))
    assert index.find("a.jpg", "x:1") == RawImage("f/a.JPG", "x:1")
    assert index.find("b.jpg", "x:1").path == "f/b.jpg"
    assert index.find("no.jpg", "x:1") == RawImage("f/no.jpg", "x:1", present=False)
    assert not index.find("../f/c.jpg", "x:1").present
    with pytest.raises(BadInput, match=r"x:7: b\.JPG .*f/B\.jpg, f/b\.jpg"):
        index.find("b.JPG", "x:7")


def test_files_are_found_under_another_suffix_of_an_image(tmp_path: Path) -> None:
    index = FolderIndex(tmp_path, touch(tmp_path / "f", "a.png", "b.jpg", "b.png", "c.jpeg", "c.PNG", "d.tif"))
    assert index.find("a.jpg", "x:1") == RawImage("f/a.png", "x:1")
    assert index.find("b.png", "x:1").path == "f/b.png"
    assert index.find("b.PNG", "x:1").path == "f/b.png"
    assert not index.find("d.jpg", "x:1").present
    with pytest.raises(BadInput, match=r"x:7: c\.jpg .*f/c\.PNG, f/c\.jpeg"):
        index.find("c.jpg", "x:7")


def test_files_are_found_however_their_accents_are_encoded(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Québec,é.1.jpg") for form in ("NFC", "NFD"))
    assert composed != apart
    index = FolderIndex(tmp_path, touch(tmp_path / "f", apart))
    assert index.find(composed, "x:1") == RawImage(f"f/{apart}", "x:1")


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert not FolderIndex(tmp_path, tmp_path / "f").find("a.jpg", "x:1").present
    (tmp_path / "f").touch()
    with pytest.raises(BadInput, match=r"/f: .*\(Not a directory\)"):
        FolderIndex(tmp_path, tmp_path / "f")


def test_paths_below_the_raw_folder(tmp_path: Path) -> None:
    touch(tmp_path / "f", "a.png")
    touch(tmp_path, "b.jpg")
    folders = Folders(tmp_path)
    assert folders.find("f/a.jpg", "x:1") == RawImage("f/a.png", "x:1")
    assert folders.find("./f/a.png", "x:1").path == "f/a.png"
    assert folders.find("b.jpg", "x:1") == RawImage("b.jpg", "x:1")
    assert folders.find("g/a.jpg", "x:1") == RawImage("g/a.jpg", "x:1", present=False)
    for path in ("/etc/a.jpg", "../a.jpg", "f/../../a.jpg", "f/a.txt", "", "f/"):
        with pytest.raises(BadInput, match=r"x:3: '.*' .*path"):
            folders.find(path, "x:3")


def test_listings_pass_over_what_is_hidden(tmp_path: Path) -> None:
    touch(tmp_path / "f", "b.jpg", ".DS_Store", "._b.jpg", "a.jpg")
    assert [entry.name for entry in list_folder(tmp_path / "f")] == ["a.jpg", "b.jpg"]


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "f") + b"/\xff.jpg")).touch()
    [entry] = list_folder(tmp_path / "f")
    with pytest.raises(BadInput, match=r"/f/\\udcff\.jpg': .*UTF-8"):
        readable_name(entry)
