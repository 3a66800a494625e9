"""Measure streaming against its limits and its peers: ``python -m tests.benchmarks.stream --json PATH``.

All contestants meet the same JPEGs on one local S3 server, with the same number of workers. Each repeat runs in a fresh
process, and their order rotates, so that what the machine does meanwhile hits all alike. geostream and the range GETs
serve the batches of a hard plan; the peers shuffle, which is the easier job. What was fetched is read from the server's
counters. About 14 minutes on two cores, 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from geostream.layout import Layout
from geostream.store import Store
from infra.s3 import S3Server, local_s3, without_aws
from tests.benchmarks import images
from tests.benchmarks.job import Job, write_job
from tests.benchmarks.measure import ROOT, Failed, Result, figure, figures_table, machine, ratio, run, summary
from tests.benchmarks.ours import s3_store
from tests.benchmarks.traffic import read_traffic

BATCH = 64
WORKERS = 2
PAIRS = 4320  # 18 full shards, so that two lanes leave out next to nothing
REPEATS = 5
TRIES = 3  # of a peer: MosaicML Streaming was seen to read a shard before it was whole
SEED = 0
GIB = 2**30
MOSAIC_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
INSTALL = "make bench-peers"


@dataclass(frozen=True)
class Contestant:
    """A function that reads the pairs.

    Attributes:
        module: The module of the function, below this package.
        function: Its name.
        python: The interpreter that runs it.
        package: The package to be installed, where the contestant is none of ours.
        own_format: Whether its module can ``write`` the pairs in a format of its own.
    """

    module: str
    function: str = "read"
    python: Path = Path(sys.executable)
    package: str = ""
    own_format: bool = False

    @property
    def path(self) -> str:
        """The module's full name."""
        return f"{__package__}.{self.module}"

    @property
    def is_peer(self) -> bool:
        """Whether it is a library to be compared with."""
        return self.module.startswith("peers.")

    def version(self) -> str | None:
        """Return the version of the package that this contestant's interpreter finds, or None where there is none."""
        ask = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
        try:
            answer = subprocess.run([self.python, "-c", ask, self.package], capture_output=True, text=True)
        except FileNotFoundError:  # no such interpreter
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None


CONTESTANTS = {
    "limit_fetch": Contestant("ours", "whole_shards"),
    "limit_decode": Contestant("ours", "decode_only"),
    "geostream_transport": Contestant("ours", "geostream_transport"),
    "geostream": Contestant("ours", "geostream"),
    "geostream_unclustered": Contestant("ours", "geostream_unclustered"),
    "geostream_workers": Contestant("ours", "geostream_workers"),
    "webdataset": Contestant("peers.webdataset", package="webdataset"),
    "litdata": Contestant("peers.litdata", package="litdata", own_format=True),
    "lancedb": Contestant("peers.lancedb", package="lancedb", own_format=True),
    "mosaic": Contestant("peers.mosaic", python=MOSAIC_PYTHON, package="mosaicml-streaming", own_format=True),
    "range_get": Contestant("range_get"),
}
PEERS = tuple(name for name, contestant in CONTESTANTS.items() if contestant.is_peer)


@dataclass(frozen=True)
class Site:
    """Where the contestants run, and what they read.

    Attributes:
        folder: A folder for local files.
        server: The S3 server.
        environment: The environment variables of every contestant.
        job: What they are told.
        pairs: How many pairs there are.
        pair_bytes: Bytes of the two JPEGs of a pair, on average.
    """

    folder: Path
    server: S3Server
    environment: Mapping[str, str]
    job: Job
    pairs: int
    pair_bytes: float


def main() -> int:
    """Run the benchmark from the command line."""
    arguments = argparse.ArgumentParser(prog="python -m tests.benchmarks.stream", description=__doc__.split("\n")[0])
    arguments.add_argument("--json", type=Path, required=True, help="where the result goes")
    arguments.add_argument("--pairs", type=int, default=PAIRS, help="pairs of images (default %(default)s)")
    arguments.add_argument("--repeats", type=int, default=REPEATS, help="of each contestant (default %(default)s)")
    arguments.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=", ".join(CONTESTANTS))
    options = arguments.parse_args()
    console = Console(stderr=True)
    names = options.only or list(CONTESTANTS)
    versions: dict[str, str] = {}
    for name in names:
        if not CONTESTANTS[name].package:
            continue
        version = CONTESTANTS[name].version()
        if version is None:
            console.print(f"{name} is not installed: {INSTALL}", markup=False)
            return 2
        versions[name] = version
        console.print(f"{CONTESTANTS[name].package} {version}", highlight=False)
    try:
        result = benchmark(names, options.pairs, options.repeats, console) | {"peers": versions}
    except Failed as error:
        console.print(str(error), markup=False)
        return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for table in tables(result):
        console.print(table)
    return 0


def benchmark(names: list[str], pairs: int, repeats: int, console: Console) -> dict[str, Any]:
    """Prepare the data, run the contestants, and return everything that was measured."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix="geostream-bench-") as folder,
        local_s3(Path(folder, "s3"), metrics=True) as server,
        Progress(*columns, console=console) as progress,
    ):
        os.environ.update(server.environment())
        environment = without_aws(os.environ) | server.environment() | {"S3_ENDPOINT_URL": server.endpoint}
        job, data = prepare(Path(folder), server, names, pairs, environment, progress)
        site = Site(Path(folder), server, environment, job, data["pairs"], data["bytes"] / data["pairs"])
        raw = measure(site, names, repeats, progress)
    contestants = {name: summary(raw[name]) for name in names}
    return {
        "figures": figures(raw),
        "contestants": contestants,
        "repeats": raw,
        "machine": machine(),
        "data": data | {"batch_size": BATCH, "workers": WORKERS, "repeats": repeats},
    }


def prepare(
    folder: Path, server: S3Server, names: list[str], count: int, environment: Mapping[str, str], progress: Progress
) -> tuple[Job, dict[str, Any]]:
    """Write the data to the server in every format that is needed; return what contestants are told, and sizes."""
    task = progress.add_task("images", total=count)
    pairs = images.make_pairs(folder / "pairs", count, SEED, lambda: progress.advance(task))
    store = Store.open(f"{server.url}/bench")
    writers = [CONTESTANTS[name] for name in names if CONTESTANTS[name].own_format]
    task = progress.add_task("layouts, plans, peers' formats", total=3 + len(writers))
    clustered, unclustered = images.write_layouts(store, pairs, SEED, lambda: progress.advance(task))
    steps = images.write_plans(store, clustered, unclustered, BATCH, WORKERS, SEED)
    progress.advance(task)
    for writer in writers:
        convert(folder, writer, store, environment)
        progress.advance(task)
    job = Job(store.url, presigned(clustered), str(folder / "pairs"), "", BATCH, WORKERS, images.TILE, images.VIEW)
    tile, view = pairs.sizes.mean(axis=0).tolist()
    data = {"pairs": count, "pairs_in_plan": steps * BATCH, "bytes": pairs.n_bytes, "shards": len(job.shards)}
    return job, data | {"mean_tile_bytes": round(tile), "mean_view_bytes": round(view)}


def convert(folder: Path, peer: Contestant, store: Store, environment: Mapping[str, str]) -> None:
    """Write the pairs in the peer's own format, by its own writer, and copy them to the server."""
    name = peer.module.removeprefix("peers.")
    out = folder / name
    run([str(peer.python), "-m", "tests.benchmarks.convert", peer.path, str(folder / "pairs"), str(out)], environment)
    for file in sorted(out.rglob("*")):
        if file.is_file():
            store.write_file(f"{name}/{file.relative_to(out)}", file)
    shutil.rmtree(out)


def presigned(layout: Layout) -> list[str]:
    """Return URLs of the layout's shards that need no credentials for two hours."""
    return list(obstore.sign(s3_store(layout.store.url), "GET", layout.shard_names, timedelta(hours=2)))


def measure(site: Site, names: list[str], repeats: int, progress: Progress) -> dict[str, list[Result]]:
    """Run every contestant ``repeats`` times, in an order that rotates from repeat to repeat."""
    raw: dict[str, list[Result]] = {name: [] for name in names}
    task = progress.add_task("repeats", total=repeats * len(names))
    for repeat in range(repeats):
        at = repeat * len(names) // repeats
        for name in names[at:] + names[:at]:
            progress.update(task, description=f"repeat {repeat + 1}: {name}")
            for attempt in range(1, TRIES + 1):
                try:
                    result = once(site, CONTESTANTS[name])
                    break
                except Failed as error:
                    if not CONTESTANTS[name].is_peer or attempt == TRIES:
                        raise
                    progress.console.print(f"{name} failed: {str(error).strip().splitlines()[-1]}", markup=False)
            raw[name].append(result | {"tries": attempt})
            progress.console.print(f"repeat {repeat + 1}, {name}: {result['pairs_per_s']:.0f} pairs/s", highlight=False)
            progress.advance(task)
    return raw


def once(site: Site, contestant: Contestant) -> Result:
    """Run a contestant once, and return what it measured of itself and what the server sent it.

    Raises:
        Failed: It ended in an error, or a peer left out more than the last batch of each worker.
    """
    scratch = site.folder / "scratch"
    scratch.mkdir()
    try:
        write_job(replace(site.job, scratch=str(scratch)), site.folder / "job.json")
        command = [str(contestant.python), "-m", f"{__package__}.job", contestant.path, contestant.function]
        before = read_traffic(site.server.metrics_url)
        server = psutil.Process(site.server.child.pid)
        result = run([*command, str(site.folder / "job.json")], site.environment, server)
        sent = read_traffic(site.server.metrics_url).since(before)
    finally:
        shutil.rmtree(scratch)
    if contestant.is_peer and result["pairs"] < site.pairs - BATCH * WORKERS:
        raise Failed(f"{contestant.package} handed over {result['pairs']} of {site.pairs} pairs")
    result |= {"requests": sent.requests, "bytes_fetched": sent.bytes_fetched}
    result["amplification"] = sent.bytes_fetched / (result["pairs"] * site.pair_bytes)
    result["requests_per_gib"] = sent.requests * GIB / max(sent.bytes_fetched, 1)
    return result


def figures(raw: Mapping[str, list[Result]]) -> dict[str, Any]:
    """Compute the figures that the benchmark is for, of the contestants that ran."""

    def of(name: str, number: str = "pairs_per_s") -> list[float]:
        return [repeat[number] for repeat in raw[name]]

    made: dict[str, Any] = {}
    if {"geostream_transport", "limit_fetch"} <= raw.keys():
        made["transport_of_limit"] = ratio(of("geostream_transport"), of("limit_fetch"), ">= 0.8")
    if {"geostream", *PEERS} <= raw.keys():
        medians = {name: summary(raw[name])["pairs_per_s"]["median"] for name in PEERS}
        best = max(medians, key=lambda name: medians[name])
        made["end_to_end_of_best_peer"] = ratio(of("geostream"), of(best), ">= 1.5") | {"best_peer": best}
        if "limit_decode" in raw:  # nobody's ratio can be better than that of decoding alone
            bound = ratio(of("limit_decode"), of(best), ">= 1.5")["value"]
            made["end_to_end_of_best_peer"]["bound_by_decoding"] = bound
    if {"geostream_transport", "range_get"} <= raw.keys():
        made["transport_of_range_get"] = ratio(of("geostream_transport"), of("range_get"), ">= 3")
    if "geostream" in raw:
        made["amplification"] = figure(of("geostream", "amplification"), "<= 1.05")
        made["requests_per_gib"] = figure(of("geostream", "requests_per_gib"), "<= 40")
        made["first_batch_s"] = figure(of("geostream", "first_batch_s"), "<= 1.5")
    return made


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the result as a person reads it."""
    rows = Table("contestant", "pairs/s", "spread", "fetched/used", "requests/GiB", "first batch s", "peak MB", "CPU s")
    for name, numbers in result["contestants"].items():
        rate = numbers["pairs_per_s"]
        rows.add_row(
            f"{name} {result['peers'].get(name, '')}".rstrip(),
            f"{rate['median']:.0f}",
            f"{rate['min']:.0f}–{rate['max']:.0f}",
            *(f"{numbers[key]['median']:{kind}}" for key, kind in COLUMNS.items()),
            f"{numbers['peak_bytes']['median'] / 1e6:.0f}",
            f"{numbers['cpu_s']['median']:.1f}",
        )
    return [rows, figures_table(result["figures"])]


COLUMNS = {"amplification": ".3f", "requests_per_gib": ".1f", "first_batch_s": ".2f"}


if __name__ == "__main__":
    sys.exit(main())
