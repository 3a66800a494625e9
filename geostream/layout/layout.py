"""A layout: an immutable, committed set of tar shards with its index of places and members.

Decides what *committed* means: ``layout.json`` is there, written last and once, and the index holds what
:mod:`geostream.layout.schema` demands, looked at by the commit and again by every opening. A place's id is its row in
``places.parquet`` and is the same in every generation of a layout; only ``members.parquet`` (which shard, where in it)
differs between generations. So a neighbour graph outlives a reclustering, at the price of one indirection
(``shard_of_place``) whenever order on disk matters.
The whole index is held in memory: about 100 bytes a member.
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
    """A committed layout, opened: its index as arrays. ``store`` is the layout's own folder."""

    store: Store
    info: dict[str, Any]  # layout.json
    places: pa.Table
    members: pa.Table

    @property
    def dataset(self) -> str:
        return str(self.info["dataset"])

    @property
    def name(self) -> str:
        return str(self.info["layout"])

    @property
    def id(self) -> str:
        """Hash of the index, named by every artefact made from this layout."""
        return str(self.info["id"])

    @property
    def places_id(self) -> str:
        """Hash of the table of places: the same in every generation, so what names places by id outlives a layout."""
        return str(self.info["index"]["places.parquet"])

    @property
    def generation(self) -> int:
        return int(self.info["generation"])

    @property
    def coordinates(self) -> Coordinates:
        kind: Coordinates = self.info["coordinates"]
        return kind

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The rules that the dataset's results are told by, the first one first (:data:`Protocol`)."""
        return tuple(self.info.get("protocols", ["paired"]))

    @property
    def n_places(self) -> int:
        return int(self.places.num_rows)

    @property
    def shard_names(self) -> list[str]:
        return [shard["name"] for shard in self.info["shards"]]

    @cached_property
    def shard_sizes(self) -> Int64:
        """(S,) bytes of each shard object."""
        return np.array([shard["size"] for shard in self.info["shards"]], dtype=np.int64)

    @cached_property
    def keys(self) -> list[str]:
        keys: list[str] = self.places["key"].to_pylist()
        return keys

    @cached_property
    def position(self) -> npt.NDArray[np.float64]:
        """(N, 2) north and east of each place's tile, in the unit that ``coordinates`` names."""
        return np.stack([self.places["north"].to_numpy(), self.places["east"].to_numpy()], axis=1)

    @cached_property
    def area(self) -> Int32:
        """(N,) number of the area of each place (areas sorted by name)."""
        names = self.places["area"].to_numpy(zero_copy_only=False)
        numbers: Int32 = np.unique(names, return_inverse=True)[1].astype(np.int32)
        return numbers

    @cached_property
    def shard_of_place(self) -> Int32:
        """(N,) the one shard that holds all members of each place."""
        shard = np.empty(self.n_places, dtype=np.int32)
        shard[self.members["place"].to_numpy()] = self.members["shard"].to_numpy()
        return shard

    @cached_property
    def _views(self) -> tuple[Int32, npt.NDArray[np.int16], npt.NDArray[np.str_], pa.StructArray]:
        """All views, flat: place, number within the place, split, and the struct itself."""
        lists = self.places["views"].combine_chunks()
        place = pc.list_parent_indices(lists).to_numpy().astype(np.int32)
        flat = lists.flatten()
        starts = np.searchsorted(place, place, side="left")
        number = (np.arange(len(place)) - starts).astype(np.int16)
        split = flat.field("split").to_numpy(zero_copy_only=False).astype(np.str_)
        return place, number, split, flat

    def pairs(self, split: str) -> Pairs:
        """The pairs of ``split`` ("train", "test", "gallery"), sorted by place and view."""
        place, number, splits, _ = self._views
        of_split = splits == split
        return Pairs(place[of_split], number[of_split])

    def references(self, split: str) -> Int32:
        """(R,) place ids of the gallery of ``split``, distractors included, sorted."""
        lists = self.places["splits"].combine_chunks()
        place = pc.list_parent_indices(lists).to_numpy()
        inside: Int32 = place[lists.flatten().to_numpy(zero_copy_only=False) == split].astype(np.int32)
        return inside

    def semi_positives(self, split: str) -> Csr:
        """Per pair of ``split`` (rows as in :meth:`pairs`): the places whose tile shows the query, too."""
        _, _, splits, flat = self._views
        lists = flat.field("semi_positives").filter(pa.array(splits == split))
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Csr(indptr, lists.flatten().to_numpy().astype(np.int32))

    def excluded(self, split: str = "train") -> Csr:
        """Per place (N rows): the places that may not share a batch with it.

        The semi-positives of the place's views of ``split``, and the places whose views name this one: a tile
        that shows the query is no negative, whichever of the two brought it into the batch.
        """
        pairs, semi = self.pairs(split), self.semi_positives(split)
        one, two = np.repeat(pairs.place, np.diff(semi.indptr)).astype(np.int64), semi.indices.astype(np.int64)
        one, two = one[one != two], two[one != two]
        both = np.unique(np.concatenate([one << 32 | two, two << 32 | one]))  # as single numbers: a tenth of the time
        counts = np.bincount(both >> 32, minlength=self.n_places)
        return Csr(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), (both & 0xFFFFFFFF).astype(np.int32))

    @cached_property
    def _member_rows(self) -> tuple[Int32, npt.NDArray[np.int16], Int64]:
        """Image members sorted by (place, view; the tile counts as view -1): place, view, row in ``members``."""
        stems = pc.list_element(pc.split_pattern(self.members["member"], ".", max_splits=1), 0)
        number = pc.if_else(pc.starts_with(stems, "view-"), pc.utf8_slice_codeunits(stems, 5), None).cast(pa.int16())
        view = pc.if_else(pc.equal(stems, "tile"), -1, pc.fill_null(number, -2)).to_numpy().astype(np.int16)
        rows = np.flatnonzero(view >= -1)
        place = self.members["place"].to_numpy()[rows]
        order = np.lexsort((view[rows], place))
        return place[order].astype(np.int32), view[rows][order], rows[order]

    def member_rows(self, place: Int32, view: npt.NDArray[np.int16] | None = None) -> Int64:
        """Rows in ``members`` of the views (place, view), or of the tiles where ``view`` is None."""
        places, views, rows = self._member_rows
        wanted = np.asarray(place, dtype=np.int64) * 2**16 + (0 if view is None else np.asarray(view, np.int64) + 1)
        have = places.astype(np.int64) * 2**16 + views + 1
        at = np.minimum(np.searchsorted(have, wanted), len(have) - 1)
        if (missing := have[at] != wanted).any():
            key = self.keys[int(np.asarray(place)[missing][0])]
            raise BadInput(f"layout {self.name}: place {key} lacks an image that was asked for; plan and layout differ")
        return rows[at]


def list_datasets(store: Store) -> list[str]:
    """Datasets in the store that have at least one committed layout."""
    return [name for name in store.folders() if NAME.fullmatch(name) and list_layouts(store, name)]


def list_layouts(store: Store, dataset: str) -> list[str]:
    """Names of the committed layouts of a dataset, oldest generation first."""
    infos = layout_infos(store, dataset)
    return sorted(infos, key=lambda name: (infos[name]["generation"], name))


def layout_infos(store: Store, dataset: str) -> dict[str, dict[str, Any]]:
    """layout.json of each committed layout of the dataset, by name."""
    folder = store.child(check_name("dataset", dataset), "layouts")
    infos = {}
    for name in filter(NAME.fullmatch, folder.folders()):  # others are no layouts of ours
        try:
            infos[name] = read_info(folder.child(name))
        except LayoutNotCommitted:
            continue  # not committed: it does not exist for a reader
    return infos


def open_layout(store: Store, dataset: str | None = None, name: str | None = None) -> Layout:
    """Open a committed layout: of the only dataset when ``dataset`` is None, its newest generation when ``name`` is.

    Raises LayoutNotCommitted where ``layout.json`` is absent, BadInput where the choice is ambiguous.
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


def commit_layout(
    folder: Store,
    *,
    dataset: str,
    name: str,
    generation: int,
    coordinates: Coordinates,
    places: pa.Table,
    members: pa.Table,
    shards: list[tuple[str, int]],
    source: dict[str, Any],
    images: dict[str, Any],
    broken: list[str],
    protocols: Sequence[Protocol] = ("paired",),
    parent: str | None = None,
    places_file: bytes | None = None,
) -> Layout:
    """Write the index and then, as the commit, ``layout.json``; return the layout opened.

    ``shards``: (name, bytes) in order of their number. ``source``: what it was made from. ``images``: how they are
    stored. ``broken``: raw images left out, in words. ``protocols``: the rules that results are told by. ``parent``: id
    of the generation before, whose ``places.parquet`` is ``places_file``: kept byte for byte, because another pyarrow
    would write the same table with another hash.
    Raises AlreadyExists where another layout was committed here, BadInput where the index contradicts itself.
    """
    try:
        places, members = places.cast(PLACES), members.cast(MEMBERS)
        check_index(places, members, shards)
        data = {"places.parquet": places_file or table_bytes(places), "members.parquet": table_bytes(members)}
        info = {
            "format": FORMAT,
            "dataset": dataset,
            "layout": name,
            "id": content_id(places, members),
            "generation": generation,
            "parent": parent,
            "coordinates": coordinates,
            "protocols": list(protocols),
            **summary(places, members, shards),
            "images": images,
            "source": source,
            "broken": broken,
            "index": {file: hashlib.sha256(table).hexdigest() for file, table in data.items()},
        }
        check_info(info)
    except (IndexDamage, pa.ArrowException, ValueError) as error:
        raise BadInput(f"{folder.url}: {error}; nothing was committed") from error
    if folder.exists("layout.json"):
        # The same commit made twice (a kill between commit and clean-up) is no conflict.
        if read_info(folder)["id"] == info["id"]:
            return _open(folder)
        raise AlreadyExists(f"{folder.url}: another layout is committed here; choose another name")
    for file, table in data.items():
        folder.write(file, table)
    folder.write_json("layout.json", info, if_absent=True)
    return Layout(folder, info, places, members)
