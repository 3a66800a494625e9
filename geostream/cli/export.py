"""Define the command ``export``, which writes a trained encoder for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geostream.cli.options import (
    DEFAULT_RUN,
    Checkpoint,
    Dataset,
    LayoutName,
    ModelName,
    RunName,
    StoreUrl,
    open_trained,
)

REAL = 8  # images of the test split that the export is checked on, of each kind


def export(
    store: StoreUrl,
    folder: Annotated[Path, typer.Argument(help="Local folder for the files.")],
    run: RunName = DEFAULT_RUN,
    checkpoint: Checkpoint = None,
    model: ModelName = None,
    dataset: Dataset = None,
    layout: LayoutName = None,
) -> None:
    """Write a trained encoder as safetensors with a JSON config, and as ONNX that was checked against torch."""
    from geostream.runs.stages import load_trained
    from geostream.training.export import export_encoder, first_images

    opened, checkpoint = open_trained(store, (dataset, layout, run), checkpoint, model, None)
    trained = load_trained(opened, checkpoint)
    source = {"dataset": opened.layout.dataset, "run": opened.name, "checkpoint": trained.checkpoint}
    images = first_images(opened.layout, trained.settings, REAL)
    differences = export_encoder(trained.encoder, trained.settings, folder, source, images)
    for kind, difference in differences.items():
        print(f"{kind}.onnx: differs from torch by at most {difference:.1e} in a component of the unit vectors")
    print(f"exported {opened.name} {trained.checkpoint} to {folder}")
