"""Damage in the shards: each kind made by hand, found by reading, and told in a line that names shard and member."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geostream.errors import Refused
from geostream.layout import Layout, open_layout, verify
from geostream.layout.schema import MEMBERS
from geostream.layout.verify import Report, verify_layout
from geostream.store import Store, table_bytes
from tests.helpers import TinyPlace, tiny_layout, write_layout

FIRST, SECOND = "shard-00000.tar", "shard-00001.tar"
Entry = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Two places a shard with three members each, four shards."""
    return tiny_layout(
        Store.open(tmp_path_factory.mktemp("store")), places=4, test_places=4, distractors=0, places_per_shard=2
    )


def problems(layout: Layout) -> list[str]:
    """What is found when the layout is opened anew; all of it is in the first shard."""
    report = verify_layout(open_layout(Store.open(layout.store.url.rsplit("/", 3)[0])))
    assert report.count == len(report.problems)
    assert all(line.startswith(f"{FIRST}: ") and "\n" not in line for line in report.problems)
    return [line.removeprefix(f"{FIRST}: ") for line in report.problems]


def entries(layout: Layout, shard: str = FIRST) -> list[Entry]:
    with tarfile.open(fileobj=io.BytesIO(layout.store.read(shard))) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def tar_of(members: list[Entry], **kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **({"format": tarfile.USTAR_FORMAT} | kind)) as tar:  # type: ignore[call-overload]
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def file(name: str, data: bytes) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def special(name: str, kind: bytes, target: str = "") -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def rewrite(layout: Layout, change: Callable[[list[Entry]], object]) -> None:
    """The first shard written anew, with some of its members changed, and as long as before."""
    members = entries(layout)
    change(members)
    layout.store.write(FIRST, tar_of(members).ljust(int(layout.shard_sizes[0]), b"\0"))


def overwrite(layout: Layout, at: int, data: bytes) -> None:
    whole = bytearray(layout.store.read(FIRST))
    whole[at : at + len(data)] = data
    layout.store.write(FIRST, bytes(whole))


def where(layout: Layout, row: int) -> int:
    """Offset of a member's data, by its row in the index."""
    return int(layout.members["offset"][row].as_py())


def test_as_committed_on_s3(s3_store: Store) -> None:
    layout = tiny_layout(s3_store, places_per_shard=4)
    report = verify_layout(open_layout(s3_store))
    sizes = [info.size for info in layout.store.list() if info.path.endswith(".tar")]
    assert report == Report(shards=len(sizes), members=layout.members.num_rows, bytes=sum(sizes), problems=(), count=0)
    layout.store.write(FIRST, layout.store.read(FIRST)[:3000])
    layout.store.delete(SECOND)
    size = int(layout.shard_sizes[0])
    assert list(verify_layout(layout).problems) == [
        f"{FIRST}: 3000 bytes where layout.json says {size}: cut off or replaced since the commit",
        f"{FIRST}: cut off: 11 members from 'alpha-0000.view-00.jpg' on are not in it",
        f"{SECOND}: gone since the commit",
    ]


def test_a_shard_that_is_gone(layout: Layout) -> None:
    layout.store.delete(FIRST)
    assert problems(layout) == ["gone since the commit"]


def test_an_empty_shard(layout: Layout) -> None:
    layout.store.write(FIRST, b"")
    size = layout.shard_sizes[0]
    assert problems(layout) == [
        f"0 bytes where layout.json says {size}: cut off or replaced since the commit",
        "cut off: 6 members from 'alpha-0000.tile.jpg' on are not in it",
    ]


def test_flipped_bytes(layout: Layout) -> None:
    overwrite(layout, where(layout, 1) + 7, b"\x00\xff\x00")
    assert problems(layout) == [
        "'alpha-0000.view-00.jpg': its bytes differ from the checksum in the index",
    ]


def test_a_flipped_header_costs_one_member(layout: Layout) -> None:
    overwrite(layout, where(layout, 1) - 512 + 10, b"\xff")
    assert problems(layout) == ["'alpha-0000.view-00.jpg': its header in the tar is damaged"]


def test_an_erased_header_costs_one_member(layout: Layout) -> None:
    overwrite(layout, where(layout, 1) - 512, bytes(512))
    assert problems(layout) == ["'alpha-0000.view-00.jpg': its header in the tar is damaged"]


def test_another_shard_of_the_same_length(layout: Layout) -> None:
    size = int(layout.shard_sizes[0])
    other = layout.store.read(SECOND)
    assert len(other) == size  # both padded to a tar record by tarfile
    layout.store.write(FIRST, other)
    [line] = problems(layout)
    assert line.startswith("none of the 6 members")


def test_the_same_places_with_other_images(layout: Layout) -> None:
    """Of the same length, with the same names: as a shard made again from other raw images may be."""
    members = entries(layout)
    layout.store.write(FIRST, tar_of([(info, bytes(len(data))) for info, data in members]))
    names = [info.name for info, _ in members]
    assert problems(layout) == [f"'{name}': its bytes differ from the checksum in the index" for name in names]


@pytest.mark.parametrize("data", [b"no tar at all", bytes(9), bytes(range(256)), b"\x1f\x8b\0\0\0"])
def test_no_tar_at_all(layout: Layout, data: bytes) -> None:
    size = int(layout.shard_sizes[0])
    layout.store.write(FIRST, (data * size)[:size])
    [line] = problems(layout)
    assert line.startswith("none of the 6 members")


@pytest.mark.parametrize(
    "name", ["../../etc/x.tile.jpg", "/etc/x.tile.jpg", "a/../../x.tile.jpg", "..", "..\\x.tile.jpg", "C:\\x.tile.jpg"]
)
def test_a_member_that_climbs_out(layout: Layout, name: str) -> None:
    rewrite(layout, lambda members: members.insert(6, file(name, b"x")))
    [line] = problems(layout)
    assert line.startswith(f"{name!r} is at byte ") and line.endswith("where the index has nothing")


def test_a_member_in_whose_place_another_climbs_out(layout: Layout) -> None:
    def rename(members: list[Entry]) -> None:
        members[3][0].name = "../../etc/x.tile.jpg"

    rewrite(layout, rename)
    assert problems(layout) == [
        "'alpha-0001.tile.jpg': its header in the tar is of another member, '../../etc/x.tile.jpg'"
    ]


NO_FILES = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]


@pytest.mark.parametrize("kind", NO_FILES)
def test_something_that_is_no_file(layout: Layout, kind: bytes) -> None:
    rewrite(layout, lambda members: members.append(special("alpha-0009.tile.jpg", kind, "/etc/passwd")))
    [line] = problems(layout)
    assert line.startswith("'alpha-0009.tile.jpg', which is not a file, is at byte ")


@pytest.mark.parametrize("kind", NO_FILES)
def test_something_that_is_no_file_in_the_place_of_a_member(layout: Layout, kind: bytes) -> None:
    def link(members: list[Entry]) -> None:
        members[5] = special(members[5][0].name, kind, "/etc/passwd")

    rewrite(layout, link)
    assert problems(layout) == ["'alpha-0001.json': its header in the tar is not that of a file"]


def test_an_extended_header_that_renames_a_member(layout: Layout) -> None:
    """A reader that knows pax sees another name than the plain header's."""
    members = entries(layout)
    last, data = members[5]
    last.pax_headers = {"path": "../../x"}
    plain = tar_of(members[:5]).rstrip(b"\0")
    plain = plain.ljust(len(plain) + -len(plain) % 512, b"\0")
    extended = last.tobuf(tarfile.PAX_FORMAT) + data.ljust(len(data) + -len(data) % 512, b"\0")
    whole = plain + extended
    layout.store.write(FIRST, whole.ljust(int(layout.shard_sizes[0]), b"\0"))
    before, *behind = problems(layout)
    assert before == "'alpha-0001.json': its header in the tar is of another member, '././@PaxHeader'"
    assert any(line.startswith("'alpha-0001.json' is at byte ") for line in behind)


def test_members_that_only_one_of_the_two_has(layout: Layout) -> None:
    end = where(layout, 5) + 512
    rewrite(layout, lambda members: members.append(file("alpha-0007.tile.jpg", b"more")))
    assert problems(layout) == [f"'alpha-0007.tile.jpg' is at byte {end}, where the index has nothing"]
    rewrite(layout, lambda members: members.pop())
    rewrite(layout, lambda members: members.pop())
    assert problems(layout) == ["'alpha-0001.json': its header in the tar is damaged"]


def test_a_member_that_is_there_twice(layout: Layout) -> None:
    rewrite(layout, lambda members: members.append(members[0]))
    [line] = problems(layout)
    assert line.startswith("'alpha-0000.tile.jpg' is at byte ")


def test_members_in_another_order(layout: Layout) -> None:
    def swap(members: list[Entry]) -> None:
        members[4], members[5] = members[5], members[4]

    rewrite(layout, swap)
    assert problems(layout)[0] == (
        "'alpha-0001.view-00.jpg': its header in the tar is of another member, 'alpha-0001.json'"
    )
    assert any(line.startswith("'alpha-0001.json': ") for line in problems(layout))


def test_a_member_of_another_size(layout: Layout) -> None:
    def lengthen(members: list[Entry]) -> None:
        info, data = members[5]
        members[5] = file(info.name, data + b"12")

    rewrite(layout, lengthen)
    size, end = int(layout.members["size"][5].as_py()), where(layout, 5)
    assert problems(layout) == [
        f"'alpha-0001.json': its header claims {size + 2} bytes where the index says {size}",
        f"neither a member nor the archive's end at byte {end + size}",
    ]


def test_padding_that_is_not_empty(layout: Layout) -> None:
    at = where(layout, 4) + int(layout.members["size"][4].as_py())
    overwrite(layout, at, b"x")
    assert problems(layout) == [f"neither a member nor the archive's end at byte {at}"]


@pytest.mark.parametrize("size", [2**33 - 1, -1])
def test_a_header_that_claims_more_than_there_is(layout: Layout, size: int) -> None:
    info, _ = entries(layout)[1]
    info.size = size
    overwrite(layout, where(layout, 1) - 512, info.tobuf(tarfile.GNU_FORMAT))
    [line] = problems(layout)
    assert line.startswith(f"'alpha-0000.view-00.jpg': its header claims {size} bytes")


def test_the_end_of_the_archive(layout: Layout) -> None:
    size = int(layout.shard_sizes[0])
    end = where(layout, 5) + 512  # the last member is shorter than a block
    overwrite(layout, size - 20, b"hidden")
    assert problems(layout) == [f"neither a member nor the archive's end at byte {size - 512}"]
    overwrite(layout, size - 20, bytes(6))
    overwrite(layout, end + 5, b"hidden")
    assert problems(layout) == [f"neither a member nor the archive's end at byte {end}"]


def test_no_end_of_the_archive(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An index over a shard that ends with its last member, or with half an end."""
    for blocks in (0, 1):
        store = Store.open(tmp_path_factory.mktemp("store"))
        layout = tiny_layout(store, places=2, test_places=1, distractors=0, places_per_shard=9)
        data = layout.store.read(FIRST)[: where(layout, layout.members.num_rows - 1) + 512 + 512 * blocks]
        layout.store.write(FIRST, data)
        info = layout.store.read_json("layout.json")
        info["bytes"] = info["shards"][0]["size"] = len(data)
        layout.store.write_json("layout.json", info)
        assert problems(layout) == ["no empty blocks at the archive's end"]


def test_an_end_in_the_middle(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two archives, one behind the other, and an index that knows both: other readers see the first alone."""
    one, two = (
        TinyPlace(f"p{number}", "a", ("train",), (0.0, 0.0), {"tile.jpg": bytes([number]) * 600}) for number in (1, 2)
    )
    layout = write_layout(Store.open(tmp_path_factory.mktemp("store")), [one, two])
    members = entries(layout)
    parts = [tar_of(members[:2]), tar_of(members[2:])]
    layout.store.write(FIRST, b"".join(parts))
    rows = layout.members.to_pylist()
    for row in rows[2:]:
        row["offset"] += len(parts[0]) - (where(layout, 2) - 512)
    data = table_bytes(pa.Table.from_pylist(rows, schema=MEMBERS))
    layout.store.write("members.parquet", data)
    info = layout.store.read_json("layout.json")
    info["index"]["members.parquet"] = hashlib.sha256(data).hexdigest()
    info["bytes"] = info["shards"][0]["size"] = sum(map(len, parts))
    layout.store.write_json("layout.json", info)
    report = verify_layout(open_layout(Store.open(layout.store.url.rsplit("/", 3)[0])))
    assert list(report.problems) == [
        "layout.json: its id is another than that of the tables: the index was written anew",
        f"{FIRST}: the archive ends at byte {where(layout, 2) - 512}, in front of members that the index has in it",
    ]


def test_a_shard_that_cannot_be_read(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    read_range = Store.read_range

    def shorter(store: Store, path: str, offset: int, size: int) -> bytes:
        data = read_range(store, path, offset, size)
        return data[:-1] if path.endswith(FIRST) else data

    monkeypatch.setattr(Store, "read_range", shorter)
    assert problems(layout) == ["cannot be read: it became shorter while it was read"]


def test_a_store_that_refuses_is_no_damage(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = tiny_layout(s3_store)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    closed = Layout(Store.open(layout.store.url), layout.info, layout.index)
    with pytest.raises(Refused, match="access refused"):
        verify_layout(closed)


def test_many_problems_are_counted_and_some_are_shown(tmp_path_factory: pytest.TempPathFactory) -> None:
    layout = tiny_layout(Store.open(tmp_path_factory.mktemp("store")), places=60, places_per_shard=30)
    for shard in layout.shard_names:
        members = [(info, bytes(len(data))) for info, data in entries(layout, shard)]
        layout.store.write(shard, tar_of(members))
    report = verify_layout(layout)
    assert report.count == layout.members.num_rows
    assert len(report.problems) == 100


@pytest.mark.parametrize("chunk", [600, 1000, 4096])
def test_every_byte_is_read_once_and_in_small_pieces(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    read: list[tuple[str, int, int]] = []
    read_range = Store.read_range

    def watched(store: Store, path: str, offset: int, size: int) -> bytes:
        read.append((path, offset, size))
        return read_range(store, path, offset, size)

    monkeypatch.setattr(Store, "read_range", watched)
    monkeypatch.setattr(verify, "CHUNK", chunk)
    assert verify_layout(layout).count == 0
    assert max(size for _, _, size in read) == chunk
    for shard, size in zip(layout.shard_names, layout.shard_sizes, strict=True):
        ranges = [(offset, length) for path, offset, length in read if path.endswith(shard)]
        assert [offset for offset, _ in ranges] == list(range(0, size, chunk))
        assert sum(length for _, length in ranges) == size


@pytest.fixture
def whole(layout: Layout) -> bytes:
    return layout.store.read(FIRST)


@settings(deadline=None, max_examples=75, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_found_and_nothing_is_raised(layout: Layout, whole: bytes, data: st.DataObject) -> None:
    """Garbage over a member's bytes or over its name, a cut, garbage behind it."""
    kind = data.draw(st.sampled_from(["bytes", "name", "cut", "behind"]))
    if kind == "cut":
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "behind":
        damaged = whole + data.draw(st.binary(min_size=1, max_size=2000))
    else:
        row = data.draw(st.integers(0, 5))
        name = f"{layout.keys[row // 3]}.{layout.members['member'][row]}"
        begin = where(layout, row) - (512 if kind == "name" else 0)
        end = begin + (len(name) if kind == "name" else int(layout.members["size"][row].as_py()))
        at = data.draw(st.integers(begin, end - 1))
        garbage = data.draw(st.binary(min_size=1, max_size=end - at))
        damaged = whole[:at] + garbage + whole[at + len(garbage) :]
    layout.store.write(FIRST, damaged)
    report = verify_layout(layout)
    assert (report.count > 0) == (damaged != whole)
    assert all(line.startswith(f"{FIRST}: ") and line.isprintable() for line in report.problems)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers=st.lists(st.binary(max_size=512), max_size=8), data=st.data())
def test_headers_of_any_content_raise_nothing(
    layout: Layout, whole: bytes, headers: list[bytes], data: st.DataObject
) -> None:
    """Headers whose checksum holds, and whose fields are garbage."""
    damaged = bytearray(whole)
    for header in headers:
        filled = bytearray(header.ljust(512, data.draw(st.sampled_from([b"\0", b"7", b"\xff"]))))
        filled[148:156] = b"%06o\0 " % (sum(filled[:148]) + 8 * 32 + sum(filled[156:]))
        at = data.draw(st.integers(0, len(whole) // 512 - 1)) * 512
        damaged[at : at + 512] = filled
    layout.store.write(FIRST, bytes(damaged))
    assert all(line.isprintable() for line in verify_layout(layout).problems)
