"""Define the command ``geostream shard``: from a raw folder to a committed layout, or to a preview of it.

All data sets share the command, and so does ``tiles``: imagery of a region, without photos, to search in. An
adapter's own options are passed on by name, and :func:`sharding.read_places` refuses one that the adapter does not
have. The work is imported when it begins, so that ``--help`` need not wait.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geostream.errors import BadInput

if TYPE_CHECKING:
    from sharding import DryRun, RawDataset, ShardReport
    from sharding.places import Size

NAMES = "vigor, cvusa, cvact, university1652, cv-cities, gta-uav, table, photos"  # of sharding.ADAPTERS
TILES = "A GeoTIFF, a folder of them, an XYZ template, stac+https://…?collections=NAME."
ALIKE = "training tiles that correlate so much, such as 0.95, are one building and share no batch."
TERMS = "of the imagery, kept in the layout and shown with its tiles; a STAC catalogue says it itself."
REMOVE = "An append removes places and images that the raw folder no longer has; else they stay."
EXTEND = "An append may change the test set; else it adds to training alone, and figures stay comparable."
PREVIEW = "Only say what would be done, and what is missing. On S3 a small object of our own is written and removed."


def shard(
    adapter: Annotated[str, typer.Argument(help=f"What the raw folder holds: {NAMES} (geostream datasets). Or tiles.")],
    raw: Annotated[
        str,
        typer.Argument(
            help="The raw folder, as downloaded; also s3://bucket/folder. table: the file. tiles: as for --tiles."
        ),
    ],
    store: Annotated[str, typer.Argument(help="s3://bucket/prefix or a local folder.")],
    dataset: Annotated[str | None, typer.Option(help="Name in the store; default: the adapter's.")] = None,
    layout: Annotated[str, typer.Option(help="Name of the layout.")] = "base",
    protocol: Annotated[
        str | None,
        typer.Option(help="VIGOR, GTA-UAV: cross-area (default) or same-area. CVACT: val (default) or test."),
    ] = None,
    views: Annotated[str | None, typer.Option(help="University-1652: drone (default) or street.")] = None,
    join_alike: Annotated[float | None, typer.Option(help=f"University-1652: {ALIKE}")] = None,
    train_cities: Annotated[str | None, typer.Option(help="VIGOR, CV-Cities: other training cities, A,B.")] = None,
    test_cities: Annotated[str | None, typer.Option(help="VIGOR, CV-Cities: other test cities, A,B.")] = None,
    tiles: Annotated[str | None, typer.Option(help=f"Photos: what tiles are cut from. {TILES}")] = None,
    region: Annotated[str | None, typer.Option(help="Photos, tiles: a GeoJSON file of the region.")] = None,
    metres: Annotated[float | None, typer.Option(help="Photos, tiles: side of a tile; default: 60.")] = None,
    overlap: Annotated[float | None, typer.Option(help="Photos, tiles: of neighbouring tiles; default: 0.5.")] = None,
    table: Annotated[str | None, typer.Option(help="Photos: .csv, .geojson, .parquet; default: EXIF.")] = None,
    test_share: Annotated[float | None, typer.Option(help="Photos: of blocks for testing; default: 0.2.")] = None,
    block_metres: Annotated[float | None, typer.Option(help="Photos: side of a block; default: 5 tiles.")] = None,
    licence: Annotated[str | None, typer.Option(help=f"Photos, tiles: licence {TERMS}")] = None,
    attribution: Annotated[str | None, typer.Option(help=f"Photos, tiles: attribution {TERMS}")] = None,
    tile_size: Annotated[str | None, typer.Option(help="Stored tiles, as HEIGHTxWIDTH; default: as trained.")] = None,
    view_size: Annotated[str | None, typer.Option(help="Stored views, as HEIGHTxWIDTH; default: as trained.")] = None,
    original: Annotated[bool, typer.Option(help="Keep the raw files' bytes.")] = False,
    quality: Annotated[int | None, typer.Option(help="JPEG quality of resized images; default: 90.")] = None,
    shard_mib: Annotated[float, typer.Option(help="Size of a shard, about.")] = 128.0,
    max_broken: Annotated[float, typer.Option(help="Share of broken images above which it fails.")] = 0.001,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
    remove_missing: Annotated[bool, typer.Option(help=REMOVE)] = False,
    extend_test: Annotated[bool, typer.Option(help=EXTEND)] = False,
    dry_run: Annotated[bool, typer.Option(help=PREVIEW)] = False,
) -> None:
    """Shard a raw dataset into a store, or append what it has more. Cut off, it goes on when run again."""
    import sharding
    from geostream.store import Store

    target = Store.open(store)  # first: a URL that is none is refused before the raw folder is read
    given = {
        "protocol": protocol,
        "views": views,
        "join_alike": join_alike,
        "train_cities": _names(train_cities),
        "test_cities": _names(test_cities),
        "tiles": tiles,
        "region": region,
        "metres": metres,
        "overlap": overlap,
        "table": table,
        "test_share": test_share,
        "block_metres": block_metres,
    }
    options = sharding.ShardOptions(
        tile_size=_size(tile_size),
        view_size=_size(view_size),
        original=original,
        quality=quality,
        shard_bytes=round(shard_mib * 2**20),
        max_broken=max_broken,
    )
    chosen = {name: value for name, value in given.items() if value is not None}
    places = _gallery(raw, chosen) if adapter == "tiles" else sharding.read_places(adapter, raw, **chosen)
    places = _with_terms(places, licence=licence, attribution=attribution)
    name, rules = dataset or adapter, {"remove_missing": remove_missing, "extend_test": extend_test}
    if dry_run:
        _show_plan(sharding.dry_run(places, target, name, layout, options, **rules))
    else:
        _show_report(sharding.shard(places, target, name, layout, options, workers, **rules))


def _gallery(source: str, given: dict[str, Any]) -> RawDataset:
    """Return the tiles of a region, without photos."""
    from sharding.tiles.region import read_region, work_folder

    if other := sorted(set(given) - {"region", "metres", "overlap"}):
        raise BadInput(f"tiles has no option {', '.join(other)}; it has region, metres, overlap")
    if "region" not in given:
        raise BadInput("tiles: say which region with --region FILE.geojson")
    given = {"metres": 60.0, **given}
    return read_region(source, Path(given.pop("region")), **given, work=work_folder())


def _with_terms(places: RawDataset, **terms: str | None) -> RawDataset:
    """Return the places with the licence and attribution that were given."""
    given = {name: text for name, text in terms.items() if text is not None}
    if not given:
        return places
    if places.source is None:
        raise BadInput(
            f"{places.adapter} has no imagery of its own: leave out {', '.join(f'--{name}' for name in given)}"
        )
    return replace(places, source=places.source | given)


def _show_plan(plan: DryRun) -> None:
    _print(
        *(
            f"{name + ':':17}{value:,}" if isinstance(value, int) else f"{name + ':':17}{value}"
            for name, value in plan.figures.items()
        )
    )
    _print(*plan.remarks, "Nothing was written.")


def _show_report(report: ShardReport) -> None:
    info = report.layout.info
    _print(
        f"{'Nothing has changed: found' if report.already else 'Committed'} {report.layout.store.url}: "
        f"{info['places']:,} places, pairs {info['pairs']}, {len(info['shards'])} shards, {info['bytes'] / 1e6:,.1f} MB"
        + (f" ({report.resumed} shards were there from a run that was cut off)" if report.resumed else ""),
        *report.notes,
        *(f"left out: {one}" for one in report.broken),
    )


def _print(*lines: str) -> None:
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _size(text: str | None) -> Size | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise BadInput(f"image size {text!r}: write HEIGHTxWIDTH in pixels, for example 384x768")
    return int(match[1]), int(match[2])
