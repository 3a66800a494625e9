"""Read the rows of a table, whatever its format: CSV and TSV with a head line, GeoParquet and plain Parquet, GeoJSON.

Cells come as text, and each row with its ``file:line``: the line of a text file, else the number of the row from 1. The
point of a row's geometry becomes ``lat`` and ``lon``, where no columns of these names say more. The columns that are
not known are left out, and named. A whole table is held in memory.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from geostream.errors import BadInput, MissingRaw
from geostream.store import table_of
from sharding.raw_path import RawPath, read_text

TEXT, PARQUET, GEOJSON = (".csv", ".tsv"), (".parquet", ".geoparquet"), (".geojson", ".json")
POSITION = {"lat": ("lat", "latitude"), "lon": ("lon", "longitude", "lng")}  # how these columns may be called
BBOX = "bbox"  # of GeoParquet: the bounds of each row, for programs
DEGREES = (
    "CRS84",
    "CRS84)",
    "4326",
    "4979",
    "WGS 84",
)  # how the names of coordinate systems end that are longitude and latitude of WGS 84

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


def read_table(raw: RawPath, known: Mapping[str, Sequence[str]], needed: Sequence[str]) -> Table:
    """Read a table.

    Args:
        raw: the file; its suffix says what it is.
        known: the columns that may be there, and how each may be called; upper and lower case are alike. Of several
            names the first that a row has a cell for counts.
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
    columns = [name for name, ways in known.items() if any(way in head for way in ways)]
    if missing := [name for name in needed if name not in columns]:
        raise BadInput(f"{where}: no column {' and '.join(missing)}; there are {', '.join(head) or 'none'}")
    if twice := {name for name in head if head.count(name) > 1}:
        raise BadInput(f"{where}: the column {', '.join(sorted(twice))} is there twice; rename one")
    kept = [(where, {name: _cell(row, known[name]) for name in columns}) for where, row in rows]
    all_ways = {way for ways in known.values() for way in ways}
    return Table(frozenset(columns), kept, tuple(name for name in head if name not in all_ways))


def _cell(row: Mapping[str, Any], ways: Sequence[str]) -> str:
    return next((text for way in ways if (text := _text(row.get(way)))), "")


Rows = Iterable[tuple[str, dict[str, Any]]]


def _separated(raw: RawPath) -> tuple[list[str], Rows]:
    """Return the head line's names, and the rows."""
    try:
        text = read_text(raw)
    except UnicodeDecodeError as error:
        raise BadInput(f"{raw}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    tab = raw.name.lower().endswith(".tsv")
    cut = "\t" if tab else ","
    text = re.sub(rf'" +(?=[{cut}\n]|$)', '"', text)  # blanks behind a closing quote, which a strict reader refuses
    lines = csv.reader(io.StringIO(text), delimiter=cut, strict=True, skipinitialspace=not tab)
    head, rows = list[str](), list[tuple[str, dict[str, Any]]]()
    try:
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if not head:
                head = _names(cells)
                if len(head) == 1 and ";" in head[0]:
                    raise BadInput(f"{raw.name}:{lines.line_num}: cells separated by semicolons; save it with commas")
                continue
            where = f"{raw.name}:{lines.line_num}"
            if len(cells) != len(head):
                raise BadInput(f"{where}: {len(cells)} cells, but {len(head)} columns; mend the line")
            rows.append((where, dict(zip(head, cells, strict=True))))
    except csv.Error as error:
        raise BadInput(f"{raw.name}:{lines.line_num}: no line of separated values ({error}); mend it") from error
    return head, rows


def _parquet(raw: RawPath) -> tuple[list[str], Rows]:
    data = raw.read_bytes()
    try:
        table = table_of(data)
        shapes = _shapes(table, raw)
        geometry = None if shapes is None else table[shapes].to_pylist()
        table = table.select([name for name in table.column_names if name != shapes and name.lower() != BBOX])
        table = table.rename_columns(_names(table.column_names))
        cells = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # all of these come of damaged data
        reason = " ".join(str(error).split())[:100]
        raise BadInput(f"{raw}: not a whole Parquet file ({reason}); write it again") from error
    head = list(table.column_names)
    rows = [(f"{raw.name}:{number}", row) for number, row in enumerate(cells, start=1)]
    if geometry is None or all(set(ways) & set(head) for ways in POSITION.values()):
        return head, rows
    points = (_wkb_point(data, where) for (where, _), data in zip(rows, geometry, strict=True))
    return [*head, *(name for name in ("lat", "lon") if name not in head)], [
        (where, _with_point(row, point)) for (where, row), point in zip(rows, points, strict=True)
    ]


def _shapes(table: pa.Table, raw: RawPath) -> str | None:
    """Return the name of the column of shapes, as GeoParquet's metadata have it; None: there is none.

    Raises:
        BadInput: it is not in degrees.
    """
    try:
        said = json.loads((table.schema.metadata or {}).get(b"geo", b"{}"))
        name = str(said.get("primary_column", "geometry"))
        crs = said.get("columns", {}).get(name, {}).get("crs")  # none: OGC:CRS84
        system = "" if crs is None else f"{crs['id']['authority']}:{crs['id']['code']}" if "id" in crs else crs["name"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"{raw}: its GeoParquet metadata are malformed ({error!r}); write it again") from error
    if name not in table.column_names:
        return None
    if system and not system.endswith(DEGREES):
        raise BadInput(f"{raw}: in {system}, not in degrees; save it in EPSG:4326")
    return name


Point = tuple[float, float]  # latitude, longitude


def _with_point(row: dict[str, Any], point: Point | None) -> dict[str, Any]:
    """Return a row with the point's coordinates, where it has no other."""
    if point is None:
        return row
    there = dict(zip(("lat", "lon"), point, strict=True))
    return there | {name: value for name, value in row.items() if name not in there or _text(value)}


def _wkb_point(data: Any, where: str) -> Point | None:
    from shapely import GEOSException, from_wkb

    if data is None:
        return None
    try:
        shape = from_wkb(data)
    except (GEOSException, TypeError) as error:
        raise BadInput(f"{where}: its geometry is no WKB; save the table as GeoParquet with WKB") from error
    if shape.geom_type != "Point" or shape.is_empty:
        raise BadInput(f"{where}: its geometry is a {shape.geom_type}, no Point; give one point")
    return shape.y, shape.x


def _geojson(raw: RawPath) -> tuple[list[str], Rows]:
    """Return the names of all properties, and a row of each feature: its point is ``lat`` and ``lon``."""
    try:
        features = json.loads(raw.read_bytes())["features"]
        properties = [one["properties"] or {} for one in features]
        rows = [dict(zip(_names(one), one.values(), strict=True)) for one in properties]
        shapes = [one.get("geometry") for one in features]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = type(error).__name__ if isinstance(error, RecursionError) else repr(error)
        raise BadInput(f"{raw}: not a GeoJSON FeatureCollection ({reason}); write it again") from error
    numbered = []
    for number, (shape, row) in enumerate(zip(shapes, rows, strict=True), start=1):
        where = f"{raw.name}:{number}"
        numbered.append((where, _with_point(row, _geojson_point(shape, where))))
    return list(dict.fromkeys(name for _, row in numbered for name in row)), numbered


def _geojson_point(shape: Any, where: str) -> Point | None:
    if shape is None:
        return None
    try:
        lon, lat = map(float, shape["coordinates"][:2])
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{where}: its geometry is no Point; give one point") from error
    return lat, lon


def _names(cells: Iterable[Any]) -> list[str]:
    return [str(cell).strip().lower() for cell in cells]


def _text(value: Any) -> str:
    """Return a cell as text; a list is joined by semicolons."""
    if isinstance(value, list):
        return ";".join(map(str, value))
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()
