"""Join layouts of several data sets to one, so that a run trains on all of them.

The joined layout belongs to a data set of its own. Its shards are those of the others, where they lie: only an index is
written, about as large as theirs. A place keeps its images, its splits and its position. Its id is counted on behind
the places of the data sets before; its key and its area get the name of its data set in front of them. So the places of
two data sets are never neighbours on the ground, whatever their coordinates are: geographic neighbours are searched
within an area.

The shards of the data sets are named in turn, so that any stretch of their order, such as a lane, has its share of the
training pairs of each.

A layout that is joined stays as long as the joined one does. It is also what a model is evaluated on: each test split
alone, by the protocols of its own data set (:mod:`geostream.runs.galleries`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geostream.arrays import Int32, Int64
from geostream.errors import AlreadyExists, BadInput, NotFound
from geostream.layout.current import advance, current_layout
from geostream.layout.files import GOING, JOB, layouts_folder, shard_paths
from geostream.layout.layout import Layout, NewLayout, commit_layout, open_layout
from geostream.layout.lineage import Joined, ancestors, joined_in
from geostream.layout.listing import layout_infos
from geostream.layout.schema import VIEW, Coordinates
from geostream.settings import default_settings, recipe_names
from geostream.store import Store, check_name

LONGEST_KEY = 84  # so that "<key>.view-00000.jpg" fits the 100 bytes of a plain tar header
ADAPTER = "joined"
FIRST_NAME = "base"
EITHER = {"photos", "simcity-photos"}  # recipes of data sets whose views may be panoramas as well as pictures


def join_layouts(store: Store, dataset: str, layouts: Sequence[Layout]) -> tuple[Layout, bool]:
    """Commit a layout that joins those of other data sets, or find that it was committed before.

    It is named "base", or "base-2" and so on where that name belongs to another layout. It becomes the current one of
    its data set where there was none, or one that joins other layouts of the same data sets. One that was there already
    does not become current again. A call that was killed is finished by the next one. Memory holds the indexes of all
    layouts.

    Args:
        store: The store that holds all data sets.
        dataset: Name of the joined data set.
        layouts: The layouts to join, at least two, of different data sets.

    Returns:
        The joined layout, and whether it was there already.

    Raises:
        BadInput: The layouts cannot be joined, or ``dataset`` names a data set of another kind.
        StoreError: The store cannot be read or written.
    """
    _check(dataset, layouts)
    infos = layout_infos(store, dataset)
    if other := next((name for name, info in infos.items() if not joined_in(info)), None):
        raise BadInput(f"{store.url}/{dataset}: has the layout {other}, which joins no others; choose another name")
    joined = _joined(layouts)
    for name, info in infos.items():
        if joined_in(info) == joined and info["parent"] is None:
            made = open_layout(store, dataset, name)
            _finish(store, made)
            return made, True
    folder = _claim(store, dataset, joined, set(infos))
    shards, members = _members(layouts, joined)
    tables = [_places(layout, one) for layout, one in zip(layouts, joined, strict=True)]
    made = commit_layout(
        folder,
        NewLayout(
            dataset=dataset,
            name=folder.url.rpartition("/")[2],
            generation=0,
            coordinates=_common_coordinates(layouts),
            protocols=list(dict.fromkeys(protocol for layout in layouts for protocol in layout.protocols)),
            places=pa.concat_tables(tables).combine_chunks(),
            members=members,
            shards=shards,
            source={"adapter": ADAPTER, "options": {}} | _origin(layouts),
            images={layout.dataset: layout.info["images"] for layout in layouts},
            broken=[f"{layout.dataset}: {text}" for layout in layouts for text in layout.info["broken"]],
            tile_metres=layouts[0].tile_metres if len({layout.tile_metres for layout in layouts}) == 1 else None,
            joined=joined,
        ),
    )
    _finish(store, made)
    return made, False


def _check(dataset: str, layouts: Sequence[Layout]) -> None:
    """Raise BadInput where the layouts cannot be joined to a data set of this name."""
    check_name("dataset", dataset)
    names = [layout.dataset for layout in layouts]
    if len(names) < 2:
        raise BadInput(f"{dataset}: name at least two data sets to join")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"{dataset}: {repeated} is named twice; name each data set once")
    if dataset in names:
        raise BadInput(f"{dataset}: is one of those to join; choose another name for the joined data set")
    if dataset in recipe_names():
        raise BadInput(f"{dataset}: is the name of a recipe, which is not for joined data; choose another name")
    for layout in layouts:
        if layout.joined:
            parts = " ".join(one.dataset for one in layout.joined)
            raise BadInput(f"{layout.dataset}: joins others itself; name these instead: {parts}")
    kinds = {layout.dataset: _view_kind(layout) for layout in layouts}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise BadInput(f"{dataset}: views of two kinds cannot be trained together ({told}); join those of one kind")


def _view_kind(layout: Layout) -> str:
    """Return "panorama" or "picture", as the recipes say; a data set without a recipe is taken to have panoramas."""
    kinds = {default_settings(name).augment.view_kind for name in _recipes(layout)}
    return "picture" if "picture" in kinds else "panorama"


def known_view_kind(layout: Layout) -> str | None:
    """Return "panorama" or "picture", as the recipe of the data set, or of the adapter that read it, says.

    Args:
        layout: A layout that joins no others.

    Returns:
        The kind of its views; None where there is no such recipe, or one of data sets that may have either.
    """
    return _view_kind(layout) if any(name not in EITHER for name in _recipes(layout)) else None


def _recipes(layout: Layout) -> list[str]:
    """Return which of the data set's name and its adapter's are names of recipes."""
    source = layout.info["source"]
    adapter = str(source.get("first", source).get("adapter"))
    return [name for name in (layout.dataset, adapter) if name in recipe_names()]


def _joined(layouts: Sequence[Layout]) -> tuple[Joined, ...]:
    """Describe the parts of the joined layout. A name that makes keys too long is replaced by a number in them."""
    found, first = list[Joined](), 0
    for number, layout in enumerate(layouts):
        longest = pc.max(pc.utf8_length(layout.places["key"])).as_py()
        fits = len(layout.dataset) + 1 + longest <= LONGEST_KEY
        prefix = f"{layout.dataset}_" if fits else f"{number}_"
        where = layout.dataset, layout.name, layout.id, prefix
        found.append(Joined(*where, first, layout.n_places, layout.coordinates))
        first += layout.n_places
    return tuple(found)


def _common_coordinates(layouts: Sequence[Layout]) -> Coordinates:
    """Return the kind of coordinates that all layouts have; "none" where they differ."""
    kinds = {layout.coordinates for layout in layouts}
    return kinds.pop() if len(kinds) == 1 else "none"


def _origin(layouts: Sequence[Layout]) -> dict[str, str]:
    """Return the names, licences and attributions of all tiles, as :attr:`Layout.source` has them."""
    facts = [layout.source or {} for layout in layouts]
    said = {name: [one[name] for one in facts if one.get(name)] for name in ("name", "licence", "attribution", "url")}
    return {name: "; ".join(dict.fromkeys(texts)) for name, texts in said.items() if texts}


def _places(layout: Layout, joined: Joined) -> pa.Table:
    """Return a layout's table of places as a part of the joined one."""
    table = layout.places

    def behind(prefix: str, column: str) -> pa.ChunkedArray:
        return pc.binary_join_element_wise(pa.scalar(prefix), table[column].cast(pa.string()), "")

    views = table["views"].combine_chunks()
    fields = {field.name: views.flatten().field(field.name) for field in VIEW}
    semi = fields["semi_positives"]
    shifted = pc.add(semi.flatten(), pa.scalar(joined.first, pa.int32()))
    fields["semi_positives"] = pa.ListArray.from_arrays(_offsets(semi), shifted)
    flat = pa.StructArray.from_arrays(list(fields.values()), fields=list(VIEW))
    columns = {
        "key": behind(joined.prefix, "key"),
        "area": behind(f"{joined.dataset}/", "area"),
        "views": pa.ListArray.from_arrays(_offsets(views), flat),
    }
    return pa.table({name: columns.get(name, table[name]) for name in table.column_names})


def _offsets(lists: pa.ListArray) -> pa.Array:
    lengths = pc.list_value_length(lists).to_numpy()
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _members(layouts: Sequence[Layout], joined: Sequence[Joined]) -> tuple[list[tuple[str, int]], pa.Table]:
    """Return the path and bytes of each shard in their new order, and the table of members."""
    pairs = [
        np.bincount(layout.shard_of_place[layout.pairs("train").place], minlength=len(layout.shard_names))
        for layout in layouts
    ]
    order, shards, tables = in_turn(pairs), list[tuple[str, int]](), list[pa.Table]()
    new = np.split(np.argsort(order), np.cumsum([len(some) for some in pairs])[:-1])
    for layout, one, at in zip(layouts, joined, new, strict=True):
        own = [{"layout": layout.name, **shard, "dataset": layout.dataset} for shard in layout.info["shards"]]
        shards += zip(shard_paths(own), layout.shard_sizes.tolist(), strict=True)
        table = layout.members
        columns = {name: table[name] for name in table.column_names} | {
            "place": pa.array(table["place"].to_numpy() + np.int32(one.first)),
            "member": table["member"].cast(pa.string()),
            "shard": pa.array(at.astype(np.int32)[table["shard"].to_numpy()]),
        }
        tables.append(pa.table(columns))
    members = pa.concat_tables(tables).combine_chunks()
    rows: Int64 = np.argsort(members["shard"].to_numpy(), kind="stable")
    return [shards[number] for number in order.tolist()], members.take(rows)


def in_turn(weights: Sequence[Int64]) -> Int32:
    """Order the items of several groups so that each stretch of the order has its share of every group.

    Args:
        weights: The weights of each group's items, which are numbered on from group to group.

    Returns:
        The numbers of all items; those of a group keep their order.
    """
    progress = np.concatenate([(np.cumsum(some) - some / 2) / max(some.sum(), 1) for some in weights])
    return np.argsort(progress, kind="stable").astype(np.int32)


def _claim(store: Store, dataset: str, joined: Sequence[Joined], taken: set[str]) -> Store:
    """Return the folder of the new layout: where the same was begun, or the first free one."""
    layouts, told = layouts_folder(store, dataset), [[one.dataset, one.layout, one.id] for one in joined]
    claim: dict[str, Any] = {"fingerprint": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16], "joins": told}
    number = 0
    while True:
        number += 1
        name = FIRST_NAME if number == 1 else f"{FIRST_NAME}-{number}"
        if name in taken:
            continue
        folder = layouts.child(name)
        with suppress(NotFound):  # then it is somebody else's
            if not folder.list():
                with suppress(AlreadyExists):  # claimed just now, perhaps by the same command
                    folder.write_json(JOB, claim, if_absent=True)
            if folder.read_json(JOB) == claim:
                folder.write_json(JOB, claim)  # a sign of life; whoever removes the folder looks for it after the mark
                if not folder.exists(GOING):
                    return folder


def _finish(store: Store, made: Layout) -> None:
    """Make the joined layout the current one, where that is due, and remove the mark of its making.

    Without the mark this was done before. Since then a person, or a later join, may have made another one current.
    """
    current, infos, replaced = current_layout(store, made.dataset), layout_infos(store, made.dataset), None
    if current is not None and not made.store.exists(JOB):
        return
    if current is not None and (info := infos.get(current.layout)) is not None:
        same = {one.dataset for one in joined_in(info)} == {one.dataset for one in made.joined}
        replaced = current.id if same and made.id not in ancestors(info) else None
    advance(store, made.dataset, made, replaced)
    made.store.delete_all([JOB])
