"""Read and check the files of a layout's index: ``layout.json`` and the tables that it names by hash.

The files may have been changed since the commit, so everything is checked before it is used: the fields of
``layout.json``, the hash, schema and invariants of each table (:mod:`geostream.layout.schema`), and that they agree. An
error is one line that names the file.

A layout that was made by an append names shards of earlier layouts where they lie: such a *borrowed* shard has the
field ``layout``, the folder that holds it. The path of a shard below the data set's ``layouts`` folder is
``base/shard-00000.tar``. A layout that joins those of other data sets (:mod:`geostream.layout.join`) borrows all its
shards. They have the field ``dataset``, too, and their paths begin at the store:
``vigor/layouts/base/shard-00000.tar``.

The names of a layout's objects are defined here, too. Before a layout is written, ``parts/job.json`` records how many
shards it will have. The names of all its objects follow from that number, and only these objects are ever removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from geostream.errors import LayoutNotCommitted, NotFound, StoreError
from geostream.layout.schema import Coordinates, IndexDamage, Protocol, check_index, check_schema
from geostream.store import NAME, Store, check_name, table_of

FORMAT = 2  # 1 had no borrowed shards, no gallery and no sources
JOINED_FORMAT = (
    3  # of layouts that join others, so that a geostream which looks for their shards elsewhere refuses them
)
SHARD = "^shard-[0-9]{5,}[.]tar$"
SOURCES = "sources.parquet"  # what each stored image was made from; no part of the index, and not in older layouts
TABLES = ("places.parquet", "members.parquet", SOURCES)
JOB = "parts/job.json"  # who writes the folder, and how many shards it will hold; removed after the commit
GOING = "going.json"  # marks a folder that is being removed: it is not continued, and its name is not used
ADVICE = "restore the layout's folder from a copy, or delete it and shard the dataset again"


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(pattern=SHARD)]
    size: Count
    members: Count  # that the index names; a borrowed shard may hold others
    layout: Name | None = None  # whose folder holds the shard; None: its own
    dataset: Name | None = None  # of that layout; None: the same data set


class _Joined(BaseModel):
    model_config = ConfigDict(strict=True)

    dataset: Name
    layout: Name
    id: str
    prefix: str  # put before the keys of its places
    places: Count
    coordinates: Coordinates


class _Info(BaseModel):
    """Define the fields of ``layout.json``."""

    model_config = ConfigDict(strict=True)

    format: int
    dataset: Name
    layout: Name
    id: str
    generation: Count
    parent: str | None
    coordinates: Coordinates
    protocols: Annotated[list[Protocol], Field(min_length=1)] = ["paired"]  # layouts from before it was written
    places: Count
    pairs: dict[str, Count]
    bytes: Count
    shards: Annotated[list[_Shard], Field(min_length=1)]
    images: dict[str, Any]
    tile_metres: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # None: unknown, or they differ
    source: dict[str, Any]
    broken: list[str]
    gallery: str | None = None
    joined: list[_Joined] = []  # the layouts that this one joins, in the order of their places
    index: dict[Literal["places.parquet", "members.parquet", "sources.parquet"], str]


def layouts_folder(store: Store, dataset: str) -> Store:
    """Return the folder of the data set's layouts; raise BadInput for a name that cannot be a folder."""
    return store.child(check_name("dataset", dataset), "layouts")


def shard_name(number: int) -> str:
    """Return the name of a layout's shard: ``shard-00000.tar``."""
    return f"shard-{number:05d}.tar"


def sidecar_name(shard: str) -> str:
    """Return the name of the object that marks a shard as complete; it exists only until the layout is committed."""
    return f"parts/{shard.removesuffix('.tar')}.json"


def shard_names(shards: int) -> list[str]:
    """Return the names of a layout's shards.

    Args:
        shards: How many shards it has.
    """
    return [shard_name(number) for number in range(shards)]


def object_names(shards: Sequence[str]) -> list[str]:
    """Return the names of all objects, except ``parts/job.json``, that are made while a layout is written.

    Args:
        shards: Names of the layout's shards.
    """
    return ["layout.json", *TABLES, *shards, *map(sidecar_name, shards)]


def check_info(info: Any) -> None:
    """Check the fields of ``layout.json``.

    Args:
        info: The content of the file.

    Raises:
        IndexDamage: The format is another, or a field is missing or has a wrong value.
    """
    if isinstance(info, dict) and info.get("format", FORMAT) not in range(1, JOINED_FORMAT + 1):
        reads = f"this geostream reads formats 1 to {JOINED_FORMAT}"
        raise IndexDamage(f"layout.json: format {info['format']}, but {reads}")
    try:
        _Info.model_validate(info)
    except ValidationError as error:
        first = error.errors()[0]
        where = ascii(".".join(map(str, first["loc"])))[1:-1]  # one line, whatever characters the names have
        raise IndexDamage(f"layout.json: {where or 'all'}: {first['msg']}") from error
    if lacking := {"places.parquet", "members.parquet"} - set(info["index"]):
        raise IndexDamage(f"layout.json: index: {', '.join(sorted(lacking))} is missing")
    if (joined := info.get("joined")) and sum(one["places"] for one in joined) != info["places"]:
        raise IndexDamage("layout.json: joined: its places are not as many as those of the layouts that it joins")
    names = shard_paths(info["shards"])
    if len(set(names)) < len(names):
        raise IndexDamage("layout.json: two shards have the same name")


def shard_paths(shards: Sequence[dict[str, Any]]) -> list[str]:
    """Return each shard's name, with its layout before it where it is borrowed: ``base/shard-00000.tar``.

    That of another data set's layout begins with the data set: ``vigor/layouts/base/shard-00000.tar``.

    Args:
        shards: The entries of ``layout.json``.
    """
    return [
        "/".join(filter(None, (*_of_dataset(shard.get("dataset")), shard.get("layout"), shard["name"])))
        for shard in shards
    ]


def _of_dataset(dataset: str | None) -> tuple[str, ...]:
    return () if dataset is None else (dataset, "layouts")


def _shard_entry(path: str) -> dict[str, str]:
    """Return the fields of ``layout.json`` that say where a shard lies, by its path as in :func:`shard_paths`."""
    *folders, name = path.split("/")
    where = {"name": name} | ({"layout": folders[-1]} if folders else {})
    return where | ({"dataset": folders[0]} if len(folders) > 1 else {})


def summary(places: pa.Table, members: pa.Table, shards: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return the fields of ``layout.json`` that follow from the tables.

    Args:
        places: The table of places.
        members: The table of members.
        shards: (name, bytes) of each shard, in order; the name of a borrowed one as in :func:`shard_paths`.

    Returns:
        The numbers of places and bytes, the pairs of each split, and the shards.
    """
    splits = pc.list_flatten(places["views"].combine_chunks()).field("split")
    in_shard = np.bincount(members["shard"].to_numpy(), minlength=len(shards))
    return {
        "places": places.num_rows,
        "pairs": {v["values"]: v["counts"] for v in pc.value_counts(splits).to_pylist()},
        "bytes": sum(size for _, size in shards),
        "shards": [
            {"size": size, "members": int(count)} | _shard_entry(name)
            for (name, size), count in zip(shards, in_shard, strict=True)
        ],
    }


def read_info(folder: Store) -> dict[str, Any]:
    """Read and check ``layout.json``.

    Args:
        folder: The layout's folder.

    Raises:
        LayoutNotCommitted: There is no ``layout.json``.
        StoreError: It is damaged, or cannot be read.
    """
    try:
        info: dict[str, Any] = folder.read_json("layout.json")
        check_info(info)
    except NotFound as error:
        raise LayoutNotCommitted(
            f"{folder.url}: not committed (no layout.json); if its sharding was cut off, run the same command again"
        ) from error
    except IndexDamage as error:
        raise StoreError(f"{folder.url}: {error}; {ADVICE}") from error
    return info


def read_tables(folder: Store, info: dict[str, Any]) -> tuple[pa.Table, pa.Table]:
    """Read and check the two tables of a layout.

    Args:
        folder: The layout's folder.
        info: Its checked ``layout.json``.

    Returns:
        The tables of places and of members.

    Raises:
        StoreError: A table is missing, changed or damaged.
    """
    shards = list(zip(shard_paths(info["shards"]), (shard["size"] for shard in info["shards"]), strict=True))
    try:
        places = _read_table(folder, "places.parquet", info)
        members = _read_table(folder, "members.parquet", info)
        check_index(places, members, shards)
        for name, value in summary(places, members, shards).items():
            if info[name] != value:
                raise IndexDamage(f"layout.json: {name!r} contradicts the tables")
    except IndexDamage as error:
        raise StoreError(f"{folder.url}: {error}; the index is damaged: {ADVICE}") from error
    return places, members


def read_sources(folder: Store, info: dict[str, Any]) -> bytes | None:
    """Return the content of ``sources.parquet``; None where the layout has none, or another than was committed.

    Args:
        folder: The layout's folder.
        info: Its checked ``layout.json``.
    """
    if SOURCES not in info["index"]:
        return None
    try:
        data = folder.read(SOURCES)
    except NotFound:
        return None
    return data if hashlib.sha256(data).hexdigest() == info["index"][SOURCES] else None


def _read_table(folder: Store, file: str, info: dict[str, Any]) -> pa.Table:
    """Read one table; raise IndexDamage if it is not the one that was committed."""
    try:
        data = folder.read(file)
    except NotFound as error:
        raise IndexDamage(f"{file}: gone since the commit") from error
    if hashlib.sha256(data).hexdigest() != info["index"][file]:
        raise IndexDamage(f"{file}: changed after the commit")
    try:
        table = table_of(data)
        check_schema(file, table)
        table.validate(full=True)  # finds texts that are not UTF-8, and lists that end before they begin
    except (pa.ArrowException, OSError) as error:
        raise IndexDamage(f"{file}: not a whole Parquet file ({' '.join(str(error).split())[:200]})") from error
    return table
