"""Define the command ``geostream index``: embed the tiles of a layout, or of any region, so that photos can be located.

The command is here, and not in geostream, because the tiles of a region are sharded first.
"""

from __future__ import annotations

from typing import Annotated

import typer

from geostream.cli.options import Checkpoint, Dataset, LayoutName, StoreUrl, open_store
from geostream.errors import BadInput

DEFAULT = "base"


def index(
    store: StoreUrl,
    run: Annotated[str | None, typer.Option(help="A run, instead of a promoted model.")] = None,
    checkpoint: Checkpoint = None,
    model: Annotated[str, typer.Option(help="A promoted model: current, or its number.")] = "current",
    dataset: Dataset = None,
    layout: LayoutName = None,
    name: Annotated[str, typer.Option(help="Name of the index.")] = DEFAULT,
) -> None:
    """Embed all tiles of a layout, and say when a photo's answer is sure. Cut off, run it again."""
    from geostream.layout import open_layout
    from geostream.locating.make import make_index
    from geostream.runs.models import open_model
    from geostream.runs.run import Run

    root = open_store(store)
    if run is None and checkpoint is not None:
        raise BadInput(f"--checkpoint {checkpoint}: name its run, too, with --run")
    tiles = open_layout(root, dataset, layout)
    number = None
    if run is None:
        source, found = open_model(root, open_layout(root, tiles.dataset, None), model)
        checkpoint, number = found.checkpoint, found.number
    else:
        source = Run.find(root, tiles.dataset, None, run)
    made, already = make_index(source, checkpoint, tiles, name, number)
    calibration = made.info["calibration"]
    print(f"{'Was there already' if already else 'Committed'} {made.folder.url}: {made.info['tiles']:,} tiles")
    if calibration["threshold"] is None:
        print(f"No answer will be called sure: {calibration['queries']} test photos do not show enough precision")
    else:
        print(
            f"{calibration['sure']:.1%} of {calibration['queries']:,} test photos are sure, "
            f"with a precision of at least {calibration['precision']:.0%}"
        )
