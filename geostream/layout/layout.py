"""Commit, list and open layouts: immutable sets of tar shards, each with an index of places and members.

A layout is committed when ``layout.json`` exists; that file is written last, and only once. The index is checked
against :mod:`geostream.layout.schema` by the commit and whenever the layout is opened. It is held in memory: about 100
bytes a member.

The id of a place is its row in ``places.parquet`` and the same in every generation of a layout. Generations differ only
in ``members.parquet``, which says in which shard, and where in it, each member lies. So a neighbour graph stays valid
after a reclustering. Code that needs the order on disk uses ``shard_of_place``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geostream.arrays import Csr, Int32, Int64, Pairs
from geostream.errors import AlreadyExists, BadInput, LayoutNotCommitted
from geostream.layout.files import FORMAT, check_info, read_info, read_tables, summary
from geostream.layout.schema import MEMBERS, PLACES, Coordinates, IndexDamage, Protocol, check_index, content_id
from geostream.store import NAME, Store, check_name, table_bytes


@dataclass(frozen=True)
class Layout:
    """A committed layout, opened: its index as tables and arrays.

    The ids of its N places are 0 to N-1. The rows of ``members`` are its M members, sorted by shard and offset.

    Attributes:
        store: The layout's folder.
        info: ``layout.json``.
        places: ``places.parquet``.
        members: ``members.parquet``.
    """

    store: Store
    info: dict[str, Any]
    places: pa.Table
    members: pa.Table

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
        """Hash of ``places.parquet``: equal in all generations, so place ids of one are valid in the others."""
        return str(self.info["index"]["places.parquet"])

    @property
    def generation(self) -> int:
        """Number of reclusterings that led to this layout; 0 for a layout as it was sharded."""
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
        return int(self.places.num_rows)

    @property
    def shard_names(self) -> list[str]:
        """Names of the S shards, in order of their number."""
        return [shard["name"] for shard in self.info["shards"]]

    @cached_property
    def shard_sizes(self) -> Int64:
        """(S,) bytes of each shard."""
        return np.array([shard["size"] for shard in self.info["shards"]], dtype=np.int64)

    @cached_property
    def keys(self) -> list[str]:
        """Key of each of the N places."""
        keys: list[str] = self.places["key"].to_pylist()
        return keys

    @cached_property
    def position(self) -> npt.NDArray[np.float64]:
        """(N, 2) north and east of each place's tile, in degrees or metres (``coordinates``); NaN where unknown."""
        return np.stack([self.places["north"].to_numpy(), self.places["east"].to_numpy()], axis=1)

    @cached_property
    def area(self) -> Int32:
        """(N,) number of each place's area; areas are numbered in the order of their names."""
        names = self.places["area"].to_numpy(zero_copy_only=False)
        numbers: Int32 = np.unique(names, return_inverse=True)[1].astype(np.int32)
        return numbers

    @cached_property
    def shard_of_place(self) -> Int32:
        """(N,) number of the shard that holds all members of each place."""
        shard = np.empty(self.n_places, dtype=np.int32)
        shard[self.members["place"].to_numpy()] = self.members["shard"].to_numpy()
        return shard

    @cached_property
    def _views(self) -> tuple[Int32, npt.NDArray[np.int16], npt.NDArray[np.str_], pa.StructArray]:
        """All V views in order of places: (V,) place, (V,) number within it, (V,) split, and the struct array."""
        lists = self.places["views"].combine_chunks()
        place = pc.list_parent_indices(lists).to_numpy().astype(np.int32)
        flat = lists.flatten()
        starts = np.searchsorted(place, place, side="left")
        number = (np.arange(len(place)) - starts).astype(np.int16)
        split = flat.field("split").to_numpy(zero_copy_only=False).astype(np.str_)
        return place, number, split, flat

    def pairs(self, split: str) -> Pairs:
        """Return the pairs of a split, sorted by place and view.

        Args:
            split: "train", "test", or "gallery" for views that are no queries.
        """
        place, number, splits, _ = self._views
        of_split = splits == split
        return Pairs(place[of_split], number[of_split])

    def references(self, split: str) -> Int32:
        """Return the places whose tiles are in the gallery of a split, distractors included.

        Args:
            split: "train" or "test".

        Returns:
            (R,) place ids, sorted.
        """
        lists = self.places["splits"].combine_chunks()
        place = pc.list_parent_indices(lists).to_numpy()
        inside: Int32 = place[lists.flatten().to_numpy(zero_copy_only=False) == split].astype(np.int32)
        return inside

    def semi_positives(self, split: str) -> Csr:
        """Return the semi-positives of each pair of a split: other places whose tile also shows the query.

        Args:
            split: "train", "test" or "gallery".

        Returns:
            A list of place ids for each row of :meth:`pairs`.
        """
        _, _, splits, flat = self._views
        lists = flat.field("semi_positives").filter(pa.array(splits == split))
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Csr(indptr, lists.flatten().to_numpy().astype(np.int32))

    def excluded(self, split: str = "train") -> Csr:
        """Return the places that must not share a batch with each place.

        These are the semi-positives of its views, and the places that have it as a semi-positive. A tile that shows a
        query must not be its negative.

        Args:
            split: The split whose views count.

        Returns:
            A list of place ids for each of the N places.
        """
        pairs, semi = self.pairs(split), self.semi_positives(split)
        one, two = np.repeat(pairs.place, np.diff(semi.indptr)).astype(np.int64), semi.indices.astype(np.int64)
        one, two = one[one != two], two[one != two]
        both = np.unique(np.concatenate([one << 32 | two, two << 32 | one]))  # one number a pair is ten times faster
        counts = np.bincount(both >> 32, minlength=self.n_places)
        return Csr(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), (both & 0xFFFFFFFF).astype(np.int32))

    @cached_property
    def _member_rows(self) -> tuple[Int32, npt.NDArray[np.int16], Int64]:
        """Place, view (-1: the tile) and row in ``members`` of each image member, sorted by place and view."""
        stems = pc.list_element(pc.split_pattern(self.members["member"], ".", max_splits=1), 0)
        number = pc.if_else(pc.starts_with(stems, "view-"), pc.utf8_slice_codeunits(stems, 5), None).cast(pa.int16())
        view = pc.if_else(pc.equal(stems, "tile"), -1, pc.fill_null(number, -2)).to_numpy().astype(np.int16)
        rows = np.flatnonzero(view >= -1)
        place = self.members["place"].to_numpy()[rows]
        order = np.lexsort((view[rows], place))
        return place[order].astype(np.int32), view[rows][order], rows[order]

    def member_rows(self, place: Int32, view: npt.NDArray[np.int16] | None = None) -> Int64:
        """Return the rows of some views or tiles in ``members``.

        Args:
            place: (n,) place ids.
            view: (n,) number of each view within its place; None asks for the places' tiles.

        Returns:
            (n,) rows.

        Raises:
            BadInput: A place has no such image.
        """
        places, views, rows = self._member_rows
        wanted = np.asarray(place, dtype=np.int64) * 2**16 + (0 if view is None else np.asarray(view, np.int64) + 1)
        have = places.astype(np.int64) * 2**16 + views + 1
        at = np.minimum(np.searchsorted(have, wanted), len(have) - 1)
        if (missing := have[at] != wanted).any():
            key = self.keys[int(np.asarray(place)[missing][0])]
            raise BadInput(f"layout {self.name}: place {key} lacks an image that was asked for; plan and layout differ")
        return rows[at]


def list_datasets(store: Store) -> list[str]:
    """Return the names of the data sets in the store that have at least one committed layout."""
    return [name for name in store.folders() if NAME.fullmatch(name) and list_layouts(store, name)]


def list_layouts(store: Store, dataset: str) -> list[str]:
    """Return the names of a data set's committed layouts, oldest generation first.

    Args:
        store: The root of the store.
        dataset: The data set's name.

    Raises:
        StoreError: A ``layout.json`` is damaged.
    """
    infos = layout_infos(store, dataset)
    return sorted(infos, key=lambda name: (infos[name]["generation"], name))


def layout_infos(store: Store, dataset: str) -> dict[str, dict[str, Any]]:
    """Read ``layout.json`` of each committed layout of a data set.

    Args:
        store: The root of the store.
        dataset: The data set's name.

    Returns:
        Its content by the layout's name.

    Raises:
        StoreError: A ``layout.json`` is damaged.
    """
    folder = store.child(check_name("dataset", dataset), "layouts")
    infos = {}
    for name in filter(NAME.fullmatch, folder.folders()):  # folders with other names are no layouts
        try:
            infos[name] = read_info(folder.child(name))
        except LayoutNotCommitted:
            continue  # for a reader it does not exist
    return infos


def open_layout(store: Store, dataset: str | None = None, name: str | None = None) -> Layout:
    """Open a committed layout.

    Args:
        store: The root of the store.
        dataset: The data set's name; None takes the only one in the store.
        name: The layout's name; None takes the newest generation.

    Raises:
        LayoutNotCommitted: There is no such layout, or its ``layout.json`` is missing.
        BadInput: The name of the data set or layout is missing, and there is none or more than one.
        StoreError: The index is damaged.
    """
    if dataset is None:
        found = list_datasets(store)
        if len(found) != 1:
            have = ", ".join(found) or "none; shard one first: geostream shard vigor RAW STORE"
            raise BadInput(f"{store.url}: say which dataset with --dataset (there: {have})")
        dataset = found[0]
    if name is None:
        infos = layout_infos(store, dataset)
        last: dict[str, int] = {}  # generation of each table of places
        for info in infos.values():
            places = info["index"]["places.parquet"]
            last[places] = max(last.get(places, 0), info["generation"])
        newest = sorted(n for n, info in infos.items() if info["generation"] == last[info["index"]["places.parquet"]])
        if not newest:
            raise LayoutNotCommitted(
                f"{store.url}/{dataset}: no committed layout; shard the dataset, or finish it by sharding again"
            )
        if len(newest) > 1:
            raise BadInput(f"{store.url}/{dataset}: say which layout with --layout (there: {', '.join(newest)})")
        name = newest[0]
    return _open(store.child(check_name("dataset", dataset), "layouts", check_name("layout", name)))


def _open(folder: Store) -> Layout:
    info = read_info(folder)
    return Layout(folder, info, *read_tables(folder, info))


@dataclass(frozen=True)
class NewLayout:
    """A layout that is to be committed: its index, and what ``layout.json`` says of it.

    Attributes:
        dataset: The data set's name.
        name: The layout's name.
        generation: 0 as sharded, one more with each reclustering.
        coordinates: The kind of the positions.
        places: The table of places, of schema ``PLACES``.
        members: The table of members, of schema ``MEMBERS``, sorted by shard and offset.
        shards: (name, bytes) of each shard, in order.
        source: What the layout was made from.
        images: How images are stored.
        broken: A description of each raw image that was left out.
        protocols: The data set's evaluation protocols, the default one first.
        parent: Id of the generation before.
        places_file: Content of that generation's ``places.parquet``, which is kept byte for byte. Another version of
            pyarrow could write the same table with another hash.
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
        info = {
            "format": FORMAT,
            "dataset": new.dataset,
            "layout": new.name,
            "id": content_id(places, members),
            "generation": new.generation,
            "parent": new.parent,
            "coordinates": new.coordinates,
            "protocols": list(new.protocols),
            **summary(places, members, new.shards),
            "images": new.images,
            "source": new.source,
            "broken": new.broken,
            "index": {file: hashlib.sha256(table).hexdigest() for file, table in data.items()},
        }
        check_info(info)
    except (IndexDamage, pa.ArrowException, ValueError) as error:
        raise BadInput(f"{folder.url}: {error}; nothing was committed") from error
    if folder.exists("layout.json"):
        # The same commit may be made twice, after a kill between commit and clean-up.
        if read_info(folder)["id"] == info["id"]:
            return _open(folder)
        raise AlreadyExists(f"{folder.url}: another layout is committed here; choose another name")
    for file, table in data.items():
        folder.write(file, table)
    folder.write_json("layout.json", info, if_absent=True)
    return Layout(folder, info, places, members)
