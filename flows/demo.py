"""Run the whole loop on this machine with real servers, in a few minutes: the command ``geostream demo``.

Starts an S3 server and a Prefect server, renders VIGOR-like cities, shards them by the flow that deployments run,
trains by the flow that schedules run, locates photos of cities that were not trained on, and prints the results. Each
demo begins anew: what an earlier one made in its folder is removed, so that the figures are those of one run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geostream.cli.options import print_table
from geostream.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from geostream.runs.run import Run

LAYOUT = "base"
RUN = "demo"
MARK = ".geostream-demo"  # in a demo's folder: the names in it that are the demo's, which the next one may remove
OWN = ("raw", "s3", "prefect", "photos", "store", "report.html", "summary.json")


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for everything it makes; an earlier demo there is replaced.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the cities and of the training.")] = 0,
    city: Annotated[str, typer.Option(help="Size of the rendered cities: demo, or small to only see it run.")] = "demo",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="A training setting, name=value.")] = None,
) -> None:
    """Run the whole loop on rendered cities: shard, train, mine, evaluate, report."""
    with _own_folder(out):
        _demo(out, seed, city, overrides or [])


def _demo(out: Path, seed: int, city: str, overrides: list[str]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    started = time.monotonic()
    seconds: dict[str, float] = {}
    with ExitStack() as servers:
        store_url = _start(servers, out, city, seed, seconds, console)
        run, flow_runs = _run_flows(store_url, out / "raw", seed, overrides, seconds, console)
        # Only now: the flow has imported it while its ranks started, which takes seconds.
        from flows.located import index_and_locate
        from geostream.cli.locate import answer_rows
        from geostream.locating.locate import as_geojson
        from geostream.report import report
        from geostream.runs.log import RunResult

        result = RunResult.of(run.url, run.log, already_finished=True)
        summary = report.summarise(store_url, run.layout, result)
        summary |= {"flow_runs": flow_runs, "settings": run.settings.flat()}
        summary["seconds"] |= {name: round(value, 1) for name, value in seconds.items()}
        summary["seconds"]["total"] = round(time.monotonic() - started, 1)
        page = report.publish(run, result, summary)
        began = time.monotonic()
        answers = index_and_locate(run, out / "raw", out)
        summary["seconds"]["locate"] = round(time.monotonic() - began, 1)
        summary["seconds"]["total"] = round(time.monotonic() - started, 1)
        summary["located"] = as_geojson(answers)
    (out / "report.html").write_text(page, encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print_table("recall on unseen cities", summary["evaluations"])
    print_table("epoch plans", summary["plans"])
    print_table("generations of the layout", summary["reclusterings"])
    print_table("seconds", [summary["seconds"]])
    print_table("where three photos of these cities were taken", answer_rows(answers))
    console.print(f"again:   geostream locate {out / 'photos'}/*.jpg --store {out / 'store'}")
    console.print(f"a page:  geostream serve {out / 'store'}")
    console.print(f"summary: {out / 'summary.json'}")
    console.print(f"report:  {out / 'report.html'}")


@contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """Hold the folder ``out`` for one demo, without what an earlier one made there.

    Raises BadInput where it holds what no demo made, or where another demo is under way.
    """
    import fcntl  # only here: Windows has none, and every command imports this module

    mark = out / MARK
    if out.exists() and any(out.iterdir()) and not mark.is_file():
        raise BadInput(f"{out}: holds something else than an earlier demo; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    with mark.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{out}: another demo is under way here; name another folder with --out") from None
        for name in OWN:
            _remove(out / name)
        lock.truncate(0)
        lock.write(json.dumps(OWN) + "\n")
        lock.flush()
        yield


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link, not what the link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _start(servers: ExitStack, out: Path, city: str, seed: int, seconds: dict[str, float], console: Console) -> str:
    """Start both servers, point this process to them and render the cities; return the store's URL.

    The cities are rendered while Prefect creates its database. This thread starts the servers, because Linux ends
    them with the thread that started them.
    """
    from flows.rendered import render
    from infra.dask_cluster import without_dask
    from infra.prefect_server import local_prefect, without_prefect
    from infra.s3 import local_s3, without_aws

    console.print("starting an S3 server and a Prefect server on loopback, rendering cities")
    started = time.monotonic()
    pool = servers.enter_context(ThreadPoolExecutor(1))
    s3 = servers.enter_context(local_s3(out / "s3"))
    rendering = pool.submit(render, out / "raw", "vigor", city, seed)
    prefect = servers.enter_context(local_prefect(out / "prefect"))
    seconds["servers"] = time.monotonic() - started
    # What else the user's environment says of S3, Prefect and Dask is about other servers.
    environment = without_dask(without_prefect(without_aws(os.environ))) | s3.environment() | prefect.environment()
    os.environ.clear()
    os.environ.update(environment)
    # The bars and tables tell the story; the flows' own log lines would run through them.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    rendered = rendering.result()
    seconds["render"] = rendered.seconds
    console.print(
        f"{rendered.views:,} panoramas, {rendered.tiles:,} tiles of {rendered.cities} cities in {out / 'raw'}"
    )
    return s3.url


def _run_flows(
    store_url: str, raw: Path, seed: int, overrides: list[str], seconds: dict[str, float], console: Console
) -> tuple[Run, list[dict[str, str]]]:
    """Shard and train by the flows; return the run, and the flow runs as Prefect knows them."""
    # Only now: Prefect learns where its server is when it is imported.
    from prefect.client.orchestration import get_client

    from flows.parameters import Settings, ShardingOptions
    from flows.rendered import dataset_name, shard_options
    from flows.retrain import retrain
    from flows.shard import shard
    from geostream.layout import open_layout
    from geostream.settings import default_settings, parse_settings
    from geostream.store import Store

    dataset = dataset_name("vigor")
    settings = parse_settings([*overrides, f"seed={seed}"], default_settings(dataset))
    started = time.monotonic()
    options = ShardingOptions.model_validate(shard_options("vigor"))
    shard(raw=str(raw), store=store_url, dataset=dataset, layout=LAYOUT, options=options)
    seconds["shard"] = time.monotonic() - started
    store = Store.open(store_url)
    layout = open_layout(store, dataset, LAYOUT)
    console.print(
        f"{layout.n_places:,} places in {len(layout.shard_names)} shards at {layout.store.url}; "
        f"training {settings.model.name} for {settings.optim.epochs} epochs"
    )
    retrain(store=store_url, dataset=dataset, run=RUN, settings=Settings.model_validate(settings.flat()))
    with get_client(sync_client=True) as client:
        runs = sorted(client.read_flow_runs(), key=lambda run: str(run.start_time))
        flow_runs = [
            {"flow": client.read_flow(run.flow_id).name, "name": run.name, "state": run.state_name or "unknown"}
            for run in runs
        ]
    from geostream.runs.run import Run  # which the flow has imported by now

    return Run.open(store, layout, RUN), flow_runs
