"""Define the command ``cost``, which computes what a large training takes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from geostream.cli.options import print_table

if TYPE_CHECKING:
    from geostream.report.cost import Stage

MOST = 1e9  # of numbers that are not whole; infinity is above it
WIDE = 1e9  # a number from which on a table of all stages would be wider than a page
PRICE = "Dollars (list price of 2025, an assumption) "


def cost(
    places: Annotated[int, typer.Option(min=1, help="Training places.")] = 1_000_000,
    views: Annotated[int, typer.Option(min=1, help="Views (pairs) a place.")] = 1,
    tile_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a stored tile.")] = 115_000,
    view_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a stored view.")] = 163_000,
    raw_image_bytes: Annotated[int, typer.Option(min=0, help="Bytes of a raw image, read by sharding.")] = 700_000,
    dim: Annotated[int, typer.Option(min=1, help="Dimensions of an embedding.")] = 1024,
    neighbours: Annotated[int, typer.Option(min=1, help="K, neighbours of each place in the graphs.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs.")] = 40,
    mine_every: Annotated[int, typer.Option(min=1, help="Epochs between two minings.")] = 4,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Epochs between two evaluations.")] = 4,
    reclusters: Annotated[int, typer.Option(min=0, help="How often the shards are rewritten.")] = 1,
    test_places: Annotated[int, typer.Option(min=1, help="Places of the test split.")] = 100_000,
    lanes: Annotated[int, typer.Option(min=1, help="Lanes of a plan.")] = 64,
    shard_mib: Annotated[int, typer.Option(min=1, help="MiB of a shard.")] = 128,
    workers: Annotated[int, typer.Option(min=1, help="Dask workers.")] = 8,
    cores: Annotated[int, typer.Option(min=1, help="Cores (threads) of a worker.")] = 2,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs.")] = 8,
    pairs_per_second: Annotated[
        float,
        typer.Option(min=1e-3, max=MOST, help="Pairs that one GPU trains in a second; an assumption, measure yours."),
    ] = 150.0,
    bandwidth: Annotated[
        float, typer.Option(min=1e-3, max=MOST, help="MB/s from the store of a worker, and of a GPU.")
    ] = 250.0,
    storage_price: Annotated[float, typer.Option(min=0, max=MOST, help=f"{PRICE}of a GB stored for a month.")] = 0.023,
    put_price: Annotated[float, typer.Option(min=0, max=MOST, help=f"{PRICE}of 1,000 PUT requests.")] = 0.005,
    get_price: Annotated[float, typer.Option(min=0, max=MOST, help=f"{PRICE}of 1,000 GET requests.")] = 0.0004,
    gpu_price: Annotated[float, typer.Option(min=0, max=MOST, help=f"{PRICE}of a GPU-hour.")] = 4.0,
    core_price: Annotated[float, typer.Option(min=0, max=MOST, help=f"{PRICE}of a CPU core-hour.")] = 0.05,
    months: Annotated[
        float, typer.Option(min=0, max=MOST, help="Months for which all that was written is kept.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all that it was computed from.")] = False,
) -> None:
    """Compute what a large training takes: seconds, memory, bytes, requests, dollars. Reads nothing.

    Prices are list prices of 2025 and assumptions; check them. A stage pays for all workers (or GPUs) while it runs.
    Stages are counted one after the other, though most of them run beside the training.
    """
    from geostream.report import cost as model

    job = model.Job(
        places, views, tile_bytes, view_bytes, raw_image_bytes, dim, neighbours, epochs, mine_every, evaluate_every,
        reclusters, test_places, lanes, shard_mib, workers, cores, gpus, pairs_per_second, bandwidth,
    )  # fmt: skip
    prices = model.Prices(storage_price, put_price, get_price, gpu_price, core_price, months)
    result = model.cost(job, prices)
    if as_json:
        print(json.dumps(model.as_json(job, prices, result), indent=1))
        return
    title = f"{places:,} places, {job.pairs:,} pairs, {epochs} epochs; {workers} workers of {cores} cores, {gpus} GPUs"
    print_table(title, [_row(stage) for stage in (*result.stages, result.total)])
    print(f"Kept on the store: {_number(result.kept / 1e9)} GB, {_number(result.storage_dollars)} $ in the total.")
    print("A row is for one time, the total for all times. Prices: list prices of 2025, assumptions.")
    for warning in result.warnings:
        print(f"- {warning}")


def _row(stage: Stage) -> dict[str, str]:
    return {
        "stage": stage.name,
        "times": f"{stage.times:g}",
        "wall s": _number(stage.seconds),
        "core h": _number(stage.core_hours),
        "GPU h": _number(stage.gpu_hours),
        "process": stage.process,
        "GB held": _number(stage.memory / 1e9),
        "GB read": _number(stage.read / 1e9),
        "GB written": _number(stage.written / 1e9),
        "GETs": _number(stage.gets),
        "PUTs": _number(stage.puts),
        "$": _number(stage.dollars),
    }


def _number(value: float) -> str:
    """Return a number with about two digits that matter; one that would not fit in a column, as a power of ten."""
    if value >= WIDE:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"
