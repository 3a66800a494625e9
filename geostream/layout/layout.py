"""Commit and open layouts: immutable sets of tar shards, each with an index of places and members.

A layout is committed when ``layout.json`` exists; that file is written last, and only once. Opening reads nothing else;
the index is read and checked when it is asked for (:mod:`geostream.layout.index`).

The id of a place is its row in ``places.parquet`` and the same in every generation of a layout. Generations of the same
places differ only in ``members.parquet``, which says in which shard, and where in it, each member lies. So a neighbour
graph stays valid after a reclustering. An append adds rows behind the old ones, and borrows the shards of the layout
before it. Code that needs the order on disk uses ``shard_of_place``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geostream.arrays import Csr, Int32, Int64, Pairs, distinct
from geostream.errors import AlreadyExists, BadInput, LayoutNotCommitted
from geostream.layout.current import current_layout
from geostream.layout.files import FORMAT, JOINED_FORMAT, SOURCES, check_info, read_info, shard_paths, summary
from geostream.layout.gallery import gallery_id
from geostream.layout.index import Index
from geostream.layout.lineage import Joined, joined_in
from geostream.layout.listing import layout_infos, newest, the_dataset
from geostream.layout.schema import (
    MEMBERS,
    PLACES,
    VIEW_SPLITS,
    Coordinates,
    IndexDamage,
    Protocol,
    check_index,
    content_id,
)
from geostream.layout.tags import find_layout
from geostream.store import Store, table_bytes

LISTED = 2**18  # places whose excluded others are collected at a time
PLACES_FILE, MEMBERS_FILE = "places.parquet", "members.parquet"
TILE, FACTS = -1, -2  # in the place of a view's number


@dataclass(frozen=True)
class Layout:
    """A committed layout, opened: its index as arrays, each read when it is first asked for.

    The ids of its N places are 0 to N-1. The rows of ``members`` are its M members, sorted by shard and offset. Arrays
    are kept; what each takes is said where it is more than a few bytes a place.

    Attributes:
        store: The layout's folder.
        info: ``layout.json``.
        index: The two tables, which are read as they are needed.
    """

    store: Store
    info: dict[str, Any]
    index: Index

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("store", "info", "index")}  # not the arrays

    @property
    def places(self) -> pa.Table:
        """``places.parquet`` as a whole, checked: about 200 bytes a place."""
        return self.index.tables[0]

    @property
    def members(self) -> pa.Table:
        """``members.parquet`` as a whole, checked: about 40 bytes a member."""
        return self.index.tables[1]

    @property
    def dataset(self) -> str:
        """The data set's name in the store."""
        return str(self.info["dataset"])

    @property
    def name(self) -> str:
        """The layout's name in its data set."""
        return str(self.info["layout"])

    @property
    def id(self) -> str:
        """Hash of the index; recorded in every artefact made from this layout."""
        return str(self.info["id"])

    @property
    def places_id(self) -> str:
        """Hash of ``places.parquet``: place ids are valid in every generation with the same one."""
        return str(self.info["index"]["places.parquet"])

    @property
    def generation(self) -> int:
        """Number of reclusterings and appends that led to this layout; 0 for a layout as it was first sharded."""
        return int(self.info["generation"])

    @property
    def coordinates(self) -> Coordinates:
        """The kind of ``position``: degrees ("latlon"), metres ("utm"), or "none"."""
        kind: Coordinates = self.info["coordinates"]
        return kind

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The data set's evaluation protocols, the default one first (:data:`Protocol`)."""
        return tuple(self.info.get("protocols", ["paired"]))

    @property
    def n_places(self) -> int:
        """Number of places, N."""
        return int(self.info["places"])

    @property
    def gallery(self) -> str | None:
        """Hash of what figures on the test set depend on (:mod:`geostream.layout.gallery`); None: an older layout."""
        gallery: str | None = self.info.get("gallery")
        return gallery

    @property
    def source(self) -> dict[str, Any] | None:
        """Where the tiles come from: their name, licence, attribution and url, each None if unknown; None: not noted.

        Whoever shows tiles shows the attribution beside them.
        """
        facts = {name: self.info["source"].get(name) for name in ("name", "licence", "attribution", "url")}
        return facts if any(facts.values()) else None

    @property
    def tile_metres(self) -> float | None:
        """Side of a tile on the ground in metres; None where it is not known, or differs from tile to tile."""
        metres: float | None = self.info.get("tile_metres")
        return metres

    @cached_property
    def joined(self) -> tuple[Joined, ...]:
        """The layouts of other data sets that this one joins, in the order of their places; none for a usual layout."""
        return joined_in(self.info)

    @cached_property
    def part(self) -> Int32:
        """(N,) which of the layouts in :attr:`joined` each place is of; 0 for all places of a usual layout."""
        counts = [one.places for one in self.joined] or [self.n_places]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @property
    def shard_names(self) -> list[str]:
        """Names of the S shards, in order of their number, each in the folder of the layout that wrote it."""
        return [shard["name"] for shard in self.info["shards"]]

    @cached_property
    def shards_store(self) -> Store:
        """The folder that holds this layout's shards and those that it borrows.

        It is the data set's ``layouts`` folder, or the whole store for shards of other data sets.
        """
        return Store(self.store.url.rsplit("/", 3 if self._reads_others else 1)[0])

    @property
    def _reads_others(self) -> bool:
        return any(shard.get("dataset") for shard in self.info["shards"])

    @property
    def shard_paths(self) -> list[str]:
        """Paths of the S shards below :attr:`shards_store`, in order of their number."""
        own = self.store.url.rpartition("/")[2]
        return [path if "/" in path else f"{own}/{path}" for path in shard_paths(self.info["shards"])]

    @property
    def borrowed(self) -> npt.NDArray[np.bool_]:
        """(S,) whether each shard belongs to an earlier layout."""
        return np.array([shard.get("layout") is not None for shard in self.info["shards"]], dtype=bool)

    @cached_property
    def shard_sizes(self) -> Int64:
        """(S,) bytes of each shard."""
        return np.array([shard["size"] for shard in self.info["shards"]], dtype=np.int64)

    @cached_property
    def keys(self) -> list[str]:
        """Key of each of the N places: about 70 bytes a place."""
        keys: list[str] = self.index.read(PLACES_FILE, ["key"])["key"].to_pylist()
        return keys

    def stored_key(self, key: str, place: int, shard: int) -> str:
        """Return what a place is called in a shard: by its key, or by that in its own data set if the shard is its.

        Args:
            key: The place's key.
            place: Its id.
            shard: Number of the shard that holds it.
        """
        of_other = self.info["shards"][shard].get("dataset")
        return key.removeprefix(self.joined[int(self.part[place])].prefix) if of_other else key

    def key(self, place: int) -> str:
        """Return the key of a place, without reading those of all."""
        return str(self.index.read(PLACES_FILE, ["key"], place, place + 1)["key"][0])

    @cached_property
    def position(self) -> npt.NDArray[np.float64]:
        """(N, 2) north and east of each place's tile, in degrees or metres (``coordinates``); NaN where unknown."""
        position = np.empty((self.n_places, 2))
        for start, part in self._parts(PLACES_FILE, "north", "east"):
            for column, name in enumerate(("north", "east")):
                position[start : start + len(part), column] = part[name].to_numpy()
        return position

    @cached_property
    def area(self) -> Int32:
        """(N,) number of each place's area; areas are numbered in the order of their names."""
        seen: dict[str, int] = {}
        numbers = np.empty(self.n_places, dtype=np.int32)
        for start, part in self._parts(PLACES_FILE, "area"):
            numbers[start : start + len(part)] = coded(part["area"], lambda name: seen.setdefault(name, len(seen)))
        rank = np.empty(len(seen), dtype=np.int32)
        rank[[seen[name] for name in sorted(seen)]] = np.arange(len(seen), dtype=np.int32)
        return rank[numbers]

    @cached_property
    def shard_of_place(self) -> Int32:
        """(N,) number of the shard that holds all members of each place; -1 for a place that was removed."""
        shard = np.full(self.n_places, -1, dtype=np.int32)
        for _, part in self._parts(MEMBERS_FILE, "place", "shard"):
            shard[part["place"].to_numpy()] = part["shard"].to_numpy()
        return shard

    @cached_property
    def _views(self) -> tuple[Int32, npt.NDArray[np.int16], npt.NDArray[np.int8]]:
        """All V views in order of places: (V,) place, (V,) number within it, (V,) number of its split."""
        places, numbers, splits = [], [], []
        for start, part in self._parts(PLACES_FILE, "views.list.element.split"):
            lists = part["views"].combine_chunks()
            place = pc.list_parent_indices(lists).to_numpy().astype(np.int32)
            first = np.searchsorted(place, place, side="left")
            places.append(place + np.int32(start))
            numbers.append((np.arange(len(place)) - first).astype(np.int16))
            splits.append(coded(lists.flatten().field("split"), VIEW_SPLITS.index).astype(np.int8))
        return np.concatenate(places), np.concatenate(numbers), np.concatenate(splits)

    def pairs(self, split: str) -> Pairs:
        """Return the pairs of a split, sorted by place and view.

        Args:
            split: "train", "test", or "gallery" for views that are no queries.
        """
        place, number, splits = self._views
        of_split = splits == (VIEW_SPLITS.index(split) if split in VIEW_SPLITS else -1)
        if of_split.all():
            return Pairs(place, number)  # not copied
        return Pairs(place[of_split], number[of_split])

    def references(self, split: str) -> Int32:
        """Return the places whose tiles are in the gallery of a split, distractors included.

        Args:
            split: "train" or "test".

        Returns:
            (R,) place ids, sorted.
        """
        inside = [np.zeros(0, dtype=np.int32)]
        for start, part in self._parts(PLACES_FILE, "splits"):
            lists = part["splits"].combine_chunks()
            place = pc.list_parent_indices(lists).to_numpy()
            of_split = pc.equal(lists.flatten(), split).to_numpy(zero_copy_only=False)
            inside.append((place[of_split] + start).astype(np.int32))
        return np.concatenate(inside)

    def semi_positives(self, split: str) -> Csr:
        """Return the semi-positives of each pair of a split: other places whose tile also shows the query.

        Args:
            split: "train", "test" or "gallery".

        Returns:
            A list of place ids for each row of :meth:`pairs`.
        """
        lengths, places = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int32)]
        for _, of_view, others in self._semi_positive_lists(split):
            lengths.append(of_view)
            places.append(others)
        indptr = np.zeros(sum(map(len, lengths)) + 1, dtype=np.int64)
        np.cumsum(np.concatenate(lengths), out=indptr[1:])
        return Csr(indptr, np.concatenate(places))

    def semi_positive_places(self, split: str) -> Iterator[tuple[Int32, Int32]]:
        """Yield each place of a view and a semi-positive of that view, a row group at a time.

        Args:
            split: "train", "test" or "gallery".

        Yields:
            (n,) places, sorted, and (n,) their semi-positives.
        """
        for place, lengths, others in self._semi_positive_lists(split):
            yield np.repeat(place, lengths), others

    def _semi_positive_lists(self, split: str) -> Iterator[tuple[Int32, Int32, Int32]]:
        """Yield, a row group at a time, the place of each view, how many semi-positives it has, and these."""
        columns = ("views.list.element.split", "views.list.element.semi_positives.list.element")
        for start, part in self._parts(PLACES_FILE, *columns):
            lists = part["views"].combine_chunks()
            views = lists.flatten()
            of_split = pc.equal(views.field("split"), split)
            semi = views.field("semi_positives").filter(of_split)
            place = pc.list_parent_indices(lists).filter(of_split).to_numpy().astype(np.int32) + np.int32(start)
            lengths = pc.list_value_length(semi).fill_null(0).to_numpy().astype(np.int32)
            yield place, lengths, semi.flatten().to_numpy().astype(np.int32)

    def excluded(self, split: str = "train", among: Int32 | None = None) -> Csr:
        """Return the places that must not share a batch with each place.

        These are the semi-positives of its views, and the places that have it as a semi-positive. A tile that shows a
        query must not be its negative. While this is computed, memory holds 16 bytes for each semi-positive that counts
        and 9 for each place.

        Args:
            split: The split whose views count.
            among: Ids of the places that count; None for all. The lists of others are empty, and they are in no list.

        Returns:
            A list of place ids for each of the N places.
        """
        one, two = self._shown_together(split, among)
        indptr = np.zeros(self.n_places + 1, dtype=np.int64)
        # Room for both directions, of which the operating system gives only what is filled; joining takes twice.
        lists, stop = np.empty(2 * len(one), dtype=np.int32), 0
        for start in range(0, self.n_places, LISTED):
            places = np.arange(start, min(start + LISTED, self.n_places) + 1)
            first, last = np.searchsorted(one, places[[0, -1]])
            shown = two >= places[0]
            shown &= two < places[-1]
            # One number a pair of places is ten times faster than two.
            codes = np.concatenate([pairs_of(one[first:last], two[first:last]), pairs_of(two[shown], one[shown])])
            codes = distinct(codes)
            indptr[places[1:]] = stop + np.searchsorted(codes, places[1:] << 32)
            start, stop = stop, stop + len(codes)
            lists[start:stop] = codes.astype(np.uint32).view(np.int32)
        return Csr(indptr, lists[:stop])

    def _shown_together(self, split: str, among: Int32 | None) -> tuple[Int32, Int32]:
        """Return each view's place, once for each of its semi-positives, and these, which are other places.

        Args:
            split: The split whose views count.
            among: Ids of the places that count; None for all.
        """
        counts = np.full(self.n_places, among is None)
        if among is not None:
            counts[among] = True
        one, two = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int32)]
        for owner, other in self.semi_positive_places(split):
            apart = (owner != other) & counts[owner] & counts[other]
            one.append(owner[apart])
            two.append(other[apart])
        return np.concatenate(one), np.concatenate(two)

    def _parts(self, file: str, *columns: str) -> Iterator[tuple[int, pa.Table]]:
        """Read some columns a row group at a time, and yield each with the number of its first row."""
        start = 0
        for part in self.index.parts(file, columns):
            yield start, part
            start += len(part)


def pairs_of(place: Int32, other: Int32) -> Int64:
    """Return one number for each pair of places, in the order of (place, other)."""
    return place.astype(np.int64) << 32 | other


def coded(texts: pa.Array | pa.ChunkedArray, code: Callable[[str], int]) -> Int32:
    """Return a number for each text; ``code`` is asked once for each different one."""
    encoded = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    encoded = encoded.dictionary_encode()
    codes = np.array([code(text) for text in encoded.dictionary.to_pylist()], dtype=np.int32)
    numbers: Int32 = codes[encoded.indices.to_numpy()]
    return numbers


def view_numbers(members: pa.ChunkedArray) -> npt.NDArray[np.int16]:
    """Return for each member's name the number of its view, ``TILE`` for a tile and ``FACTS`` for anything else."""

    def number(name: str) -> int:
        stem = name.split(".", 1)[0]
        return int(stem.removeprefix("view-")) if stem.startswith("view-") else TILE if stem == "tile" else FACTS

    return coded(members, number).astype(np.int16)


def open_layout(store: Store, dataset: str | None = None, name: str | None = None) -> Layout:
    """Open a committed layout.

    Args:
        store: The root of the store.
        dataset: The data set's name; None takes the only one in the store.
        name: The layout's name, or a tag of it; None takes the current one (:mod:`geostream.layout.current`).

    Raises:
        LayoutNotCommitted: There is no such layout, or its ``layout.json`` is missing.
        BadInput: The name of the data set or layout is missing, and there is none or more than one.
        StoreError: ``layout.json`` is damaged.
    """
    dataset = the_dataset(store, dataset)
    if name is None:
        return _open_current(store, dataset)
    return _open(*find_layout(store, dataset, name))


def _open_current(store: Store, dataset: str) -> Layout:
    """Open the current layout; without a ``current.json`` the newest generation."""
    folder = store.child(dataset, "layouts")
    if (current := current_layout(store, dataset)) is not None:
        with suppress(LayoutNotCommitted):
            if (info := read_info(folder.child(current.layout)))["id"] == current.id:
                return _open(folder.child(current.layout), info)
        raise LayoutNotCommitted(
            f"{store.url}/{dataset}: the current layout {current.layout} is gone; choose another with: "
            f"geostream layouts use {store.url} NAME"
        )
    infos = layout_infos(store, dataset)
    names = newest(infos)
    if not names:
        raise LayoutNotCommitted(
            f"{store.url}/{dataset}: no committed layout; shard the dataset, or finish it by sharding again"
        )
    if len(names) > 1:
        raise BadInput(
            f"{store.url}/{dataset}: say which layout with --layout (there: {', '.join(names)}), or choose one for "
            f"good: geostream layouts use {store.url} NAME"
        )
    return _open(folder.child(names[0]), infos[names[0]])


def _open(folder: Store, info: dict[str, Any]) -> Layout:
    return Layout(folder, info, Index(folder, info))


@dataclass(frozen=True)
class NewLayout:
    """A layout that is to be committed: its index, and what ``layout.json`` says of it.

    Attributes:
        dataset: The data set's name.
        name: The layout's name.
        generation: 0 as sharded, one more with each reclustering or append.
        coordinates: The kind of the positions.
        places: The table of places, of schema ``PLACES``.
        members: The table of members, of schema ``MEMBERS``, sorted by shard and offset.
        shards: (name, bytes) of each shard, in order; the name of a borrowed one is "base/shard-00000.tar".
        source: What the layout was made from.
        images: How images are stored.
        broken: A description of each raw image that was left out.
        protocols: The data set's evaluation protocols, the default one first.
        parent: Id of the generation before.
        places_file: Content of that generation's ``places.parquet``, which is kept byte for byte. Another version of
            pyarrow could write the same table with another hash.
        sources_file: Content of ``sources.parquet``; None: the layout has none.
        tile_metres: Side of a tile on the ground in metres; None: it is not known, or differs.
        joined: The layouts of other data sets that it joins.
    """

    dataset: str
    name: str
    generation: int
    coordinates: Coordinates
    places: pa.Table
    members: pa.Table
    shards: list[tuple[str, int]]
    source: dict[str, Any]
    images: dict[str, Any]
    broken: list[str]
    protocols: Sequence[Protocol] = ("paired",)
    parent: str | None = None
    places_file: bytes | None = None
    sources_file: bytes | None = None
    tile_metres: float | None = None
    joined: Sequence[Joined] = ()


def commit_layout(folder: Store, new: NewLayout) -> Layout:
    """Write a layout's index, and then ``layout.json``, which commits it.

    Committing the same index again changes nothing.

    Args:
        folder: The layout's folder, which holds its shards.
        new: The layout.

    Returns:
        The layout, opened.

    Raises:
        AlreadyExists: Another layout is committed in the folder.
        BadInput: The index contradicts itself.
    """
    try:
        places, members = new.places.cast(PLACES), new.members.cast(MEMBERS)
        check_index(places, members, new.shards)
        data = {"places.parquet": new.places_file or table_bytes(places), "members.parquet": table_bytes(members)}
        if new.sources_file is not None:
            data[SOURCES] = new.sources_file
        info = {
            "format": JOINED_FORMAT if new.joined else FORMAT,
            "dataset": new.dataset,
            "layout": new.name,
            "id": content_id(places, members),
            "generation": new.generation,
            "parent": new.parent,
            "coordinates": new.coordinates,
            "protocols": list(new.protocols),
            **summary(places, members, new.shards),
            "images": new.images,
            **({} if new.tile_metres is None else {"tile_metres": new.tile_metres}),
            **({"joined": [_stored(one) for one in new.joined]} if new.joined else {}),
            "source": new.source,
            "broken": new.broken,
            "gallery": gallery_id(places, members, new.protocols),
            "index": {file: hashlib.sha256(table).hexdigest() for file, table in data.items()},
        }
        check_info(info)
    except (IndexDamage, pa.ArrowException, ValueError) as error:
        raise BadInput(f"{folder.url}: {error}; nothing was committed") from error
    if folder.exists("layout.json"):
        # The same commit may be made twice, after a kill between commit and clean-up.
        if read_info(folder)["id"] == info["id"]:
            return _open(folder, read_info(folder))
        raise AlreadyExists(f"{folder.url}: another layout is committed here; choose another name")
    for file, table in data.items():
        folder.write(file, table)
    folder.write_json("layout.json", info, if_absent=True)
    return Layout(folder, info, Index(folder, info, (places, members)))


def _stored(joined: Joined) -> dict[str, Any]:
    return {name: value for name, value in joined._asdict().items() if name != "first"}
