"""Read and check the files of a layout's index: ``layout.json`` and the two tables that it names by hash.

The files may have been changed since the commit, so everything is checked before it is used: the fields of
``layout.json``, the hash, schema and invariants of each table (:mod:`geostream.layout.schema`), and that they agree. An
error is one line that names the file.

The names of a layout's objects are defined here, too. Before a layout is written, ``parts/job.json`` records how many
shards it will have. The names of all its objects follow from that number, and only these objects are ever removed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from geostream.errors import LayoutNotCommitted, NotFound, StoreError
from geostream.layout.schema import Coordinates, IndexDamage, Protocol, check_index, check_schema
from geostream.store import NAME, Store

FORMAT = 1
SHARD = "^shard-[0-9]{5,}[.]tar$"
TABLES = ("places.parquet", "members.parquet")
JOB = "parts/job.json"  # who writes the folder, and how many shards it will hold; removed after the commit
ADVICE = "restore the layout's folder from a copy, or delete it and shard the dataset again"


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(pattern=SHARD)]
    size: Count
    members: Count


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
    source: dict[str, Any]
    broken: list[str]
    index: Annotated[dict[Literal["places.parquet", "members.parquet"], str], Field(min_length=2)]


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
    if isinstance(info, dict) and info.get("format", FORMAT) != FORMAT:
        raise IndexDamage(f"layout.json: format {info['format']}, but this geostream reads format {FORMAT}")
    try:
        _Info.model_validate(info)
    except ValidationError as error:
        first = error.errors()[0]
        where = ascii(".".join(map(str, first["loc"])))[1:-1]  # one line, whatever characters the names have
        raise IndexDamage(f"layout.json: {where or 'all'}: {first['msg']}") from error
    names = [shard["name"] for shard in info["shards"]]
    if len(set(names)) < len(names):
        raise IndexDamage("layout.json: two shards have the same name")


def summary(places: pa.Table, members: pa.Table, shards: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return the fields of ``layout.json`` that follow from the tables.

    Args:
        places: The table of places.
        members: The table of members.
        shards: (name, bytes) of each shard, in order.

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
            {"name": name, "size": size, "members": int(count)}
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
    shards = [(shard["name"], shard["size"]) for shard in info["shards"]]
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


def _read_table(folder: Store, file: str, info: dict[str, Any]) -> pa.Table:
    """Read one table; raise IndexDamage if it is not the one that was committed."""
    try:
        data = folder.read(file)
    except NotFound as error:
        raise IndexDamage(f"{file}: gone since the commit") from error
    if hashlib.sha256(data).hexdigest() != info["index"][file]:
        raise IndexDamage(f"{file}: changed after the commit")
    try:
        table = pq.ParquetFile(io.BytesIO(data)).read()
        check_schema(file, table)
        table.validate(full=True)  # finds texts that are not UTF-8, and lists that end before they begin
    except (pa.ArrowException, OSError) as error:
        raise IndexDamage(f"{file}: not a whole Parquet file ({' '.join(str(error).split())[:200]})") from error
    return table
