"""Read the rows of a table, whatever its format: CSV and TSV with a head line, Parquet, GeoJSON.

Cells come as text, and each row with its ``file:line``: the line of a text file, else the number of the row from 1. The
columns that are not known are left out, and named. A whole table is held in memory.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from geostream.errors import BadInput, MissingRaw
from sharding.raw_path import RawPath, read_text

TEXT, PARQUET, GEOJSON = (".csv", ".tsv"), (".parquet", ".geoparquet"), (".geojson", ".json")
GEOMETRY = ("geometry", "bbox")  # of GeoParquet: its writers add latitude and longitude where a person reads them

Row = dict[str, str]


class Table(NamedTuple):
    """Hold the rows of a table.

    Attributes:
        columns: those that are known.
        rows: ``file:line`` and the cells of each row by column, without blanks around them; "": there is nothing.
        unused: names of the other columns.
    """

    columns: frozenset[str]
    rows: list[tuple[str, Row]]
    unused: tuple[str, ...]


def read_table(raw: RawPath, known: Sequence[str], needed: Sequence[str]) -> Table:
    """Read a table.

    Args:
        raw: the file; its suffix says what it is.
        known: names of the columns that may be there; upper and lower case are alike.
        needed: those that must be.

    Raises:
        BadInput: it is no such table, a column is missing or there twice, or a row is malformed.
        MissingRaw: there is no such file.
    """
    suffix = Path(raw.name).suffix.lower()
    readers = {TEXT: _separated, PARQUET: _parquet, GEOJSON: _geojson}
    reader = next((reader for suffixes, reader in readers.items() if suffix in suffixes), None)
    if reader is None:
        names = ", ".join(name for suffixes in readers for name in suffixes)
        raise BadInput(f"{raw}: a table is a file {names}; this one ends in {suffix or 'nothing'}")
    try:
        head, rows = reader(raw)
    except OSError as error:
        raise MissingRaw(f"{raw}: cannot read it ({error.strerror}); name the file of the table") from error
    where = f"{raw.name}:1" if suffix in TEXT else raw.name
    if missing := [name for name in needed if name not in head]:
        raise BadInput(f"{where}: no column {' and '.join(missing)}; there are {', '.join(head) or 'none'}")
    if twice := {name for name in head if head.count(name) > 1}:
        raise BadInput(f"{where}: the column {', '.join(sorted(twice))} is there twice; rename one")
    columns = [name for name in head if name in known]
    kept = [(where, {name: _text(row.get(name)) for name in columns}) for where, row in rows]
    return Table(frozenset(columns), kept, tuple(name for name in head if name not in known))


Rows = Iterable[tuple[str, dict[str, Any]]]


def _separated(raw: RawPath) -> tuple[list[str], Rows]:
    """Return the head line's names, and the rows."""
    try:
        text = read_text(raw)
    except UnicodeDecodeError as error:
        raise BadInput(f"{raw}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    tabs = raw.name.lower().endswith(".tsv")
    lines = csv.reader(io.StringIO(text), delimiter="\t" if tabs else ",", strict=True, skipinitialspace=not tabs)
    head, rows = list[str](), list[tuple[str, dict[str, Any]]]()
    try:
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if not head:
                head = _names(cells)
                continue
            where = f"{raw.name}:{lines.line_num}"
            if len(cells) != len(head):
                raise BadInput(f"{where}: {len(cells)} cells, but {len(head)} columns; mend the line")
            rows.append((where, dict(zip(head, cells, strict=True))))
    except csv.Error as error:
        raise BadInput(f"{raw.name}:{lines.line_num}: no line of separated values ({error}); mend it") from error
    return head, rows


def _parquet(raw: RawPath) -> tuple[list[str], Rows]:
    try:
        table = pq.ParquetFile(io.BytesIO(raw.read_bytes())).read()
    except pa.ArrowInvalid as error:
        raise BadInput(f"{raw}: not a whole Parquet file ({error}); write it again") from error
    table = table.select([name for name in table.column_names if name.lower() not in GEOMETRY])
    table = table.rename_columns(_names(table.column_names))
    rows = ((f"{raw.name}:{number}", row) for number, row in enumerate(table.to_pylist(), start=1))
    return list(table.column_names), rows


def _geojson(raw: RawPath) -> tuple[list[str], Rows]:
    """Return the names of all properties, and a row of each feature: its point is ``lat`` and ``lon``."""
    try:
        features = json.loads(raw.read_bytes())["features"]
        rows = [dict(zip(_names(one["properties"]), one["properties"].values(), strict=True)) for one in features]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{raw}: not a GeoJSON FeatureCollection ({error!r}); write it again") from error
    numbered = []
    for number, (feature, row) in enumerate(zip(features, rows, strict=True), start=1):
        where = f"{raw.name}:{number}"
        if geometry := feature.get("geometry"):
            try:
                lon, lat = map(float, geometry["coordinates"][:2])
            except (ValueError, TypeError, KeyError) as error:
                raise BadInput(f"{where}: its geometry is no Point; give the tile's centre") from error
            row = {"lat": lat, "lon": lon} | row
        numbered.append((where, row))
    return list(dict.fromkeys(name for _, row in numbered for name in row)), numbered


def _names(cells: Iterable[Any]) -> list[str]:
    return [str(cell).strip().lower() for cell in cells]


def _text(value: Any) -> str:
    """Return a cell as text; a list is joined by semicolons."""
    if isinstance(value, list):
        return ";".join(map(str, value))
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()
