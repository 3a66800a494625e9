"""Sharding against what people use instead: ``python -m tests.benchmarks.shard --json PATH``.

The same raw folder of VIGOR's real sizes becomes 384 × 768 and 384 × 384 JPEGs in tar shards (geostream; webdataset's
ShardWriter in a plain loop, one a process) or chunks (LitData's optimize), on as many workers. Decides that everything
lies on local disk, in the page cache for all alike: reading from and uploading to somewhere slow is not measured. Each
repeat runs in a fresh process, in rotating order: what the machine does meanwhile hits all alike. What was stored is
checked once for each contestant: every image there, once, in its size, and as good as Pillow's. geostream does
more than the peers in this time: it refuses truncated images, keeps the layout's order and writes its index with
checksums. On a machine that does other things, too, images per second of processor time say more than those per
second. About eight minutes on two quiet cores, 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from joblib import cpu_count
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.benchmarks.measure import Failed, Result, figure, figures_table, machine, ratio, run, summary
from tests.benchmarks.shard_data import make_raw
from tests.benchmarks.shard_ours import write_listing
from tests.benchmarks.shard_run import SHARD_BYTES, Job, write_job

MODULES = {
    "geostream": "tests.benchmarks.shard_ours",
    "webdataset": "tests.benchmarks.peers.webdataset_shard",
    "litdata": "tests.benchmarks.peers.litdata_shard",
}
PEERS = ("webdataset", "litdata")
PLACES = 600
REPEATS = 5
SEED = 0
PROCESS_BYTES = 200e6  # what a worker may take, its images in work and in waiting included


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.benchmarks.shard", description=__doc__.split("\n")[0])
    arguments.add_argument("--json", type=Path, required=True, help="where the result goes")
    arguments.add_argument("--places", type=int, default=PLACES, help="a multiple of 20 (default %(default)s)")
    arguments.add_argument("--repeats", type=int, default=REPEATS, help="of each contestant (default %(default)s)")
    arguments.add_argument("--workers", type=int, nargs="+", default=[cpu_count()], help="default: one a core")
    options = arguments.parse_args()
    console = Console(stderr=True)
    if find_spec("litdata") is None:
        console.print("litdata is not installed: make bench-peers", markup=False)
        return 2
    try:
        result = benchmark(options.places, options.repeats, options.workers, console)
    except Failed as error:
        console.print(str(error), markup=False)
        return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for table in tables(result):
        console.print(table)
    return 0


def benchmark(places: int, repeats: int, workers: list[int], console: Console) -> dict[str, Any]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    raw: dict[str, dict[str, list[Result]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="geostream-bench-") as folder,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("images", total=2 * places)
        make_raw(Path(folder, "raw"), places, SEED, lambda: progress.advance(task))
        images = write_listing(Path(folder, "raw"), Path(folder, "listing.json"))
        n_bytes = sum(path.stat().st_size for path in Path(folder, "raw").rglob("*") if path.is_file())
        checked: dict[str, Result] = {}
        for number in workers:
            raw[str(number)] = measure(Path(folder), number, repeats, images, checked, progress)
    return {
        "figures": figures(raw, checked),
        "contestants": {number: {name: summary(one) for name, one in of.items()} for number, of in raw.items()},
        "checked": checked,
        "repeats": raw,
        "machine": machine(),
        "data": {"places": places, "images": images, "bytes": n_bytes, "repeats": repeats},
    }


def measure(
    folder: Path, workers: int, repeats: int, images: int, checked: dict[str, Result], progress: Progress
) -> dict[str, list[Result]]:
    """Every contestant ``repeats`` times, in an order that rotates; ``checked`` gets what each stored at first."""
    raw: dict[str, list[Result]] = {name: [] for name in MODULES}
    names = list(MODULES)
    task = progress.add_task("repeats", total=repeats * len(names))
    job = Job(str(folder / "raw"), str(folder / "out"), str(folder / "listing.json"), workers)
    write_job(job, folder / "job.json")
    for repeat in range(repeats):
        at = repeat % len(names)
        for name in names[at:] + names[:at]:
            progress.update(task, description=f"{workers} workers, repeat {repeat + 1}: {name}")
            command = [sys.executable, "-m", "tests.benchmarks.shard_run"]
            try:
                result = run([*command, "write", MODULES[name], str(folder / "job.json")], os.environ)
                if name not in checked:
                    checked[name] = run([*command, "check", MODULES[name], str(folder / "job.json")], os.environ)
            finally:
                shutil.rmtree(job.out, ignore_errors=True)
            result["images_per_s"] = images / result["seconds"]
            result["images_per_cpu_s"] = images / result["cpu_s"]
            raw[name].append(result)
            progress.console.print(f"{workers} workers, {name}: {result['images_per_s']:.0f} images/s", highlight=False)
            progress.advance(task)
    return raw


def figures(raw: Mapping[str, Mapping[str, list[Result]]], checked: Mapping[str, Result]) -> dict[str, Any]:
    """What the benchmark is for; speed and memory for each number of workers."""
    made: dict[str, Any] = {}
    for number, of in raw.items():
        rates = {name: [one["images_per_s"] for one in repeats] for name, repeats in of.items()}
        medians = {name: summary(of[name])["images_per_s"]["median"] for name in PEERS}
        best = max(medians, key=lambda name: medians[name])
        suffix = f"{number}_workers"
        made[f"of_best_peer_{suffix}"] = ratio(rates["geostream"], rates[best], ">= 1.5") | {"best_peer": best}
        costs = {name: [one["images_per_cpu_s"] for one in repeats] for name, repeats in of.items()}
        made[f"cpu_of_best_peer_{suffix}"] = ratio(costs["geostream"], costs[best], ">= 1.5") | {"best_peer": best}
        bound = 2 * SHARD_BYTES + (int(number) + 1) * PROCESS_BYTES
        peaks = [one["peak_bytes"] / 1e6 for one in of["geostream"]]
        made[f"peak_mb_{suffix}"] = figure(peaks, f"<= {bound / 1e6:.0f}", max(peaks))
    ours = checked["geostream"]
    made["psnr_of_pillows_db"] = figure([ours["psnr_min"], ours["psnr_median"]], ">= 40", ours["psnr_min"])
    sizes = [checked["geostream"]["bytes"] / checked[name]["bytes"] for name in PEERS]
    made["bytes_of_peers"] = figure(sizes, "<= 1.05", max(sizes))
    return made


def tables(result: Mapping[str, Any]) -> list[Table]:
    rows = Table("workers", "contestant", "images/s", "spread", "CPU s", "peak MB", "stored MB", "PSNR min, dB")
    for number, of in result["contestants"].items():
        for name, numbers in of.items():
            rate, checked = numbers["images_per_s"], result["checked"][name]
            rows.add_row(
                number,
                name,
                f"{rate['median']:.0f}",
                f"{rate['min']:.0f}–{rate['max']:.0f}",
                f"{numbers['cpu_s']['median']:.1f}",
                f"{numbers['peak_bytes']['median'] / 1e6:.0f}",
                f"{checked['bytes'] / 1e6:.1f}",
                f"{checked['psnr_min']:.1f}",
            )
    return [rows, figures_table(result["figures"])]


if __name__ == "__main__":
    sys.exit(main())
