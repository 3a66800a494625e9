"""Compare a layout's shards with its index, by reading every byte of every shard once.

The index says where the header and data of each member lie. Each member is checked there, and all bytes between members
and behind the last one must be zero. A shard that is borrowed from an earlier layout may hold whole members there that
the index does not name: those of places that have changed or were removed since. Shards of another data set, which a
joined layout borrows, name places by the keys of their own data set. Reading the shards as tar archives would find
less: a tar reader takes a broken header for the end of the archive, and follows links and extended headers.
Shards are read in order, in ranges of 4 MiB, a few shards at a time.
"""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c
import numpy as np

from geostream.errors import NotFound, Refused, StoreError, Unsupported
from geostream.layout import Layout
from geostream.layout.files import SOURCES, read_sources
from geostream.layout.schema import HEADER, content_id
from geostream.progress import Bar
from geostream.store import Store

CHUNK = 4 * 2**20  # bytes of a read
THREADS = 4  # shards read at the same time
SHOWN = 100  # problems that are described; the others are only counted
END = 2 * tarfile.BLOCKSIZE  # bytes of the empty blocks that end an archive


@dataclass(frozen=True)
class Report:
    """The result of a verification.

    Attributes:
        shards: Number of shards read.
        members: Number of members in the index.
        bytes: Bytes of all shards, as committed.
        problems: The first 100 problems, one line each that names the shard and the member.
        count: Number of all problems.
    """

    shards: int
    members: int
    bytes: int
    problems: tuple[str, ...]
    count: int


def verify_layout(layout: Layout) -> Report:
    """Compare every shard of a layout with its index.

    The layout is read once. Memory holds four reads and four members at a time.

    Raises:
        Refused: The store refuses access.
        Unsupported: The store cannot read ranges of objects.
    """
    problems, count = list[str](), 0
    names = [
        path if borrowed else name
        for path, name, borrowed in zip(layout.shard_paths, layout.shard_names, layout.borrowed, strict=True)
    ]
    bounds = np.searchsorted(layout.members["shard"].to_numpy(), np.arange(len(names) + 1)).tolist()
    if content_id(layout.places, layout.members) != layout.id:
        problems, count = ["layout.json: its id is another than that of the tables: the index was written anew"], 1
    if SOURCES in layout.info["index"] and read_sources(layout.store, layout.info) is None:
        problems.append(f"{SOURCES}: gone or changed since the commit: the next append reads every raw file")
        count += 1
    with Bar("shards", len(names)) as bar, ThreadPoolExecutor(THREADS, thread_name_prefix="geostream-verify") as pool:
        found = [pool.submit(_check_shard, layout, shard, *bounds[shard : shard + 2]) for shard in range(len(names))]
        try:
            for name, one in zip(names, found, strict=True):
                lines = one.result()
                problems += [f"{name}: {line}" for line in lines[: SHOWN - len(problems)]]
                count += len(lines)
                bar.advance(problems=count)
        finally:
            pool.shutdown(cancel_futures=True)
    return Report(len(names), layout.members.num_rows, int(layout.shard_sizes.sum()), tuple(problems), count)


def member_damage(data: bytes, name: str, size: int, crc32c: int) -> str:
    """Describe what is wrong with a member.

    Args:
        data: Its header and data, as read from the shard.
        name: Its name in the tar, by the index: the place's key, a dot and the member's name.
        size: Bytes of its data, by the index.
        crc32c: Checksum of its data, by the index.

    Returns:
        The problem in words; "" if the member is as committed.
    """
    if len(data) < HEADER + size:
        return "its shard ends before it"
    info = _header(data[:HEADER])
    if info is None:
        return "its header in the tar is damaged"
    if info.name != name:
        return f"its header in the tar is of another member, {info.name!r}"
    if info.type != tarfile.REGTYPE:
        return "its header in the tar is not that of a file"
    if info.size != size:
        return f"its header claims {info.size} bytes where the index says {size}"
    return "" if google_crc32c.value(data[HEADER:]) == crc32c else "its bytes differ from the checksum in the index"


def _header(block: bytes) -> tarfile.TarInfo | None:
    """Read a block as a tar header; return None if it is none."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _check_shard(layout: Layout, shard: int, start: int, stop: int) -> list[str]:
    """Return the problems of one shard, whose members are the rows ``start`` to ``stop`` of the index."""
    store, path, committed = layout.shards_store, layout.shard_paths[shard], int(layout.shard_sizes[shard])
    problems = []
    try:
        size = store.size(path)
        if size != committed:
            problems.append(f"{size} bytes where layout.json says {committed}: cut off or replaced since the commit")
        rows = layout.members.slice(start, stop - start).to_pylist()
        keys = [layout.stored_key(layout.keys[row["place"]], row["place"], shard) for row in rows]
        members = [(f"{key}.{row['member']}", row) for key, row in zip(keys, rows, strict=True)]
        with io.BufferedReader(_Object(store, path, size), CHUNK) as stream:
            borrowed = bool(layout.borrowed[shard])
            problems += _compare(stream, members, size, whole=size == committed, borrowed=borrowed)
    except NotFound:
        problems.append("gone since the commit")
    except (Refused, Unsupported):
        raise  # it concerns all shards alike, and says nothing about the layout
    except StoreError as error:
        problems.append(f"cannot be read: {error}")
    return problems


class _Object(io.RawIOBase):
    """Read an object of ``size`` bytes from its beginning to its end."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self.store, self.name, self.size, self.at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), CHUNK, self.size - self.at)
        data = self.store.read_range(self.name, self.at, wanted) if wanted else b""
        if len(data) != wanted:
            raise StoreError("it became shorter while it was read")
        buffer[:wanted] = data
        self.at += wanted
        return wanted


def _compare(
    stream: BinaryIO, members: list[tuple[str, dict[str, int]]], size: int, whole: bool, borrowed: bool
) -> list[str]:
    """Return the problems of a shard of ``size`` bytes; ``whole`` says whether that is its committed size."""
    problems, misplaced, at = list[str](), 0, 0
    for number, (name, row) in enumerate(members):
        header, end = row["offset"] - HEADER, row["offset"] + row["size"]
        if end > size:
            problems.append(f"cut off: {len(members) - number} members from {name!r} on are not in it")
            return problems
        unknown, at = _unknown(stream, at, header, borrowed)
        if not unknown and header - at >= HEADER:
            unknown = [f"the archive ends at byte {at + -at % HEADER}, in front of members that the index has in it"]
        damage = member_damage(stream.read(HEADER + row["size"]), name, row["size"], row["crc32c"])
        problems += [*unknown, *([f"{name!r}: {damage}"] if damage else [])]
        misplaced += "its header in the tar" in damage
        at = end
    if members and misplaced == len(members):
        return [f"none of the {misplaced} members is where the index has it: another shard, or no tar, is in its place"]
    unknown, at = _unknown(stream, at, size, borrowed)
    if whole and size - (at + -at % HEADER) < END:
        problems.append("no empty blocks at the archive's end")
    return [*problems, *unknown]


def _unknown(stream: BinaryIO, at: int, end: int, borrowed: bool) -> tuple[list[str], int]:
    """Read the bytes from ``at`` to ``end``, where the index has no member, and describe what is there besides zeros.

    Where the shard is borrowed, whole members are no problem. Also return where the last of these ends.
    """
    problems, said, last = list[str](), False, at
    while at < end:
        block = stream.read(min(HEADER - at % HEADER, end - at))
        at += len(block)
        if not block.strip(b"\0"):
            continue
        info = _header(block)
        if info and borrowed and info.type == tarfile.REGTYPE and at + info.size <= end:
            stream.read(info.size)
            at = last = at + info.size
        elif info:
            kind = "" if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else ", which is not a file,"
            problems.append(f"{info.name!r}{kind} is at byte {at - len(block)}, where the index has nothing")
            said = True
        elif not said:
            problems.append(f"neither a member nor the archive's end at byte {at - len(block)}")
            said = True
    return problems, last
