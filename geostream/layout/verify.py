"""Do the shards still hold what the index says? Every shard is read once, and every member compared.

Decides that headers are looked at one by one and not by a tar library's reader: such a reader takes a broken header for
the archive's end, follows links and extended headers, and so sees less than another reader would. Behind a broken
header the walk goes on at the next member of the index, so that one flipped byte is one line. A shard is read once, in
order, in ranges of 4 MiB, a few shards at a time: that costs about 100 MB of memory, whatever the shards' sizes.
"""

from __future__ import annotations

import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import google_crc32c
import numpy as np

from geostream.errors import NotFound, Refused, StoreError, Unsupported
from geostream.layout import Layout
from geostream.layout.schema import content_id
from geostream.progress import Bar
from geostream.store import Store

CHUNK = 4 * 2**20  # bytes of a read
THREADS = 4  # shards read at a time
EMPTY = bytes(tarfile.BLOCKSIZE)
SHOWN = 100  # problems that are kept in words; the rest is counted
CLIMBS = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])[.][.]([/\\]|$)")  # absolute, or out of the folder
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
}


@dataclass(frozen=True)
class Report:
    """What a verification found. ``problems``: a line each, the first 100; ``count``: of all."""

    shards: int
    members: int
    bytes: int
    problems: tuple[str, ...]
    count: int


@dataclass
class _Problems:
    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: str) -> None:
        self.extend([line], 1)

    def extend(self, lines: list[str], count: int) -> None:
        self.lines += lines[: SHOWN - len(self.lines)]
        self.count += count


@dataclass(frozen=True)
class _Member:
    """A member as the index has it; ``name`` is that in the tar."""

    name: str
    offset: int
    size: int
    crc32c: int

    @property
    def header(self) -> int:
        return self.offset - tarfile.BLOCKSIZE

    @property
    def end(self) -> int:
        return self.offset + self.size


def verify_layout(layout: Layout) -> Report:
    """Compare every shard with the index. Raises Refused and Unsupported where the store lets nobody read like this."""
    problems = _Problems()
    names = layout.shard_names
    bounds = np.searchsorted(layout.members["shard"].to_numpy(), np.arange(len(names) + 1)).tolist()
    with Bar("shards", len(names)) as bar, ThreadPoolExecutor(THREADS, thread_name_prefix="geostream-verify") as pool:
        found = [pool.submit(_check_shard, layout, shard, *bounds[shard : shard + 2]) for shard in range(len(names))]
        try:
            if content_id(layout.places, layout.members) != layout.id:
                problems.add("layout.json: its id is another than that of the tables: the index was written anew")
            for name, one in zip(names, found, strict=True):
                result = one.result()
                problems.extend([f"{name}: {line}" for line in result.lines], result.count)
                bar.advance(problems=problems.count)
        finally:
            pool.shutdown(cancel_futures=True)
    return Report(
        shards=len(names),
        members=layout.members.num_rows,
        bytes=int(layout.shard_sizes.sum()),
        problems=tuple(problems.lines),
        count=problems.count,
    )


def _check_shard(layout: Layout, shard: int, start: int, stop: int) -> _Problems:
    """One shard; its members are the rows from ``start`` to ``stop`` of the index."""
    problems = _Problems()
    name, committed = layout.shard_names[shard], int(layout.shard_sizes[shard])
    try:
        size = layout.store.size(name)
        if size != committed:
            problems.add(f"{size} bytes where layout.json says {committed}: cut off or replaced since the commit")
        expected = [
            _Member(f"{layout.keys[row['place']]}.{row['member']}", row["offset"], row["size"], row["crc32c"])
            for row in layout.members.slice(start, stop - start).to_pylist()
        ]
        _Walk(_Bytes(layout.store, name, size), expected, problems).run(whole=size == committed)
    except NotFound:
        problems.add("gone since the commit")
    except (Refused, Unsupported):
        raise  # of one shard as of all: no word about the layout
    except StoreError as error:
        problems.add(f"cannot be read: {error}")
    return problems


class _Bytes:
    """An object of ``size`` bytes, read from its beginning to its end, a chunk at a time."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self.store, self.name, self.size = store, name, size
        self._start, self._chunk = 0, memoryview(b"")

    def pieces(self, offset: int, size: int) -> Iterator[memoryview]:
        """The bytes from ``offset`` on; fewer where the object ends."""
        end = min(offset + size, self.size)
        while offset < end:
            if not self._start <= offset < self._start + len(self._chunk):
                self._start = offset - offset % CHUNK
                wanted = min(CHUNK, self.size - self._start)
                self._chunk = memoryview(self.store.read_range(self.name, self._start, wanted))
                if len(self._chunk) != wanted:
                    raise StoreError("it became shorter while it was read")
            piece = self._chunk[offset - self._start : end - self._start]
            yield piece
            offset += len(piece)

    def read(self, offset: int, size: int) -> bytes:
        return b"".join(self.pieces(offset, size))


class _Walk:
    """From header to header through a shard."""

    def __init__(self, data: _Bytes, expected: list[_Member], problems: _Problems) -> None:
        self.data, self.expected, self.problems = data, expected, problems
        self.by_name = {member.name: member for member in expected}
        self.headers = [member.header for member in expected]
        self.expected_at = frozenset(self.headers)
        self.broken: set[int] = set()  # where a header should be, and something else is
        self.seen: set[str] = set()  # those of the index that are in the tar
        self.strangers = _Problems()
        self.is_tar = False

    def run(self, *, whole: bool) -> None:
        """``whole``: the shard has the length it was committed with."""
        at: int | None = 0
        while at is not None:
            header = self.data.read(at, tarfile.BLOCKSIZE)
            if header == EMPTY:
                at = self._empty_block(at)
                continue
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                if at < self.data.size:
                    self.broken.add(at)
                elif whole:
                    self.problems.add("no empty blocks at the archive's end")
                at = self._next_expected(at)
            else:
                self.is_tar = True
                at = self._member(info, at)
        self._compare_names()

    def _next_expected(self, at: int) -> int | None:
        """Where the index has the next header behind ``at``."""
        number = bisect_right(self.headers, at)
        return self.headers[number] if number < len(self.headers) else None

    def _member(self, info: tarfile.TarInfo, at: int) -> int | None:
        """Compare a member with the index; returns where the next header should be."""
        name, offset, size = info.name, at + tarfile.BLOCKSIZE, info.size
        member = self.by_name.get(name)
        has_data = info.type not in KINDS
        fits = not has_data or 0 <= size <= self.data.size - offset
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = KINDS.get(info.type, "an extended header, or of an unknown kind")
            self.problems.add(f"{name!r} is {kind}, not a file")
            self.seen |= self.by_name.keys() & {name}
        elif CLIMBS.search(name):
            self.problems.add(f"{name!r}: its path leads out of the folder it is unpacked into")
        elif member is None:
            self.strangers.add(f"{name!r} is not in the index")
        elif name in self.seen:
            self.problems.add(f"{name!r} is there twice")
        elif fits:
            self.seen.add(name)
            self._compare(member, offset, size)
        elif member.end <= self.data.size:  # else it is cut off, and counted as such
            self.seen.add(name)
            self.problems.add(f"{name!r}: its header claims {size} bytes, and the shard ends before")
        if not fits:
            return self._next_expected(at)
        return offset + (size + -size % tarfile.BLOCKSIZE if has_data else 0)

    def _compare(self, member: _Member, offset: int, size: int) -> None:
        wrong = []
        if offset != member.offset:
            wrong.append(f"at byte {offset} where the index says {member.offset}")
        if size != member.size:
            wrong.append(f"{size} bytes where the index says {member.size}")
        else:
            checksum = 0
            for piece in self.data.pieces(offset, size):
                checksum = google_crc32c.extend(checksum, bytes(piece))
            if checksum != member.crc32c:
                wrong.append("checksum differs from the index, its bytes were changed")
        if wrong:
            self.problems.add(f"{member.name!r}: {'; '.join(wrong)}")

    def _empty_block(self, at: int) -> int | None:
        """The archive's end: two empty blocks, and nothing but empty ones behind them."""
        following = self._next_expected(at)
        if following is not None:
            if at not in self.expected_at:
                self.problems.add(f"the archive ends at byte {at}, in front of members that the index has in it")
            return following
        if self.data.size - at < 2 * tarfile.BLOCKSIZE:
            self.problems.add("no empty blocks at the archive's end")
        if any(bytes(piece).strip(b"\0") for piece in self.data.pieces(at, self.data.size - at)):
            self.problems.add(f"there is something behind the archive's end at byte {at}")
        return None

    def _compare_names(self) -> None:
        """What only one of the two has."""
        for at in sorted(self.broken - self.expected_at):
            self.problems.add(f"neither a member nor the archive's end at byte {at}")
        missing = [member for member in self.expected if member.name not in self.seen]
        cut = [member for member in missing if member.end > self.data.size]
        if cut:
            self.problems.add(f"cut off: {len(cut)} members from {cut[0].name!r} on are not in it")
        if not self.seen and len(missing) > len(cut):
            what = "another shard is in its place" if self.is_tar else "it is not a tar archive"
            self.problems.add(f"none of the {len(missing)} members that the index has in it: {what}")
            return
        self.problems.extend(self.strangers.lines, self.strangers.count)
        for member in missing[: len(missing) - len(cut)]:
            what = "its header in the tar is damaged" if member.header in self.broken else "it is not in the tar"
            self.problems.add(f"{member.name!r}: {what}")
