"""Define the command ``geostream index``: embed the tiles of a layout, or of any region, so that photos can be located.

The command is here, and not in geostream, because the tiles of a region are sharded first, into a layout of the index's
name beside the others of the data set.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geostream.cli.options import Checkpoint, Dataset, LayoutName, StoreUrl, check_split, open_store
from geostream.errors import BadInput

if TYPE_CHECKING:
    from geostream.layout import Layout
    from geostream.locating.index import Index
    from geostream.runs.run import Run

NAME = "base"
TILES = "Imagery of a region, instead of a layout: a GeoTIFF, a folder of them, an XYZ template, stac+https://…"
TTA = "Average similarities over flips and turns: up to 8 times the time and memory, for tiles and for photos."
OF = "With a run or model on joined data sets: the one whose tiles are embedded; the index belongs to it."
METRES = "Side of a region's tile on the ground; default: as the model was trained, where that is known."


def index(
    store: StoreUrl,
    run: Annotated[str | None, typer.Option(help="A run, instead of a promoted model.")] = None,
    checkpoint: Checkpoint = None,
    model: Annotated[str, typer.Option(help="A promoted model: current, or its number.")] = "current",
    dataset: Dataset = None,
    layout: LayoutName = None,
    of: Annotated[str | None, typer.Option("--of", help=OF)] = None,
    split: Annotated[
        str | None, typer.Option(help="Only the tiles of this split's gallery, train or test; default: all tiles.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the index, and of the layout of a region's tiles.")] = NAME,
    tta: Annotated[bool, typer.Option("--tta", help=TTA)] = False,
    tiles: Annotated[str | None, typer.Option(help=TILES)] = None,
    region: Annotated[Path | None, typer.Option(help="A GeoJSON file of the region's polygons.")] = None,
    metres: Annotated[float | None, typer.Option(help=METRES)] = None,
    overlap: Annotated[float, typer.Option(help="Share of its side that a tile has in common with the next.")] = 0.5,
    licence: Annotated[str | None, typer.Option(help="Licence of the imagery, kept with it.")] = None,
    attribution: Annotated[str | None, typer.Option(help="Shown wherever its tiles are.")] = None,
) -> None:
    """Embed all tiles of a layout or of a region, and measure when an answer is sure. Cut off, run it again."""
    from geostream.layout import open_layout
    from geostream.layout.listing import the_dataset
    from geostream.locating.make import make_index
    from geostream.runs.models import open_model
    from geostream.runs.run import Run

    if run is None and checkpoint is not None:
        raise BadInput(f"--checkpoint {checkpoint}: name its run, too, with --run")
    if (tiles is None) != (region is None):
        raise BadInput("--tiles and --region: name both, the imagery and what part of it, or neither")
    if tiles is not None and layout is not None:
        raise BadInput(f"--layout {layout}: name either a layout, or --tiles and --region")
    split = split if split is None else check_split(split)
    root = open_store(store)
    dataset, number = the_dataset(root, dataset), None
    if run is None:
        source, found = open_model(root, open_layout(root, dataset, None), model)
        checkpoint, number = found.checkpoint, found.number
    else:
        source = Run.find(root, dataset, None, run)
    if of is not None or source.layout.joined:
        source, dataset = _of_joined(source, of)
    if tiles is not None and region is not None:
        terms = {key: text for key, text in (("licence", licence), ("attribution", attribution)) if text is not None}
        gallery = _shard_region(source, name, (tiles, region), metres, overlap, terms)
    else:
        gallery = open_layout(root, dataset, layout)
    _show(*make_index(source, checkpoint, gallery, name, number, split, tta))


def _of_joined(source: Run, of: str | None) -> tuple[Run, str]:
    """Return the run as it is on one of the layouts that its own joins, and the name of that data set."""
    from geostream.runs.galleries import joined_layout

    names = [one.dataset for one in source.layout.joined]
    if of is None or of not in names:
        told = f"name one of {', '.join(names)}" if names else f"layout {source.layout.name} joins none; leave it out"
        raise BadInput(f"--of{f' {of}' if of else ''}: {told}")
    return source.on(joined_layout(source.store, source.layout, names.index(of))), of


def _shard_region(
    source: Run, name: str, imagery: tuple[str, Path], metres: float | None, overlap: float, terms: dict[str, str]
) -> Layout:
    """Write a region's tiles as a layout, in the size that the model takes. Nothing is done where they are there."""
    import sharding
    from sharding.tiles.region import read_region, work_folder

    metres = metres or source.layout.tile_metres
    if metres is None:
        raise BadInput(
            f"--metres: layout {source.layout.name} does not say how large its tiles are on the ground; say it, as the "
            "model knows no other scale"
        )
    tiles, region = imagery
    found = read_region(tiles, region, metres=metres, overlap=overlap, work=work_folder())
    if terms:
        found = replace(found, source={**(found.source or {}), **terms})
    side = source.settings.model.tile_size
    options = sharding.ShardOptions(tile_size=(side, side))
    return sharding.shard(found, source.store, source.layout.dataset, name, options).layout


def _show(index: Index, already: bool) -> None:
    calibration = index.info["calibration"]
    print(f"{'Was there already: ' if already else 'Committed '}{index.folder.url}: {index.info['tiles']:,} tiles")
    if calibration["threshold"] is None:
        print(
            f"No answer will be called sure: {calibration['queries']} test photos do not show a precision of "
            f"{calibration['precision']:.0%} at any threshold"
        )
    else:
        print(
            f"{calibration['sure']:.1%} of {calibration['queries']:,} test photos are sure, and of these at least "
            f"{calibration['precision']:.0%} right within {calibration['metres']:g} m"
        )
