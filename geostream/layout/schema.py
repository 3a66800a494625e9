"""Define the two tables of a layout's index, and check what every reader relies on.

Members lie in their shard one after the other, each behind its tar header. All members of a place (one tile, its views,
and its facts in a JSON) lie in one shard. A place that was removed keeps its row, and with it its id, but has neither
splits nor views nor members: a *tombstone*. Every name is a valid file name. This is checked at every commit and
whenever a layout is opened (about 0.3 s for a million members), so a damaged index is refused before an epoch begins.
:mod:`geostream.layout.verify` checks whether the shards hold what the index says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geostream.arrays import Bools, Int32, Int64

Coordinates = Literal["latlon", "utm", "none"]
# What counts as a hit. "paired": the tile of the query's own place. "within-5m": also any tile within 5 metres of it.
# "both-ways": for a view its tile, and for a tile any of its views; average precision is measured, too.
Protocol = Literal["paired", "within-5m", "both-ways"]

AT_ONCE = 2**16  # rows that are Python objects at the same time
HEADER = 512  # bytes of a tar header, in front of each member's data
KEY = "^[A-Za-z0-9_-]+$"  # no slash, and no dot, because a dot ends the key in a member's name
MEMBER = "^(tile|view-[0-9]{2,5})[.][A-Za-z0-9]+$|^json$"
MOST_VIEWS = 2**15 - 1  # of a place: view numbers are int16
SPLITS = ("train", "test")  # of tiles
VIEW_SPLITS = (*SPLITS, "gallery")

VIEW = pa.struct(
    [
        ("name", pa.string()),  # "view-00"
        ("split", pa.string()),  # the split of this view's pair; "gallery": it is a candidate and no query
        ("source", pa.string()),  # the raw file's name
        ("north", pa.float64()),
        ("east", pa.float64()),
        ("semi_positives", pa.list_(pa.int32())),  # place ids whose tile also shows this view
    ]
)
PLACES = pa.schema(
    [
        ("key", pa.string()),
        ("area", pa.string()),
        ("splits", pa.list_(pa.string())),  # the splits whose gallery holds this tile
        ("north", pa.float64()),  # degrees (latlon), metres (utm) or NaN (none)
        ("east", pa.float64()),
        ("source", pa.string()),
        ("views", pa.list_(VIEW)),
    ]
)
MEMBERS = pa.schema(
    [
        ("place", pa.int32()),
        ("member", pa.string()),  # "tile.jpg", "view-00.jpg", "json"
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # of the data in the tar, behind its header
        ("size", pa.int64()),
        ("crc32c", pa.uint32()),
    ]
)
TABLES = {"places.parquet": PLACES, "members.parquet": MEMBERS}


class IndexDamage(Exception):
    """An index is damaged; the caller adds which layout's it is, and what to do."""


def check_schema(file: str, table: pa.Table) -> None:
    """Check the columns of a table of the index.

    Args:
        file: "places.parquet" or "members.parquet".
        table: Its content.

    Raises:
        IndexDamage: The table has other columns or types than a commit writes.
    """
    schema = TABLES[file]
    if table.column_names != schema.names:
        have = ", ".join(table.column_names)
        raise IndexDamage(f"{file}: has the columns {have[:200]!r}, not {', '.join(schema.names)!r}")
    for have, wanted in zip(table.schema, schema, strict=True):
        if have.type != wanted.type:
            raise IndexDamage(f"{file}: column {have.name!r} is of type {have.type}, not {wanted.type}")


def content_id(places: pa.Table, members: pa.Table) -> str:
    """Return the hash of the index's values, which does not depend on the library that wrote the Parquet files."""
    digest = hashlib.sha256()
    for table in (places, members):
        for column in table.column_names:
            digest.update(column.encode())
            for batch in table.select([column]).to_batches(max_chunksize=AT_ONCE):
                for value in batch.column(0).to_pylist():
                    digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def check_index(places: pa.Table, members: pa.Table, shards: Sequence[tuple[str, int]]) -> None:
    """Check the invariants that every reader relies on.

    Args:
        places: The table of places, of the right schema.
        members: The table of members, of the right schema.
        shards: (name, bytes) of each shard, in order; the name of a borrowed one begins with its layout's.

    Raises:
        IndexDamage: An invariant does not hold; the message names the first row that breaks it.
    """
    for file, table in (("places.parquet", places), ("members.parquet", members)):
        for name in table.column_names:
            if _has_nulls(table[name].combine_chunks()):
                raise IndexDamage(f"{file}: column {name!r} has empty values")
    _check_places(places)
    _Members(places, members, shards).check()


def _has_nulls(values: pa.Array) -> bool:
    if values.null_count:
        return True
    if pa.types.is_list(values.type):
        return _has_nulls(values.flatten())
    return pa.types.is_struct(values.type) and any(_has_nulls(part) for part in values.flatten())


def _check_places(places: pa.Table) -> None:
    keys = places["key"]
    if not len(keys):
        raise IndexDamage("places.parquet: a layout needs at least one place")
    if (row := _first(~pc.match_substring_regex(keys, KEY).to_numpy())) >= 0:
        key = keys[row].as_py()[:100]
        raise IndexDamage(f"places.parquet: key {key!r} of place {row}: keys are letters, digits, '-' and '_' only")
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = pc.value_counts(keys)
        [key] = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[:1].to_pylist()
        raise IndexDamage(f"places.parquet: two places have the same key {key}")
    views = places["views"].combine_chunks()
    if (row := _first(pc.list_value_length(views).to_numpy() > MOST_VIEWS)) >= 0:
        raise IndexDamage(f"places.parquet: place {keys[row]} has more than {MOST_VIEWS} views")
    _check_splits(keys, places["splits"].combine_chunks(), SPLITS, "a split")
    _check_splits(keys, views, VIEW_SPLITS, "a view of split")
    semi = views.flatten().field("semi_positives")
    named = semi.flatten().to_numpy()
    if (row := _first((named < 0) | (named >= len(keys)))) >= 0:
        view = pc.list_parent_indices(semi)[row].as_py()
        place = pc.list_parent_indices(views)[view].as_py()
        raise IndexDamage(
            f"places.parquet: a view of place {keys[place]} has place number {named[row]} as semi-positive, "
            f"but there are {len(keys)} places"
        )


def _check_splits(keys: pa.ChunkedArray, lists: pa.Array, known: Sequence[str], what: str) -> None:
    """Check the splits in ``lists``, which has the splits or the views of each place."""
    splits = lists.flatten()
    splits = splits.field("split") if pa.types.is_struct(splits.type) else splits
    if (row := _first(~pc.is_in(splits, pa.array(known)).to_numpy(zero_copy_only=False))) >= 0:
        key, split = keys[pc.list_parent_indices(lists)[row].as_py()], splits[row].as_py()[:100]
        raise IndexDamage(f"places.parquet: place {key} has {what} {split!r}; there are {', '.join(known)}")


class _Members:
    """Check the columns of ``members.parquet``, as arrays."""

    def __init__(self, places: pa.Table, members: pa.Table, shards: Sequence[tuple[str, int]]) -> None:
        self.keys, self.shards = places["key"], shards
        self.place: Int32 = members["place"].to_numpy()
        self.shard: Int32 = members["shard"].to_numpy()
        self.offset: Int64 = members["offset"].to_numpy()
        self.size: Int64 = members["size"].to_numpy()
        self.member: pa.DictionaryArray = members["member"].combine_chunks().dictionary_encode()
        self.views: Int64 = pc.list_value_length(places["views"].combine_chunks()).to_numpy().astype(np.int64)
        splits = pc.list_value_length(places["splits"].combine_chunks()).to_numpy()
        self.removable: Bools = (splits == 0) & (self.views == 0)  # has no members where it was removed

    def check(self) -> None:
        """Raise IndexDamage for the first member that is wrong."""
        place, shard, offset, size = self.place, self.shard, self.offset, self.size
        self._refuse((place < 0) | (place >= len(self.keys)), "names a place that places.parquet lacks")
        self._refuse((shard < 0) | (shard >= len(self.shards)), "names a shard that layout.json lacks")
        self._refuse(offset < HEADER, f"begins in front of byte {HEADER}, where no tar header fits before it")
        self._refuse(size < 0, "has a negative size")
        ends = np.array([n for _, n in self.shards], dtype=np.int64)
        self._refuse(size > ends[shard] - offset, "reaches past the end of its shard")  # a sum could overflow
        same = shard[1:] == shard[:-1]
        sorted_ = (shard[1:] > shard[:-1]) | (same & (offset[1:] >= offset[:-1]))
        self._refuse(~sorted_, "is not in the order of shards and offsets", row=1)
        overlap = same & (offset[1:] - HEADER < offset[:-1] + size[:-1])
        self._refuse(overlap, "overlaps the member in front of it", row=1)
        home = np.full(len(self.keys), -1, dtype=np.int64)
        home[place] = shard
        self._refuse(home[place] != shard, "is in one shard, and others of its place in another")
        self._check_names()

    def _check_names(self) -> None:
        """Check that every place has its tile, each of its views and its facts exactly once, or was removed."""
        names, code = self.member.dictionary, self.member.indices.to_numpy()
        known = pc.match_substring_regex(names, MEMBER).to_numpy(zero_copy_only=False)
        self._refuse(~known[code], "is neither tile.jpg (or another suffix), nor view-00.jpg and so on, nor json")
        number = pc.struct_field(pc.extract_regex(names, "^view-(?P<number>[0-9]+)"), "number").cast(pa.int64())
        view = pc.fill_null(number, -1).to_numpy()[code]
        views = self.views[self.place]
        self._refuse(view >= views, "is of a view that places.parquet lacks")
        # Each place has a slot for its tile, one for each view, and one for its facts.
        facts = pc.equal(names, "json").to_numpy(zero_copy_only=False)[code]
        first = np.concatenate([[0], np.cumsum(self.views + 2)])
        slot = first[self.place] + np.where(facts, views + 1, view + 1)
        count = np.bincount(slot, minlength=first[-1])
        begins = first[:-1][self.removable]
        gone = begins[(count[begins] == 0) & (count[begins + 1] == 0)]
        count[gone] = count[gone + 1] = 1
        if (wrong := _first(count != 1)) >= 0:
            place = int(np.searchsorted(first, wrong, side="right")) - 1
            at = wrong - int(first[place])
            name = "tile" if at == 0 else "json" if at > self.views[place] else f"view-{at - 1:02d}"
            raise IndexDamage(f"members.parquet: place {self.keys[place]} has {count[wrong]} members {name}, not one")

    def _refuse(self, wrong: Bools, what: str, row: int = 0) -> None:
        """Raise IndexDamage for the first wrong member; the first entry of ``wrong`` is that of member ``row``."""
        if (found := _first(wrong)) >= 0:
            raise IndexDamage(f"members.parquet: {self._describe(found + row)} {what}")

    def _describe(self, row: int) -> str:
        place, shard = int(self.place[row]), int(self.shard[row])
        key = self.keys[place] if 0 <= place < len(self.keys) else f"number {place}"
        name = self.shards[shard][0] if 0 <= shard < len(self.shards) else f"shard number {shard}"
        member = self.member[row].as_py()[:100]
        where = f"offset {self.offset[row]}, {self.size[row]} bytes"
        return f"{member!r} of place {key} in {name} ({where})"


def _first(wrong: Bools) -> int:
    """Return the first row in which ``wrong`` is true; -1 if there is none."""
    return int(wrong.argmax()) if wrong.any() else -1
